"""Features of any model as tokens: what a Mamba block gives, what a convolution gives, and grids of another size."""

import math

import torch.nn.functional as F
from torch import Tensor


def as_tokens(feature: Tensor) -> Tensor:
    """(batch, positions, channels) of tokens, which are left as they are, of planes (batch, channels, rows, columns),
    or of vectors (batch, channels), which are one position.

    Raises:
        ValueError: of other shapes.
    """
    if feature.ndim == 2:
        return feature.unsqueeze(1)
    if feature.ndim == 4:
        return feature.flatten(2).transpose(1, 2)
    if feature.ndim != 3:
        raise ValueError(f"shape {tuple(feature.shape)}: is none of vectors, tokens or planes of a batch")
    return feature


def resized(tokens: Tensor, length: int) -> Tensor:
    """Tokens (batch, positions, channels) interpolated to another number of positions.

    Square numbers are rasters, read row by row, and interpolated as such; others in one dimension. A raster that
    shrinks is averaged.
    """
    positions = tokens.shape[1]
    if positions == length:
        return tokens
    planes, side, target = tokens.transpose(1, 2), math.isqrt(positions), math.isqrt(length)
    if side**2 == positions and target**2 == length:
        planes = planes.unflatten(2, (side, side))
        if target < side:
            return F.adaptive_avg_pool2d(planes, target).flatten(2).transpose(1, 2)
        return F.interpolate(planes, (target, target), mode="bilinear").flatten(2).transpose(1, 2)
    if length < positions:
        return F.adaptive_avg_pool1d(planes, length).transpose(1, 2)
    return F.interpolate(planes, length, mode="linear").transpose(1, 2)
