"""The selective scan of Mamba, on the fastest backend that the tensors and the machine allow."""

import functools
import importlib
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from pkd_lightning.models.scan import cuda
from pkd_lightning.models.scan.reference import selective_scan_reference

__all__ = ["BACKENDS", "selective_scan", "selective_scan_reference"]

log = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "cuda")  # each the module that holds selective_scan_<name>


def selective_scan(
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan (Gu & Dao, arXiv 2312.00752, section 3), with the semantics of mamba_ssm's `selective_scan_fn`.

        h_t = exp(delta_t * A) * h_{t-1} + delta_t * B_t * u_t,    y_t = C_t . h_t + D * u_t,    out_t = y_t * silu(z_t)

    Args:
        u: (batch, d_inner, length) input.
        delta: (batch, d_inner, length) step sizes, before bias and softplus.
        A: (d_inner, d_state) state matrix, negative.
        B: (batch, d_state, length) input matrix; fastest as a transposed (batch, length, d_state) tensor, as is C.
        C: (batch, d_state, length) output matrix.
        D: (d_inner,) skip, or None.
        z: (batch, d_inner, length) gate, or None.
        delta_bias: (d_inner,) added to delta, or None.
        delta_softplus: apply softplus to delta after the bias.
        return_last_state: also return the state after the last step (the cuda backend has no gradient through it).
        backend: "reference", "cpu" or "cuda"; by default the environment variable PKD_SCAN_BACKEND, and without it
            by the device of u: cpu on the CPU; on a GPU cuda where mamba_ssm can be imported, else the reference.
            float64 always goes to the reference, the only one with that precision.

    Returns:
        (batch, d_inner, length) in u's dtype; with `return_last_state` also (batch, d_inner, d_state).

    Raises:
        ValueError: the backend is not one of the names above.
        RuntimeError: cuda is asked for by name and not available.
    """
    double = any(x is not None and x.dtype == torch.float64 for x in (u, delta, A, B, C, D, z, delta_bias))
    scan = _load("reference" if double else _choose(backend, u.device.type))
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _choose(backend: str | None, device: str) -> str:
    name = os.environ.get("PKD_SCAN_BACKEND", "") if backend is None else backend
    if name in BACKENDS:
        return name
    if name or backend is not None:
        origin = "PKD_SCAN_BACKEND" if backend is None else "backend"
        raise ValueError(f"{origin} is {name!r}, allowed are {', '.join(BACKENDS)}")
    if device == "cpu" or (device == "cuda" and cuda.available()):
        return device
    _warn_slow(device)
    return "reference"


@functools.cache  # one log line per device type
def _warn_slow(device: str) -> None:
    cure = "mamba-ssm is missing: pip install pkd-lightning[cuda]" if device == "cuda" else "no kernels for this device"
    log.warning("the selective scan on %s runs the reference, many times slower than it could (%s)", device, cure)


@functools.cache
def _load(name: str) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """Import at first use: numba takes a second, and compiles the kernels the first time on a machine."""
    scan: Callable[..., Tensor | tuple[Tensor, Tensor]] = getattr(
        importlib.import_module(f"{__name__}.{name}"), f"selective_scan_{name}"
    )
    return scan
