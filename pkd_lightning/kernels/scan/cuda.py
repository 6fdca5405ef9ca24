"""The selective scan on CUDA: mamba_ssm's own kernels, imported when first asked for and never without a GPU."""

import functools
import importlib
import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pkd_lightning.kernels.scan.reference import selective_scan_reference
from pkd_lightning.kernels.scan.shapes import check

log = logging.getLogger(__name__)

MOST_STATES = 256  # what mamba_ssm's kernels are compiled for


DEVICE = "cuda"  # what the kernels are tried on
# without isolation both are built for the torch that is installed; mamba-ssm's newest source builds no scan by default
INSTALL = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation 'pkd-lightning[cuda]'"


@functools.cache
def available() -> bool:
    """Whether there is a CUDA device and mamba_ssm's compiled scan runs on it; why it does not is logged."""
    return torch.cuda.is_available() and _runs(_try_scan, "no CUDA selective scan, mamba-ssm")


@functools.cache
def convolution_available() -> bool:
    """Whether causal_conv1d, which mamba_ssm's fused block needs, runs in it; why it does not is logged."""
    return _runs(_try_block, "Mamba blocks on CUDA run unfused, causal-conv1d")


def _runs(attempt: Callable[[], bool], message: str) -> bool:
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            if attempt():
                return True
        reason = "its result is wrong"
    # Missing, too old for the other, built for another torch (an undefined symbol) or another GPU (no kernel image):
    # imports and first kernels fail in many ways, and there is always plain PyTorch.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    log.warning("%s cannot be used: %s (install: %s)", message, reason, INSTALL)
    return False


def _try_scan() -> bool:
    # torch, imported above, loads the libraries that the extension links to
    importlib.import_module("selective_scan_cuda")
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    u, A = torch.ones(1, 2, 3, device=DEVICE), -torch.ones(2, 2, device=DEVICE)
    B = torch.ones(1, 2, 3, device=DEVICE)
    expected = selective_scan_reference(u, u, A, B, B)
    assert isinstance(expected, Tensor)
    return torch.allclose(interface.selective_scan_fn(u, u, A, B, B), expected, rtol=1e-3)


def _try_block() -> bool:
    importlib.import_module("causal_conv1d_cuda")
    importlib.import_module("causal_conv1d")
    model, inner, states, width = 8, 16, 2, 4
    shapes = (
        *((2 * inner, model), (inner, 1, width), (inner,), (1 + 2 * states, inner), (inner, 1), (inner,)),
        *((inner, states), (inner,), (model, inner)),
    )
    tokens = torch.ones(1, 8, model, device=DEVICE)
    mixed = mamba_block_cuda(tokens, *(torch.full(shape, 0.1, device=DEVICE) for shape in shapes))
    return mixed.shape == tokens.shape and bool(mixed.isfinite().all())


def fits_block(states: int, conv: int) -> bool:
    """Whether mamba_ssm's fused block can be used for so many states and this width of the convolution."""
    return available() and states <= MOST_STATES and 2 <= conv <= 4 and convolution_available()


def mamba_block_cuda(tokens: Tensor, *weights: Tensor) -> Tensor:
    """A whole Mamba block by mamba_ssm; arguments and result as those of `mamba_block_cpu`."""
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    in_proj, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A_log, D, out_proj = weights
    xz = F.linear(tokens, in_proj).transpose(1, 2)
    mixed: Tensor = mamba_inner_fn(
        *(xz, conv_weight, conv_bias, x_proj, dt_weight, out_proj, None, -torch.exp(A_log.float())),
        D=D.float(),
        delta_bias=dt_bias.float(),
        delta_softplus=True,
    )
    return mixed


def with_equal_groups(B: Tensor, C: Tensor, batch: int, channels: int, length: int) -> tuple[Tensor, Tensor]:
    """B and C as the kernels take them: one that is constant in time only beside a C of one group."""
    groups = [x.shape[1] if x.ndim == 4 else 1 for x in (B, C)]
    if groups[0] == groups[1] or (C.ndim == 2 and B.ndim > 2):
        return B, C
    if B.ndim == 2:
        B = B[None, ..., None].expand(batch, -1, -1, length)
        groups[0] = channels
    B, C = (x[:, None] if x.ndim == 3 else x for x in (B, C))
    common = math.lcm(*groups)
    return B.repeat_interleave(common // groups[0], dim=1), C.repeat_interleave(common // groups[1], dim=1)


def selective_scan_cuda(
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
    """`selective_scan_reference` by mamba_ssm, with the same arguments, shapes, results and errors (see there).

    Computes in float32. The gradient of the last state is not considered in the backward pass.

    Raises:
        RuntimeError: also where there is no CUDA device, or mamba_ssm's scan does not run on it.
        TypeError: also where u is float64, which the kernels lack.
    """
    check(u, delta, A, B, C, D, z, delta_bias)
    if not available():
        raise RuntimeError(f"the cuda scan needs a CUDA device and a mamba-ssm that runs on it ({INSTALL})")
    if u.dtype == torch.float64:
        raise TypeError("u is float64: the CUDA scan computes in float32; use the reference for float64")
    if not u.numel() or not A.numel():  # a grid of no blocks cannot be launched
        return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    B, C = with_equal_groups(B, C, *u.shape)
    # The kernels want what is constant in time in float32 and the sequences in one dtype.
    result: Tensor | tuple[Tensor, Tensor] = selective_scan_fn(
        u,
        delta.to(u.dtype),
        A.float(),
        *(x.float() if x.ndim == 2 else x.to(u.dtype) for x in (B, C)),
        D=None if D is None else D.float(),
        z=None if z is None else z.to(u.dtype),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
    )
    return result
