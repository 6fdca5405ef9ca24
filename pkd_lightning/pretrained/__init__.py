"""Trained models that come with the package: `load("mnist")` gives an ensemble and its teacher."""

from typing import NamedTuple

from torch import nn

from pkd_lightning.checks import suggest
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError
from pkd_lightning.saved import PRETRAINED, load_student, pretrained_names

FOLDER = PRETRAINED


class Pretrained(NamedTuple):
    """A distilled ensemble and the teacher it was distilled from, both in evaluation mode.

    Attributes:
        ensemble: its `preprocess` makes uint8 images (batch, C, H, W) into what both read.
        teacher: preprocessed images to logits (batch, L).
    """

    ensemble: ProgressiveEnsemble
    teacher: nn.Module


def names() -> list[str]:
    """What `load` can load."""
    return pretrained_names()


def load(name: str = "mnist") -> Pretrained:
    """The pretrained ensemble `name` and its teacher; experiments/NAME_best says how they were trained.

    Images are grey ones of 28x28 pixels for `mnist`, coloured ones of 32x32 for `cifar10`.

    Raises:
        ConfigError: where there is none of this name, listing those there are.
    """
    if name not in names():
        raise ConfigError([f"pretrained {name!r}: must be one of {', '.join(names())}.{suggest(name, names())}"])
    folder = FOLDER / name
    return Pretrained(ProgressiveEnsemble.load(folder), load_student(folder / "teacher"))
