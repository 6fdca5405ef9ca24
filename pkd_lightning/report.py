"""Report of a run, of a sweep, and comparison of several runs: `pkd report PATH [PATH ...] [--out FILE]`.

`python -m pkd_lightning.report` is the same.

Everything is read from the run directory's `results.json`, `metrics.jsonl` and `config.yaml`; nothing is computed from
models or data, so a report can be rebuilt on any machine.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pkd_lightning.commands import spare_terminal
from pkd_lightning.errors import PKDError, RunError
from pkd_lightning.reporting import page
from pkd_lightning.reporting.comparison import comparison_page
from pkd_lightning.reporting.load import find_run_directories, find_runs, load_run, unfinished_runs
from pkd_lightning.reporting.single import run_page
from pkd_lightning.reporting.table import print_table
from pkd_lightning.sweeps.page import print_summary, write_summary
from pkd_lightning.sweeps.records import Sweep, find_sweeps
from pkd_lightning.sweeps.summary import summarise

__all__ = ["compare", "main", "print_table", "write_report"]


def write_report(run: Path, out: Path | None = None, figures: bool = True) -> Path:
    """Write a run's `report.html`, and its figures as `figures/*.png`.

    Args:
        run: the run directory.
        out: the page's file; `report.html` in the run directory by default.
        figures: without them, which take seconds, the page takes milliseconds.

    Returns:
        The file written: self-contained HTML that makes no request.

    Raises:
        RunError: the results are missing, damaged or of another schema, or nothing can be written.
    """
    out = out or run / "report.html"
    page.write(out, run_page(load_run(run), run / "figures" if figures else None))
    return out


def compare(runs: Sequence[Path], out: Path, absent: Sequence[str] = ()) -> Path:
    """Write one page on several runs: one section a data set and split, since accuracies compare only within one.

    Args:
        runs: run directories.
        out: the page's file.
        absent: a line on each of the jobs that have no results.

    Raises:
        RunError: a run cannot be read (all of them are named), or nothing can be written.
    """
    records, faults = [], []
    for run in runs:
        try:
            records.append(load_run(run))
            if not records[-1].finished:
                faults.append(f"{run}: is not finished; its accuracies, of the validation part, do not compare")
        except RunError as error:
            faults.append(str(error))
    if faults or not records:
        raise RunError("\n".join(faults) or "no runs to compare")
    page.write(out, comparison_page(records, absent))
    return out


def the_sweep(path: Path) -> Sweep | None:
    """The sweep at `path`, or the only one of a `run_root` that holds no runs besides its own; else None."""
    sweeps = find_sweeps(path)
    if len(sweeps) != 1:
        return None
    own = {run.resolve() for run in map(sweeps[0].run_of, sweeps[0].jobs()[0]) if run is not None}
    others = {run.resolve() for run in find_run_directories(path)} - own
    return None if others else sweeps[0]


def absent_jobs(path: Path) -> list[str]:
    """A line on each job of the sweeps of a `run_root` that has no results."""
    return [
        f"{sweep.path.name}, {sweep.title(job)}: {job.state}" + (f", {job.error}" if job.error else "")
        for sweep in find_sweeps(path)
        for job in sweep.jobs()[0]
        if job.state != "finished"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: of one run its report, of a sweep its page, of several a comparison. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="pkd report", description=main.__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="PATH", help="a run directory, a sweep's, or a directory above runs"
    )
    out = "default: report.html in the run's or the sweep's directory, or comparison.html here"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    options = parser.parse_args(arguments)
    spare_terminal()
    try:
        sweep = the_sweep(options.runs[0]) if len(options.runs) == 1 else None
        if sweep is not None:
            summary = summarise(sweep)
            print(write_summary(summary, options.out))
            print_summary(summary)
            return 0
        absent = [line for given in options.runs for line in absent_jobs(given)]
        for line in absent:
            print(f"no results: {line}", file=sys.stderr)
        for run in (run for given in options.runs for run in unfinished_runs(given) if run != given):
            print(f"not finished: {run}", file=sys.stderr)
        runs = list(dict.fromkeys(found.resolve() for run in options.runs for found in find_runs(run)))
        if len(runs) == 1:
            print(write_report(runs[0], options.out))
        else:
            print(compare(runs, options.out or Path("comparison.html"), absent))
    except PKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
