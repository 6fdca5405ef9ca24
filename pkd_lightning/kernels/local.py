"""A block's local convolution, forward and backward: tokens of a raster and their depthwise convolution, added.

The lanes of a vector are channels of a token. An image is first copied with zeros around it, so that no window ends.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

from typing import Any, NamedTuple

import torch
from numba import njit, types
from torch import Tensor

from pkd_lightning.kernels.lanes import (
    INLINE,
    WIDTH,
    ZERO,
    floats,
    fma,
    kernel,
    load,
    load_first,
    splat,
    store,
    store_first,
)
from pkd_lightning.kernels.memory import PLAIN, check_unchanged, kinds_of, real, refuse_second_derivative
from pkd_lightning.kernels.scan.states import fill
from pkd_lightning.kernels.threads import share_kernel, threads_for

WORTH = 8  # multiply-accumulates of a token's channel that take about as long as a state update
ABREAST = 4  # tokens of a row at a time: sums that do not wait for each other


class Sizes(NamedTuple):
    """Sizes; `side` of a window, `across` the channels as a multiple of the lanes."""

    batch: int
    rows: int
    columns: int
    channels: int
    side: int
    across: int


_SIZES = types.NamedUniTuple(types.int64, len(Sizes._fields), Sizes)


@njit(**INLINE)
def _stride(s):
    """Tokens from one row to the next, of an image with zeros around it."""
    return -(-s.columns // ABREAST) * ABREAST + s.side - 1


@njit(**INLINE)
def _padded(s):
    """Elements of an image with zeros around it."""
    return (s.rows + s.side - 1) * _stride(s) * s.across


@njit(**INLINE)
def _copy(s, source, image, to):
    """An image's tokens, into the middle of zeros."""
    half, stride = s.side // 2, _stride(s)
    for y in range(s.rows):
        for x in range(s.columns):
            at, place = ((image * s.rows + y) * s.columns + x) * s.channels, ((y + half) * stride + x + half) * s.across
            for v in range(0, s.channels, WIDTH):
                store(to, place + v, load_first(source, at + v, min(WIDTH, s.channels - v)))


@njit(**INLINE)
def _convolved(s, padded, w, bias, image, out, sign):
    """Write an image's tokens and their convolution. w: (side, side, across); sign -1: from its last weight on."""
    half, stride, window = s.side // 2, _stride(s), s.side * s.side
    for v in range(0, s.channels, WIDTH):
        count = min(WIDTH, s.channels - v)
        for y in range(s.rows):
            for x in range(0, s.columns, ABREAST):
                middle = ((y + half) * stride + x + half) * s.across + v
                start = load(bias, v)
                a, b = load(padded, middle) + start, load(padded, middle + s.across) + start
                c, d = load(padded, middle + 2 * s.across) + start, load(padded, middle + 3 * s.across) + start
                for i in range(s.side):
                    for j in range(s.side):
                        k = i * s.side + j
                        weight = load(w, (k if sign > 0 else window - 1 - k) * s.across + v)
                        at = ((y + i) * stride + x + j) * s.across + v
                        a = fma(weight, load(padded, at), a)
                        b = fma(weight, load(padded, at + s.across), b)
                        c = fma(weight, load(padded, at + 2 * s.across), c)
                        d = fma(weight, load(padded, at + 3 * s.across), d)
                to = ((image * s.rows + y) * s.columns + x) * s.channels + v
                store_first(out, to, a, count)
                if x + 1 < s.columns:
                    store_first(out, to + s.channels, b, count)
                if x + 2 < s.columns:
                    store_first(out, to + 2 * s.channels, c, count)
                if x + 3 < s.columns:
                    store_first(out, to + 3 * s.channels, d, count)


@njit(**INLINE)
def _spread_weights(s, weight, w):
    """Write `weight`, (channels, side, side), as (side, side, across)."""
    window = s.side * s.side
    for c in range(s.channels):
        for k in range(window):
            w[k * s.across + c] = weight[c * window + k]


@kernel(_SIZES, types.UniTuple(types.int64, 4), types.int64, types.int64, types.int64)
def _forward(s, memory, first, last, workspace):
    """Write tokens and their convolution, of the images [first, last). memory: tokens, weight, bias, result."""
    tokens, weight, bias, out = floats(memory[0]), floats(memory[1]), floats(memory[2]), floats(memory[3])
    padded, window = floats(workspace), s.side * s.side
    w, of_bias = padded[_padded(s) :], padded[_padded(s) + window * s.across :]
    fill(padded, 0, (_padded(s) + (window + 1) * s.across) // WIDTH, ZERO)
    _spread_weights(s, weight, w)
    for c in range(s.channels):
        of_bias[c] = bias[c]
    for image in range(first, last):
        _copy(s, tokens, image, padded)
        _convolved(s, padded, w, of_bias, image, out, 1)


@kernel(_SIZES, types.UniTuple(types.int64, 6), types.int64, types.int64, types.int64)
def _backward(s, memory, first, last, workspace):
    """Write the gradients of the tokens of the images [first, last), of weight and bias, summed over them.

    memory: the addresses of the gradient of the result, tokens, weight, and of the gradients.
    """
    grad_out, tokens, weight = floats(memory[0]), floats(memory[1]), floats(memory[2])
    dtokens, dweight, dbias = floats(memory[3]), floats(memory[4]), floats(memory[5])
    back, window, half = floats(workspace), s.side * s.side, s.side // 2
    stride = _stride(s)
    padded = back[_padded(s) :]
    w = padded[_padded(s) :]
    none, sums = w[window * s.across :], w[(window + 1) * s.across :]
    fill(back, 0, (2 * _padded(s) + 2 * (window + 1) * s.across) // WIDTH, ZERO)
    _spread_weights(s, weight, w)
    for image in range(first, last):
        _copy(s, grad_out, image, back)
        _convolved(s, back, w, none, image, dtokens, -1)
        _copy(s, tokens, image, padded)
        for v in range(0, s.channels, WIDTH):
            for i in range(s.side):
                for j in range(s.side):
                    a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
                    for y in range(s.rows):
                        for x in range(0, s.columns, ABREAST):
                            at = ((y + i) * stride + x + j) * s.across + v
                            by = ((y + half) * stride + x + half) * s.across + v
                            a = fma(load(back, by), load(padded, at), a)
                            b = fma(load(back, by + s.across), load(padded, at + s.across), b)
                            c = fma(load(back, by + 2 * s.across), load(padded, at + 2 * s.across), c)
                            d = fma(load(back, by + 3 * s.across), load(padded, at + 3 * s.across), d)
                    place = (i * s.side + j) * s.across + v
                    store(sums, place, load(sums, place) + ((a + b) + (c + d)))
            whole = splat(ZERO)
            for y in range(s.rows):
                for x in range(s.columns):
                    whole = whole + load(back, ((y + half) * stride + x + half) * s.across + v)
            store(sums, window * s.across + v, load(sums, window * s.across + v) + whole)
    for channel in range(s.channels):
        for k in range(window):
            dweight[channel * window + k] = sums[k * s.across + channel]
        dbias[channel] = sums[window * s.across + channel]


def _space(s: Sizes, images: int) -> int:
    row = -(-s.columns // ABREAST) * ABREAST + s.side - 1
    return images * ((s.rows + s.side - 1) * row + s.side**2 + 1) * s.across


def _threads(s: Sizes) -> int:
    return threads_for(s.batch, s.batch * s.rows * s.columns * s.across * s.side**2 // WORTH)


def _added(s: Sizes, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty_like(tokens)
    given = (tokens.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr())
    share_kernel(_forward, s, [given] * _threads(s), s.batch, _space(s, 1), (tokens, weight, bias, out))
    return out


class _Local(torch.autograd.Function):
    """On float32 contiguous tensors."""

    @staticmethod
    def forward(ctx: Any, s: Sizes, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.sizes, ctx.kinds = s, kinds_of((tokens, weight))
        ctx.save_for_backward(tokens, weight)
        return _added(s, tokens, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        tokens, weight = ctx.saved_tensors
        check_unchanged((tokens, weight), ctx.kinds)
        s, grad_out = ctx.sizes, real(grad_out).contiguous()
        threads, dtokens = _threads(s), torch.empty_like(tokens)
        dweight = weight.new_zeros(threads, *weight.shape)
        dbias = weight.new_zeros(threads, s.channels)
        read = (grad_out, tokens, weight, dtokens)
        given = [
            (*(x.data_ptr() for x in read), one.data_ptr(), other.data_ptr())
            for one, other in zip(dweight, dbias, strict=True)
        ]
        share_kernel(_backward, s, given, s.batch, _space(s, 2), (read, dweight, dbias))
        return None, dtokens, *(x[0] if threads == 1 else x.sum(0) for x in (dweight, dbias))


def local_cpu(tokens: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens and their depthwise convolution, zeros around the raster, added: of the shape of `tokens`.

    Args:
        tokens: (batch, rows * columns, channels) float32, row by row.
        weight: (channels, side, side), `side` odd.
        bias: (channels,).
        grid: (rows, columns).

    Raises:
        ValueError: a tensor has the wrong shape or dtype or is not on the CPU.
        TypeError: a tensor is of a subclass of Tensor.
    """
    given = (tokens, weight, bias)
    if any(type(x) not in PLAIN for x in given):
        raise TypeError("the kernels need a tensor's memory, which a subclass of Tensor need not have")
    if {(x.dtype, x.device.type) for x in given} != {(torch.float32, "cpu")}:
        raise ValueError("the local convolution is float32 on the CPU")
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{tuple(tokens.shape)} are no tokens of a raster of {grid[0]}x{grid[1]}")
    batch, _, channels = tokens.shape
    side = weight.shape[-1] if weight.ndim else 0
    if weight.shape != (channels, side, side) or side % 2 == 0 or bias.shape != (channels,):
        raise ValueError(
            f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)}: must be odd square windows of {channels} channels"
        )
    s = Sizes(batch, *grid, channels, side, -(-channels // WIDTH) * WIDTH)
    tokens, weight, bias = (real(x).contiguous() for x in given)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return _Local.apply(s, tokens, weight, bias)  # type: ignore[no-any-return]
    return _added(s, tokens, weight, bias)
