"""A calibrated early exit: a rule with its thresholds, as it is kept beside an ensemble."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pkd_lightning.checkpoint import load_tensors, read_json, save_weights, write_json
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.exits.calibration import (
    Calibration,
    Thresholds,
    budgeted_thresholds,
    exit_costs,
    mean_cost,
    students_used,
)
from pkd_lightning.exits.curves import CHOICES
from pkd_lightning.exits.learned import LearnedExit
from pkd_lightning.exits.rules import SIMPLE, Rule, State, scores_of


class Exits(NamedTuple):
    """What an early exit gives.

    Attributes:
        logits: (N, L) of each image's last prefix.
        used: (N,) the number of students each image used.
        mean_macs: multiply-accumulates an image in the mean, those of the rule among them; 0 of no images.
    """

    logits: Tensor
    used: Tensor
    mean_macs: float


@dataclass(frozen=True, eq=False)
class ExitPolicy:
    """When images leave an ensemble of T students. `calibrate` makes one.

    Attributes:
        rule: how sure a prefix is.
        thresholds: of prefixes 1 to T - 1: an image leaves where its score reaches it. Infinity: none does.
        macs: multiply-accumulates of an image in each prefix, so of its first, its first two, ... students.
        num_classes: L.
        budget: multiply-accumulates an image that the thresholds were chosen for.
        mean_macs: what they took on the rows they were chosen on.
    """

    rule: Rule
    thresholds: Thresholds
    macs: tuple[int, ...]
    num_classes: int
    budget: float
    mean_macs: float

    def __post_init__(self) -> None:
        faults = _macs_faults(self.macs)
        if len(self.thresholds) != len(self.macs) - 1:
            faults.append(f"thresholds: {len(self.thresholds)} for {len(self.macs)} prefixes; the last one has none")
        if any(map(math.isnan, self.thresholds)):
            faults.append(f"thresholds={list(self.thresholds)}: must be numbers")
        if faults:
            raise ConfigError(faults)

    def __len__(self) -> int:
        return len(self.macs)

    @property
    def costs(self) -> Tensor:
        """Multiply-accumulates (T,) of an image that leaves at prefix t, those of the rule among them."""
        return exit_costs(self.macs, self.rule.macs(self.num_classes))

    def leaves(self, t: int, logits: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """Which images leave at prefix t, from 1: (n,) bool, of its logits (n, L); and the rule's state after it.

        The prefixes are asked in order, with the state that the one before gave, without the rows that have left.
        """
        if t == len(self):
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device), state
        scores, state = self.rule.step(logits, state)
        return scores >= self.thresholds[t - 1], state

    def leaving(self) -> Callable[[Tensor], Tensor]:
        """Which images leave, (n,), by the logits (n, L) of one prefix after another, of those that are still there."""
        t, state = 0, State()

        def sure(logits: Tensor) -> Tensor:
            nonlocal t, state
            t += 1
            leave, state = self.leaves(t, logits, state)
            state = tuple(part[~leave] for part in state)
            return leave

        return sure

    @torch.no_grad()
    def apply(self, prefixes: Sequence[Tensor]) -> Exits:
        """What the early exit gives of the logits (N, L) of all T prefixes.

        Raises:
            ConfigError: where they are not of T prefixes and L classes.
        """
        self.check(len(prefixes), prefixes[0].shape[-1] if prefixes else 0)
        scores = scores_of(self.rule, prefixes)
        used = students_used(scores, self.thresholds)
        logits = torch.stack(list(prefixes))[used - 1, torch.arange(len(used), device=used.device)]
        return Exits(logits, used, mean_cost(scores, self.thresholds, self.costs))

    def check(self, prefixes: int, num_classes: int) -> None:
        """Check that it is of an ensemble with as many prefixes and classes.

        Raises:
            ConfigError: where it is not.
        """
        if (prefixes, num_classes) != (len(self), self.num_classes):
            raise ConfigError(
                [
                    f"exits: calibrated for {len(self)} students and {self.num_classes} classes,"
                    f" not for {prefixes} and {num_classes}; calibrate on this ensemble's logits"
                ]
            )

    def save(self, directory: Path, name: str = "exits") -> None:
        """Write `name`.json, and the weights of a learned rule as `name`.safetensors, into the directory."""
        description = {
            "rule": self.rule.name,
            "thresholds": [value if math.isfinite(value) else None for value in self.thresholds],
            "macs": list(self.macs),
            "num_classes": self.num_classes,
            "budget": self.budget,
            "mean_macs": self.mean_macs,
        }
        if isinstance(self.rule, LearnedExit):
            description["d_model"] = self.rule.embed.out_features
            save_weights(self.rule, directory / f"{name}.safetensors")
        write_json(directory / f"{name}.json", description, hashed=True)

    @classmethod
    def load(cls, directory: Path | str, name: str = "exits") -> "ExitPolicy":
        """Read what `save` wrote.

        Raises:
            RunError: where a file is missing, damaged or does not fit, naming it.
        """
        path = Path(directory) / f"{name}.json"
        given = read_json(path)
        try:
            thresholds = _thresholds(given)
            rule = _rule_of(given, len(thresholds), path.with_name(f"{name}.safetensors"))
            macs = tuple(map(int, given["macs"]))
            numbers = float(given["budget"]), float(given["mean_macs"])
            return cls(rule, thresholds, macs, int(given["num_classes"]), *numbers)
        except ConfigError as error:
            raise RunError(f"{path}: {'; '.join(error.faults)}") from error
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise RunError(f"{path}: does not describe an early exit ({error!r})") from error

    @classmethod
    def of_run(
        cls, run: Path | str, rule: str = "maximum", budget: float = 0.25, choice: str = "budgeted"
    ) -> "ExitPolicy":
        """What a finished run has calibrated on its validation rows, and reports in its results.json.

        Args:
            run: its directory.
            rule: `maximum`, `margin`, `entropy` or `patience`. A learned exit is not kept: see `learn`.
            budget: one of those in results.json, as a part of the whole ensemble's multiply-accumulates.
            choice: of thresholds, `budgeted` or `one_threshold`.

        Raises:
            ConfigError: where there are no such thresholds, naming those there are.
            RunError: where results.json is missing or damaged, or has no early exits.
        """
        path = Path(run) / "results.json"
        results, ensemble = read_json(path), read_json(Path(run) / "students" / "ensemble.json")
        known, faults = {one.name: one for one in SIMPLE}, list[str]()
        try:
            macs, classes = tuple(map(int, results["exits"]["prefix_macs"])), int(ensemble["num_classes"])
            found = {name: results["exits"]["rules"][name] for name in known}
            for name, value, allowed in (("rule", rule, known), ("choice", choice, CHOICES)):
                if value not in allowed:
                    faults.append(f"{name}={value!r}: must be one of {', '.join(allowed)}")
            points = {} if faults else {point["budget"]: point for point in found[rule][choice]}
            if not faults and budget not in points:
                faults.append(f"budget={budget:g}: must be one of {', '.join(f'{one:g}' for one in points)}")
            if faults:
                raise ConfigError(faults)
            point = points[budget]
            return cls(known[rule], _thresholds(point), macs, classes, budget * macs[-1], point["validation_macs"])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise RunError(f"{path}: has no early exits, or not as this version writes them ({error!r})") from error


@torch.no_grad()
def calibrate(
    rule: Rule,
    prefixes: Iterable[Tensor],
    macs: Sequence[int],
    budget: float,
    choose: Calibration = budgeted_thresholds,
) -> ExitPolicy:
    """The early exit whose mean of multiply-accumulates is within a budget on given rows.

    Args:
        rule: `MAXIMUM`, `MARGIN`, `ENTROPY`, `PATIENCE`, or one that was learned, on rows that it was not trained on.
        prefixes: logits (N, L) of prefixes 1, ..., T, of validation rows.
        macs: multiply-accumulates of an image in each prefix, see `ExitPolicy`.
        budget: multiply-accumulates an image. From those of the whole ensemble on, everything runs.
        choose: `budgeted_thresholds`, or `one_threshold` for all prefixes.

    Raises:
        ConfigError: where the budget does not pay for the first student, there are no rows, or `macs` does not fit.
    """
    columns = list(prefixes)
    faults = _macs_faults(macs)
    if len(columns) != len(macs):
        faults.append(f"macs: {len(macs)} for {len(columns)} prefixes")
    if not columns or len(columns[0]) == 0:
        faults.append("prefixes: without logits, or without rows")
    if faults:
        raise ConfigError(faults)
    num_classes = columns[0].shape[-1]
    scores, costs = scores_of(rule, columns), exit_costs(macs, rule.macs(num_classes))
    thresholds = choose(scores[:, :-1], costs, budget)
    return ExitPolicy(rule, thresholds, tuple(macs), num_classes, float(budget), mean_cost(scores, thresholds, costs))


def _macs_faults(macs: Sequence[int]) -> list[str]:
    if macs and macs[0] > 0 and list(macs) == sorted(macs):
        return []
    return [f"macs={list(macs)}: must be those of growing prefixes, above 0 and not falling"]


def _thresholds(given: Any) -> Thresholds:
    """Those of a saved policy or of results.json."""
    return tuple(math.inf if value is None else float(value) for value in given["thresholds"])


def _rule_of(given: Any, prefixes: int, weights: Path) -> Rule:
    """The rule of a saved policy."""
    known = {rule.name: rule for rule in SIMPLE}
    if given["rule"] in known:
        return known[given["rule"]]
    if given["rule"] != LearnedExit.name:
        names = ", ".join([*known, LearnedExit.name])
        raise ConfigError([f"rule={given['rule']!r}: must be one of {names}"])
    rule = LearnedExit(prefixes, int(given["d_model"]))
    state = load_tensors(weights)
    try:
        rule.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{weights}: does not fit the rule that {weights.stem}.json describes ({error})") from error
    return rule.eval().requires_grad_(False)
