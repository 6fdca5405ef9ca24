"""Blocks: what the classifier does with the tokens of a raster, one block after another."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pkd_lightning.kernels.scan import takes
from pkd_lightning.kernels.scan.order import Order
from pkd_lightning.models.config import MambaClassifierConfig
from pkd_lightning.models.mamba import Mamba, own_weights, rms_weight
from pkd_lightning.models.mixers import build_mixer, in_order
from pkd_lightning.models.options import Direction, Norm

# in which orders the blocks read the tokens' raster, one block after another: (by columns, backwards)
ORDERS: dict[Direction, tuple[tuple[bool, bool], ...]] = {
    "forward": ((False, False),),
    "alternating": ((False, False), (False, True)),
    "cross": ((False, False), (False, True), (True, False), (True, True)),
}


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The normalisation layer over `channels` features of a token."""
    layers: dict[Norm, Callable[[int], nn.Module]] = {"none": nn.Identity, "rms": nn.RMSNorm, "layer": nn.LayerNorm}
    return layers[norm](channels)


def fused_cells(norm: nn.Module, tokens: Tensor, grid: tuple[int, int], cells: int) -> Tensor | None:
    """A norm of tokens (batch, length, channels) and their averages over cells, (batch, channels * cells * cells).

    By one kernel: None where there is none for it, or a call of the norm does more.
    """
    weight = rms_weight(norm, tokens.shape[2])
    if weight is None or torch.is_autocast_enabled("cpu"):
        return None
    if not takes(tokens, *(x for x in weight if x is not None)):
        return None
    from pkd_lightning.kernels.pool import pool_cpu  # numba takes a second to import

    return pool_cpu(tokens, *weight, grid, cells)


class Block(nn.Module):
    """One block of the classifier, in any of the `ORDERS`.

    Optional local convolution, optional pre-norm, a mixer, optional residual connection.
    """

    def __init__(self, config: MambaClassifierConfig, index: int, grid: tuple[int, int]) -> None:
        super().__init__()
        channels, side = config.d_model, config.local_conv
        self.local = nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels) if side else None
        self.norm = make_norm(config.norm, channels)
        offered = {
            "d_model": config.d_model,
            "d_state": config.d_state + index * config.d_state_step,
            "d_conv": config.d_conv,
            "expand": config.expand,
            "dt_rank": config.dt_rank,
            "grid": grid,
            "length": grid[0] * grid[1],
        }
        self.mixer = build_mixer(config.mixers[index % len(config.mixers)], config.mixer_options, offered)
        self.residual = config.residual

    def forward(self, tokens: Tensor, grid: tuple[int, int], columns: bool = False, backwards: bool = False) -> Tensor:
        """Map tokens (batch, length, d_model) of a raster `grid` (rows, columns) to the same shape.

        The block reads them row by row, or by `columns`, from the end where `backwards`.
        """
        tokens = with_local(self.local, tokens, grid)
        if isinstance(self.mixer, Mamba) and getattr(self.mixer, "reads_in_order", True):
            order = Order(*grid, backwards) if columns else Order(backwards=backwards)
            out = self.mixer.fused_residual(tokens, self.norm, order, self.residual)
            if out is not None:
                return out
        x = in_order(self.mixer, self.norm(tokens), grid, columns, backwards)
        return tokens + x if self.residual else x


def with_local(local: nn.Module | None, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (batch, length, d_model) of a raster and their local convolution, where there is one."""
    if local is None:
        return tokens
    weights = local_weights(local, tokens.shape[2])
    if weights is not None and takes(tokens, *weights) and not torch.is_autocast_enabled("cpu"):
        from pkd_lightning.kernels.local import local_cpu  # numba takes a second to import

        return local_cpu(tokens, *weights, grid)
    planes: Tensor = local(tokens.transpose(1, 2).unflatten(2, grid))
    return tokens + planes.flatten(2).transpose(1, 2)


def local_weights(layer: nn.Module, channels: int) -> tuple[Tensor, Tensor] | None:
    """Weight (channels, side, side) and bias of a block's local convolution; None where it is not as it was built."""
    own = own_weights(layer, nn.Conv2d)
    if own is None or own[1] is None or not isinstance(layer, nn.Conv2d):
        return None
    side = layer.kernel_size[0]
    built = ((side, side), (1, 1), (side // 2, side // 2), (1, 1), channels, "zeros", 1)
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode, side % 2)
    return (own[0][:, 0], own[1]) if shape == built else None


class Raster(NamedTuple):
    """The blocks on the tokens of a raster, and the norm after them.

    Attributes:
        path: what the paths of its modules begin with.
        blocks: its blocks.
        n_blocks: how many are called; more than there are where they share weights.
        norm: follows the last.
        grid: (rows, columns).
        channels: of a token.
        direction: a key of `ORDERS`.
    """

    path: str
    blocks: nn.ModuleList
    n_blocks: int
    norm: nn.Module
    grid: tuple[int, int]
    channels: int
    direction: Direction

    def calls(self) -> Iterator[tuple[int, bool, bool]]:
        """Of each call of a block its index, whether it reads by columns, and whether backwards."""
        orders = ORDERS[self.direction]
        for i in range(self.n_blocks):
            yield i % len(self.blocks), *orders[i % len(orders)]

    def through(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length, channels) to the same shape by all blocks, without the norm."""
        for i, columns, backwards in self.calls():
            tokens = self.blocks[i](tokens, self.grid, columns, backwards)
        return tokens


def make_blocks(config: MambaClassifierConfig, grid: tuple[int, int]) -> nn.ModuleList:
    """The blocks of a raster; one where they share weights."""
    return nn.ModuleList(Block(config, i, grid) for i in range(1 if config.shared else config.n_blocks))


class StemBlocks(nn.Module):
    """Blocks and a norm between the two convolutions of `ConvolutionTokens`: planes of a raster `grid` to the same."""

    def __init__(self, config: MambaClassifierConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        assert config.stem_channels is not None
        config = replace(config, d_model=config.stem_channels, n_blocks=config.stem_blocks)
        self.n_blocks, self.direction, self.grid, self.channels = (
            config.n_blocks,
            config.direction,
            grid,
            config.d_model,
        )
        self.blocks = make_blocks(config, grid)
        self.norm = make_norm(config.norm, config.d_model)

    @property
    def raster(self) -> Raster:
        """Its blocks, as a classifier has it at `tokens.between`."""
        return Raster(
            "tokens.between.", self.blocks, self.n_blocks, self.norm, self.grid, self.channels, self.direction
        )

    def forward(self, planes: Tensor) -> Tensor:
        """Map planes (batch, stem_channels, rows, columns) to the same shape."""
        tokens = self.raster.through(planes.flatten(2).transpose(1, 2).contiguous())
        rows, columns = self.grid
        # a cell a token: the kernel's norm, and its result in the order of planes
        fused = fused_cells(self.norm, tokens, self.grid, rows) if rows == columns else None
        normed = self.norm(tokens).transpose(1, 2) if fused is None else fused
        return normed.reshape(planes.shape)
