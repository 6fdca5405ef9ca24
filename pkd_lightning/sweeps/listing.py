"""`pkd list [RUN_ROOT]`: the runs there are, the latest first."""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.table import Table
from rich.text import Text

from pkd_lightning.cli import load_config
from pkd_lightning.commands import spare_terminal
from pkd_lightning.errors import PKDError, RunError
from pkd_lightning.reporting.files import read_plain
from pkd_lightning.reporting.grouping import flat_settings, within
from pkd_lightning.reporting.load import find_run_directories, results_so_far
from pkd_lightning.reporting.table import TableConsole
from pkd_lightning.reporting.values import percent, validation_of
from pkd_lightning.rundir import OVERRIDES, VOLATILE, held
from pkd_lightning.sweeps.records import Job, find_sweeps, pair, words

MOST_WORDS = 60  # characters of an error, which the sweep's report has in full
MOST_KEYS = 4  # that differ from the defaults, of a run whose command is not known
UNSAID = (*VOLATILE, "experiment")  # `experiment=NAME` is the run's name


def main(arguments: Sequence[str] | None = None) -> int:
    """List the runs below a directory: name, what was set beside the defaults, state, validation accuracy, age."""
    parser = argparse.ArgumentParser(prog="pkd list", description=main.__doc__)
    parser.add_argument("run_root", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    options = parser.parse_args(arguments)
    spare_terminal()
    try:
        rows = list_runs(options.run_root)
    except PKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shared = shared_settings(rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in HEAD:
        left = heading in HEAD[:3]
        table.add_column(Text(heading), justify="left" if left else "right", no_wrap=heading not in HEAD[1:3],
                         overflow="fold")  # fmt: skip
    for row in rows:
        own = words(dict(map(pair, (setting for setting in row.settings if setting not in shared))))
        table.add_row(*map(Text, (row.name, own, row.state, row.validation, row.age)))
    # in a pipe, which has no width, a row is a line
    console = TableConsole(width=None if sys.stdout.isatty() else 400)
    console.print(table)
    if shared:
        console.print(Text(f"set in all: {' '.join(shared)}"), soft_wrap=True)
    return 0


HEAD = ("run", "set beside the defaults", "state", "validation", "age")


@dataclass(frozen=True)
class Listed:
    """A run as `pkd list` shows it."""

    name: str
    settings: list[str]
    state: str
    validation: str
    age: str


def shared_settings(rows: Sequence[Listed]) -> list[str]:
    """What was set in every one of several runs: it tells none from another."""
    first = rows[0].settings if len(rows) > 1 else []
    return [setting for setting in first if all(setting in row.settings for row in rows)]


def list_runs(run_root: Path) -> list[Listed]:
    """A row for each run below `run_root`, and each job of its sweeps that came to none, the one changed last first.

    Raises:
        RunError: there is no such directory, or no run below it.
    """
    if not run_root.is_dir():
        raise RunError(f"{run_root}: is no directory; name the run_root of your runs, as in `pkd list runs`")
    failed: dict[Path, Job] = {}
    pruned: set[Path] = set()
    for sweep in find_sweeps(run_root):
        for job in sweep.jobs()[0]:
            run = sweep.run_of(job)
            if job.state == "failed" and run is not None:
                failed[run] = job
            if job.state == "pruned" and run is not None:
                pruned.add(run)
    runs = {run: changed(run) for run in find_run_directories(run_root)}
    runs = {run: job.ended or 0.0 for run, job in failed.items()} | runs
    if not runs:
        raise RunError(f"{run_root}: holds no runs")
    defaults: dict[str, dict[str, str]] = {}
    return [
        _listed(run, os.path.relpath(run, run_root), runs[run], failed.get(run), run in pruned, defaults)
        for run in sorted(runs, key=lambda run: -runs[run])
    ]


def _listed(
    run: Path, name: str, then: float, failed: Job | None, pruned: bool, defaults: dict[str, dict[str, str]]
) -> Listed:
    state, validation = "running" if held(run) else "pruned" if pruned else "stopped", ""
    if failed is not None and state != "running":
        state = f"failed: {shorten(failed.error or '', MOST_WORDS)}"
    try:
        results = results_so_far(run)
        validation = percent(validation_of(results))
        state = "finished" if (run / "DONE").is_file() else f"{state}, {len(results['rounds'])} rounds done"
    except RunError as error:
        if (run / "results.json").is_file():
            state = f"damaged: {str(error).splitlines()[0]}"
    settings = beside_defaults(run, defaults) if failed is None else _said(failed.overrides)
    return Listed(name, settings, state, validation, age(then))


def _said(overrides: Iterable[str]) -> list[str]:
    """Overrides without those that say nothing of what is computed."""
    return [f"{key}={value}" for key, value in map(pair, overrides) if not within(key, UNSAID)]


def beside_defaults(run: Path, defaults: dict[str, dict[str, str]]) -> list[str]:
    """What was set: by the command, where the run knows it, else what differs from the experiment's defaults."""
    try:
        return _said(map(str, json.loads(read_plain(run / OVERRIDES))))
    except (OSError, ValueError, TypeError):
        pass  # a run of an earlier version, or from Python
    try:
        own = flat_settings(read_plain(run / "config.yaml").decode("utf-8", errors="replace"))
    except (OSError, ValueError):
        return ["?"]
    name = run.parent.name
    if name not in defaults:
        try:
            composed = load_config(f"experiment={name}")
        except (HydraException, PKDError):  # not an experiment of this package
            composed = load_config()
        try:
            defaults[name] = flat_settings(OmegaConf.to_yaml(composed, resolve=True))
        except (OmegaConfBaseException, ValueError):
            defaults[name] = {}
    known = defaults[name]
    differ = {key: own[key] for key in own if own[key] != known.get(key) and key != "name"}
    targets = [key for key in differ if re.fullmatch(r"boosting\.knowledge\.[^.]+\._target_", key)]
    if targets:  # the terms by their names, first, as a command has them
        names = ",".join(key.split(".")[2] for key in targets)
        rest = {key: value for key, value in differ.items() if key not in targets}
        differ = {"knowledge": f"[{names}]" if len(targets) > 1 else names, **rest}
    more = len(differ) - MOST_KEYS
    settings = [f"{key}={differ[key]}" for key in list(differ)[:MOST_KEYS]]
    return settings + ([f"others={more} more"] if more > 0 else [])


def changed(run: Path) -> float:
    """When a run last wrote something, in seconds since the epoch."""
    files = [run / name for name in ("config.yaml", "progress.json", "metrics.jsonl", "results.json", "run.log")]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def age(then: float) -> str:
    """`3 min`, `5 h`, `12 days` since a time."""
    minutes = max(0.0, time.time() - then) / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"
