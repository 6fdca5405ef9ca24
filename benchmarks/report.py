"""What a benchmark prints and writes."""

import json
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Row, missed, shown
from pkd_lightning.evaluate import hardware, versions

COMPARED = ("mambapy", "mamba_ssm")  # packages that results also depend on, where they are installed


def show(section: str, rows: Sequence[Row]) -> None:
    """Print a section's rows as a table."""
    table = Table(
        section, *("ms", "spread %", "against", "ms", "spread %", "figure", "", "target", "met"), box=box.SIMPLE
    )
    for row in rows:
        target, met = row.get("target", ""), {True: "yes", False: "NO", None: ""}[row.get("met")]
        times = _time(row, ""), row.get("against", ""), _time(row, "against_")
        unit = f"{row['unit']} ({row['note']})" if "note" in row else row["unit"]
        table.add_row(row["what"], *times[0], times[1], *times[2], shown(row["figure"]), unit, target, met)
    Console(width=200).print(table)


def _time(row: Row, prefix: str) -> tuple[str, str]:
    if f"{prefix}median_ms" not in row:
        return "", ""
    return shown(row[f"{prefix}median_ms"]), f"{row[f'{prefix}spread_percent']:.0f}"


def conclude(rows: Sequence[Row]) -> None:
    """Print which targets fall short."""
    short, targets = missed(rows), [row for row in rows if "target" in row]
    print(f"{len(targets) - len(short)} of {len(targets)} targets met" + (", these fall short:" if short else ""))
    for row in short:
        against = f" ({row['against']})" if row["unit"] == "x its time" else ""
        against = f" as {row['against']}" if row["unit"] == "x as fast" else against
        note = f" ({row['note']})" if "note" in row else ""
        print(f"  {row['what']}: {shown(row['figure'])} {row['unit']}{against}, target {row['target']}{note}")


def version_of(module: str) -> str:
    """The version of the package that a module is of; `unknown` where it lies on the path without one."""
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return "unknown"


def write(path: Path, rows: Sequence[Row], **also: object) -> None:
    """Write everything as JSON, with the hardware and the versions."""
    compared = {name: version_of(name) for name in COMPARED if find_spec(name)}
    about = {"hardware": hardware(), "versions": {**versions(), **compared}}
    content = {**about, **also, "rows": rows, "falls_short": missed(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written: {path}")
