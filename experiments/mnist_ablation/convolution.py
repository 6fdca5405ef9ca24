"""A convolution in place of the Mamba mixer of a block, to tell what Mamba gives."""

import torch.nn.functional as F
from torch import Tensor, nn


class Convolution(nn.Conv2d):
    """A 3x3 convolution over the tokens' raster, and SiLU: a mixer, see `pkd_lightning.models.mixers`.

    It has 9 * d_model^2 parameters, where Mamba of expand 2 has 6 * d_model^2 and those of its own convolution and its
    scan: about as many at the sizes of mnist_best.

    Args:
        d_model: channels of a token.
        grid: (rows, columns) of the tokens' raster.
    """

    reads_in_order = False

    def __init__(self, d_model: int, grid: tuple[int, int]) -> None:
        super().__init__(d_model, d_model, 3, padding=1, bias=False)
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length, d_model) to the same shape."""
        planes = tokens.transpose(1, 2).unflatten(2, self.grid)
        return F.silu(super().forward(planes)).flatten(2).transpose(1, 2)
