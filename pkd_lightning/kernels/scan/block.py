"""A whole Mamba block on the CPU, forward and backward, fused: for blocks of few channels, where each of PyTorch's
operations around the scan costs more than the scan itself.

The 16 lanes of a vector are 16 sequences of the batch, so every step of the block (projections, convolution, softplus,
scan, gate) is plain arithmetic on vectors, without sums across lanes and for any number of states. The sequence is
walked in chunks of `CHUNK` steps whose intermediates stay in the cache. B and C, linear in the channels of a step, are
computed when they are needed, two states at a time: they, their gradients and the states never exist as a whole. The
backward pass starts each chunk from its saved first state and computes everything else again.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

import itertools
import math
from typing import Any, NamedTuple

import torch
from numba import njit, types
from torch import Tensor

from pkd_lightning.kernels.lanes import (
    INLINE,
    LN2,
    LOG2E,
    ONE,
    WIDTH,
    ZERO,
    floats,
    fma,
    kernel,
    load,
    sigmoid,
    softplus,
    splat,
    store,
    total,
    transpose,
)
from pkd_lightning.kernels.memory import PLAIN, check_unchanged, kinds_of, real, refuse_second_derivative
from pkd_lightning.kernels.scan.states import CHUNK, ROW, STATE_ROW, SUMMED, fill, fold, scan_pair, scan_pair_backward
from pkd_lightning.kernels.threads import share, threads_for

AT_ONCE = 4  # steps of a projection worked on together


class Sizes(NamedTuple):
    """Of a block, and where each weight begins in the flat vector of all.

    Attributes:
        groups: groups of 16 sequences.
        chunks: chunks of a sequence.
        even: states rounded up to an even number.
        width: steps of a chunk's row with the convolution's history, a multiple of `AT_ONCE`.
    """

    batch: int
    length: int
    model: int
    inner: int
    states: int
    rank: int
    conv: int
    groups: int
    chunks: int
    even: int
    width: int
    in_proj: int
    conv_weight: int
    conv_bias: int
    x_proj: int
    dt_weight: int
    dt_bias: int
    A_log: int
    D: int
    out_proj: int
    weights: int


class Weights(NamedTuple):
    """Their addresses, each contiguous."""

    in_proj: int
    conv_weight: int
    conv_bias: int
    x_proj: int
    dt_weight: int
    dt_bias: int
    A_log: int
    D: int
    out_proj: int


FIRST = Sizes._fields.index("in_proj")

_SIZES = types.NamedUniTuple(types.int64, len(Sizes._fields), Sizes)
_WEIGHTS = types.NamedUniTuple(types.int64, len(Weights._fields), Weights)


@njit(**INLINE)
def _project(w, begin, by_output, by_input, outputs, inputs, source, source_row, to, to_row, steps):
    """to[o] = the sum over i of w[begin + o * by_output + i * by_input] * source[i], rows of `steps` vectors.

    Works on `AT_ONCE` steps at a time, beyond `steps` too.
    """
    for o in range(outputs):
        for t in range(0, steps * WIDTH, AT_ONCE * WIDTH):
            v0 = v1 = v2 = v3 = splat(ZERO)
            for i in range(inputs):
                weight = splat(w[begin + o * by_output + i * by_input])
                at = i * source_row + t
                v0 = fma(weight, load(source, at), v0)
                v1 = fma(weight, load(source, at + WIDTH), v1)
                v2 = fma(weight, load(source, at + 2 * WIDTH), v2)
                v3 = fma(weight, load(source, at + 3 * WIDTH), v3)
            at = o * to_row + t
            store(to, at, v0)
            store(to, at + WIDTH, v1)
            store(to, at + 2 * WIDTH, v2)
            store(to, at + 3 * WIDTH, v3)


@njit(**INLINE)
def _outer(sums, begin, by_a, by_b, a_rows, b_rows, a, a_begin, a_row, b, b_begin, b_row, steps):
    """sums[begin + i * by_a + j * by_b] += a[i] * b[j], summed over the steps of a chunk; a sum per lane."""
    for i in range(a_rows):
        j = 0
        while j + 4 <= b_rows:
            at = (begin + i * by_a + j * by_b) * WIDTH
            next_ = by_b * WIDTH
            v0, v1, v2, v3 = (
                load(sums, at),
                load(sums, at + next_),
                load(sums, at + 2 * next_),
                load(sums, at + 3 * next_),
            )
            for t in range(0, steps * WIDTH, WIDTH):
                a_t = load(a, a_begin + i * a_row + t)
                b_at = b_begin + j * b_row + t
                v0 = fma(a_t, load(b, b_at), v0)
                v1 = fma(a_t, load(b, b_at + b_row), v1)
                v2 = fma(a_t, load(b, b_at + 2 * b_row), v2)
                v3 = fma(a_t, load(b, b_at + 3 * b_row), v3)
            store(sums, at, v0)
            store(sums, at + next_, v1)
            store(sums, at + 2 * next_, v2)
            store(sums, at + 3 * next_, v3)
            j += 4
        while j < b_rows:
            at = (begin + i * by_a + j * by_b) * WIDTH
            value = load(sums, at)
            for t in range(0, steps * WIDTH, WIDTH):
                value = fma(load(a, a_begin + i * a_row + t), load(b, b_begin + j * b_row + t), value)
            store(sums, at, value)
            j += 1


@njit(**INLINE)
def _read(rows, s, group, start, steps, to, width, history):
    """Tokens (batch, length, d_model) of one group of sequences into to[d_model][history + CHUNK][lane].

    The `history` steps before `start` come first; before the sequence and beyond the batch there are zeros.
    """
    lanes = min(WIDTH, s.batch - group * WIDTH)
    stride = s.length * s.model
    width = width * WIDTH
    at = (group * WIDTH * s.length + start) * s.model
    if s.model == 1:
        for p in range(-history, steps, WIDTH):  # 16 steps at a time
            before = max(0, -(start + p))
            columns = min(WIDTH, steps - p) - before
            row = (history + p) * WIDTH
            fill(to, row, before, ZERO)
            row += before * WIDTH
            transpose(rows, at + p + before, stride, lanes, columns, to, row, WIDTH, columns, WIDTH)
        return
    for p in range(-history, steps):
        for i in range(0, s.model, WIDTH):  # 16 channels at a time
            columns = min(WIDTH, s.model - i)
            readable = columns if start + p >= 0 else 0
            row = i * width + (history + p) * WIDTH
            transpose(rows, at + p * s.model + i, stride, lanes, readable, to, row, width, columns, WIDTH)


@njit(**INLINE)
def _write(source, s, group, start, steps, rows):
    """The reverse of `_read`, without history: source[d_model][CHUNK][lane] to rows (batch, length, d_model)."""
    lanes = min(WIDTH, s.batch - group * WIDTH)
    stride = s.length * s.model
    at = (group * WIDTH * s.length + start) * s.model
    if s.model == 1:
        transpose(source, 0, WIDTH, steps, WIDTH, rows, at, stride, lanes, steps)
        return
    for t in range(steps):
        for i in range(0, s.model, WIDTH):
            columns = min(WIDTH, s.model - i)
            row = i * ROW + t * WIDTH
            transpose(source, row, ROW, columns, WIDTH, rows, at + t * s.model + i, stride, lanes, columns)


@njit(**INLINE)
def _prepare(w, s, steps, tok, xh, c, x, z, raw, delta, dt, du, y, part):
    """Everything before the scan for one chunk: in_proj, convolution, SiLU, step sizes; y and part set to zero.

    xh: (d_inner, history + CHUNK) before the convolution, c after it, x after SiLU, z before it; raw: (rank, CHUNK)
    before dt_proj, delta after it, dt after softplus; du = dt * x.
    """
    history = s.conv - 1
    width = s.width
    row = width * WIDTH
    _project(w, s.in_proj, s.model, 1, s.inner, s.model, tok, row, xh, row, history + steps)
    z_weights = s.in_proj + s.inner * s.model
    _project(w, z_weights, s.model, 1, s.inner, s.model, tok[history * WIDTH :], row, z, ROW, steps)
    for d in range(s.inner):
        for t in range(steps):
            value = splat(w[s.conv_bias + d])
            for k in range(s.conv):
                value = fma(w[s.conv_weight + d * s.conv + k], load(xh, (d * width + t + k) * WIDTH), value)
            store(c, d * ROW + t * WIDTH, value)
            store(x, d * ROW + t * WIDTH, value * sigmoid(value))
    _project(w, s.x_proj, s.inner, 1, s.rank, s.inner, x, ROW, raw, ROW, steps)
    _project(w, s.dt_weight, s.rank, 1, s.inner, s.rank, raw, ROW, delta, ROW, steps)
    for d in range(s.inner):
        for t in range(steps):
            value = load(delta, d * ROW + t * WIDTH) + w[s.dt_bias + d]
            store(delta, d * ROW + t * WIDTH, value)
            value = softplus(value)
            store(dt, d * ROW + t * WIDTH, value)
            store(du, d * ROW + t * WIDTH, value * load(x, d * ROW + t * WIDTH))
            store(y, d * ROW + t * WIDTH, splat(ZERO))
            store(part, d * ROW + t * WIDTH, splat(ZERO))


@njit(**INLINE)
def _input_output(bc, s, n, steps, x, B, C):
    """B and C of the states n and n + 1 for one chunk, each [2][CHUNK][lane]. bc: their rows of x_proj."""
    b = 2 * n * s.inner
    for t in range(0, steps * WIDTH, WIDTH):
        B0 = C0 = B1 = C1 = splat(ZERO)
        for d in range(s.inner):
            x_t = load(x, d * ROW + t)
            B0 = fma(bc[b + d], x_t, B0)
            C0 = fma(bc[b + s.inner + d], x_t, C0)
            B1 = fma(bc[b + 2 * s.inner + d], x_t, B1)
            C1 = fma(bc[b + 3 * s.inner + d], x_t, C1)
        store(B, t, B0)
        store(C, t, C0)
        store(B, STATE_ROW + t, B1)
        store(C, STATE_ROW + t, C1)


@njit(**INLINE)
def _parameters(p, s, w, a, bc):
    """Fill w, all weights one after another; a, A * log2(e) (d_inner, even); bc, x_proj's B and C (even, 2, d_inner).

    The rows that `even` adds to the states are zero and change nothing.
    """
    for i in range(len(p)):
        source = floats(p[i])
        for j in range(s[FIRST + i], s[FIRST + i + 1]):
            w[j] = source[j - s[FIRST + i]]
    for n in range(s.even):
        inside = n < s.states
        for d in range(s.inner):
            a[d * s.even + n] = -LOG2E * math.exp(w[s.A_log + d * s.states + n]) if inside else ZERO
            b = s.x_proj + (s.rank + n) * s.inner + d
            bc[2 * n * s.inner + d] = w[b] if inside else ZERO
            bc[(2 * n + 1) * s.inner + d] = w[b + s.states * s.inner] if inside else ZERO


@njit(**INLINE)
def _split(space, s):
    """The parts of the workspace that both passes use."""
    width = s.width * WIDTH
    at = (s.weights + WIDTH) // WIDTH * WIDTH
    w = space[:at]
    a = space[at : at + s.inner * s.even]
    at += (s.inner * s.even + WIDTH) // WIDTH * WIDTH
    bc = space[at : at + 2 * s.inner * s.even]
    at += (2 * s.inner * s.even + WIDTH) // WIDTH * WIDTH
    h = space[at : at + s.inner * s.even * WIDTH]
    at += s.inner * s.even * WIDTH
    tok = space[at : at + s.model * width]
    at += s.model * width
    xh = space[at : at + s.inner * width]
    at += s.inner * width
    channels = s.inner * ROW
    c = space[at : at + channels]
    x = space[at + channels : at + 2 * channels]
    z = space[at + 2 * channels : at + 3 * channels]
    delta = space[at + 3 * channels : at + 4 * channels]
    dt = space[at + 4 * channels : at + 5 * channels]
    du = space[at + 5 * channels : at + 6 * channels]
    y = space[at + 6 * channels : at + 7 * channels]
    part = space[at + 7 * channels : at + 8 * channels]
    at += 8 * channels
    raw = space[at : at + s.rank * ROW]
    at += s.rank * ROW
    B = space[at : at + 2 * STATE_ROW]
    C = space[at + 2 * STATE_ROW : at + 4 * STATE_ROW]
    at += 4 * STATE_ROW
    return (w, a, bc, h, tok, xh, c, x, z, delta, dt, du, y, part, raw, B, C), space[at:]


@kernel(_SIZES, _WEIGHTS, types.UniTuple(types.int64, 3), types.int64, types.int64, types.int64)
def _forward(s, p, memory, first, last, workspace):
    """Write out (batch, length, d_model) of the groups [first, last) of 16 sequences, and `saved`.

    memory: the addresses of tokens, out and saved; the last is 0 where nothing is to be saved.

    saved: the states at the start of each chunk, (groups, chunks, d_inner, even, 16).
    """
    tokens, out, saved, space = floats(memory[0]), floats(memory[1]), floats(memory[2]), floats(workspace)
    (w, a, bc, h, tok, xh, c, x, z, delta, dt, du, y, part, raw, B, C), rest = _split(space, s)
    state = s.inner * s.even * WIDTH
    mixed = rest[: s.model * ROW]
    _parameters(p, s, w, a, bc)
    for group in range(first, last):
        fill(h, 0, s.inner * s.even, ZERO)
        for chunk in range(s.chunks):
            start = chunk * CHUNK
            steps = min(CHUNK, s.length - start)
            _read(tokens, s, group, start, steps, tok, s.width, s.conv - 1)
            _prepare(w, s, steps, tok, xh, c, x, z, raw, delta, dt, du, y, part)
            if memory[2]:
                at = (group * s.chunks + chunk) * state
                for i in range(0, state, WIDTH):
                    store(saved, at + i, load(h, i))
            for n in range(0, s.even, 2):
                _input_output(bc, s, n, steps, x, B, C)
                for d in range(s.inner):
                    at = (d * s.even + n) * WIDTH
                    a0, a1 = splat(a[d * s.even + n]), splat(a[d * s.even + n + 1])
                    h0, h1 = load(h, at), load(h, at + WIDTH)
                    h0, h1 = scan_pair(steps, n + 1 < s.states, dt, du, part, d * ROW, B, C, 0, a0, a1, h0, h1)
                    store(h, at, h0)
                    store(h, at + WIDTH, h1)
                if (n + 2) % SUMMED == 0 or n + 2 == s.even:
                    fold(part, y, 0, s.inner * CHUNK)
            for d in range(s.inner):
                for t in range(d * ROW, d * ROW + steps * WIDTH, WIDTH):
                    z_t = load(z, t)
                    store(y, t, fma(w[s.D + d], load(x, t), load(y, t)) * z_t * sigmoid(z_t))
            _project(w, s.out_proj, s.inner, 1, s.model, s.inner, y, ROW, mixed, ROW, steps)
            _write(mixed, s, group, start, steps, out)


@njit(**INLINE)
def _gate_backward(w, s, steps, sums, x, y, z, g, dy, dz):
    """The gate, the skip and out_proj: dz comes in as the gradient of the gated y, y leaves as that."""
    for d in range(s.inner):
        dD = load(sums, (s.D + d) * WIDTH)
        for t in range(d * ROW, d * ROW + steps * WIDTH, WIDTH):
            z_t = load(z, t)
            gate = sigmoid(z_t)
            y_t = fma(w[s.D + d], load(x, t), load(y, t))
            store(y, t, y_t * z_t * gate)
            store(dz, t, load(dz, t) * y_t * gate * fma(z_t, ONE - gate, splat(ONE)))
            dD = fma(load(dy, t), load(x, t), dD)
        store(sums, (s.D + d) * WIDTH, dD)
    _outer(sums, s.out_proj, s.inner, 1, s.model, s.inner, g, 0, ROW, y, 0, ROW, steps)


@njit(**INLINE)
def _steps_backward(w, s, steps, sums, x, dt, delta, raw, dy, ddu, ddt, dx, draw):
    """The step sizes, from softplus back to x: ddt leaves as the gradient of delta."""
    for d in range(s.inner):
        dbias = load(sums, (s.dt_bias + d) * WIDTH)
        for t in range(d * ROW, d * ROW + steps * WIDTH, WIDTH):
            ddu_t = load(ddu, t)
            value = fma(load(x, t), ddu_t, LN2 * load(ddt, t)) * sigmoid(load(delta, t))
            store(ddt, t, value)  # of delta now
            dbias = dbias + value
            store(dx, t, fma(w[s.D + d], load(dy, t), fma(load(dt, t), ddu_t, load(dx, t))))
        store(sums, (s.dt_bias + d) * WIDTH, dbias)
    _outer(sums, s.dt_weight, s.rank, 1, s.inner, s.rank, ddt, 0, ROW, raw, 0, ROW, steps)
    _project(w, s.dt_weight, 1, s.rank, s.rank, s.inner, ddt, ROW, draw, ROW, steps)
    _outer(sums, s.x_proj, s.inner, 1, s.rank, s.inner, draw, 0, ROW, x, 0, ROW, steps)


@njit(**INLINE)
def _convolution_backward(w, s, steps, sums, c, xh, draw, dx, dxh):
    """SiLU and the convolution: dx leaves as the gradient of c, dxh is added to."""
    width = s.width * WIDTH
    for d in range(s.inner):
        dbias = load(sums, (s.conv_bias + d) * WIDTH)
        for t in range(0, steps * WIDTH, WIDTH):
            value = load(dx, d * ROW + t)
            for q in range(s.rank):
                value = fma(w[s.x_proj + q * s.inner + d], load(draw, q * ROW + t), value)
            c_t = load(c, d * ROW + t)
            gate = sigmoid(c_t)
            value = value * gate * fma(c_t, ONE - gate, splat(ONE))
            store(dx, d * ROW + t, value)  # of c now
            dbias = dbias + value
            for k in range(s.conv):
                p = d * width + t + k * WIDTH
                store(dxh, p, fma(w[s.conv_weight + d * s.conv + k], value, load(dxh, p)))
        store(sums, (s.conv_bias + d) * WIDTH, dbias)
        _outer(*(sums, s.conv_weight + d * s.conv, 0, 1, 1, s.conv, dx, d * ROW, 0, xh, d * width, WIDTH, steps))


@njit(**INLINE)
def _in_proj_backward(w, s, steps, sums, tok, dxh, dz, g, dtok):
    """The input projection; g, used up by now, serves as room."""
    width = s.width * WIDTH
    now = (s.conv - 1) * WIDTH
    z_weights = s.in_proj + s.inner * s.model
    _outer(sums, s.in_proj, s.model, 1, s.inner, s.model, dxh, now, width, tok, now, width, steps)
    _outer(sums, z_weights, s.model, 1, s.inner, s.model, dz, 0, ROW, tok, now, width, steps)
    _project(w, s.in_proj, 1, s.model, s.model, s.inner, dxh[now:], width, dtok, ROW, steps)
    _project(w, z_weights, 1, s.model, s.model, s.inner, dz, ROW, g, ROW, steps)
    for i in range(0, s.model * ROW, WIDTH):
        store(dtok, i, load(dtok, i) + load(g, i))


@njit(**INLINE)
def _carry(s, dxh):
    """What a chunk adds to the steps before it is the end of the chunk that is worked on next."""
    history, width = s.conv - 1, s.width * WIDTH
    for d in range(s.inner):
        for p in range(history - 1, -1, -1):
            store(dxh, d * width + (CHUNK + p) * WIDTH, load(dxh, d * width + p * WIDTH))
        fill(dxh, d * width, CHUNK, ZERO)


@kernel(_SIZES, _WEIGHTS, types.UniTuple(types.int64, 5), types.int64, types.int64, types.int64)
def _backward(s, p, memory, first, last, workspace):
    """Write the gradient of the tokens for the groups [first, last), and of the flat weights summed over them.

    memory: the addresses of the gradient of out, tokens, saved, and the two gradients.
    """
    grad_out, tokens, saved = floats(memory[0]), floats(memory[1]), floats(memory[2])
    dtokens, dw, space = floats(memory[3]), floats(memory[4]), floats(workspace)
    (w, a, bc, _, tok, xh, c, x, z, delta, dt, du, y, part, raw, B, C), rest = _split(space, s)
    history = s.conv - 1
    width = s.width * WIDTH
    channels = s.inner * ROW
    at = 0
    sums = rest[at : at + s.weights * WIDTH]  # gradients of the weights, a sum per lane
    at += s.weights * WIDTH
    dh = rest[at : at + s.inner * s.even * WIDTH]  # of the states, carried from the chunk after
    at += s.inner * s.even * WIDTH
    sums_a = rest[at : at + s.inner * s.even * WIDTH]
    at += s.inner * s.even * WIDTH
    sums_bc = rest[at : at + 2 * s.inner * s.even * WIDTH]
    at += 2 * s.inner * s.even * WIDTH
    dxh = rest[at : at + s.inner * width]
    at += s.inner * width
    g = rest[at : at + s.model * ROW]
    dtok = rest[at + s.model * ROW : at + 2 * s.model * ROW]
    at += 2 * s.model * ROW
    dy = rest[at : at + channels]
    dx = rest[at + channels : at + 2 * channels]
    dz = rest[at + 2 * channels : at + 3 * channels]
    ddu = rest[at + 3 * channels : at + 4 * channels]
    ddt = rest[at + 4 * channels : at + 5 * channels]
    at += 5 * channels
    draw = rest[at : at + s.rank * ROW]
    at += s.rank * ROW
    dB = rest[at : at + 2 * STATE_ROW]
    dC = rest[at + 2 * STATE_ROW : at + 4 * STATE_ROW]
    at += 4 * STATE_ROW
    decay = rest[at : at + 2 * ROW]
    before = rest[at + 2 * ROW : at + 4 * ROW]  # the state before each step
    _parameters(p, s, w, a, bc)
    fill(sums, 0, s.weights, ZERO)
    fill(sums_a, 0, s.inner * s.even, ZERO)
    fill(sums_bc, 0, 2 * s.inner * s.even, ZERO)
    for group in range(first, last):
        fill(dh, 0, s.inner * s.even, ZERO)
        fill(dxh, 0, s.inner * s.width, ZERO)
        for chunk in range(s.chunks - 1, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, s.length - start)
            _read(tokens, s, group, start, steps, tok, s.width, history)
            _read(grad_out, s, group, start, steps, g, CHUNK, 0)
            _prepare(w, s, steps, tok, xh, c, x, z, raw, delta, dt, du, y, part)
            _project(w, s.out_proj, 1, s.inner, s.inner, s.model, g, ROW, dz, ROW, steps)  # of the gated y for now
            for d in range(s.inner):
                for t in range(d * ROW, d * ROW + steps * WIDTH, WIDTH):
                    z_t = load(z, t)
                    store(dy, t, load(dz, t) * z_t * sigmoid(z_t))
            fill(dx, 0, s.inner * CHUNK, ZERO)
            fill(ddu, 0, s.inner * CHUNK, ZERO)
            fill(ddt, 0, s.inner * CHUNK, ZERO)
            for n in range(0, s.even, 2):
                _input_output(bc, s, n, steps, x, B, C)
                fill(dB, 0, 2 * (CHUNK + 1), ZERO)
                fill(dC, 0, 2 * (CHUNK + 1), ZERO)
                for d in range(s.inner):
                    at = (d * s.even + n) * WIDTH
                    from_ = (group * s.chunks + chunk) * s.inner * s.even * WIDTH + at
                    dh0, dh1, da0, da1 = scan_pair_backward(
                        *(steps, n + 1 < s.states, dt, du, part, dy, ddt, ddu, d * ROW, B, C, dB, dC, 0, decay, before),
                        *(splat(a[d * s.even + n]), splat(a[d * s.even + n + 1])),
                        *(load(saved, from_), load(saved, from_ + WIDTH), load(dh, at), load(dh, at + WIDTH)),
                        *(load(sums_a, at), load(sums_a, at + WIDTH)),
                    )
                    store(dh, at, dh0)
                    store(dh, at + WIDTH, dh1)
                    store(sums_a, at, da0)
                    store(sums_a, at + WIDTH, da1)
                if (n + 2) % SUMMED == 0 or n + 2 == s.even:
                    fold(part, y, 0, s.inner * CHUNK)
                b0 = 2 * n * s.inner
                _outer(sums_bc, b0, 2 * s.inner, 1, 2, s.inner, dB, 0, STATE_ROW, x, 0, ROW, steps)
                _outer(sums_bc, b0 + s.inner, 2 * s.inner, 1, 2, s.inner, dC, 0, STATE_ROW, x, 0, ROW, steps)
                for d in range(s.inner):
                    wB0, wC0 = splat(bc[b0 + d]), splat(bc[b0 + s.inner + d])
                    wB1, wC1 = splat(bc[b0 + 2 * s.inner + d]), splat(bc[b0 + 3 * s.inner + d])
                    for t in range(0, steps * WIDTH, WIDTH):
                        value = fma(wB0, load(dB, t), fma(wC0, load(dC, t), load(dx, d * ROW + t)))
                        if n + 1 < s.states:
                            value = fma(wB1, load(dB, STATE_ROW + t), fma(wC1, load(dC, STATE_ROW + t), value))
                        store(dx, d * ROW + t, value)
            _gate_backward(w, s, steps, sums, x, y, z, g, dy, dz)
            _steps_backward(w, s, steps, sums, x, dt, delta, raw, dy, ddu, ddt, dx, draw)
            _convolution_backward(w, s, steps, sums, c, xh, draw, dx, dxh)
            _in_proj_backward(w, s, steps, sums, tok, dxh, dz, g, dtok)
            _write(dtok, s, group, start, steps, dtokens)
            _carry(s, dxh)
    for i in range(s.weights):
        dw[i] = total(load(sums, i * WIDTH))
    for n in range(s.states):
        for d in range(s.inner):
            dw[s.A_log + d * s.states + n] = total(load(sums_a, (d * s.even + n) * WIDTH)) * LN2 * a[d * s.even + n]
            at = s.x_proj + (s.rank + n) * s.inner + d
            dw[at] = total(load(sums_bc, (2 * n * s.inner + d) * WIDTH))
            dw[at + s.states * s.inner] = total(load(sums_bc, ((2 * n + 1) * s.inner + d) * WIDTH))


def _sizes(tokens: Tensor, weights: tuple[Tensor, ...]) -> Sizes:
    _, conv_weight, _, _, dt_weight, _, A_log, _, _ = weights
    batch, length, model = tokens.shape
    (inner, states), rank, conv = A_log.shape, dt_weight.shape[1], conv_weight.shape[-1]
    begins = itertools.accumulate((weight.numel() for weight in weights), initial=0)
    groups, chunks, even = -(-batch // WIDTH), -(-length // CHUNK), states + states % 2
    width = -(-(conv - 1 + CHUNK) // AT_ONCE) * AT_ONCE
    return Sizes(batch, length, model, inner, states, rank, conv, groups, chunks, even, width, *begins)


def _workspace(s: Sizes, backward: bool) -> Tensor:
    """Room for what `_split` and the rest of a pass lay out."""
    vectors = s.inner * s.even + (s.model + s.inner) * s.width + (8 * s.inner + s.rank + 4) * CHUNK
    vectors += 8 + (s.weights + 3 * s.inner * s.even) // WIDTH + s.model * CHUNK
    if backward:
        vectors += s.weights + 4 * s.inner * s.even + s.inner * s.width
        vectors += (s.model + 5 * s.inner + s.rank + 8) * CHUNK + 4
    return torch.empty(vectors * WIDTH, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


def _run_forward(tokens: Tensor, weights: tuple[Tensor, ...], s: Sizes, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Out, and with `keep` the states that the backward pass starts from."""
    out = torch.empty_like(tokens)
    saved = tokens.new_empty(s.groups * s.chunks * s.inner * s.even * WIDTH) if keep else None
    addresses = Weights(*(weight.data_ptr() for weight in weights))
    memory = (tokens.data_ptr(), out.data_ptr(), 0 if saved is None else saved.data_ptr())

    def run(thread: int, first: int, last: int, _alive: object = (tokens, weights, out, saved)) -> None:
        space = _workspace(s, backward=False)
        _forward(s, addresses, memory, first, last, space.data_ptr())

    if out.numel():
        share(run, s.groups, threads_for(s.groups, s.batch * s.length * s.inner * s.states))
    return out, saved


class _Block(torch.autograd.Function):
    """On float32 contiguous tensors."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *weights: Any) -> Tensor:
        ctx.sizes = _sizes(tokens, weights)
        out, saved = _run_forward(tokens, weights, ctx.sizes, keep=True)
        ctx.kinds = kinds_of((tokens, *weights))
        ctx.save_for_backward(tokens, saved, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        tokens, saved, *weights = ctx.saved_tensors
        check_unchanged((tokens, *weights), ctx.kinds)
        s = ctx.sizes
        grad_out = real(grad_out).contiguous()
        threads = threads_for(s.groups, s.batch * s.length * s.inner * s.states)
        dtokens, dw = torch.empty_like(tokens), tokens.new_zeros(threads, s.weights)
        addresses = Weights(*(weight.data_ptr() for weight in weights))
        given = (grad_out.data_ptr(), tokens.data_ptr(), saved.data_ptr(), dtokens.data_ptr())

        def run(
            thread: int, first: int, last: int, _alive: object = (grad_out, tokens, saved, weights, dtokens, dw)
        ) -> None:
            space = _workspace(s, backward=True)
            _backward(s, addresses, (*given, dw[thread].data_ptr()), first, last, space.data_ptr())

        if tokens.numel():
            share(run, s.groups, threads)
        parts = (dw[0] if threads == 1 else dw.sum(0)).split([weight.numel() for weight in weights])
        return dtokens, *(part.view(weight.shape) for part, weight in zip(parts, weights, strict=True))


def _check(tokens: Tensor, weights: tuple[Tensor, ...]) -> None:
    """The kernels read memory without bounds checks, so everything is checked first."""
    if any(type(x) not in PLAIN for x in (tokens, *weights)):
        raise TypeError("the kernels need a tensor's memory, which a subclass of Tensor need not have")
    if len(weights) != len(Weights._fields) or tokens.ndim != 3 or weights[6].ndim != 2:
        raise ValueError(f"tokens must be (batch, length, d_model) with {len(Weights._fields)} weights")
    model, (inner, states) = tokens.shape[2], weights[6].shape
    conv, rank = max(1, weights[1].shape[-1]), weights[4].shape[-1]
    expected = [
        *((2 * inner, model), (inner, 1, conv), (inner,), (rank + 2 * states, inner), (inner, rank), (inner,)),
        *((inner, states), (inner,), (model, inner)),
    ]
    if [weight.shape for weight in weights] != expected:
        shapes = zip(Weights._fields, weights, expected, strict=True)
        faults = [f"{name} is {tuple(x.shape)}, expected {shape}" for name, x, shape in shapes if x.shape != shape]
        raise ValueError("; ".join(faults))
    kinds = {(x.dtype, x.device.type) for x in (tokens, *weights)}
    if kinds != {(torch.float32, "cpu")}:
        raise ValueError(f"a fused block is float32 on the CPU, not {sorted(map(str, kinds))}")


def mamba_block_cpu(tokens: Tensor, *weights: Tensor) -> Tensor:
    """The whole block of `pkd_lightning.models.mamba.Mamba`, (batch, length, d_model) to the same shape.

    Args:
        tokens: (batch, length, d_model) float32.
        weights: in_proj (2 * d_inner, d_model), conv1d's weight (d_inner, 1, d_conv) and bias (d_inner,), x_proj
            (rank + 2 * d_state, d_inner), dt_proj's weight (d_inner, rank) and bias (d_inner,), A_log
            (d_inner, d_state), D (d_inner,), out_proj (d_model, d_inner); all float32.

    Raises:
        ValueError: a tensor has the wrong shape or dtype or is not on the CPU.
        TypeError: a tensor is of a subclass of Tensor.
    """
    _check(tokens, weights)
    tokens, *rest = (real(x).contiguous() for x in (tokens, *weights))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (tokens, *rest)):
        return _Block.apply(tokens, *rest)  # type: ignore[no-any-return]
    return _run_forward(tokens, tuple(rest), _sizes(tokens, tuple(rest)), keep=False)[0]
