"""The scan itself: two states of 16 sequences through one chunk of steps, forward and backward, for the CPU kernels.

A kernel prepares a chunk as rows of vectors, `CHUNK` of them a row (`ROW` floats), one vector a step:

    dt, du   step size and step size * input      y     output before skip and gate, added to
    B, C     of two states, two rows              dy, ddt, ddu, dB, dC   gradients, all but dy added to

What a lane stands for is the kernel's choice: sequences of the batch, or channels of one sequence.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

from numba import njit

from pkd_lightning.kernels.lanes import INLINE, WIDTH, ZERO, exp2, fma, load, splat, store

CHUNK = 16  # steps between saved states; what a chunk needs then fits into the cache next to the core
SUMMED = 32  # states summed up at once
ROW = CHUNK * WIDTH
STATE_ROW = ROW + WIDTH  # of B and C: rows a power of two apart would compete for the same places of the cache


@njit(**INLINE)
def fill(array, begin, vectors, value):
    """Set `vectors` vectors to `value`."""
    for i in range(begin, begin + vectors * WIDTH, WIDTH):
        store(array, i, splat(value))


@njit(**INLINE)
def fold(part, y, begin, vectors):
    """Add `part` to y and set it to zero: sums of at most `SUMMED` states, then of these, round less than one sum."""
    for i in range(begin, begin + vectors * WIDTH, WIDTH):
        store(y, i, load(y, i) + load(part, i))
        store(part, i, splat(ZERO))


@njit(**INLINE)
def scan_pair(steps, both, dt, du, y, row, B, C, pair, a0, a1, h0, h1):
    """Step by step h <- 2^(dt * a) * h + du * B and y += h * C; returns the states after the chunk.

    a: A * log2(e) of the two states; row: where the channel's row begins in dt, du and y; pair: the two in B and C.
    both: whether the second of them is a state; it is none where their number is odd, and must not add 0 * inf then.
    """
    for t in range(0, steps * WIDTH, WIDTH):
        dt_t = load(dt, row + t)
        du_t = load(du, row + t)
        h0 = fma(exp2(dt_t * a0), h0, du_t * load(B, pair + t))
        h1 = fma(exp2(dt_t * a1), h1, du_t * load(B, pair + STATE_ROW + t))
        y_t = h0 * load(C, pair + t)
        if both:
            y_t = fma(h1, load(C, pair + STATE_ROW + t), y_t)
        store(y, row + t, load(y, row + t) + y_t)
    return h0, h1


@njit(**INLINE)
def scan_pair_backward(
    steps, both, dt, du, y, dy, ddt, ddu, row, B, C, dB, dC, pair, decay, before, a0, a1, h0, h1, dh0, dh1, da0, da1
):
    """The gradients of `scan_pair`, from the states h before the chunk and the gradients dh of those after it.

    Computes the chunk's states and y again (decay and before: two rows each of room for that). Returns the gradients
    of the states before the chunk, and da plus those of A. The gradient of dt is LN2 * ddt.
    """
    for t in range(0, steps * WIDTH, WIDTH):
        dt_t = load(dt, row + t)
        du_t = load(du, row + t)
        store(before, t, h0)
        store(before, ROW + t, h1)
        decay0 = exp2(dt_t * a0)
        decay1 = exp2(dt_t * a1)
        store(decay, t, decay0)
        store(decay, ROW + t, decay1)
        h0 = fma(decay0, h0, du_t * load(B, pair + t))
        h1 = fma(decay1, h1, du_t * load(B, pair + STATE_ROW + t))
        y_t = h0 * load(C, pair + t)
        if both:
            y_t = fma(h1, load(C, pair + STATE_ROW + t), y_t)
        store(y, row + t, load(y, row + t) + y_t)
    for t in range((steps - 1) * WIDTH, -1, -WIDTH):
        dt_t = load(dt, row + t)
        du_t = load(du, row + t)
        dy_t = load(dy, row + t)
        store(dC, pair + t, fma(dy_t, h0, load(dC, pair + t)))
        store(dC, pair + STATE_ROW + t, fma(dy_t, h1, load(dC, pair + STATE_ROW + t)))
        dh0 = fma(dy_t, load(C, pair + t), dh0)
        dh1 = fma(dy_t, load(C, pair + STATE_ROW + t), dh1)
        store(dB, pair + t, fma(du_t, dh0, load(dB, pair + t)))
        store(dB, pair + STATE_ROW + t, fma(du_t, dh1, load(dB, pair + STATE_ROW + t)))
        ddu_t = fma(dh0, load(B, pair + t), load(ddu, row + t))
        if both:
            ddu_t = fma(dh1, load(B, pair + STATE_ROW + t), ddu_t)
        store(ddu, row + t, ddu_t)
        dh0 = dh0 * load(decay, t)
        dh1 = dh1 * load(decay, ROW + t)
        h0 = load(before, t)
        h1 = load(before, ROW + t)
        e0 = dh0 * h0  # of dt * A
        e1 = dh1 * h1
        da0 = fma(dt_t, e0, da0)
        da1 = fma(dt_t, e1, da1)
        ddt_t = fma(a0, e0, load(ddt, row + t))
        if both:
            ddt_t = fma(a1, e1, ddt_t)
        store(ddt, row + t, ddt_t)
    return dh0, dh1, da0, da1
