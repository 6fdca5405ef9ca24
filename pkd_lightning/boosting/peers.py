"""Peers: all students of a ladder trained at once, in one fit, where they learn from each other.

Deep mutual learning (`mutual`, Zhang et al., arXiv 1706.00384) and ONE (`one`, Lan et al., arXiv 1806.04606). Neither
needs a teacher; where there is one, peers may learn from it too.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning import ranks
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.student import RoundTargets
from pkd_lightning.boosting.weak_learner import Candidate
from pkd_lightning.checks import resolve, under
from pkd_lightning.data.module import Batch
from pkd_lightning.errors import ConfigError
from pkd_lightning.fit_module import FitModule
from pkd_lightning.fitting import FitResult, Stage, fit, predict
from pkd_lightning.losses import distillation_loss, mutual_losses, soft_loss
from pkd_lightning.matrix import scratch
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.outputs import output_of
from pkd_lightning.seeding import seeded
from pkd_lightning.trainer import TrainerConfig

STAGE = "peers"  # of the fit, in metrics.jsonl and trackers
TOGETHER = "together"  # in the records: trained in one fit with the other students

logger = logging.getLogger(__name__)


class PeerLoss(nn.Module):
    """What peers learn from each other. Parameters of its own are trained with them, and dropped after the fit.

    Args:
        peers: K, at least 2.
        classes: L.
        temperature: tau.
    """

    def __init__(self, peers: int, classes: int, temperature: float) -> None:
        super().__init__()
        self.peers, self.classes, self.temperature = peers, classes, temperature

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each peer beside that of its labels, (K,), and one more that all of them share, a scalar.

        Args:
            logits: (K, batch, classes).
            target: (batch,) labels.
        """
        raise NotImplementedError


class Mutual(PeerLoss):
    """Deep mutual learning: see `mutual_losses`."""

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What each has to learn from the others, and nothing more."""
        return mutual_losses(logits, self.temperature), logits.new_zeros(())


class One(PeerLoss):
    """ONE: a gate makes an ensemble of the peers, which learns the labels, and each peer learns from the ensemble.

    The ensemble's logits are sum_k w_k z_k, w = softmax(gate(z_1, ..., z_K)). Its cross-entropy trains gate and peers.
    Each peer has tau^2 * KL(softmax(ensemble / tau) || softmax(own / tau)) beside, where the ensemble is a constant.

    The original's peers are branches of one network: they share its low layers, whose features the gate reads. Here
    each is a model of its own, and the gate reads the logits, as constants. It starts as the mean.
    """

    def __init__(self, peers: int, classes: int, temperature: float) -> None:
        super().__init__(peers, classes, temperature)
        self.gate = nn.Linear(peers * classes, peers)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def ensemble(self, logits: Tensor) -> Tensor:
        """The ensemble's logits (batch, classes) of the peers' (K, batch, classes)."""
        weights: Tensor = self.gate(logits.detach().transpose(0, 1).flatten(1)).softmax(-1)
        return (weights.T[..., None] * logits).sum(0)

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What each has to learn from the ensemble, and the ensemble's cross-entropy."""
        ensemble = self.ensemble(logits)
        constant = ensemble.detach()
        learned = torch.stack([soft_loss(own, constant, self.temperature) for own in logits])
        return learned, F.cross_entropy(ensemble, target)


# the names of boosting.peers
mutual, one = Mutual, One


def peer_loss_of(config: BoostingConfig) -> type[PeerLoss] | None:
    """What the peers of the boosting options learn from each other; None where there are none.

    Raises:
        ConfigError: where there is none of that name.
    """
    if config.peers is None:
        return None
    try:
        found = resolve(config.peers, sys.modules[__name__], _is_one, PeerLoss.__name__)
    except ConfigError as error:
        raise ConfigError(under("peers", error.faults)) from error
    return found  # type: ignore[no-any-return]


def _is_one(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, PeerLoss)


def peer_rungs(ladder: Ladder, rounds: int) -> list[int]:
    """The rung of each of `rounds` peers, in the ladder's order: one each, or where there are more, equal shares."""
    rungs = len(ladder)
    return list(range(rounds)) if rounds <= rungs else [t * rungs // rounds for t in range(rounds)]


class Peers(nn.Module):
    """Students side by side: inputs (batch, ...) to their logits (K, batch, classes)."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits of each."""
        return torch.stack([output_of(member(inputs)).logits for member in self.members])


class PeersModule(FitModule):
    """Trains all peers by one optimiser.

    Each has its distillation loss, of the labels and the teacher by `boosting.alpha`, and its part of a `PeerLoss`. The
    gradient is that of the sum, so each peer's is that of its own loss. Shown, and compared by epoch, is the mean of
    the peers' losses. `trainer.gradient_clip` is of the norm of all peers together.

    Args:
        students: the peers.
        trainer: how they are fitted.
        config: the boosting options.
        peer_loss: what they learn from each other.
        targets: whose teacher is asked.
    """

    def __init__(
        self,
        students: Sequence[nn.Module],
        trainer: TrainerConfig,
        config: BoostingConfig,
        peer_loss: PeerLoss,
        targets: RoundTargets,
    ) -> None:
        super().__init__(Peers(students), trainer)
        self.students = tuple(students)  # in a tuple: `model` has them already
        self.alpha, self.temperature, self.peer_loss = config.alpha, config.temperature, peer_loss
        self._targets = [targets]  # in a list: they are no part of what is trained, saved or averaged

    def on_fit_start(self) -> None:
        """Move the targets to where the students are."""
        self._targets[0].to(self.device)

    def parameter_groups(self) -> list[dict[str, object]]:
        """The students' parameters, and those of what they learn from each other."""
        return [{"params": [*self.model.parameters(), *self.peer_loss.parameters()]}]

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and the mean of the peers' logits."""
        logits, labels, targets = self(batch.inputs).logits, batch.labels, self._targets[0]
        asked = targets.teacher if self.training else targets.known
        # with alpha = 1 a teacher is not read, so an online one need not be asked
        teacher = logits.new_empty(0) if self.alpha == 1 else asked.outputs(batch.index, batch.inputs).logits
        alone = [distillation_loss(own, teacher, labels, self.alpha, self.temperature) for own in logits]
        from_others, shared = self.peer_loss(logits, labels)
        each = torch.stack(alone) + from_others
        total = each.sum() + shared
        return total + (each.mean() - total).detach(), logits.mean(0)


class PeersLoop(BoostingLoop):
    """The loop of peers: one fit of all students, which then join the ensemble in the ladder's order."""

    def advance(self) -> None:
        """Train all students, and add each to the ensemble."""
        rungs = peer_rungs(self.ladder, self.config.rounds)
        module, result = self.fit_together(rungs)
        seconds = ranks.agreed(lambda: result.seconds)
        logger.info("trained together: %d epochs, %.1f s", result.epochs, seconds)
        for t, (rung, student) in enumerate(zip(rungs, module.students, strict=True)):
            self.state.rung = rung
            # the fit's time is stated once
            self.accept(self.candidate(student, result), 1, seconds if t == 0 else 0.0)
        self.keep()

    def record(
        self,
        candidate: Candidate,
        attempts: int,
        seconds: float,
        eta: float | None = None,
        largest_residual: float | None = None,
    ) -> dict[str, Any]:
        """What a student reports, marked as trained together with the others."""
        return {**super().record(candidate, attempts, seconds, eta, largest_residual), "trained": TOGETHER}

    def fit_together(self, rungs: Sequence[int]) -> tuple[PeersModule, FitResult]:
        """Fit a new student of each of these rungs."""
        data, config = self.data, self.config
        description = f"{len(rungs)} students together"
        stage = Stage(
            STAGE, self.seed, self.directory / "metrics.jsonl", 0, description,
            self.directory / "fits" / f"{STAGE}.ckpt", f"{config.peers} {rungs} {self.state.teacher}",
        )  # fmt: skip
        logger.info("training %s, who learn from each other: %s", description, config.peers)
        students = []
        for t, rung in enumerate(rungs):
            with seeded(self.seed, f"round-{t:02d}/0", rung, "init"):  # the weights that a student of this round has
                students.append(self.ladder.build(rung, data.task.input_shape, data.num_classes))
        make = peer_loss_of(config)
        assert make is not None
        with seeded(self.seed, stage.key, "init"):
            peer_loss = make(len(students), data.num_classes, config.temperature)
        module = PeersModule(students, self.trainer, config, peer_loss, self.round().targets())
        with seeded(self.seed, stage.key, "fit", *ranks.purpose()), self.tracker.stage(STAGE) as loggers:
            result = fit(module, data, stage, loggers)
        return module, result

    def candidate(self, student: nn.Module, result: FitResult) -> Candidate:
        """A trained student, as the next one of the ensemble; it is not judged."""
        data, round_ = self.data, self.round()
        logits = scratch(data.validation.stop, data.num_classes, self.directory)
        predict(student, data, range(data.validation.stop), self.trainer.device, out=logits)
        initial = self.combination.initial(self.state.round) if self.state.round > 0 else (0.0, 1.0)
        return replace(round_.measured(student, logits, initial, result), accepted_by="peers")
