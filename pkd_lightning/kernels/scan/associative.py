"""The selective scan in plain PyTorch without a loop over single steps, for devices that have no kernels of their own.

h_t = a_t * h_{t-1} + x_t is linear, so two neighbouring steps make one step of the same form. Doubling the span of the
steps log2(length) times (Hillis & Steele 1986; Blelloch 1990, section 1.4) takes a few operations on large tensors
where the reference takes several on small ones for every step. The price is memory: (length, batch, d_inner, d_state)
tensors.
"""

from typing import Any

import torch
from torch import Tensor

from pkd_lightning.kernels.scan.reference import finish, prepare
from pkd_lightning.kernels.scan.shapes import check

SPAN = 256  # steps at a time: bounds the temporary tensors


def _scan(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t * h_{t-1} + x_t from h = 0, over the first dimension."""
    span = 1
    while span < len(x):
        x = torch.cat([x[:span], torch.addcmul(x[span:], a[span:], x[:-span])])
        a = torch.cat([a[:span], a[span:] * a[:-span]])
        span *= 2
    return x


class _LinearScan(torch.autograd.Function):
    """`_scan`, whose gradient is a scan in reverse."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor) -> Tensor:
        h = _scan(a, x)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> Any:
        a, h = ctx.saved_tensors
        following = torch.cat([a[1:], torch.zeros_like(a[:1])])
        grad_x: Tensor = _LinearScan.apply(following.flip(0), grad_h.flip(0)).flip(0)  # type: ignore[no-untyped-call]
        return torch.cat([torch.zeros_like(h[:1]), grad_x[1:] * h[:-1]]), grad_x


def selective_scan_associative(
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
    """`selective_scan_reference`, with the same arguments, shapes, results and errors (see there)."""
    check(u, delta, A, B, C, D, z, delta_bias)
    dtype = u.dtype
    u, delta, A, B, C = prepare(u, delta, A, B, C, delta_bias, delta_softplus)
    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    parts = []
    # steps first: (length, batch, d_inner), of B and C (length, batch or 1, d_inner or 1, d_state)
    sequences = [x.movedim(-1, 0).split(SPAN) for x in (delta, delta * u, B, C)] if u.shape[-1] else []
    for delta_s, delta_u, B_s, C_s in zip(*sequences, strict=True):
        a = torch.exp(delta_s[..., None] * A)
        x = delta_u[..., None] * B_s
        x = torch.cat([(x[0] + a[0] * h)[None], x[1:]])  # the state before the span goes into its first step
        states: Tensor = _LinearScan.apply(a, x)  # type: ignore[no-untyped-call]
        h = states[-1]
        parts.append(torch.einsum("tbdn,tbdn->bdt", states, C_s))
    y = torch.cat(parts, dim=-1) if parts else torch.zeros_like(u)
    y = finish(y, u, D, z).to(dtype)
    return (y, h) if return_last_state else y
