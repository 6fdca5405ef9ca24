"""The selective scan in plain PyTorch: the oracle for every faster backend (Gu & Dao, arXiv 2312.00752, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pkd_lightning.kernels.scan.shapes import check, check_step


def _for_channels(x: Tensor, channels: int, length: int) -> Tensor:
    """B or C as (batch or 1, d_inner or 1, d_state, length)."""
    if x.ndim == 2:
        return x[None, :, :, None].expand(-1, -1, -1, length)
    if x.ndim == 3:
        return x[:, None]
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def prepare(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs of the recurrence in the precision it is computed in.

    delta is returned with its bias and softplus, B and C as (batch or 1, d_inner or 1, d_state, length).
    """
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, delta, A, B, C = (x.to(compute) for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(compute)[:, None]
    B, C = (_for_channels(x, *u.shape[1:]) for x in (B, C))
    return u, F.softplus(delta) if delta_softplus else delta, A, B, C


def finish(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The skip and the gate: (y + D * u) * silu(z), of what is given."""
    if D is not None:
        y = y + u * D.to(u.dtype)[:, None]
    return y if z is None else y * F.silu(z.to(u.dtype))


def selective_scan_reference(
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
    """Selective scan with the semantics of mamba_ssm's `selective_scan_fn`, one loop over time.

        h_t = exp(delta_t * A) * h_{t-1} + delta_t * B_t * u_t,    y_t = C_t . h_t + D * u_t,    out_t = y_t * silu(z_t)

    Args:
        u: (batch, d_inner, length) input.
        delta: (batch, d_inner, length) step sizes, before bias and softplus.
        A: (d_inner, d_state) state matrix, negative.
        B: (batch, d_state, length) input matrix, or (batch, groups, d_state, length), each for an equal range of
            channels, or (d_inner, d_state), constant in time.
        C: output matrix, as B; it may have another of these forms than B.
        D: (d_inner,) skip, or None.
        z: (batch, d_inner, length) gate, or None.
        delta_bias: (d_inner,) added to delta, or None.
        delta_softplus: apply softplus to delta after the bias.
        return_last_state: also return the state after the last step.

    Returns:
        (batch, d_inner, length) in u's dtype; with `return_last_state` also (batch, d_inner, d_state).

    Raises:
        TypeError, ValueError: a tensor has a wrong dtype, shape or device (see `shapes.check`).
    """
    check(u, delta, A, B, C, D, z, delta_bias)
    dtype = u.dtype
    u, delta, A, B, C = prepare(u, delta, A, B, C, delta_bias, delta_softplus)
    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    steps = []
    # unbind, not indexing: the backward pass of x[..., t] writes a full-length gradient at every step
    per_step = zip(delta.unbind(-1), (delta * u).unbind(-1), B.unbind(-1), C.unbind(-1), strict=True)
    for delta_t, delta_u_t, B_t, C_t in per_step:
        h = torch.exp(delta_t[..., None] * A) * h + delta_u_t[..., None] * B_t
        steps.append((h * C_t).sum(-1))
    y = torch.stack(steps, dim=-1) if steps else torch.zeros_like(u)
    y = finish(y, u, D, z).to(dtype)
    return (y, h) if return_last_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, as mamba_ssm's `selective_state_update`: the scan of a sequence, token by token.

    Args:
        state: (batch, d_inner, d_state) after the step before; zeros at first. Left unchanged.
        u: (batch, d_inner) input, as are delta and z.
        delta: step sizes, before bias and softplus.
        A: (d_inner, d_state).
        B: (batch, d_state), or (batch, groups, d_state), each for an equal range of channels, as is C. One that is
            constant in time is `B[None].expand(batch, -1, -1)` here: as many groups as channels.
        C: output matrix.
        D: (d_inner,), or None.
        z: gate, or None.
        delta_bias: (d_inner,), or None.
        delta_softplus: apply softplus to delta after the bias.

    Returns:
        The output (batch, d_inner) in u's dtype, and the new state.

    Raises:
        TypeError, ValueError: a tensor has a wrong dtype, shape or device.
    """
    check_step(state, u, delta, A, B, C, D, z, delta_bias)
    dtype = u.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    u, delta, B, C = (x.to(compute) for x in (u, delta, B, C))
    channels = u.shape[1]
    B, C = (x[:, None] if x.ndim == 2 else x.repeat_interleave(channels // x.shape[1], dim=1) for x in (B, C))
    delta = delta if delta_bias is None else delta + delta_bias.to(compute)
    delta = F.softplus(delta) if delta_softplus else delta
    state = torch.exp(delta[..., None] * A.to(compute)) * state + (delta * u)[..., None] * B
    y = (state * C).sum(-1)
    y = y if D is None else y + u * D.to(compute)
    y = y if z is None else y * F.silu(z.to(compute))
    return y.to(dtype), state


def scan_macs(batch: int, length: int, d_inner: int, d_state: int) -> int:
    """Multiply-accumulates of the scan.

    For each step and inner channel: delta * u, the skip and the gate (3), and for each state delta * A, delta * u * B,
    the state update and the product with C (4). Exponentials and other elementwise functions are not
    multiply-accumulates and are not counted.
    """
    return batch * length * d_inner * (3 + 4 * d_state)
