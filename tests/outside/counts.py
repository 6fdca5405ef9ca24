"""Another task, with its data: the larger of several counts, read as logarithms."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pkd_lightning import metrics
from pkd_lightning.data.sets import LabelledSet
from pkd_lightning.tasks import Task


@dataclass(frozen=True, eq=False)
class LogCounts(Task):
    """Counts (places,) to log(offset + count); results also report how often the label is among the first two."""

    offset: float

    @classmethod
    def fitted(cls, inputs: Tensor, num_classes: int) -> "LogCounts":
        return cls(tuple(inputs.shape[1:]), num_classes, float(inputs.double().mean()))

    def prepare(self, inputs: Tensor) -> Tensor:
        return (inputs + self.offset).log()

    def quality(self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
        first_two = (logits.topk(2).indices == labels[:, None]).any(1).float().mean()
        return {**metrics.quality(logits, labels, teacher), "top_2": float(first_two)}

    def state(self) -> dict[str, Any]:
        return {"offset": self.offset}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int) -> "LogCounts":
        return cls(input_shape, num_classes, float(state["offset"]))


@dataclass(frozen=True)
class CountSet(LabelledSet):
    """(N, places) int64 counts."""

    task: ClassVar[type[Task]] = LogCounts
    field: ClassVar[str] = "counts"
    name: str
    counts: Tensor
    labels: Tensor
    num_classes: int
    train_size: int

    def input_faults(self) -> Iterator[str]:
        if self.counts.ndim != 2 or (self.counts < 0).any():
            yield "counts are not (N, places) whole numbers from 0"


def load(root: str | None = None) -> CountSet:
    """300 samples of 4 counts."""
    counts = torch.randint(0, 50, (300, 4), generator=torch.Generator().manual_seed(0))
    return CountSet("counts", counts, counts.argmax(1), 4, 200)


class Perceptron(nn.Module):
    """One hidden layer."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(input_shape), width), nn.ReLU(), nn.Linear(width, num_classes)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        return self.layers(inputs)  # type: ignore[no-any-return]
