"""The selective scan of Mamba, on the fastest backend that the tensors and the machine allow."""

import functools
import importlib
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.nn import Parameter

from pkd_lightning.kernels.scan import cuda
from pkd_lightning.kernels.scan.order import Order
from pkd_lightning.kernels.scan.reference import scan_macs, selective_scan_reference, selective_scan_step

__all__ = [
    "BACKENDS",
    "fused_block",
    "fused_residual_block",
    "scan_macs",
    "selective_scan",
    "selective_scan_reference",
    "selective_scan_step",
]

log = logging.getLogger(__name__)

FUSED_INNER = 32  # inner channels up to which a fused block is faster; 4 and 8 times as many where its lanes are filled
SINGLE = {torch.float32, torch.bfloat16, torch.float16}  # computed in float32
BACKENDS = ("reference", "cpu", "cuda", "associative")  # each the module that holds selective_scan_<name>


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
        B: (batch, d_state, length) input matrix, or (batch, groups, d_state, length), each for an equal range of
            channels, or (d_inner, d_state), constant in time; fastest as a transposed (batch, length, d_state) tensor.
        C: output matrix, as B; it may have another of these forms than B.
        D: (d_inner,) skip, or None.
        z: (batch, d_inner, length) gate, or None.
        delta_bias: (d_inner,) added to delta, or None.
        delta_softplus: apply softplus to delta after the bias.
        return_last_state: also return the state after the last step (the cuda backend has no gradient through it).
        backend: "reference", "cpu", "cuda" or "associative"; by default the environment variable PKD_SCAN_BACKEND, and
            without it by the device of u: cpu on the CPU; on a GPU cuda where mamba_ssm runs and takes so many
            states, else associative. float64 goes to the reference unless associative is asked for: the others lack it.

    Returns:
        (batch, d_inner, length) in u's dtype; with `return_last_state` also (batch, d_inner, d_state).

    Raises:
        ValueError: the backend is not one of the names above, or a tensor has a wrong shape or device.
        TypeError: a tensor is not of real floating-point numbers.
        RuntimeError: cuda is asked for by name and not available.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    name, traced = _choose(backend, u.device.type, A.shape[-1]), _traced(*tensors)
    if any(x is not None and x.dtype == torch.float64 for x in tensors) and name != "associative":
        name = "associative" if traced else "reference"  # torch.compile of the reference's loop gives wrong results
    if is_tracing() and name == "cpu":
        name = "reference"
    scan = _operator() if traced and name == "cpu" else _load(name)
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _choose(backend: str | None, device: str, states: int) -> str:
    name = os.environ.get("PKD_SCAN_BACKEND", "") if backend is None else backend
    if name not in BACKENDS and (name or backend is not None):
        origin = "PKD_SCAN_BACKEND" if backend is None else "backend"
        raise ValueError(f"{origin} is {name!r}, allowed are {', '.join(BACKENDS)}")
    if not name and (device == "cpu" or (device == "cuda" and cuda.available())):
        name = device
    if not name:
        cure = cuda.INSTALL if device == "cuda" else "there are no kernels for this device"
        _say(f"the selective scan on {device} runs in plain PyTorch, slower than kernels would ({cure})")
    elif name == "cuda" and states > cuda.MOST_STATES:
        _say(f"mamba-ssm's scan takes at most {cuda.MOST_STATES} states: those with more run in plain PyTorch, slower")
    else:
        return name
    return "associative"


def fused_block(tokens: Tensor, *weights: Tensor) -> Tensor | None:
    """A whole Mamba block in one pass where that is the fastest way, else None.

    On the CPU blocks of few channels are fused, on CUDA those that mamba_ssm and causal_conv1d have kernels for.
    Arguments and result: see `mamba_block_cpu`.
    """
    device = tokens.device.type
    kinds = {x.dtype for x in (tokens, *weights)}
    if _traced(tokens, *weights) or is_tracing() or not kinds <= SINGLE:
        return None
    (d_inner, d_state), d_conv = weights[6].shape, weights[1].shape[-1]
    backend = _choose(None, device, d_state)
    if backend == device == "cuda" and cuda.fits_block(d_state, d_conv):
        return cuda.mamba_block_cuda(tokens, *weights)
    if backend == device == "cpu" and _fuses(d_inner, tokens.shape[0]):
        from pkd_lightning.kernels.scan.block import mamba_block_cpu as block  # numba takes a second to import

        if kinds == {torch.float32}:
            return block(tokens, *weights)
        return block(*(x.float() for x in (tokens, *weights))).to(tokens.dtype)
    return None


def fused_residual_block(
    tokens: Tensor, weights: tuple[Tensor, ...], norm: Tensor | None, order: Order, residual: bool
) -> Tensor | None:
    """`fused_block` with what is around it in a residual network, on the CPU in float32, else None.

    Arguments and result: see `mamba_block_cpu`.
    """
    given = (tokens, *weights) if norm is None else (tokens, *weights, norm)
    if not takes(*given):
        return None
    if tokens.ndim != 3 or (order.columns and order.rows * order.columns != tokens.shape[1]):
        return None  # what is called instead says what is wrong
    if not _fuses(weights[6].shape[0], tokens.shape[0]):
        return None
    from pkd_lightning.kernels.scan.block import mamba_block_cpu as block

    return block(tokens, *weights, norm=norm, order=order, residual=residual)


def takes(*tensors: Tensor) -> bool:
    """Whether kernels of the CPU may compute with these: float32 in its memory, not traced, no other backend chosen."""
    if _traced(*tensors) or is_tracing() or {(x.dtype, x.device.type) for x in tensors} != {(torch.float32, "cpu")}:
        return False
    return _choose(None, "cpu", 1) == "cpu"


def _fuses(d_inner: int, batch: int) -> bool:
    """Whether the fused kernels, 16 sequences at a time, are the faster way on the CPU."""
    return d_inner <= FUSED_INNER * (1 if batch < 8 else 4 if batch < 16 else 8)


def _traced(*tensors: Tensor | None) -> bool:
    """Whether torch only looks at what is computed: kernels that read memory would find none."""
    plain = (Tensor, Parameter)
    return torch.compiler.is_compiling() or any(x is not None and type(x) not in plain for x in tensors)


@functools.cache  # once
def _say(message: str) -> None:
    log.warning("%s", message)


def _operator() -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """The scan as an operator, which numba's kernels, that cannot be traced, are behind."""
    try:
        from pkd_lightning.kernels.scan.custom_op import selective_scan_operator
    except AttributeError as error:  # torch.export replaces functions that numba's import looks into
        cure = "call the model once, or import pkd_lightning.kernels.scan.custom_op, before torch.export"
        raise RuntimeError(f"the CPU kernels cannot be loaded while a model is traced: {cure}") from error
    return selective_scan_operator


@functools.cache
def _load(name: str) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """Import at first use: numba takes a second, and compiles the kernels the first time on a machine."""
    scan: Callable[..., Tensor | tuple[Tensor, Tensor]] = getattr(
        importlib.import_module(f"{__name__}.{name}"), f"selective_scan_{name}"
    )
    return scan
