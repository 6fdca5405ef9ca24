"""Hydra's callback that records each job of a multirun, says so in a line, and sums the sweep up at its end."""

import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pkd_lightning.checkpoint import read_json
from pkd_lightning.commands import spare_terminal
from pkd_lightning.errors import PKDError, Pruned, RunError
from pkd_lightning.reporting.load import results_so_far
from pkd_lightning.reporting.values import percent, validation_of
from pkd_lightning.rundir import RunDirectory, point_latest
from pkd_lightning.sweeps.records import SWEEP, Job, Sweep, common, one_line, plan
from pkd_lightning.sweeps.stopping import LAUNCHER, stop_jobs_first
from pkd_lightning.sweeps.summary import accuracy_words, summarise

LOOK = 2.0  # seconds between two looks at jobs that run elsewhere
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class JobRecords(Callback):
    """Records the jobs of a multirun; a run alone is none of its business.

    Launchers such as joblib and submitit send copies of it to the processes of the jobs.
    """

    def __init__(self) -> None:
        self.since = time.time()
        self.job: Job | None = None  # of this process, while it runs
        self.follower: Follower | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the thread, which belongs to the process that was started."""
        return {**self.__dict__, "follower": None}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the sweep's directory, with a waiting job for each that is known and has not run yet."""
        del kwargs
        path, jobs = Path(config.hydra.sweep.dir), list[list[str]]()
        overrides: list[str] = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # type: ignore[assignment]
        if is_basic(config):
            with suppress(HydraException):  # where only the sweeper knows the jobs, as with `glob`
                jobs = plan(overrides, config.hydra.sweeper.get("params") or {})
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"error: {path}: cannot be made ({error.strerror}); choose another run_root")
        total = len(jobs) or config.hydra.sweeper.get("n_trials")
        sweep = Sweep(path, tuple(common(overrides)), total)
        sweep.save(overrides)
        for number, own in enumerate(jobs):
            if sweep.find(own) is None:
                sweep.write(Job(number, tuple(own)))
        point_latest(Path(config.run_root).expanduser(), path)
        say(f"sweep: {path}")
        self.follow(config, sweep)

    def follow(self, config: DictConfig, sweep: Sweep) -> None:
        """Say how jobs start and end where their launcher does not print what they say, and be ready for signals."""
        if "submitit" in str(config.hydra.launcher.get("_target_")):  # its jobs write into files of their own
            self.follower = Follower(sweep, self.since)
            self.follower.start()
        else:  # what submitit has started goes on by itself, and ignores SIGTERM
            stop_jobs_first(sweep)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record that the job runs, unless another process already runs it: then the run refuses to start."""
        del kwargs
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        self.job = None
        sweep, run = sweep_of(config), run_of(config)
        overrides = tuple(map(str, config.hydra.overrides.task))
        earlier = sweep.find(overrides)
        job = Job(
            config.hydra.job.num if earlier is None or is_basic(config) else earlier.number,
            overrides,
            "running",
            None if run is None else os.path.relpath(run.path, sweep.path),
            host=socket.gethostname(),
            pid=os.getpid(),
            started=time.time(),
            found=run is not None and run.finished,
            launcher=os.environ.get(LAUNCHER),
        )
        if earlier is not None and sweep.elsewhere(earlier):
            say(f"{sweep.title(job)} is running already: process {earlier.pid} on {earlier.host}")
            return
        sweep.write(job)
        self.job = job
        share_threads(config, config.hydra.sweeper.get("n_jobs", sweep.total))
        if not job.found:
            say(line_of(sweep, job))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Record how the job ended. Hydra's own sweeper is told of no failure: it would drop all that is to come."""
        del kwargs
        if self.job is None:
            return
        sweep = sweep_of(config)
        error = job_return._return_value
        if isinstance(error, Pruned):
            job = replace(self.job, state="pruned", ended=time.time())
        elif job_return.status == JobStatus.FAILED:
            job = replace(self.job, state="failed", error=one_line(error), ended=time.time())
            if not isinstance(error, PKDError):
                traceback.print_exception(error)
        else:
            job = replace(self.job, state="finished", ended=time.time())
        sweep.write(job)
        say(line_of(sweep, job))
        if job.state == "failed" and is_basic(config):
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and write the page; a job that is not finished makes the exit code 1."""
        del kwargs
        from pkd_lightning.sweeps.page import print_summary, write_summary  # matplotlib, needed here only

        self.unfollow()
        summary = summarise(sweep_of(config))
        # of another sweeper's jobs those count that failed now: it may go on with earlier ones, or leave some to others
        bad = [row.job for row in summary.rows if row.job.state != "finished"]
        fails = (is_basic(config) and bad) or any(
            job.state == "failed" and (job.ended or 0) >= self.since for job in bad
        )
        try:
            print_summary(summary)
            say(f"report: {write_summary(summary)}")
        except RunError as error:
            say(f"no report: {error}")
        finally:  # whatever prevents the report, which Hydra makes a warning of
            if fails:
                sys.exit(1)

    def unfollow(self) -> None:
        """Say what `follow` has not said yet."""
        if self.follower is not None:
            self.follower.end()


class Follower(threading.Thread):
    """Says how the jobs of a sweep start and end where they cannot say it themselves.

    Args:
        sweep: whose jobs.
        since: only what happened later is said.
    """

    def __init__(self, sweep: Sweep, since: float) -> None:
        super().__init__(daemon=True)
        self.sweep, self.since = sweep, since
        self.said: set[str] = set()
        self.over = threading.Event()

    def run(self) -> None:
        """Look now and then."""
        while not self.over.wait(LOOK):
            self.look()

    def look(self) -> None:
        """Say what is new."""
        for job in self.sweep.jobs()[0]:
            line = line_of(self.sweep, job)
            if job.state != "waiting" and (job.ended or job.started or 0) >= self.since and line not in self.said:
                self.said.add(line)
                say(line)

    def end(self) -> None:
        """Say what is left to say."""
        self.over.set()
        self.join()
        self.look()


def line_of(sweep: Sweep, job: Job) -> str:
    """`job 3 of 9 (lr=0.1) finished: validation 96.8%, test 95.1%, 28.0 s`."""
    run = sweep.run_of(job)
    if job.state == "finished" and run is not None:
        figures = accuracy_words(read_json(run / "results.json"))
        return f"{sweep.title(job)} {'found' if job.found else 'finished'}: {figures}"
    if job.state == "pruned" and run is not None:
        results = results_so_far(run)
        rounds = f"{len(results['rounds'])} of {results.get('planned_rounds', '?')} rounds"
        return f"{sweep.title(job)} pruned after {rounds}: validation {percent(validation_of(results))}"
    said = {"running": "started", "failed": f"failed: {job.error}"}
    return f"{sweep.title(job)} {said.get(job.state, job.state)}"


def is_basic(config: DictConfig) -> bool:
    """Whether the jobs are those of Hydra's own sweeper."""
    return str(config.hydra.sweeper.get("_target_")) == BASIC


def sweep_of(config: DictConfig) -> Sweep:
    """The sweep of a job; where its directory is on another machine's disk only, one that says less."""
    path = Path(config.hydra.sweep.dir)
    return Sweep.read(path) if (path / SWEEP).is_file() else Sweep(path)


def run_of(config: DictConfig) -> RunDirectory | None:
    """A job's run directory; None where the configuration is at fault."""
    try:
        return RunDirectory(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    except (OmegaConfBaseException, OSError, AttributeError, KeyError, TypeError):
        return None  # the run says what is wrong


def share_threads(config: DictConfig, jobs: int | None) -> None:
    """With `threads=null` torch takes every core, in every job: divide them where the launcher does not.

    joblib does, basic runs one job at a time, and SLURM gives each job its own. submitit's local executor starts all
    jobs at once.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") == "local" and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = str(config.hydra.launcher.cpus_per_task or max(1, cores // (jobs or 1)))


def say(line: str) -> None:
    """A line in one piece: jobs side by side share the terminal."""
    spare_terminal()
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
