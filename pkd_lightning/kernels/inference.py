"""A whole Mamba classifier on the CPU in one call, for inference: images to logits, no graph, no saved states.

One image at a time. The 16 lanes of a vector are 16 channels of a token, or 16 states of a channel in the scan where
the states fill the lanes better. A row of a buffer is one token, its channels padded to whole vectors; the weights are
packed with rows of zeros to match, see `pkd_lightning.compiled`. The sequence is walked in chunks of `STEPS` tokens,
whose intermediates stay in the cache next to the core.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

import math

from numba import njit, types

from pkd_lightning.kernels.lanes import (
    INLINE,
    ONE,
    WIDTH,
    ZERO,
    exp2,
    f32,
    first,
    floats,
    fma,
    integers,
    kernel,
    load,
    sigmoid,
    softplus,
    splat,
    spread,
    store,
    store_first,
    total,
    total_of_each,
)
from pkd_lightning.kernels.scan.states import fill

STEPS = 64  # tokens of a chunk
AT_ONCE = 4  # rows of a product worked on together; buffers have room for as many beyond their rows

# What a student's plan holds, as integers. Names that end in _AT are places in its weights, in elements; DEPTH, INNER_V
# and the like are counts of vectors. BETWEEN is where in the plan another one begins, of the blocks between the two
# convolutions, or 0: of that one only sizes of the raster and of the tokens, norms, blocks and RESIDUAL are read.
(
    CHANNELS, HEIGHT, WIDTH_, AVERAGE, POOL_ROWS, POOL_COLUMNS, CONVOLUTIONS, PADDING, KERNEL, STRIDE, STEM, STEM_V,
    STEM_ROWS, STEM_COLUMNS, STEM_AT, STEM_BIAS_AT, PADDING_2, KERNEL_2, STRIDE_2, TOKENS_AT, TOKENS_BIAS_AT, ROWS,
    COLUMNS, MODEL, MODEL_V, NORM, RESIDUAL, BLOCKS, LAST_NORM_AT, HEAD, CLASSES_V, HEAD_AT, HEAD_BIAS_AT, EPSILON_AT,
    BETWEEN,
) = range(35)  # fmt: skip
PLAN = 35
# and what follows for each block
(
    BY_COLUMNS, BACKWARDS, NORM_AT, INNER, INNER_V, STATES, STATES_V, RANK, CONV, OVER_STATES, ROW_V, B_PLACE, C_PLACE,
    X_AT, Z_AT, CONV_AT, CONV_BIAS_AT, MIX_AT, STEP_AT, STEP_BIAS_AT, A_AT, D_AT, OUT_AT, ZEROS_AT, BLOCK_EPSILON_AT,
    LOCAL, LOCAL_AT, LOCAL_BIAS_AT,
) = range(28)  # fmt: skip
BLOCK = 28
ENTRIES = 5  # of a student in the table
NO_NORM, RMS, LAYER = range(3)
FLATTEN, MEAN, GRID = range(3)


@njit(**INLINE)
def _linear(w, weights, bias, inputs, outputs, source, begin, row, to, to_begin, to_row, steps):
    """to[t] = bias + the sum over i of source[t][i] * weights[i], for rows of `outputs` vectors.

    Works on `AT_ONCE` rows at a time, beyond `steps` too.
    """
    whole = outputs * WIDTH
    for t in range(0, steps, AT_ONCE):
        o = 0
        while o + WIDTH < whole:  # two vectors at once
            v0 = load(w, bias + o)
            v1, v2, v3 = v0, v0, v0
            u0 = load(w, bias + o + WIDTH)
            u1, u2, u3 = u0, u0, u0
            from_, at = begin + t * row, weights + o
            for _ in range(inputs):
                weight, other = load(w, at), load(w, at + WIDTH)
                x0, x1 = spread(source, from_), spread(source, from_ + row)
                x2, x3 = spread(source, from_ + 2 * row), spread(source, from_ + 3 * row)
                v0, v1, v2, v3 = fma(weight, x0, v0), fma(weight, x1, v1), fma(weight, x2, v2), fma(weight, x3, v3)
                u0, u1, u2, u3 = fma(other, x0, u0), fma(other, x1, u1), fma(other, x2, u2), fma(other, x3, u3)
                from_ += 1
                at += whole
            at = to_begin + t * to_row + o
            store(to, at, v0)
            store(to, at + WIDTH, u0)
            store(to, at + to_row, v1)
            store(to, at + to_row + WIDTH, u1)
            store(to, at + 2 * to_row, v2)
            store(to, at + 2 * to_row + WIDTH, u2)
            store(to, at + 3 * to_row, v3)
            store(to, at + 3 * to_row + WIDTH, u3)
            o += 2 * WIDTH
        if o < whole:
            v0 = load(w, bias + o)
            v1, v2, v3 = v0, v0, v0
            from_, at = begin + t * row, weights + o
            for _ in range(inputs):
                weight = load(w, at)
                v0 = fma(weight, spread(source, from_), v0)
                v1 = fma(weight, spread(source, from_ + row), v1)
                v2 = fma(weight, spread(source, from_ + 2 * row), v2)
                v3 = fma(weight, spread(source, from_ + 3 * row), v3)
                from_ += 1
                at += whole
            at = to_begin + t * to_row + o
            store(to, at, v0)
            store(to, at + to_row, v1)
            store(to, at + 2 * to_row, v2)
            store(to, at + 3 * to_row, v3)


@njit(**INLINE)
def _convolve(w, weights, bias, channels, size, stride, outputs, rows, columns, source, by, to, begin, to_by, active):
    """A convolution of source, (channel, row, column) at the strides `by`, to rows of `outputs` vectors a position.

    to_by: strides of to's (row, column). active: SiLU follows.
    """
    by_channel, by_row, by_column = by
    next_ = stride * by_column
    for r in range(rows):
        for c in range(0, columns, AT_ONCE):
            left = columns - c
            for o in range(0, outputs * WIDTH, WIDTH):
                v0 = load(w, bias + o)
                v1, v2, v3 = v0, v0, v0
                at = weights + o
                for y in range(size):
                    for x in range(size):
                        from_ = (r * stride + y) * by_row + (c * stride + x) * by_column
                        for _ in range(channels):
                            weight = load(w, at)
                            v0 = fma(weight, spread(source, from_), v0)
                            v1 = fma(weight, spread(source, from_ + next_), v1)
                            v2 = fma(weight, spread(source, from_ + 2 * next_), v2)
                            v3 = fma(weight, spread(source, from_ + 3 * next_), v3)
                            from_ += by_channel
                            at += outputs * WIDTH
                if active:
                    v0, v1, v2, v3 = v0 * sigmoid(v0), v1 * sigmoid(v1), v2 * sigmoid(v2), v3 * sigmoid(v3)
                at = begin + r * to_by[0] + c * to_by[1] + o
                store(to, at, v0)
                if left > 1:
                    store(to, at + to_by[1], v1)
                if left > 2:
                    store(to, at + 2 * to_by[1], v2)
                if left > 3:
                    store(to, at + 3 * to_by[1], v3)


@njit(**INLINE)
def _pad(image, at, channels, height, width, padding, planes):
    """The image at `at` of (N, channels, height, width), each plane with a rim of zeros."""
    row = width + 2 * padding
    plane = (height + 2 * padding) * row
    if padding:
        fill(planes, 0, -(-channels * plane // WIDTH), ZERO)
    for c in range(channels):
        for y in range(height):
            to = c * plane + (y + padding) * row + padding
            for x in range(width):
                planes[to + x] = image[at + x]
            at += width


@njit(**INLINE)
def _pixel_tokens(p, w, image, at, tokens):
    """Averages of the image's blocks, and of its channels where asked for, each embedded as one token."""
    rows, columns = p[POOL_ROWS], p[POOL_COLUMNS]
    planes = 1 if p[AVERAGE] else p[CHANNELS]
    summed = p[CHANNELS] if p[AVERAGE] else 1
    plane, model = p[HEIGHT] * p[WIDTH_], p[MODEL_V] * WIDTH
    share = ONE / f32(summed * rows * columns)
    to = 0
    for c in range(planes):
        for y in range(0, p[HEIGHT], rows):
            for x in range(0, p[WIDTH_], columns):
                value = ZERO
                for k in range(summed):
                    for j in range(rows):
                        for i in range(columns):
                            value += image[at + (c + k) * plane + (y + j) * p[WIDTH_] + x + i]
                value = value * share
                for o in range(0, model, WIDTH):
                    store(tokens, to + o, fma(splat(value), load(w, p[TOKENS_AT] + o), load(w, p[TOKENS_BIAS_AT] + o)))
                to += model


@njit(**INLINE)
def _tokens(p, w, image, at, space, tokens):
    """An image to its tokens, by rows of the raster."""
    if not p[CONVOLUTIONS]:
        _pixel_tokens(p, w, image, at, tokens)
        return
    row = p[WIDTH_] + 2 * p[PADDING]
    plane = (p[HEIGHT] + 2 * p[PADDING]) * row
    model = p[MODEL_V] * WIDTH
    _pad(image, at, p[CHANNELS], p[HEIGHT], p[WIDTH_], p[PADDING], space)
    by, to_by = (plane, row, 1), (p[COLUMNS] * model, model)
    if p[CONVOLUTIONS] == 1:
        _convolve(w, p[TOKENS_AT], p[TOKENS_BIAS_AT], p[CHANNELS], p[KERNEL], p[STRIDE], p[MODEL_V], p[ROWS],
                  p[COLUMNS], space, by, tokens, 0, to_by, False)  # fmt: skip
        return
    stem = space[((p[CHANNELS] * plane + AT_ONCE * p[STRIDE]) // WIDTH + 1) * WIDTH :]
    channels, rim = p[STEM_V] * WIDTH, p[PADDING_2]
    row = (p[STEM_COLUMNS] + 2 * rim) * channels
    if rim:
        fill(stem, 0, (p[STEM_ROWS] + 2 * rim) * row // WIDTH, ZERO)
    begin = rim * row + rim * channels
    if p[BETWEEN]:
        q, across = p[p[BETWEEN] :], p[STEM_COLUMNS] * channels
        between = stem[(p[STEM_ROWS] + 2 * rim) * row + AT_ONCE * p[STRIDE_2] * channels :]
        _convolve(w, p[STEM_AT], p[STEM_BIAS_AT], p[CHANNELS], p[KERNEL], p[STRIDE], p[STEM_V], p[STEM_ROWS],
                  p[STEM_COLUMNS], space, by, between, 0, (across, channels), False)  # fmt: skip
        _blocks(q, w, between, between[p[STEM_ROWS] * across :])
        for y in range(p[STEM_ROWS]):
            for x in range(0, across, channels):
                _normalise(q[NORM], w, q[LAST_NORM_AT], w[q[EPSILON_AT]], between, y * across + x, p[STEM], p[STEM_V],
                           stem, begin + y * row + x)  # fmt: skip
    else:
        _convolve(w, p[STEM_AT], p[STEM_BIAS_AT], p[CHANNELS], p[KERNEL], p[STRIDE], p[STEM_V], p[STEM_ROWS],
                  p[STEM_COLUMNS], space, by, stem, begin, (row, channels), True)  # fmt: skip
    _convolve(w, p[TOKENS_AT], p[TOKENS_BIAS_AT], p[STEM], p[KERNEL_2], p[STRIDE_2], p[MODEL_V], p[ROWS],
              p[COLUMNS], stem, (1, row, channels), tokens, 0, to_by, False)  # fmt: skip


@njit(**INLINE)
def _normalise(kind, w, at, epsilon, source, begin, channels, vectors, to, to_begin):
    """One token's `channels`, in `vectors` vectors: their norm, or themselves. at: its weight, then its bias."""
    if kind == NO_NORM:
        for v in range(0, vectors * WIDTH, WIDTH):
            store(to, to_begin + v, load(source, begin + v))
        return
    mean = ZERO
    if kind == LAYER:
        sums = splat(ZERO)
        for v in range(0, vectors * WIDTH, WIDTH):
            sums = sums + load(source, begin + v)
        mean = total(sums) / f32(channels)
    squares = splat(ZERO)
    for v in range(0, vectors * WIDTH, WIDTH):
        value = load(source, begin + v) - mean
        if channels - v < WIDTH:
            value = first(value, channels - v)
        squares = fma(value, value, squares)
    scale = ONE / f32(math.sqrt(total(squares) / f32(channels) + epsilon))
    for v in range(0, vectors * WIDTH, WIDTH):
        value = (load(source, begin + v) - mean) * scale
        store(to, to_begin + v, fma(value, load(w, at + v), load(w, at + vectors * WIDTH + v)))


@njit(**INLINE)
def place(b, rows, columns, t):
    """Which token of the raster is read as the t-th."""
    length = rows * columns
    if b[BACKWARDS]:
        t = length - 1 - t
    if b[BY_COLUMNS]:
        return t % rows * columns + t // rows
    return t


@njit(**INLINE)
def _scan_channels(b, w, steps, dt, du, y, mixed, h):
    """A lane is a channel: h <- 2^(dt * a) * h + du * B and y += h * C, two states at a time."""
    inner, row = b[INNER_V] * WIDTH, b[ROW_V] * WIDTH
    for v in range(0, inner, WIDTH):
        for n in range(0, b[STATES], 2):
            both = n + 1 < b[STATES]
            at = n * inner + v
            next_ = at + inner if both else at
            a0, a1 = load(w, b[A_AT] + at), load(w, b[A_AT] + next_)
            h0, h1 = load(h, at), load(h, next_)
            B, C, place = b[B_PLACE] + n, b[C_PLACE] + n, v
            if both:
                for _ in range(steps):
                    dt_t, du_t = load(dt, place), load(du, place)
                    h0 = fma(exp2(dt_t * a0), h0, du_t * spread(mixed, B))
                    h1 = fma(exp2(dt_t * a1), h1, du_t * spread(mixed, B + 1))
                    y_t = fma(h0, spread(mixed, C), load(y, place))
                    store(y, place, fma(h1, spread(mixed, C + 1), y_t))
                    place += inner
                    B += row
                    C += row
                store(h, next_, h1)
            else:
                for _ in range(steps):
                    h0 = fma(exp2(load(dt, place) * a0), h0, load(du, place) * spread(mixed, B))
                    store(y, place, fma(h0, spread(mixed, C), load(y, place)))
                    place += inner
                    B += row
                    C += row
            store(h, at, h0)


@njit(**INLINE)
def _scan_states(b, w, steps, dt, du, y, mixed, h, sums):
    """A lane is a state: the same, one channel after another; the sum over the states is one over the lanes."""
    inner, row, states = b[INNER_V] * WIDTH, b[ROW_V] * WIDTH, b[STATES_V] * WIDTH
    for d in range(b[INNER]):
        fill(sums, 0, steps, ZERO)
        for n in range(0, states, WIDTH):
            at = d * states + n
            a, h0 = load(w, b[A_AT] + at), load(h, at)
            B, C, place = b[B_PLACE] + n, b[C_PLACE] + n, d
            for t in range(0, steps * WIDTH, WIDTH):
                h0 = fma(exp2(spread(dt, place) * a), h0, spread(du, place) * load(mixed, B))
                store(sums, t, fma(h0, load(mixed, C), load(sums, t)))
                place += inner
                B += row
                C += row
            store(h, at, h0)
        for t in range(0, steps, WIDTH):
            store(sums, t * WIDTH, total_of_each(sums, t * WIDTH, WIDTH))
            for i in range(min(WIDTH, steps - t)):
                y[(t + i) * inner + d] += sums[t * WIDTH + i]


@njit(**INLINE)
def _chunk(p, b, w, tokens, start, steps, space):
    """One block on `steps` tokens of the sequence from `start` on.

    `space` begins with the states before them, and the convolution's inputs before them.
    """
    model, inner, history = p[MODEL_V] * WIDTH, b[INNER_V] * WIDTH, b[CONV] - 1
    rows = STEPS + AT_ONCE
    states = b[INNER] * b[STATES_V] * WIDTH if b[OVER_STATES] else b[STATES] * inner
    h = space[:states]
    xh = space[states:]
    at = states + (rows + history) * inner
    x, z, dt = space[at:], space[at + rows * inner :], space[at + 2 * rows * inner :]
    du, y = space[at + 3 * rows * inner :], space[at + 4 * rows * inner :]
    at += 5 * rows * inner
    read = space[at:]
    mixed = space[at + rows * model :]
    sums = space[at + rows * (model + b[ROW_V] * WIDTH) :]
    for t in range(steps):
        at = place(b, p[ROWS], p[COLUMNS], start + t) * model
        _normalise(p[NORM], w, b[NORM_AT], w[b[BLOCK_EPSILON_AT]], tokens, at, p[MODEL], p[MODEL_V], read, t * model)
    _linear(w, b[X_AT], b[ZEROS_AT], p[MODEL], b[INNER_V], read, 0, model, xh, history * inner, inner, steps)
    _linear(w, b[Z_AT], b[ZEROS_AT], p[MODEL], b[INNER_V], read, 0, model, z, 0, inner, steps)
    for v in range(0, inner, WIDTH):
        bias = load(w, b[CONV_BIAS_AT] + v)
        for t in range(v, v + steps * inner, inner):
            value = bias
            for k in range(b[CONV]):
                value = fma(load(w, b[CONV_AT] + k * inner + v), load(xh, t + k * inner), value)
            store(x, t, value * sigmoid(value))
    row = b[ROW_V] * WIDTH
    _linear(w, b[MIX_AT], b[ZEROS_AT], b[INNER], b[ROW_V], x, 0, inner, mixed, 0, row, steps)
    _linear(w, b[STEP_AT], b[STEP_BIAS_AT], b[RANK], b[INNER_V], mixed, 0, row, dt, 0, inner, steps)
    for v in range(0, inner, WIDTH):
        skip = load(w, b[D_AT] + v)
        for t in range(v, v + steps * inner, inner):
            x_t = load(x, t)
            dt_t = softplus(load(dt, t))
            store(dt, t, dt_t)
            store(du, t, dt_t * x_t)
            store(y, t, skip * x_t)
    if b[OVER_STATES]:
        _scan_states(b, w, steps, dt, du, y, mixed, h, sums)
    else:
        _scan_channels(b, w, steps, dt, du, y, mixed, h)
    for t in range(0, steps * inner, WIDTH):
        z_t = load(z, t)
        store(y, t, load(y, t) * z_t * sigmoid(z_t))
    _linear(w, b[OUT_AT], b[ZEROS_AT], b[INNER], p[MODEL_V], y, 0, inner, read, 0, model, steps)
    for t in range(steps):
        at = place(b, p[ROWS], p[COLUMNS], start + t) * model
        for v in range(0, model, WIDTH):
            value = load(read, t * model + v)
            store(tokens, at + v, load(tokens, at + v) + value if p[RESIDUAL] else value)
    for t in range(0, history * inner, WIDTH):
        store(xh, t, load(xh, steps * inner + t))


@njit(**INLINE)
def _local(p, b, w, tokens, space):
    """Add to the tokens a depthwise convolution over their raster, whose rim is zeros."""
    rows, columns, model, side = p[ROWS], p[COLUMNS], p[MODEL_V] * WIDTH, b[LOCAL]
    half = side // 2
    for r in range(rows):
        for c in range(columns):
            at = (r * columns + c) * model
            for v in range(0, model, WIDTH):
                value = load(tokens, at + v) + load(w, b[LOCAL_BIAS_AT] + v)
                for y in range(max(0, half - r), min(side, rows + half - r)):
                    for x in range(max(0, half - c), min(side, columns + half - c)):
                        near = ((r + y - half) * columns + c + x - half) * model
                        weight = load(w, b[LOCAL_AT] + (y * side + x) * model + v)
                        value = fma(weight, load(tokens, near + v), value)
                store(space, at + v, value)
    for i in range(0, rows * columns * model, WIDTH):
        store(tokens, i, load(space, i))


@njit(**INLINE)
def _blocks(p, w, tokens, space):
    """All blocks of a plan, one after another."""
    length = p[ROWS] * p[COLUMNS]
    for i in range(p[BLOCKS]):
        b = p[PLAN + i * BLOCK :]
        if b[LOCAL]:
            _local(p, b, w, tokens, space)
        inner = b[INNER_V] * WIDTH
        states = b[INNER] * b[STATES_V] * WIDTH if b[OVER_STATES] else b[STATES] * inner
        fill(space, 0, (states + (b[CONV] - 1) * inner) // WIDTH, ZERO)
        for start in range(0, length, STEPS):
            _chunk(p, b, w, tokens, start, min(STEPS, length - start), space)


@njit(**INLINE)
def _head(p, w, tokens, space):
    """The last norm, pooling, and the logits as vectors at the start of `space`."""
    model, length, channels = p[MODEL_V] * WIDTH, p[ROWS] * p[COLUMNS], p[MODEL]
    classes = p[CLASSES_V] * WIDTH
    features = space[classes * AT_ONCE :]
    for t in range(length):
        _normalise(
            p[NORM], w, p[LAST_NORM_AT], w[p[EPSILON_AT]], tokens, t * model, channels, p[MODEL_V], tokens, t * model
        )
    if p[HEAD] == FLATTEN:
        count = length * channels
        for t in range(length):
            for i in range(channels):
                features[t * channels + i] = tokens[t * model + i]
    else:
        cells = 1 if p[HEAD] == MEAN else 2
        count = cells * cells * channels
        for i in range(count):
            features[i] = ZERO
        for a in range(cells):
            top, bottom = a * p[ROWS] // cells, -(-(a + 1) * p[ROWS] // cells)
            for b in range(cells):
                left, right = b * p[COLUMNS] // cells, -(-(b + 1) * p[COLUMNS] // cells)
                for y in range(top, bottom):
                    for x in range(left, right):
                        for i in range(channels):
                            features[(i * cells + a) * cells + b] += tokens[(y * p[COLUMNS] + x) * model + i]
                share = ONE / f32((bottom - top) * (right - left))
                for i in range(channels):
                    features[(i * cells + a) * cells + b] *= share
    # four sums, of every fourth feature each: one would wait for itself
    quarter = -(-count // AT_ONCE)
    for i in range(count, quarter * AT_ONCE):
        features[i] = ZERO
    for o in range(0, classes, WIDTH):
        v0 = load(w, p[HEAD_BIAS_AT] + o)
        v1 = v2 = v3 = splat(ZERO)
        at = p[HEAD_AT] + o
        for i in range(0, quarter * AT_ONCE, AT_ONCE):
            v0 = fma(load(w, at), spread(features, i), v0)
            v1 = fma(load(w, at + classes), spread(features, i + 1), v1)
            v2 = fma(load(w, at + 2 * classes), spread(features, i + 2), v2)
            v3 = fma(load(w, at + 3 * classes), spread(features, i + 3), v3)
            at += AT_ONCE * classes
        store(space, o, (v0 + v1) + (v2 + v3))


@njit(**INLINE)
def _student(p, w, image, at, tokens, space):
    """The logits of one image as vectors at the start of `space`."""
    _tokens(p, w, image, at, space, tokens)
    _blocks(p, w, tokens, space)
    _head(p, w, tokens, space)


@kernel(types.UniTuple(types.int64, 5), types.int64, types.int64, types.int64, types.int64)
def infer(memory, students, first, last, workspace):
    """Write the logits of the images [first, last) by the first `students` students of an ensemble.

    memory: the addresses of the students' table (`ENTRIES` each: plan, weights, the two scales, and those of
    `inference_batch`), of the images (N, C, H, W), and of the logits (N, classes); elements of an image; and classes.
    """
    table, images, logits = integers(memory[0]), floats(memory[1]), floats(memory[2])
    size, classes = memory[3], memory[4]
    prefix = floats(workspace)
    tokens = prefix[classes * WIDTH :]
    for image in range(first, last):
        for student in range(students):
            row = ENTRIES * student
            p, w, scales = integers(table[row]), floats(table[row + 1]), floats(table[row + 2])
            space = tokens[p[ROWS] * p[COLUMNS] * p[MODEL_V] * WIDTH :]
            _student(p, w, images, image * size, tokens, space)
            a, c = scales[0], scales[1]
            for o in range(0, classes, WIDTH):
                value = c * load(space, o)
                store(prefix, o, fma(a, load(prefix, o), value) if student else value)
        for o in range(0, classes, WIDTH):
            store_first(logits, image * classes + o, load(prefix, o), min(WIDTH, classes - o))
