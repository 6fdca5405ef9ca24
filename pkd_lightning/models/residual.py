"""A teacher of another kind than its students: a small residual network (cf. DAWNBench's ResNet-9)."""

import torch.nn.functional as F
from torch import Tensor, nn


class Unit(nn.Sequential):
    """A 3x3 convolution, batch norm, ReLU, and the maximum over 2x2 pixels where `pooled`."""

    def __init__(self, inside: int, outside: int, pooled: bool = False) -> None:
        convolution = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2) if pooled else nn.Identity())


class Residual(nn.Sequential):
    """Two units, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__(Unit(channels, channels), Unit(channels, channels))

    def forward(self, planes: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        added = planes
        for unit in self:
            added = unit(added)
        return planes + added


class ResidualNetwork(nn.Module):
    """Six units and two residual connections, to an eighth of the resolution; logits from the maximum over places.

    Args:
        image_shape: (channels, height, width), sides at least 8.
        num_classes: L.
        width: channels of the first unit; those after it have 2 and 4 times as many.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 48) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Unit(image_shape[0], width),
            Unit(width, 2 * width, pooled=True),
            Residual(2 * width),
            Unit(2 * width, 4 * width, pooled=True),
            Unit(4 * width, 4 * width, pooled=True),
            Residual(4 * width),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to logits (batch, num_classes)."""
        pooled: Tensor = F.adaptive_max_pool2d(self.features(images), 1).flatten(1)
        logits: Tensor = self.head(pooled)
        return logits / 8  # as the original has it: softer at first
