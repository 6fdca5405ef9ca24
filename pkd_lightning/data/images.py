"""Labelled images, the form that image sources deliver."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pkd_lightning.data.sets import LabelledSet
from pkd_lightning.tasks import ImageClassification, Task


@dataclass(frozen=True)
class ImageSet(LabelledSet):
    """A labelled image data set in memory.

    Attributes:
        name: short name, used in reports.
        images: (N, C, H, W) uint8, in any memory layout; a tensor of a read-only or mapped array will do.
        labels: (N,) int64 in [0, num_classes).
        num_classes: number of classes L.
        train_size: the first `train_size` samples are the official training part, the rest the official test part.
        classes: the name of each class, where the set names them.

    Raises:
        DataError: where they are not of this form, naming everything that is wrong.
    """

    task: ClassVar[type[Task]] = ImageClassification
    field: ClassVar[str] = "images"
    name: str
    images: Tensor
    labels: Tensor
    num_classes: int
    train_size: int
    classes: tuple[str, ...] | None = None

    def input_faults(self) -> Iterator[str]:
        """Why the images are not of the form above."""
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
