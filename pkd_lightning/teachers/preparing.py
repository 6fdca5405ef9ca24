"""Several teachers and chains of assistants: each is trained or found by itself, the last one teaches the students."""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pkd_lightning import ranks
from pkd_lightning.data.module import Batch, DataModule
from pkd_lightning.errors import ConfigError
from pkd_lightning.fit_module import FitModule
from pkd_lightning.fitting import Stage
from pkd_lightning.loggers import Tracker
from pkd_lightning.losses import distillation_loss
from pkd_lightning.matrix import chunks, scratch
from pkd_lightning.seeding import seeded
from pkd_lightning.teacher import (
    CachedTeacher,
    OnlineTeacher,
    Teacher,
    cached_logits,
    find_or_train,
    fingerprint,
    prepare_teacher,
)
from pkd_lightning.teachers.combining import UNLABELLED, CombinedTeacher
from pkd_lightning.teachers.measuring import accuracy, disagreement
from pkd_lightning.teachers.options import AssistantConfig, TeachersConfig
from pkd_lightning.trainer import TrainerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One of those that teach.

    Attributes:
        name: as it is shown.
        option: where its options are, such as `teacher.members.first`.
        teacher: the model with its logits.
        validation_accuracy: on the validation rows.
    """

    name: str
    option: str
    teacher: Teacher
    validation_accuracy: float


@dataclass(frozen=True)
class Teachers(Teacher):
    """Whoever teaches the students, and those before it.

    Attributes:
        validation_accuracy: of whoever teaches the students.
        labels: (training + validation rows,) of the training rows, `UNLABELLED` elsewhere, for a combination that
            weighs by them. So the validation part tells what the combination is on the test part, without labels.
        members: of the first teacher, where it is several.
        combine: how they are one.
        disagreement: of the members on the validation rows, see `disagreement`.
        chain: the first teacher and the assistants, in their order; empty without assistants.
    """

    validation_accuracy: float = math.nan
    labels: Tensor | None = None
    members: Sequence[Part] = ()
    combine: str | Mapping[str, float] = "mean"
    disagreement: Mapping[str, float] | None = None
    chain: Sequence[Part] = ()

    def asked(self, features: Sequence[str] = ()) -> CachedTeacher | OnlineTeacher:
        """See `Teacher`."""
        return OnlineTeacher(self.model, features, self.labels) if self.online else super().asked(features)


def prepare_teachers(
    config: TeachersConfig,
    data: DataModule,
    directory: Path,
    shared: Mapping[str, Path],
    stage: Stage,
    tracker: Tracker,
) -> Teachers:
    """Load or train each of those that teach, in their order; see `prepare_teacher`.

    Args:
        config: see `TeachersConfig`.
        data: the data module.
        directory: of the run, where the weights of those trained here are kept.
        shared: the directory that each shares with other runs, by where its options are.
        stage: as of a single teacher.
        tracker: where the curves go.

    Raises:
        ConfigError: where two members are one and the same teacher.
        RunError: see `prepare_teacher`.
    """
    if config.teacher is not None:
        first = prepare_teacher(config.teacher, data, directory, shared["teacher"], stage, tracker)
    else:
        first = _combination(config, data, directory, shared, stage, tracker)
    several = {name: getattr(first, name) for name in ("members", "combine", "disagreement") if config.members}
    chain = [_part("teacher", "teacher", first, data)]
    for number, (option, assistant) in enumerate(config.chain.items(), 1):
        name, before = option.rpartition(".")[2], chain[-1].teacher
        place = replace(
            stage, name=f"assistant-{number}", label=f"assistant-{name}", description=f"assistant {name}",
            checkpoint=stage.checkpoint and stage.checkpoint.with_name(f"assistant-{name}.ckpt"),
            identity=before.fingerprint, options=f"{option}.trainer",
        )  # fmt: skip
        own = directory / "assistants" / name
        made = prepare_assistant(assistant, data, own, shared[option], place, tracker, before)
        chain.append(_part(name, option, made, data))
    last, seconds = chain[-1].teacher, sum(part.teacher.seconds for part in chain)
    return Teachers(
        last.model, last.logits, last.fingerprint, seconds, config.online, chain[-1].validation_accuracy,
        first.labels if last is first and isinstance(first, Teachers) else None,
        **several, chain=chain if config.assistants else (),
    )  # fmt: skip


def _part(name: str, option: str, teacher: Teacher, data: DataModule) -> Part:
    rows = slice(data.validation.start, data.validation.stop)
    right = accuracy(teacher.logits[rows], data.labels[rows])
    return Part(name, option, teacher, ranks.mean(right, len(data.validation)))


def _combination(
    config: TeachersConfig,
    data: DataModule,
    directory: Path,
    shared: Mapping[str, Path],
    stage: Stage,
    tracker: Tracker,
) -> Teachers:
    """Each member by itself, then all as one."""
    places = [shared[option] for option in config.first]
    for number, (option, place) in enumerate(zip(config.first, places, strict=True)):
        if place in places[:number]:
            same = list(config.first)[places.index(place)]
            raise ConfigError([f"{option}: is the same teacher as {same}; change its model, its trainer or its seed"])
    parts = []
    for name, member in config.members.items():
        option = f"teacher.members.{name}"
        own = replace(
            stage, seed=stage.seed if member.seed is None else member.seed, label=f"teacher-{name}",
            description=f"teacher {name}", options=f"{option}.trainer",
            checkpoint=stage.checkpoint and stage.checkpoint.with_name(f"teacher-{name}.ckpt"),
        )  # fmt: skip
        teacher = prepare_teacher(member, data, directory / "members" / name, shared[option], own, tracker)
        parts.append(_part(name, option, teacher, data))
    model = CombinedTeacher({part.name: part.teacher.model for part in parts}, config.combine)
    model.eval()
    labels = data.labels[: data.validation.stop].clone()
    labels[data.validation.start :] = UNLABELLED
    members = [part.teacher.logits for part in parts]
    logits = scratch(data.validation.stop, data.num_classes, directory)
    for rows in chunks(logits.shape):
        logits[rows] = model.together([member[rows] for member in members], labels[rows])
    of_validation = slice(data.validation.start, data.validation.stop)
    differing = disagreement([member[of_validation] for member in members], logits[of_validation])
    differing = {name: ranks.mean(value, len(data.validation)) for name, value in differing.items()}
    logger.info(
        "%d teachers together: not all have the same answer for %.1f%% of the validation rows",
        len(parts), 100 * differing["rows"],
    )  # fmt: skip
    seconds = sum(part.teacher.seconds for part in parts)
    key = combined_fingerprint([part.teacher.fingerprint for part in parts], config.combine)
    by_labels = labels if config.combine == "cross_entropy" else None
    return Teachers(
        model, logits, key, seconds, config.online,
        labels=by_labels, members=parts, combine=config.combine, disagreement=differing,
    )  # fmt: skip


def combined_fingerprint(members: Sequence[str], combine: str | Mapping[str, float]) -> str:
    """A hash of the members' and of how they are combined."""
    how = combine if isinstance(combine, str) else list(map(float, combine.values()))
    return hashlib.blake2b(repr((list(members), how)).encode(), digest_size=16).hexdigest()


class AssistantModule(FitModule):
    """Trains an assistant by the distillation loss of the teacher before it.

    Args:
        model: the assistant.
        trainer: how it is fitted.
        config: its other options.
        teacher: what is distilled.
    """

    def __init__(self, model: nn.Module, trainer: TrainerConfig, config: AssistantConfig, teacher: Teacher) -> None:
        super().__init__(model, trainer)
        asked = teacher.asked()
        self.config, self.lesson = config, Lesson(asked, teacher.known() if teacher.online else asked)

    def on_fit_start(self) -> None:
        """Move the teacher's logits to where the assistant is."""
        self.lesson.teacher.to(self.device)
        self.lesson.known.to(self.device)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The distillation loss, and the logits."""
        logits = self(batch.inputs).logits
        asked = self.lesson.teacher if self.training else self.lesson.known
        taught = asked.outputs(batch.index, batch.inputs).logits
        config = self.config
        return distillation_loss(logits, taught, batch.labels, config.alpha, config.temperature), logits


@dataclass(frozen=True)
class Lesson:
    """Holds a teacher as no part of the module that is trained, saved or averaged."""

    teacher: CachedTeacher | OnlineTeacher
    known: CachedTeacher | OnlineTeacher  # for validation rows

    def __deepcopy__(self, memo: dict[int, Any]) -> "Lesson":
        """Itself: a callback that averages weights copies the whole module."""
        return self


def prepare_assistant(
    config: AssistantConfig,
    data: DataModule,
    directory: Path,
    shared: Path,
    stage: Stage,
    tracker: Tracker,
    teacher: Teacher,
) -> Teacher:
    """Find or train an assistant of `teacher`, then compute its logits; see `prepare_teacher`.

    Raises:
        RunError: where the run's own was trained on other data, or by another teacher.
    """
    with seeded(stage.seed, stage.name, "init"):
        model = config.build(data.task.input_shape, data.num_classes)
    module = partial(AssistantModule, config=config, teacher=teacher)
    seconds = find_or_train(model, config.trainer, data, directory, shared, stage, tracker, module)
    model.eval().requires_grad_(False)
    key = fingerprint(model, data)
    logits = cached_logits(model, data, shared / "logits.safetensors", key, config.trainer.device)
    return Teacher(model, logits, key, seconds, teacher.online)
