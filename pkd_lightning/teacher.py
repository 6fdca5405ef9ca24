"""The teacher: trained here or loaded, frozen, its logits computed once."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning import ranks
from pkd_lightning.checkpoint import (
    HASH,
    atomic_write,
    content_hash,
    load_tensors,
    read_json,
    remove_temporaries,
)
from pkd_lightning.checks import Faults
from pkd_lightning.data.module import Batch, DataModule
from pkd_lightning.errors import RunError
from pkd_lightning.fit_checkpoint import remove_all
from pkd_lightning.fit_module import FitModule
from pkd_lightning.fitting import EpochLines, Stage, fit, predict
from pkd_lightning.locks import Lock, locked
from pkd_lightning.loggers import Tracker
from pkd_lightning.matrix import largest, reserve
from pkd_lightning.models.building import InputShape, build_classifier
from pkd_lightning.outputs import Output, Taps
from pkd_lightning.seeding import seeded
from pkd_lightning.shared_teacher import SharedTeacher
from pkd_lightning.trainer import TrainerConfig
from pkd_lightning.weights import load_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher's model and where its weights come from.

    Attributes:
        model: (input_shape, num_classes) to a classifier (a Hydra partial of any `_target_`).
        trainer: how it is trained.
        checkpoint: file of trained weights (.safetensors, or a torch file, see `load_weights`); None trains the
            teacher here, unless none of its parameters requires a gradient: such a model comes with its weights.
        online: ask it in every training step, of the very inputs that the student sees. Otherwise its logits of the
            images as they are go for their augmented copies, too, and are computed once.
    """

    model: Callable[..., nn.Module]
    trainer: TrainerConfig
    checkpoint: str | None = None
    online: bool = False

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.called("model")
        faults.flag("online")
        if isinstance(self.model, nn.Module):
            faults.found.append("model: is built already, before the images are known; `_partial_: true` is missing")
        if self.checkpoint is not None and not Path(self.checkpoint).expanduser().is_file():
            faults.found.append(f"checkpoint={self.checkpoint!r}: no such file")
        faults.raise_if_any()

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """The untrained model.

        Raises:
            ConfigError: where it cannot be built.
        """
        make, given = getattr(self.model, "func", self.model), getattr(self.model, "keywords", {})
        return build_classifier(make, given, input_shape, num_classes)


def is_trained(model: nn.Module) -> bool:
    """Whether a teacher comes with its weights: it has no parameter that could be trained."""
    return not any(parameter.requires_grad for parameter in model.parameters())


class TeacherModule(FitModule):
    """Trains the teacher with cross-entropy."""

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the logits."""
        logits = self(batch.inputs).logits
        return F.cross_entropy(logits, batch.labels), logits


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher.

    Attributes:
        model: the classifier, in evaluation mode, without gradients.
        logits: (training + validation rows, L) float32, by sample index.
        fingerprint: hash of its weights and of the data.
        seconds: wall time of its training.
        online: see `TeacherConfig`.
    """

    model: nn.Module
    logits: Tensor
    fingerprint: str
    seconds: float
    online: bool = False

    def asked(self, features: Sequence[str] = ()) -> "CachedTeacher | OnlineTeacher":
        """The teacher as a round asks it, with the outputs of the modules at these paths."""
        if self.online:
            return OnlineTeacher(self.model, features)
        return self.known(features)

    def known(self, features: Sequence[str] = ()) -> "CachedTeacher":
        """The teacher as it is asked for rows that are the same in every epoch: those of validation."""
        return CachedTeacher(self.logits, self.model, features)


class OnlineTeacher(nn.Module):
    """A teacher that is asked in the step, for the very inputs that the student sees.

    Args:
        model: the teacher. It is no part of this module's state.
        features: paths of the modules whose outputs are features.
        labels: (N,) by sample index, for a model that is called with `labels` of its inputs.
    """

    labels: Tensor | None

    def __init__(self, model: nn.Module, features: Sequence[str] = (), labels: Tensor | None = None) -> None:
        super().__init__()
        self._model = [model]  # in a list: not one of this module's own
        self._taps = Taps(model, features)
        self.register_buffer("labels", labels, persistent=False)

    @torch.no_grad()
    def outputs(self, index: Tensor, inputs: Tensor) -> Output:
        """Logits (batch, L) and features of `inputs`, which are the samples `index` (batch,)."""
        model = self._model[0].to(inputs.device).eval()
        call = model if self.labels is None else partial(model, labels=self.labels[index])
        with self._taps:
            logits, features = self._taps.call(call, inputs)
        return Output(logits.float(), features)


class CachedTeacher(nn.Module):
    """A teacher whose logits are known by sample index, and whose features are those of the inputs the student sees.

    Args:
        logits: (N, L), by sample index.
        model: gives the features, where there are paths.
        features: paths of the modules whose outputs are features.
    """

    logits: Tensor

    def __init__(self, logits: Tensor, model: nn.Module | None = None, features: Sequence[str] = ()) -> None:
        super().__init__()
        # a buffer, to follow the module to its device; not persistent, to stay out of every state dict
        self.register_buffer("logits", logits, persistent=False)
        self._online = OnlineTeacher(model, features) if model is not None and features else None

    def outputs(self, index: Tensor, inputs: Tensor) -> Output:
        """Logits (batch, L) of the samples `index` (batch,), and features of `inputs`, which are those samples."""
        asked = Output(self.logits) if self._online is None else self._online.outputs(index, inputs)
        return Output(self.logits[index], asked.features)


def prepare_teacher(
    config: TeacherConfig, data: DataModule, directory: Path, shared: Path, stage: Stage, tracker: Tracker
) -> Teacher:
    """Load or train the teacher, then compute its logits; what another run has trained or computed is taken.

    Args:
        config: see `TeacherConfig`.
        data: the data module.
        directory: of the run, where the weights of a teacher trained here are kept; one that is there is not trained.
        shared: directory that the runs with the same teacher share, for it and its logits.
        stage: the fit's name and seed, and its files in the run directory.
        tracker: where the fit's curves go, if it is this run that trains the teacher.

    Raises:
        RunError: where a checkpoint cannot be read or does not fit the model, or the run's teacher was trained on
            other data.
    """
    with seeded(stage.seed, stage.name, "init"):
        model = config.build(data.task.input_shape, data.num_classes)
    seconds = 0.0
    if config.checkpoint is not None:
        load_weights(model, Path(config.checkpoint).expanduser())
        logger.info("teacher loaded from %s", config.checkpoint)
        if data.config.split == "paper":
            logger.warning(
                "if it was trained elsewhere on the data set's own training part, it has seen images that"
                " split=paper tests on; data.split=official keeps them apart"
            )
    elif is_trained(model):
        logger.info("the teacher comes with its weights: no parameter of it requires a gradient")
    else:
        seconds = find_or_train(model, config.trainer, data, directory, shared, stage, tracker)
    model.eval().requires_grad_(False)
    key = fingerprint(model, data)
    logits = directory / "logits.safetensors"  # of a run that was begun when each had its own
    path = logits if ranks.agreed(logits.exists) else shared / logits.name
    return Teacher(model, cached_logits(model, data, path, key, config.trainer.device), key, seconds, config.online)


def find_or_train(
    model: nn.Module,
    settings: TrainerConfig,
    data: DataModule,
    directory: Path,
    shared: Path,
    stage: Stage,
    tracker: Tracker,
    module: Callable[[nn.Module, TrainerConfig], FitModule] = TeacherModule,
) -> float:
    """Give `model` the weights of the run's teacher: its own, else the shared one, else trained now. Seconds it took.

    `module` trains it. What else its training depends on, `stage.identity`, is kept with it as the data are.

    Raises:
        RunError: where the run's own was trained on other data.
    """
    basis = f"{data.fingerprint} {stage.identity}".strip()
    weights, done = directory / "teacher.safetensors", directory / "teacher.json"
    if ranks.agreed(done.exists):
        logger.info("teacher found, trained before")
    else:
        teacher = SharedTeacher(shared, basis)
        with teacher.lock() if ranks.first() else nullcontext(Lock()) as lock:
            if ranks.agreed(teacher.found):
                logger.info(
                    "teacher found, trained before: %s; a tracker has its curves in the run that trained it", shared
                )
            else:
                if lock.waited or teacher.begun:
                    logger.info("the teacher's training was begun before and has not ended: this run takes it over")
                # without locks another process may be training it, too: each in its run directory, then
                place = ranks.agreed(lambda: teacher.begin(stage) if lock.held else stage)
                record = train(model, settings, data, place, stage, tracker, module)
                if ranks.first():
                    teacher.save(model, record, place)
                    if place.checkpoint is not None:
                        remove_all(place.checkpoint.parent)
            if ranks.first():
                teacher.give(weights, done, stage)
    ranks.wait()
    record = read_json(done)
    if record["data"] != basis:
        other = "on other data" if not stage.identity else "on other data, or by another teacher"
        raise RunError(f"{directory}: its teacher was trained {other}; change `name`, or delete the directory")
    load_weights(model, weights)
    return float(record["seconds"])


def train(
    model: nn.Module,
    settings: TrainerConfig,
    data: DataModule,
    place: Stage,
    stage: Stage,
    tracker: Tracker,
    module: Callable[[nn.Module, TrainerConfig], FitModule] = TeacherModule,
) -> dict[str, float]:
    """Train the teacher, with its files at `place`; the run, whose stage it is, gets the epochs' lines as they come."""
    who = stage.description or "teacher"
    logger.info("training the %s on %s samples", who, f"{data.whole[0]:,}")
    shown = place.metrics != stage.metrics and ranks.first()
    own = [EpochLines(stage.metrics, stage.shown, stage.attempt)] if shown else []
    trained = module(model, settings)
    with seeded(stage.seed, stage.name, "fit", *ranks.purpose()), tracker.stage(stage.shown) as loggers:
        result = fit(trained, data, place, loggers, own)
    logger.info("%s trained: %d epochs, %.0f s", who, result.epochs, result.seconds)
    return {"epochs": result.epochs, "best_epoch": result.best_epoch, "seconds": result.seconds}


def cached_logits(model: nn.Module, data: DataModule, path: Path, key: str, device: torch.device) -> Tensor:
    """Logits of `model` on the training and validation rows, computed once for the fingerprint `key`.

    Where another run is computing them for the same file, it is waited for. A damaged file is made anew. Of several
    ranks each computes those of its rows.
    """
    waiting = "waiting for the teacher's logits, which another run computes"

    def found() -> bool:
        try:
            return path.exists() and key in load_tensors(path)
        except RunError as error:
            logger.warning("the teacher's logits are computed again. %s", error)
            return False

    with locked(path.with_suffix(".lock"), waiting) if ranks.first() else nullcontext(Lock(held=False)) as lock:
        if lock.held and ranks.first():
            remove_temporaries(path.parent, path.name)
        if not ranks.agreed(found):
            logger.info("computing the teacher's logits of %s samples", f"{sum(data.whole[:2]):,}")
            if ranks.first():
                atomic_write(path, lambda temporary: write_logits(model, data, temporary, key, device))
            else:
                fill(model, data, *ranks.agreed(_of_the_first), device)
        ranks.wait()
    logits = load_tensors(path)[key]  # mapped from the file: it takes memory only where it is read
    return logits if ranks.size() == 1 else torch.cat([logits[rows.start : rows.stop] for rows in data.own_rows])


def _of_the_first() -> tuple[Path, int]:
    raise AssertionError("the first rank says where the others write")


def write_logits(model: nn.Module, data: DataModule, path: Path, key: str, device: torch.device) -> None:
    """Fill a safetensors file with the logits as they come, so that they need not fit into memory."""
    shape = (sum(data.whole[:2]), data.num_classes)
    size = 4 * shape[0] * shape[1]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": (0, size)}

    def header_with(hash_: str) -> bytes:  # the format: length of the header, header, values
        header = json.dumps({"__metadata__": {HASH: hash_}, key: entry}).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header

    header = header_with(content_hash({}))
    path.write_bytes(header)
    reserve(path, len(header) + size)
    place = ranks.agreed(lambda: (path, len(header)))
    logits = fill(model, data, *place, device)
    with path.open("rb+") as file:
        file.write(header_with(content_hash({key: logits})))  # as long as the first


def fill(model: nn.Module, data: DataModule, path: Path, offset: int, device: torch.device) -> Tensor:
    """Write the logits of the rows that are this rank's into a file of all, which is returned as it is then.

    Raises:
        RunError: where some of any rank are not finite.
    """
    shape = (sum(data.whole[:2]), data.num_classes)
    mapped = np.memmap(path, np.float32, "r+", offset, shape)
    logits = torch.from_numpy(mapped)
    own = zip((data.training, data.validation), data.own_rows, strict=True)
    whole = range(shape[0])
    parts = [(rows, logits[there.start : there.stop]) for rows, there in own]
    for rows, part in parts if ranks.size() > 1 else [(whole, logits)]:
        predict(model, data, rows, device, out=part)
    mapped.flush()
    if not all([math.isfinite(largest(part)) for _, part in parts]):  # a list: every rank asks for both
        raise RunError("the teacher's logits are not all finite; it cannot be distilled")
    return logits


def fingerprint(model: nn.Module, data: DataModule) -> str:
    """A hash of the weights and of the data the teacher was asked on."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().double().numpy().tobytes())
    digest.update(data.fingerprint.encode())
    return digest.hexdigest()
