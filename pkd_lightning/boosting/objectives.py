"""The loss of rounds 2..T. The first round is always the distillation loss of the student alone."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch.nn.functional as F
from torch import Tensor

from pkd_lightning.boosting.options import BoostingConfig, FirstTerm
from pkd_lightning.checks import Faults, build, collect, resolve
from pkd_lightning.errors import ConfigError
from pkd_lightning.losses import distillation_loss, residual_barrier_loss, soft_loss
from pkd_lightning.outputs import NONE


class RoundBatch(NamedTuple):
    """What a round's loss sees of one batch.

    Attributes:
        student: (batch, classes) logits f_t.
        ensemble: (batch, classes) logits a * F_{t-1} + c * f_t of the ensemble with the student.
        teacher: (batch, classes) logits g; without a teacher an empty tensor, (0,).
        target: (batch,) labels.
        indicator: (batch, classes) bool, 1[K+ > K-].
        bound: B of the students so far, see `boosting.bound_quantile`.
        weight: (batch,) of each sample's loss, 1 for a validation row; None where nothing is weighed.
        student_features: what the modules at the objective's `student_features` gave for the batch.
        teacher_features: what those of the teacher at `teacher_features` gave, without gradients.
    """

    student: Tensor
    ensemble: Tensor
    teacher: Tensor
    target: Tensor
    indicator: Tensor
    bound: float
    weight: Tensor | None = None
    student_features: Mapping[str, Tensor] = NONE
    teacher_features: Mapping[str, Tensor] = NONE


@dataclass(frozen=True)
class Objective:
    """A round loss. Subclasses are frozen dataclasses of their options, and give `loss`.

    Attributes:
        accept_by: what a candidate trained with it is judged by where `boosting.weak_learner.require` is `auto`.
        sees_ensemble: the loss depends on the ensemble's logits, so learned scales get a gradient from it.
        reads_residuals: the loss depends on K+ and K-, by `RoundBatch.indicator`. Where it does not, a run of more
            rounds goes on from those that are there.
        weighs_samples: the loss multiplies each sample's by `RoundBatch.weight`, so `boosting.weights` may be set.
        student_features: paths of the student's modules whose outputs the loss needs (`blocks.0`); a subclass may make
            it an option.
        teacher_features: of the teacher's, whose model is then called in every step, on the inputs of the student.
    """

    student_features: ClassVar[Sequence[str]] = ()
    teacher_features: ClassVar[Sequence[str]] = ()
    accept_by: ClassVar[Literal["condition", "improvement"]] = "improvement"
    sees_ensemble: ClassVar[bool] = False
    reads_residuals: ClassVar[bool] = True
    weighs_samples: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What reports call it."""
        return type(self).__name__.lower()

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads the teacher's logits or features; a run with teacher=none needs one that does not."""
        return True

    def loss(self, batch: RoundBatch) -> Tensor:
        """The scalar loss of a batch."""
        raise NotImplementedError


@dataclass(frozen=True)
class Distillation(Objective):
    """What the objectives here have in common.

    Args:
        alpha: weight of the hard loss.
        temperature: tau of the soft loss.
    """

    alpha: float = BoostingConfig.alpha
    temperature: float = BoostingConfig.temperature

    def __post_init__(self) -> None:
        self._faults().raise_if_any()

    @property
    def needs_teacher(self) -> bool:
        """Not where labels are all there is to the loss, alpha = 1."""
        return self.alpha < 1 or bool(self.teacher_features)

    def _faults(self) -> Faults:
        faults = Faults(self)
        faults.number("alpha", 0, 1)
        faults.number("temperature", 0, exclusive=True)
        return faults

    def student_loss(self, batch: RoundBatch) -> Tensor:
        """The distillation loss of the student alone."""
        return self._distillation(batch, batch.student)

    def ensemble_loss(self, batch: RoundBatch) -> Tensor:
        """The distillation loss of the ensemble with the student."""
        return self._distillation(batch, batch.ensemble)

    def _distillation(self, batch: RoundBatch, logits: Tensor) -> Tensor:
        return distillation_loss(logits, batch.teacher, batch.target, self.alpha, self.temperature, batch.weight)


@dataclass(frozen=True)
class Published(Distillation):
    """Mamba-PKD (arXiv 2503.01727): alpha * first term + (1 - alpha) * L_B. K+ and K- enter by their order, in L_B.

    Args:
        first_term: see `BoostingConfig`.
        gamma: divisor of the barrier loss.
    """

    accept_by = "condition"
    first_term: FirstTerm = BoostingConfig.first_term
    gamma: float = BoostingConfig.gamma

    @property
    def needs_teacher(self) -> bool:
        """Always: the barrier is of the residual, and K+ and K- are."""
        return True

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.choice("first_term", get_args(FirstTerm))
        faults.number("gamma", 0, exclusive=True)
        return faults

    def loss(self, batch: RoundBatch) -> Tensor:
        """The loss as printed, or in another reading of its first term."""
        barrier = residual_barrier_loss(batch.student - batch.teacher, batch.indicator, batch.bound, self.gamma)
        if self.first_term == "both":
            return self.student_loss(batch) + (1 - self.alpha) * barrier
        if self.first_term == "soft":
            first = soft_loss(batch.student, batch.teacher, self.temperature)
        else:
            first = F.cross_entropy(batch.student, batch.target)
        return self.alpha * first + (1 - self.alpha) * barrier


@dataclass(frozen=True)
class Additive(Distillation):
    """Functional gradient boosting: each student corrects the ensemble before it. With combine=sum."""

    sees_ensemble = True
    reads_residuals = False
    weighs_samples = True

    def loss(self, batch: RoundBatch) -> Tensor:
        """The distillation loss of the ensemble."""
        return self.ensemble_loss(batch)


@dataclass(frozen=True)
class Anchored(Distillation):
    """Each student is a classifier of its own and corrects the ensemble before it. With combine=learned.

    Args:
        anchor: weight of the ensemble's loss; the student's own has 1 - anchor.
    """

    sees_ensemble = True
    reads_residuals = False
    weighs_samples = True
    anchor: float = BoostingConfig.anchor

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.number("anchor", 0, 1)
        return faults

    def loss(self, batch: RoundBatch) -> Tensor:
        """Both distillation losses."""
        return (1 - self.anchor) * self.student_loss(batch) + self.anchor * self.ensemble_loss(batch)


@dataclass(frozen=True)
class Independent(Distillation):
    """The baseline: students that know nothing of each other."""

    reads_residuals = False
    weighs_samples = True

    def loss(self, batch: RoundBatch) -> Tensor:
        """The distillation loss of the student."""
        return self.student_loss(batch)


# the short names
published, additive, anchored, independent = Published, Additive, Anchored, Independent


def objective_of(config: BoostingConfig) -> Objective:
    """The objective of the boosting options. What it leaves open of its own options, it has from theirs.

    Raises:
        ConfigError: where there is none of that name, an option is wrong, or it does not weigh samples and should.
    """
    faults: list[str] = []
    objective = collect(faults, "objective", lambda: _made(config.objective, config))
    if objective is not None and config.weights == "samples" and not objective.weighs_samples:
        faults.append(
            f"weights='samples': must be none with objective={objective.name!r}, whose loss does not weigh samples"
        )
    if faults or objective is None:
        raise ConfigError(faults)
    return objective


def objective_name(config: BoostingConfig) -> str:
    """What reports call the loss that students are trained by: of peers theirs, which takes the objective's place."""
    return objective_of(config).name if config.peers is None else config.peers.rpartition(".")[2].lower()


def _made(given: Any, config: BoostingConfig) -> Objective:
    if isinstance(given, str):
        given = resolve(given, sys.modules[__name__], _gives_one, Objective.__name__)
    if isinstance(given, Objective):
        return given
    kind, own = getattr(given, "func", given), getattr(given, "keywords", {})
    if not _gives_one(kind):
        raise ConfigError([f"gives no {Objective.__name__}: {kind!r}"])
    shared = {field.name: getattr(config, field.name) for field in fields(kind) if hasattr(config, field.name)}
    return build(kind, {**shared, **own})  # type: ignore[no-any-return]


def _gives_one(found: object) -> bool:
    return isinstance(found, Objective) or (isinstance(found, type) and issubclass(found, Objective))
