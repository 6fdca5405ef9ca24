"""The table of a run: the same rows for the terminal and for the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pkd_lightning.reporting.load import COST_KEYS, Row
from pkd_lightning.reporting.teachers import TEACHERS_HEAD, teachers_notes, teachers_table
from pkd_lightning.reporting.values import (
    ACCEPTED_FULL,
    ACCEPTED_SHORT,
    MISSING,
    acceptance,
    condition_counts,
    count,
    decimal,
    distilled,
    duration,
    latency,
    number,
    percent,
    prefix_cost,
    ratio,
    share,
    terms,
    trained_together,
)

NOTHING = "–"  # noqa: RUF001  (an en dash: the cell has no meaning in this row)


class TableConsole(Console):
    """A console that leaves it to `commands.end_with_reader` where its reader, such as `head`, has ended."""

    def on_broken_pipe(self) -> None:
        """Raise the error again, in place of rich's exit code 1."""
        raise  # rich calls this while it handles the error


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: of the cell in a row.
        title: heading on the page.
        head: heading in the terminal, on two lines; empty where the terminal never shows the column.
        rank: how early it is dropped on a narrow terminal; equal ranks go together, rank 0 never goes.
    """

    key: str
    title: str
    head: str = ""
    rank: int = 0


# The two cost conventions share a rank: never one without the other.
COLUMNS = (
    Column("student", "student", "\nstudent", 0),
    Column("rung", "rung", "\nrung", 8),
    Column("alone", "accuracy alone", "acc.\nalone", 1),
    Column("prefix", "accuracy of prefix", "acc.\nprefix", 0),
    Column("agreement", "prefix agrees with teacher", "same as\nteacher", 6),
    Column("edges", "edges met", "edges\nmet", 4),
    Column("accepted", "accepted by", "accepted\nby", 5),
    Column("params", "parameters", "params\nown", 7),
    Column("params_prefix", "parameters of prefix", "params\nprefix", 3),
    Column("params_share", "parameters of prefix / teacher"),
    Column("flops_published", "published FLOPs"),
    Column("flops_published_share", "published FLOPs of prefix / teacher", "FLOPs\npubl.", 2),
    Column("macs_total", "total MACs"),
    Column("macs_total_share", "total MACs of prefix / teacher", "MACs\ntotal", 2),
    Column("nll", "prefix NLL (nats)"),
    Column("ece", "prefix ECE"),
    Column("latency", "latency alone (ms)"),
    Column("latency_prefix", "latency of prefix (ms)", "ms\nprefix", 9),
    Column("attempts", "attempts"),
    Column("epochs", "epochs"),
    Column("seconds", "time", "\ntime", 10),
)


# The page's two tables: all columns at once are twice as wide as a page.
ACCURACY_COLUMNS = (
    *("student", "rung", "alone", "prefix", "agreement", "nll", "ece"),
    *("edges", "accepted", "attempts", "epochs", "seconds"),
)
COST_COLUMNS = (
    *("student", "params", "params_prefix", "params_share", "flops_published", "flops_published_share"),
    *("macs_total", "macs_total_share", "latency", "latency_prefix"),
)


def student_rows(results: Row, digits: int = 1) -> list[dict[str, str]]:
    """One row of text cells per student, in the order of the rounds."""
    totals = {key: prefix_cost(results, key) for key in COST_KEYS}
    rows = []
    for index, entry in enumerate(results["rounds"]):
        kind = acceptance(entry)
        counted = index > 0 and entry.get("trained") == "together"  # with the first student, in whose row it stands
        edges = entry.get("edges")
        met = f"{count(number(edges, 'satisfied'))}/{count(number(edges, 'classes'))}" if edges is not None else NOTHING
        row = {
            "student": str(index + 1),
            "rung": count(number(entry, "class_index") + 1),
            "alone": percent(number(entry, "accuracy"), digits),
            "prefix": percent(number(entry, "prefix_accuracy"), digits),
            "agreement": percent(number(entry, "prefix_agreement"), digits),
            "nll": decimal(number(entry, "prefix_nll"), 3),
            "ece": decimal(number(entry, "prefix_ece"), 3),
            "params_prefix": count(totals["params"][index]),
            "edges": met,
            "accepted": ACCEPTED_SHORT.get(kind, kind),
            "accepted_full": ACCEPTED_FULL.get(kind, kind),
            "latency": latency(entry),
            "latency_prefix": latency(entry, "prefix_"),
            "attempts": count(number(entry, "attempts")),
            "epochs": NOTHING if counted else count(number(entry, "epochs")),
            "seconds": NOTHING if counted else duration(number(entry, "seconds")),
        }
        for key in COST_KEYS:
            row[key] = count(number(entry, key))
            row[f"{key}_share"] = share(ratio(totals[key][index], number(results["teacher"], key)))
        rows.append(row)
    return rows


def teacher_row(results: Row, digits: int = 1) -> dict[str, str]:
    """The teacher's row: the same cells, and a dash where a cell is about rounds.

    Parameters and latency stand in both columns, since a narrow terminal keeps only one.
    """
    teacher = results["teacher"]
    row = {column.key: NOTHING for column in COLUMNS}
    row |= {
        "student": "teacher",
        "alone": percent(number(teacher, "accuracy"), digits),
        "nll": decimal(number(teacher, "nll"), 3),
        "ece": decimal(number(teacher, "ece"), 3),
        "latency": latency(teacher),
        "seconds": duration(number(results, "wall_seconds", "teacher")),
        "accepted_full": NOTHING,
    }
    for key in COST_KEYS:
        value = number(teacher, key)
        row[key] = count(value)
        row[f"{key}_share"] = share(ratio(value, value))
    row["params_prefix"], row["latency_prefix"] = row["params"], row["latency"]
    return row


def columns_of(results: Row) -> list[Column]:
    """The columns that say something of a run: without a teacher none that compares with it."""
    if distilled(results):
        return list(COLUMNS)
    compared = ("agreement", "edges", *(f"{key}_share" for key in COST_KEYS))
    return [column for column in COLUMNS if column.key not in compared]


def print_table(results: Row, console: Console | None = None) -> None:
    """Print a run's students, its teacher and why it stopped.

    Narrow terminals lose the less important columns; no cell is ever wrapped.

    Args:
        results: the content of `results.json`.
        console: where to print; a new one on standard output by default.
    """
    console = console or TableConsole()
    rows = student_rows(results)
    teacher = [teacher_row(results)] if distilled(results) else []
    columns = _fitting(columns_of(results), [*rows, *teacher], console.width)
    # Text, not str, everywhere: a name out of the data may hold rich's markup.
    title = Text(_title(results), overflow="fold")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        left = column.key in ("student", "accepted")
        table.add_column(Text(column.head), justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    for index, row in enumerate(rows):
        table.add_row(*(Text(row[column.key]) for column in columns), end_section=index == len(rows) - 1)
    for row in teacher:
        table.add_row(*(Text(row[column.key], style="bold") for column in columns))
    console.print(table)
    for line in _footnotes(results, {column.key for column in columns}, [*rows, *teacher]):
        console.print(Text(line))
    _print_teachers(results, console)


def _print_teachers(results: Row, console: Console) -> None:
    """Print several teachers, or a chain of assistants, where there are any."""
    rows = teachers_table(results)
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, head in enumerate(TEACHERS_HEAD.values()):
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(Text(head), justify=justify, no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for note in teachers_notes(results):
        console.print(Text(note))


def condition_sentence(results: Row) -> str:
    """How many students after the first met the weak-learning condition; empty where there are none."""
    met, later = condition_counts(results)
    if not later:
        return ""
    return f"{met} of {later} students after the first met the weak-learning condition for every class."


def _title(results: Row) -> str:
    words = [str(results.get(key, MISSING)) for key in ("experiment", "dataset", "objective", "combine")]
    words[2] += f" objective{terms(results)}"
    return f"{words[0]}: {words[1]}, {words[2]}, {words[3]} combination, seed {results.get('seed', MISSING)}"


def _footnotes(results: Row, shown: set[str], rows: Sequence[dict[str, str]]) -> list[str]:
    lines = []
    if "macs_total_share" in shown:
        lines.append(
            "FLOPs publ., MACs total: the prefix in % of the teacher; the paper's FLOPs count in_proj alone of a block."
        )
    if "latency_prefix" in shown:
        lines.append("ms: CPU time of one image on one thread, the least of several calls.")
        if any("~" in row["latency"] + row["latency_prefix"] for row in rows):
            lines.append("~: other work disturbed the measurement.")
    if "edges" in shown and results["rounds"]:
        lines.append("The first student's edges are zero by definition. " + condition_sentence(results))
    if not distilled(results):
        lines.append("No teacher.")
    if trained_together(results):
        lines.append("All students were trained together, in one fit: its time and epochs are in the first row.")
    if results.get("stop_reason"):
        lines.append(f"Stopped: {results['stop_reason']}")
    return lines


def _fitting(columns: Sequence[Column], rows: Sequence[dict[str, str]], width: int) -> list[Column]:
    """Those of the columns that fit in `width` characters, dropped by rank."""
    columns = [column for column in columns if column.head]
    while True:
        needed = sum(_width(column, rows) + 2 for column in columns) + 1  # padding and separator a column, and the edge
        worst = max(column.rank for column in columns)
        if needed <= width or worst == 0:
            return columns
        columns = [column for column in columns if column.rank < worst]


def _width(column: Column, rows: Sequence[dict[str, str]]) -> int:
    return max(Text(text).cell_len for text in [*column.head.split("\n"), *(row[column.key] for row in rows)])
