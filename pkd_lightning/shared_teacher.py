"""A trained teacher that belongs to no run: one run trains it, the others that want it wait for it."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pkd_lightning.checkpoint import (
    append_line,
    atomic_write,
    content_hash,
    load_tensors,
    read_json,
    remove_temporaries,
    save_weights,
    weights_of,
    write_json,
)
from pkd_lightning.errors import RunError
from pkd_lightning.fitting import Stage
from pkd_lightning.locks import Lock, locked

logger = logging.getLogger(__name__)


class SharedTeacher:
    """The directory of a teacher; all but `lock` is called while its lock is held.

    Its files have other names than those in a run directory, of which there is one a run.

    Args:
        path: the directory, see `RunDirectory.shared_teacher`.
        data: fingerprint of the data it is trained on.
    """

    def __init__(self, path: Path, data: str) -> None:
        self.path, self.data = path, data
        self.weights, self.record = path / "weights.safetensors", path / "teacher.json"
        self.lines, self.checkpoint = path / "epochs.jsonl", path / "fits" / "teacher.ckpt"

    def lock(self) -> AbstractContextManager[Lock]:
        """Wait for the process that trains it, if there is one."""
        return locked(self.path / ".lock", "waiting for the teacher, which another run trains")

    def found(self) -> bool:
        """Whether it has been trained; one that is damaged is said to be, and removed."""
        if not self.record.exists():
            return False
        try:
            self._check()
        except RunError as error:
            logger.warning("the teacher is trained again. %s", error)
            self.lines.unlink(missing_ok=True)
            self.record.unlink()
            return False
        return True

    def _check(self) -> None:
        """Compare the files with their hashes, and with each other.

        Raises:
            RunError: where they are not those of this teacher.
        """
        record = read_json(self.record)
        if not isinstance(record, dict) or record.get("data") != self.data:
            raise RunError(f"{self.record}: is not of a teacher of these data")
        # the hash in the file of the weights is not enough: a run may hold the same file by a hard link, and who
        # writes other weights into that one writes them into both
        if content_hash(load_tensors(self.weights)) != record.get("weights"):
            raise RunError(f"{self.weights}: holds other weights than those that were trained")

    def begin(self, stage: Stage) -> Stage:
        """`stage`, of a run, in this directory; what the run has begun by itself, in an earlier version, is moved here.

        Lines of a training that ended early go to the run, whose own follow.
        """
        for name in (self.weights.name, self.record.name):
            remove_temporaries(self.path, name)
        if stage.checkpoint is not None and not any(_versions(self.checkpoint)):
            for path in _versions(stage.checkpoint):
                self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, self.checkpoint.with_name(path.name))
                add_lines(stage.metrics, self.lines, stage.shown, stage.name)
        add_lines(self.lines, stage.metrics, stage.name, stage.shown)
        return replace(stage, metrics=self.lines, checkpoint=self.checkpoint, label="")

    @property
    def begun(self) -> bool:
        """Whether its training was begun."""
        return self.lines.exists() or any(_versions(self.checkpoint))

    def save(self, model: nn.Module, record: dict[str, Any], stage: Stage) -> None:
        """Keep what a run has trained, whose lines are those of `stage`."""
        add_lines(stage.metrics, self.lines, stage.shown, stage.name)
        save_weights(model, self.weights)
        weights = content_hash(weights_of(model))
        write_json(self.record, {**record, "data": self.data, "weights": weights}, hashed=True)

    def give(self, weights: Path, record: Path, stage: Stage) -> None:
        """Give a run the teacher: a hard link to its weights, or a copy where that fails, its record and its lines."""
        add_lines(self.lines, stage.metrics, stage.name, stage.shown)
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.unlink(missing_ok=True)
        try:
            os.link(self.weights, weights)
        except OSError:
            atomic_write(weights, lambda temporary: shutil.copyfile(self.weights, temporary))
        write_json(record, read_json(self.record), hashed=True)


def _versions(checkpoint: Path) -> list[Path]:
    """A fit's checkpoint and the one before it, those that are there."""
    return sorted(checkpoint.parent.glob(f"{checkpoint.name}*"))


def add_lines(source: Path, target: Path, stage: str, name: str | None = None) -> None:
    """Add the epochs' lines of a stage in one file to another, but for those that are there, whatever they took.

    Args:
        source: file that has them.
        target: file that they are added to.
        stage: its name in `source`.
        name: its name in `target`; None: the same.
    """
    if source == target:
        return
    named = ({**line, "stage": name or stage} for line in _lines(source, stage))
    there = {_identity(line) for line in _lines(target, name or stage)}
    new = [json.dumps(line) for line in named if _identity(line) not in there]
    if new:
        target.parent.mkdir(parents=True, exist_ok=True)
        append_line(target, "\n".join(new))


def _lines(path: Path, stage: str) -> Iterator[dict[str, Any]]:
    """The lines of a stage; not those that a killed process left torn."""
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and line.get("stage") == stage:
            yield line


def _identity(line: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in line.items() if key != "seconds"}, sort_keys=True)
