"""Features of any model as tokens: what a Mamba block gives, what a convolution gives, and grids of another size."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


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


def as_planes(tokens: Tensor, grid: Grid | None) -> Tensor:
    """Tokens (batch, positions, channels) as planes (batch, channels, rows, columns), which say how positions lie.

    Without a raster, and where their number is not that of its positions, they are left as they are.
    """
    if grid is None or tokens.ndim != 3 or grid[0] * grid[1] != tokens.shape[1]:
        return tokens
    planes: Tensor = tokens.transpose(1, 2).unflatten(2, grid)
    return planes


def grid_of(model: nn.Module, path: str) -> Grid | None:
    """The raster of the tokens that a module at `path` gives, where it or one around it says so.

    It does by an attribute `grid`, (rows, columns), of its own or of its `tokens`.
    """
    known = dict(model.named_modules())
    names = path.split(".")
    for end in range(len(names), -1, -1):
        around = known.get(".".join(names[:end]))
        own, grid = getattr(around, "grid", None), getattr(getattr(around, "tokens", None), "grid", None)
        if isinstance(own, tuple) and len(own) == 2:  # another module may mean something else by it
            grid = own
        if grid is not None:
            return int(grid[0]), int(grid[1])
    return None


def rasters(*features: Tensor) -> list[Grid]:
    """(rows, columns) of features that are compared: planes say theirs.

    Tokens are a square raster where their number is a square and the others are square, too; else all lie in one row.
    """
    found: list[Grid | None] = []
    for feature in features:
        if feature.ndim == 4:
            found.append((feature.shape[2], feature.shape[3]))
        else:
            positions = as_tokens(feature).shape[1]
            side = math.isqrt(positions)
            found.append((side, side) if side**2 == positions else None)
    guessed = any(feature.ndim == 3 for feature in features)
    if None in found or (guessed and any(grid is not None and grid[0] != grid[1] for grid in found)):
        return [(1, as_tokens(feature).shape[1]) for feature in features]
    return [grid for grid in found if grid is not None]


def resized(feature: Tensor, other: Tensor) -> Tensor:
    """The tokens (batch, positions, channels) of a feature on the raster of another, see `rasters`.

    A side that shrinks is averaged, one that grows is interpolated.
    """
    tokens = as_tokens(feature)
    given, wanted = rasters(feature, other)
    if given == wanted:
        return tokens
    planes: Tensor = tokens.transpose(1, 2).unflatten(2, given)
    fewer = min(given[0], wanted[0]), min(given[1], wanted[1])
    if fewer != given:
        planes = F.adaptive_avg_pool2d(planes, fewer)
    if fewer != wanted:
        planes = F.interpolate(planes, wanted, mode="bilinear")
    return planes.flatten(2).transpose(1, 2)


def mapped(part: Callable[[Tensor], Tensor], feature: Tensor) -> Tensor:
    """What a map of each token makes of a feature; of planes it is planes."""
    tokens = part(as_tokens(feature))
    return as_planes(tokens, (feature.shape[2], feature.shape[3]) if feature.ndim == 4 else None)
