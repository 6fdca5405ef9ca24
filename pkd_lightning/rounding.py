"""Weights rounded after training: those of linear layers and convolutions, to bf16, or to int8 with scales.

All others, such as biases, norms and Mamba's A and D, stay float32: they are few, and small errors in them do more.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Weights = Literal["float32", "bf16", "int8"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
LARGEST = 127
SCALE = ".scale"  # ending of the name of an int8 weight's scales


def split(weight: Tensor, kind: Weights) -> tuple[Tensor, Tensor | None]:
    """A weight (outputs, ...) as values of `kind`, and the scale (outputs,) of each output; None where there is none.

    int8 is symmetric, and the largest value of an output is -127 or 127. An output of one value has it as its scale,
    so that nothing is lost.
    """
    weight = weight.detach().float()
    if kind == "float32":
        return weight, None
    if kind == "bf16":
        return weight.bfloat16(), None
    rows = weight.flatten(1)
    if rows.shape[1] == 1:
        return torch.ones_like(weight, dtype=torch.int8), rows[:, 0]
    scale = (rows.abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (rows / scale[:, None]).round().to(torch.int8).view_as(weight), scale


def joined(values: Tensor, scale: Tensor | None) -> Tensor:
    """The float32 weight that `split` made these of, rounded."""
    return values.float() if scale is None else values.float() * scale.view(-1, *[1] * (values.dim() - 1))


def rounded_names(model: nn.Module) -> list[str]:
    """Names in the state dict of the weights that are rounded."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = [(name, layer) for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, kinds)]
    return [
        f"{name}.weight".lstrip(".") for name, layer in layers if isinstance(layer._parameters.get("weight"), Tensor)
    ]


def stored(weights: Mapping[str, Tensor], names: list[str], kind: Weights) -> dict[str, Tensor]:
    """The tensors of a state dict as files hold them, those of `names` rounded: an int8 weight has its scales beside.

    In int8 an output of one value would take more memory than in float32, and stays.
    """
    found = dict(weights)
    for name in (name for name in names if name in weights):
        if kind == "int8" and weights[name][:1].numel() == 1:
            continue
        found[name], scale = split(weights[name], kind)
        if scale is not None:
            found[f"{name}{SCALE}"] = scale
    return found


def restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that a file holds, of float32 in the place of int8 weights and their scales."""
    scaled = {name for name, value in tensors.items() if value.dtype == torch.int8 and f"{name}{SCALE}" in tensors}
    scales = {f"{name}{SCALE}" for name in scaled}
    return {
        name: joined(value, tensors[f"{name}{SCALE}"]) if name in scaled else value
        for name, value in tensors.items()
        if name not in scales
    }


def round_weights(model: nn.Module, kind: Weights) -> None:
    """Round the weights of a model in place."""
    model.load_state_dict(restored(stored(model.state_dict(), rounded_names(model), kind)))
