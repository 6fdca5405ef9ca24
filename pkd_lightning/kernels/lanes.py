"""Vectors of 16 float32 for numba kernels: a small explicit SIMD type, so that no kernel depends on LLVM's vectoriser.

Inside a kernel, `load` gives a `lanes` value from an array, `+ - * /` and `fma` work on lanes and on float32 (which is
broadcast), and `store` writes it back. LLVM maps the 16 lanes to one AVX-512, two AVX or four SSE registers.

`kernel` compiles a function, or loads it from numba's cache.
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, call-arg, var-annotated, attr-defined"

import functools
import hashlib
import logging
import math
import operator
import pickle
import threading
import types as python_types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import caching, cgutils
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

log = logging.getLogger(__name__)

WIDTH = 16

# whether a dozen and more vectors stay in registers; numba compiles for these features (NUMBA_CPU_FEATURES)
MANY_REGISTERS = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2]
WIDE = 4 * WIDTH if MANY_REGISTERS else WIDTH  # elements of a vector of several registers, which work side by side

INLINE: dict[str, Any] = {"forceinline": True, "error_model": "numpy"}
# long ones are functions of their own, compiled once; said, as numba lets the caller's choice decide otherwise
APART: dict[str, Any] = {"forceinline": False, "error_model": "numpy"}

f32 = np.float32
ZERO = f32(0.0)
ONE = f32(1.0)
LOG2E = f32(math.log2(math.e))
LN2 = f32(math.log(2.0))

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTEGERS = ir.VectorType(_FLOAT, WIDTH), ir.VectorType(_INT, WIDTH)


class Lanes(types.Type):
    """The numba type of a vector of `width` float32."""

    def __init__(self, width: int) -> None:
        super().__init__(name=f"lanes{width}")
        self.width = width


lanes = Lanes(WIDTH)
_wide = Lanes(WIDE)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(_FLOAT, fe_type.width))


def _constant(value: float, like: Any = _VECTOR) -> ir.Constant:
    return ir.Constant(like, [float(value)] * like.count)


def _integers(value: int, width: int = WIDTH) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, width), [value] * width)


def _broadcast(builder: Any, value: Any, like: Any = _VECTOR) -> Any:
    """`value` as a vector, if it is not one already."""
    if value.type == like:
        return value
    one = builder.insert_element(ir.Constant(like, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, ir.Constant(like, ir.Undefined), _integers(0, like.count))


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    """Call LLVM's intrinsic `name` on vectors."""
    vector = arguments[0].type
    kind = ir.FunctionType(vector, [vector] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{vector.count}f32")
    return builder.call(function, arguments)


def _common(kinds: Sequence[Any]) -> Any:
    """The one type of vector among operands that are vectors or float32, else None."""
    vectors = {kind for kind in kinds if isinstance(kind, Lanes)}
    others = {kind for kind in kinds if not isinstance(kind, Lanes)}
    return vectors.pop() if len(vectors) == 1 and others <= {types.float32} else None


def _vectors(builder: Any, args: Sequence[Any]) -> list[Any]:
    """Operands of one type of vector, those that are numbers spread."""
    like = next(x.type for x in args if isinstance(x.type, ir.VectorType))
    return [_broadcast(builder, x, like) for x in args]


def _binary(symbol: Any, instruction: str) -> None:
    """Let `symbol` work on two lanes, or lanes and a float32."""

    @infer_global(symbol)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            common = _common(args) if len(args) == 2 else None
            return None if common is None else signature(common, *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*_vectors(builder, args))

    for pair in ((Lanes, Lanes), (Lanes, types.float32), (types.float32, Lanes)):
        lower_builtin(symbol, *pair)(lower)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _binary(_symbol, _instruction)


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the memory of array[index] to be brought into the cache; any index is allowed."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_POINTER, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(_INT, x) for x in (0, 3, 1))
        builder.call(function, [_address(context, builder, sig, args), read, keep, data])
        return context.get_dummy_value()

    return types.void(array, index), codegen


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """The float32 `x` in every lane."""
    return lanes(types.float32), lambda context, builder, sig, args: _broadcast(builder, args[0])


@intrinsic
def spread(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index] of a flat float32 array in every lane; no index counts from the end."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (index,) = _index(context, builder, sig, args, 1)
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return _broadcast(builder, builder.load(builder.gep(data, [index])))

    return lanes(array, index), codegen


@intrinsic
def root(typingctx: Any, x: Any) -> Any:
    """The square root."""
    return x(x), lambda context, builder, sig, args: _call(builder, "sqrt", args[0])


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """The product of a and b plus c, rounded once."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "fma", *_vectors(builder, args))

    common = _common((a, b, c))
    return None if common is None else (common(a, b, c), codegen)


def _index(context: Any, builder: Any, sig: Any, args: Any, *positions: int) -> list[Any]:
    """The arguments at `positions` as 64-bit integers."""
    return [context.cast(builder, args[i], sig.args[i], types.intp) for i in positions]


def _address(context: Any, builder: Any, sig: Any, args: Any, vector: Any = _VECTOR) -> Any:
    """Pointer to the vector that begins at element args[1] of the flat array args[0]."""
    (index,) = _index(context, builder, sig, args, 1)
    data = context.make_array(sig.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@njit(**INLINE)
def floats(address):
    """The float32 memory from `address` (a tensor's data_ptr()) on, as a flat array without an end.

    Integers pass from Python to a kernel in a fraction of the time that arrays take.
    """
    return carray(_pointer(address), (1 << 40,))


@intrinsic
def _integer_pointer(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@njit(**INLINE)
def integers(address):
    """The int64 memory from `address` on, as `floats` gives the float32."""
    return carray(_integer_pointer(address), (1 << 40,))


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16] of a flat float32 array, any alignment."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, sig, args), align=4)

    return lanes(array, index), codegen


@intrinsic
def load_wide(typingctx: Any, array: Any, index: Any) -> Any:
    """`load` of `WIDE` elements."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, sig, args, ir.VectorType(_FLOAT, WIDE)), align=4)

    return _wide(array, index), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write `value` to the elements from array[index] on of a flat float32 array, any alignment."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, sig, args, args[2].type), align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


def _shuffle(builder: Any, a: Any, b: Any, source: list[int]) -> Any:
    """Lanes picked from a (0 to 15) and b (16 to 31)."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(source)), source))


@intrinsic
def total(typingctx: Any, x: Any) -> Any:
    """The sum of all lanes, as a float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, width = args[0], WIDTH
        while width > 1:
            width //= 2
            x = builder.fadd(
                _shuffle(builder, x, x, list(range(width))), _shuffle(builder, x, x, list(range(width, 2 * width)))
            )
        return builder.extract_element(x, ir.Constant(_INT, 0))

    return types.float32(lanes), codegen


def _mask(builder: Any, count: Any) -> Any:
    """The lanes below `count` (an i64)."""
    count = builder.trunc(count, _INT)
    one = builder.insert_element(ir.Constant(_INTEGERS, ir.Undefined), count, ir.Constant(_INT, 0))
    every = builder.shuffle_vector(one, ir.Constant(_INTEGERS, ir.Undefined), _integers(0))
    return builder.icmp_signed("<", ir.Constant(_INTEGERS, list(range(WIDTH))), every)


_POINTER, _MASK = _VECTOR.as_pointer(), ir.VectorType(ir.IntType(1), WIDTH)


def _masked_load(builder: Any, address: Any, mask: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_POINTER, _INT, _MASK, _VECTOR])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{WIDTH}f32.p0")
    return builder.call(function, [address, ir.Constant(_INT, 4), mask, _constant(0)])


def _masked_store(builder: Any, value: Any, address: Any, mask: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_VECTOR, _POINTER, _INT, _MASK])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.v{WIDTH}f32.p0")
    builder.call(function, [value, address, ir.Constant(_INT, 4), mask])


@intrinsic
def load_first(typingctx: Any, array: Any, index: Any, count: Any) -> Any:
    """`load` of the first `count` lanes, zero in the others; memory beyond them is not touched."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (count,) = _index(context, builder, sig, args, 2)
        return _masked_load(builder, _address(context, builder, sig, args), _mask(builder, count))

    return lanes(array, index, count), codegen


@intrinsic
def store_first(typingctx: Any, array: Any, index: Any, value: Any, count: Any) -> Any:
    """`store` of the first `count` lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (count,) = _index(context, builder, sig, args, 3)
        _masked_store(builder, args[2], _address(context, builder, sig, args), _mask(builder, count))
        return context.get_dummy_value()

    return types.void(array, index, value, count), codegen


@intrinsic
def first(typingctx: Any, x: Any, count: Any) -> Any:
    """`x` in the first `count` lanes, zero in the others."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (count,) = _index(context, builder, sig, args, 1)
        return builder.select(_mask(builder, count), args[0], _constant(0))

    return lanes(lanes, count), codegen


@intrinsic
def total_of_each(typingctx: Any, array: Any, index: Any, stride: Any) -> Any:
    """The sums of the lanes of 16 vectors, `stride` elements apart, as one vector."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        index, stride = _index(context, builder, sig, args, 1, 2)
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        vectors = []
        for row in range(WIDTH):
            at = builder.add(index, builder.mul(stride, ir.Constant(stride.type, row)))
            vectors.append(builder.load(builder.bitcast(builder.gep(data, [at]), _POINTER), align=4))
        while len(vectors) > 1:  # lane i of the sum of a and b: a sum of a where bit `half` of i is 0, else of b
            half = len(vectors) // 2
            lower = [(lane & ~half) + (WIDTH if lane & half else 0) for lane in range(WIDTH)]
            vectors = [
                builder.fadd(_shuffle(builder, a, b, lower), _shuffle(builder, a, b, [lane + half for lane in lower]))
                for a, b in zip(vectors[:half], vectors[half:], strict=True)
            ]
        return vectors[0]

    return lanes(array, index, stride), codegen


def _transposed(builder: Any, tile: list[Any]) -> list[Any]:
    """The 16 columns of 16 vectors."""
    tile, half = list(tile), WIDTH // 2
    while half:
        left = [(lane & ~half) + (WIDTH if lane & half else 0) for lane in range(WIDTH)]
        for row in range(WIDTH):
            if not row & half:
                a, b = tile[row], tile[row + half]
                tile[row] = _shuffle(builder, a, b, left)
                tile[row + half] = _shuffle(builder, a, b, [lane + half for lane in left])
        half //= 2
    return tile


def _rows(context: Any, builder: Any, kind: Any, array: Any, index: Any, stride: Any) -> list[Any]:
    """Pointers to 16 vectors, `stride` elements apart."""
    data = context.make_array(kind)(context, builder, array).data
    indices = [builder.add(index, builder.mul(stride, stride.type(row))) for row in range(WIDTH)]
    return [builder.bitcast(builder.gep(data, [at]), _POINTER) for at in indices]


@intrinsic
def _transpose_full(
    typingctx: Any, source: Any, index: Any, stride: Any, to: Any, to_index: Any, to_stride: Any
) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        index, stride, to_index, to_stride = _index(context, builder, sig, args, 1, 2, 4, 5)
        rows = _rows(context, builder, sig.args[0], args[0], index, stride)
        tile = _transposed(builder, [builder.load(row, align=4) for row in rows])
        for column, at in zip(tile, _rows(context, builder, sig.args[3], args[3], to_index, to_stride), strict=True):
            builder.store(column, at, align=4)
        return context.get_dummy_value()

    return types.void(source, index, stride, to, to_index, to_stride), codegen


@intrinsic
def _transpose_part(
    typingctx: Any,
    source: Any,
    index: Any,
    stride: Any,
    rows: Any,
    columns: Any,
    to: Any,
    to_index: Any,
    to_stride: Any,
    to_rows: Any,
    to_columns: Any,
) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        index, stride, rows, columns = _index(context, builder, sig, args, 1, 2, 3, 4)
        to_index, to_stride, to_rows, to_columns = _index(context, builder, sig, args, 6, 7, 8, 9)

        def masks(rows: Any, columns: Any) -> list[Any]:
            zero = rows.type(0)
            inside = [builder.icmp_signed("<", rows.type(row), rows) for row in range(WIDTH)]
            return [_mask(builder, builder.select(condition, columns, zero)) for condition in inside]

        sources = _rows(context, builder, sig.args[0], args[0], index, stride)
        read = [_masked_load(builder, *pair) for pair in zip(sources, masks(rows, columns), strict=True)]
        targets = _rows(context, builder, sig.args[5], args[5], to_index, to_stride)
        for write in zip(_transposed(builder, read), targets, masks(to_rows, to_columns), strict=True):
            _masked_store(builder, *write)
        return context.get_dummy_value()

    declared = types.void(source, index, stride, rows, columns, to, to_index, to_stride, to_rows, to_columns)
    return declared, codegen


@njit(**INLINE)
def transpose(source, index, stride, rows, columns, to, to_index, to_stride, to_rows, to_columns):
    """Transpose a 16x16 tile: to[to_index + c * to_stride + r] = source[index + r * stride + c].

    Only `rows` x `columns` of the source are read, the rest counts as zero, and only `to_rows` x `to_columns` of the
    target are written (columns of the source are rows of the target).
    """
    if min(min(rows, columns), min(to_rows, to_columns)) >= WIDTH:
        _transpose_full(source, index, stride, to, to_index, to_stride)
    else:
        _transpose_part(source, index, stride, rows, columns, to, to_index, to_stride, to_rows, to_columns)


def _clamp(builder: Any, x: Any, low: float, high: float) -> Any:
    for limit, side in ((low, "<"), (high, ">")):  # compared so that a NaN passes both
        bound = _constant(limit, x.type)
        x = builder.select(builder.fcmp_ordered(side, x, bound), bound, x)
    return x


_SHIFT = 1.5 * 2**23  # a float32 plus that has no fraction, and its last bits are those of the whole number it became


def _polynomials(builder: Any, ys: list[Any]) -> list[Any]:
    """2**y for each y from -0.5 to 0.5."""
    # Minimax with the constant term exactly 1: otherwise the error compounds over the steps.
    ps = [_constant(0.0001559467816132662, ys[0].type)] * len(ys)
    for coefficient in (
        0.0013406643902351759,
        0.009617692972993062,
        0.05550310551013797,
        0.24022652782887738,
        0.6931471472149680279,
        1.0,
    ):
        ps = [_call(builder, "fma", p, y, _constant(coefficient, y.type)) for p, y in zip(ps, ys, strict=True)]
    return ps


def _power(builder: Any, r: Any, y: Any) -> Any:
    """2**(r + y) for whole r from -127 (0) to 128 (inf) and y from -0.5 to 0.5."""
    (p,) = _polynomials(builder, [y])
    width = r.type.count
    exponent = builder.add(builder.fptosi(r, ir.VectorType(_INT, width)), _integers(127, width))
    return builder.fmul(p, builder.bitcast(builder.shl(exponent, _integers(23, width)), r.type))


@intrinsic
def exp2(typingctx: Any, x: Any) -> Any:
    """2**x to 1.3e-7 relative from -126 to 127.5; below it falls to 0 at -127, above it is inf; NaN for NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = _clamp(builder, args[0], -127.0, 128.0)
        r = _call(builder, "rint", x)
        return _power(builder, r, builder.fsub(x, r))

    return x(x), codegen


@intrinsic
def exp2_falling(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """`exp2` of four vectors that are not positive, in fewer operations, and side by side so that none waits.

    Of a NaN with other bits than the usual one, the result may be any number.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        low, shift = _constant(-127), _constant(_SHIFT)
        xs = [builder.select(builder.fcmp_ordered("<", x, low), low, x) for x in args]
        shifted = [builder.fadd(x, shift) for x in xs]  # rounds to a whole number, which is its last bits
        whole = [builder.fsub(x, shift) for x in shifted]
        ys = [builder.fsub(x, r) for x, r in zip(xs, whole, strict=True)]
        # added to the exponent; the powers are 1 and more where x is -127, so that none becomes negative
        exponents = [builder.shl(builder.bitcast(x, _INTEGERS), _integers(23)) for x in shifted]
        bits = [builder.bitcast(p, _INTEGERS) for p in _polynomials(builder, ys)]
        sums = [builder.add(p, r) for p, r in zip(bits, exponents, strict=True)]
        return context.make_tuple(builder, sig.return_type, [builder.bitcast(x, _VECTOR) for x in sums])

    return types.UniTuple(lanes, 4)(a, b, c, d), codegen


@intrinsic
def exp(typingctx: Any, x: Any) -> Any:
    """e**x as exactly as `exp2`, which the product of x and log2(e), once rounded, would not be."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x = _clamp(builder, args[0], -127 * math.log(2), 128 * math.log(2))
        r = _call(builder, "rint", builder.fmul(x, _constant(math.log2(math.e), x.type)))
        for part in (0.693359375, math.log(2) - 0.693359375):  # r * the first is exact
            x = _call(builder, "fma", r, _constant(-part, x.type), x)
        return _power(builder, r, builder.fmul(x, _constant(math.log2(math.e), x.type)))

    return x(x), codegen


@intrinsic
def absolute(typingctx: Any, x: Any) -> Any:
    """|x|."""
    return x(x), lambda context, builder, sig, args: _call(builder, "fabs", args[0])


@intrinsic
def positive(typingctx: Any, x: Any) -> Any:
    """max(x, 0); 0 for NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = _constant(0, args[0].type)
        return builder.select(builder.fcmp_ordered(">", args[0], zero), args[0], zero)

    return x(x), codegen


@intrinsic
def _if_positive(typingctx: Any, x: Any, yes: Any, no: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        yes, no = _vectors(builder, args[1:])
        return builder.select(builder.fcmp_ordered(">", args[0], _constant(0, args[0].type)), yes, no)

    return x(x, yes, no), codegen


@njit(**INLINE)
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return ONE / (exp(ZERO - x) + ONE)


@njit(**INLINE)
def softplus(x):
    """max(x, 0) + log(1 + e) with e = exp(-|x|)."""
    return _softplus(x, exp(ZERO - absolute(x)))


@njit(**INLINE)
def softplus_and_slope(x):
    """`softplus` and its derivative, `sigmoid`, by one exponential."""
    e = exp(ZERO - absolute(x))
    return _softplus(x, e), _if_positive(x, ONE, e) / (e + ONE)


@njit(**INLINE)
def _softplus(x, e):
    """By log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1/3."""
    s = e / (e + f32(2.0))
    s2 = s * s
    p = fma(f32(1 / 13), s2, f32(1 / 11))  # the series of atanh, cut where the next term is 1.4e-8
    p = fma(p, s2, f32(1 / 9))
    p = fma(p, s2, f32(1 / 7))
    p = fma(p, s2, f32(1 / 5))
    p = fma(p, s2, f32(1 / 3))
    p = fma(p, s2, ONE)
    return fma(f32(2.0) * s, p, positive(x))


class _NoAlias(CompilerBase):
    """Tell LLVM that the kernels' arrays do not overlap."""

    def define_pipelines(self) -> list[Any]:
        self.state.flags.noalias = True
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


_KERNEL: dict[str, Any] = {"nogil": True, "error_model": "numpy", "pipeline_class": _NoAlias}


@functools.cache
def _warn_uncached() -> None:
    log.warning(
        "the CPU kernels are compiled anew in each process: numba has no cache it can use (see NUMBA_CACHE_DIR)"
    )


@functools.cache
def _say_compiling() -> None:
    log.info("compiling the CPU kernels, which takes some seconds, once on a machine")


# numba's cache knows when the file of a kernel changes, not when the files of what it calls do
_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
).hexdigest()


def _stamped(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with the hash of all kernels' sources as a closure, which is part of the key in numba's cache."""
    code = function.__code__.replace(co_freevars=("_SOURCES",))
    closure = (python_types.CellType(_SOURCES),)
    return python_types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)


class _Damaged(Exception):
    """The content of a file in the cache is not what was written."""


class _HashedFiles(caching.IndexDataCacheFile):
    """numba's files with a hash before each kernel: a changed bit would otherwise be run as machine code.

    Damaged files are dropped, so that numba compiles the kernel and writes it anew.
    """

    def load(self, key):
        try:
            return super().load(key)
        except _Damaged as error:
            log.warning("a cached CPU kernel is damaged and compiled anew: %s", error)
            self.flush()
            return None

    def _load_index(self):
        try:
            return super()._load_index()
        except OSError:
            raise
        except Exception as error:  # unpickling other bytes than were written may raise anything
            raise _Damaged(f"{self._index_path}: {error!r}") from error

    def _save_data(self, name, data):
        content = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(content).digest() + content)

    def _load_data(self, name):
        path = Path(self._data_path(name))
        stored, size = path.read_bytes(), hashlib.sha256().digest_size
        if hashlib.sha256(stored[size:]).digest() != stored[:size]:
            raise _Damaged(f"{path} does not have the content that was written")
        return pickle.loads(stored[size:])


class _Cache(caching.FunctionCache):
    def __init__(self, function):
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _HashedFiles(self._cache_path, self._impl.filename_base, stamp)


def _compiled(function: Callable[..., None], declared: Any, cached: bool) -> Any:
    """`function` for these types, with `cached` loaded from numba's cache or compiled and written there."""
    dispatcher = njit(**_KERNEL)(function)
    if cached:
        dispatcher._cache = _Cache(function)
    dispatcher.compile(declared)
    dispatcher.disable_compile()
    return dispatcher


NOTICE_AFTER = 1.0  # seconds: loading takes much less


def kernel(*arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Compile now for these argument types, or load from numba's cache where there is one to write to."""

    def compile_(function: Callable[..., None]) -> Any:
        function, declared = _stamped(function), types.void(*arguments)
        notice = threading.Timer(NOTICE_AFTER, _say_compiling)
        notice.daemon = True
        notice.start()
        try:
            return _compiled(function, declared, cached=True)
        except (RuntimeError, OSError) as error:  # nowhere to write; a full or read-only disk
            if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
                raise
            _warn_uncached()
            return _compiled(function, declared, cached=False)
        finally:
            notice.cancel()

    return compile_
