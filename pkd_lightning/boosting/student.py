"""The LightningModule of one candidate student."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pkd_lightning.boosting.combine import Combination
from pkd_lightning.boosting.objectives import Distillation, Objective, RoundBatch
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.data.module import Batch
from pkd_lightning.earlier import Earlier, following, outputs_for
from pkd_lightning.fit_module import FitModule
from pkd_lightning.knowledge.attached import Knowledge, shares
from pkd_lightning.knowledge.term import Pair
from pkd_lightning.outputs import Output
from pkd_lightning.prefixes import Scales, mix
from pkd_lightning.results import OBJECTIVE, SHARE, VALUE
from pkd_lightning.teacher import CachedTeacher, OnlineTeacher
from pkd_lightning.trainer import TrainerConfig

logger = logging.getLogger(__name__)
OVERWHELMING = 0.95  # a term's share of the gradient's norm from which its weight is worth a warning


class NoTeacher(nn.Module):
    """Stands where a round asks its teacher, in a run without one."""

    def outputs(self, index: Tensor, inputs: Tensor) -> Output:
        """An empty tensor, (0,): a loss that reads the teacher all the same fails."""
        return Output(inputs.new_empty(0))


class RoundTargets(nn.Module):
    """What every candidate of a round is trained against, by sample index (rows of training and validation).

    Args:
        teacher: gives its logits g, and its features where the objective needs them.
        informed: the teacher with the features that terms of knowledge need, too; asked for training rows alone.
        known: the teacher as it is asked for validation rows; None where it is the same.
        ensemble: (N, L) logits F_{t-1}.
        indicator: (N, L) bool, 1[K+ > K-].
        bound: B.
        round_: t from 0.
        weight: (N,) of each sample's loss, or None.
        students: those so far, where the candidate reads them.
    """

    ensemble: Tensor
    indicator: Tensor
    weight: Tensor | None

    def __init__(
        self,
        teacher: CachedTeacher | OnlineTeacher | NoTeacher,
        ensemble: Tensor,
        indicator: Tensor,
        bound: float,
        round_: int,
        weight: Tensor | None = None,
        students: Sequence[nn.Module] = (),
        informed: CachedTeacher | OnlineTeacher | None = None,
        known: CachedTeacher | None = None,
    ) -> None:
        super().__init__()
        self.students = tuple(students)  # in a tuple: they are no part of the candidate
        # buffers, to be moved to the student's device at once
        self.teacher, self.informed, self.known = teacher, informed or teacher, known or teacher
        for name, value in (("ensemble", ensemble), ("indicator", indicator), ("weight", weight)):
            self.register_buffer(name, value, persistent=False)
        self.bound, self.round = bound, round_

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoundTargets":
        """Itself: it may be large, and is only read. A callback that averages weights copies the whole module."""
        return self


class StudentModule(FitModule):
    """Trains one candidate by the round's objective, together with the scales a and c where they are learned.

    Args:
        model: the student.
        trainer: how it is fitted.
        config: the boosting options.
        objective: the loss of rounds after the first.
        combination: how the student joins the ensemble.
        targets: see `RoundTargets`.
        knowledge: the terms that are added to the loss of training rows. What they train beside the student is no part
            of it.
    """

    def __init__(
        self,
        model: nn.Module,
        trainer: TrainerConfig,
        config: BoostingConfig,
        objective: Objective,
        combination: Combination,
        targets: RoundTargets,
        knowledge: Knowledge | None = None,
    ) -> None:
        own = objective.student_features if targets.round > 0 else ()
        terms = knowledge.student_features if knowledge is not None else ()
        super().__init__(model, trainer, list(dict.fromkeys((*own, *terms))))
        self.objective, self.knowledge, self.reuses_graphs = objective, knowledge, knowledge is not None
        self._beside: dict[str, Tensor] = {}
        self._heeded = False  # whether a term's share has been warned of
        self._targets = [targets]  # in a list: they are no part of what is trained, saved or averaged
        self.first = Distillation(config.alpha, config.temperature)
        initial = torch.tensor(combination.initial(targets.round) if targets.round > 0 else (0.0, 1.0))
        self.learns_scales = combination.learned and objective.sees_ensemble and targets.round > 0
        # learned scales as logarithms, which keeps them positive
        self.scale_values = nn.Parameter(initial.log() if self.learns_scales else initial, self.learns_scales)

    @property
    def targets(self) -> RoundTargets:
        """What it is trained against."""
        return self._targets[0]

    def on_fit_start(self) -> None:
        """Move the targets to where the student is."""
        self.targets.to(self.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The student's parameters, those of the terms, and the scales where they are learned, without decay, which
        would pull them towards 1.
        """
        groups = super().parameter_groups()
        if self.knowledge is not None and (attached := list(self.knowledge.parameters())):
            groups.append({"params": attached})
        if self.learns_scales:
            groups.append({"params": [self.scale_values], "weight_decay": 0.0})
        return groups

    @property
    def scales(self) -> Scales:
        """(a_t, c_t)."""
        a, c = self._scales().tolist()
        return a, c

    def _scales(self) -> Tensor:
        return self.scale_values.exp() if self.learns_scales else self.scale_values

    def earlier(self, inputs: Tensor) -> Earlier | None:
        """What the students so far give for the very inputs that this one sees, where it reads them."""
        return outputs_for(self.model, self.targets.students, inputs)

    @property
    def asked(self) -> nn.Module:
        """The student, where it reads earlier ones together with these: what is asked for logits outside of a fit."""
        return following(self.model, self.targets.students)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The round's loss, and the logits of the ensemble with the student."""
        index, targets = batch.index, self.targets
        knowledge = self.knowledge if self.training else None
        asked = targets.known if not self.training else targets.teacher if knowledge is None else targets.informed
        student, teacher = self(batch.inputs), asked.outputs(index, batch.inputs)
        ensemble = mix(targets.ensemble[index], student.logits, self._scales())
        view = RoundBatch(
            student.logits, ensemble, teacher.logits, batch.labels, targets.indicator[index], targets.bound,
            None if targets.weight is None else targets.weight[index], student.features, teacher.features,
        )  # fmt: skip
        loss = (self.first.student_loss if targets.round == 0 else self.objective.loss)(view)
        if knowledge is not None:
            loss = self._with(knowledge, loss, Pair(student, teacher, batch.labels, index))
        return loss, ensemble

    def _with(self, knowledge: Knowledge, loss: Tensor, pair: Pair) -> Tensor:
        """The loss with the terms of knowledge; in the first batch of an epoch each one's pull is measured."""
        terms = knowledge.losses(pair, min(1.0, self.global_step / self.total_steps))
        self._beside = {f"{VALUE}{name}": value.detach() for name, value in terms.items()}
        if self._batch == 0:
            found = shares({OBJECTIVE: loss, **terms}, list(self.model.parameters()))
            self._beside |= {f"{SHARE}{name}": share for name, share in found.items()}
        return sum(terms.values(), loss)

    @property
    def reported(self) -> Sequence[str]:
        """Each term's weighted loss, and each one's share of the gradient's norm, that of the objective too."""
        names = list(self.knowledge.terms) if self.knowledge is not None else []
        return [f"{VALUE}{name}" for name in names] + [f"{SHARE}{name}" for name in (OBJECTIVE, *names) if names]

    def beside(self) -> dict[str, Tensor]:
        """What `reported` names, of the last training batch."""
        return self._beside

    def heed(self, means: Mapping[str, float]) -> None:
        """Warn, once a fit, of a term that leaves next to nothing of the gradient to the objective."""
        for name in self.knowledge.terms if self.knowledge is not None and not self._heeded else ():
            share = means.get(f"{SHARE}{name}", 0.0)
            if share > OVERWHELMING:
                self._heeded = True
                logger.warning(
                    "the term %s makes %.0f%% of the gradient and the objective %.0f%%: lower its weight, "
                    "boosting.knowledge.%s, or compare features whose size is bounded, such as a norm's",
                    name, 100 * share, 100 * means[f"{SHARE}{OBJECTIVE}"], name,
                )  # fmt: skip
