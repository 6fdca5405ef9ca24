"""The selective scan on CUDA: mamba_ssm's own kernels, imported when first asked for and never without a GPU."""

import functools
import importlib
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

MOST_STATES = 256  # what mamba_ssm's kernels are compiled for


@functools.cache
def available() -> bool:
    """Whether there is a CUDA device and mamba_ssm's compiled scan can be imported; a failed import is logged."""
    if not torch.cuda.is_available():
        return False
    try:
        # torch, imported above, loads the libraries that the extension links to
        importlib.import_module("selective_scan_cuda")
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError as error:  # missing, or built for another torch (an undefined symbol)
        log.warning("no CUDA selective scan, mamba-ssm cannot be imported: %s", error)
        return False
    return True


@functools.cache
def convolution_available() -> bool:
    """Whether causal_conv1d can be imported, which mamba_ssm's fused block needs; a failed import is logged."""
    try:
        importlib.import_module("causal_conv1d_cuda")
        importlib.import_module("causal_conv1d")
    except ImportError as error:
        log.warning("Mamba blocks on CUDA run unfused, causal-conv1d cannot be imported: %s", error)
        return False
    return True


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
    """`selective_scan_reference` by mamba_ssm, with the same arguments, shapes and results (see there).

    Computes in float32. The gradient of the last state is not considered in the backward pass.

    Raises:
        RuntimeError: no CUDA device, or mamba_ssm's scan cannot be imported.
        TypeError: u is float64, which the kernels lack.
    """
    if not available():
        raise RuntimeError("the cuda scan needs a CUDA device and mamba-ssm (pip install pkd-lightning[cuda])")
    if u.dtype == torch.float64:
        raise TypeError("u is float64: the CUDA scan computes in float32; use the reference for float64")
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    # The kernels want the parameters in float32 and the sequences in one dtype.
    result: Tensor | tuple[Tensor, Tensor] = selective_scan_fn(
        u,
        delta.to(u.dtype),
        A.float(),
        B.to(u.dtype),
        C.to(u.dtype),
        D=None if D is None else D.float(),
        z=None if z is None else z.to(u.dtype),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
    )
    return result
