"""Options of the boosting loop, of its round losses and of the search for a weak learner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pkd_lightning.checks import Faults

if TYPE_CHECKING:  # it needs torch, whose import takes a second
    from pkd_lightning.knowledge.term import Term

Require = Literal["auto", "condition", "improvement"]
OnFailure = Literal["expand", "accept"]
FirstTerm = Literal["labels", "soft", "both"]
Weights = Literal["none", "samples"]
GrowScales = Literal["kept", "solved"]


@dataclass(frozen=True)
class WeakLearnerConfig:
    """When a candidate becomes a student (B-DISTIL, arXiv 2302.10093; docs/method.md, 3).

    Attributes:
        require: `condition`: positive edges; `improvement`: the ensemble with the candidate has a lower validation loss
            than without it; `auto`: what the objective was made for.
        fraction: fraction of the classes whose edge must exceed `margin` (1 is the published condition).
        margin: what an edge must exceed (0 is the published condition).
        min_improvement: relative decrease of the validation loss that counts as an improvement.
        check_every: epochs between two checks of the condition; training stops early when it holds.
        max_attempts: candidates tried on a rung before it counts as failed, and one more where one diverges.
        on_failure: `expand`: go up one rung; `accept`: take the best candidate and say so.
    """

    require: Require = "auto"
    fraction: float = 1.0
    margin: float = 0.0
    min_improvement: float = 0.0
    check_every: int = 10
    max_attempts: int = 1
    on_failure: OnFailure = "expand"

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.choice("require", get_args(Require))
        faults.number("fraction", 0, 1)
        faults.number("margin")
        faults.number("min_improvement", 0, 1)
        faults.whole("check_every", 1)
        faults.whole("max_attempts", 1)
        faults.choice("on_failure", get_args(OnFailure))
        faults.raise_if_any()


@dataclass(frozen=True)
class BoostingConfig:
    """The boosting loop and its round losses.

    Attributes:
        rounds: most students T.
        objective: name in `pkd_lightning.boosting.objectives`, import path of an `Objective`, or a `_target_` of one
            with options of its own. What those leave open, it has from here, by name: alpha, temperature, ...
        combine: name in `pkd_lightning.boosting.combine`, or import path of a `Combination`.
        peers: what students learn from each other, all trained at once in one fit: name in
            `pkd_lightning.boosting.peers`, or import path of a `PeerLoss`. It takes the place of the objective. None:
            a student a round.
        temperature: tau of the distillation loss, and of what peers learn from each other.
        alpha: weight of the hard loss. Without a teacher it must be 1, and peers do not read it.
        anchor: weight of the ensemble's loss in the anchored objective; the student's own has 1 - anchor.
        first_term: of the published round loss, beside the barrier loss, which has the weight 1 - alpha. `soft`: the
            soft loss, weighed by alpha. `labels`: the cross-entropy of the labels, weighed by alpha. `both`: the whole
            loss of the first round. Section 3 of Mamba-PKD (arXiv 2503.01727) writes the labels, section 4.2 the
            teacher's soft labels at temperature 2; only with soft labels has that temperature an effect after round 1.
        gamma: divisor of the barrier loss, which sums over the classes.
        eta: step of the multiplicative update; None for sqrt(log(2N) / T) / B.
        bound_quantile: B is this quantile of abs(f - g) over the training rows and classes: 1, the theory's bound, is
            the largest. Below 1, residuals are clipped to [-B, B] where they enter K+ and K- or an edge.
        weights: what weighs the samples in the distillation loss that students of rounds after the first are trained
            with: `none`, or `samples`: sample i by sum_j abs(K+(i,j) - K-(i,j)), of mean 1 over the training rows.
            Learned scales are solved for without weights.
        weak_learner: see `WeakLearnerConfig`.
        knowledge: terms by name that are added to the loss of every round, see `pkd_lightning.knowledge.term.Term`.
        grow_from: directory of a run whose students are the first of this one, with their scales and residuals.
        grow_rounds: take so many of them; None for all.
        grow_scales: `kept`: they join the ensemble with the scales they have there; `solved`: with those of this run's
            combination.
        max_time: minutes after which no further round starts; None for no limit. Time of earlier processes counts,
            that of rounds taken over by `grow_from` does not.
    """

    rounds: int = 7
    objective: Any = "anchored"
    combine: str = "learned"
    peers: str | None = None
    temperature: float = 2.0
    alpha: float = 0.5
    anchor: float = 0.5
    first_term: FirstTerm = "soft"
    gamma: float = 1.0
    eta: float | None = None
    bound_quantile: float = 1.0
    weights: Weights = "none"
    weak_learner: WeakLearnerConfig = field(default_factory=WeakLearnerConfig)
    knowledge: "Mapping[str, Term]" = field(default_factory=dict)
    grow_from: str | None = None
    grow_rounds: int | None = None
    grow_scales: GrowScales = "kept"
    max_time: float | None = None

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.whole("rounds", 1)
        faults.number("temperature", 0, exclusive=True)
        faults.number("alpha", 0, 1)
        faults.number("anchor", 0, 1)
        faults.choice("first_term", get_args(FirstTerm))
        faults.number("gamma", 0, exclusive=True)
        faults.number("eta", 0, optional=True)
        faults.number("bound_quantile", 0, 1)
        if self.bound_quantile == 0:
            faults.found.append("bound_quantile=0: must be above 0; B would be the smallest residual")
        faults.choice("weights", get_args(Weights))
        faults.whole("grow_rounds", 1, optional=True)
        faults.number("max_time", 0, optional=True, exclusive=True)
        if self.grow_from is not None:
            source = Path(str(self.grow_from)).expanduser()
            missing = [name for name in ("config.yaml", "boosting.ckpt", "students") if not (source / name).exists()]
            if missing:
                faults.found.append(f"grow_from={self.grow_from!r}: is no run directory, {', '.join(missing)} missing")
        if self.grow_rounds is not None and self.grow_from is None:
            faults.found.append(f"grow_rounds={self.grow_rounds}: needs grow_from")
        faults.choice("grow_scales", get_args(GrowScales))
        if self.grow_scales == "solved" and self.grow_from is None:
            faults.found.append("grow_scales='solved': needs grow_from")
        if self.peers is not None:
            faults.found += self._peer_faults()
        faults.raise_if_any()

    def _peer_faults(self) -> list[str]:
        """Options that say something of rounds, of which peers have none."""
        found = []
        if self.knowledge:
            found.append(f"knowledge: {', '.join(self.knowledge)} are of rounds; leave it out, or set peers=null")
        if not isinstance(self.peers, str):
            found.append(f"peers={self.peers!r}: must be null, mutual, one, or an import path")
        if self.rounds == 1:
            found.append("rounds=1: peers are at least 2 students")
        if self.objective != BoostingConfig.objective:
            kind = getattr(self.objective, "func", self.objective)
            named = getattr(kind, "__name__", kind)
            found.append(f"objective={named!r}: peers have a loss of their own; leave it out, or set peers=null")
        if self.weights == "samples":
            found.append("weights='samples': must be none with peers, who have no rounds before them")
        if self.weak_learner.require == "condition":
            found.append("weak_learner.require='condition': peers are not judged; set auto, or peers=null")
        for key in ("grow_from", "max_time"):
            if getattr(self, key) is not None:
                found.append(
                    f"{key}={getattr(self, key)!r}: must be null with peers, all of whom are trained in one fit"
                )
        return found
