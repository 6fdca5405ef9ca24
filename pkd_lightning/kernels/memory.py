"""What has to hold before a kernel may read a tensor's memory by its address."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)


def real(x: Tensor) -> Tensor:
    """`x` with its values in memory: some tensors of torch only have a sign, or being zero, noted beside it."""
    if x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype)
    return x.resolve_neg() if x.is_neg() else x


def refuse_second_derivative() -> None:
    """Called in a backward pass: `once_differentiable` would let constant gradients pass, and drop what they give."""
    if torch.is_grad_enabled():
        raise RuntimeError("the CPU kernels have no second derivative; PKD_SCAN_BACKEND=associative has one")


def kinds_of(tensors: Iterable[Tensor | None]) -> list[Any]:
    """What kernels rely on beyond the values."""
    return [None if x is None else (x.shape, x.dtype, x.device) for x in tensors]


def check_unchanged(tensors: Iterable[Tensor | None], kinds: list[Any]) -> None:
    """Raise where assigning to `.data` has given a saved tensor other memory; torch notices only writes to the same."""
    tensors = list(tensors)
    if kinds_of(tensors) != kinds or any(x is not None and x.numel() and not x.data_ptr() for x in tensors):
        raise RuntimeError("a tensor was replaced (through .data) between the forward and the backward pass")
