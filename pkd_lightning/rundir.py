"""The run directory: the same configuration finds the same directory, one process at a time."""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pkd_lightning import ranks
from pkd_lightning.boosting.options import BoostingConfig, WeakLearnerConfig
from pkd_lightning.checkpoint import atomic_write, remove_temporaries, unlocked, write_json
from pkd_lightning.composition import complete, no_teacher, top_level_faults
from pkd_lightning.errors import RunError, full_disk
from pkd_lightning.locks import holder, sign, taken, unsign
from pkd_lightning.process import in_multirun, task
from pkd_lightning.results import PROGRESS
from pkd_lightning.teachers.identity import determining
from pkd_lightning.trainer import TrainerConfig, device_of

OBJECTIVES = "pkd_lightning.boosting.objectives."
PEERS = "pkd_lightning.boosting.peers."
OVERRIDES = "overrides.json"  # of a run directory: what the command set, for `pkd list`
LATEST = "latest"  # in run_root, a link to what the last command made
FOLDERS = ("teacher", "students", "fits", "parts", "figures", "wandb", "tensorboard")  # of a run directory
WANDB_HEADER = 7  # bytes of an offline W&B file that holds nothing yet

logger = logging.getLogger(__name__)

# Keys that change where or how a run is shown, not what it computes. `threads` is not among them: sums split over two
# threads end in other bits than those of one, and a run resumed with another number would be neither. null, whatever
# the machine has, counts as null, so that a run goes on where another machine has other cores.
VOLATILE = (
    "run_root",
    "logger",
    "trainer.progress",
    "trainer.num_workers",
    "trainer.checkpoint_every",
    "teacher.trainer.progress",
    "teacher.trainer.num_workers",
    "teacher.trainer.checkpoint_every",
    *(f"{owner}.{key}" for owner in ("trainer", "teacher.trainer") for key in ("devices", "num_nodes", "strategy")),
)


def plain_config(config: DictConfig) -> dict[str, Any]:
    """What a valid configuration means, however it is written, without its volatile keys.

    Of a teacher's checkpoint the content counts, of `data.root` the place, of `accelerator=auto` the device, and of
    `cuda_graphs` nothing on the CPU. An option that has its default is as good as left out, and an objective goes by
    its name, not its import path.
    """
    plain: dict[str, Any] = OmegaConf.to_container(complete(config), resolve=True)  # type: ignore[assignment]
    data, teacher, boosting = plain["data"], plain["teacher"], plain["boosting"]
    plain["name"] = str(plain["name"])
    if data.get("root") is not None:
        data["root"] = str(Path(data["root"]).expanduser().resolve())
    if boosting.get("grow_from") is not None:
        boosting["grow_from"] = str(Path(boosting["grow_from"]).expanduser().resolve())
    models = _models(teacher)
    for model in models:
        if model.get("checkpoint") is not None:
            content = Path(model["checkpoint"]).expanduser().read_bytes()
            model["checkpoint"] = hashlib.blake2b(content, digest_size=16).hexdigest()
    if isinstance(boosting.get("objective"), dict) and boosting["objective"].get("_target_", "").startswith(OBJECTIVES):
        own = {key: value for key, value in boosting.pop("objective").items() if key != "_partial_"}
        boosting["objective"] = own.pop("_target_")
        for key, value in own.items():  # as options of `boosting` would have it; these two, others read as well
            if key not in ("alpha", "temperature"):
                boosting[key] = value
            elif value != boosting.get(key, getattr(BoostingConfig, key)):
                boosting[f"objective.{key}"] = value
    if str(boosting.get("objective")).startswith(OBJECTIVES):
        boosting["objective"] = boosting["objective"].removeprefix(OBJECTIVES).lower()
    if "combine" in boosting:
        boosting["combine"] = boosting["combine"].removeprefix("pkd_lightning.boosting.combine.")
    if boosting.get("peers") is not None:
        name = str(boosting["peers"])
        boosting["peers"] = name.removeprefix(PEERS).lower() if name.startswith(PEERS) else name
    boosting["weak_learner"] = _without_defaults(boosting.get("weak_learner", {}), WeakLearnerConfig)
    plain["boosting"] = _without_defaults(boosting, BoostingConfig)
    if teacher.get("online") is False:
        del teacher["online"]
    for owner in (plain, *models):
        device = device_of(owner["trainer"].get("accelerator", "auto"))
        owner["trainer"] = _without_defaults({**owner["trainer"], "accelerator": device}, TrainerConfig)
        if device == "cpu":
            owner["trainer"].pop("cuda_graphs", None)
        for key in VOLATILE:
            if owner is not plain and key.startswith("trainer."):
                owner["trainer"].pop(key.removeprefix("trainer."), None)
    plain["teacher"] = _plain_teacher(teacher)
    for key in VOLATILE:
        *parents, leaf = key.split(".")
        node: Any = plain
        for parent in parents:
            node = node.get(parent, {})
        node.pop(leaf, None)
    if no_teacher(teacher):  # how it would be trained does not count
        plain["teacher"] = {"model": None}
    return plain


def _models(teacher: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of a plain teacher: its own, or its members, then its assistants."""
    first = teacher["members"].values() if "members" in teacher else [teacher]
    return [*first, *(teacher.get("assistants") or {}).values()]


def _plain_teacher(teacher: dict[str, Any]) -> dict[str, Any]:
    """What a plain teacher of completed options means; members and assistants stand by their places in the order."""
    plain = {key: value for key, value in teacher.items() if key not in ("generations", "members", "assistants")}
    if plain.get("combine") == "mean":
        del plain["combine"]
    for key in ("members", "assistants"):
        if teacher.get(key):
            plain[key] = {
                str(place): {name: _without_defaults({k: v for k, v in model.items() if v is not None}, BoostingConfig)}
                for place, (name, model) in enumerate(teacher[key].items(), 1)
            }
    return plain


def _without_defaults(given: dict[str, Any], cls: Any) -> dict[str, Any]:
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(cls)
    }

    def is_default(key: str, value: Any) -> bool:
        return key in defaults and (value == defaults[key] or (defaults[key] is None and value in ([], {})))

    return {key: value for key, value in given.items() if not is_default(key, value)}


def plain_hash(plain: dict[str, Any]) -> str:
    """12 hexadecimal digits of a plain configuration, or of a part of it. 2 and 2.0 are the same number."""
    return hashlib.blake2b(json.dumps(_same(plain), sort_keys=True, default=str).encode(), digest_size=6).hexdigest()


def _same(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _same(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_same(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def find_finished(config: DictConfig) -> "RunDirectory | None":
    """The directory in which `config` has run to its end; None where it has not, or is at fault (`assemble` says how).

    It needs neither torch nor the data.
    """
    try:
        directory = None if top_level_faults(config) else RunDirectory(config)
    except (OmegaConfBaseException, OSError, AttributeError, KeyError, TypeError):
        return None  # not of the form of a valid configuration
    return directory if directory is not None and directory.finished else None


class RunLog(logging.FileHandler):
    """A log file whose full disk reaches the run: logging would print a traceback for each line, and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what writing the record raised; a record that cannot be formatted is only reported."""
        if isinstance(sys.exc_info()[1], OSError):
            raise  # logging calls this where it has caught the error
        super().handleError(record)


class RunDirectory:
    """`run_root/<experiment>/<hash>/` and the files in it.

    Attributes:
        path: the directory.
        teachers: what determines each of those that teach and its logits, beside the data's content, by where its
            options are: `teacher`, `teacher.members.NAME`, `teacher.assistants.NAME`.
    """

    def __init__(self, config: DictConfig) -> None:
        plain = plain_config(config)
        self.root = Path(config.run_root).expanduser()
        self.path = self.root / str(config.name) / plain_hash(plain)
        self.teachers = determining(plain)

    def shared_teachers(self, data: str) -> dict[str, Path]:
        """The directory of each of `teachers` and its logits, for all runs below `run_root` that want the same.

        Args:
            data: fingerprint of the data. It counts, so that other files under the same names have another teacher.
        """
        return {
            option: self.root / "teachers" / plain_hash({**one, "fingerprint": data})
            for option, one in self.teachers.items()
        }

    def shared_teacher(self, data: str) -> Path:
        """That of the teacher, which is one model."""
        return self.shared_teachers(data)["teacher"]

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.path / "DONE").exists()

    @property
    def results(self) -> Path:
        """The results file."""
        return self.path / "results.json"

    def save_results(self, results: dict[str, Any]) -> None:
        """Write results.json, whole or not at all."""
        write_json(self.results, results)

    def finish(self) -> None:
        """Mark the run complete, and remove what only going on with it would need."""
        atomic_write(self.path / "DONE", lambda path: path.write_text(""))
        self.tidy()

    def revisit(self) -> None:
        """Say that the run is finished, and tidy it: the process that finished it may have been killed at its end."""
        logger.info("finished before: %s", self.path)
        if not in_multirun():
            point_latest(self.path.parents[1], self.path)
        # not where it is locked, so that a live process may be writing, nor where nothing can be written
        with suppress(OSError), (self.path / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.tidy()

    def tidy(self) -> None:
        """Remove what killed processes left, and of a finished run what only going on needs; only under the lock."""
        several = (self.path / "teacher").glob("*/*/")
        for folder in (self.path, *(self.path / name for name in ("teacher", "students", "figures")), *several):
            remove_temporaries(folder)
        left = [self.path / "report.html.partial"]
        if self.finished:
            left += [self.path / PROGRESS, *self.path.glob("*.[01]")]  # the matrices' files
            left += [self.path / "teacher" / f"logits.{kind}" for kind in ("safetensors", "lock")]
        for path in left:
            path.unlink(missing_ok=True)
        for folder in (self.path / "wandb").glob("*run-*"):
            sizes = [file.stat().st_size for file in folder.glob("*.wandb")]
            if sizes and max(sizes) <= WANDB_HEADER:  # `wandb sync` would upload an empty run
                shutil.rmtree(folder)
        for link in (self.path / "wandb").glob("*"):
            if link.is_symlink() and not link.exists():
                link.unlink()

    def _check_folders(self) -> None:
        """Check that nothing else is where the run's folders will be.

        Raises:
            RunError: naming it.
        """
        for name in FOLDERS:
            path = self.path / name
            if path.exists() and not path.is_dir():
                raise RunError(f"{path}: is no directory, and the run needs one there; move it away")

    @contextmanager
    def open(self, config: DictConfig) -> Iterator["RunDirectory"]:
        """Create the directory, take its lock, write config.yaml and log to run.log, for the length of the block.

        Raises:
            RunError: where another process holds the lock, or the disk is full, also within the block.
        """
        if not ranks.first():  # the first rank of the run does it for all
            yield self
            return
        try:
            with full_disk(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                lock = (self.path / ".lock").open("ab")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); choose another run_root") from error
        with lock, full_disk(self.path):
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.2)  # `held` may be looking, for an instant
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                who = holder(self.path / ".lock").replace(": process ", " (", 1)
                raise RunError(
                    f"{self.path}: another process{who and who + ')'} is running this experiment; wait for it{task()}"
                ) from error
            except OSError as error:
                unlocked(self.path, error)
            else:  # without a lock another process may be writing what would be removed
                self._check_folders()
                self.tidy()
                sign(lock)
            text = OmegaConf.to_yaml(complete(config), resolve=True)
            atomic_write(self.path / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
            if HydraConfig.initialized():
                write_json(self.path / OVERRIDES, list(map(str, HydraConfig.get().overrides.task)))
            if not in_multirun():
                point_latest(self.path.parents[1], self.path)
            handler = RunLog(self.path / "run.log", encoding="utf-8")
            handler.setLevel(logging.DEBUG)  # the edges of each class, besides what the terminal shows
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logging.getLogger().addHandler(handler)
            shown, logging.raiseExceptions = logging.raiseExceptions, False  # on a full disk W&B's own log shows many
            try:
                yield self
            finally:
                logging.raiseExceptions = shown
                logging.getLogger().removeHandler(handler)
                handler.close()
                unsign(lock)


def held(run: Path) -> bool:
    """Whether a process runs the experiment of a run directory: it holds its lock, on whatever host."""
    return taken(run / ".lock")


def point_latest(run_root: Path, target: Path) -> None:
    """Make the link `latest` in `run_root` lead to `target`, at once, where links can be made."""
    link = run_root / LATEST
    with suppress(OSError):
        if link.is_symlink() or not link.exists():
            temporary = run_root / f".{LATEST}.{secrets.token_hex(4)}"  # named like those of `atomic_write`
            temporary.symlink_to(os.path.relpath(target, run_root))
            temporary.replace(link)
