"""Mixers: what a block does with its tokens. Any module of (batch, length, d_model) to the same, by import path.

A mixer's constructor names what it needs: d_model, the raster `grid` (rows, columns), the number of tokens `length`,
and options of the classifier such as d_state. It may have

- `macs(length)`: the multiply-accumulates of a call on one sequence. Without, its operations are counted.
- `visible(tokens)`: what a counter of FLOPs sees of it, for `Cost.flops_published`. Without, all of it.
- `reads_in_order = False`: it reads the raster as a whole; by columns or backwards it reads the same.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pkd_lightning.checks import unknown_keys
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.building import import_part

MAMBA = "pkd_lightning.models.mamba.Mamba"


def build_mixer(path: str, own: Mapping[str, Any], offered: Mapping[str, Any]) -> nn.Module:
    """The mixer at an import path, with its own options, and of what is offered that which its signature names.

    Raises:
        ConfigError: where it cannot be imported or is not trusted, an option is not one of its own, or it fails.
    """
    make = import_part("mixer", path)
    names = inspect.signature(make).parameters
    faults = unknown_keys([f"mixer_options.{key}" for key in own], [f"mixer_options.{name}" for name in names])
    if faults:
        raise ConfigError(faults)
    try:
        mixer: nn.Module = make(**{**{key: value for key, value in offered.items() if key in names}, **own})
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's constructor raises
        raise ConfigError([f"mixer={path!r}: cannot be built ({error})"]) from error
    return mixer


def as_read(tokens: Tensor, grid: tuple[int, int], columns: bool, backwards: bool) -> Tensor:
    """Tokens (batch, length, d_model) of a raster in the order in which they are read, see `in_order`."""
    if columns:
        tokens = tokens.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    return tokens.flip(1) if backwards else tokens


def in_order(mixer: nn.Module, tokens: Tensor, grid: tuple[int, int], columns: bool, backwards: bool) -> Tensor:
    """What `mixer` gives where it reads the tokens (batch, length, d_model) of a raster `grid` in another order.

    Row by row, or by `columns`, from the end where `backwards`; the result is in the tokens' own order.
    """
    if not getattr(mixer, "reads_in_order", True):
        return mixer(tokens)  # type: ignore[no-any-return]
    mixed: Tensor = mixer(as_read(tokens, grid, columns, backwards))
    if backwards:
        mixed = mixed.flip(1)
    if columns:
        mixed = mixed.unflatten(1, grid[::-1]).transpose(1, 2).flatten(1, 2)
    return mixed
