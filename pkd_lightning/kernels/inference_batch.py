"""`inference.infer` for batches: the 16 lanes of a vector are 16 images, so that no lane is empty.

The same plan, other weights: each block's are those of `scan.block`, whose steps it shares. Buffers are
[channel][token] of vectors; the sequence is walked in chunks of `CHUNK` tokens.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

from typing import NamedTuple

from numba import njit, types

from pkd_lightning.kernels import inference as k
from pkd_lightning.kernels.convolution import convolve, planes
from pkd_lightning.kernels.lanes import (
    INLINE,
    ONE,
    WIDE,
    WIDTH,
    ZERO,
    f32,
    floats,
    fma,
    integers,
    kernel,
    load,
    load_wide,
    root,
    sigmoid,
    splat,
    spread,
    store,
    transpose,
)
from pkd_lightning.kernels.scan.block import BLOCK, mix_chunk
from pkd_lightning.kernels.scan.dense import AT_ONCE, project
from pkd_lightning.kernels.scan.states import CHUNK, ROW, STATE_ROW, fill

# what the plan holds besides that of `inference`: places in the weights of a student, and of each block
STEM_AT, STEM_BIAS_AT, TOKENS_AT, TOKENS_BIAS_AT, LAST_NORM_AT, EPSILON_AT, HEAD_AT, HEAD_BIAS_AT, BETWEEN = range(9)
PLAN = 9
(
    NORM_AT, IN_AT, CONV_AT, CONV_BIAS_AT, MIX_AT, STEP_AT, STEP_BIAS_AT, A_AT, D_AT, OUT_AT, BLOCK_EPSILON_AT,
    LOCAL_AT, LOCAL_BIAS_AT,
) = range(13)  # fmt: skip
BLOCK_PLAN = 13


class Mixer(NamedTuple):
    """A block's sizes and places, by the names that `scan.block` has for them."""

    inner: int
    states: int
    even: int
    rank: int
    conv: int
    width: int
    conv_weight: int
    conv_bias: int
    x_proj: int
    dt_weight: int
    dt_bias: int
    D: int
    model: int
    out_proj: int


@njit(**INLINE)
def width(conv):
    """Steps of a chunk's row with the convolution's history, as a multiple of the steps of a projection."""
    return -(-(conv - 1 + CHUNK) // AT_ONCE) * AT_ONCE


@njit(**INLINE)
def _mixer(p, b, own):
    return Mixer(
        b[k.INNER], b[k.STATES], b[k.STATES] + b[k.STATES] % 2, b[k.RANK], b[k.CONV], width(b[k.CONV]), own[CONV_AT],
        own[CONV_BIAS_AT], own[MIX_AT], own[STEP_AT], own[STEP_BIAS_AT], own[D_AT],
        p[k.MODEL], own[OUT_AT],
    )  # fmt: skip


@njit(**INLINE)
def _pixel_tokens(p, own, w, planes, tokens):
    """See `inference._pixel_tokens`."""
    rows, columns, width = p[k.POOL_ROWS], p[k.POOL_COLUMNS], p[k.WIDTH_]
    parts = 1 if p[k.AVERAGE] else p[k.CHANNELS]
    summed = p[k.CHANNELS] if p[k.AVERAGE] else 1
    plane, length = p[k.HEIGHT] * width, p[k.ROWS] * p[k.COLUMNS]
    share = ONE / f32(summed * rows * columns)
    t = 0
    for c in range(parts):
        for y in range(0, p[k.HEIGHT], rows):
            for x in range(0, width, columns):
                value = splat(ZERO)
                for q in range(summed):
                    for j in range(rows):
                        at = (c + q) * plane + (y + j) * width + x
                        for i in range(at * WIDTH, (at + columns) * WIDTH, WIDTH):
                            value = value + load(planes, i)
                value = value * share
                for i in range(p[k.MODEL]):
                    weight, bias = spread(w, own[TOKENS_AT] + i), spread(w, own[TOKENS_BIAS_AT] + i)
                    store(tokens, (i * length + t) * WIDTH, fma(weight, value, bias))
                t += 1


@njit(**INLINE)
def _tokens(p, own, w, images, at, lanes, space, tokens):
    """16 images to their tokens, [d_model][length] of vectors, by rows of the raster."""
    planes(images, at, p[k.CHANNELS], p[k.HEIGHT], p[k.WIDTH_], p[k.PADDING], lanes, space)
    if not p[k.CONVOLUTIONS]:
        _pixel_tokens(p, own, w, space, tokens)
        return
    row = (p[k.WIDTH_] + 2 * p[k.PADDING]) * WIDTH
    plane = (p[k.HEIGHT] + 2 * p[k.PADDING]) * row
    to_by = (p[k.ROWS] * p[k.COLUMNS] * WIDTH, p[k.COLUMNS] * WIDTH)
    if p[k.CONVOLUTIONS] == 1:
        convolve(w, own[TOKENS_AT], own[TOKENS_BIAS_AT], p[k.CHANNELS], p[k.KERNEL], p[k.STRIDE], p[k.MODEL],
                     p[k.ROWS], p[k.COLUMNS], space, (plane, row), tokens, 0, to_by)  # fmt: skip
        return
    stem = space[p[k.CHANNELS] * plane + 4 * p[k.STRIDE] * WIDTH :]
    rim = p[k.PADDING_2]
    across = (p[k.STEM_COLUMNS] + 2 * rim) * WIDTH
    down = (p[k.STEM_ROWS] + 2 * rim) * across
    if rim:
        fill(stem, 0, p[k.STEM] * down // WIDTH, ZERO)
    begin = rim * across + rim * WIDTH
    if p[k.BETWEEN]:
        q, its = p[p[k.BETWEEN] :], own[own[BETWEEN] :]
        between = stem[p[k.STEM] * down + 4 * (p[k.STRIDE_2] + 1) * WIDTH :]
        length = p[k.STEM_ROWS] * p[k.STEM_COLUMNS] * WIDTH
        convolve(w, own[STEM_AT], own[STEM_BIAS_AT], p[k.CHANNELS], p[k.KERNEL], p[k.STRIDE], p[k.STEM],
                 p[k.STEM_ROWS], p[k.STEM_COLUMNS], space, (plane, row), between, 0,
                 (length, p[k.STEM_COLUMNS] * WIDTH))  # fmt: skip
        _blocks(q, its, w, between, between[p[k.STEM] * length :])
        for y in range(p[k.STEM_ROWS]):
            for x in range(0, p[k.STEM_COLUMNS] * WIDTH, WIDTH):
                _normalise(q[k.NORM], w, its[LAST_NORM_AT], w[its[EPSILON_AT]], p[k.STEM], between,
                           y * p[k.STEM_COLUMNS] * WIDTH + x, length, stem, begin + y * across + x, down)  # fmt: skip
    else:
        convolve(w, own[STEM_AT], own[STEM_BIAS_AT], p[k.CHANNELS], p[k.KERNEL], p[k.STRIDE], p[k.STEM],
                 p[k.STEM_ROWS], p[k.STEM_COLUMNS], space, (plane, row), stem, begin, (down, across))  # fmt: skip
        for i in range(0, p[k.STEM] * down, WIDE):  # the rim stays zero
            value = load_wide(stem, i)
            store(stem, i, value * sigmoid(value))
    convolve(w, own[TOKENS_AT], own[TOKENS_BIAS_AT], p[k.STEM], p[k.KERNEL_2], p[k.STRIDE_2], p[k.MODEL],
                 p[k.ROWS], p[k.COLUMNS], stem, (down, across), tokens, 0, to_by)  # fmt: skip


@njit(**INLINE)
def _normalise(kind, w, at, epsilon, channels, source, begin, by, to, to_begin, to_by):
    """One token of 16 images: see `inference._normalise`; at: the norm's weight, then its bias."""
    if kind == k.NO_NORM:
        for i in range(channels):
            store(to, to_begin + i * to_by, load(source, begin + i * by))
        return
    share = ONE / f32(channels)
    mean = splat(ZERO)
    if kind == k.LAYER:
        for i in range(channels):
            mean = mean + load(source, begin + i * by)
        mean = mean * share
    square = splat(ZERO)
    for i in range(channels):
        value = load(source, begin + i * by) - mean
        square = fma(value, value, square)
    scale = ONE / root(square * share + epsilon)
    for i in range(channels):
        value = (load(source, begin + i * by) - mean) * scale
        store(to, to_begin + i * to_by, fma(spread(w, at + i), value, spread(w, at + channels + i)))


@njit(**INLINE)
def _block(p, b, own, w, tokens, space):
    """One block on the tokens of 16 images."""
    s = _mixer(p, b, own)
    model, length, across, history = p[k.MODEL], p[k.ROWS] * p[k.COLUMNS], s.width * WIDTH, s.conv - 1
    row = s.inner * ROW
    h, at = space, s.inner * s.even * WIDTH
    xh = space[at:]
    at += s.inner * across
    x, z, dt, du = space[at:], space[at + row :], space[at + 2 * row :], space[at + 3 * row :]
    y, part = space[at + 4 * row :], space[at + 5 * row :]
    at += 6 * row
    raw, B, C = space[at:], space[at + s.rank * ROW :], space[at + s.rank * ROW + BLOCK * STATE_ROW :]
    at += s.rank * ROW + 2 * BLOCK * STATE_ROW
    read, a, now = space[at:], w[own[A_AT] :], xh[history * WIDTH :]
    fill(space, 0, s.inner * (s.even + s.width), ZERO)
    for start in range(0, length, CHUNK):
        steps = min(CHUNK, length - start)
        for t in range(steps):
            place = k.place(b, p[k.ROWS], p[k.COLUMNS], start + t) * WIDTH
            epsilon = w[own[BLOCK_EPSILON_AT]]
            _normalise(p[k.NORM], w, own[NORM_AT], epsilon, model, tokens, place, length * WIDTH, read, t * WIDTH, ROW)
        if start:
            for d in range(s.inner):
                for i in range(d * across, d * across + history * WIDTH, WIDTH):
                    store(xh, i, load(xh, i + ROW))
        project(w, own[IN_AT], model, 1, s.inner, model, read, ROW, now, across, steps, False)
        project(w, own[IN_AT] + s.inner * model, model, 1, s.inner, model, read, ROW, z, ROW, steps, False)
        mix_chunk(w, a, s, steps, xh, across, z, ROW, x, raw, dt, du, y, part, B, C, h, read)
        for t in range(steps):
            place = k.place(b, p[k.ROWS], p[k.COLUMNS], start + t) * WIDTH
            for i in range(model):
                value = load(read, i * ROW + t * WIDTH)
                if p[k.RESIDUAL]:
                    value = value + load(tokens, place)
                store(tokens, place, value)
                place += length * WIDTH


@njit(**INLINE)
def _local(p, b, own, w, tokens, space):
    """See `inference._local`."""
    rows, columns, side = p[k.ROWS], p[k.COLUMNS], b[k.LOCAL]
    half, plane = side // 2, rows * columns * WIDTH
    for i in range(p[k.MODEL]):
        begin, bias = i * plane, spread(w, own[LOCAL_BIAS_AT] + i)
        for r in range(rows):
            for c in range(columns):
                at = begin + (r * columns + c) * WIDTH
                value = load(tokens, at) + bias
                for y in range(max(0, half - r), min(side, rows + half - r)):
                    for x in range(max(0, half - c), min(side, columns + half - c)):
                        weight = spread(w, own[LOCAL_AT] + (i * side + y) * side + x)
                        value = fma(weight, load(tokens, at + ((y - half) * columns + x - half) * WIDTH), value)
                store(space, at - begin, value)
        for t in range(0, plane, WIDTH):
            store(tokens, begin + t, load(space, t))


@njit(**INLINE)
def _blocks(p, own, w, tokens, space):
    """All blocks of a plan, one after another."""
    for i in range(p[k.BLOCKS]):
        b, its = p[k.PLAN + i * k.BLOCK :], own[PLAN + i * BLOCK_PLAN :]
        if b[k.LOCAL]:
            _local(p, b, its, w, tokens, space)
        _block(p, b, its, w, tokens, space)


@njit(**INLINE)
def _head(p, own, w, tokens, classes, space):
    """The last norm, pooling, and the logits as a vector a class at the start of `space`."""
    channels, length = p[k.MODEL], p[k.ROWS] * p[k.COLUMNS]
    by, epsilon = length * WIDTH, w[own[EPSILON_AT]]
    for t in range(0, by, WIDTH):
        _normalise(p[k.NORM], w, own[LAST_NORM_AT], epsilon, channels, tokens, t, by, tokens, t, by)
    features = space[classes * WIDTH :]
    if p[k.HEAD] == k.FLATTEN:
        count = length * channels
        for t in range(length):
            for i in range(channels):
                store(features, (t * channels + i) * WIDTH, load(tokens, i * by + t * WIDTH))
    else:
        cells = 1 if p[k.HEAD] == k.MEAN else 2
        count = cells * cells * channels
        for a in range(cells):
            top, bottom = a * p[k.ROWS] // cells, -(-(a + 1) * p[k.ROWS] // cells)
            for b in range(cells):
                left, right = b * p[k.COLUMNS] // cells, -(-(b + 1) * p[k.COLUMNS] // cells)
                share = ONE / f32((bottom - top) * (right - left))
                for i in range(channels):
                    value = splat(ZERO)
                    for y in range(top, bottom):
                        for x in range(left, right):
                            value = value + load(tokens, i * by + (y * p[k.COLUMNS] + x) * WIDTH)
                    store(features, ((i * cells + a) * cells + b) * WIDTH, value * share)
    for o in range(classes):
        v0, v1 = spread(w, own[HEAD_BIAS_AT] + o), splat(ZERO)
        at = own[HEAD_AT] + o * count
        for i in range(0, count - 1, 2):
            v0 = fma(spread(w, at + i), load(features, i * WIDTH), v0)
            v1 = fma(spread(w, at + i + 1), load(features, (i + 1) * WIDTH), v1)
        if count % 2:
            v0 = fma(spread(w, at + count - 1), load(features, (count - 1) * WIDTH), v0)
        store(space, o * WIDTH, v0 + v1)


@kernel(types.UniTuple(types.int64, 6), types.int64, types.int64, types.int64, types.int64)
def infer_batch(memory, students, first, last, workspace):
    """`inference.infer` of the groups [first, last) of 16 images by the first `students` students.

    memory: as there, the table having two more entries a student, of its plan and weights for batches; and images.
    """
    table, images, logits = integers(memory[0]), floats(memory[1]), floats(memory[2])
    size, classes, batch = memory[3], memory[4], memory[5]
    prefix = floats(workspace)
    tokens = prefix[classes * WIDTH :]
    for group in range(first, last):
        lanes = min(WIDTH, batch - group * WIDTH)
        for student in range(students):
            row = k.ENTRIES * student
            p, scales = integers(table[row]), floats(table[row + 2])
            own, w = integers(table[row + 3]), floats(table[row + 4])
            space = tokens[p[k.ROWS] * p[k.COLUMNS] * p[k.MODEL] * WIDTH :]
            _tokens(p, own, w, images, group * WIDTH * size, lanes, space, tokens)
            _blocks(p, own, w, tokens, space)
            _head(p, own, w, tokens, classes, space)
            a, c = scales[0], scales[1]
            for o in range(0, classes * WIDTH, WIDTH):
                value = c * load(space, o)
                if student:
                    value = fma(a, load(prefix, o), value)
                store(prefix, o, value)
        for o in range(0, classes, WIDTH):
            count = min(WIDTH, classes - o)
            transpose(
                prefix, o * WIDTH, WIDTH, count, WIDTH, logits, group * WIDTH * classes + o, classes, lanes, count
            )
