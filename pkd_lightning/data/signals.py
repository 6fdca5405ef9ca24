"""Labelled 1-D signals, and their source: a NumPy file."""

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pkd_lightning.data.sets import LabelledSet
from pkd_lightning.errors import DataError
from pkd_lightning.tasks import SignalClassification, Task


@dataclass(frozen=True)
class SignalSet(LabelledSet):
    """A labelled data set of signals in memory.

    Attributes:
        name: short name, used in reports.
        signals: (N, C, length) float32.
        labels: (N,) int64 in [0, num_classes).
        num_classes: number of classes L.
        train_size: the first `train_size` samples are the official training part, the rest the official test part.

    Raises:
        DataError: where they are not of this form, naming everything that is wrong.
    """

    task: ClassVar[type[Task]] = SignalClassification
    field: ClassVar[str] = "signals"
    name: str
    signals: Tensor
    labels: Tensor
    num_classes: int
    train_size: int

    def input_faults(self) -> Iterator[str]:
        """Why the signals are not of the form above."""
        shape = tuple(self.signals.shape)
        if self.signals.ndim != 3 or self.signals.dtype != torch.float32:
            yield f"signals are {self.signals.dtype} of shape {shape}, not torch.float32 of (N, C, length)"
        elif self.signals[:1].numel() == 0 < len(self.signals):
            yield f"signals of shape {shape} have no values"
        elif not self.signals.isfinite().all():
            bad = (~self.signals.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
            yield f"{len(bad)} signals hold values that are not finite, the first is number {bad[0]}"


def load_npz(root: str | None = None) -> SignalSet:
    """Signals of a .npz file with the arrays `signals` and `labels`, and the number `train_size` if it has such a part.

    Args:
        root: the file. signals: (N, C, length) or (N, length) of numbers; labels: (N,) whole numbers from 0. Without
            `train_size` the first 70% are the training part, which only data.split=official makes use of.

    Raises:
        DataError: where it cannot be read, lacks an array, or they are not of this form.
    """
    if root is None:
        raise DataError("data.root: must name a .npz file with the arrays `signals` and `labels`")
    path = Path(root)
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: is no .npz file of several arrays")
        with file:
            missing = [name for name in ("signals", "labels") if name not in file.files]
            if missing:
                raise DataError(f"{path}: has no array {' and no '.join(missing)}; it has {', '.join(file.files)}")
            signals, labels = file["signals"], file["labels"]
            train_size = int(file["train_size"]) if "train_size" in file.files else int(0.7 * len(labels))
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    for name, array in (("signals", signals), ("labels", labels)):
        if array.dtype.kind not in ("iu" if name == "labels" else "iuf"):
            raise DataError(f"{path}: {name} are of type {array.dtype}, not numbers")
    signals = signals[:, None] if signals.ndim == 2 else signals
    classes = int(labels.max()) + 1 if labels.size else 0
    values, targets = torch.from_numpy(signals.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
    return SignalSet(path.stem, values, targets, classes, train_size)
