"""The selective scan on the CPU: one fused pass forward and one backward, in float32, compiled by numba.

The kernels are plain loops over the state that LLVM vectorises by itself. Three things make that happen:
B and C as (batch, length, d_state) with the state contiguous; 2**x as an inlined polynomial, with log2(e) folded
into A (a call of `np.exp` in the loop would not vectorise); and `noalias`, without which LLVM gives up on the number of
overlap checks between the arrays. No threads are started, so fork, DataLoader workers and concurrent Python
threads are safe (the kernels release the GIL).
"""

# Kernels are not Python to a type checker: numba gives them their types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-overload, call-arg, var-annotated"

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.extending import intrinsic
from torch import Tensor

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 64  # steps between saved states; the backward pass recomputes the states in between

f32 = np.float32
ONE = f32(1.0)
LOG2E = f32(math.log2(math.e))
LN2 = f32(math.log(2.0))


class _NoAlias(CompilerBase):
    """Tell LLVM that the kernels' arrays do not overlap."""

    def define_pipelines(self) -> list[Any]:
        self.state.flags.noalias = True
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


# No nnan or ninf: NaN and inf must propagate. reassoc only in the kernels, for the vectorised sums.
# error_model: a division by zero gives inf, without the branch that would stop the vectoriser.
_SCALAR = {"forceinline": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
_KERNEL = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "reassoc"},
    "pipeline_class": _NoAlias,
}


@intrinsic
def _rint(typingctx: Any, x: Any) -> Any:
    """Round to nearest as one vector instruction (np.rint does not vectorise here)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()]), args)

    return types.float32(types.float32), codegen


@intrinsic
def _pow2_integer(typingctx: Any, r: Any) -> Any:
    """2**r for an integral float r in [-127, 128], by writing the exponent bits: 0 at -127 and inf at 128."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        exponent = builder.add(builder.fptosi(args[0], i32), ir.Constant(i32, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(i32, 23)), ir.FloatType())

    return types.float32(types.float32), codegen


@njit(**_SCALAR)
def _exp2(x):
    """2**x to 1e-7 relative; 0 below -126.5 (no denormals), inf above 127.5, NaN for NaN."""
    x = f32(-127.0) if x < f32(-127.0) else x  # written so that a NaN passes both comparisons
    x = f32(128.0) if x > f32(128.0) else x
    r = _rint(x)
    y = x - r
    # Minimax on [-0.5, 0.5] with the constant term exactly 1: otherwise the error compounds over the steps.
    p = f32(0.0001559467816132662)
    p = p * y + f32(0.0013406643902351759)
    p = p * y + f32(0.009617692972993062)
    p = p * y + f32(0.05550310551013797)
    p = p * y + f32(0.24022652782887738)
    p = p * y + f32(0.6931471472149680279)
    return (p * y + ONE) * _pow2_integer(r)


@njit(**_SCALAR)
def _sigmoid(x):
    return ONE / (ONE + _exp2(-LOG2E * x))


@njit(**_SCALAR)
def _softplus(x):
    """max(x, 0) + log(1 + e) with e = exp(-|x|), by log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1/3."""
    e = _exp2(-LOG2E * abs(x))
    s = e / (f32(2.0) + e)
    s2 = s * s
    p = f32(1 / 13)  # the series of atanh, cut where the next term is 1.4e-8
    p = p * s2 + f32(1 / 11)
    p = p * s2 + f32(1 / 9)
    p = p * s2 + f32(1 / 7)
    p = p * s2 + f32(1 / 5)
    p = p * s2 + f32(1 / 3)
    return (x if x > f32(0.0) else f32(0.0)) + f32(2.0) * s * (p * s2 + ONE)


@njit(**_SCALAR)
def _step_sizes(delta, bias, softplus, dt):
    for t in range(dt.size):
        dt[t] = delta[t] + bias
    if softplus:
        for t in range(dt.size):
            dt[t] = _softplus(dt[t])


_f1, _f2, _f3, _f4 = (types.Array(types.float32, n, "C") for n in (1, 2, 3, 4))
_compile_seconds = 0.0


@functools.cache
def _warn_uncached() -> None:
    log.warning("the CPU scan is compiled anew in each process: numba has no writable cache (see NUMBA_CACHE_DIR)")


def _kernel(*arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Compile now for these argument types, or load from numba's cache where there is one to write to."""

    def compile_(function: Callable[..., None]) -> Any:
        global _compile_seconds
        start = time.perf_counter()
        signature = types.void(*arguments)
        try:
            compiled = njit(signature, cache=True, **_KERNEL)(function)
        except (RuntimeError, OSError) as error:  # OSError: a full or read-only disk
            if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
                raise
            _warn_uncached()
            compiled = njit(signature, **_KERNEL)(function)
        if not compiled.stats.cache_hits:
            _compile_seconds += time.perf_counter() - start
        return compiled

    return compile_


# u, delta, A * log2(e), B, C, D, z, delta_bias, and their gradients (per batch element for A, D and the bias)
_INPUTS = types.Tuple((_f3, _f3, _f2, _f3, _f3, _f1, _f3, _f1))
_GRADS = types.Tuple((_f3, _f3, _f3, _f3, _f3, _f2, _f3, _f2))


@_kernel(_INPUTS, types.boolean, _f3, _f3, _f3, _f4, _f1)
def _forward(inputs, softplus, out, y, h, saved, dt):
    """Write out, h (the last state), and where they are not empty y (before the gate) and saved (chunk starts).

    B, C: (batch, length, d_state); h: (batch, d_inner, d_state), zero; saved: (batch, d_inner, chunks, d_state);
    dt: (length,) scratch. D and z are empty where there is none.
    """
    u, delta, A_log2e, B, C, D, z, delta_bias = inputs
    batch, channels, length = u.shape
    states = A_log2e.shape[1]
    for b in range(batch):
        for d in range(channels):
            _step_sizes(delta[b, d], delta_bias[d], softplus, dt)
            for t in range(length):
                if saved.size and t % CHUNK == 0:
                    for n in range(states):
                        saved[b, d, t // CHUNK, n] = h[b, d, n]
                dt_u = dt[t] * u[b, d, t]
                total = f32(0.0)
                for n in range(states):
                    h_n = _exp2(dt[t] * A_log2e[d, n]) * h[b, d, n] + dt_u * B[b, t, n]
                    h[b, d, n] = h_n
                    total += h_n * C[b, t, n]
                out[b, d, t] = total
            if D.size:
                for t in range(length):
                    out[b, d, t] += D[d] * u[b, d, t]
            if y.size:
                for t in range(length):
                    y[b, d, t] = out[b, d, t]
            if z.size:
                for t in range(length):
                    out[b, d, t] *= z[b, d, t] * _sigmoid(z[b, d, t])


@_kernel(_INPUTS, types.boolean, _f3, _f4, _f3, _f3, _GRADS, types.Tuple((_f1, _f1, _f2, _f2)))
def _backward(inputs, softplus, y, saved, grad_out, grad_h, grads, scratch):
    """Write the gradients of `_forward`; those of A, B and C are added to and must come in as zero.

    grad_h: (batch, d_inner, d_state), in the gradient of the last state; overwritten by the gradient carried back.
    Scratch: dt, dy (length,); hs (CHUNK + 1, d_state) the states of a chunk; decay (CHUNK, d_state).
    """
    u, delta, A_log2e, B, C, D, z, delta_bias = inputs
    du, ddelta, dA, dB, dC, dD, dz, dbias = grads
    dt, dy, hs, decay = scratch
    batch, channels, length = u.shape
    states = A_log2e.shape[1]
    for b in range(batch):
        for d in range(channels):
            _step_sizes(delta[b, d], delta_bias[d], softplus, dt)
            for t in range(length):
                dy[t] = grad_out[b, d, t]
            if z.size:
                for t in range(length):
                    gate = _sigmoid(z[b, d, t])
                    dz[b, d, t] = dy[t] * y[b, d, t] * gate * (ONE + z[b, d, t] * (ONE - gate))
                    dy[t] *= z[b, d, t] * gate
            for start in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
                stop = min(start + CHUNK, length)
                for n in range(states):
                    hs[0, n] = saved[b, d, start // CHUNK, n]
                for t in range(start, stop):
                    dt_u = dt[t] * u[b, d, t]
                    for n in range(states):
                        decay[t - start, n] = _exp2(dt[t] * A_log2e[d, n])
                        hs[t - start + 1, n] = decay[t - start, n] * hs[t - start, n] + dt_u * B[b, t, n]
                for t in range(stop - 1, start - 1, -1):
                    dt_u = dt[t] * u[b, d, t]
                    grad_dt_u = f32(0.0)
                    grad_dt = f32(0.0)
                    for n in range(states):
                        grad = grad_h[b, d, n] + dy[t] * C[b, t, n]  # of h_t
                        dC[b, t, n] += dy[t] * hs[t - start + 1, n]
                        dB[b, t, n] += dt_u * grad
                        grad_dt_u += grad * B[b, t, n]
                        grad *= decay[t - start, n]
                        grad_h[b, d, n] = grad
                        grad *= hs[t - start, n]  # of delta_t * A
                        dA[b, d, n] += dt[t] * grad
                        grad_dt += A_log2e[d, n] * grad
                    du[b, d, t] = grad_dt_u * dt[t]
                    ddelta[b, d, t] = grad_dt_u * u[b, d, t] + LN2 * grad_dt
            if D.size:
                for t in range(length):
                    du[b, d, t] += D[d] * dy[t]
                    dD[b, d] += dy[t] * u[b, d, t]
            for t in range(length):
                if softplus:
                    ddelta[b, d, t] *= _sigmoid(delta[b, d, t] + delta_bias[d])
                dbias[b, d] += ddelta[b, d, t]


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _arrays(tensors: Inputs) -> tuple[np.ndarray[Any, Any], ...]:
    """The tuple the kernels take as inputs: no bias is a zero bias, no D and no z are empty arrays."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    D = u.new_empty(0) if D is None else D
    z = u.new_empty(0, 0, 0) if z is None else z
    delta_bias = u.new_zeros(u.shape[1]) if delta_bias is None else delta_bias
    return tuple(x.detach().numpy() for x in (u, delta, A * float(LOG2E), B, C, D, z, delta_bias))


def _run_forward(softplus: bool, tensors: Inputs, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out, last state, and with `keep` what the backward pass needs: y before the gate and the chunk starts."""
    u, _, A, _, _, _, z, _ = tensors
    (batch, channels, length), states = u.shape, A.shape[1]
    out = torch.empty_like(u)
    h = u.new_zeros(batch, channels, states)
    y = torch.empty_like(u) if keep and z is not None else u.new_empty(0, 0, 0)
    saved = u.new_empty(batch, channels, math.ceil(length / CHUNK) if keep else 0, states)
    results = (x.detach().numpy() for x in (out, y, h, saved))
    _forward(_arrays(tensors), softplus, *results, np.empty(length, f32))
    return out, h, y, saved


class _SelectiveScan(torch.autograd.Function):
    """On float32 contiguous tensors, with B and C as (batch, length, d_state)."""

    @staticmethod
    def forward(ctx: Any, softplus: bool, *tensors: Any) -> tuple[Tensor, Tensor]:
        out, h, y, saved = _run_forward(softplus, tensors, keep=True)
        ctx.softplus = softplus
        ctx.save_for_backward(*tensors, y, saved)
        return out, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, y, saved = ctx.saved_tensors
        u, _, A, B, C, _, z, _ = tensors
        (batch, channels, length), states = u.shape, A.shape[1]
        du, ddelta, dz = torch.empty_like(u), torch.empty_like(u), u.new_empty((0, 0, 0) if z is None else z.shape)
        dA, dB, dC = u.new_zeros(batch, channels, states), torch.zeros_like(B), torch.zeros_like(C)
        dD, dbias = u.new_zeros(batch, channels), u.new_zeros(batch, channels)
        dh = grad_h.clone(memory_format=torch.contiguous_format)
        _backward(
            *(_arrays(tensors), ctx.softplus),
            *(x.numpy() for x in (y, saved, grad_out.contiguous(), dh)),
            tuple(x.numpy() for x in (du, ddelta, dA, dB, dC, dD, dz, dbias)),
            tuple(np.empty(shape, f32) for shape in (length, length, (CHUNK + 1, states), (CHUNK, states))),
        )
        grads = (du, ddelta, dA.sum(0), dB, dC, dD.sum(0), dz, dbias.sum(0))
        return None, *(None if x is None else grad for x, grad in zip(tensors, grads, strict=True))


def _check(tensors: dict[str, Tensor | None], u: Tensor, A: Tensor) -> None:
    """The kernels read memory without bounds checks, so every shape is checked first."""
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"u must be (batch, d_inner, length) and A (d_inner, d_state), got {u.shape} and {A.shape}")
    (batch, channels, length), states = u.shape, A.shape[1]
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(("u", "delta", "z"), (batch, channels, length))
    expected |= dict.fromkeys(("B", "C"), (batch, states, length)) | {"A": (channels, states)}
    expected |= dict.fromkeys(("D", "delta_bias"), (channels,))
    given = {name: x for name, x in tensors.items() if x is not None}
    if dtypes := [f"{name} is {x.dtype}" for name, x in given.items() if x.dtype not in DTYPES]:
        raise TypeError(f"{', '.join(dtypes)}: the CPU scan computes in float32, only the reference in float64")
    faults = [f"{name} is on {x.device}, not the CPU" for name, x in given.items() if x.device.type != "cpu"]
    faults += [
        f"{name} is {tuple(x.shape)}, expected {expected[name]}"
        for name, x in given.items()
        if x.shape != expected[name]
    ]
    if faults:
        raise ValueError("; ".join(faults))


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
    """`selective_scan_reference` in float32, with the same arguments, shapes and results (see there).

    The last state is differentiable, too. Any strides are accepted; B and C cost no copy as transposed views of
    (batch, length, d_state) tensors, the other tensors none when contiguous.

    Raises:
        TypeError: a tensor is not float32, bfloat16 or float16.
        ValueError: a tensor has the wrong shape or is not on the CPU.
    """
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    _check(tensors, u, A)
    tensors |= {"B": B.transpose(1, 2), "C": C.transpose(1, 2)}
    inputs: Any = tuple(None if x is None else x.float().contiguous() for x in tensors.values())
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        out, h = _SelectiveScan.apply(delta_softplus, *inputs)
    else:
        out, h, _, _ = _run_forward(delta_softplus, inputs, keep=False)
    out = out.to(u.dtype)
    return (out, h) if return_last_state else out


if _compile_seconds:
    log.info("compiled the CPU scan kernels in %.0f s", _compile_seconds)
