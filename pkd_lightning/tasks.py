"""Tasks: what is known of the inputs, and by what logits are scored. A data set's class names its own.

A task is saved with an ensemble, so that it prepares inputs as in training wherever it is loaded.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from pkd_lightning import metrics


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """What is known of inputs and targets, in training and wherever an ensemble is loaded.

    Attributes:
        input_shape: shape of one input, as it lies in memory and as models read it.
        num_classes: L, columns of the logits.
    """

    input_shape: tuple[int, ...]
    num_classes: int

    @classmethod
    @abstractmethod
    def fitted(cls, inputs: Tensor, num_classes: int) -> "Task":
        """The task of the training inputs (N, *input_shape), whose statistics it takes."""

    @abstractmethod
    def prepare(self, inputs: Tensor) -> Tensor:
        """Inputs (batch, *input_shape) as they lie in memory to what models read, of the same shape."""

    @abstractmethod
    def quality(self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
        """What results report of logits (N, L): `accuracy`, `nll`, `ece`; with the teacher's also `agreement`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `prepare` depends on, in JSON."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int) -> "Task":
        """The task that had this state.

        Raises:
            ValueError, TypeError, KeyError: where it is no such state.
        """


@dataclass(frozen=True, eq=False)
class Classification(Task):
    """One label a sample, and inputs whose channels, the first dimension, are normalised.

    Attributes:
        mean: of the training inputs by channel, (C, 1, ...) to be broadcast over an input.
        std: their standard deviation, in the same shape.
        unit: what the statistics count in, in units of the inputs.
    """

    unit: ClassVar[float] = 1
    mean: Tensor
    std: Tensor

    def prepare(self, inputs: Tensor) -> Tensor:
        """Float32 of mean 0 and standard deviation 1 over the training inputs."""
        scale, shift = (part.to(inputs.device) for part in self.scale_and_shift)
        return inputs.to(torch.float32, copy=True).mul_(scale).add_(shift)

    @cached_property
    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) with inputs * scale + shift = (inputs / unit - mean) / std."""
        mean, std = self.mean.double(), self.std.double()
        return (1 / (self.unit * std)).float(), (-mean / std).float()

    def quality(self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
        """See `metrics.quality`."""
        return metrics.quality(logits, labels, teacher)

    def state(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int) -> "Classification":
        """See `Task.from_state`."""
        mean, std = (torch.tensor(state[name]).reshape(-1, *[1] * (len(input_shape) - 1)) for name in ("mean", "std"))
        for name, values in (("mean", mean), ("std", std)):
            if not values.isfinite().all():
                raise ValueError(f"{name}: {state[name]} are not all finite numbers")
        channels = input_shape[0]
        if len(mean) != channels:
            raise ValueError(f"mean: {state['mean']} are not {channels} numbers, one a channel")
        if len(std) != channels or not (std > 0).all():
            raise ValueError(f"std: {state['std']} are not {channels} numbers above 0, one a channel")
        return cls(input_shape, num_classes, mean, std)


@dataclass(frozen=True, eq=False)
class ImageClassification(Classification):
    """Images (C, H, W) of uint8; mean and std (C, 1, 1) are of pixels scaled to [0, 1]."""

    unit: ClassVar[float] = 255

    @classmethod
    def fitted(cls, inputs: Tensor, num_classes: int) -> "ImageClassification":
        """See `Task.fitted`."""
        return cls(tuple(inputs.shape[1:]), num_classes, *_channel_statistics(inputs))


@dataclass(frozen=True, eq=False)
class SignalClassification(Classification):
    """Signals (C, length) of float32; mean and std (C, 1)."""

    @classmethod
    def fitted(cls, inputs: Tensor, num_classes: int) -> "SignalClassification":
        """See `Task.fitted`."""
        values = inputs.double()
        mean, std = values.mean((0, 2)), values.std((0, 2), correction=0).clamp(min=1e-6)
        return cls(tuple(inputs.shape[1:]), num_classes, mean.float()[:, None], std.float()[:, None])


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of uint8 images scaled to [0, 1], each (C, 1, 1)."""
    # by counting values: exact, and no float copy of the data
    counts = torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in images.transpose(0, 1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    std = variance.sqrt().clamp(min=1e-6)  # a constant channel stays finite
    return mean.float()[:, None, None], std.float()[:, None, None]
