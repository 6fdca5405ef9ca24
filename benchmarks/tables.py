"""Writes the tables of docs/performance.md: `python -m benchmarks.tables [--from RESULTS] [--gpu RESULTS]`.

They are made of docs/performance.json, docs/latency.json and docs/gpu.json. A table stands between
`<!-- bench: NAME -->` and `<!-- end of bench -->`. With `--from` the results of a run of `make bench` become
docs/performance.json first, with `--gpu` those of `make bench-gpu` docs/gpu.json.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.timing import Row, shown

DOCS = Path(__file__).parent.parent / "docs"
RESULTS, LATENCIES, GPU = DOCS / "performance.json", DOCS / "latency.json", DOCS / "gpu.json"
DOCUMENT = DOCS / "performance.md"
SLOT = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end of bench -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def scan(rows: Sequence[Row]) -> str:
    """A line a workload; forward / forward and backward."""
    of = [row for row in rows if row.get("section") == "scan"]
    names = dict.fromkeys(re.sub(r" forward.*", "", row["what"]) for row in of)
    head = ["scan", "ms", "x plain loop", "x mambapy", "x reference", "of the floor", "two threads", "memory"]
    lines = []
    for name in names:
        cells: dict[str, list[str]] = {}
        for kind in ("forward", "forward+backward"):
            for row in of:
                if not row["what"].startswith(f"{name} {kind}") or row["what"][len(f"{name} {kind}") :][:1] == "+":
                    continue
                key = "memory" if "memory" in row["what"] else row["against"]
                cells.setdefault(key, []).append(shown(row["figure"]))
                if key == "plain loop":
                    cells.setdefault("ms", []).append(shown(row["median_ms"]))
        order = ("ms", "plain loop", "mambapy", "reference", "floor", "one thread", "memory")
        lines.append([name.removeprefix("scan "), *(" / ".join(cells.get(key, [])) for key in order)])
    return markdown(head, lines)


def block(rows: Sequence[Row]) -> str:
    """A line a block; forward / forward and backward."""
    of = [row for row in rows if row.get("section") == "block"]
    names = dict.fromkeys(re.sub(r" forward.*", "", row["what"]) for row in of)
    lines = []
    for name in names:
        own = [row for row in of if row["what"].startswith(f"{name} forward")]
        times = dict.fromkeys(shown(row["median_ms"]) for row in own if row["against"] == "unfused block")
        faster = [shown(row["figure"]) for row in own if row["against"] == "unfused block"]
        share = [shown(row["figure"]) for row in own if row["against"] == "scan alone"]
        lines.append([name.removeprefix("block of "), " / ".join(times), " / ".join(faster), " / ".join(share)])
    return markdown(["block", "ms", "x unfused", "of the scan alone"], lines)


def step(rows: Sequence[Row]) -> str:
    """A line a model; one thread and two, and with its local convolutions and norms by kernels against by torch."""
    of = [row for row in rows if row.get("section") == "step"]
    names = dict.fromkeys(row["what"].rsplit(",", 1)[0] for row in of)
    lines = []
    for name in names:
        own = [row for row in of if row["what"].startswith(f"{name},")]
        timed = [row for row in own if "against" not in row]
        cells = [text for row in timed for text in (shown(row["median_ms"]), shown(row["figure"]))]
        faster = [shown(row["figure"]) for row in own if "against" in row]
        lines.append([name.removeprefix("training step of "), *cells, "".join(faster)])
    head = ["step", "1 thread, ms", "s an epoch", "2 threads, ms", "s an epoch", "x local convolutions, norms by torch"]
    return markdown(head, lines)


def others(rows: Sequence[Row]) -> str:
    """The sections with a figure a line."""
    of = [row for row in rows if row.get("section") in ("fit", "data", "rounds")]
    lines = []
    for row in of:
        against = f" ({row['against']})" if row.get("against") else ""
        lines.append([row["what"], f"{shown(row['figure'])} {row['unit']}{against}", row.get("target", "")])
    return markdown(["what", "figure", "target"], lines)


def missed(rows: Sequence[Row]) -> str:
    """The targets that fall short."""
    short = [row for row in rows if row.get("met") is False]
    lines = []
    for row in short:
        note = f"({row['note']})" if "note" in row else None
        figure = (shown(row["figure"]), row["unit"], row.get("against"), note)
        lines.append([row["what"], " ".join(filter(None, figure)), row["target"]])
    targets = sum("target" in row for row in rows)
    return f"{targets - len(short)} of {targets} targets met. Short of theirs:\n\n" + markdown(
        ["what", "figure", "target"], lines
    )


def latency(rows: Sequence[Row]) -> str:
    """A line a model: of the rows of benchmarks.latency."""
    of = [row for row in rows if "model" in row]
    lines = [[row["model"], f"{row['ms']:.2f}", f"{row['prefix_ms']:.2f}" if "prefix_ms" in row else ""] for row in of]
    return markdown(["student", "alone, ms", "first t together, ms"], lines)


def gpu_scan(rows: Sequence[Row]) -> str:
    """A line a workload and number type; forward / forward and backward."""
    lines: dict[str, list[list[str]]] = {}
    for row in rows:
        if row.get("section") == "gpu scan":
            name = re.sub(r" forward.*", "", row["what"]).removeprefix("scan ")
            cells = lines.setdefault(name, [[], [], []])
            if row["against"] == "reference":
                cells[0].append(shown(row["median_ms"]))
            cells[2 if row["against"] == "reference" else 1].append(shown(row["figure"]))
    head = ["scan", "ms", "x the time of mamba_ssm alone", "x reference"]
    return markdown(head, [[name, *map(" / ".join, cells)] for name, cells in lines.items()])


def gpu_step(rows: Sequence[Row]) -> str:
    """A line a model and number type: kernels started singly, and as graphs."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        if row.get("section") == "gpu step":
            cells = lines.setdefault(row["what"].rsplit(",", 1)[0].removeprefix("training step of "), [])
            cells += [shown(row["figure"])] if "against" in row else [shown(row["median_ms"]), shown(row["figure"])]
    head = ["step", "singly, ms", "images a second", "graphs, ms", "images a second", "x as fast"]
    return markdown(head, [[name, *cells] for name, cells in lines.items()])


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "scan": scan,
    "block": block,
    "step": step,
    "others": others,
    "missed": missed,
    "latency": latency,
    "gpu_scan": gpu_scan,
    "gpu_step": gpu_step,
}


def fill(text: str, rows: Sequence[Row]) -> str:
    """`text` with every table written anew."""
    return SLOT.sub(lambda slot: slot[1] + TABLES[slot[2]](rows) + slot[3], text)


def main(arguments: list[str] | None = None) -> None:
    """Fill the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="results that `make bench` wrote")
    parser.add_argument("--gpu", type=Path, help="results that `make bench-gpu` wrote")
    options = parser.parse_args(arguments)
    for source, kept in ((options.source, RESULTS), (options.gpu, GPU)):
        if source is not None:
            kept.write_text(source.read_text())
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), stored()))


def stored() -> list[Row]:
    """The rows that the tables are made of."""
    rows = [row for path in (RESULTS, LATENCIES) for row in _rows(path)]
    return rows + [{**row, "section": f"gpu {row['section']}"} for row in _rows(GPU)]


def _rows(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text())["rows"]
    return rows


if __name__ == "__main__":
    main()
