"""The scan itself: two states of 16 sequences through one chunk of steps, forward and backward, for the CPU kernels.

A kernel prepares a chunk as rows of vectors, `CHUNK` of them a row (`ROW` floats), one vector a step:

    dt, du   step size and step size * input      y     output before skip and gate, added to
    B, C     of two states, two rows              dy, ddt, ddu, dB, dC   gradients, all but dy added to

What a lane stands for is the kernel's choice: sequences of the batch, or channels of one sequence.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

from numba import njit

from pkd_lightning.kernels.lanes import INLINE, WIDTH, ZERO, exp2, exp2_falling, fma, load, splat, spread, store

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


@njit(**INLINE)
def scan_tile(steps, both, two, dt, du, y, row, B, C, pair, a, a_at, even, h, h_at):
    """`scan_pair` of two channels at once, the rows `row` and the next, so that their work overlaps.

    a: as numbers, states apart 1 and channels `even`, none positive; h: their states, left as those after the chunk.
    two: whether the second channel is one; without, the first stands in for it and nothing of it is kept.
    """
    next_ = even if two else 0
    a00, a01 = spread(a, a_at), spread(a, a_at + 1)
    a10, a11 = spread(a, a_at + next_), spread(a, a_at + next_ + 1)
    h_next = h_at + next_ * WIDTH
    h00, h01, h10, h11 = load(h, h_at), load(h, h_at + WIDTH), load(h, h_next), load(h, h_next + WIDTH)
    row1 = row + ROW if two else row
    for t in range(0, steps * WIDTH, WIDTH):
        dt0, dt1 = load(dt, row + t), load(dt, row1 + t)
        du0, du1 = load(du, row + t), load(du, row1 + t)
        B0, B1 = load(B, pair + t), load(B, pair + STATE_ROW + t)
        C0, C1 = load(C, pair + t), load(C, pair + STATE_ROW + t)
        e00, e01, e10, e11 = exp2_falling(dt0 * a00, dt0 * a01, dt1 * a10, dt1 * a11)
        h00, h01 = fma(e00, h00, du0 * B0), fma(e01, h01, du0 * B1)
        h10, h11 = fma(e10, h10, du1 * B0), fma(e11, h11, du1 * B1)
        y0, y1 = h00 * C0, h10 * C0
        if both:
            y0, y1 = fma(h01, C1, y0), fma(h11, C1, y1)
        store(y, row + t, load(y, row + t) + y0)
        if two:
            store(y, row1 + t, load(y, row1 + t) + y1)
    store(h, h_at, h00)
    store(h, h_at + WIDTH, h01)
    if two:
        store(h, h_next, h10)
        store(h, h_next + WIDTH, h11)


@njit(**INLINE)
def scan_tile_backward(
    steps, both, two, dt, du, y, dy, ddt, ddu, row, B, C, dB, dC, pair, room, a, a_at, even, h, h_from, dh, da, at
):
    """The gradients of `scan_tile`, from the states h before the chunk and the gradients dh of those after it.

    As `scan_pair_backward`; room: of eight rows, for states and decays. dh becomes the gradient of the states before
    the chunk, da is added to; both lie from `at` on as h does from `h_from` on.
    """
    next_ = even if two else 0
    a00, a01 = spread(a, a_at), spread(a, a_at + 1)
    a10, a11 = spread(a, a_at + next_), spread(a, a_at + next_ + 1)
    row1 = row + ROW if two else row
    next_ *= WIDTH
    h00, h01 = load(h, h_from), load(h, h_from + WIDTH)
    h10, h11 = load(h, h_from + next_), load(h, h_from + next_ + WIDTH)
    for t in range(0, steps * WIDTH, WIDTH):
        dt0, dt1 = load(dt, row + t), load(dt, row1 + t)
        du0, du1 = load(du, row + t), load(du, row1 + t)
        B0, B1 = load(B, pair + t), load(B, pair + STATE_ROW + t)
        r = 8 * t
        store(room, r, h00)
        store(room, r + WIDTH, h01)
        store(room, r + 2 * WIDTH, h10)
        store(room, r + 3 * WIDTH, h11)
        e00, e01, e10, e11 = exp2_falling(dt0 * a00, dt0 * a01, dt1 * a10, dt1 * a11)
        store(room, r + 4 * WIDTH, e00)
        store(room, r + 5 * WIDTH, e01)
        store(room, r + 6 * WIDTH, e10)
        store(room, r + 7 * WIDTH, e11)
        h00, h01 = fma(e00, h00, du0 * B0), fma(e01, h01, du0 * B1)
        h10, h11 = fma(e10, h10, du1 * B0), fma(e11, h11, du1 * B1)
        C0, C1 = load(C, pair + t), load(C, pair + STATE_ROW + t)
        y0, y1 = h00 * C0, h10 * C0
        if both:
            y0, y1 = fma(h01, C1, y0), fma(h11, C1, y1)
        store(y, row + t, load(y, row + t) + y0)
        if two:
            store(y, row1 + t, load(y, row1 + t) + y1)
    dh00, dh01 = load(dh, at), load(dh, at + WIDTH)
    dh10, dh11 = load(dh, at + next_), load(dh, at + next_ + WIDTH)
    da00, da01 = load(da, at), load(da, at + WIDTH)
    da10, da11 = load(da, at + next_), load(da, at + next_ + WIDTH)
    for t in range((steps - 1) * WIDTH, -1, -WIDTH):
        dt0, dt1 = load(dt, row + t), load(dt, row1 + t)
        du0, du1 = load(du, row + t), load(du, row1 + t)
        dy0, dy1 = load(dy, row + t), load(dy, row1 + t)
        B0, B1 = load(B, pair + t), load(B, pair + STATE_ROW + t)
        C0, C1 = load(C, pair + t), load(C, pair + STATE_ROW + t)
        dh00, dh01 = fma(dy0, C0, dh00), fma(dy0, C1, dh01)
        dh10, dh11 = fma(dy1, C0, dh10), fma(dy1, C1, dh11)
        dC0, dC1 = fma(dy0, h00, load(dC, pair + t)), fma(dy0, h01, load(dC, pair + STATE_ROW + t))
        dB0, dB1 = fma(du0, dh00, load(dB, pair + t)), fma(du0, dh01, load(dB, pair + STATE_ROW + t))
        ddu0, ddu1 = fma(dh00, B0, load(ddu, row + t)), fma(dh10, B0, load(ddu, row1 + t))
        if two:
            dC0, dC1 = fma(dy1, h10, dC0), fma(dy1, h11, dC1)
            dB0, dB1 = fma(du1, dh10, dB0), fma(du1, dh11, dB1)
        if both:
            ddu0, ddu1 = fma(dh01, B1, ddu0), fma(dh11, B1, ddu1)
        store(dC, pair + t, dC0)
        store(dC, pair + STATE_ROW + t, dC1)
        store(dB, pair + t, dB0)
        store(dB, pair + STATE_ROW + t, dB1)
        r = 8 * t
        h00, h01, h10, h11 = (
            load(room, r),
            load(room, r + WIDTH),
            load(room, r + 2 * WIDTH),
            load(room, r + 3 * WIDTH),
        )
        dh00, dh01 = dh00 * load(room, r + 4 * WIDTH), dh01 * load(room, r + 5 * WIDTH)
        dh10, dh11 = dh10 * load(room, r + 6 * WIDTH), dh11 * load(room, r + 7 * WIDTH)
        e00, e01, e10, e11 = dh00 * h00, dh01 * h01, dh10 * h10, dh11 * h11  # of dt * A
        da00, da01 = fma(dt0, e00, da00), fma(dt0, e01, da01)
        da10, da11 = fma(dt1, e10, da10), fma(dt1, e11, da11)
        ddt0, ddt1 = fma(a00, e00, load(ddt, row + t)), fma(a10, e10, load(ddt, row1 + t))
        if both:
            ddt0, ddt1 = fma(a01, e01, ddt0), fma(a11, e11, ddt1)
        store(ddu, row + t, ddu0)
        store(ddt, row + t, ddt0)
        if two:
            store(ddu, row1 + t, ddu1)
            store(ddt, row1 + t, ddt1)
    store(dh, at, dh00)
    store(dh, at + WIDTH, dh01)
    store(da, at, da00)
    store(da, at + WIDTH, da01)
    if two:
        store(dh, at + next_, dh10)
        store(dh, at + next_ + WIDTH, dh11)
        store(da, at + next_, da10)
        store(da, at + next_ + WIDTH, da11)
