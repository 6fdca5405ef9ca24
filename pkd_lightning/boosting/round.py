"""One round: what its candidates are trained against, and how one that is trained becomes a `Candidate`, judged."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
from torch import Tensor, nn

from pkd_lightning import ranks
from pkd_lightning.boosting.combine import Combination
from pkd_lightning.boosting.objectives import Objective
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.state import BoostingState
from pkd_lightning.boosting.student import RoundTargets, StudentModule
from pkd_lightning.boosting.weak_learner import Candidate, WeakLearnerCheck, fit_scales, judge, required
from pkd_lightning.data.module import DataModule
from pkd_lightning.earlier import following, reads
from pkd_lightning.errors import RunError
from pkd_lightning.fitting import FitResult, predict
from pkd_lightning.knowledge.attached import Knowledge, example
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
        teacher: the teacher.
        state: of the loop before the round.
        directory: where large matrices of logits are kept for the time being.
        students: gives the students so far, for candidates that read them.
    """

    config: BoostingConfig
    objective: Objective
    combination: Combination
    data: DataModule
    teacher: Teacher
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
        state, data, config = self.state, self.data, self.config
        features = list(self.objective.teacher_features if self.later else ())
        knowledge = self.knowledge(model)
        informed = None if knowledge is None else self.teacher.asked([*features, *knowledge.teacher_features])
        targets = RoundTargets(
            self.teacher.asked(features), state.ensemble_logits,
            state.indicator(self.directory), max(state.bound, 1e-3), state.round,
            state.sample_weights() if config.weights == "samples" and self.later else None,
            self.students() if reads(model) else (), informed,
        )  # fmt: skip
        module = StudentModule(model, trainer, config, self.objective, self.combination, targets, knowledge)
        logits = scratch(data.validation.stop, data.num_classes, self.directory)
        check = WeakLearnerCheck(data, self.edges, config.weak_learner, logits[: len(data.training)])
        return Attempt(self, module, check, logits)

    def knowledge(self, model: nn.Module) -> Knowledge | None:
        """The terms of knowledge of a fit of `model`, with new parts; None where there are none."""
        terms, data = self.config.knowledge, self.data
        if not terms:
            return None
        inputs = data.task.prepare(data.inputs[[0, 0]])
        asked = following(model, self.students() if reads(model) else ())
        pair = example(terms, model, asked.cpu(), self.teacher.model.cpu(), inputs, data.num_classes)
        return Knowledge(terms, pair, len(data.training))

    def edges(self, logits: Tensor, clipped: bool = True) -> Tensor:
        """Edges of a candidate with logits (training rows, L): (L,).

        Where residuals are clipped, by the B that the round has if the candidate is accepted: what is judged is then
        what enters the update, as B-DISTIL's proof has it, and abs(l) <= B holds for the B that eta is made of. Without
        it, one exploding entry would decide the edge of its class.
        """
        residual = Difference(logits, self.teacher.logits[: len(logits)])
        if clipped and self.config.bound_quantile < 1:
            residual = replace(residual, bound=self.bound_with(residual))
        return self.state.residuals.edges(residual)

    def bound_with(self, residual: Difference) -> float:
        """B of the students so far and one with these residuals of the training rows."""
        return max(self.state.bound, quantile(residual, self.config.bound_quantile))

    def validation_loss(self, logits: Tensor, scales: Scales) -> float:
        """Distillation loss on the validation rows of the ensemble with a student."""
        rows = slice(self.data.validation.start, self.data.validation.stop)
        mixed = mix(self.state.ensemble_logits[rows], logits[rows], scales)
        teacher, labels = self.teacher.logits[rows], self.data.labels[rows]
        loss = distillation_loss(mixed, teacher, labels, self.config.alpha, self.config.temperature)
        return ranks.mean(float(loss), len(labels))

    def scales(self, logits: Tensor, learned: Scales) -> Scales:
        """(a, c) of a student with these logits: fitted on the training rows, or as they were in its training."""
        if not (self.combination.learned and self.later):
            return learned
        rows = slice(len(self.data.training))
        ensemble, teacher, labels = self.state.ensemble_logits[rows], self.teacher.logits[rows], self.data.labels[rows]
        return fit_scales(ensemble, logits[rows], teacher, labels, self.config)


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
            RunError: where its logits, or the loss of the ensemble with it, are not finite.
        """
        round_, state, logits = self.round, self.round.state, self.logits
        n = len(round_.data.training)
        self._predict()
        if not math.isfinite(largest(logits)):
            raise RunError(f"round-{state.round:02d}: the student's logits are not all finite")
        edges = round_.edges(logits[:n])
        unclipped = round_.edges(logits[:n], clipped=False) if round_.config.bound_quantile < 1 else edges
        scales = round_.scales(logits, self.module.scales)
        loss, previous = round_.validation_loss(logits, scales), round_.validation_loss(logits, (1.0, 0.0))
        if not math.isfinite(loss):  # its NaN would be in every later prefix
            raise RunError(
                f"round-{state.round:02d}: the validation loss of the ensemble with the student is not finite"
            )
        weak = round_.config.weak_learner
        accepted_by = judge(state.round, edges, unclipped, loss, previous, round_.require, weak)
        logger.debug("%s: edges of the classes: %s", description, " ".join(f"{edge:.3g}" for edge in edges.tolist()))
        if accepted_by is None:
            logger.info(
                "%s: not accepted by %s; edges above %g in %d of %d classes, validation loss of the ensemble %.4g,"
                " without it %.4g",
                description, round_.require, weak.margin, int((edges > weak.margin).sum()), len(edges), loss, previous,
            )  # fmt: skip
        return Candidate(self.module.model, scales, logits, edges, unclipped, loss, fit, accepted_by)

    def _predict(self) -> None:
        data, device, model = self.round.data, self.module.settings.device, self.module.asked
        if self.check.held is not None:  # its logits of the training rows are those of the check
            self.module.load_state_dict(self.check.held)
            if not self.check.known:  # they were found in a process that was stopped
                predict(model, data, data.training, device, out=self.logits[: len(data.training)])
            predict(model, data, data.validation, device, out=self.logits[len(data.training) :])
        else:
            predict(model, data, range(data.validation.stop), device, out=self.logits)
