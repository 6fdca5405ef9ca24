"""Two convolutions with SiLU between them, forward and backward, fused: what makes tokens of a batch of small images.

The 16 lanes of a vector are 16 images. The backward pass starts from what the first convolution gave, before SiLU.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numba import njit, types
from torch import Tensor

from pkd_lightning.kernels.convolution import convolve, convolve_back, convolve_weights, planes
from pkd_lightning.kernels.lanes import (
    INLINE,
    ONE,
    WIDE,
    WIDTH,
    ZERO,
    floats,
    kernel,
    load,
    load_wide,
    sigmoid,
    store,
    store_first,
    total_of_each,
    transpose,
)
from pkd_lightning.kernels.memory import PLAIN, check_unchanged, kinds_of, real, refuse_second_derivative
from pkd_lightning.kernels.scan.states import fill
from pkd_lightning.kernels.threads import share_kernel, threads_for


class Sizes(NamedTuple):
    """Sizes of the images, of both convolutions, and where the weights and the working memory of a group begin."""

    batch: int
    channels: int
    height: int
    width: int
    stem: int
    size: int
    stride: int
    padding: int
    rows: int
    columns: int
    model: int
    size_2: int
    stride_2: int
    padding_2: int
    rows_2: int
    columns_2: int
    # in the flat weights
    bias: int
    project: int
    bias_2: int
    weights: int
    between: int  # elements between the convolutions of a group, with what is read and written past their end
    # in the working memory, which begins with the images
    after: int
    tokens: int
    gradient: int
    sums: int
    end: int


_SIZES = types.NamedUniTuple(types.int64, len(Sizes._fields), Sizes)


@njit(**INLINE)
def _by(s):
    """Strides of (channel, row) of the images, of what is between the convolutions, and of the tokens."""
    row, across = (s.width + 2 * s.padding) * WIDTH, (s.columns + 2 * s.padding_2) * WIDTH
    of_images = (s.height + 2 * s.padding) * row, row
    between = (s.rows + 2 * s.padding_2) * across, across
    return of_images, between, (s.rows_2 * s.columns_2 * WIDTH, s.columns_2 * WIDTH)


@njit(**INLINE)
def _activate(s, before, at, after):
    """SiLU of what lies between the convolutions, from `at` on; the rim stays zero."""
    for i in range(0, s.between, WIDE):
        value = load_wide(before, at + i)
        store(after, i, value * sigmoid(value))


@kernel(_SIZES, types.UniTuple(types.int64, 4), types.int64, types.int64, types.int64)
def _forward(s, memory, first, last, workspace):
    """Write tokens (batch, length, d_model) of the groups [first, last) of 16 images, and `saved`.

    memory: the addresses of the flat weights, images, tokens and saved; the last is 0 where nothing is to be saved.

    saved: what the first convolution gives, in a rim of zeros, (groups, between).
    """
    w, images, out, space = floats(memory[0]), floats(memory[1]), floats(memory[2]), floats(workspace)
    after, tokens = space[s.after :], space[s.tokens :]
    before = floats(memory[3]) if memory[3] else after
    length, size, (of_images, between, by) = s.rows_2 * s.columns_2, s.channels * s.height * s.width, _by(s)
    for group in range(first, last):
        lanes, at = min(WIDTH, s.batch - group * WIDTH), group * s.between if memory[3] else 0
        planes(images, group * WIDTH * size, s.channels, s.height, s.width, s.padding, lanes, space)
        fill(before, at, s.between // WIDTH, ZERO)
        convolve(w, 0, s.bias, s.channels, s.size, s.stride, s.stem, s.rows, s.columns, space, of_images, before,
                 at + s.padding_2 * (between[1] + WIDTH), between)  # fmt: skip
        _activate(s, before, at, after)
        convolve(w, s.project, s.bias_2, s.stem, s.size_2, s.stride_2, s.model, s.rows_2, s.columns_2, after, between,
                 tokens, 0, by)  # fmt: skip
        for t in range(length):
            for d in range(0, s.model, WIDTH):
                count = min(WIDTH, s.model - d)
                to = (group * WIDTH * length + t) * s.model + d
                transpose(tokens, (d * length + t) * WIDTH, length * WIDTH, count, WIDTH, out, to, length * s.model,
                          lanes, count)  # fmt: skip


@njit(**INLINE)
def _add_bias(sums, begin, outputs, rows, columns, g, at, by):
    """The gradient of a bias, a sum per lane: sums[begin + o] += g, over all positions."""
    for o in range(outputs):
        value = load(sums, (begin + o) * WIDTH)
        for r in range(rows):
            from_ = at + o * by[0] + r * by[1]
            for i in range(from_, from_ + columns * WIDTH, WIDTH):
                value = value + load(g, i)
        store(sums, (begin + o) * WIDTH, value)


@kernel(_SIZES, types.UniTuple(types.int64, 5), types.int64, types.int64, types.int64)
def _backward(s, memory, first, last, workspace):
    """Write the gradient of the flat weights, summed over the groups [first, last).

    memory: the addresses of the flat weights, images, saved, the gradient of the tokens, and that of the weights.
    """
    w, images, before, grad_out = floats(memory[0]), floats(memory[1]), floats(memory[2]), floats(memory[3])
    dw, space = floats(memory[4]), floats(workspace)
    after, g, gradient, sums = space[s.after :], space[s.tokens :], space[s.gradient :], space[s.sums :]
    length, size, (of_images, between, by) = s.rows_2 * s.columns_2, s.channels * s.height * s.width, _by(s)
    inside = s.padding_2 * (between[1] + WIDTH)
    fill(sums, 0, s.weights, ZERO)
    for group in range(first, last):
        lanes, at = min(WIDTH, s.batch - group * WIDTH), group * s.between
        _activate(s, before, at, after)
        for t in range(length):
            for d in range(0, s.model, WIDTH):
                count = min(WIDTH, s.model - d)
                from_ = (group * WIDTH * length + t) * s.model + d
                transpose(grad_out, from_, length * s.model, lanes, count, g, (d * length + t) * WIDTH, length * WIDTH,
                          count, WIDTH)  # fmt: skip
        _add_bias(sums, s.bias_2, s.model, s.rows_2, s.columns_2, g, 0, by)
        convolve_weights(sums, s.project, s.stem, s.size_2, s.stride_2, s.model, s.rows_2, s.columns_2, after, between,
                         g, 0, by)  # fmt: skip
        fill(gradient, 0, s.between // WIDTH, ZERO)
        convolve_back(w, s.project, s.stem, s.size_2, s.stride_2, s.model, s.rows_2, s.columns_2, g, by, gradient,
                      between)  # fmt: skip
        for i in range(0, s.between, WIDE):
            value = load_wide(before, at + i)
            gate = sigmoid(value)
            store(gradient, i, load_wide(gradient, i) * (gate * (ONE + value * (ONE - gate))))
        _add_bias(sums, s.bias, s.stem, s.rows, s.columns, gradient, inside, between)
        planes(images, group * WIDTH * size, s.channels, s.height, s.width, s.padding, lanes, space)
        convolve_weights(sums, 0, s.channels, s.size, s.stride, s.stem, s.rows, s.columns, space, of_images, gradient,
                         inside, between)  # fmt: skip
    for i in range(0, s.weights, WIDTH):
        store_first(dw, i, total_of_each(sums, i * WIDTH, WIDTH), s.weights - i)


def _sizes(images: Tensor, stem: Tensor, project: Tensor, strides: tuple[int, int], paddings: tuple[int, int]) -> Sizes:
    batch, channels, height, width = images.shape
    (outer, _, size, _), (model, _, size_2, _) = stem.shape, project.shape
    rows, columns = ((side + 2 * paddings[0] - size) // strides[0] + 1 for side in (height, width))
    rows_2, columns_2 = ((side + 2 * paddings[1] - size_2) // strides[1] + 1 for side in (rows, columns))
    bias = stem.numel()
    at_project, bias_2 = bias + outer, bias + outer + project.numel()
    weights = bias_2 + model
    beyond = 4 * max(strides) * WIDTH  # what the kernels read past the end of each part
    between = outer * (rows + 2 * paddings[1]) * (columns + 2 * paddings[1]) * WIDTH + beyond
    between = -(-between // WIDE) * WIDE
    after = channels * (height + 2 * paddings[0]) * (width + 2 * paddings[0]) * WIDTH + beyond
    gradient = after + between + model * rows_2 * columns_2 * WIDTH + beyond
    return Sizes(
        *(batch, channels, height, width, outer, size, strides[0], paddings[0], rows, columns),
        *(model, size_2, strides[1], paddings[1], rows_2, columns_2, bias, at_project, bias_2, weights),
        *(
            between,
            after,
            after + between,
            gradient,
            gradient + between,
            gradient + between + (weights + WIDTH) * WIDTH,
        ),
    )


def _groups(s: Sizes) -> int:
    return -(-s.batch // WIDTH)


def _threads(s: Sizes) -> int:
    first, second = s.channels * s.size**2 * s.rows * s.columns, s.size_2**2 * s.rows_2 * s.columns_2 * s.model
    # a state update takes about as long as eight products
    return threads_for(_groups(s), s.batch * s.stem * (first + second) // 8)


def _tokens(s: Sizes, images: Tensor, weights: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor | None]:
    """The tokens, and with `keep` what the backward pass starts from."""
    flat, out = torch.cat([x.flatten() for x in weights]), images.new_empty(s.batch, s.rows_2 * s.columns_2, s.model)
    saved = images.new_empty(_groups(s), s.between) if keep else None
    given = (flat.data_ptr(), images.data_ptr(), out.data_ptr(), 0 if saved is None else saved.data_ptr())
    share_kernel(_forward, s, [given] * _threads(s), _groups(s), s.gradient, (images, flat, out, saved))
    return out, saved


class _Stem(torch.autograd.Function):
    """On float32 contiguous tensors."""

    @staticmethod
    def forward(ctx: Any, s: Sizes, images: Tensor, *weights: Tensor) -> Tensor:
        ctx.sizes, ctx.kinds = s, kinds_of((images, *weights))
        out, saved = _tokens(s, images, weights, keep=True)
        ctx.save_for_backward(saved, images, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        saved, images, *weights = ctx.saved_tensors
        check_unchanged((images, *weights), ctx.kinds)
        s, grad_out, flat = ctx.sizes, real(grad_out).contiguous(), torch.cat([x.flatten() for x in weights])
        dw = images.new_zeros(_threads(s), s.weights)
        read = (flat, images, saved, grad_out)
        given = [(*(x.data_ptr() for x in read), part.data_ptr()) for part in dw]
        share_kernel(_backward, s, given, _groups(s), s.end, (read, dw))
        parts = (dw[0] if len(dw) == 1 else dw.sum(0)).split([x.numel() for x in weights])
        return None, None, *(part.view(x.shape) for part, x in zip(parts, weights, strict=True))


def stem_cpu(
    images: Tensor,
    stem: tuple[Tensor, Tensor],
    project: tuple[Tensor, Tensor],
    strides: tuple[int, int],
    paddings: tuple[int, int],
) -> Tensor:
    """Tokens (batch, rows * columns, d_model) of images (batch, channels, height, width), which get no gradient.

    Args:
        images: float32.
        stem: weight (stem channels, channels, k, k) and bias of the first convolution.
        project: weight (d_model, stem channels, k, k) and bias of the second, on SiLU of what the first gives.
        strides: of both.
        paddings: zeros on each side, of both.

    Raises:
        ValueError: a tensor has the wrong shape or dtype, is not on the CPU, or images require a gradient.
        TypeError: a tensor is of a subclass of Tensor.
    """
    given = (images, *stem, *project)
    if any(type(x) not in PLAIN for x in given):
        raise TypeError("the kernels need a tensor's memory, which a subclass of Tensor need not have")
    if {(x.dtype, x.device.type) for x in given} != {(torch.float32, "cpu")} or images.requires_grad:
        raise ValueError("the stem is float32 on the CPU, of images without gradients")
    square = all(x.ndim == 4 and x.shape[2] == x.shape[3] for x in (stem[0], project[0]))
    fits = images.ndim == 4 and square and stem[0].shape[1] == images.shape[1] and project[0].shape[1] == len(stem[0])
    if not fits or any(bias.shape != weight.shape[:1] for weight, bias in (stem, project)):
        raise ValueError(f"shapes do not go together: {', '.join(str(tuple(x.shape)) for x in given)}")
    images, *weights = (real(x).contiguous() for x in given)
    s = _sizes(images, weights[0], weights[2], strides, paddings)
    if min(s.rows, s.columns, s.rows_2, s.columns_2) < 1:
        raise ValueError(f"images of {s.height}x{s.width} are smaller than the kernels")
    if torch.is_grad_enabled() and any(x.requires_grad for x in weights):
        return _Stem.apply(s, images, *weights)  # type: ignore[no-any-return]
    return _tokens(s, images, weights, keep=False)[0]
