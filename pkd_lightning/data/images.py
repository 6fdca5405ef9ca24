"""The one form every data source delivers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pkd_lightning.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """A labelled image data set in memory.

    Attributes:
        name: short name, used in reports.
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in [0, num_classes).
        num_classes: number of classes L.
        train_size: the first `train_size` samples are the official training part, the rest the official test part.

    Raises:
        DataError: where the tensors are not of this form, naming what is wrong.
    """

    name: str
    images: Tensor
    labels: Tensor
    num_classes: int
    train_size: int

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        faults = []
        if images.ndim != 4 or images.dtype != torch.uint8:
            faults.append(f"images are {images.dtype} of shape {tuple(images.shape)}, not torch.uint8 of (N, C, H, W)")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            faults.append(f"labels are {labels.dtype} of shape {tuple(labels.shape)}, not torch.int64, one per image")
        elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            faults.append(f"labels go from {labels.min()} to {labels.max()}, not within 0 to {self.num_classes - 1}")
        if self.num_classes < 2:
            faults.append(f"there are {self.num_classes} classes; a classifier needs at least 2")
        if not 0 <= self.train_size <= len(labels):
            faults.append(f"train_size={self.train_size} is not within the {len(labels)} samples")
        if faults:
            raise DataError(f"data set {self.name!r}: {'; '.join(faults)}")


def normaliser(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C, 1, 1): uint8 pixels * scale + shift = (pixels / 255 - mean) / std."""
    mean, std = mean.double(), std.double()
    return (1 / (255 * std)).float(), (-mean / std).float()
