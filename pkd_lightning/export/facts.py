"""What an exported file says of itself: name, sizes, labels, costs, versions."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate
from pathlib import Path

from pkd_lightning import __version__
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.models.building import Trust
from pkd_lightning.rounding import Weights


@dataclass(frozen=True)
class Facts:
    """Of an exported prefix.

    Attributes:
        name: of the run.
        members: students in the file.
        input_shape: of one input, without the batch.
        input_type: `uint8` or `float32`.
        labels: the label in the data set of each output.
        classes: its name, where the data set names its classes.
        macs: multiply-accumulates of the first 1, 2, ... members for one input, see `cost.Cost.macs_total`; each None
            where those of one member cannot be counted.
        params: parameters of each member.
        versions: of the packages the file was made with.
        weights: what those of linear layers and convolutions are stored as, see `rounding.Weights`.
    """

    name: str
    members: int
    input_shape: tuple[int, ...]
    input_type: str
    labels: list[int]
    classes: list[str] | None
    macs: list[int | None]
    params: list[int]
    versions: dict[str, str]
    weights: Weights = "float32"

    def texts(self) -> dict[str, str]:
        """For metadata, whose values are texts: everything but the name in JSON, under keys `pkd.name` and so on."""
        return {
            f"pkd.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in vars(self).items()
        }


@dataclass(frozen=True)
class Job:
    """What is written to a file.

    Attributes:
        ensemble: all of its members, in float32, before weights are rounded.
        facts: of it.
        path: of the file in the end; it is written under another name.
        source: the folder of its students, or the file, that it was loaded from; None where it was given.
        trust: what it was loaded with.
    """

    ensemble: ProgressiveEnsemble
    facts: Facts
    path: Path
    source: Path | None = None
    trust: Trust = ()


def facts_of(
    ensemble: ProgressiveEnsemble,
    name: str,
    input_type: str,
    packages: Sequence[str] = (),
    weights: Weights = "float32",
) -> Facts:
    """The facts of an ensemble, all of it.

    Args:
        ensemble: what is exported.
        name: of the run.
        input_type: of the exported file's input.
        packages: those the format needs, besides torch.
        weights: see `Facts`.
    """
    task, members = ensemble.task, list(ensemble.members)
    macs: list[int | None] = [None] * len(members) if ensemble.macs is None else [*accumulate(ensemble.macs)]
    return Facts(
        name=name,
        members=len(members),
        input_shape=tuple(task.input_shape),
        input_type=input_type,
        labels=list(range(task.num_classes)) if ensemble.labels is None else ensemble.labels,
        classes=ensemble.classes,
        macs=macs,
        params=[sum(p.numel() for p in member.parameters()) for member in members],
        versions={
            "python": platform.python_version(),
            "pkd-lightning": __version__,
            **{package: metadata.version(package) for package in ("torch", *packages)},
        },
        weights=weights,
    )
