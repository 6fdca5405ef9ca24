"""The CPU scan as a PyTorch operator, for torch.compile, torch.export and FLOP counters, which cannot look into numba.

Calling it costs more than the plain `torch.autograd.Function`, so eager code does not go through it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pkd_lightning.kernels.memory import real
from pkd_lightning.kernels.scan import cpu
from pkd_lightning.kernels.scan.reference import scan_macs
from pkd_lightning.kernels.scan.shapes import by_ranges, check


def _checked(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> cpu.Inputs:
    """The arguments of the operators, which anyone can call, as the kernels need them."""
    if B.ndim != 3 or C.ndim != 3:
        raise ValueError("B and C must be (batch, length, d_state)")
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    check(u, delta, A, B.mT, C.mT, D, z, delta_bias)
    cpu.check_kernels(*tensors)
    if any(x is not None and x.dtype != torch.float32 for x in tensors):
        raise TypeError("the operator takes float32 tensors")
    u, delta, A, B, C, *rest = (None if x is None else real(x) for x in tensors)  # type: ignore[assignment]
    return u, delta, A, B, C, *rest  # type: ignore[return-value]


@torch.library.custom_op("pkd::selective_scan", mutates_args=(), device_types="cpu")
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, the last state, and the states that the backward pass starts from; float32, B and C (batch, length, N)."""
    tensors = _checked(u, delta, A, B, C, D, z, delta_bias)
    sizes = cpu.sizes_of(tensors, delta_softplus)
    out, last_state, saved = cpu.run_forward(tensors, sizes, keep=True, want_state=True)
    assert last_state is not None
    assert saved is not None
    return out, last_state, saved


@_scan.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(u.shape[0], torch.SymInt):
        saved = torch.library.get_ctx().new_dynamic_size()  # it depends on how the batch fills the lanes
    else:
        saved = cpu.saved_size(cpu.sizes_of((u, delta, A, B, C, D, z, delta_bias), delta_softplus))
    return torch.empty_like(u), u.new_empty(u.shape[0], *A.shape), u.new_empty(saved)


@torch.library.custom_op("pkd::selective_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    grad_out: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
) -> list[Tensor]:
    """The gradients of those of the eight tensors that are not None."""
    tensors = _checked(u, delta, A, B, C, D, z, delta_bias)
    sizes = cpu.sizes_of(tensors, delta_softplus)
    if saved.numel() != cpu.saved_size(sizes) or grad_out.shape != u.shape or grad_last.shape != (len(u), *A.shape):
        raise ValueError("the gradients are not those of a scan of these tensors")
    return [grad for grad in cpu.run_backward(tensors, sizes, saved, grad_out, grad_last) if grad is not None]


@_scan_backward.register_fake
def _(
    grad_out: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
) -> list[Tensor]:
    contiguous = torch.contiguous_format
    sequences = (u, delta, z)
    return [
        torch.empty_like(x) if any(x is y for y in sequences) else torch.empty_like(x, memory_format=contiguous)
        for x in (u, delta, A, B, C, D, z, delta_bias)
        if x is not None
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors, output[2])


def _gradient(ctx: Any, grad_out: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    grads = iter(_scan_backward(grad_out, grad_last, *tensors, saved, ctx.softplus))
    return *(None if x is None else next(grads) for x in tensors), None


_scan.register_autograd(_gradient, setup_context=_setup)


@register_flop_formula(torch.ops.pkd.selective_scan)
def _flops(u: Any, delta: Any, A: Any, *args: Any, **kwargs: Any) -> int:
    batch, d_inner, length = u
    return 2 * scan_macs(batch, length, d_inner, A[1])


def selective_scan_operator(
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
    """`selective_scan_cpu` through the operator `torch.ops.pkd.selective_scan`; it raises the same."""
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    check(*tensors)
    cpu.check_kernels(*tensors, traced=True)
    if B.ndim != 3 or C.ndim != 3:
        return by_ranges(selective_scan_operator, *tensors, delta_softplus, return_last_state)
    u32, delta32, A32, B32, C32, *rest = (None if x is None else x.float() for x in tensors)
    out, last_state, _ = _scan(u32, delta32, A32, B32.transpose(1, 2), C32.transpose(1, 2), *rest, delta_softplus)  # type: ignore[union-attr]
    out = out.to(u.dtype)
    return (out, last_state) if return_last_state else out
