"""A whole Mamba block on the CPU, forward and backward, fused: for blocks of few channels, where each of PyTorch's
operations around the scan costs more than the scan itself. What is around the block in a residual network, RMS norm,
reading order and the sum of input and output, is part of the same pass.

The 16 lanes of a vector are 16 sequences of the batch, so every step of the block (norm, projections, convolution,
softplus, scan, gate) is plain arithmetic on vectors, without sums across lanes and for any number of states. The
sequence is walked in chunks of `CHUNK` steps whose intermediates stay in the cache. B and C, linear in the channels of
a step, are computed when they are needed, `BLOCK` states at a time: they, their gradients and the states never exist as
a whole. The backward pass starts each chunk from its saved first state and computes everything else again.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numba import int64, njit, types
from torch import Tensor

from pkd_lightning.kernels.lanes import (
    APART,
    INLINE,
    LN2,
    LOG2E,
    ONE,
    WIDE,
    WIDTH,
    ZERO,
    f32,
    floats,
    fma,
    kernel,
    load,
    load_wide,
    sigmoid,
    softplus,
    softplus_and_slope,
    splat,
    spread,
    store,
    store_first,
    total,
    total_of_each,
)
from pkd_lightning.kernels.memory import PLAIN, check_unchanged, kinds_of, real, refuse_second_derivative
from pkd_lightning.kernels.scan.dense import AT_ONCE, outer, project
from pkd_lightning.kernels.scan.order import AS_THEY_LIE, Order
from pkd_lightning.kernels.scan.states import (
    CHUNK,
    ROW,
    STATE_ROW,
    SUMMED,
    fill,
    fold,
    scan_tile,
    scan_tile_backward,
)
from pkd_lightning.kernels.scan.tokens import normalise, normalise_backward, read, write
from pkd_lightning.kernels.threads import share, threads_for

KEPT = 48  # channels of a token from which on it costs less to keep what in_proj gives than to compute it again
BLOCK = 8  # states whose B and C of a chunk are in the cache at a time; even


class Sizes(NamedTuple):
    """Of a block, and where each weight begins in the flat vector of all.

    Attributes:
        rows: rows of the raster that is read by columns.
        columns: its columns, 0 where tokens are read as they lie.
        backwards: whether the last is read first.
        normed: whether an RMS norm comes first.
        residual: whether the tokens are added to the result.
        kept: whether the forward pass keeps what in_proj gives.
        groups: groups of 16 sequences.
        chunks: chunks of a sequence.
        even: states rounded up to an even number.
        width: steps of a chunk's row with the convolution's history, a multiple of `AT_ONCE`.
        long: steps of a row that holds all chunks and the history before them.
    """

    batch: int
    length: int
    model: int
    inner: int
    states: int
    rank: int
    conv: int
    rows: int
    columns: int
    backwards: int
    normed: int
    residual: int
    kept: int
    groups: int
    chunks: int
    even: int
    width: int
    long: int
    in_proj: int
    conv_weight: int
    conv_bias: int
    x_proj: int
    dt_weight: int
    dt_bias: int
    A_log: int
    D: int
    out_proj: int
    norm: int
    weights: int


class Weights(NamedTuple):
    """Their addresses, each contiguous; of the norm 0 where there is none."""

    in_proj: int
    conv_weight: int
    conv_bias: int
    x_proj: int
    dt_weight: int
    dt_bias: int
    A_log: int
    D: int
    out_proj: int
    norm: int


class Room(NamedTuple):
    """Where the parts of a thread's workspace begin; those after `mixed` only the backward pass has.

    One number each: w, the weights, and a, A * log2(e) (d_inner, even). Of the other parts an element is a vector:
    h (d_inner, even); of (d_model, width) tokens as they are (seen) and normalised (tok); scale (width,) of the norm;
    xh (d_inner, width) before the convolution. Rows of a chunk: x after it and SiLU, z before the gate, dt and du,
    y and its `part` (d_inner); raw (rank), before dt_proj; B and C (`BLOCK`); mixed (d_model), after out_proj.

    Backward, rows of d_inner: sigmoid of what SiLU takes (gate) and of z, which is SiLU of it then (z_gate); slope of
    softplus; gradients, named d and what they are of; dc, of what SiLU takes, with history before and after.
    """

    w: int
    a: int
    h: int
    seen: int
    tok: int
    scale: int
    xh: int
    x: int
    z: int
    slope: int
    dt: int
    du: int
    y: int
    part: int
    raw: int
    B: int
    C: int
    mixed: int
    sums: int
    dh: int
    sums_a: int
    g: int
    gate: int
    z_gate: int
    dxh: int
    dc: int
    dz: int
    dy: int
    ddt: int
    ddu: int
    dx: int
    draw: int
    dB: int
    dC: int
    states: int
    end: int


NAN = f32(math.nan)  # as `exp2_falling` takes it
FIRST = Sizes._fields.index("in_proj")

_SIZES = types.NamedUniTuple(types.int64, len(Sizes._fields), Sizes)
_WEIGHTS = types.NamedUniTuple(types.int64, len(Weights._fields), Weights)
_ROOM = types.NamedUniTuple(types.int64, len(Room._fields), Room)


@njit(**APART)
def _parameters(p, s, w, a):
    """Fill w, all weights one after another, and a; the states that `even` adds have a of zero."""
    for i in range(len(p)):
        source = floats(p[i])
        for j in range(s[FIRST + i], s[FIRST + i + 1]):
            w[j] = source[j - s[FIRST + i]]
    for d in range(s.inner):
        for n in range(s.even):
            value = -LOG2E * math.exp(w[s.A_log + d * s.states + n]) if n < s.states else ZERO
            a[d * s.even + n] = value if value == value else NAN


@njit(**INLINE)
def _read_tokens(tokens, s, group, start, steps, history, w, seen, tok, scale):
    """A chunk's tokens after `history` steps, as they are and normalised."""
    read(tokens, s, group, start, steps, seen, s.width * WIDTH, int64(history))
    if s.normed:
        normalise(w, s, history + steps, seen, tok, scale)


@njit(**APART)
def _convolve(w, s, steps, xh, xh_row, x, gate, keep):
    """Convolution and SiLU; with `keep` the sigmoid in SiLU, too."""
    for d in range(s.inner):
        bias, weights = spread(w, s.conv_bias + d), s.conv_weight + d * s.conv
        from_, row = d * xh_row, d * ROW
        if s.conv == 4:  # as usual: no inner loop then
            k0, k1, k2, k3 = spread(w, weights), spread(w, weights + 1), spread(w, weights + 2), spread(w, weights + 3)
            for t in range(0, steps * WIDTH, WIDTH):
                p = from_ + t
                value = fma(k1, load(xh, p + WIDTH), fma(k0, load(xh, p), bias))
                store(x, row + t, fma(k3, load(xh, p + 3 * WIDTH), fma(k2, load(xh, p + 2 * WIDTH), value)))
        else:
            for t in range(0, steps * WIDTH, WIDTH):
                value = bias
                for k in range(s.conv):
                    value = fma(spread(w, weights + k), load(xh, from_ + t + k * WIDTH), value)
                store(x, row + t, value)
        for t in range(row, row + steps * WIDTH, WIDE):
            value = load_wide(x, t)
            gate_t = sigmoid(value)
            store(x, t, value * gate_t)
            if keep:
                store(gate, t, gate_t)


@njit(**APART)
def _step_sizes(w, s, steps, x, raw, slope, dt, du, y, part, keep):
    """Dt and du, y and part set to zero; with `keep` the slope of softplus, too."""
    project(w, s.x_proj, s.inner, 1, s.rank, s.inner, x, ROW, raw, ROW, steps, False)
    project(w, s.dt_weight, s.rank, 1, s.inner, s.rank, raw, ROW, dt, ROW, steps, False)
    for d in range(s.inner):
        bias = w[s.dt_bias + d]
        for t in range(d * ROW, d * ROW + steps * WIDTH, WIDE):
            value = load_wide(dt, t) + bias
            if keep:
                value, slope_t = softplus_and_slope(value)
                store(slope, t, slope_t)
            else:
                value = softplus(value)
            store(dt, t, value)
            store(du, t, value * load_wide(x, t))
    fill(y, 0, s.inner * CHUNK, ZERO)
    if s.even > SUMMED:
        fill(part, 0, s.inner * CHUNK, ZERO)


@njit(**INLINE)
def _input_output(w, s, n, count, steps, x, B, C):
    """B and C of the states [n, n + count) for one chunk, a row each; a state beyond the last is zero."""
    b = s.x_proj + (s.rank + n) * s.inner
    project(w, b, s.inner, 1, count, s.inner, x, ROW, B, STATE_ROW, steps, False)
    project(w, b + s.states * s.inner, s.inner, 1, count, s.inner, x, ROW, C, STATE_ROW, steps, False)
    if count % 2:
        fill(B, count * STATE_ROW, steps, ZERO)
        fill(C, count * STATE_ROW, steps, ZERO)


@njit(**INLINE)
def mix_chunk(w, a, s, steps, xh, xh_row, z, z_row, x, raw, dt, du, y, part, B, C, h, mixed):
    """One chunk from what in_proj gives, xh after the convolution's history and z, to what out_proj gives, `mixed`.

    h: the states before the chunk, left as those after it; the others are room. s: `Sizes`, or what has its names.
    """
    sum_ = part if s.even > SUMMED else y
    _convolve(w, s, steps, xh, xh_row, x, x, False)
    _step_sizes(w, s, steps, x, raw, dt, dt, du, y, part, False)
    for n in range(0, s.even, BLOCK):
        count = min(BLOCK, s.states - n)
        _input_output(w, s, n, count, steps, x, B, C)
        for d in range(0, s.inner, 2):
            for m in range(0, count, 2):
                at = d * s.even + n + m
                scan_tile(
                    *(steps, m + 1 < count, d + 1 < s.inner, dt, du, sum_, d * ROW, B, C, m * STATE_ROW),
                    *(a, at, s.even, h, at * WIDTH),
                )
        if s.even > SUMMED and ((n + BLOCK) % SUMMED == 0 or n + BLOCK >= s.even):
            fold(part, y, 0, s.inner * CHUNK)
    for d in range(s.inner):
        D = w[s.D + d]
        for t in range(0, steps * WIDTH, WIDE):
            z_t, at = load_wide(z, d * z_row + t), d * ROW + t
            store(y, at, fma(D, load_wide(x, at), load_wide(y, at)) * z_t * sigmoid(z_t))
    project(w, s.out_proj, s.inner, 1, s.model, s.inner, y, ROW, mixed, ROW, steps, False)


@kernel(_SIZES, _WEIGHTS, _ROOM, types.UniTuple(types.int64, 4), types.int64, types.int64, types.int64)
def _forward(s, p, r, memory, first, last, workspace):
    """Write out (batch, length, d_model) of the groups [first, last) of 16 sequences, and `saved`.

    memory: the addresses of tokens, out, saved and kept; the last two are 0 where nothing is to be saved.

    saved: the states at the start of each chunk, (groups, chunks, d_inner, even, 16).
    kept: what in_proj gives, (groups, 2 * d_inner, long, 16), in each row after zeros for the convolution's history.
    """
    tokens, out, saved, space = floats(memory[0]), floats(memory[1]), floats(memory[2]), floats(workspace)
    w, a, h, seen, scale, xh = space, space[r.a :], space[r.h :], space[r.seen :], space[r.scale :], space[r.xh :]
    x, z, dt, du, y, part = space[r.x :], space[r.z :], space[r.dt :], space[r.du :], space[r.y :], space[r.part :]
    raw, B, C, mixed = space[r.raw :], space[r.B :], space[r.C :], space[r.mixed :]
    tok = space[r.tok :] if s.normed else seen
    keep = memory[3] != 0
    history, width, state = s.conv - 1, s.width * WIDTH, s.inner * s.even * WIDTH
    xh_row, z_row = (s.long * WIDTH, s.long * WIDTH) if keep else (width, int64(ROW))
    _parameters(p, s, w, a)
    for group in range(first, last):
        fill(h, 0, s.inner * s.even, ZERO)
        if keep:
            xh = floats(memory[3])[2 * group * s.inner * xh_row :]
        for d in range(s.inner):
            fill(xh, d * xh_row, history, ZERO)
        for chunk in range(s.chunks):
            start = chunk * CHUNK
            steps = min(CHUNK, s.length - start)
            _read_tokens(tokens, s, group, start, steps, 0, w, seen, tok, scale)
            if keep and chunk:
                xh = xh[ROW:]
            elif chunk:  # the end of the chunk before
                for d in range(s.inner):
                    for i in range(d * width, d * width + history * WIDTH, WIDTH):
                        store(xh, i, load(xh, i + ROW))
            now = xh[history * WIDTH :]
            if keep:
                z = now[s.inner * xh_row :]
            project(w, s.in_proj, s.model, 1, s.inner, s.model, tok, width, now, xh_row, steps, False)
            z_weights = s.in_proj + s.inner * s.model
            project(w, z_weights, s.model, 1, s.inner, s.model, tok, width, z, z_row, steps, False)
            if memory[2]:
                at = (group * s.chunks + chunk) * state
                for i in range(0, state, WIDTH):
                    store(saved, at + i, load(h, i))
            mix_chunk(w, a, s, steps, xh, xh_row, z, z_row, x, raw, dt, du, y, part, B, C, h, mixed)
            if s.residual:
                for i in range(s.model):
                    for t in range(0, steps * WIDTH, WIDTH):
                        store(mixed, i * ROW + t, load(seen, i * width + t) + load(mixed, i * ROW + t))
            write(mixed, s, group, start, steps, out)


@njit(**APART)
def _gate_backward(w, s, steps, sums, x, y, z, z_gate, g, dy, dz):
    """The gate, the skip and out_proj: dz comes in as the gradient of the gated y, y leaves as that."""
    for d in range(s.inner):
        D, dD = spread(w, s.D + d), load(sums, (s.D + d) * WIDTH)
        for t in range(d * ROW, d * ROW + steps * WIDTH, WIDTH):
            x_t, silu, gate = load(x, t), load(z, t), load(z_gate, t)
            y_t = fma(D, x_t, load(y, t))
            store(y, t, y_t * silu)
            store(dz, t, load(dz, t) * y_t * fma(silu, ONE - gate, gate))
            dD = fma(load(dy, t), x_t, dD)
        store(sums, (s.D + d) * WIDTH, dD)
    outer(sums, s.out_proj, s.inner, 1, s.model, s.inner, g, ROW, y, ROW, steps)


@njit(**APART)
def _steps_backward(w, s, steps, sums, x, dt, slope, raw, dy, ddu, ddt, dx, draw):
    """The step sizes, from softplus back to x: ddt leaves as the gradient before softplus."""
    for d in range(s.inner):
        D, dbias = spread(w, s.D + d), load(sums, (s.dt_bias + d) * WIDTH)
        for t in range(d * ROW, d * ROW + steps * WIDTH, WIDTH):
            ddu_t = load(ddu, t)
            value = fma(load(x, t), ddu_t, LN2 * load(ddt, t)) * load(slope, t)
            store(ddt, t, value)
            dbias = dbias + value
            store(dx, t, fma(D, load(dy, t), fma(load(dt, t), ddu_t, load(dx, t))))
        store(sums, (s.dt_bias + d) * WIDTH, dbias)
    outer(sums, s.dt_weight, s.rank, 1, s.inner, s.rank, ddt, ROW, raw, ROW, steps)
    project(w, s.dt_weight, 1, s.rank, s.rank, s.inner, ddt, ROW, draw, ROW, steps, False)
    outer(sums, s.x_proj, s.inner, 1, s.rank, s.inner, draw, ROW, x, ROW, steps)
    project(w, s.x_proj, 1, s.inner, s.inner, s.rank, draw, ROW, dx, ROW, steps, True)


@njit(**APART)
def _convolution_backward(w, s, steps, sums, xh, xh_row, x, gate, dx, dc, dxh):
    """SiLU and the convolution: dxh becomes the gradient of xh, with what later chunks added to this one's steps."""
    history, width = s.conv - 1, s.width * WIDTH
    now = history * WIDTH
    fill(dc, 0, history, ZERO)
    for d in range(s.inner):
        dbias, weights = load(sums, (s.conv_bias + d) * WIDTH), s.conv_weight + d * s.conv
        row, from_ = d * ROW, d * width
        for t in range(0, steps * WIDTH, WIDTH):
            gate_t = load(gate, row + t)
            value = load(dx, row + t) * fma(load(x, row + t), ONE - gate_t, gate_t)
            store(dc, now + t, value)
            dbias = dbias + value
        store(sums, (s.conv_bias + d) * WIDTH, dbias)
        fill(dc, now + steps * WIDTH, history, ZERO)
        outer(sums, weights, 0, 1, 1, s.conv, dc[now:], 0, xh[d * xh_row :], WIDTH, steps)
        for t in range((history + steps - 1) * WIDTH, -1, -WIDTH):
            value = load(dxh, from_ + t - ROW) if t >= ROW else splat(ZERO)
            if s.conv == 4:
                value = fma(spread(w, weights), load(dc, now + t), value)
                value = fma(spread(w, weights + 1), load(dc, now + t - WIDTH), value)
                value = fma(spread(w, weights + 2), load(dc, now + t - 2 * WIDTH), value)
                value = fma(spread(w, weights + 3), load(dc, now + t - 3 * WIDTH), value)
            else:
                for k in range(s.conv):
                    value = fma(spread(w, weights + k), load(dc, now + t - k * WIDTH), value)
            store(dxh, from_ + t, value)


@njit(**APART)
def _in_proj_backward(w, s, steps, sums, tok, dxh, dz, dtok):
    """The input projection; tok and dxh from the chunk on, dtok leaves as the gradient of tok."""
    width = s.width * WIDTH
    z_weights = s.in_proj + s.inner * s.model
    outer(sums, s.in_proj, s.model, 1, s.inner, s.model, dxh, width, tok, width, steps)
    outer(sums, z_weights, s.model, 1, s.inner, s.model, dz, ROW, tok, width, steps)
    project(w, s.in_proj, 1, s.model, s.model, s.inner, dxh, width, dtok, ROW, steps, False)
    project(w, z_weights, 1, s.model, s.model, s.inner, dz, ROW, dtok, ROW, steps, True)


@kernel(_SIZES, _WEIGHTS, _ROOM, types.UniTuple(types.int64, 6), types.int64, types.int64, types.int64)
def _backward(s, p, r, memory, first, last, workspace):
    """Write the gradient of the tokens for the groups [first, last), and of the flat weights summed over them.

    memory: the addresses of the gradient of out, tokens, saved and kept, and of the two gradients.
    """
    grad_out, tokens, saved = floats(memory[0]), floats(memory[1]), floats(memory[2])
    kept, dtokens, dw, space = floats(memory[3]), floats(memory[4]), floats(memory[5]), floats(workspace)
    w, a, seen, scale, xh = space, space[r.a :], space[r.seen :], space[r.scale :], space[r.xh :]
    x, z, dt, du, y, part = space[r.x :], space[r.z :], space[r.dt :], space[r.du :], space[r.y :], space[r.part :]
    raw, B, C, dtok, slope = space[r.raw :], space[r.B :], space[r.C :], space[r.mixed :], space[r.slope :]
    sums, dh, sums_a, g = space[r.sums :], space[r.dh :], space[r.sums_a :], space[r.g :]
    gate, z_gate, dxh, dc = space[r.gate :], space[r.z_gate :], space[r.dxh :], space[r.dc :]
    dz, dy, ddt, ddu, dx = space[r.dz :], space[r.dy :], space[r.ddt :], space[r.ddu :], space[r.dx :]
    draw, dB, dC, states = space[r.draw :], space[r.dB :], space[r.dC :], space[r.states :]
    tok = space[r.tok :] if s.normed else seen
    sum_ = part if s.even > SUMMED else y
    history, width = s.conv - 1, s.width * WIDTH
    before = 0 if s.kept else history  # steps before a chunk whose tokens are needed
    xh_row, z_row, z_from = (s.long * WIDTH, s.long * WIDTH, kept) if s.kept else (width, int64(ROW), z)
    _parameters(p, s, w, a)
    fill(sums, 0, s.weights, ZERO)
    fill(sums_a, 0, s.inner * s.even, ZERO)
    for group in range(first, last):
        fill(dh, 0, s.inner * s.even, ZERO)
        fill(dxh, 0, s.inner * s.width, ZERO)
        for chunk in range(s.chunks - 1, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, s.length - start)
            _read_tokens(tokens, s, group, start, steps, before, w, seen, tok, scale)
            read(grad_out, s, group, start, steps, g, int64(ROW), int64(0))
            now = before * WIDTH
            if s.kept:
                at = 2 * group * s.inner * xh_row + start * WIDTH
                xh, z_from = kept[at:], kept[at + s.inner * xh_row + history * WIDTH :]
            else:
                project(w, s.in_proj, s.model, 1, s.inner, s.model, tok, width, xh, xh_row, history + steps, False)
                z_weights = s.in_proj + s.inner * s.model
                project(w, z_weights, s.model, 1, s.inner, s.model, tok[now:], width, z, ROW, steps, False)
            _convolve(w, s, steps, xh, xh_row, x, gate, True)
            _step_sizes(w, s, steps, x, raw, slope, dt, du, y, part, True)
            project(w, s.out_proj, 1, s.inner, s.inner, s.model, g, ROW, dz, ROW, steps, False)  # of the gated y
            for d in range(s.inner):
                for t in range(0, steps * WIDTH, WIDE):
                    z_t, at = load_wide(z_from, d * z_row + t), d * ROW + t
                    gate_t = sigmoid(z_t)
                    store(z_gate, at, gate_t)
                    store(z, at, z_t * gate_t)
                    store(dy, at, load_wide(dz, at) * (z_t * gate_t))
            fill(ddu, 0, s.inner * CHUNK, ZERO)
            fill(ddt, 0, s.inner * CHUNK, ZERO)
            for n in range(0, s.even, BLOCK):
                count = min(BLOCK, s.states - n)
                _input_output(w, s, n, count, steps, x, B, C)
                fill(dB, 0, BLOCK * (CHUNK + 1), ZERO)
                fill(dC, 0, BLOCK * (CHUNK + 1), ZERO)
                for d in range(0, s.inner, 2):
                    for m in range(0, count, 2):
                        at = d * s.even + n + m
                        from_ = (group * s.chunks + chunk) * s.inner * s.even + at
                        scan_tile_backward(
                            *(steps, m + 1 < count, d + 1 < s.inner, dt, du, sum_, dy, ddt, ddu, d * ROW),
                            *(B, C, dB, dC, m * STATE_ROW, states, a, at, s.even, saved, from_ * WIDTH),
                            *(dh, sums_a, at * WIDTH),
                        )
                if s.even > SUMMED and ((n + BLOCK) % SUMMED == 0 or n + BLOCK >= s.even):
                    fold(part, y, 0, s.inner * CHUNK)
                b = s.x_proj + (s.rank + n) * s.inner
                c = b + s.states * s.inner
                outer(sums, b, s.inner, 1, count, s.inner, dB, STATE_ROW, x, ROW, steps)
                outer(sums, c, s.inner, 1, count, s.inner, dC, STATE_ROW, x, ROW, steps)
                project(w, b, 1, s.inner, s.inner, count, dB, STATE_ROW, dx, ROW, steps, n > 0)
                project(w, c, 1, s.inner, s.inner, count, dC, STATE_ROW, dx, ROW, steps, True)
            _gate_backward(w, s, steps, sums, x, y, z, z_gate, g, dy, dz)
            _steps_backward(w, s, steps, sums, x, dt, slope, raw, dy, ddu, ddt, dx, draw)
            _convolution_backward(w, s, steps, sums, xh, xh_row, x, gate, dx, dc, dxh)
            _in_proj_backward(w, s, steps, sums, tok[now:], dxh[history * WIDTH :], dz, dtok)
            if s.normed:
                normalise_backward(w, s, steps, sums, seen, scale, now, dtok, draw)
            if s.residual:
                for i in range(0, s.model * ROW, WIDTH):
                    store(dtok, i, load(dtok, i) + load(g, i))
            write(dtok, s, group, start, steps, dtokens)
    for i in range(0, s.weights, WIDTH):
        store_first(dw, i, total_of_each(sums, i * WIDTH, WIDTH), s.weights - i)
    for d in range(s.inner):
        for n in range(s.states):
            at = d * s.even + n
            dw[s.A_log + d * s.states + n] = total(load(sums_a, at * WIDTH)) * LN2 * a[at]


def _sizes(tokens: Tensor, weights: Sequence[Tensor | None], order: Order, residual: bool) -> Sizes:
    _, conv_weight, _, _, dt_weight, _, A_log, _, _, norm = weights
    assert conv_weight is not None
    assert dt_weight is not None
    assert A_log is not None
    batch, length, model = tokens.shape
    (inner, states), rank, conv = A_log.shape, dt_weight.shape[1], conv_weight.shape[-1]
    begins = itertools.accumulate((0 if x is None else x.numel() for x in weights), initial=0)
    groups, chunks, even = -(-batch // WIDTH), -(-length // CHUNK), states + states % 2
    width = -(-(conv - 1 + CHUNK) // AT_ONCE) * AT_ONCE
    return Sizes(
        *(batch, length, model, inner, states, rank, conv, order.rows, order.columns, int(order.backwards)),
        *(int(norm is not None), int(residual), int(model >= KEPT), groups, chunks, even, width),
        *(-(-(conv - 1 + chunks * CHUNK) // AT_ONCE) * AT_ONCE, *begins),
    )


PAGE = 4096 // 4  # elements: rows as far apart as that would compete for the same places of the cache
ROWS = ("x", "z", "slope", "dt", "du", "y", "part", "gate", "z_gate", "dz", "dy", "ddt", "ddu", "dx")  # of d_inner


@functools.lru_cache(64)
def _room(s: Sizes, backward: bool) -> Room:
    vectors = {
        "w": s.weights // WIDTH + 1,
        "a": s.inner * s.even // WIDTH + 1,
        **{name: s.inner * s.even for name in ("h", "dh", "sums_a")},
        "seen": s.model * s.width,
        "tok": s.model * s.width * s.normed,
        "scale": s.width * s.normed,
        **{name: s.inner * s.width for name in ("xh", "dxh")},
        **{name: s.inner * CHUNK for name in ROWS},
        **{name: s.rank * CHUNK for name in ("raw", "draw")},
        **{name: BLOCK * (CHUNK + 1) for name in ("B", "C", "dB", "dC")},
        **{name: s.model * CHUNK for name in ("mixed", "g")},
        "sums": s.weights + WIDTH,
        "dc": CHUNK + 2 * (s.conv - 1),
        "states": 8 * CHUNK,
    }
    at, begins, rows = 0, [], 0
    for name in Room._fields[:-1]:
        if name == "sums" and not backward:
            break
        if name in ROWS:
            at, rows = -(-at // PAGE) * PAGE + rows * STATE_ROW, rows + 1
        begins.append(at)
        at += vectors[name] * WIDTH
    return Room(*begins, *(at for _ in Room._fields[len(begins) :]))


def _workspace(r: Room) -> Tensor:
    return torch.empty(r.end, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _addresses(weights: Sequence[Tensor | None]) -> Weights:
    return Weights(*map(_address, weights))


def _run_forward(
    tokens: Tensor, weights: Sequence[Tensor | None], s: Sizes, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Out, and with `keep` what the backward pass starts from: `saved` and, where it is worth it, `kept`."""
    out = torch.empty_like(tokens)
    saved = tokens.new_empty(s.groups * s.chunks * s.inner * s.even * WIDTH) if keep else None
    kept = tokens.new_empty(2 * s.groups * s.inner * s.long * WIDTH) if keep and s.kept else None
    addresses, room = _addresses(weights), _room(s, backward=False)
    memory = (tokens.data_ptr(), out.data_ptr(), _address(saved), _address(kept))

    def run(thread: int, first: int, last: int, _alive: object = (tokens, weights, out, saved, kept)) -> None:
        space = _workspace(room)
        _forward(s, addresses, room, memory, first, last, space.data_ptr())

    if out.numel():
        share(run, s.groups, threads_for(s.groups, s.batch * s.length * s.inner * s.states))
    return out, saved, kept


class _Block(torch.autograd.Function):
    """On float32 contiguous tensors."""

    @staticmethod
    def forward(ctx: Any, order: Order, residual: bool, tokens: Tensor, *weights: Any) -> Tensor:
        ctx.sizes = _sizes(tokens, weights, order, residual)
        out, saved, kept = _run_forward(tokens, weights, ctx.sizes, keep=True)
        ctx.kinds = kinds_of((tokens, *weights))
        ctx.save_for_backward(tokens, saved, kept, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        tokens, saved, kept, *weights = ctx.saved_tensors
        check_unchanged((tokens, *weights), ctx.kinds)
        s = ctx.sizes
        grad_out = real(grad_out).contiguous()
        threads = threads_for(s.groups, s.batch * s.length * s.inner * s.states)
        dtokens, dw = torch.empty_like(tokens), tokens.new_zeros(threads, s.weights)
        addresses, room = _addresses(weights), _room(s, backward=True)
        given = (*map(_address, (grad_out, tokens, saved, kept, dtokens)),)

        def run(
            thread: int, first: int, last: int, _alive: object = (grad_out, tokens, saved, kept, weights, dtokens, dw)
        ) -> None:
            space = _workspace(room)
            _backward(s, addresses, room, (*given, dw[thread].data_ptr()), first, last, space.data_ptr())

        if tokens.numel():
            share(run, s.groups, threads)
        parts = (dw[0] if threads == 1 else dw.sum(0)).split([0 if x is None else x.numel() for x in weights])
        grads = (None if x is None else part.view(x.shape) for part, x in zip(parts, weights, strict=True))
        return None, None, dtokens, *grads


def _check(tokens: Tensor, weights: tuple[Tensor, ...], norm: Tensor | None, order: Order) -> None:
    """The kernels read memory without bounds checks, so everything is checked first."""
    given = (tokens, *weights) if norm is None else (tokens, *weights, norm)
    if any(type(x) not in PLAIN for x in given):
        raise TypeError("the kernels need a tensor's memory, which a subclass of Tensor need not have")
    count = len(Weights._fields) - 1
    if len(weights) != count or tokens.ndim != 3 or weights[6].ndim != 2:
        raise ValueError(f"tokens must be (batch, length, d_model) with {count} weights")
    (_, length, model), (inner, states) = tokens.shape, weights[6].shape
    conv, rank = max(1, weights[1].shape[-1]), weights[4].shape[-1]
    expected = [
        *((2 * inner, model), (inner, 1, conv), (inner,), (rank + 2 * states, inner), (inner, rank), (inner,)),
        *((inner, states), (inner,), (model, inner), (model,)),
    ]
    faults = []
    if [x.shape for x in given[1:]] != expected[: len(given) - 1]:  # there may be no norm
        shapes = zip(Weights._fields, given[1:], expected, strict=False)
        faults = [f"{name} is {tuple(x.shape)}, expected {shape}" for name, x, shape in shapes if x.shape != shape]
    if order.columns and order.rows * order.columns != length:
        faults.append(f"{length} tokens are no raster of {order.rows}x{order.columns}")
    if faults:
        raise ValueError("; ".join(faults))
    kinds = {(x.dtype, x.device.type) for x in given}
    if kinds != {(torch.float32, "cpu")}:
        raise ValueError(f"a fused block is float32 on the CPU, not {sorted(map(str, kinds))}")


def mamba_block_cpu(
    tokens: Tensor,
    *weights: Tensor,
    norm: Tensor | None = None,
    order: Order = AS_THEY_LIE,
    residual: bool = False,
) -> Tensor:
    """The whole block of `pkd_lightning.models.mamba.Mamba`, (batch, length, d_model) to the same shape.

    Args:
        tokens: (batch, length, d_model) float32.
        weights: in_proj (2 * d_inner, d_model), conv1d's weight (d_inner, 1, d_conv) and bias (d_inner,), x_proj
            (rank + 2 * d_state, d_inner), dt_proj's weight (d_inner, rank) and bias (d_inner,), A_log
            (d_inner, d_state), D (d_inner,), out_proj (d_model, d_inner); all float32.
        norm: (d_model,), the weight of an RMS norm before in_proj, as `torch.nn.RMSNorm` computes it by default.
        order: in which the block reads the tokens; the result is in their own order.
        residual: add the tokens to the result.

    Raises:
        ValueError: a tensor has the wrong shape or dtype or is not on the CPU.
        TypeError: a tensor is of a subclass of Tensor.
    """
    _check(tokens, weights, norm, order)
    tokens, *rest = (x if x is None else real(x).contiguous() for x in (tokens, *weights, norm))  # type: ignore[assignment]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (tokens, *rest)):
        return _Block.apply(order, residual, tokens, *rest)  # type: ignore[no-any-return]
    return _run_forward(tokens, rest, _sizes(tokens, rest, order, residual), keep=False)[0]
