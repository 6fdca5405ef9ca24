"""The one form every data source delivers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """A labelled image data set in memory.

    Attributes:
        name: short name, used in reports.
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in [0, num_classes).
        num_classes: number of classes L.
        train_size: the first `train_size` samples are the official training part, the rest the official test part.
    """

    name: str
    images: Tensor
    labels: Tensor
    num_classes: int
    train_size: int
