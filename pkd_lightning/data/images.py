"""The one form every data source delivers."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from pkd_lightning.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """A labelled image data set in memory.

    Attributes:
        name: short name, used in reports.
        images: (N, C, H, W) uint8, in any memory layout; a tensor of a read-only or mapped array will do.
        labels: (N,) int64 in [0, num_classes).
        num_classes: number of classes L.
        train_size: the first `train_size` samples are the official training part, the rest the official test part.

    Raises:
        DataError: where they are not of this form, naming everything that is wrong.
    """

    name: str
    images: Tensor
    labels: Tensor
    num_classes: int
    train_size: int

    def __post_init__(self) -> None:
        faults = [f"name is {self.name!r}, not a word"] if not isinstance(self.name, str) else []
        for key in ("num_classes", "train_size"):
            try:  # NumPy's integers and tensors count, but cannot be written as JSON
                object.__setattr__(self, key, index(getattr(self, key)))
            except (TypeError, ValueError, RuntimeError):
                faults.append(f"{key} is {getattr(self, key)!r}, not a whole number")
        faults += [*_tensor_faults("images", self.images), *_tensor_faults("labels", self.labels)]
        if not faults:
            faults += [*self._image_faults(), *self._label_faults()]
        if faults:
            raise DataError(f"data set {self.name!r}: {'; '.join(faults)}")

    def _image_faults(self) -> Iterator[str]:
        dtype, shape = self.images.dtype, tuple(self.images.shape)
        if self.images.ndim != 4 or dtype != torch.uint8:
            advice = ""
            if dtype.is_floating_point:
                advice = ": give levels from 0 to 255, for values in [0, 1] (255 * images).round().to(torch.uint8)"
            elif dtype == torch.uint8 and self.images.ndim == 3:
                advice = ": give grey images a channel, images[:, None]"
            yield f"images are {dtype} of shape {shape}, not torch.uint8 of (N, C, H, W){advice}"
        elif self.images[:1].numel() == 0 < len(self.images):
            yield f"images of shape {shape} have no pixels"
        if self.images.ndim == 4 and shape[3] <= 4 < min(shape[1:3]):
            yield (
                f"images of shape {shape} have their channels last: give (N, C, H, W), images.permute(0, 3, 1, 2)"
                " (or swap height and width, where images are so narrow)"
            )

    def _label_faults(self) -> Iterator[str]:
        labels = self.labels
        if labels.dtype != torch.int64 or labels.shape != self.images.shape[:1]:
            advice = ": give labels.reshape(-1).long()" if labels.numel() == len(self.images) else ""
            yield f"labels are {labels.dtype} of shape {tuple(labels.shape)}, not torch.int64, one per image{advice}"
        elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            yield f"labels go from {labels.min()} to {labels.max()}, not within 0 to {self.num_classes - 1}"
        if self.num_classes < 2:
            yield f"there are {self.num_classes} classes; a classifier needs at least 2"
        if not 0 <= self.train_size <= len(self.images):
            yield f"train_size={self.train_size} is not within the {len(self.images)} samples"


def _tensor_faults(key: str, value: object) -> Iterator[str]:
    """Why `value` cannot be looked at as a tensor in the CPU's memory."""
    if not isinstance(value, Tensor):
        yield f"{key} are a {type(value).__name__}, not a tensor: give torch.as_tensor({key})"
    elif value.device.type != "cpu" or value.layout != torch.strided:
        yield f"{key} are a {value.layout} tensor on {value.device}, not a dense one on the CPU"
    elif value.ndim == 0:
        yield f"{key} are a single value"


def normaliser(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C, 1, 1): uint8 pixels * scale + shift = (pixels / 255 - mean) / std."""
    mean, std = mean.double(), std.double()
    return (1 / (255 * std)).float(), (-mean / std).float()
