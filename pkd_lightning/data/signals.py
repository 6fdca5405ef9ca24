"""Labelled 1-D signals, and their source: a NumPy file."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from pkd_lightning.data.sets import LabelledSet
from pkd_lightning.errors import DataError
from pkd_lightning.memory import check_memory
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
        classes: the name of each class, where the set names them.

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
    classes: tuple[str, ...] | None = None

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
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            missing = [name for name in ("signals", "labels") if name not in entries]
            if missing:
                raise DataError(f"{path}: has no array {' and no '.join(missing)}; it has {', '.join(entries)}")
            signals, labels = (_array(archive, entries[name], f"{path}: {name}") for name in ("signals", "labels"))
            train_size = int(0.7 * labels.size)
            if "train_size" in entries:
                train_size = int(_array(archive, entries["train_size"], f"{path}: train_size"))
    except DataError:
        raise
    except Exception as error:  # of a damaged file: zipfile, its decompressors and NumPy have many kinds
        raise DataError(f"{path}: cannot be read as a .npz file ({type(error).__name__}: {error})") from error
    if labels.dtype.kind == "f":
        raise DataError(f"{path}: labels: must be whole numbers, not of type {labels.dtype}")
    signals = signals[:, None] if signals.ndim == 2 else signals
    classes = int(labels.max()) + 1 if labels.size else 0
    values, targets = torch.from_numpy(signals.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
    return SignalSet(path.stem, values, targets, classes, train_size)


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str) -> NDArray[Any]:
    """Read one array, if it is of numbers, exactly as large as its header states, and fits into memory.

    Raises:
        DataError: it is not, naming `where`.
    """
    with archive.open(entry) as stream:
        version = npy.read_magic(stream)
        shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
        stated, held = prod(shape) * dtype.itemsize, entry.file_size - stream.tell()
    if dtype.kind not in "iuf":
        raise DataError(f"{where}: must be numbers, not of type {dtype}")
    if stated != held:
        raise DataError(f"{where}: the header states shape {shape}, {stated:,} bytes; the archive has {held:,} bytes")
    check_memory(stated + 4 * prod(shape), where, DataError)  # as they are, and as float32
    with archive.open(entry) as stream:
        return npy.read_array(stream, allow_pickle=False)
