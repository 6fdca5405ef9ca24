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
    """Softmax attention within squares of tokens, after a depthwise 3x3 convolution that tells positions apart.

    Args:
        d_model: channels of a token.
        grid: (rows, columns) of the tokens' raster.
        width: channels of a head.
        heads: their number; None for as many as d_model has room for, and one more where some is left.
        window: side of the squares; of a smaller raster its side. All tokens of 8x8 see each other, and those of 16x16
            in four squares (cf. Swin, arXiv 2103.14030).

    Raises:
        ValueError: the raster's sides are no multiples of those of a square.
    """

    reads_in_order = False

    def __init__(
        self, d_model: int, grid: tuple[int, int], width: int = 8, heads: int | None = None, window: int = 8
    ) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.square = min(window, grid[0]), min(window, grid[1])
        if grid[0] % self.square[0] or grid[1] % self.square[1]:
            raise ValueError(f"a raster of {grid[0]}x{grid[1]} is not made of squares of {window}")
        self.heads = -(-d_model // width) if heads is None else heads
        self.conv = nn.Conv2d(d_model, d_model, 3, padding=1, groups=d_model)
        self.qkv = nn.Linear(d_model, 3 * self.heads * width, bias=False)
        self.out_proj = nn.Linear(self.heads * width, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length, d_model) to the same shape."""
        (rows, columns), (high, wide) = self.grid, self.square
        planes = tokens.transpose(1, 2).unflatten(2, self.grid)
        placed = (planes + self.conv(planes)).unflatten(2, (rows // high, high)).unflatten(4, (columns // wide, wide))
        squares = placed.permute(0, 2, 4, 3, 5, 1)  # (batch, down, across, high, wide, d_model)
        q, k, v = (
            self.qkv(squares.flatten(3, 4)).unflatten(-1, (3, self.heads, self.width)).permute(4, 0, 1, 2, 5, 3, 6)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(3, 4).flatten(4)
        out: Tensor = self.out_proj(mixed.unflatten(3, self.square).transpose(2, 3).flatten(1, 4))
        return out

    def macs(self, length: int) -> int:
        """Multiply-accumulates for one sequence: those of torch's attention are not seen by the counter."""
        d_model, inner = self.out_proj.out_features, self.heads * self.width
        return length * (9 * d_model + 4 * d_model * inner + 2 * self.square[0] * self.square[1] * inner)
