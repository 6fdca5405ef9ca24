"""What stands in place of the Mamba mixer of a block, to tell what Mamba gives: a depthwise convolution, or attention.

Mixers, see `pkd_lightning.models.mixers`. Each has an option that sets its cost, for multiply-accumulates equal to
those of Mamba.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Depthwise(nn.Module):
    """Mamba's block with a depthwise convolution over the tokens' raster in place of its convolution and scan.

    out_proj(SiLU(conv(x)) * SiLU(z)), where (x, z) = in_proj(tokens).

    Args:
        d_model: channels of a token.
        grid: (rows, columns) of the tokens' raster.
        expand: channels inside, in multiples of d_model.
        kernel: side of the convolution, odd.
    """

    reads_in_order = False

    def __init__(self, d_model: int, grid: tuple[int, int], expand: int = 2, kernel: int = 5) -> None:
        super().__init__()
        inner = expand * d_model
        self.grid = grid
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length, d_model) to the same shape."""
        x, z = self.in_proj(tokens).chunk(2, -1)
        mixed = self.conv(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)
        out: Tensor = self.out_proj(F.silu(mixed) * F.silu(z))
        return out


class Attention(nn.Module):
    """Softmax attention of all tokens to all, after a depthwise 3x3 convolution that tells positions apart.

    Args:
        d_model: channels of a token.
        grid: (rows, columns) of the tokens' raster.
        width: channels of a head.
        heads: their number; None for as many as d_model has room for, and one more where some is left.
    """

    reads_in_order = False

    def __init__(self, d_model: int, grid: tuple[int, int], width: int = 8, heads: int | None = None) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.heads = -(-d_model // width) if heads is None else heads
        self.conv = nn.Conv2d(d_model, d_model, 3, padding=1, groups=d_model)
        self.qkv = nn.Linear(d_model, 3 * self.heads * width, bias=False)
        self.out_proj = nn.Linear(self.heads * width, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length, d_model) to the same shape."""
        placed = tokens + self.conv(tokens.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(placed).unflatten(-1, (3, self.heads, self.width)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out

    def macs(self, length: int) -> int:
        """Multiply-accumulates for one sequence: those of torch's attention are not seen by the counter."""
        d_model, inner = self.out_proj.out_features, self.heads * self.width
        return length * (9 * d_model + 4 * d_model * inner + 2 * length * inner)
