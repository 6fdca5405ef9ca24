"""Building any importable classifier for a data set's images, and checking that it gives their logits."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pkd_lightning.errors import ConfigError

ImageShape = tuple[int, int, int]


def build_classifier(
    make: Callable[..., Any], options: Mapping[str, Any], image_shape: ImageShape, num_classes: int
) -> nn.Module:
    """Call `make` with `options`, and with `image_shape` and `num_classes` where its signature names them.

    Raises:
        ConfigError: from `make`, or where it refuses its arguments or gives no torch module.
    """
    named = inspect.signature(make).parameters
    offered = {"image_shape": image_shape, "num_classes": num_classes}
    missing = {name: value for name, value in offered.items() if name in named and name not in options}
    try:
        model = make(**missing, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError([f"{_name(make)}: cannot be built ({error})"]) from error
    if not isinstance(model, nn.Module):
        raise ConfigError([f"{_name(make)}: gives a {type(model).__name__}, not a torch module"])
    return model


def check_output(model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Run `images` (batch, C, H, W) through `model` and check that it gives (batch, num_classes) logits.

    Raises:
        ConfigError: where it does not.
    """
    training = model.training
    model.eval()
    with torch.inference_mode():
        try:
            found = tuple(model(images).shape)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            shape = "x".join(map(str, images.shape[1:]))
            raise ConfigError([f"cannot read images of {shape} ({str(error).splitlines()[0]})"]) from error
    model.train(training)
    expected = (len(images), num_classes)
    if found != expected:
        raise ConfigError([f"gives shape {found} for {len(images)} images of {num_classes} classes, not {expected}"])


def check_batch_of_one(model: nn.Module, image: Tensor) -> None:
    """Run one image (1, C, H, W) through a copy of `model` in training mode, as a batch of one sample does.

    Raises:
        ConfigError: where it fails, as batch norm does on one value per channel.
    """
    try:
        copy.deepcopy(model).train()(image)
    except (RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ConfigError([f"cannot train on a batch of one sample ({cause}); use larger batches"]) from error


def _name(make: Callable[..., Any]) -> str:
    return str(getattr(make, "__name__", make))
