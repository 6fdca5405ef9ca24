"""The run directory: the same configuration finds the same directory, one process at a time."""

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pkd_lightning.checkpoint import atomic_write, write_json
from pkd_lightning.errors import RunError, full_disk
from pkd_lightning.process import task

# keys that change where or how a run is shown, not what it computes
VOLATILE = (
    "run_root",
    "threads",
    "logger",
    "trainer.progress",
    "trainer.num_workers",
    "teacher.trainer.progress",
    "teacher.trainer.num_workers",
)


def plain_config(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration without its volatile keys; of a teacher's checkpoint the content, not the path."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    checkpoint = plain["teacher"]["checkpoint"]
    if checkpoint is not None:
        plain["teacher"]["checkpoint"] = hashlib.blake2b(Path(checkpoint).read_bytes(), digest_size=16).hexdigest()
    for key in VOLATILE:
        *parents, leaf = key.split(".")
        node: Any = plain
        for parent in parents:
            node = node.get(parent, {})
        node.pop(leaf, None)
    return plain


def plain_hash(plain: dict[str, Any]) -> str:
    """12 hexadecimal digits of a plain configuration, or of a part of it."""
    return hashlib.blake2b(json.dumps(plain, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()


class RunLog(logging.FileHandler):
    """A log file whose errors reach the run: logging would print a traceback for each line, and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what writing the record raised."""
        raise  # logging calls this where it has caught the error


class RunDirectory:
    """`run_root/<experiment>/<hash>/` and the files in it.

    Attributes:
        path: the directory.
        teacher_logits: file of the teacher's logits. Of a loaded teacher it is shared, by the runs of the experiment
            that load the same one and ask it on the same data: `run_root/<experiment>/teachers/<hash>.safetensors`.
    """

    def __init__(self, config: DictConfig) -> None:
        plain = plain_config(config)
        self.path = Path(config.run_root) / str(config.name) / plain_hash(plain)
        self.teacher_logits = self.path / "teacher" / "logits.safetensors"
        if plain["teacher"]["checkpoint"] is not None:
            asked = plain_hash({part: plain[part] for part in ("teacher", "data")})
            self.teacher_logits = self.path.parent / "teachers" / f"{asked}.safetensors"

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
        """Mark the run complete."""
        atomic_write(self.path / "DONE", lambda path: path.write_text(""))

    @contextmanager
    def open(self, config: DictConfig) -> Iterator["RunDirectory"]:
        """Create the directory, take its lock, write config.yaml and log to run.log, for the length of the block.

        Raises:
            RunError: where another process holds the lock, or the disk is full, also within the block.
        """
        try:
            with full_disk(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); choose another run_root") from error
        with lock, full_disk(self.path):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"{self.path}: another process is running this experiment; wait for it{task()}"
                ) from error
            text = OmegaConf.to_yaml(config, resolve=True)
            atomic_write(self.path / "config.yaml", lambda path: path.write_text(text))
            handler = RunLog(self.path / "run.log")
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
