"""Vectors that terms compare: in full precision, and of length 1."""

import math

import torch
from torch import Tensor


def precise(feature: Tensor) -> Tensor:
    """A feature in float32 where it is of less: sums of squares lose too much in bfloat16, and overflow in float16."""
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def unit(vectors: Tensor) -> Tensor:
    """The vectors x / |x|_2 of the last dimension; a vector of zeros stays so.

    It has no gradient there, where that of `F.normalize` is 1e12 times what comes in.
    """
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, math.inf)
