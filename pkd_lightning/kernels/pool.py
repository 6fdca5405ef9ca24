"""What a classifier's head reads of its tokens, forward and backward, fused: RMS norm, then averages over cells.

The lanes of a vector are channels of a token.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

from typing import Any, NamedTuple

import torch
from numba import njit, types
from torch import Tensor

from pkd_lightning.kernels.lanes import (
    INLINE,
    ONE,
    WIDTH,
    ZERO,
    f32,
    floats,
    fma,
    kernel,
    load,
    load_first,
    root,
    splat,
    store,
    store_first,
    total,
)
from pkd_lightning.kernels.memory import PLAIN, check_unchanged, kinds_of, real, refuse_second_derivative
from pkd_lightning.kernels.scan.states import fill
from pkd_lightning.kernels.threads import share_kernel, threads_for

EPSILON = f32(torch.finfo(torch.float32).eps)  # as torch's RMSNorm has it by default
WORTH = 64  # channels of a token that take about as long as a state update


class Sizes(NamedTuple):
    """Sizes; `normed` where there is a norm, `across` the channels as a multiple of the lanes."""

    batch: int
    rows: int
    columns: int
    channels: int
    cells: int
    normed: int
    across: int


_SIZES = types.NamedUniTuple(types.int64, len(Sizes._fields), Sizes)


@njit(**INLINE)
def _span(cell, cells, side):
    """The rows, or columns, of a cell, as torch's adaptive pooling has them: they may overlap.

    With the numbers of cells and of rows exchanged: the cells that a row is in.
    """
    return cell * side // cells, -(-(cell + 1) * side // cells)


@njit(**INLINE)
def _count(s, v):
    return min(WIDTH, s.channels - v)


@kernel(_SIZES, types.UniTuple(types.int64, 4), types.int64, types.int64, types.int64)
def _forward(s, memory, first, last, workspace):
    """Write averages (batch, channels * cells * cells) of the samples [first, last), and the norm's scales of tokens.

    memory: the addresses of tokens, the norm's weight, averages, and scales (batch, length).
    """
    tokens, weight, out, scales = floats(memory[0]), floats(memory[1]), floats(memory[2]), floats(memory[3])
    length, squares, each = s.rows * s.columns, s.cells * s.cells, floats(workspace)
    for i in range(first, last):
        at = i * length * s.channels
        for t in range(length if s.normed else 0):
            square = splat(ZERO)
            for v in range(0, s.channels, WIDTH):
                value = load_first(tokens, at + t * s.channels + v, _count(s, v))
                square = fma(value, value, square)
            store(each, 0, ONE / root(splat(total(square)) / f32(s.channels) + EPSILON))
            scales[i * length + t] = each[0]
        for a in range(s.cells):
            top, bottom = _span(a, s.cells, s.rows)
            for b in range(s.cells):
                left, right = _span(b, s.cells, s.columns)
                part = ONE / f32((bottom - top) * (right - left))
                for v in range(0, s.channels, WIDTH):
                    sum_, count = splat(ZERO), _count(s, v)
                    for y in range(top, bottom):
                        for t in range(y * s.columns + left, y * s.columns + right):
                            value = load_first(tokens, at + t * s.channels + v, count)
                            if s.normed:
                                value = value * scales[i * length + t]
                            sum_ = sum_ + value
                    store(each, 0, sum_ * part)
                    for c in range(count):
                        value = each[c] * weight[v + c] if s.normed else each[c]
                        out[(i * s.channels + v + c) * squares + a * s.cells + b] = value


@kernel(_SIZES, types.UniTuple(types.int64, 6), types.int64, types.int64, types.int64)
def _backward(s, memory, first, last, workspace):
    """Write the gradients of the tokens of the samples [first, last), and of the norm's weight, summed over them.

    memory: the addresses of the gradient of the averages, tokens, the norm's weight, scales, and of the gradients.
    """
    grad_out, tokens, weight = floats(memory[0]), floats(memory[1]), floats(memory[2])
    scales, dtokens, dw = floats(memory[3]), floats(memory[4]), floats(memory[5])
    of_cells, length, squares = floats(workspace), s.rows * s.columns, s.cells * s.cells
    sums, inner, w = (
        of_cells[squares * s.across :],
        of_cells[(squares + 1) * s.across :],
        of_cells[(squares + 2) * s.across :],
    )
    fill(of_cells, 0, (squares + 3) * s.across // WIDTH, ZERO)
    for c in range(s.channels):
        w[c] = weight[c] if s.normed else ONE
    for i in range(first, last):
        for a in range(s.cells):
            top, bottom = _span(a, s.cells, s.rows)
            for b in range(s.cells):
                left, right = _span(b, s.cells, s.columns)
                part, cell = ONE / f32((bottom - top) * (right - left)), a * s.cells + b
                for c in range(s.channels):
                    of_cells[cell * s.across + c] = grad_out[(i * s.channels + c) * squares + cell] * part
        for y in range(s.rows):
            above, below = _span(y, s.rows, s.cells)  # of the cells that have this row
            for x in range(s.columns):
                t = i * length + y * s.columns + x
                before, after = _span(x, s.columns, s.cells)
                scale, dot = scales[t] if s.normed else ONE, splat(ZERO)
                for v in range(0, s.channels, WIDTH):
                    value, token = splat(ZERO), load_first(tokens, t * s.channels + v, _count(s, v))
                    for a in range(above, below):
                        for b in range(before, after):
                            value = value + load(of_cells, (a * s.cells + b) * s.across + v)
                    store(sums, v, fma(value * scale, token, load(sums, v)))
                    value = value * load(w, v)
                    store(inner, v, value)
                    dot = fma(value, token, dot)
                back = total(dot) * scale * scale * scale / f32(s.channels) if s.normed else ZERO
                for v in range(0, s.channels, WIDTH):
                    count = _count(s, v)
                    token = load_first(tokens, t * s.channels + v, count)
                    store_first(dtokens, t * s.channels + v, load(inner, v) * scale - token * back, count)
    for c in range(s.channels if s.normed else 0):
        dw[c] = sums[c]


def _space(s: Sizes) -> int:
    return (s.cells**2 + 3) * s.across + WIDTH


def _threads(s: Sizes) -> int:
    return threads_for(s.batch, s.batch * s.rows * s.columns * s.across // WORTH)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _averages(s: Sizes, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    out = tokens.new_empty(s.batch, s.channels * s.cells**2)
    scales = tokens.new_empty(s.batch, s.rows * s.columns if s.normed else 0)
    given = (tokens.data_ptr(), _address(weight), out.data_ptr(), scales.data_ptr())
    share_kernel(_forward, s, [given] * _threads(s), s.batch, _space(s), (tokens, weight, out, scales))
    return out, scales


class _Pool(torch.autograd.Function):
    """On float32 contiguous tensors."""

    @staticmethod
    def forward(ctx: Any, s: Sizes, tokens: Tensor, weight: Tensor | None) -> Tensor:
        out, scales = _averages(s, tokens, weight)
        ctx.sizes, ctx.kinds = s, kinds_of((tokens, weight))
        ctx.save_for_backward(tokens, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        tokens, weight, scales = ctx.saved_tensors
        check_unchanged((tokens, weight), ctx.kinds)
        s, grad_out = ctx.sizes, real(grad_out).contiguous()
        dtokens, dw = torch.empty_like(tokens), tokens.new_zeros(_threads(s), s.channels)
        read = (grad_out, tokens, weight, scales, dtokens)
        given = [(*map(_address, read), part.data_ptr()) for part in dw]
        share_kernel(_backward, s, given, s.batch, _space(s), (read, dw))
        return None, dtokens, None if weight is None else dw[0] if len(dw) == 1 else dw.sum(0)


def pool_cpu(tokens: Tensor, weight: Tensor | None, grid: tuple[int, int], cells: int) -> Tensor:
    """RMS norm of each token, then adaptive average pooling: (batch, channels * cells * cells), as
    `adaptive_avg_pool2d(planes, cells).flatten(1)` gives it.

    Args:
        tokens: (batch, rows * columns, channels) float32, row by row.
        weight: (channels,) of the norm, as `torch.nn.RMSNorm` computes it by default; None: there is no norm.
        grid: (rows, columns).
        cells: on each side.

    Raises:
        ValueError: a tensor has the wrong shape or dtype or is not on the CPU.
        TypeError: a tensor is of a subclass of Tensor.
    """
    given = [x for x in (tokens, weight) if x is not None]
    if any(type(x) not in PLAIN for x in given):
        raise TypeError("the kernels need a tensor's memory, which a subclass of Tensor need not have")
    if {(x.dtype, x.device.type) for x in given} != {(torch.float32, "cpu")}:
        raise ValueError("pooling is float32 on the CPU")
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1] or not 1 <= cells <= min(grid):
        raise ValueError(
            f"{tuple(tokens.shape)} are no tokens of a raster of {grid[0]}x{grid[1]} in {cells}x{cells} cells"
        )
    if weight is not None and weight.shape != tokens.shape[2:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected {tuple(tokens.shape[2:])}")
    batch, _, channels = tokens.shape
    s = Sizes(batch, *grid, channels, cells, int(weight is not None), -(-channels // WIDTH) * WIDTH)
    tokens, weight = real(tokens).contiguous(), None if weight is None else real(weight).contiguous()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (tokens, weight)):
        return _Pool.apply(s, tokens, weight)  # type: ignore[no-any-return]
    return _averages(s, tokens, weight)[0]
