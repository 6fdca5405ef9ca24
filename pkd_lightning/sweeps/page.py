"""The page of a sweep, its tables as CSV and Markdown beside it, and in the terminal."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pkd_lightning.checkpoint import atomic_write
from pkd_lightning.errors import RunError
from pkd_lightning.reporting import page, style
from pkd_lightning.reporting.grouping import short_keys, within
from pkd_lightning.reporting.table import TableConsole
from pkd_lightning.reporting.values import MISSING, count, duration, engineering, number, percent
from pkd_lightning.rundir import VOLATILE
from pkd_lightning.sweeps.figures import front_figure, swept_figures
from pkd_lightning.sweeps.records import brief, pair
from pkd_lightning.sweeps.summary import SEED, JobRow, Setting, Summary

PAGE = "report.html"
TEST = "test (chose nothing)"
TERMINAL = {TEST: "test", "seeds finished": "seeds", "total MACs": "MACs", "time a run": "time"}  # shorter headings
LEAST = 8  # characters of a column of words in a narrow terminal
MOST_LINES = 40  # of a table in the terminal
CHOSEN = "Settings are chosen by validation accuracy. The test accuracy chose nothing, it is only shown."


def write_summary(summary: Summary, out: Path | None = None) -> Path:
    """Write a sweep's page, and beside it the table of jobs as `.csv` and all tables as `.md`.

    Args:
        summary: the sweep.
        out: the page's file; `report.html` in the sweep's directory by default.

    Returns:
        The page.

    Raises:
        RunError: nothing can be written.
    """
    out = out or summary.sweep.path / PAGE
    page.write(out, sweep_page(summary))
    for ending, text in ((".csv", jobs_csv(summary)), (".md", markdown(summary))):
        file = out.with_suffix(ending)
        try:
            atomic_write(file, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        except OSError as error:
            raise RunError(f"cannot write {file}: {error.strerror}") from error
    return out


def sweep_page(summary: Summary) -> str:
    """One self-contained page."""
    name = summary.sweep.path.name
    shared = [override for override in summary.sweep.common if not within(pair(override)[0], VOLATILE)]
    graphics = []
    with style.styled():
        if summary.points:
            caption = (
                "Hollow: a whole ensemble, mean over seeds. Small: its first 1, 2, ... students, which are usable "
                "models too. The line is the Pareto front: what nothing else beats in validation accuracy with as few "
                "MACs. Its numbers are those of the table below."
            )
            svg = style.svg(front_figure(summary), "front", "Validation accuracy against total MACs")
            graphics.append(page.figure("Accuracy against compute", caption, [svg], beside=True))
        panels = swept_figures(summary)
        if panels:
            caption = (
                "Validation accuracy of each finished job against each thing that was swept, whatever the others were. "
                "A bar is the mean of the jobs at a value."
            )
            svgs = [style.svg(figure, f"swept{index}", f"Validation accuracy against {key}")
                    for index, (key, figure) in enumerate(panels)]  # fmt: skip
            graphics.append(page.figure("What was swept", caption, svgs))
    body = [
        page.heading(f"Sweep {name}", f"{summary.counts} · {' · '.join(shared) or 'no common settings'}"),
        page.tiles(_tiles(summary)),
        page.paragraphs([best_sentence(summary)]),
        page.notes(summary.notes),
        page.notes(_failures(summary), "Failed jobs; the same command tries them again"),
        f'<div class="figures">{"".join(graphics)}</div>' if graphics else "",
    ]  # fmt: skip
    for title, head, rows, text in tables(summary):
        strong = [0] if title == SETTINGS and summary.best is not None else []
        body += [page.section_heading(title), page.table(head, rows, text, strong)]
    body.append(page.paragraphs([CHOSEN, f"Directories are relative to {summary.sweep.path.resolve()}."]))
    return page.page(f"Sweep {name}", body)


SETTINGS, JOBS, FRONT = "Settings", "Jobs", "Pareto front: validation accuracy against total MACs"


def tables(summary: Summary) -> list[tuple[str, list[str], list[list[str]], list[int]]]:
    """Title, headings, rows, and the columns of text, of each table: settings, the front, jobs."""
    made = []
    short = short_keys(summary.keys)
    keys = [key for key in summary.keys if key != SEED]
    if SEED in summary.keys:
        head = [short[key] for key in keys] or ["setting"]
        rows = [
            [*([brief(setting.values.get(key, "")) for key in keys] or ["all"]), *_figures_of(setting)]
            for setting in summary.settings
        ]
        head += ["seeds finished", "validation", TEST, "total MACs", "time a run"]
        made.append((SETTINGS, head, rows, list(range(len(keys) or 1))))
    front = [
        [str(place), *(brief(point.setting.values.get(key, "")) for key in keys),
         f"all {point.students}" if point.whole else f"first {point.students}", count(point.macs),
         percent(point.validation, 2), percent(point.test, 2)]
        for place, point in enumerate(summary.front, start=1)
    ]  # fmt: skip
    if front:
        head = ["point", *(short[key] for key in keys), "students", "total MACs", "validation", TEST]
        made.append((FRONT, head, front, list(range(1, len(keys) + 2))))
    head = ["job", *(short[key] for key in summary.keys), "state", "validation", TEST, "total MACs",
            "time", "directory"]  # fmt: skip
    width = len(summary.keys)
    jobs = [[*_cells(summary, row), row.job.run or ""] for row in summary.rows]
    made.append((JOBS, head, jobs, [*range(1, width + 2), width + 6]))
    return made


def _cells(summary: Summary, row: JobRow) -> list[str]:
    """Number, what was swept, state and figures of a job."""
    time = "" if row.job.state == "waiting" else duration(row.seconds)
    return [
        str(row.job.number + 1),
        *(brief(row.values.get(key, "")) for key in summary.keys),
        row.state,
        *(_known(percent(value, 2)) for value in (row.validation, row.test)),
        _known(count(row.macs)),
        _known(time),
    ]


def _known(cell: str) -> str:
    return "" if cell == MISSING else cell


def _figures_of(setting: Setting) -> list[str]:
    done = f"{len(setting.finished)} of {len(setting.rows)}"
    cells = [setting.validation.percent(), setting.test.percent(), count(setting.macs), duration(setting.seconds)]
    return [done, *map(_known, cells)]


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    made = [("jobs finished", f"{len(summary.in_state('finished'))} of {summary.sweep.total or len(summary.rows)}",
             f"{len(summary.in_state('failed'))} failed")]  # fmt: skip
    best = summary.best
    if best is not None:
        made += [
            ("best validation", best.validation.percent(1), best.label),
            ("its test accuracy", best.test.percent(1), "of the setting chosen by validation"),
            ("its total MACs", engineering(best.macs), "of the ensemble, for one sample"),
        ]
    return made


def best_sentence(summary: Summary) -> str:
    """What was chosen, by what, and among what."""
    best = summary.best
    if best is None:
        return "No finished job, so nothing is chosen." if summary.comparable else ""
    others = [setting for setting in summary.settings if setting.finished]
    seeds = f", mean of {len(best.finished)} seeds" if len(best.finished) > 1 else ""
    pruned = len(summary.in_state("pruned"))
    open_jobs = sum(not row.finished for row in summary.rows) - pruned
    among = f"{len(others)} settings" if len(others) > 1 else "the one setting"
    text = (
        f"Best by validation among {among} with a finished job: {best.label}, "
        f"validation {best.validation.percent()}{seeds}. Its test accuracy, which chose nothing: {best.test.percent()}."
    )
    text += f" {pruned} jobs were pruned." if pruned else ""
    return text + (f" {open_jobs} jobs are not finished." if open_jobs else "")


def _failures(summary: Summary) -> list[str]:
    """A line an error, with the jobs that ended by it."""
    failed = summary.in_state("failed")
    errors = dict.fromkeys(row.job.error for row in failed)
    jobs = {error: ", ".join(str(row.job.number + 1) for row in failed if row.job.error == error) for error in errors}
    return [f"job{'s' * (',' in numbers)} {numbers}: {error}" for error, numbers in jobs.items()]


def jobs_csv(summary: Summary) -> str:
    """A line a job, with every figure in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["job", *summary.keys, "state", "students", "validation_accuracy", "test_accuracy", "macs_total",
                     "params", "seconds", "directory", "error"])  # fmt: skip
    for row in summary.rows:
        params = number(row.results or {}, "ensemble", "params") if row.finished else math.nan
        figures = (row.validation, row.test, row.macs, params, row.seconds)
        writer.writerow([
            row.job.number + 1, *(row.values.get(key, "") for key in summary.keys), row.job.state,
            len(row.results["rounds"]) if row.results else "",
            *("" if math.isnan(figure) else f"{figure:.10g}" for figure in figures),
            row.job.run or "", row.job.error or "",
        ])  # fmt: skip
    return buffer.getvalue()


def markdown(summary: Summary) -> str:
    """All tables, for a README or an issue."""
    lines = [f"# Sweep {summary.sweep.path.name}", "", f"{summary.counts}. {best_sentence(summary)}", ""]
    lines += [f"- {note}" for note in summary.notes]
    for title, head, rows, _ in tables(summary):
        lines += ["", f"## {title}", "", *_markdown_table(head, rows)]
    failed = summary.in_state("failed")
    if failed:
        lines += ["", "## Failed jobs", "", *(f"- {summary.sweep.title(row.job)}: {row.job.error}" for row in failed)]
    return "\n".join([*lines, "", CHOSEN, ""])


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """The table of settings where there are several seeds, else of jobs; what failed; what was chosen."""
    console = console or TableConsole()
    title, head, rows, text = next(table for table in tables(summary) if table[0] in (SETTINGS, JOBS))
    if title == JOBS:
        head, rows = head[:-1], [row[:-1] for row in rows]  # without directories, which are long
    table = Table(box=box.SIMPLE_HEAD, title=Text(f"{title} of {summary.sweep.path.name}: {summary.counts}"),
                  title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    for index, heading in enumerate(head):
        words = index in text  # what was swept may be long, and is folded; a figure is not
        longest = max([len(heading), *(len(cells[index]) for cells in rows)])
        table.add_column(
            Text(TERMINAL.get(heading, heading)), justify="left" if words else "right", no_wrap=not words,
            overflow="fold", min_width=min(longest, LEAST) if words else None,
        )  # fmt: skip
    for cells in rows[:MOST_LINES]:
        table.add_row(*map(Text, cells))
    console.print(table)
    if len(rows) > MOST_LINES:
        console.print(Text(f"{len(rows) - MOST_LINES} more are on the page"))
    for row in summary.in_state("failed", "stopped", "removed"):
        why = f": {row.job.error}" if row.job.error else ""
        console.print(Text(f"{row.job.state}: {summary.sweep.title(row.job)}{why}"), soft_wrap=True)
    for note in summary.notes:
        console.print(Text(note))
    console.print(Text(best_sentence(summary)))
