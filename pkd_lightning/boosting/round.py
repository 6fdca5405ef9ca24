"""One round: what its candidates are trained against, and how one that is trained becomes a `Candidate`, judged."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from pkd_lightning import ranks
from pkd_lightning.boosting.combine import Combination
from pkd_lightning.boosting.objectives import Objective
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.state import BoostingState
from pkd_lightning.boosting.student import NoTeacher, RoundTargets, StudentModule
from pkd_lightning.boosting.weak_learner import Candidate, WeakLearnerCheck, fit_scales, judge, required
from pkd_lightning.data.module import DataModule
from pkd_lightning.earlier import following, reads
from pkd_lightning.errors import Diverged
from pkd_lightning.fitting import FitResult, predict
from pkd_lightning.knowledge.attached import Knowledge, example, for_models
from pkd_lightning.losses import distillation_loss
from pkd_lightning.matrix import Difference, largest, quantile, scratch
from pkd_lightning.prefixes import Scales, mix
from pkd_lightning.teacher import Teacher
from pkd_lightning.trainer import TrainerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """What the candidates of a round have in common.

    Attributes:
        config: the boosting options.
        objective: the loss of rounds after the first.
        combination: how a student joins the ensemble.
        data: the data module.
        teacher: the teacher, if there is one.
        state: of the loop before the round.
        directory: where large matrices of logits are kept for the time being.
        students: gives the students so far, for candidates that read them.
    """

    config: BoostingConfig
    objective: Objective
    combination: Combination
    data: DataModule
    teacher: Teacher | None
    state: BoostingState
    directory: Path
    students: Callable[[], Sequence[nn.Module]] = tuple

    @property
    def later(self) -> bool:
        """Whether there is an ensemble already."""
        return self.state.round > 0

    @property
    def require(self) -> str:
        """What candidates are judged by: `condition` or `improvement`."""
        return required(self.config, self.objective)

    def attempt(self, model: nn.Module, trainer: TrainerConfig) -> "Attempt":
        """All that is needed to train `model` and to judge it."""
        data, config = self.data, self.config
        features = self.objective.teacher_features if self.later else ()
        knowledge = self.knowledge(model)
        targets = self.targets(features, self.students() if reads(model) else (), knowledge)
        module = StudentModule(model, trainer, config, self.objective, self.combination, targets, knowledge)
        logits = scratch(data.validation.stop, data.num_classes, self.directory)
        check = WeakLearnerCheck(data, self.edges, config.weak_learner, logits[: len(data.training)])
        return Attempt(self, module, check, logits)

    def knowledge(self, model: nn.Module) -> Knowledge | None:
        """The terms of knowledge of a fit of `model`, with new parts; None where there are none."""
        data = self.data
        if not self.config.knowledge or self.teacher is None:  # terms without a teacher are a fault of the options
            return None
        terms = for_models(self.config.knowledge, model, self.teacher.model)
        inputs = data.task.prepare(data.inputs[[0, 0]])
        asked = following(model, self.students() if reads(model) else ())
        pair = example(terms, model, asked.cpu(), self.teacher.model.cpu(), inputs, data.num_classes)
        return Knowledge(terms, pair, len(data.training))

    def targets(
        self,
        features: Sequence[str] = (),
        students: Sequence[nn.Module] = (),
        knowledge: Knowledge | None = None,
    ) -> RoundTargets:
        """What students are trained against: with these features of the teacher, and these earlier students."""
        state, informed = self.state, None
        if knowledge is not None and self.teacher is not None:
            informed = self.teacher.asked([*features, *knowledge.teacher_features])
        known = self.teacher.known(features) if self.teacher is not None and self.teacher.online else None
        return RoundTargets(
            NoTeacher() if self.teacher is None else self.teacher.asked(features), state.ensemble_logits,
            state.indicator(self.directory), max(state.bound, 1e-3), state.round,
            state.sample_weights() if self.config.weights == "samples" and self.later else None,
            students, informed, known,
        )  # fmt: skip

    def edges(self, logits: Tensor, clipped: bool = True) -> Tensor | None:
        """Edges of a candidate with logits (training rows, L): (L,); None without a teacher.

        Where residuals are clipped, by the B that the round has if the candidate is accepted: what is judged is then
        what enters the update, as B-DISTIL's proof has it, and abs(l) <= B holds for the B that eta is made of. Without
        it, one exploding entry would decide the edge of its class.
        """
        if self.teacher is None or self.state.residuals is None:
            return None
        residual = Difference(logits, self.teacher.logits[: len(logits)])
        if clipped and self.config.bound_quantile < 1:
            residual = replace(residual, bound=self.bound_with(residual))
        return self.state.residuals.edges(residual)

    def bound_with(self, residual: Difference) -> float:
        """B of the students so far and one with these residuals of the training rows."""
        return max(self.state.bound, quantile(residual, self.config.bound_quantile))

    def validation_loss(self, logits: Tensor, scales: Scales) -> float:
        """Distillation loss on the validation rows of the ensemble with a student."""
        part = self.data.validation
        return ranks.mean(self._loss(logits, scales, slice(part.start, part.stop)), len(part))

    def judged_losses(self, logits: Tensor, scales: Scales) -> tuple[float, float]:
        """Validation loss of the ensemble with a student and without it, as the student is judged by them.

        Scales that were solved for on validation rows make any student an improvement there. So they are solved for
        anew on one half of the rows and the loss is taken on the other; without the student that of the ensemble is.
        """
        if not (self.combination.held_out and self.later):
            return self.validation_loss(logits, scales), self.validation_loss(logits, (1.0, 0.0))
        return self._crossed_loss(logits), self._crossed_loss(torch.zeros(1, 1).expand_as(logits))

    def _crossed_loss(self, logits: Tensor) -> float:
        part, before = self.data.validation, ranks.own(self.data.whole[1]).start  # rows of other processes
        halves = [slice(part.start + (first + before) % 2, part.stop, 2) for first in (0, 1)]
        total = 0.0
        for rows, others in zip(halves, reversed(halves), strict=True):
            scales = self._solved(logits, others)
            count = len(self.data.labels[rows])
            total += count * self._loss(logits, scales, rows) if count else 0.0
        return ranks.mean(total / max(1, len(part)), len(part))

    def _loss(self, logits: Tensor, scales: Scales, rows: slice) -> float:
        mixed = mix(self.state.ensemble_logits[rows], logits[rows], scales)
        teacher, labels = self.teacher_logits(rows), self.data.labels[rows]
        return float(distillation_loss(mixed, teacher, labels, self.config.alpha, self.config.temperature))

    def teacher_logits(self, rows: slice) -> Tensor:
        """The teacher's logits of these rows; an empty tensor without one, where alpha is 1 and nobody reads it."""
        return torch.empty(0) if self.teacher is None else self.teacher.logits[rows]

    def scales(self, logits: Tensor, learned: Scales) -> Scales:
        """(a, c) of a student with these logits: fitted on the rows of the combination, or as they were in training."""
        if not (self.combination.learned and self.later):
            return learned
        part = self.data.validation if self.combination.held_out else self.data.training
        return self._solved(logits, slice(part.start, part.stop))

    def _solved(self, logits: Tensor, rows: slice) -> Scales:
        ensemble, teacher, labels = self.state.ensemble_logits[rows], self.teacher_logits(rows), self.data.labels[rows]
        return fit_scales(ensemble, logits[rows], teacher, labels, self.config)

    def measured(self, model: nn.Module, logits: Tensor, learned: Scales, fit: FitResult) -> Candidate:
        """A trained student as it would join the ensemble, accepted by nothing yet.

        Args:
            model: the student.
            logits: (training + validation rows, L), its own.
            learned: (a, c) as they were in its training.
            fit: what its fit gave.

        Raises:
            Diverged: where its logits, or the loss of the ensemble with it, are not finite.
        """
        n, name = len(self.data.training), f"round-{self.state.round:02d}"
        if not math.isfinite(largest(logits)):
            raise Diverged(f"{name}: the student's logits are not all finite")
        edges = self.edges(logits[:n])
        unclipped = self.edges(logits[:n], clipped=False) if self.config.bound_quantile < 1 else edges
        scales = self.scales(logits, learned)
        loss = self.validation_loss(logits, scales)
        if not math.isfinite(loss):  # its NaN would be in every later prefix
            raise Diverged(f"{name}: the validation loss of the ensemble with the student is not finite")
        return Candidate(model, scales, logits, edges, unclipped, loss, fit, None)


@dataclass(frozen=True)
class Attempt:
    """A candidate in training. Whoever trains `module`, with `callbacks`, has it judged afterwards.

    Attributes:
        round: its round.
        module: the student with its loss.
        check: of the weak-learning condition, on the training rows.
        logits: (training + validation rows, L), where the student's are written to.
    """

    round: Round
    module: StudentModule
    check: WeakLearnerCheck
    logits: Tensor

    @property
    def callbacks(self) -> list[L.Callback]:
        """Of its fit: the check, where candidates are judged by the condition."""
        return [self.check] if self.round.require == "condition" and self.round.later else []

    def judged(self, fit: FitResult, description: str) -> Candidate:
        """The candidate, now that it is trained.

        Args:
            fit: what its fit gave.
            description: of the attempt, for the log.

        Raises:
            Diverged: where its logits, or the loss of the ensemble with it, are not finite.
        """
        round_, logits, weak = self.round, self.logits, self.round.config.weak_learner
        self._predict()
        candidate = round_.measured(self.module.model, logits, self.module.scales, fit)
        edges, (loss, previous) = candidate.edges, round_.judged_losses(logits, candidate.scales)
        accepted_by = judge(round_.state.round, edges, candidate.unclipped_edges, loss, previous, round_.require, weak)
        values = [] if edges is None else edges.tolist()
        logger.debug("%s: edges of the classes: %s", description, " ".join(f"{edge:.3g}" for edge in values) or "none")
        if accepted_by is None:
            above = sum(edge > weak.margin for edge in values)
            counted = f" edges above {weak.margin:g} in {above} of {len(values)} classes," if values else ""
            logger.info(
                "%s: not accepted by %s;%s validation loss of the ensemble %.4g, without it %.4g",
                description, round_.require, counted, loss, previous,
            )  # fmt: skip
        return replace(candidate, accepted_by=accepted_by, judged_loss=loss)

    def _predict(self) -> None:
        data, device, model = self.round.data, self.module.settings.device, self.module.asked
        if self.check.held is not None:  # its logits of the training rows are those of the check
            self.module.load_state_dict(self.check.held)
            if not self.check.known:  # they were found in a process that was stopped
                predict(model, data, data.training, device, out=self.logits[: len(data.training)])
            predict(model, data, data.validation, device, out=self.logits[len(data.training) :])
        else:
            predict(model, data, range(data.validation.stop), device, out=self.logits)
