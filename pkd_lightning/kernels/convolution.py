"""Convolutions whose 16 lanes are 16 images, and their gradients, in tiles of registers.

Planes lie as [channel][row][column] of vectors; `by` are the strides of a channel and of a row.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"

from numba import njit

from pkd_lightning.kernels.lanes import APART, INLINE, WIDTH, ZERO, fma, load, splat, spread, store, transpose
from pkd_lightning.kernels.scan.states import fill


@njit(**APART)
def convolve(w, weights, bias, channels, size, stride, outputs, rows, columns, source, by, to, begin, to_by):
    """A convolution of source, vectors at strides `by` of (channel, row), to `to`, at strides `to_by` of the same.

    Weights (outputs, channels, size, size). Four outputs by four columns at once.
    """
    taps = channels * size * size
    next_ = stride * WIDTH
    o = 0
    while o < outputs:
        four = o + 4 <= outputs
        for r in range(rows):
            for c in range(0, columns, 4):
                at, left = begin + o * to_by[0] + r * to_by[1] + c * WIDTH, columns - c
                a0 = spread(w, bias + o)
                a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
                c0, c1, c2, c3, d0, d1, d2, d3 = a0, a0, a0, a0, a0, a0, a0, a0
                weight = weights + o * taps
                if four:
                    b0, c0, d0 = spread(w, bias + o + 1), spread(w, bias + o + 2), spread(w, bias + o + 3)
                    b1, b2, b3, c1, c2, c3, d1, d2, d3 = b0, b0, b0, c0, c0, c0, d0, d0, d0
                    for i in range(channels):
                        for y in range(size):
                            from_ = i * by[0] + (r * stride + y) * by[1] + c * next_
                            for _ in range(size):
                                x0, x1 = load(source, from_), load(source, from_ + next_)
                                x2, x3 = load(source, from_ + 2 * next_), load(source, from_ + 3 * next_)
                                v = spread(w, weight)
                                a0, a1, a2, a3 = fma(v, x0, a0), fma(v, x1, a1), fma(v, x2, a2), fma(v, x3, a3)
                                v = spread(w, weight + taps)
                                b0, b1, b2, b3 = fma(v, x0, b0), fma(v, x1, b1), fma(v, x2, b2), fma(v, x3, b3)
                                v = spread(w, weight + 2 * taps)
                                c0, c1, c2, c3 = fma(v, x0, c0), fma(v, x1, c1), fma(v, x2, c2), fma(v, x3, c3)
                                v = spread(w, weight + 3 * taps)
                                d0, d1, d2, d3 = fma(v, x0, d0), fma(v, x1, d1), fma(v, x2, d2), fma(v, x3, d3)
                                weight += 1
                                from_ += WIDTH
                    put(to, at + to_by[0], left, b0, b1, b2, b3)
                    put(to, at + 2 * to_by[0], left, c0, c1, c2, c3)
                    put(to, at + 3 * to_by[0], left, d0, d1, d2, d3)
                else:
                    for i in range(channels):
                        for y in range(size):
                            from_ = i * by[0] + (r * stride + y) * by[1] + c * next_
                            for _ in range(size):
                                v = spread(w, weight)
                                a0, a1 = fma(v, load(source, from_), a0), fma(v, load(source, from_ + next_), a1)
                                a2 = fma(v, load(source, from_ + 2 * next_), a2)
                                a3 = fma(v, load(source, from_ + 3 * next_), a3)
                                weight += 1
                                from_ += WIDTH
                put(to, at, left, a0, a1, a2, a3)
        o += 4 if four else 1


@njit(**INLINE)
def put(to, at, left, v0, v1, v2, v3):
    """Up to four vectors, of which `left` are wanted."""
    store(to, at, v0)
    if left > 1:
        store(to, at + WIDTH, v1)
    if left > 2:
        store(to, at + 2 * WIDTH, v2)
    if left > 3:
        store(to, at + 3 * WIDTH, v3)


@njit(**INLINE)
def planes(images, at, channels, height, width, padding, lanes, to):
    """16 images of (N, channels, height, width) from `at` on as vectors, each plane with a rim of zeros."""
    stride, row = channels * height * width, width + 2 * padding
    plane = (height + 2 * padding) * row
    if padding:
        fill(to, 0, channels * plane, ZERO)
    for c in range(channels):
        for y in range(height):
            begin = (c * plane + (y + padding) * row + padding) * WIDTH
            for x in range(0, width, WIDTH):
                count = min(WIDTH, width - x)
                transpose(images, at + x, stride, lanes, count, to, begin + x * WIDTH, WIDTH, count, WIDTH)
            at += width


@njit(**INLINE)
def _offset(tap, size, by):
    """Where the source of a tap (channel, row, column) of a kernel lies, from that of the first."""
    return tap // (size * size) * by[0] + tap // size % size * by[1] + tap % size * WIDTH


@njit(**APART)
def convolve_weights(sums, begin, channels, size, stride, outputs, rows, columns, source, by, g, at, g_by):
    """The gradient of `convolve`'s weights, a sum per lane: sums[begin + weight] += g * source, over all positions.

    g: gradient of the result, from `at` on, at strides `g_by`. Four outputs by four taps at once.
    """
    taps, last = channels * size * size, channels * size * size - 1
    next_ = stride * WIDTH
    for o in range(0, outputs, 4):
        g0 = at + o * g_by[0]
        g1, g2 = at + min(o + 1, outputs - 1) * g_by[0], at + min(o + 2, outputs - 1) * g_by[0]
        g3 = at + min(o + 3, outputs - 1) * g_by[0]
        for tap in range(0, taps, 4):
            f0, f1 = _offset(tap, size, by), _offset(min(tap + 1, last), size, by)
            f2, f3 = _offset(min(tap + 2, last), size, by), _offset(min(tap + 3, last), size, by)
            a0 = splat(ZERO)
            a1, a2, a3, b0, b1, b2, b3, c0 = a0, a0, a0, a0, a0, a0, a0, a0
            c1, c2, c3, d0, d1, d2, d3 = a0, a0, a0, a0, a0, a0, a0
            for r in range(rows):
                p, q = r * g_by[1], r * stride * by[1]
                for _ in range(columns):
                    x0, x1, x2, x3 = (
                        load(source, f0 + q),
                        load(source, f1 + q),
                        load(source, f2 + q),
                        load(source, f3 + q),
                    )
                    v = load(g, g0 + p)
                    a0, a1, a2, a3 = fma(v, x0, a0), fma(v, x1, a1), fma(v, x2, a2), fma(v, x3, a3)
                    v = load(g, g1 + p)
                    b0, b1, b2, b3 = fma(v, x0, b0), fma(v, x1, b1), fma(v, x2, b2), fma(v, x3, b3)
                    v = load(g, g2 + p)
                    c0, c1, c2, c3 = fma(v, x0, c0), fma(v, x1, c1), fma(v, x2, c2), fma(v, x3, c3)
                    v = load(g, g3 + p)
                    d0, d1, d2, d3 = fma(v, x0, d0), fma(v, x1, d1), fma(v, x2, d2), fma(v, x3, d3)
                    p += WIDTH
                    q += next_
            to, row, left = (begin + o * taps + tap) * WIDTH, taps * WIDTH, taps - tap
            _add(sums, to, WIDTH, left, a0, a1, a2, a3)
            if o + 1 < outputs:
                _add(sums, to + row, WIDTH, left, b0, b1, b2, b3)
            if o + 2 < outputs:
                _add(sums, to + 2 * row, WIDTH, left, c0, c1, c2, c3)
            if o + 3 < outputs:
                _add(sums, to + 3 * row, WIDTH, left, d0, d1, d2, d3)


@njit(**APART)
def convolve_back(w, weights, channels, size, stride, outputs, rows, columns, g, g_by, to, by):
    """The gradient of `convolve`'s source is added to `to`, at strides `by`. Four channels by four columns at once.

    g: gradient of the result, from its start on, at strides `g_by`; read up to three vectors beyond its end.
    """
    square = size * size
    next_ = stride * WIDTH
    for r in range(rows):
        for c in range(0, columns, 4):
            left = columns - c
            for i in range(0, channels, 4):
                w1, w2 = min(1, channels - 1 - i) * square, min(2, channels - 1 - i) * square
                w3 = min(3, channels - 1 - i) * square
                for tap in range(square):
                    a0 = splat(ZERO)
                    a1, a2, a3, b0, b1, b2, b3, c0 = a0, a0, a0, a0, a0, a0, a0, a0
                    c1, c2, c3, d0, d1, d2, d3 = a0, a0, a0, a0, a0, a0, a0
                    weight, from_ = weights + i * square + tap, r * g_by[1] + c * WIDTH
                    for _ in range(outputs):
                        x0, x1 = load(g, from_), load(g, from_ + WIDTH)
                        x2, x3 = load(g, from_ + 2 * WIDTH), load(g, from_ + 3 * WIDTH)
                        v = spread(w, weight)
                        a0, a1, a2, a3 = fma(v, x0, a0), fma(v, x1, a1), fma(v, x2, a2), fma(v, x3, a3)
                        v = spread(w, weight + w1)
                        b0, b1, b2, b3 = fma(v, x0, b0), fma(v, x1, b1), fma(v, x2, b2), fma(v, x3, b3)
                        v = spread(w, weight + w2)
                        c0, c1, c2, c3 = fma(v, x0, c0), fma(v, x1, c1), fma(v, x2, c2), fma(v, x3, c3)
                        v = spread(w, weight + w3)
                        d0, d1, d2, d3 = fma(v, x0, d0), fma(v, x1, d1), fma(v, x2, d2), fma(v, x3, d3)
                        weight += channels * square
                        from_ += g_by[0]
                    at = i * by[0] + (r * stride + tap // size) * by[1] + (c * stride + tap % size) * WIDTH
                    _add(to, at, next_, left, a0, a1, a2, a3)
                    if i + 1 < channels:
                        _add(to, at + by[0], next_, left, b0, b1, b2, b3)
                    if i + 2 < channels:
                        _add(to, at + 2 * by[0], next_, left, c0, c1, c2, c3)
                    if i + 3 < channels:
                        _add(to, at + 3 * by[0], next_, left, d0, d1, d2, d3)


@njit(**INLINE)
def _add(to, at, next_, left, v0, v1, v2, v3):
    """Up to four vectors, of which `left` are wanted, to what is there."""
    store(to, at, load(to, at) + v0)
    if left > 1:
        store(to, at + next_, load(to, at + next_) + v1)
    if left > 2:
        store(to, at + 2 * next_, load(to, at + 2 * next_) + v2)
    if left > 3:
        store(to, at + 3 * next_, load(to, at + 3 * next_) + v3)
