"""The parts of an experiment, tried on the data before anything is trained."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import nn

from pkd_lightning import ranks
from pkd_lightning.boosting.combine import combination_of
from pkd_lightning.boosting.objectives import Objective, RoundBatch, objective_of
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.peers import peer_loss_of, peer_rungs
from pkd_lightning.checks import collect, under
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.earlier import Following, following, reads
from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.attached import Knowledge, example, for_models, try_losses
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.outputs import NONE, Taps
from pkd_lightning.teacher import TeacherConfig
from pkd_lightning.teachers.options import TeachersConfig
from pkd_lightning.teachers.trying import try_teacher, try_teachers
from pkd_lightning.trainer import TrainerConfig
from pkd_lightning.trial import try_model

T = TypeVar("T")
TORCH_THREADS = torch.get_num_threads()  # before any run sets them

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """The validated parts of an experiment; without a teacher, that part is None."""

    data: DataConfig
    teacher: TeacherConfig | TeachersConfig | None
    student: Ladder
    boosting: BoostingConfig
    trainer: TrainerConfig

    def check(self, data: DataModule) -> None:
        """Try what depends on the inputs: the teacher, every rung, augmentation, the round loss and the combination.

        Of a model everything is tried that will be done to it, see `try_model`.

        Raises:
            ConfigError: listing every fault.
        """
        logger.info("trying the models on two samples")
        rounds = (
            1 if self.boosting.grow_from else self.boosting.rounds
        )  # a source's rounds need no rungs of this ladder
        faults = under("student", self.student.faults(rounds, data.task.input_shape))
        inputs = data.task.prepare(data.inputs[[0, 0]])
        attempt = partial(try_model, inputs=inputs, num_classes=data.num_classes, samples=len(data.training))
        for index in range(0 if faults else len(self.student)):
            name, rungs = f"student.rungs.{index}", range(index + 1)
            collect(faults, name, partial(attempt, name, partial(self._student, data, rungs), trainer=self.trainer))
            build = partial(self._student, data, [*rungs, index])  # after one of its own rung
            if self.student.repeat and not faults and isinstance(build(), Following):
                collect(faults, name, partial(attempt, name, build, trainer=self.trainer))
        teacher: nn.Module | None = None
        if isinstance(self.teacher, TeachersConfig):
            teacher = try_teachers(self.teacher, data, attempt, faults)
        elif self.teacher is not None:
            teacher = try_teacher(self.teacher, data, attempt, faults)
        if self.data.augment is not None:
            collect(faults, "data", lambda: self._try_augmentation(data))
        if self.boosting.peers is None:
            self._try_round(data, inputs, teacher, faults)
        elif not faults:
            collect(faults, "boosting", lambda: self._try_peers(data, inputs))
        collect(faults, "boosting", self._try_combination)
        if faults:
            raise ConfigError(faults)
        within = [name for name, term in self.boosting.knowledge.items() if term.within_batch]
        if within and ranks.size() > 1:
            logger.warning(
                "knowledge: %s compare the samples that a process has of a batch, about %.0f of %d; weights chosen for"
                " whole batches may not fit",
                ", ".join(within), self.trainer.batch_size / ranks.size(), self.trainer.batch_size,
            )  # fmt: skip

    def _student(self, data: DataModule, rungs: Sequence[int]) -> nn.Module:
        """A new student of the last of `rungs`; where it reads earlier ones, together with one of each rung before."""

        @cache
        def earlier() -> list[nn.Module]:
            students: list[nn.Module] = []
            for rung in rungs[:-1]:
                students.append(self.student.build(rung, data.task.input_shape, data.num_classes, lambda: students))
            return students

        model = self.student.build(rungs[-1], data.task.input_shape, data.num_classes, earlier)
        return following(model, earlier() if reads(model) else ())

    def _try_augmentation(self, data: DataModule) -> None:
        raw = data.inputs[[0, 0]]
        found: Any = None
        with reported("augment"):
            assert self.data.augment is not None
            found = self.data.augment(raw.clone(), torch.Generator().manual_seed(0))
        if getattr(found, "shape", None) != raw.shape:
            raise ConfigError([f"augment: gives no tensor of the inputs' shape {tuple(raw.shape)}"])

    def _try_round(self, data: DataModule, inputs: torch.Tensor, teacher: nn.Module | None, faults: list[str]) -> None:
        """The round loss, once, or for each rung where it needs features, and the combination."""
        objective, classes = objective_of(self.boosting), data.num_classes
        with_features = bool(objective.student_features or objective.teacher_features)
        for index in range(len(self.student) if with_features else 1):
            if with_features and faults:  # models that cannot be built have no features
                break

            def attempt(rung: int = index) -> None:
                of_student, of_teacher = NONE, NONE
                if with_features:
                    assert teacher is not None  # or there are faults
                    student = self._student(data, range(rung + 1))
                    of_student = features(student, objective, "student_features", inputs)
                    with torch.no_grad():
                        of_teacher = features(teacher, objective, "teacher_features", inputs)
                self._try_loss(objective, classes, of_student, of_teacher)

            collect(faults, "boosting", attempt)
        for index in range(len(self.student) if self.boosting.knowledge and not faults else 0):
            collect(faults, "boosting.knowledge", partial(self._try_knowledge, data, inputs, teacher, index))

    def _try_knowledge(self, data: DataModule, inputs: torch.Tensor, teacher: nn.Module | None, rung: int) -> None:
        """The terms of knowledge, once, with a student of a rung."""
        asked = self._student(data, range(rung + 1))
        own = asked.model if isinstance(asked, Following) else asked
        terms = for_models(self.boosting.knowledge, own, teacher)
        pair = example(terms, own, asked, teacher, inputs, data.num_classes)
        try_losses(Knowledge(terms, pair, len(data.training)), pair)

    def _try_peers(self, data: DataModule, inputs: torch.Tensor) -> None:
        """What peers learn from each other, and that none reads earlier students."""
        rungs = sorted(set(peer_rungs(self.student, self.boosting.rounds)))
        reading = [rung for rung in rungs if isinstance(self._student(data, range(rung + 1)), Following)]
        if reading:
            raise ConfigError(
                [f"peers={self.boosting.peers!r}: the students of student.rungs.{reading[0]} read earlier ones, and"
                 " peers have none; choose another ladder, or peers=null"]
            )  # fmt: skip
        make = peer_loss_of(self.boosting)
        assert make is not None
        logits = torch.zeros(2, len(inputs), data.num_classes, requires_grad=True)
        shapes: list[Any] = []
        with reported("peers"):
            peer_loss = make(2, data.num_classes, self.boosting.temperature)
            shapes = [part.shape for part in peer_loss(logits, torch.zeros(len(inputs), dtype=torch.int64))]
        if shapes != [(2,), ()]:
            raise ConfigError(["peers: gives no loss of each peer, and one that they share"])

    def _try_loss(
        self,
        objective: Objective,
        classes: int,
        of_student: Mapping[str, torch.Tensor],
        of_teacher: Mapping[str, torch.Tensor],
    ) -> None:
        logits = torch.zeros(3, 2, classes, requires_grad=True)
        batch = RoundBatch(
            logits[0], logits[1], logits[2].detach(), torch.zeros(2, dtype=torch.int64),
            torch.ones(2, classes, dtype=torch.bool), 1.0,
            torch.ones(2) if self.boosting.weights == "samples" else None, of_student, of_teacher,
        )  # fmt: skip
        loss: Any = None
        with reported("objective"):
            loss = objective.loss(batch)
        if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
            raise ConfigError(["objective: its loss is not a scalar tensor"])

    def _try_combination(self) -> None:
        with reported("combine"):
            a, c = combination_of(self.boosting).initial(1)
            if not (a > 0 and c > 0 and math.isfinite(a + c)):
                raise ValueError(f"initial(1) gives ({a}, {c}), not two positive numbers")


def features(model: nn.Module, objective: Objective, key: str, inputs: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """What the modules of a model, of one that follows others its own, at the objective's `key` give for inputs.

    Raises:
        ConfigError: where it has no such modules.
    """
    own = model.model if isinstance(model, Following) else model
    try:
        with Taps(own, getattr(objective, key)) as taps:
            return taps.call(model, inputs).features
    except ConfigError as error:
        raise ConfigError(under(f"objective.{key}", error.faults)) from error


@contextmanager
def reported(key: str) -> Iterator[None]:
    """Turn whatever the user's code at `key` raises into a fault."""
    try:
        yield
    except Exception as error:
        raise ConfigError([f"{key}: fails ({type(error).__name__}: {error})"]) from error
