"""The register floor of the scan: the exponentials and multiply-adds of its state updates, without any memory.

No implementation with this exponential can be faster on one core of this machine: it has to do the same arithmetic, and
reads and writes sequences besides.
"""

from collections.abc import Callable
from math import ceil

import torch
from numba import types

from pkd_lightning.kernels.lanes import WIDTH, exp2, f32, floats, fma, kernel, load, splat, store

CHAINS = 4  # states updated side by side, so that no update waits for the one before

# What changes from step to step, so that nothing can be computed once before the loop.
_DRIFT = f32(1e-6)


@kernel(types.int64, types.int64)
def _forward(steps, memory):
    """`scan_pair` of `CHAINS` states, B = a; memory: vectors of a, and room for what keeps the work from vanishing."""
    m = floats(memory)
    a0, a1, a2, a3 = load(m, 0), load(m, WIDTH), load(m, 2 * WIDTH), load(m, 3 * WIDTH)
    C = load(m, 4 * WIDTH)
    h0 = h1 = h2 = h3 = y = splat(f32(0.0))
    dt, du = load(m, 5 * WIDTH), load(m, 6 * WIDTH)
    for _ in range(steps):
        h0 = fma(exp2(dt * a0), h0, du * a0)
        h1 = fma(exp2(dt * a1), h1, du * a1)
        h2 = fma(exp2(dt * a2), h2, du * a2)
        h3 = fma(exp2(dt * a3), h3, du * a3)
        y = fma(h3, C, fma(h2, C, fma(h1, C, fma(h0, C, y))))
        dt = dt + _DRIFT
        du = du + _DRIFT
    store(m, 7 * WIDTH, y)


@kernel(types.int64, types.int64)
def _backward(steps, memory):
    """`scan_pair_backward` of two states, its two loops in one: 8 more multiplications and multiply-adds a state."""
    m = floats(memory)
    a0, a1 = load(m, 0), load(m, WIDTH)
    C, dy = load(m, 4 * WIDTH), load(m, 4 * WIDTH)
    dt, du = load(m, 5 * WIDTH), load(m, 6 * WIDTH)
    h0 = h1 = dh0 = dh1 = da0 = da1 = splat(f32(0.0))
    y = dB = dC = ddt = ddu = splat(f32(0.0))
    for _ in range(steps):
        decay0 = exp2(dt * a0)
        decay1 = exp2(dt * a1)
        h0 = fma(decay0, h0, du * a0)
        h1 = fma(decay1, h1, du * a1)
        y = fma(h1, C, fma(h0, C, y))
        dC = fma(dy, h1, fma(dy, h0, dC))
        dh0 = fma(dy, C, dh0)
        dh1 = fma(dy, C, dh1)
        dB = fma(du, dh1, fma(du, dh0, dB))
        ddu = fma(dh1, a1, fma(dh0, a0, ddu))
        dh0 = dh0 * decay0
        dh1 = dh1 * decay1
        e0 = dh0 * h0
        e1 = dh1 * h1
        da0 = fma(dt, e0, da0)
        da1 = fma(dt, e1, da1)
        ddt = fma(a1, e1, fma(a0, e0, ddt))
        dt = dt + _DRIFT
        du = du + _DRIFT
        dy = dy + _DRIFT
    store(m, 7 * WIDTH, y + dB + dC + ddt + ddu + da0 + da1)


def floor(updates: int, backward: bool) -> Callable[[], object]:
    """A call that takes the least time of a scan of so many state updates (batch * length * d_inner * d_state)."""
    memory = torch.full((8, WIDTH), 0.5)
    memory[:4] = -torch.linspace(0.5, 2.0, 4 * WIDTH).view(4, WIDTH)  # a
    address = memory.data_ptr()
    vectors = updates / WIDTH

    def call() -> object:
        _forward(ceil(vectors / CHAINS), address)
        if backward:
            _backward(ceil(vectors / 2), address)
        return memory  # which the kernels write to: it lives as long as the call

    return call
