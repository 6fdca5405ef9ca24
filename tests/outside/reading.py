"""A student that reads what earlier ones gave: their logits, and the outputs of their hidden layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pkd_lightning.outputs import Output


class Reading(nn.Module):
    """A hidden layer; the last one reads it, and all that earlier students gave."""

    def __init__(self, num_classes: int, width: int, reads: Sequence[str] = ("hidden",)) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.hidden = nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.ReLU())
        self.head = nn.LazyLinear(num_classes)

    def forward(self, inputs: Tensor, earlier: tuple[Output, ...] = ()) -> Tensor:
        """See the class."""
        read = [value for output in earlier for value in (output.logits, *output.features.values())]
        return self.head(torch.cat([self.hidden(inputs), *read], 1))  # type: ignore[no-any-return]
