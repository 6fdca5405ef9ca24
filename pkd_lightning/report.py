"""Report of a run, and comparison of several: `python -m pkd_lightning.report RUN [RUN ...] [--out FILE]`.

Everything is read from the run directory's `results.json`, `metrics.jsonl` and `config.yaml`; nothing is computed from
models or data, so a report can be rebuilt on any machine.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pkd_lightning.cli import spare_terminal
from pkd_lightning.errors import PKDError, RunError
from pkd_lightning.reporting import page
from pkd_lightning.reporting.comparison import comparison_page
from pkd_lightning.reporting.load import find_runs, load_run, unfinished_runs
from pkd_lightning.reporting.single import run_page
from pkd_lightning.reporting.table import print_table

logger = logging.getLogger(__name__)
__all__ = ["compare", "main", "print_table", "write_report"]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write a run's `report.html`, and its figures as `figures/*.png`.

    Args:
        run: the run directory.
        out: the page's file; `report.html` in the run directory by default.

    Returns:
        The file written: self-contained HTML that makes no request.

    Raises:
        RunError: the results are missing, damaged or of another schema, or nothing can be written.
    """
    out = out or run / "report.html"
    logger.info("writing the report")
    page.write(out, run_page(load_run(run), run / "figures"))
    return out


def compare(runs: Sequence[Path], out: Path) -> Path:
    """Write one page on several runs: one section a data set and split, since accuracies compare only within one.

    Args:
        runs: run directories.
        out: the page's file.

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
    page.write(out, comparison_page(records))
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: one run rebuilds its report, several are compared. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pkd_lightning.report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a directory above runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html, or comparison.html here")
    options = parser.parse_args(arguments)
    spare_terminal()
    try:
        for run in (run for given in options.runs for run in unfinished_runs(given) if run != given):
            print(f"not finished: {run}", file=sys.stderr)
        runs = list(dict.fromkeys(found.resolve() for run in options.runs for found in find_runs(run)))
        if len(runs) == 1:
            print(write_report(runs[0], options.out))
        else:
            print(compare(runs, options.out or Path("comparison.html")))
    except PKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
