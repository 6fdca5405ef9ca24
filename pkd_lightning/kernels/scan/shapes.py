"""What every backend of the selective scan takes and refuses, and the forms that B and C may have.

B and C are, as in mamba_ssm, (batch, d_state, length), the same for all channels; (batch, groups, d_state, length), the
same for each of `groups` equal ranges of channels; or (d_inner, d_state), constant in time.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.jit import TracerWarning, is_tracing  # type: ignore[attr-defined]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Refuse what no backend takes.

    Raises:
        TypeError: a tensor is not of real floating-point numbers.
        ValueError: a tensor has the wrong shape, or is on another device than u; all such faults are listed.
    """
    if is_tracing():  # torch.jit warns of every size that is compared
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TracerWarning)
            _refuse(u, delta, A, B, C, D, z, delta_bias)
        return
    device, shape = u.device, u.shape
    for x in (u, delta, A, B, C, D, z, delta_bias):
        if x is not None and (x.dtype not in FLOATS or x.device != device):
            break
    else:
        if (
            len(shape) == 3
            and delta.shape == shape
            and (z is None or z.shape == shape)
            and A.shape == (shape[1], A.shape[-1])
            and B.shape == C.shape == (shape[0], A.shape[1], shape[2])
            and (D is None or D.shape == shape[1:2])
            and (delta_bias is None or delta_bias.shape == shape[1:2])
        ):
            return  # the ordinary case, in a third of the time of what follows
    _refuse(u, delta, A, B, C, D, z, delta_bias)


def check_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """`check` for one step: u, delta and z are (batch, d_inner), B and C lack the last dimension.

    Raises:
        TypeError: a tensor is not of real floating-point numbers.
        ValueError: a tensor has the wrong shape, or is on another device than u.
    """
    if u.ndim != 2 or B.ndim not in (2, 3) or C.ndim not in (2, 3):
        raise ValueError("u and delta must be (batch, d_inner), B and C (batch, d_state) or (batch, groups, d_state)")
    if state.shape != (*u.shape, A.shape[-1]):
        raise ValueError(f"state is {tuple(state.shape)}, expected {(*u.shape, A.shape[-1])}")
    if delta.shape == u.shape and B.shape == C.shape == (u.shape[0], A.shape[-1]) and A.shape[0] == u.shape[1]:
        vectors, gated = (D, delta_bias), z is None or z.shape == u.shape
        given = (u, delta, A, B, C, z, *vectors)
        fits = all(x is None or x.shape == u.shape[1:] for x in vectors)
        if gated and fits and all(x is None or (x.dtype in FLOATS and x.device == u.device) for x in given):
            return
    gate = None if z is None else z[..., None]
    _refuse(u[..., None], delta[..., None], A, B[..., None], C[..., None], D, gate, delta_bias)


def _refuse(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.ndim != 3 or A.ndim != 2:
        shapes = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"u must be (batch, d_inner, length) and A (d_inner, d_state), got {shapes}")
    (batch, channels, length), states = u.shape, A.shape[1]
    sequence, vector = (batch, channels, length), (channels,)
    named = (
        *(("u", u, sequence), ("delta", delta, sequence), ("A", A, (channels, states)), ("B", B, None), ("C", C, None)),
        *(("D", D, vector), ("z", z, sequence), ("delta_bias", delta_bias, vector)),
    )
    faults = []
    for name, x, shape in named:
        if x is None:
            continue
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} is {x.dtype}: the scan takes {', '.join(map(str, FLOATS))}")
        if x.device != u.device:
            faults.append(f"{name} is on {x.device} and u on {u.device}")
        if shape is None:
            faults += _matrix_faults(name, x, batch, channels, states, length)
        elif x.shape != shape:
            faults.append(f"{name} is {tuple(x.shape)}, expected {shape}")
    if faults:
        raise ValueError("; ".join(faults))


def _matrix_faults(name: str, x: Tensor, batch: int, channels: int, states: int, length: int) -> list[str]:
    """Of B or C."""
    shape = tuple(x.shape)
    if shape == (batch, states, length) or shape == (channels, states):
        return []
    if x.ndim == 4 and (shape[0], *shape[2:]) == (batch, states, length):
        if shape[1] and channels % shape[1] == 0:
            return []
        return [f"{name} is {shape}: its {shape[1]} groups do not divide {channels} channels"]
    if x.ndim == 2:
        return [f"{name} is {shape}, expected {(channels, states)}"]
    if x.ndim == 4:
        return [f"{name} is {shape}, expected ({batch}, groups, {states}, {length})"]
    return [f"{name} is {shape}, expected {(batch, states, length)}"]


def by_ranges(
    scan: Callable[..., Tensor | tuple[Tensor, Tensor]],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Any B and C by `scan`, which takes only those that all channels share: a call for each range that shares them.

    A group of channels is such a range; of a B or C that is constant in time, every channel is one.
    """
    (batch, channels, length), states = u.shape, A.shape[1]
    if not channels:  # B and C have no part in anything
        none = u.new_zeros(batch, states, length)
        B, C = B.sum() * none, C.sum() * none
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    width = math.gcd(_sharing(B, channels), _sharing(C, channels))
    count = channels // width

    def split(x: Tensor | None, dimension: int) -> list[Any]:  # its gradient is one concatenation
        return [None] * count if x is None else list(x.split(width, dimension))

    def spread(x: Tensor) -> list[Tensor]:
        if x.ndim == 3:
            return [x] * count
        if x.ndim == 2:
            return [row[:, None].expand(batch, states, length) for row in x.unbind(0)]
        return [group for group in x.unbind(1) for _ in range(count // x.shape[1])]

    ranges = zip(
        *(split(u, 1), split(delta, 1), split(A, 0), spread(B), spread(C), split(D, 0), split(z, 1)),
        split(delta_bias, 0),
        strict=True,
    )
    results = [scan(*tensors, delta_softplus, return_last_state) for tensors in ranges]
    if not return_last_state:
        return torch.cat(results, dim=1)  # type: ignore[arg-type]
    outs, states_ = zip(*results, strict=True)
    return torch.cat(outs, dim=1), torch.cat(states_, dim=1)


def _sharing(x: Tensor, channels: int) -> int:
    """How many neighbouring channels have the same B, or C."""
    if x.ndim == 4:
        return channels // x.shape[1]
    return channels if x.ndim == 3 else 1
