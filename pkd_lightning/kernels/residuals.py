"""The passes over all residuals, compiled by numba: one read of each matrix, and exponentials that vectorise.

The edges need e^S and e^-S of every residual in float64: float32 would lose what the sum over the samples cancels, and
is not faster. `torch.exp` and the operations around it take five times as long.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated, misc"

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pkd_lightning.kernels.lanes import WIDTH, fma, kernel, lanes, load, load_first, store, store_first

LARGEST = 500.0  # e^500 and a sum of as many of them as there are samples are far from the largest float64

LOG2E = math.log2(math.e)
ROUND = 1.5 * 2.0**52  # x + ROUND is x rounded to an integer, which stands in the last bits

# 2**y on [-0.5, 0.5] to 4e-14, by interpolation at Chebyshev nodes with the constant term exactly 1
EVEN = (0.2402265069581299, 0.009618129159402558, 0.00015403455852453838, 1.3255224878668817e-06)
ODD = (
    0.6931471805599453,
    0.055504108664760424,
    0.0013333558179043112,
    1.525268684626772e-05,
    1.0203121063391729e-07,
)

_SCALAR: dict[str, Any] = {"forceinline": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
_INT = ir.IntType(64)


def _exponent(operation: str) -> Any:
    """Value * 2**(+-n), added to or taken from the exponent's bits; n stands in the last bits of `rounded`."""

    @intrinsic
    def scaled(typingctx: Any, value: Any, rounded: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            bits, shift = (builder.bitcast(x, _INT) for x in args)
            moved = getattr(builder, operation)(bits, builder.shl(shift, ir.Constant(_INT, 52)))
            return builder.bitcast(moved, ir.DoubleType())

        return types.float64(types.float64, types.float64), codegen

    return scaled


_times_power, _over_power = _exponent("add"), _exponent("sub")


@intrinsic
def _larger(typingctx: Any, a: Any, b: Any) -> Any:
    """max(abs(a), abs(b)) by lane; as the bits are compared, NaN is larger than infinity and that than all else."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = ir.VectorType(ir.IntType(32), WIDTH)
        sign = ir.Constant(bits, [0x7FFFFFFF] * WIDTH)
        a, b = (builder.and_(builder.bitcast(x, bits), sign) for x in args)
        return builder.bitcast(builder.select(builder.icmp_signed(">", a, b), a, b), args[0].type)

    return lanes(lanes, lanes), codegen


@intrinsic
def _stream(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """`store` past the cache: memory that is written as a whole need not be read first. 64-byte aligned."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), args[2].type.as_pointer())
        written = builder.store(args[2], address, align=4 * WIDTH)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


@njit(**_SCALAR)
def _exponentials(s):
    """(e^s, e^-s) for abs(s) <= LARGEST, both from one polynomial: its even and odd part."""
    x = s * LOG2E
    rounded = x + ROUND
    y = x - (rounded - ROUND)
    q = y * y
    even = (((EVEN[3] * q + EVEN[2]) * q + EVEN[1]) * q + EVEN[0]) * q + 1.0
    odd = ((((ODD[4] * q + ODD[3]) * q + ODD[2]) * q + ODD[1]) * q + ODD[0]) * y
    return _times_power(even + odd, rounded), _over_power(even - odd, rounded)


@njit(**_SCALAR)
def _add_product(a, b, c):
    return a + b * c


_f1, _f2, _d1 = (
    types.Array(types.float32, 1, "C"),
    types.Array(types.float32, 2, "C"),
    types.Array(types.float64, 1, "C"),
)


@kernel(_f1, _f1, types.float32, _f1, _f1)
def add_residual(S, residual, eta, out, largest):
    """Write S + eta * residual to `out`, which begins at a multiple of 64 bytes.

    largest: (16,), each the largest abs() of a part of what was written so far, NaN where there is one.
    """
    top = load(largest, 0)
    rest = S.size % WIDTH
    end = S.size - rest
    for i in range(0, end, WIDTH):
        value = fma(load(residual, i), eta, load(S, i))
        _stream(out, i, value)
        top = _larger(top, value)
    if rest:
        value = fma(load_first(residual, end, rest), eta, load_first(S, end, rest))
        store_first(out, end, value, rest)
        top = _larger(top, value)
    store(largest, 0, top)


@kernel(_f2, _f2, _d1, _d1)
def add_edges(S, residual, edges, normaliser):
    """Add sum_i (e^-S - e^S) * residual to `edges` and sum_i (e^S + e^-S) to `normaliser`, if not empty; each (L,)."""
    for i in range(S.shape[0]):
        for j in range(S.shape[1]):
            up, down = _exponentials(np.float64(S[i, j]))
            if normaliser.size:
                normaliser[j] += up + down
            edges[j] = _add_product(edges[j], down - up, np.float64(residual[i, j]))


@kernel(_f1, types.Array(types.boolean, 1, "C"))
def mark_negative(S, out):
    """Write S < 0 to `out`: `torch.lt` takes more than twice as long."""
    for i in range(S.size):
        out[i] = S[i] < 0
