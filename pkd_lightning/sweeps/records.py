"""What a sweep is on disk: `sweep.json`, and in `jobs/` a file for each job that says how it stands.

It lies in Hydra's folder of the multirun, whose name is made of the overrides, so that the same command finds it again.
A job's file is named by its overrides too, and written whole by the process that runs the job: there is no common file
that several processes change.
"""

import hashlib
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from pkd_lightning.checkpoint import read_json, write_json
from pkd_lightning.errors import ConfigError, PKDError, RunError
from pkd_lightning.process import in_multirun
from pkd_lightning.reporting.grouping import short_keys, within
from pkd_lightning.rundir import VOLATILE, held

SWEEP = "sweep.json"
JOBS = "jobs"
SWEEPS = ".sweeps"  # below run_root
SCHEMA = 1
LONG_NUMBER = 12  # characters, of which a reader needs fewer
LONGEST = 40  # characters of a sweep's name, besides its hash
YOUNG = 120.0  # seconds that a job may take until it holds its run directory


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    Attributes:
        number: Hydra's, from 0.
        overrides: all of the job's, as Hydra names them.
        state: `waiting`, `running`, `finished`, `failed`, or `pruned`, where the sweeper has ended it between two
            rounds; as read by `Sweep.jobs` also `stopped`, where the process that ran it is gone, and `removed`, where
            its results are.
        run: the run directory, relative to the sweep's; None where the configuration has none.
        error: of a failed job, on one line.
        host: where it ran last.
        pid: the process that ran it.
        started: seconds since the epoch.
        ended: seconds since the epoch.
        found: whether it had been finished before, so that nothing was trained.
        launcher: the process that launched it, see `launched_here`.
    """

    number: int
    overrides: tuple[str, ...]
    state: str = "waiting"
    run: str | None = None
    error: str | None = None
    host: str | None = None
    pid: int | None = None
    started: float | None = None
    ended: float | None = None
    found: bool = False
    launcher: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep's directory.

    Attributes:
        path: the directory.
        common: overrides that every job has.
        total: number of jobs; None where only the sweeper knows it.
    """

    path: Path
    common: tuple[str, ...] = ()
    total: int | None = None

    @classmethod
    def read(cls, path: Path) -> "Sweep":
        """The sweep at `path`.

        Raises:
            RunError: where it is damaged.
        """
        content = read_json(path / SWEEP)
        try:
            return cls(path, tuple(map(str, content["common"])), content["total"])
        except (TypeError, KeyError) as error:
            raise RunError(f"{path / SWEEP}: is not of a sweep ({error!r} is missing)") from error

    def save(self, overrides: Sequence[str]) -> None:
        """Write what the jobs have in common, and the command's overrides."""
        content = {"schema": SCHEMA, "overrides": list(overrides), "common": list(self.common), "total": self.total}
        write_json(self.path / SWEEP, content, hashed=True)

    def file(self, overrides: Iterable[str]) -> Path:
        """The file of the job with these overrides, in any order."""
        return self.path / JOBS / f"{overrides_hash(overrides)}.json"

    def write(self, job: Job) -> None:
        """Write a job's file, whole or not at all."""
        write_json(self.file(job.overrides), asdict(job), hashed=True)

    def find(self, overrides: Iterable[str]) -> Job | None:
        """The job with these overrides, as its file has it; None where there is none, or a damaged one."""
        try:
            return _job(self.file(overrides))
        except RunError:
            return None

    def jobs(self) -> tuple[list[Job], list[str]]:
        """All jobs in the order of their numbers, and notes on files that cannot be read."""
        found, notes = [], []
        for file in sorted((self.path / JOBS).glob("*.json")):
            try:
                found.append(self.as_it_stands(_job(file)))
            except RunError as error:
                notes.append(f"{error}: the job is left out; the same command writes it again")
        return sorted(found, key=lambda job: (job.number, job.overrides)), notes

    def run_of(self, job: Job) -> Path | None:
        """The job's run directory."""
        return None if job.run is None else Path(os.path.normpath(self.path / job.run))

    def swept(self, job: Job) -> dict[str, str]:
        """The job's own overrides by their keys: those that not every job has."""
        return dict(pair(override) for override in job.overrides if override not in self.common)

    def title(self, job: Job) -> str:
        """`job 3 of 9 (boosting=paper lr=0.1)`, by what only this job has."""
        count = "" if self.total is None else f" of {self.total}"
        own = words(self.swept(job))
        return f"job {job.number + 1}{count}" + (f" ({own})" if own else "")

    def alive(self, job: Job) -> bool:
        """Whether the process that ran a job still does: told by its number here, by the run's lock on other hosts."""
        if job.state != "running" or job.pid is None:
            return False
        if job.host != socket.gethostname():
            run = self.run_of(job)
            return time.time() - (job.started or 0) < YOUNG or (run is not None and held(run))
        try:
            os.kill(job.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        return True

    def elsewhere(self, job: Job) -> bool:
        """Whether a process other than this one runs a job."""
        return self.alive(job) and (job.host, job.pid) != (socket.gethostname(), os.getpid())

    def as_it_stands(self, job: Job) -> Job:
        """A job as its file has it, in the state that its process and its run directory say."""
        if job.state == "running" and not self.alive(job):
            job = replace(job, state="stopped")
        run = self.run_of(job)
        if job.state == "finished" and not (run is not None and (run / "results.json").is_file()):
            return replace(job, state="removed")
        if job.state in ("failed", "stopped", "pruned") and run is not None and (run / "DONE").is_file():
            return replace(job, state="finished", error=None)  # by another command, or just before its process ended
        return job


def words(values: Mapping[str, str]) -> str:
    """`boosting=paper lr=0.1`."""
    short = short_keys(values)
    return " ".join(f"{short[key]}={brief(value)}" for key, value in values.items())


def brief(value: str) -> str:
    """A value as it is shown: of a number that was drawn four digits."""
    try:
        return f"{float(value):.4g}" if len(value) > LONG_NUMBER and "." in value else value
    except ValueError:
        return value


def _job(file: Path) -> Job:
    content = read_json(file)
    try:
        return Job(**{**content, "overrides": tuple(content["overrides"])})
    except (TypeError, KeyError) as error:
        raise RunError(f"{file}: is not of a job ({error})") from error


def this_job() -> str | None:
    """The title of the job that this process runs in a multirun; None where it is no job."""
    if not in_multirun():
        return None
    hydra = HydraConfig.get()
    path = Path(hydra.sweep.dir)
    sweep = Sweep.read(path) if (path / SWEEP).is_file() else Sweep(path)
    overrides = tuple(map(str, hydra.overrides.task))
    return sweep.title(sweep.find(overrides) or Job(hydra.job.num, overrides))


def find_sweeps(path: Path) -> list[Sweep]:
    """The sweep at `path`, or those of a `run_root` there, the latest last; damaged ones are left out."""
    folders = [path] if (path / SWEEP).is_file() else [file.parent for file in (path / SWEEPS).glob(f"*/{SWEEP}")]
    found = []
    for folder in sorted(folders, key=lambda folder: (folder / SWEEP).stat().st_mtime):
        try:
            found.append(Sweep.read(folder))
        except RunError:
            if folder == path:
                raise
    return found


def plan(overrides: Sequence[str], params: Mapping[str, object]) -> list[list[str]]:
    """The overrides of each job of a multirun, in the order of Hydra's basic sweeper.

    Args:
        overrides: of the command.
        params: of the sweeper's configuration.

    Raises:
        HydraException: where an override does not say which values it stands for, as with `glob` and `interval`.
    """
    chosen: dict[str, list[str]] = {}
    for override in parsed([*(f"{key}={value}" for key, value in params.items()), *overrides]):
        chosen[override.get_key_element()] = values_of(override)
    jobs: list[list[str]] = [[]]
    for values in chosen.values():
        jobs = [[*job, value] for job in jobs for value in values]
    return jobs


def params_of(sweeper: DictConfig) -> list[str]:
    """The overrides that a sweeper's configuration has."""
    return [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra's grammar reads them."""
    return OverridesParser.create().parse_overrides(list(overrides))


def values_of(override: Override) -> list[str]:
    """`key=value` for each value of an override."""
    key = override.get_key_element()
    if override.is_sweep_override():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [f"{key}={override.get_value_element_as_str()}"]


def common(overrides: Sequence[str]) -> list[str]:
    """Of a command's overrides those with one value."""
    return [values_of(override)[0] for override in parsed(overrides) if not override.is_sweep_override()]


def pair(override: str) -> tuple[str, str]:
    """Key and value of an override, without the marks that add or force it."""
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def overrides_hash(overrides: Iterable[str]) -> str:
    """8 hexadecimal digits of overrides in any order, without those that change nothing of what is computed."""
    counted = sorted(one for one in overrides if not within(pair(one)[0], VOLATILE))
    return hashlib.blake2b("\0".join(counted).encode(), digest_size=4).hexdigest()


def sweep_name(overrides: ListConfig, sweeper: DictConfig | None = None) -> str:
    """The name of a sweep's directory: the keys of what is swept, and a hash of all.

    Args:
        overrides: of the command.
        sweeper: its configuration. Where it has goals, these count, and so does what its `params` search.
    """
    words: list[str] = OmegaConf.to_container(overrides, resolve=False)  # type: ignore[assignment]
    goals = None if sweeper is None else sweeper.get("goals")
    if sweeper is not None and goals is not None:
        words = [*params_of(sweeper), *words]
    swept = [override.key_or_group or "" for override in parsed(words) if override.is_sweep_override()]
    short = "-".join(re.sub(r"\W+", "_", key.rpartition(".")[2]) for key in swept)[:LONGEST]
    counted = words if goals is None else [*words, f"hydra.sweeper.goals={goals}"]
    return f"{short}-{overrides_hash(counted)}".lstrip("-")


def one_line(error: BaseException) -> str:
    """An error's message on one line, after the name of its kind where the message alone does not say what to do."""
    if isinstance(error, ConfigError):
        return "; ".join(error.faults)
    words = " ".join(str(error).split())
    return words if isinstance(error, PKDError) else f"{type(error).__name__}: {words}".removesuffix(": ")


# cached, as Hydra's `now` is: in a job the overrides are the job's own, and the folder is still the sweep's
OmegaConf.register_new_resolver("sweep_name", sweep_name, use_cache=True, replace=True)
