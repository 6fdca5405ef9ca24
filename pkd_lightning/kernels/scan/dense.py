"""Projections of rows of vectors and their gradients, in tiles of registers: each value loaded serves several outputs.

A row holds one vector a step. A tile is four rows by four: on AVX-512 its 16 sums stay in registers, and a
multiply-add needs half a load. Other processors have too few registers for that and work row by row.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

from numba import int64, njit

from pkd_lightning.kernels.lanes import APART, INLINE, MANY_REGISTERS, WIDTH, ZERO, fma, load, splat, spread, store

AT_ONCE = 4  # steps of a projection worked on together


@njit(**INLINE)
def project(w, begin, by_output, by_input, outputs, inputs, source, source_row, to, to_row, steps, add):
    """to[o] = the sum over i of w[begin + o * by_output + i * by_input] * source[i], rows of `steps` vectors.

    With `add`, plus what to[o] was. Works on `AT_ONCE` steps at a time, beyond `steps` too.
    """
    # as plain integers, else numba compiles the function anew for each constant
    strides = int64(begin), int64(by_output), int64(by_input)
    _project(w, strides, outputs, int64(inputs), source, int64(source_row), to, int64(to_row), steps, int64(add))


@njit(**APART)
def _project(w, strides, outputs, inputs, source, source_row, to, to_row, steps, add):
    begin, by_output, by_input = strides
    o = 0
    while MANY_REGISTERS and o + 4 <= outputs:
        for t in range(0, steps * WIDTH, AT_ONCE * WIDTH):
            at = o * to_row + t
            a0, a1, a2, a3 = _begin(to, at, add)
            b0, b1, b2, b3 = _begin(to, at + to_row, add)
            c0, c1, c2, c3 = _begin(to, at + 2 * to_row, add)
            d0, d1, d2, d3 = _begin(to, at + 3 * to_row, add)
            weight, from_ = begin + o * by_output, t
            for _ in range(inputs):
                x0, x1 = load(source, from_), load(source, from_ + WIDTH)
                x2, x3 = load(source, from_ + 2 * WIDTH), load(source, from_ + 3 * WIDTH)
                k = spread(w, weight)
                a0, a1, a2, a3 = fma(k, x0, a0), fma(k, x1, a1), fma(k, x2, a2), fma(k, x3, a3)
                k = spread(w, weight + by_output)
                b0, b1, b2, b3 = fma(k, x0, b0), fma(k, x1, b1), fma(k, x2, b2), fma(k, x3, b3)
                k = spread(w, weight + 2 * by_output)
                c0, c1, c2, c3 = fma(k, x0, c0), fma(k, x1, c1), fma(k, x2, c2), fma(k, x3, c3)
                k = spread(w, weight + 3 * by_output)
                d0, d1, d2, d3 = fma(k, x0, d0), fma(k, x1, d1), fma(k, x2, d2), fma(k, x3, d3)
                weight += by_input
                from_ += source_row
            _end(to, at, a0, a1, a2, a3)
            _end(to, at + to_row, b0, b1, b2, b3)
            _end(to, at + 2 * to_row, c0, c1, c2, c3)
            _end(to, at + 3 * to_row, d0, d1, d2, d3)
        o += 4
    while o < outputs:
        for t in range(0, steps * WIDTH, AT_ONCE * WIDTH):
            a0, a1, a2, a3 = _begin(to, o * to_row + t, add)
            weight, from_ = begin + o * by_output, t
            for _ in range(inputs):
                k = spread(w, weight)
                a0, a1 = fma(k, load(source, from_), a0), fma(k, load(source, from_ + WIDTH), a1)
                a2 = fma(k, load(source, from_ + 2 * WIDTH), a2)
                a3 = fma(k, load(source, from_ + 3 * WIDTH), a3)
                weight += by_input
                from_ += source_row
            _end(to, o * to_row + t, a0, a1, a2, a3)
        o += 1


@njit(**INLINE)
def _begin(to, at, add):
    """The four vectors from `at` on with `add`, else zeros."""
    if add:
        return load(to, at), load(to, at + WIDTH), load(to, at + 2 * WIDTH), load(to, at + 3 * WIDTH)
    return splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)


@njit(**INLINE)
def _end(to, at, v0, v1, v2, v3):
    store(to, at, v0)
    store(to, at + WIDTH, v1)
    store(to, at + 2 * WIDTH, v2)
    store(to, at + 3 * WIDTH, v3)


@njit(**INLINE)
def outer(sums, begin, by_a, by_b, a_rows, b_rows, a, a_row, b, b_row, steps):
    """sums[begin + i * by_a + j * by_b] += a[i] * b[j], summed over the steps of a chunk; a sum per lane."""
    strides, rows = (begin, int64(by_a), int64(by_b)), (int64(a_rows), int64(b_rows))
    _outer(sums, strides, rows, a, int64(a_row), b, int64(b_row), steps)


@njit(**APART)
def _outer(sums, strides, rows, a, a_row, b, b_row, steps):
    begin, by_a, by_b = strides
    a_rows, b_rows = rows
    i = 0
    while MANY_REGISTERS and i + 4 <= a_rows:
        j = 0
        while j + 4 <= b_rows:
            _outer_tile(sums, (begin + i * by_a + j * by_b) * WIDTH, by_a * WIDTH, by_b * WIDTH,
                        a, i * a_row, a_row, b, j * b_row, b_row, steps)  # fmt: skip
            j += 4
        while j < b_rows:
            at = (begin + i * by_a + j * by_b) * WIDTH
            _outer_line(sums, at, by_a * WIDTH, b, j * b_row, a, i * a_row, a_row, steps)
            j += 1
        i += 4
    while i < a_rows:
        j = 0
        while j + 4 <= b_rows:
            at = (begin + i * by_a + j * by_b) * WIDTH
            _outer_line(sums, at, by_b * WIDTH, a, i * a_row, b, j * b_row, b_row, steps)
            j += 4
        while j < b_rows:
            at = (begin + i * by_a + j * by_b) * WIDTH
            value = load(sums, at)
            for t in range(0, steps * WIDTH, WIDTH):
                value = fma(load(a, i * a_row + t), load(b, j * b_row + t), value)
            store(sums, at, value)
            j += 1
        i += 1


@njit(**INLINE)
def _outer_tile(sums, at, down, right, a, a_at, a_row, b, b_at, b_row, steps):
    """Four rows of `a` by four of `b`."""
    s00, s01, s02, s03 = _sums(sums, at, right)
    s10, s11, s12, s13 = _sums(sums, at + down, right)
    s20, s21, s22, s23 = _sums(sums, at + 2 * down, right)
    s30, s31, s32, s33 = _sums(sums, at + 3 * down, right)
    for t in range(0, steps * WIDTH, WIDTH):
        p = b_at + t
        b0, b1, b2, b3 = load(b, p), load(b, p + b_row), load(b, p + 2 * b_row), load(b, p + 3 * b_row)
        x = load(a, a_at + t)
        s00, s01, s02, s03 = fma(x, b0, s00), fma(x, b1, s01), fma(x, b2, s02), fma(x, b3, s03)
        x = load(a, a_at + a_row + t)
        s10, s11, s12, s13 = fma(x, b0, s10), fma(x, b1, s11), fma(x, b2, s12), fma(x, b3, s13)
        x = load(a, a_at + 2 * a_row + t)
        s20, s21, s22, s23 = fma(x, b0, s20), fma(x, b1, s21), fma(x, b2, s22), fma(x, b3, s23)
        x = load(a, a_at + 3 * a_row + t)
        s30, s31, s32, s33 = fma(x, b0, s30), fma(x, b1, s31), fma(x, b2, s32), fma(x, b3, s33)
    _put(sums, at, right, s00, s01, s02, s03)
    _put(sums, at + down, right, s10, s11, s12, s13)
    _put(sums, at + 2 * down, right, s20, s21, s22, s23)
    _put(sums, at + 3 * down, right, s30, s31, s32, s33)


@njit(**INLINE)
def _outer_line(sums, at, next_, a, a_at, b, b_at, b_row, steps):
    """One row of `a` by four of `b`."""
    s0, s1, s2, s3 = _sums(sums, at, next_)
    for t in range(0, steps * WIDTH, WIDTH):
        x, p = load(a, a_at + t), b_at + t
        s0, s1 = fma(x, load(b, p), s0), fma(x, load(b, p + b_row), s1)
        s2, s3 = fma(x, load(b, p + 2 * b_row), s2), fma(x, load(b, p + 3 * b_row), s3)
    _put(sums, at, next_, s0, s1, s2, s3)


@njit(**INLINE)
def _sums(sums, at, next_):
    return load(sums, at), load(sums, at + next_), load(sums, at + 2 * next_), load(sums, at + 3 * next_)


@njit(**INLINE)
def _put(sums, at, next_, v0, v1, v2, v3):
    store(sums, at, v0)
    store(sums, at + next_, v1)
    store(sums, at + 2 * next_, v2)
    store(sums, at + 3 * next_, v3)
