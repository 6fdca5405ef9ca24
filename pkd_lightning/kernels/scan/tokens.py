"""The tokens of a block in memory and as rows of vectors, a lane a sequence: reading order and RMS norm."""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

import numpy as np
from numba import int64, njit

from pkd_lightning.kernels.lanes import (
    APART,
    INLINE,
    ONE,
    WIDTH,
    ZERO,
    f32,
    fma,
    load,
    root,
    splat,
    spread,
    store,
    transpose,
)
from pkd_lightning.kernels.scan.states import ROW, fill

EPS = np.finfo(np.float32).eps  # of nn.RMSNorm by default


@njit(**INLINE)
def _place(s, p):
    """Where in its sequence the token of step p lies: from the end where `backwards`, by columns where there are."""
    q = s.length - 1 - p if s.backwards else p
    if s.columns:
        q = q % s.rows * s.columns + q // s.rows
    return q


@njit(**APART)
def _tile(source, index, stride, rows, columns, to, to_index, to_stride, to_rows, to_columns):
    """`transpose` as a call: it is long, and needed several times."""
    transpose(source, index, stride, rows, columns, to, to_index, to_stride, to_rows, to_columns)


@njit(**APART)
def read(array, s, group, start, steps, to, width, history):
    """Tokens (batch, length, d_model) of one group of sequences into to[d_model][history + CHUNK][lane].

    The `history` steps before `start` come first; before the sequence and beyond the batch there are zeros.
    """
    lanes = min(WIDTH, s.batch - group * WIDTH)
    stride = s.length * s.model
    at = group * WIDTH * stride
    if s.model == 1 and not s.columns:
        for p in range(-history, steps, WIDTH):  # 16 steps at a time
            before = max(0, -(start + p))
            count = min(WIDTH, steps - p) - before
            row = (history + p) * WIDTH
            fill(to, row, before, ZERO)
            row += before * WIDTH
            begin, down = start + p + before, WIDTH
            if s.backwards:  # the other way round
                begin, row, down = s.length - begin - count, row + (count - 1) * WIDTH, -WIDTH
            _tile(array, at + begin, stride, lanes, count, to, row, down, count, int64(WIDTH))
        return
    for p in range(-history, steps):
        inside = start + p >= 0
        begin = at + (_place(s, start + p) * s.model if inside else 0)
        for i in range(0, s.model, WIDTH):  # 16 channels at a time
            count = min(WIDTH, s.model - i)
            row = i * width + (history + p) * WIDTH
            _tile(array, begin + i, stride, lanes, count if inside else 0, to, row, width, count, int64(WIDTH))


@njit(**INLINE)
def write(source, s, group, start, steps, array):
    """The reverse of `read`, without history: source[d_model][CHUNK][lane] to an array (batch, length, d_model)."""
    lanes = min(WIDTH, s.batch - group * WIDTH)
    stride = s.length * s.model
    at = group * WIDTH * stride
    if s.model == 1 and not s.columns:
        begin, row, down = start, 0, WIDTH
        if s.backwards:
            begin, row, down = s.length - start - steps, (steps - 1) * WIDTH, -WIDTH
        _tile(source, row, down, steps, int64(WIDTH), array, at + begin, stride, lanes, steps)
        return
    for t in range(steps):
        begin = at + _place(s, start + t) * s.model
        for i in range(0, s.model, WIDTH):
            count = min(WIDTH, s.model - i)
            row = i * ROW + t * WIDTH
            _tile(source, row, int64(ROW), count, int64(WIDTH), array, begin + i, stride, lanes, count)


@njit(**APART)
def normalise(w, s, vectors, seen, tok, scale):
    """Tok = seen * scale * weight with scale = 1 / sqrt(mean of seen^2 + EPS), for so many vectors of each row."""
    width = s.width * WIDTH
    inverse = f32(1.0) / f32(s.model)
    for t in range(0, vectors * WIDTH, WIDTH):
        square = splat(ZERO)
        for i in range(s.model):
            x = load(seen, i * width + t)
            square = fma(x, x, square)
        store(scale, t, ONE / root(square * inverse + EPS))
    for i in range(s.model):
        weight = spread(w, s.norm + i)
        for t in range(0, vectors * WIDTH, WIDTH):
            store(tok, i * width + t, load(seen, i * width + t) * load(scale, t) * weight)


@njit(**APART)
def normalise_backward(w, s, steps, sums, seen, scale, now, dtok, room):
    """From the gradient of tok to that of seen, in place; rows of seen and scale begin `now` before the chunk."""
    width = s.width * WIDTH
    inverse = f32(1.0) / f32(s.model)
    for t in range(0, steps * WIDTH, WIDTH):
        dot = splat(ZERO)
        for i in range(s.model):
            dot = fma(spread(w, s.norm + i) * load(dtok, i * ROW + t), load(seen, i * width + now + t), dot)
        r = load(scale, now + t)
        store(room, t, dot * inverse * r * r * r)
    for i in range(s.model):
        weight = spread(w, s.norm + i)
        sum_ = load(sums, (s.norm + i) * WIDTH)
        for t in range(0, steps * WIDTH, WIDTH):
            dy, x, r = load(dtok, i * ROW + t), load(seen, i * width + now + t), load(scale, now + t)
            sum_ = fma(dy * r, x, sum_)
            store(dtok, i * ROW + t, dy * r * weight - x * load(room, t))
        store(sums, (s.norm + i) * WIDTH, sum_)
