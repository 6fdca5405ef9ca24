"""A mixer: the mean of the tokens so far, times a gate for each channel."""

import torch
from torch import Tensor, nn


class Averaging(nn.Module):
    """(batch, length, d_model) to the same, causal."""

    def __init__(self, d_model: int, length: int, gain: float = 1.0) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_model)
        self.gain = gain
        self.register_buffer("count", torch.arange(1, length + 1)[:, None], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return self.gain * torch.sigmoid(self.gate(tokens)) * tokens.cumsum(1) / self.count
