"""The selective scan on the CPU: one fused pass forward and one backward, in float32, compiled by numba.

The 16 lanes of a vector (see `lanes`) are 16 channels of a sequence, or 16 sequences of the batch where there are few
channels. The sequence is walked in chunks whose intermediates stay in the cache; the backward pass starts each chunk
from its saved first state. A (batch, length, d_inner, d_state) tensor never exists.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

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
    first,
    floats,
    fma,
    kernel,
    load,
    load_first,
    prefetch,
    sigmoid,
    softplus,
    splat,
    store,
    store_first,
    total,
    total_of_each,
    transpose,
)
from pkd_lightning.kernels.memory import PLAIN, check_unchanged, kinds_of, real, refuse_second_derivative
from pkd_lightning.kernels.scan.shapes import by_ranges, check
from pkd_lightning.kernels.scan.states import CHUNK, ROW, STATE_ROW, SUMMED, fill, fold, scan_pair, scan_pair_backward
from pkd_lightning.kernels.threads import share, threads_for

BLOCK = 160  # states whose B and C of a chunk are in the cache at a time
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


class Sizes(NamedTuple):
    """Of a scan, and how it is laid out on lanes.

    Attributes:
        over_channels: a lane is a channel, else a sequence.
        outer: sequences, or groups of 16 sequences: worked on independently.
        groups: groups of 16 channels, or channels.
        even: states rounded up to an even number.
    """

    batch: int
    channels: int
    length: int
    states: int
    over_channels: int
    outer: int
    groups: int
    even: int
    chunks: int
    softplus: int


class Memory(NamedTuple):
    """Addresses of the tensors a pass reads and writes, 0 where there is none, and their strides.

    B and C are (batch, length, d_state) and their gradients contiguous; last_state and dlast are contiguous
    (batch, d_inner, d_state). saved: the states before each chunk, (outer, chunks, groups, even, 16).
    """

    u: int
    delta: int
    A: int
    B: int
    C: int
    D: int
    z: int
    delta_bias: int
    out: int  # its gradient in the backward pass
    last_state: int  # its gradient in the backward pass
    saved: int
    u_strides: tuple[int, int, int]
    delta_strides: tuple[int, int, int]
    B_strides: tuple[int, int, int]
    C_strides: tuple[int, int, int]
    z_strides: tuple[int, int, int]
    out_strides: tuple[int, int, int]


class Gradients(NamedTuple):
    """Addresses of the gradients and their strides; those of A, D and the bias are summed over the pieces of a call."""

    u: int
    delta: int
    A: int
    B: int
    C: int
    D: int
    z: int
    delta_bias: int
    u_strides: tuple[int, int, int]
    delta_strides: tuple[int, int, int]
    z_strides: tuple[int, int, int]


_STRIDES = types.UniTuple(types.int64, 3)
_SIZES = types.NamedUniTuple(types.int64, len(Sizes._fields), Sizes)
_MEMORY = types.NamedTuple((types.int64,) * 11 + (_STRIDES,) * 6, Memory)
_GRADIENTS = types.NamedTuple((types.int64,) * 8 + (_STRIDES,) * 3, Gradients)


@njit(**INLINE)
def _place(s, strides, outer, group, start):
    """Of a group's chunk in a (batch, d_inner, length) array: first element, stride from lane to lane, and lanes."""
    if s.over_channels:
        first = outer * strides[0] + group * WIDTH * strides[1]
        return first + start * strides[2], strides[1], min(WIDTH, s.channels - group * WIDTH)
    first = outer * WIDTH * strides[0] + group * strides[1]
    return first + start * strides[2], strides[0], min(WIDTH, s.batch - outer * WIDTH)


@njit(**INLINE)
def _read(s, array, strides, outer, group, start, steps, to, row):
    """One group's chunk of a (batch, d_inner, length) array of any strides to one row of vectors."""
    at, stride, lanes = _place(s, strides, outer, group, start)
    if strides[2] == 1:
        transpose(array, at, stride, lanes, steps, to, row, WIDTH, steps, WIDTH)
    elif stride == 1:
        for t in range(steps):
            store(to, row + t * WIDTH, load_first(array, at + t * strides[2], lanes))
    else:
        for t in range(steps):
            for lane in range(WIDTH):
                value = array[at + lane * stride + t * strides[2]] if lane < lanes else ZERO
                to[row + t * WIDTH + lane] = value


@njit(**INLINE)
def _write(s, source, row, array, strides, outer, group, start, steps):
    """The reverse of `_read`."""
    at, stride, lanes = _place(s, strides, outer, group, start)
    if strides[2] == 1:
        transpose(source, row, WIDTH, steps, WIDTH, array, at, stride, lanes, steps)
    elif stride == 1:
        for t in range(steps):
            store_first(array, at + t * strides[2], load(source, row + t * WIDTH), lanes)
    else:
        for t in range(steps):
            for lane in range(lanes):
                array[at + lane * stride + t * strides[2]] = source[row + t * WIDTH + lane]


@njit(**INLINE)
def _read_states(s, array, strides, outer, start, steps, first, count, to):
    """B or C, strides of (batch, length, d_state), of the states [first, first + count): a row of vectors a state."""
    if s.over_channels:
        at = outer * strides[0] + start * strides[1] + first * strides[2]
        for n in range(count):
            inside = first + n < s.states
            for t in range(steps):
                value = array[at + t * strides[1] + n * strides[2]] if inside else ZERO
                store(to, n * STATE_ROW + t * WIDTH, splat(value))
    else:
        lanes = min(WIDTH, s.batch - outer * WIDTH)
        at = outer * WIDTH * strides[0] + start * strides[1] + first * strides[2]
        for t in range(steps):
            for n in range(0, count, WIDTH):
                columns = min(WIDTH, s.states - first - n)
                begin = at + t * strides[1] + n
                for lane in range(lanes):  # the rows lie far apart, the processor would not foresee them
                    prefetch(array, begin + lane * strides[0] + 2 * strides[1])
                transpose(
                    array, begin, strides[0], lanes, columns, to, n * STATE_ROW + t * WIDTH, STATE_ROW, WIDTH, WIDTH
                )


@njit(**INLINE)
def _write_states(s, source, array, outer, start, steps, first, count):
    """The gradient of B or C of the states [first, first + count) to a contiguous (batch, length, d_state) array."""
    for n in range(0, count, WIDTH):
        columns = min(WIDTH, s.states - first - n)
        for t in range(steps):
            at = (start + t) * s.states + first + n
            row = n * STATE_ROW + t * WIDTH
            if s.over_channels:
                store_first(array, outer * s.length * s.states + at, total_of_each(source, row, STATE_ROW), columns)
            else:
                lanes = min(WIDTH, s.batch - outer * WIDTH)
                at += outer * WIDTH * s.length * s.states
                stride = s.length * s.states
                transpose(source, row, STATE_ROW, WIDTH, WIDTH, array, at, stride, lanes, columns)


@njit(**INLINE)
def _per_channel(s, values, stride, to, at, to_stride, count, factor):
    """Spread `count` values of each channel (channel c's begin at c * stride) to one vector a value and group."""
    for group in range(s.groups):
        for n in range(count):
            for lane in range(WIDTH):
                c = group * WIDTH + lane if s.over_channels else group
                inside = c < s.channels and n < stride
                to[at + (group * to_stride + n) * WIDTH + lane] = factor * values[c * stride + n] if inside else ZERO


@njit(**INLINE)
def _sum_per_channel(s, source, from_stride, values, stride):
    """The reverse of `_per_channel` for gradients: over the batch they are summed."""
    for group in range(s.groups):
        for n in range(stride):
            at = (group * from_stride + n) * WIDTH
            if s.over_channels:
                for lane in range(min(WIDTH, s.channels - group * WIDTH)):
                    values[(group * WIDTH + lane) * stride + n] = source[at + lane]
            else:
                values[group * stride + n] = total(load(source, at))


@njit(**INLINE)
def _move_states(s, outer, vectors, plain, inward):
    """The states of one piece, from vectors to a contiguous (batch, d_inner, d_state) array, or `inward` from it."""
    for group in range(s.groups):
        for lane in range(WIDTH):
            c = group * WIDTH + lane if s.over_channels else group
            b = outer if s.over_channels else outer * WIDTH + lane
            if b < s.batch and c < s.channels:
                for n in range(s.states):
                    at, there = (group * s.even + n) * WIDTH + lane, (b * s.channels + c) * s.states + n
                    if inward:
                        vectors[at] = plain[there]
                    else:
                        plain[there] = vectors[at]


@njit(**INLINE)
def _split(s, space):
    """The parts of the workspace that both passes use: a, skip and bias a vector each, then rows of the groups."""
    state = s.groups * s.even * WIDTH
    block = (min(BLOCK, s.even) + WIDTH) * STATE_ROW
    rows = s.groups * ROW
    a = space[:state]
    h = space[state : 2 * state]
    at = 2 * state
    skip = space[at : at + s.groups * WIDTH]
    bias = space[at + s.groups * WIDTH : at + 2 * s.groups * WIDTH]
    at += 2 * s.groups * WIDTH
    B = space[at : at + block]
    C = space[at + block : at + 2 * block]
    at += 2 * block
    u = space[at : at + rows]
    dt = space[at + rows : at + 2 * rows]
    du = space[at + 2 * rows : at + 3 * rows]
    y = space[at + 3 * rows : at + 4 * rows]
    part = space[at + 4 * rows : at + 5 * rows]
    at += 5 * rows
    z = space[at : at + ROW]
    return (a, h, skip, bias, B, C, u, dt, du, y, part, z), space[at + ROW :]


@njit(**INLINE)
def _prepare(s, u_in, u_strides, delta_in, delta_strides, outer, start, steps, bias, u, dt, du, y, part):
    """Step sizes and inputs of a chunk; y and part set to zero."""
    for group in range(s.groups):
        row = group * ROW
        _read(s, u_in, u_strides, outer, group, start, steps, u, row)
        _read(s, delta_in, delta_strides, outer, group, start, steps, dt, row)
        bias_g = load(bias, group * WIDTH)
        _, _, lanes = _place(s, u_strides, outer, group, start)
        for t in range(row, row + steps * WIDTH, WIDTH):
            dt_t = load(dt, t) + bias_g
            if s.softplus:
                dt_t = softplus(dt_t)
            dt_t = first(dt_t, lanes)  # in unused lanes the states stay 0 whatever A is
            store(dt, t, dt_t)
            store(du, t, dt_t * load(u, t))
            store(y, t, splat(ZERO))
            store(part, t, splat(ZERO))


@njit(**INLINE)
def _parameters(s, m, a, skip, bias):
    _per_channel(s, floats(m.A), s.states, a, 0, s.even, s.even, LOG2E)
    if m.delta_bias:
        _per_channel(s, floats(m.delta_bias), 1, bias, 0, 1, 1, ONE)
    else:
        fill(bias, 0, s.groups, ZERO)
    if m.D:
        _per_channel(s, floats(m.D), 1, skip, 0, 1, 1, ONE)


@kernel(_SIZES, _MEMORY, types.int64, types.int64, types.int64)
def _forward(s, m, begin, end, workspace):
    """Write out, and where asked for last_state and saved, for the outer pieces [begin, end)."""
    space = floats(workspace)
    u_in, delta_in, B_in, C_in, z_in, out = (
        *(floats(m.u), floats(m.delta), floats(m.B), floats(m.C), floats(m.z), floats(m.out)),
    )
    last_state, saved = floats(m.last_state), floats(m.saved)
    (a, h, skip, bias, B, C, u, dt, du, y, part, z), _ = _split(s, space)
    state = s.groups * s.even * WIDTH
    _parameters(s, m, a, skip, bias)
    for outer in range(begin, end):
        fill(h, 0, s.groups * s.even, ZERO)
        for chunk in range(s.chunks):
            start = chunk * CHUNK
            steps = min(CHUNK, s.length - start)
            if m.saved:
                at = (outer * s.chunks + chunk) * state
                for i in range(0, state, WIDTH):
                    store(saved, at + i, load(h, i))
            _prepare(s, u_in, m.u_strides, delta_in, m.delta_strides, outer, start, steps, bias, u, dt, du, y, part)
            for block in range(0, s.even, BLOCK):
                count = min(BLOCK, s.even - block)
                _read_states(s, B_in, m.B_strides, outer, start, steps, block, count, B)
                _read_states(s, C_in, m.C_strides, outer, start, steps, block, count, C)
                for group in range(s.groups):
                    for n in range(0, count, 2):
                        at = (group * s.even + block + n) * WIDTH
                        both = block + n + 1 < s.states
                        a0, a1 = load(a, at), load(a, at + WIDTH)
                        h0, h1 = load(h, at), load(h, at + WIDTH)
                        h0, h1 = scan_pair(steps, both, dt, du, part, group * ROW, B, C, n * STATE_ROW, a0, a1, h0, h1)
                        store(h, at, h0)
                        store(h, at + WIDTH, h1)
                        if (n + 2) % SUMMED == 0 or n + 2 == count:
                            fold(part, y, group * ROW, CHUNK)
            for group in range(s.groups):
                row = group * ROW
                if m.D:
                    D_g = load(skip, group * WIDTH)
                    for t in range(row, row + steps * WIDTH, WIDTH):
                        store(y, t, fma(D_g, load(u, t), load(y, t)))
                if m.z:
                    _read(s, z_in, m.z_strides, outer, group, start, steps, z, 0)
                    for t in range(0, steps * WIDTH, WIDTH):
                        z_t = load(z, t)
                        store(y, row + t, load(y, row + t) * z_t * sigmoid(z_t))
                _write(s, y, row, out, m.out_strides, outer, group, start, steps)
        if m.last_state:
            _move_states(s, outer, h, last_state, False)


@kernel(_SIZES, _MEMORY, _GRADIENTS, types.int64, types.int64, types.int64)
def _backward(s, m, grads, begin, end, workspace):
    """Write the gradients of `_forward` for the outer pieces [begin, end)."""
    space = floats(workspace)
    u_in, delta_in, B_in, C_in, z_in = floats(m.u), floats(m.delta), floats(m.B), floats(m.C), floats(m.z)
    grad_out, grad_last, saved = floats(m.out), floats(m.last_state), floats(m.saved)
    du_out, ddelta_out, dz_out = floats(grads.u), floats(grads.delta), floats(grads.z)
    dB_out, dC_out = floats(grads.B), floats(grads.C)
    (a, _, skip, bias, B, C, u, dt, du, y, part, z), rest = _split(s, space)
    state = s.groups * s.even * WIDTH
    block = (min(BLOCK, s.even) + WIDTH) * STATE_ROW
    rows = s.groups * ROW
    dh = rest[:state]
    sum_a = rest[state : 2 * state]
    at = 2 * state
    sum_skip = rest[at : at + s.groups * WIDTH]
    sum_bias = rest[at + s.groups * WIDTH : at + 2 * s.groups * WIDTH]
    at += 2 * s.groups * WIDTH
    dB = rest[at : at + block]
    dC = rest[at + block : at + 2 * block]
    at += 2 * block
    g = rest[at : at + rows]
    dy = rest[at + rows : at + 2 * rows]
    ddt = rest[at + 2 * rows : at + 3 * rows]
    ddu = rest[at + 3 * rows : at + 4 * rows]
    at += 4 * rows
    decay = rest[at : at + 2 * ROW]
    before = rest[at + 2 * ROW : at + 4 * ROW]
    raw = rest[at + 4 * ROW : at + 5 * ROW]
    _parameters(s, m, a, skip, bias)
    fill(sum_a, 0, s.groups * s.even, ZERO)
    fill(sum_skip, 0, s.groups, ZERO)
    fill(sum_bias, 0, s.groups, ZERO)
    for outer in range(begin, end):
        fill(dh, 0, s.groups * s.even, ZERO)
        if m.last_state:
            _move_states(s, outer, dh, grad_last, True)
        for chunk in range(s.chunks - 1, -1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, s.length - start)
            _prepare(s, u_in, m.u_strides, delta_in, m.delta_strides, outer, start, steps, bias, u, dt, du, y, part)
            for group in range(s.groups):
                row = group * ROW
                _read(s, grad_out, m.out_strides, outer, group, start, steps, g, row)
                if m.z:
                    _read(s, z_in, m.z_strides, outer, group, start, steps, z, 0)
                for t in range(0, steps * WIDTH, WIDTH):
                    dy_t = load(g, row + t)
                    if m.z:
                        z_t = load(z, t)
                        dy_t = dy_t * z_t * sigmoid(z_t)
                    store(dy, row + t, dy_t)
                    store(ddt, row + t, splat(ZERO))
                    store(ddu, row + t, splat(ZERO))
            for first_state in range(0, s.even, BLOCK):
                count = min(BLOCK, s.even - first_state)
                _read_states(s, B_in, m.B_strides, outer, start, steps, first_state, count, B)
                _read_states(s, C_in, m.C_strides, outer, start, steps, first_state, count, C)
                fill(dB, 0, count * (CHUNK + 1), ZERO)
                fill(dC, 0, count * (CHUNK + 1), ZERO)
                for group in range(s.groups):
                    for n in range(0, count, 2):
                        at = (group * s.even + first_state + n) * WIDTH
                        from_ = (outer * s.chunks + chunk) * state + at
                        dh0, dh1, da0, da1 = scan_pair_backward(
                            steps,
                            first_state + n + 1 < s.states,
                            dt,
                            du,
                            part,
                            dy,
                            ddt,
                            ddu,
                            group * ROW,
                            B,
                            C,
                            dB,
                            dC,
                            n * STATE_ROW,
                            decay,
                            before,
                            load(a, at),
                            load(a, at + WIDTH),
                            load(saved, from_),
                            load(saved, from_ + WIDTH),
                            load(dh, at),
                            load(dh, at + WIDTH),
                            load(sum_a, at),
                            load(sum_a, at + WIDTH),
                        )
                        store(dh, at, dh0)
                        store(dh, at + WIDTH, dh1)
                        store(sum_a, at, da0)
                        store(sum_a, at + WIDTH, da1)
                        if (n + 2) % SUMMED == 0 or n + 2 == count:
                            fold(part, y, group * ROW, CHUNK)
                _write_states(s, dB, dB_out, outer, start, steps, first_state, count)
                _write_states(s, dC, dC_out, outer, start, steps, first_state, count)
            for group in range(s.groups):
                row = group * ROW
                D_g = load(skip, group * WIDTH) if m.D else splat(ZERO)
                dD_g = load(sum_skip, group * WIDTH)
                if m.z:
                    _read(s, z_in, m.z_strides, outer, group, start, steps, z, 0)
                    for t in range(0, steps * WIDTH, WIDTH):
                        z_t = load(z, t)
                        gate = sigmoid(z_t)
                        y_t = fma(D_g, load(u, row + t), load(y, row + t))
                        store(z, t, load(g, row + t) * y_t * gate * fma(z_t, ONE - gate, splat(ONE)))
                    _write(s, z, 0, dz_out, grads.z_strides, outer, group, start, steps)
                if s.softplus:
                    _read(s, delta_in, m.delta_strides, outer, group, start, steps, raw, 0)
                bias_g = load(bias, group * WIDTH)
                dbias_g = load(sum_bias, group * WIDTH)
                for t in range(0, steps * WIDTH, WIDTH):
                    u_t = load(u, row + t)
                    dy_t = load(dy, row + t)
                    ddu_t = load(ddu, row + t)
                    dD_g = fma(dy_t, u_t, dD_g)
                    ddelta_t = fma(u_t, ddu_t, LN2 * load(ddt, row + t))
                    if s.softplus:
                        ddelta_t = ddelta_t * sigmoid(load(raw, t) + bias_g)
                    dbias_g = dbias_g + ddelta_t
                    store(ddt, row + t, ddelta_t)
                    store(ddu, row + t, fma(D_g, dy_t, load(dt, row + t) * ddu_t))
                store(sum_skip, group * WIDTH, dD_g)
                store(sum_bias, group * WIDTH, dbias_g)
                _write(s, ddt, row, ddelta_out, grads.delta_strides, outer, group, start, steps)
                _write(s, ddu, row, du_out, grads.u_strides, outer, group, start, steps)
    _sum_per_channel(s, sum_a, s.even, floats(grads.A), s.states)
    if m.delta_bias:
        _sum_per_channel(s, sum_bias, 1, floats(grads.delta_bias), 1)
    if m.D:
        _sum_per_channel(s, sum_skip, 1, floats(grads.D), 1)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def sizes_of(tensors: Inputs, softplus: bool) -> Sizes:
    """The sizes of a scan of these tensors, and whether a lane is a channel or a sequence."""
    u, _, A, *_ = tensors
    (batch, channels, length), states = u.shape, A.shape[1]

    # B and C are the same for all channels and cheaper to spread over them, so sequences need to fill the lanes better:
    # channels at least three quarters as well as the batch
    channel_groups, batch_groups = -(-channels // WIDTH), -(-batch // WIDTH)
    over_channels = 4 * channels * batch_groups >= 3 * batch * channel_groups
    outer, groups = (batch, channel_groups) if over_channels else (batch_groups, channels)
    return Sizes(
        *(batch, channels, length, states, int(over_channels), outer, groups, states + states % 2),
        *(-(-length // CHUNK), int(softplus)),
    )


def saved_size(s: Sizes) -> int:
    """Elements of `saved`."""
    return s.outer * s.chunks * s.groups * s.even * WIDTH


NO_STRIDES = (0, 0, 0)


def _memory(tensors: Inputs, out: Tensor, last_state: Tensor | None, saved: Tensor | None) -> Memory:
    strides = [x.stride() if x is not None else NO_STRIDES for x in (*tensors, out)]
    u, delta, _, B, C, _, z, _, out_strides = strides
    addresses = [x.data_ptr() if x is not None else 0 for x in (*tensors, out, last_state, saved)]
    return Memory(*addresses, u, delta, B, C, z, out_strides)  # type: ignore[arg-type]


def _workspace(s: Sizes, backward: bool) -> Tensor:
    """Room for what `_split` and the rest of a pass lay out."""
    state, block = s.groups * s.even, (min(BLOCK, s.even) + WIDTH) * (CHUNK + 1)
    vectors = 2 * state + 2 * s.groups + 2 * block + (5 * s.groups + 1) * CHUNK
    if backward:
        vectors += 2 * state + 2 * s.groups + 2 * block + (4 * s.groups + 5) * CHUNK
    return torch.empty(vectors * WIDTH, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


def _prepared(tensors: Inputs, s: Sizes) -> Inputs:
    """What the kernels read: the small tensors contiguous and, over sequences, B and C contiguous in states."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    if not s.over_channels:
        B, C = (x if x.stride(2) == 1 else x.contiguous() for x in (B, C))
    D, delta_bias = (x if x is None else x.contiguous() for x in (D, delta_bias))
    return u, delta, A.contiguous(), B, C, D, z, delta_bias


def run_forward(tensors: Inputs, s: Sizes, keep: bool, want_state: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Out, with `want_state` the last state, and with `keep` the states that the backward pass starts from."""
    u = tensors[0]
    out = torch.empty_like(u)
    last_state = u.new_zeros(s.batch, s.channels, s.states) if want_state else None
    saved = u.new_empty(saved_size(s)) if keep else None
    if u.numel():
        tensors = _prepared(tensors, s)
        memory = _memory(tensors, out, last_state, saved)

        def run(thread: int, first: int, last: int, _alive: object = (tensors, out, last_state, saved)) -> None:
            space = _workspace(s, backward=False)
            _forward(s, memory, first, last, space.data_ptr())

        share(run, s.outer, threads_for(s.outer, u.numel() * s.states))
    return out, last_state, saved


class _SelectiveScan(torch.autograd.Function):
    """On float32 tensors, with B and C as (batch, length, d_state)."""

    @staticmethod
    def forward(ctx: Any, softplus: bool, want_state: bool, *tensors: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.sizes = sizes_of(tensors, softplus)
        out, last_state, saved = run_forward(tensors, ctx.sizes, keep=True, want_state=want_state)
        ctx.kinds = kinds_of(tensors)
        ctx.save_for_backward(*tensors, saved)
        return out, last_state

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *tensors, saved = ctx.saved_tensors
        check_unchanged(tensors, ctx.kinds)
        return None, None, *run_backward(tuple(tensors), ctx.sizes, saved, grad_out, grad_last)


def run_backward(
    tensors: Inputs, s: Sizes, saved: Tensor, grad_out: Tensor | None, grad_last: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the eight tensors, None for those that are None."""
    u, delta, A, _, _, D, z, delta_bias = tensors
    grad_out = torch.zeros_like(u) if grad_out is None else real(grad_out)
    grad_last = grad_last if grad_last is None else real(grad_last).contiguous()
    threads = threads_for(s.outer, u.numel() * s.states)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = None if z is None else torch.empty_like(z)
    blank = u.new_empty if u.numel() else u.new_zeros  # without channels B and C have no part in anything
    dB, dC = blank(s.batch, s.length, s.states), blank(s.batch, s.length, s.states)
    dA = A.new_zeros(threads, s.channels, s.states)  # a part of the sum a thread
    dD = None if D is None else D.new_zeros(threads, s.channels)
    dbias = None if delta_bias is None else delta_bias.new_zeros(threads, s.channels)
    if u.numel():
        tensors = _prepared(tensors, s)
        memory = _memory(tensors, grad_out, grad_last, saved)

        def address(x: Tensor | None, thread: int | None = None) -> int:
            return 0 if x is None else (x if thread is None else x[thread]).data_ptr()

        alive = (tensors, grad_out, grad_last, saved, du, ddelta, dA, dB, dC, dD, dz, dbias)

        def run(thread: int, first: int, last: int, _alive: object = alive) -> None:
            grads = Gradients(
                *(address(du), address(ddelta), address(dA, thread), address(dB), address(dC)),
                *(address(dD, thread), address(dz), address(dbias, thread)),
                *(du.stride(), ddelta.stride(), NO_STRIDES if dz is None else dz.stride()),  # type: ignore[arg-type]
            )
            space = _workspace(s, backward=True)
            _backward(s, memory, grads, first, last, space.data_ptr())

        share(run, s.outer, threads)
    return (
        *(du, ddelta, dA.sum(0), dB, dC, None if dD is None else dD.sum(0), dz),
        None if dbias is None else dbias.sum(0),
    )


def check_kernels(u: Tensor, *tensors: Tensor | None, traced: bool = False) -> None:
    """Raise what `selective_scan_cpu` says, beyond `check`: the kernels read memory without bounds checks.

    traced: the tensors may be stand-ins, of which only the shapes are real.
    """
    for name, x in zip(NAMES, (u, *tensors), strict=True):
        if x is None:
            continue
        if not traced and type(x) not in PLAIN:
            raise TypeError(f"{name} is a {type(x).__name__}: the kernels need a tensor's memory")
        if x.dtype == torch.float64:
            raise TypeError(f"{name} is {x.dtype}: the CPU scan computes in float32, only the reference in float64")
    if not u.is_cpu:
        raise ValueError(f"the tensors are on {u.device}, not the CPU")


def selective_scan_cpu(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_reference` in float32, with the same arguments, shapes, results and errors (see there).

    The last state is differentiable, too. Any strides are accepted; B and C cost no copy as transposed views of
    (batch, length, d_state) tensors, the other tensors none when contiguous. A kernel is called for each range of
    channels that share B and C: one where these have three dimensions, one a channel where they are constant in time.

    Raises:
        TypeError: also where a tensor is float64, or of a subclass of Tensor.
        ValueError: also where the tensors are not on the CPU.
    """
    check(u, delta, A, B, C, D, z, delta_bias)
    check_kernels(u, delta, A, B, C, D, z, delta_bias)
    if B.ndim != 3 or C.ndim != 3:
        options = (delta_softplus, return_last_state)
        return by_ranges(selective_scan_cpu, u, delta, A, B, C, D, z, delta_bias, *options)
    tensors = (u, delta, A, B.transpose(1, 2), C.transpose(1, 2), D, z, delta_bias)
    inputs: Any = tuple(None if x is None else real(x).float() for x in tensors)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        out, last_state = _SelectiveScan.apply(delta_softplus, return_last_state, *inputs)
    else:
        sizes = sizes_of(inputs, delta_softplus)
        out, last_state, _ = run_forward(inputs, sizes, keep=False, want_state=return_last_state)
    out = out.to(u.dtype)
    return (out, last_state) if return_last_state else out
