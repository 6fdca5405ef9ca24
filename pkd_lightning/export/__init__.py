"""Ensembles as files for use elsewhere: `export(ensemble, format, out)`, and `pkd export`.

A file is kept only once it gives what the ensemble gives.
"""

import copy
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pkd_lightning.checkpoint import atomic_write
from pkd_lightning.checks import suggest
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.export import c_source, onnx_file, single_file, traced
from pkd_lightning.export.effect import Effect, effect_of
from pkd_lightning.export.facts import Facts, Job, facts_of
from pkd_lightning.export.inputs import dtype_of, inputs_to_check, validation_of
from pkd_lightning.models.building import Trust
from pkd_lightning.rounding import WEIGHTS, Weights, round_weights
from pkd_lightning.saved import folder_of

__all__ = ["FORMATS", "Effect", "Exported", "export"]

logger = logging.getLogger(__name__)
Call = Callable[[Tensor, int], Tensor]
BATCHES = (1, 7)
# in parts of the largest logit; a scale that is applied to sums rounds otherwise than one applied to weights
TOLERANCES: dict[Weights, float] = {"float32": 1e-5, "bf16": 1e-4, "int8": 1e-4}


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: ending of its name.
        write: writes what is exported to a path.
        opened: that file for use: a function of raw inputs (batch, *input_shape) and a number of members.
        packages: what it needs besides torch.
        program: on the PATH, without which it is written, but cannot be checked.
        weights: what it can store them as.
    """

    suffix: str
    write: Callable[[Job, Path], None]
    opened: Callable[[Path, Job], AbstractContextManager[Call]]
    packages: tuple[str, ...] = ()
    program: str | None = None
    weights: tuple[Weights, ...] = ("float32",)


FORMATS = {
    "safetensors": Format(".safetensors", single_file.write, single_file.opened, weights=WEIGHTS),
    "onnx": Format(".onnx", onnx_file.write, onnx_file.opened, onnx_file.PACKAGES),
    "pt2": Format(".pt2", traced.write, traced.opened),
    "c": Format(".c", c_source.write, c_source.opened, program="cc", weights=WEIGHTS),
}


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        path: the file.
        facts: what it says of itself.
        difference: the largest from the ensemble's logits, in parts of the largest logit; None: could not be checked.
            Where weights are rounded, the ensemble has those, too.
        effect: of rounding the weights; None where they are not.
    """

    path: Path
    facts: Facts
    difference: float | None
    effect: Effect | None = None


def export(
    ensemble: ProgressiveEnsemble | Path | str,
    format: str,
    out: Path | str = ".",
    members: int | None = None,
    *,
    name: str | None = None,
    images: Path | None = None,
    force: bool = False,
    trust: Trust = (),
    weights: Weights = "float32",
) -> Exported:
    """Write an ensemble, or a prefix of it, as one file `NAME.SUFFIX`, or `NAME-MEMBERS.SUFFIX`.

    The file prepares inputs itself: it takes uint8 images (batch, C, H, W), or float32 signals. Before it is kept its
    logits are compared with the ensemble's on the CPU, for every prefix and two sizes of batches.

    Args:
        ensemble: the ensemble, or what it is loaded from: a run's directory, its `students`, an exported safetensors
            file, or the name of a pretrained one.
        format: one of `FORMATS`.
        out: folder of the file.
        members: students in the file, the first ones; None: all.
        name: of the run; by default that of its directory.
        images: a .npy file of inputs to check it on; by default some of the run's own test images where they are at
            hand, else random ones.
        force: replace a file that is there.
        trust: as in `ProgressiveEnsemble.load`.
        weights: what those of linear layers and convolutions are rounded to. The log warns where a prefix's accuracy on
            the run's validation inputs falls by more than 0.5 points.

    Raises:
        ConfigError: where there is no such format or prefix, or it cannot have such weights or a member.
        RunError: where a package is missing, the run cannot be loaded, the file is there or cannot be written, or
            its logits differ from the ensemble's.
        DataError: where `images` cannot be read.
    """
    kind = format_of(format, weights)
    source = None if isinstance(ensemble, ProgressiveEnsemble) else folder_of(ensemble).resolve()
    loaded = ensemble if isinstance(ensemble, ProgressiveEnsemble) else ProgressiveEnsemble.load(ensemble, trust)
    run = source.parent if source is not None and source.name == "students" else source
    prefix = prefix_of(loaded, members)
    name = name or ("ensemble" if run is None else name_of(run))
    path = Path(out) / f"{name}{'' if len(prefix) == len(loaded) else f'-{len(prefix)}'}{kind.suffix}"
    if path.exists() and not force:
        raise RunError(f"{path}: is there already; --force replaces it, --out names another folder")
    inputs = inputs_to_check(prefix.task, run, images)
    facts = facts_of(prefix, name, str(dtype_of(prefix.task)).removeprefix("torch."), kind.packages, weights)
    job, rounded = Job(prefix, facts, path, source, trust), rounded_to(weights, prefix)
    differences: list[float] = []

    def write(temporary: Path) -> None:
        kind.write(job, temporary)
        if kind.program is not None and shutil.which(kind.program) is None:
            logger.warning("%s: not checked, there is no %s here", path, kind.program)
            return
        with kind.opened(temporary, job) as call:
            differences.append(check(call, rounded, inputs, path, TOLERANCES[weights]))

    try:
        atomic_write(path, write)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); --out names another folder") from error
    effect = None if weights == "float32" else _effect(job, kind, rounded, inputs)
    return Exported(path, facts, max(differences, default=None), effect)


def format_of(name: str, weights: Weights) -> Format:
    """The format of a name, for such weights.

    Raises:
        ConfigError: where there is none, or it has no such weights.
        RunError: where a package that it needs is missing.
    """
    if name not in FORMATS:
        raise ConfigError([f"format {name!r}: must be one of {', '.join(FORMATS)}.{suggest(name, FORMATS)}"])
    if weights not in WEIGHTS:
        raise ConfigError([f"weights {weights!r}: must be one of {', '.join(WEIGHTS)}.{suggest(weights, WEIGHTS)}"])
    kind = FORMATS[name]
    if weights not in kind.weights:
        able = ", ".join(other for other, format in FORMATS.items() if weights in format.weights)
        allowed = ", ".join(kind.weights)
        raise ConfigError([f"weights {weights!r}: --format {name} stores {allowed} only; {weights} is for {able}"])
    missing = [package for package in kind.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise RunError(f"--format {name} needs {', '.join(missing)}: pip install 'pkd-lightning[export]'")
    return kind


def rounded_to(weights: Weights, ensemble: ProgressiveEnsemble) -> ProgressiveEnsemble:
    """An ensemble with rounded weights: a copy, or itself where there is nothing to round."""
    if weights == "float32":
        return ensemble
    copied = copy.deepcopy(ensemble)
    for member in copied.members:
        round_weights(member, weights)
    return copied


def _effect(job: Job, kind: Format, rounded: ProgressiveEnsemble, checked: Tensor) -> Effect:
    """What rounding did, on the run's validation inputs, or on those that the file was checked on. Warns of losses."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / job.path.name
        kind.write(replace(job, facts=replace(job.facts, weights="float32")), plain)
        sizes = plain.stat().st_size, job.path.stat().st_size
    inputs, labels = validation_of(job.ensemble.task, job.source) or (checked, None)
    effect = effect_of(job.ensemble, rounded, inputs, labels, job.facts.weights, sizes)
    if falls := effect.falls():
        logger.warning("%s: %s weights cost accuracy: %s", job.path, job.facts.weights, "; ".join(falls))
    return effect


def name_of(run: Path) -> str:
    """A name for the files of a run: its experiment and hash, or that of its folder or file."""
    if run.is_file():
        return run.stem
    return f"{run.parent.name}-{run.name}" if (run / "config.yaml").exists() else run.name


def prefix_of(ensemble: ProgressiveEnsemble, members: int | None) -> ProgressiveEnsemble:
    """A copy of the first members of an ensemble, in float32 and evaluation mode, on the CPU.

    Raises:
        ConfigError: where there are not as many, or a weight is not finite.
    """
    count = len(ensemble) if members is None else members
    if not 1 <= count <= len(ensemble):
        raise ConfigError([f"members={members}: the ensemble has prefixes of 1 to {len(ensemble)} students"])
    students = [copy.deepcopy(member).cpu().float().eval() for member in list(ensemble.members)[:count]]
    faults = [
        f"member {t + 1}: {name} is not finite"
        for t, student in enumerate(students)
        for name, value in student.state_dict().items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if faults:
        raise ConfigError(faults)
    prefix = ProgressiveEnsemble(students, ensemble.scales[:count], ensemble.task, ensemble.labels, ensemble.classes)
    return prefix.eval()


@torch.inference_mode()
def check(
    call: Call, ensemble: ProgressiveEnsemble, inputs: Tensor, path: Path, tolerance: float = TOLERANCES["float32"]
) -> float:
    """The largest difference between the logits of a file and those of the ensemble, in parts of the largest logit.

    Raises:
        RunError: where it is more than `tolerance`.
    """
    worst = 0.0
    for size in BATCHES:
        for batch in inputs.split(size)[: len(inputs) // size or 1]:
            for members, expected in enumerate(ensemble.anytime(ensemble.preprocess(batch)), 1):
                given = call(batch, members)
                scale = max(float(expected.abs().max()), 1e-30)
                difference = float((given - expected).abs().max()) / scale
                worst = max(worst, difference)
                if not difference <= tolerance:
                    raise RunError(
                        f"{path}: not kept. On a batch of {len(batch)} the logits of {members} students differ from the"
                        f" ensemble's by {difference:.1e} of the largest one; at most {tolerance:g} is allowed"
                    )
    return worst
