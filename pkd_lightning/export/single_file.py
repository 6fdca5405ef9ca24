"""An ensemble as one safetensors file, which `ProgressiveEnsemble.load` loads like a folder.

Its metadata hold the texts of the folder's JSON files under their names. The tensors of student 00 are `00/NAME`, and
`00.blake2b` in the metadata is their hash. An int8 weight's scales, one an output, are `00/NAME.scale`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from pkd_lightning.checkpoint import HASH, content_hash, read_json, weights_of
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError
from pkd_lightning.export.facts import Job
from pkd_lightning.models.building import path_of
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.config import MambaClassifierConfig
from pkd_lightning.rounding import rounded_names, stored
from pkd_lightning.saved import describe


def write(job: Job, path: Path) -> None:
    """Write the file.

    Raises:
        ConfigError: where a member's class and options are not known.
    """
    ensemble = job.ensemble
    texts: dict[str, Mapping[str, Any]] = {
        "ensemble.json": describe(ensemble.scales, ensemble.task, ensemble.labels, classes=ensemble.classes)
    }
    metadata = {"format": "pt", **job.facts.texts()}
    tensors: dict[str, Tensor] = {}
    for t, member in enumerate(ensemble.members):
        stem = f"{t:02d}"
        weights = stored(weights_of(member), rounded_names(member), job.facts.weights)
        texts[f"{stem}.json"] = _description(job, t, member)
        metadata[f"{stem}.{HASH}"] = content_hash(weights)
        tensors |= {f"{stem}/{name}": value for name, value in weights.items()}
    metadata |= {name: json.dumps({**text, HASH: content_hash(text)}) for name, text in texts.items()}
    path.write_bytes(save(tensors, metadata))


@contextmanager
def opened(path: Path, job: Job) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """The ensemble that the file holds."""
    ensemble = ProgressiveEnsemble.load(path, job.trust)
    yield lambda inputs, members: ensemble(ensemble.preprocess(inputs), members=members)


def _description(job: Job, t: int, member: nn.Module) -> Mapping[str, Any]:
    """What builds a student: as the run's folder has it, or of one of our classifiers by its options."""
    if job.source is not None:
        description: Mapping[str, Any] = read_json(job.source / f"{t:02d}.json")
        return description
    if type(member) is not MambaClassifier:
        raise ConfigError(
            [
                f"member {t + 1}: the options that build a {path_of(type(member))} are not known; export its run, by"
                " the directory, or another format"
            ]
        )
    default, names = MambaClassifierConfig(), [field.name for field in fields(MambaClassifierConfig)]
    given = {name: getattr(member.config, name) for name in names}
    return {
        "model": path_of(MambaClassifier),
        "input_shape": list(job.facts.input_shape),
        "num_classes": len(job.facts.labels),
        "options": {name: value for name, value in given.items() if value != getattr(default, name)},
    }
