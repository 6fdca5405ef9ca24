"""What rounded weights cost and save: `python -m benchmarks.weights [RUN ...]`.

Exports the pretrained MNIST ensemble, and runs whose directories are given, with weights in float32, bf16 and int8.
Accuracies are of the whole ensemble on the validation rows of its run. Read-only data is that of the compiled object.
Times are the fastest of one image in C on one thread, all of an ensemble timed in turn. `--write` writes
docs/weights.json and the table of docs/inference.md.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.report import conclude, show
from benchmarks.tables import DOCS, SLOT, markdown
from benchmarks.timing import Row, interleaved, judged, shown, summary
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.evaluate import hardware, versions
from pkd_lightning.export import Exported, export, name_of
from pkd_lightning.export.c_source import loaded
from pkd_lightning.rounding import WEIGHTS
from pkd_lightning.saved import folder_of

RESULTS, DOCUMENT = DOCS / "weights.json", DOCS / "inference.md"
FLAGS = ("-O3", "-march=native")  # for the C compiler
SECTION = re.compile(r"^\.(rodata|data\.rel\.ro)\S*\s+(\d+)", re.MULTILINE)  # of what `size -A` prints


def rows(run: str, rounds: int) -> list[Row]:
    """A row a kind of weights, of a run or a pretrained ensemble."""
    folder = folder_of(run)
    source = folder.parent if folder.name == "students" else folder
    name = f"{run}, pretrained" if not Path(run).exists() else name_of(source).rsplit("-", 1)[0]
    ensemble = ProgressiveEnsemble.load(source)
    images = torch.zeros(1, *ensemble.task.input_shape, dtype=torch.uint8)
    logits = torch.empty(ensemble.task.num_classes)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        calls, found = {}, []
        for weights in WEIGHTS:
            c, tensors = (export(source, format, folder / weights, weights=weights) for format in ("c", "safetensors"))
            predict = stack.enter_context(loaded(c.path, c.path, FLAGS))
            calls[weights] = lambda predict=predict: predict(images.data_ptr(), len(ensemble), logits.data_ptr())
            sizes = {"c_bytes": c.path.stat().st_size, "rodata_bytes": read_only(c.path)}
            sizes["safetensors_bytes"] = tensors.path.stat().st_size
            found.append({"ensemble": name, "students": len(ensemble), "weights": weights, **sizes, **answers(c)})
        plain = found[1]["accuracy_before"]
        found[0] |= {"accuracy": plain, "same": 1.0}
        times = interleaved(calls, rounds)
    base = min(times["float32"])

    def fastest(weights: str) -> Row:
        """Other work on the machine disturbs medians by more than kinds of weights differ."""
        return {"fastest_ms": min(times[weights]), "against": "float32"}

    return [
        judged(
            {"what": f"{name}, {row['weights']}", **row, **summary(times[row["weights"]]), **fastest(row["weights"])},
            base / min(times[row["weights"]]),
            "x as fast",
        )
        for row in found
    ]


def answers(done: Exported) -> Row:
    """Accuracy and answers of a rounded ensemble on its run's validation rows."""
    if done.effect is None:
        return {}
    if done.effect.accuracies is None:
        raise SystemExit(f"error: {done.facts.name}: its run's validation data are not at hand")
    before, after = done.effect.accuracies[-1]
    return {"accuracy_before": before, "accuracy": after, "same": done.effect.same[-1], "images": done.effect.images}


def read_only(source: Path) -> int:
    """Bytes of read-only data in the object that a C file is compiled to."""
    target = source.with_suffix(".o")
    subprocess.run(["cc", "-std=c99", *FLAGS, "-c", source, "-o", target], check=True)
    listed = subprocess.run(["size", "-A", target], capture_output=True, text=True, check=True).stdout
    return sum(int(size) for _, size in SECTION.findall(listed))


def weights(rows: Sequence[Row]) -> str:
    """A line an ensemble and kind of weights."""
    head = [
        "ensemble, weights", "validation accuracy, %", "same answers, %", "C file, kB", "its read-only data, kB",
        "safetensors, kB", "one image in C, fastest, ms",
    ]  # fmt: skip
    lines = []
    for row in rows:
        sizes = [f"{row[name] / 1000:.1f}" for name in ("c_bytes", "rodata_bytes", "safetensors_bytes")]
        shares = [f"{100 * row['accuracy']:.2f}", f"{100 * row['same']:.2f}"]
        lines.append([row["what"], *shares, *sizes, shown(row["fastest_ms"])])
    return markdown(head, lines)


def fill(text: str, rows: Sequence[Row]) -> str:
    """`text` with this benchmark's table written anew."""
    return SLOT.sub(lambda slot: slot[1] + weights(rows) + slot[3] if slot[2] == "weights" else slot[0], text)


def main(arguments: list[str] | None = None) -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directories of finished runs, besides the pretrained")
    parser.add_argument("--rounds", type=int, default=500, help="timed rounds")
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = [row for run in ("mnist", *options.runs) for row in rows(run, options.rounds)]
    show("weights", found)
    conclude(found)
    if options.write:
        content = {"hardware": hardware(), "versions": versions(), "rounds": options.rounds, "rows": found}
        RESULTS.write_text(json.dumps(content, indent=2) + "\n")
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), found))


if __name__ == "__main__":
    main()
