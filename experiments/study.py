"""Runs a study, every run and seed of its study.yaml, and collects the results beside it.

    python -m experiments.study NAME             # start it, or go on with it
    python -m experiments.study NAME --list      # what is collected, unfinished, missing

`experiments/NAME/study.yaml`; overrides are those of `pkd_lightning.run`, and `{seed}` in one is the run's seed:

    seeds: [0, 1, 2]
    common: [experiment=digits]        # overrides of every run
    runs:
      anchored: {overrides: [boosting=default], keep: [teacher, students, metrics, figures]}
      additive:
        overrides: ["teacher.checkpoint=experiments/NAME/kept/anchored-seed{seed}/teacher.safetensors"]
        seeds: [0]                     # instead of the study's
        after: [anchored]              # starts when all of its seeds are collected

A run that ends well leaves `results/<run>-seed<S>.json`, and what it keeps in `kept/<run>-seed<S>/`. From then on it is
done, on whatever machine, until its overrides change. Relative paths are those of the current directory.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.plan import COMPOSITION, KEEP, Job, Study, option_faults, read_study
from pkd_lightning.checkpoint import read_json, write_json
from pkd_lightning.checks import suggest
from pkd_lightning.cli import spare_terminal
from pkd_lightning.errors import ConfigError, PKDError, RunError
from pkd_lightning.reporting.values import duration, number, percent
from pkd_lightning.rundir import RunDirectory

STUDIES = Path(__file__).parent
LIMIT = 1_000_000  # bytes of a kept file: it goes into the repository
FORWARDED = re.compile(r"round \d+/\d+: |teacher (trained|loaded|found)|resumed after |finished before: ")
POLL = 0.2  # seconds between two looks at the processes


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


class Child:
    """A job in its own process, whose output is appended to a log file."""

    def __init__(self, job: Job, runs: Path) -> None:
        self.job, self.directory, self.shown = job, job.directory(runs), 0
        self.log = runs / job.folder.name / f"{job.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pkd_lightning.run", *job.arguments(runs)]
        with self.log.open("ab") as log:
            log.write(f"\n{datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(command)}\n".encode())
            log.flush()
            self.begin, self.started = log.tell(), time.monotonic()
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def lines(self) -> list[str]:
        """The output of this process so far."""
        with self.log.open("rb") as log:
            log.seek(self.begin)
            return log.read().decode(errors="replace").splitlines(keepends=True)

    def forward(self) -> None:
        """Print the lines that came since the last call and say how far the run is."""
        lines = [line for line in self.lines() if line.endswith("\n")]
        for line in filter(FORWARDED.match, lines[self.shown :]):
            say(f"  {self.job.name}: {line.rstrip()}")
        self.shown = len(lines)


@dataclass
class Progress:
    """Where a study stands: names of collected jobs, jobs to run, why others are not collected, processes."""

    study: Study
    runs: Path
    done: set[str] = field(default_factory=set)
    waiting: list[Job] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    running: list[Child] = field(default_factory=list)

    def work(self, processes: int, stops: Sequence[int]) -> None:
        """Run what waits, until nothing more can start or a signal is noted in `stops`; then no process is left."""
        try:
            while not stops:
                for job in [job for job in self.waiting if not self.missing(job)]:
                    if len(self.running) < processes and not stops:
                        self.start(job)
                if not self.running:
                    break
                time.sleep(POLL)
                for child in self.running.copy():
                    code = child.process.poll()  # before the last look at its output
                    child.forward()
                    if code is not None and not stops:  # Ctrl-C in a terminal also ends the children
                        self.finish(child, code)
        finally:
            self.terminate()

    def missing(self, job: Job) -> list[str]:
        """What `job` waits for."""
        return [other.name for other in self.study.before(job.run) if other.name not in self.done]

    def start(self, job: Job) -> None:
        """Start a process."""
        self.waiting.remove(job)
        try:
            self.running.append(Child(job, self.runs))
            say(f"{job.name}: started")
        except (OSError, *COMPOSITION) as error:
            self.failed[job.name] = f"cannot start: {error}"
            say(f"{job.name}: {self.failed[job.name]}")

    def finish(self, child: Child, code: int) -> None:
        """Collect what a process left, or note why it failed."""
        self.running.remove(child)
        name, minutes = child.job.name, f"{(time.monotonic() - child.started) / 60:.1f} min"
        try:
            if code != 0:
                raise RunError("".join([line for line in child.lines() if line.strip()][-8:]).strip() or "no output")
            results = collect(child.job, child.directory)
        except (PKDError, OSError) as error:
            self.failed[name] = f"failed with exit code {code}\n{error}\nlog: {child.log}"
            say(f"{name}: failed after {minutes}, log: {child.log}")
            return
        self.done.add(name)
        teacher, ensemble = (percent(number(results, part, "accuracy")) for part in ("teacher", "ensemble"))
        count = f"{len(self.done)} of {len(self.study.jobs)} collected"
        say(f"{name}: {minutes}, teacher {teacher}, ensemble {ensemble}; {count}")

    def terminate(self) -> None:
        """End the processes that run, and wait for them."""
        for child in self.running:
            child.process.terminate()
        for child in self.running:
            child.process.wait()

    def complain(self) -> None:
        """Say why jobs are not collected."""
        for name, why in self.failed.items():
            say(f"{name}: {why}".replace("\n", "\n    "), error=True)

    def report(self, stops: Sequence[int]) -> int:
        """Say how it ended; the exit code."""
        self.complain()
        if stops:
            say("stopped; the same command goes on with what is not collected", error=True)
            return 128 + stops[0]
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
    Console(width=None if sys.stdout.isatty() else 120).print(table)


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


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within the block, Ctrl-C and SIGTERM only add their numbers to the list."""
    numbers: list[int] = []
    before = {n: signal.signal(n, lambda n, _: numbers.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield numbers
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 0 where all that was chosen is collected."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="a study in experiments/, or the path of a folder with study.yaml")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes side by side")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="these of <run>-seed<S>")
    parser.add_argument("--list", action="store_true", help="only show the state of every run")
    parser.add_argument("--again", action="store_true", help="as if those chosen were not collected; a finished run"
                        " directory is still found: delete it to train anew")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), metavar="DIR", help="of the run directories")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be at least 1")
    spare_terminal()
    with noted_signals() as stops:
        try:
            progress = prepare(options)
            if options.list:
                print_states(progress.study, progress.runs)
                return 0
            if progress.waiting and progress.failed:  # said now as well, not only after hours
                progress.complain()
            progress.work(options.jobs, stops)
            return progress.report(stops)
        except PKDError as error:
            say(f"error: {error}", error=True)
            return 1


if __name__ == "__main__":
    sys.exit(main())
