"""Runs a study, every run and seed of its study.yaml, and collects the results beside it.

    python -m experiments.study NAME             # start it, or go on with it
    python -m experiments.study NAME --list      # what is collected, unfinished, missing
    python -m experiments.study NAME hydra/launcher=submitit_slurm hydra.launcher.partition=gpu

`experiments/NAME/study.yaml`; overrides are those of `pkd_lightning.run`. `{seed}` in one is the run's seed, and
`{run:OTHER}` the run directory of another run, of the same seed, that it comes after:

    seeds: [0, 1, 2]
    common: [experiment=digits]        # overrides of every run
    runs:
      anchored: {overrides: [boosting=default], keep: [teacher, students, metrics, figures]}
      additive:
        overrides: ["teacher.checkpoint=experiments/NAME/kept/anchored-seed{seed}/teacher.safetensors"]
        seeds: [0]                     # instead of the study's
        after: [anchored]              # starts when all of its seeds are collected; where `{run:anchored}` is
                                       # named, when that of its own seed is

A run that ends well leaves `results/<run>-seed<S>.json`, and what it keeps in `kept/<run>-seed<S>/`. From then on it is
done, on whatever machine, until its overrides change. Relative paths are those of the current directory.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig
from rich import box
from rich.table import Table

from experiments.launching import Launcher
from experiments.plan import COMPOSITION, KEEP, Job, Study, option_faults, read_study
from pkd_lightning.checkpoint import read_json, write_json
from pkd_lightning.checks import suggest
from pkd_lightning.commands import end_with_reader, spare_terminal
from pkd_lightning.errors import ConfigError, PKDError, RunError
from pkd_lightning.process import stopped_by_signals
from pkd_lightning.reporting.table import TableConsole
from pkd_lightning.reporting.values import duration, number, percent
from pkd_lightning.run import _job
from pkd_lightning.rundir import RunDirectory

STUDIES = Path(__file__).parent
LIMIT = 2_000_000  # bytes of a kept file: it goes into the repository


def collected(job: Job) -> dict[str, Any] | None:
    """The collected results of `job`, None where there are none.

    Raises:
        RunError: they cannot be read, or were made with other overrides than those of study.yaml.
    """
    if not job.results.exists():
        return None
    results: dict[str, Any] = read_json(job.results)
    try:
        recorded = results["study"]["overrides"]
    except (KeyError, TypeError) as error:
        raise RunError(f"{job.results}: does not say with which overrides it was made") from error
    if recorded != job.overrides:
        raise RunError(f"{job.results}: made with other overrides: {difference(recorded, job.overrides)}")
    origins = results["study"].get("origins", {})
    for name, wanted in job.origins.items():
        if origins.get(name) != wanted:
            raise RunError(
                f"{job.results}: goes on from {name} with other overrides: {difference(origins.get(name, ()), wanted)}"
            )
    return results


def difference(recorded: Iterable[str], wanted: Iterable[str]) -> str:
    """In words, how the overrides recorded in results differ from those of study.yaml."""
    old, new = Counter(recorded), Counter(wanted)
    parts = [(old - new, "in the results"), (new - old, "in study.yaml")]
    return "; ".join(f"{', '.join(p.elements())} only {where}" for p, where in parts if p) or "in another order"


def collect(job: Job, directory: RunDirectory) -> dict[str, Any]:
    """Take over the results of a run and what it keeps; RunError where it is not finished, or keeps what it cannot."""
    if not directory.finished:
        raise RunError(f"{directory.path}: not finished, although the run ended well")
    results: dict[str, Any] = read_json(directory.results)
    keep_files(job, directory.path)
    ended = datetime.fromtimestamp((directory.path / "DONE").stat().st_mtime, UTC)
    origin = {"run": job.run.name, "overrides": job.overrides, "date": ended.date().isoformat()}
    if origins := job.origins:
        origin["origins"] = origins
    write_json(job.results, {**results, "study": origin})  # last: it says that the job is done
    return results


def keep_files(job: Job, directory: Path) -> None:
    """Copy what `job` keeps of its run directory, the teacher's files to the top; RunError where it cannot."""
    found = {pattern: sorted(directory.glob(pattern)) for part in job.run.keep for pattern in KEEP[part]}
    faults = [f"{directory / pattern}: is to be kept, but not there" for pattern, paths in found.items() if not paths]
    files = {path: path.stat().st_size for paths in found.values() for path in paths}
    faults += [f"{path}: {n:,} bytes; nothing over {LIMIT:,} is kept" for path, n in files.items() if n > LIMIT]
    if faults:
        raise RunError("\n".join(faults))
    fresh = job.kept.with_name(f".{job.kept.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    for path in files:
        inside = path.relative_to(directory)
        target = fresh / (inside.name if inside.parts[0] == "teacher" else inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    job.results.unlink(missing_ok=True)  # of an earlier time: they would vouch for files that are being replaced
    if files:
        shutil.rmtree(job.kept, ignore_errors=True)
        fresh.rename(job.kept)


def run_and_collect(job: Job, config: DictConfig) -> None:
    """Run a job, in whatever process, and collect it."""
    _job(config)
    collect(job, RunDirectory(config))


@dataclass
class Progress:
    """Where a study stands: names of collected jobs, jobs to run, why others are not collected."""

    study: Study
    runs: Path
    done: set[str] = field(default_factory=set)
    waiting: list[Job] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def work(self, options: Sequence[str]) -> None:
        """Launch what waits for nothing, then what waited for that, and so on, until nothing more can start."""
        launcher = Launcher(self.study, self.runs, options)
        first = len(self.study.jobs) - len(self.waiting)
        launcher.announce(self.waiting, first)
        while wave := [job for job in self.waiting if not self.missing(job)]:
            self.waiting = [job for job in self.waiting if job not in wave]
            failed = launcher.launch(run_and_collect, wave, first)
            self.failed |= failed
            self.done |= {job.name for job in wave} - failed.keys()
            first += len(wave)
        launcher.records.unfollow()

    def missing(self, job: Job) -> list[str]:
        """What `job` waits for."""
        return [other.name for other in self.study.before(job) if other.name not in self.done]

    def complain(self) -> None:
        """Say why jobs are not collected."""
        for name, why in self.failed.items():
            say(f"{name}: {why}".replace("\n", "\n    "), error=True)

    def report(self) -> int:
        """Say how it ended; the exit code."""
        self.complain()
        for job in self.waiting:
            say(f"{job.name}: not started, it waits for {', '.join(self.missing(job))}", error=True)
        if len(self.done) == len(self.study.jobs):
            print_states(self.study, self.runs)
            total = sum(number(collected(job) or {}, "wall_seconds", "total") for job in self.study.jobs)
            say(f"all {len(self.done)} runs are collected in {self.study.folder / 'results'}; {total:,.0f} seconds")
        else:
            say(f"{len(self.done)} of {len(self.study.jobs)} runs are collected")
        return 1 if self.failed or self.waiting else 0


def say(line: str, error: bool = False) -> None:
    """Print at once, also into a file."""
    print(line, flush=True, file=sys.stderr if error else sys.stdout)


def print_states(study: Study, runs: Path) -> None:
    """A row a job: done, with its date, time and test accuracies; or unfinished, or missing."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("run", "state", "date", "time", "teacher", "ensemble"):
        table.add_column(head, justify="left" if head in ("run", "state") else "right", no_wrap=True)
    for job in study.jobs:
        table.add_row(job.name, *state(job, runs))
    TableConsole(width=None if sys.stdout.isatty() else 120).print(table)


def state(job: Job, runs: Path) -> list[str]:
    """The cells of a job in the table."""
    try:
        results = collected(job)
        if results is None:
            directory = job.directory(runs)
            unfinished = "unfinished" if directory.path.exists() else "missing"
            return ["not collected" if directory.finished else unfinished]
    except RunError:
        return ["other overrides"]
    except (OSError, *COMPOSITION):  # its teacher's checkpoint is not there yet
        return ["missing"]
    accuracies = [percent(number(results, part, "accuracy")) for part in ("teacher", "ensemble")]
    return ["done", results["study"].get("date", ""), duration(number(results, "wall_seconds", "total")), *accuracies]


def find_study(name: str) -> Path:
    """The folder of the study called `name`, or the folder `name` itself; RunError where there is no study.yaml."""
    for folder in (STUDIES / name, Path(name).resolve()):
        if (folder / "study.yaml").is_file():
            return folder
    known = sorted(path.parent.name for path in STUDIES.glob("*/study.yaml"))
    raise RunError(f"{name!r}: has no study.yaml.{suggest(name, known)} Studies: {', '.join(known) or 'none'}")


def prepare(options: argparse.Namespace) -> Progress:
    """What is done, what is to run and what is refused; RunError with all faults of the study."""
    folder = find_study(options.name)
    study, faults = read_study(folder)
    names = [job.name for job in study.jobs]
    unmatched = [pattern for pattern in options.only if not any(fnmatchcase(name, pattern) for name in names)]
    faults += [f"--only {pattern!r}: matches none of {', '.join(names)}" for pattern in unmatched]
    progress = Progress(study, options.runs)
    for job in study.jobs:
        chosen = any(fnmatchcase(job.name, pattern) for pattern in options.only or ["*"])
        try:
            if not (chosen and options.again) and collected(job):
                progress.done.add(job.name)
            elif chosen:
                progress.waiting.append(job)
        except RunError as error:
            if chosen:
                progress.failed[job.name] = f"not run: {error}; --again runs it anew"
    faults += option_faults(study, options.runs, [] if options.list else progress.waiting)
    if faults:
        raise RunError(f"{folder / 'study.yaml'}: {ConfigError(faults)}")
    return progress


def launcher_options(jobs: int | None, given: Sequence[str]) -> list[str]:
    """Hydra's overrides for the launcher that is `given`, or for `jobs` side by side."""
    if any(one.startswith("hydra/launcher=") for one in given):
        return [*given]
    jobs = jobs or os.cpu_count() or 1
    Plugins.instance()  # finds the launchers that are installed
    if jobs > 1 and "joblib.yaml" not in ConfigStore.instance().list("hydra/launcher"):
        say("one job at a time: joblib's launcher is not installed (pip install 'pkd-lightning[launchers]')")
        jobs = 1
    if jobs == 1:
        return ["hydra/launcher=basic", *given]
    # a batch of joblib's is several jobs for one process, one after the other
    return ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}", "hydra.launcher.batch_size=1", *given]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 0 where all that was chosen is collected."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="a study in experiments/, or the path of a folder with study.yaml")
    parser.add_argument("launcher", nargs="*", metavar="hydra/launcher=NAME", help="and hydra.launcher.KEY=VALUE, as in"
                        " a multirun; default: joblib, or basic for one job at a time")  # fmt: skip
    parser.add_argument("--jobs", type=int, metavar="N", help="side by side, of the default launcher; default: cores")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="these of <run>-seed<S>")
    parser.add_argument("--list", action="store_true", help="only show the state of every run")
    parser.add_argument("--again", action="store_true", help="as if those chosen were not collected; a finished run"
                        " directory is still found: delete it to train anew")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), metavar="DIR", help="of the run directories")
    options = parser.parse_intermixed_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be at least 1")
    for given in options.launcher:
        if not given.startswith(("hydra/launcher=", "hydra.launcher.", "hydra.searchpath=")):
            parser.error(f"{given}: only options of the launcher; those of the runs are in study.yaml")
        if given.startswith("hydra/launcher=") and options.jobs is not None:
            parser.error(f"--jobs {options.jobs}: {given} has its own options, hydra.launcher.KEY=VALUE")
    spare_terminal()
    with stopped_by_signals():
        try:
            progress = prepare(options)
            if options.list:
                print_states(progress.study, progress.runs)
                return 0
            if progress.waiting and progress.failed:  # said now as well, not only after hours
                progress.complain()
            if progress.waiting:
                progress.work(launcher_options(options.jobs, options.launcher))
            return progress.report()
        except PKDError as error:
            say(f"error: {error}", error=True)
            return 1
        except SystemExit as stopped:
            say("stopped; the same command goes on with what is not collected", error=True)
            return int(stopped.code or 0)


if __name__ == "__main__":
    from experiments import study  # launchers send its functions to other processes by the name of their module

    with end_with_reader():
        sys.exit(study.main())
