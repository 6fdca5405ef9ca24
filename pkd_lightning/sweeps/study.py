"""An Optuna study on disk, in the directory of its sweep: a journal that several processes write to."""

import fcntl
import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import optuna
from hydra.utils import get_method, instantiate
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from pkd_lightning.checkpoint import unlocked
from pkd_lightning.errors import ConfigError
from pkd_lightning.locks import locked, taken
from pkd_lightning.seeding import derive
from pkd_lightning.sweeps.options import Options

JOURNAL = "study.journal"
NAME = "search"
PROCESSES = "processes"  # a locked file for each process that runs trials
SETTINGS = "settings"
MOST_REPEATS = 10


class JournalLock(JournalFileOpenLock):
    """A lock that the system takes from a process that dies. What such a one left of a line is cut off.

    Optuna's own stay for half a minute, and it reads nothing behind a line that is torn.
    """

    def __init__(self, journal: Path) -> None:
        self.journal, self.locks = journal, True

    def acquire(self) -> bool:
        """Wait for the lock."""
        self.file = self.journal.with_name(f"{self.journal.name}.lock").open("ab")
        if self.locks:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX)
            except OSError as error:
                unlocked(self.journal.parent, error)
                self.locks = False
        cut_torn_line(self.journal)
        return True

    def release(self) -> None:
        """Give the lock back."""
        self.file.close()


def cut_torn_line(path: Path) -> None:
    """Shorten a file of lines by what follows its last whole one."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def open_study(folder: Path, options: Options, space: dict[str, str]) -> optuna.Study:
    """The study of a sweep, new or as it was left.

    Args:
        folder: the sweep's directory.
        options: of the search.
        space: see `Space.state`.

    Raises:
        ConfigError: where the study was begun with another space or other goals.
    """
    storage = _storage(folder)
    directions = [goal.direction for goal in options.purposes]
    settings = {"goals": options.goals, **space}
    if NAME in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=NAME, storage=storage, pruner=pruner_of(options))
        known = study.user_attrs.get(SETTINGS, settings)
        differ = [key for key in settings | known if settings.get(key) != known.get(key)]
        if differ:
            faults = [f"{key}: is {settings.get(key)}, and was {known.get(key)}" for key in differ]
            raise ConfigError([*faults, f"{folder} has another study; choose another hydra.sweep.dir"])
    else:
        study = optuna.create_study(
            storage=storage, study_name=NAME, directions=directions, pruner=pruner_of(options)  # type: ignore[arg-type]
        )  # fmt: skip
    if SETTINGS not in study.user_attrs:
        study.set_user_attr(SETTINGS, settings)
    return study


def trial_of(folder: Path, options: Options, number: int) -> optuna.Trial:
    """A trial of a study that is there, to report to from the process of its job."""
    study = optuna.load_study(study_name=NAME, storage=_storage(folder), pruner=pruner_of(options))
    return optuna.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)


def _storage(folder: Path) -> JournalStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder.absolute() / JOURNAL
    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalLock(path)))


def pruner_of(options: Options) -> BasePruner:
    """The pruner; none where trials are not pruned.

    Raises:
        ConfigError: where it cannot be made.
    """
    if options.watched is None:
        return NopPruner()
    if options.pruner == "median":
        return MedianPruner()
    made: BasePruner = _made("pruner", options.pruner, BasePruner)
    return made


def sampler_of(options: Options, draw: int, repeats: int = 0) -> BaseSampler:
    """The sampler of a draw. Each has a seed of its own: what a search draws depends on its trials, not on its stops.

    Args:
        options: of the search.
        draw: its number among all of the study.
        repeats: draws just before that were known; after too many of them it is drawn at random.

    Raises:
        ConfigError: where it cannot be made.
    """
    seed = seed_of(options, draw)
    if repeats > MOST_REPEATS:
        return RandomSampler(seed=seed)
    kinds = {"tpe": TPESampler, "random": RandomSampler, "nsga2": NSGAIISampler}
    made: BaseSampler
    if isinstance(options.sampler, dict):
        made = _made("sampler", options.sampler, BaseSampler, seed)
    else:
        made = kinds[options.sampler](seed=seed)
    return made


def seed_of(options: Options, draw: int) -> int | None:
    """The seed of a draw, from the search's and the sampler's own; None where each search is to be another."""
    own = options.sampler.get("seed") if isinstance(options.sampler, dict) else None
    seeds = [seed for seed in (options.seed, own) if seed is not None]
    return derive(seeds[0], *seeds[1:], "draw", draw) % 2**32 if seeds else None


def _made(name: str, given: dict[str, Any], kind: Any, seed: int | None = None) -> Any:
    try:
        seeded = "seed" in signature(get_method(given["_target_"])).parameters
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # each draw has a new one
            made = instantiate(given, _convert_="all", **({"seed": seed} if seeded else {}))
    except Exception as error:  # whatever the class of the user's choice raises
        said = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError([f"hydra.sweeper.{name}={given}: cannot be made ({said})"]) from error
    if not isinstance(made, kind):
        raise ConfigError([f"hydra.sweeper.{name}={given}: gives a {type(made).__name__}, no {kind.__name__}"])
    return made


@contextmanager
def present(folder: Path) -> Iterator[str]:
    """Within the block this process is known to run trials: the name of a file in `PROCESSES` that it holds."""
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    path = folder / PROCESSES / name
    with locked(path, "waiting for a look at this process's own file"):
        try:
            yield name
        finally:
            path.unlink(missing_ok=True)


def is_present(folder: Path, name: str) -> bool:
    """Whether the process of a file in `PROCESSES` still runs."""
    return taken(folder / PROCESSES / name)


def remove_absent(folder: Path) -> None:
    """Remove the files of processes that were killed."""
    for path in (folder / PROCESSES).glob("*"):
        if not taken(path):
            path.unlink(missing_ok=True)
