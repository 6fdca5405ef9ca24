"""Accuracy against mean multiply-accumulates of early exits: the part `exits` of results.json.

Thresholds are chosen on validation rows, accuracy and cost are measured on the test part. Of each prefix the scores are
kept, and never the logits of several.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pkd_lightning.errors import ConfigError
from pkd_lightning.exits.calibration import (
    Calibration,
    budgeted_thresholds,
    exit_costs,
    mean_cost,
    one_threshold,
    students_used,
)
from pkd_lightning.exits.learned import LearnedExit, features_of, fit
from pkd_lightning.exits.rules import SIMPLE, State
from pkd_lightning.matrix import chunks

logger = logging.getLogger(__name__)

BUDGETS = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8)  # of the multiply-accumulates of the whole ensemble
CHOICES: Mapping[str, Calibration] = {"budgeted": budgeted_thresholds, "one_threshold": one_threshold}
CALIBRATED_ROWS = 20_000  # at most: a standard error of a third of a point of the images that leave
LEARNED_ROWS = 200_000  # of the test part, at most: features of more are not kept
LEAST_ROWS = 40  # validation rows: of fewer nothing is learned


class Observed:
    """Scores and answers of the prefixes of some rows, taken as the prefixes come.

    Args:
        labels: (N,) of the rows.
        features: whether those of a learned exit are kept.

    Attributes:
        scores: of each rule by name, (N,) a prefix.
        correct: (N,) bool a prefix.
        classes: (N,) a prefix.
        features: (N, 5) a prefix, or none.
    """

    def __init__(self, labels: Tensor, features: bool) -> None:
        self.labels, self._with_features = labels, features
        self.scores: dict[str, list[Tensor]] = {rule.name: [] for rule in SIMPLE}
        self.correct: list[Tensor] = []
        self.classes: list[Tensor] = []
        self.features: list[Tensor] = []
        self._states: dict[tuple[str, int], State] = {}

    def add(self, logits: Tensor) -> None:
        """Take the next prefix, of logits (N, L)."""
        last = self.classes[-1] if self.classes else None
        parts: dict[str, list[Tensor]] = {name: [] for name in (*self.scores, "classes", "features")}
        for rows in chunks(logits.shape):
            chunk = logits[rows]
            for rule in SIMPLE:
                key = rule.name, rows.start
                scores, self._states[key] = rule.step(chunk, self._states.get(key, ()))
                parts[rule.name].append(scores)
            parts["classes"].append(chunk.argmax(-1))
            if self._with_features:
                parts["features"].append(features_of(chunk, None if last is None else last[rows])[0])
        for name, kept in self.scores.items():
            kept.append(torch.cat(parts[name]))
        self.classes.append(torch.cat(parts["classes"]))
        self.correct.append(self.classes[-1] == self.labels)
        if self._with_features:
            self.features.append(torch.cat(parts["features"]))


def exit_results(
    validation: Observed, test: Observed, macs: Sequence[int], num_classes: int, seed: int
) -> dict[str, Any]:
    """The part `exits` of results.json.

    Args:
        validation: rows that thresholds are chosen on, and a learned exit is trained on half of.
        test: rows that accuracy and cost are of.
        macs: of an image in each prefix.
        num_classes: L.
        seed: of the learned exit.
    """
    rules: dict[str, Any] = {}
    for rule in SIMPLE:
        of_validation, of_test = (torch.stack(rows.scores[rule.name], 1) for rows in (validation, test))
        rules[rule.name] = _curves(of_validation, of_test, test, macs, rule.macs(num_classes))
    found: dict[str, Any] = {"prefix_macs": list(macs), "budgets": list(BUDGETS), "rules": rules}
    why = _why_not_learned(validation, test, len(macs))
    if why is None:
        learned, rest = fit(torch.stack(validation.features, 1), torch.stack(validation.classes, 1), seed)
        of_validation, of_test = (_read(learned, torch.stack(rows.features, 1)) for rows in (validation, test))
        rules[learned.name] = _curves(of_validation[rest], of_test, test, macs, learned.macs(num_classes))
    else:
        logger.info("no learned exit: %s", why)
        found["not_learned"] = why
    return found


def _why_not_learned(validation: Observed, test: Observed, prefixes: int) -> str | None:
    if prefixes < 2:
        return "there is one student"
    if len(validation.labels) < LEAST_ROWS:
        return f"{len(validation.labels)} validation rows are fewer than {LEAST_ROWS}"
    if not (validation.features and test.features):
        return f"more than {LEARNED_ROWS:,} test rows"
    return None


@torch.no_grad()
def _read(learned: LearnedExit, features: Tensor) -> Tensor:
    """Scores (N, T - 1) of features (N, T, 5)."""
    parts = [learned(part).double() for part in features[:, :-1].split(4096)]
    return torch.cat(parts)


def _curves(validation: Tensor, test: Tensor, rows: Observed, macs: Sequence[int], of_rule: int) -> dict[str, Any]:
    """Of one rule: its points by each way to choose thresholds, those of budgets that can be met."""
    costs, last = exit_costs(macs, of_rule), len(macs) - 1
    correct = torch.stack(rows.correct, 1)
    made: dict[str, Any] = {"rows": len(validation), "rule_macs": of_rule}
    for name, choose in CHOICES.items():
        points = made[name] = []
        for budget in BUDGETS:
            try:
                thresholds = choose(validation[:, :last], costs, budget * macs[-1])
            except ConfigError:
                continue  # it does not pay for the first student
            used = students_used(test, thresholds)
            points.append(
                {
                    "budget": budget,
                    "accuracy": float(correct.gather(1, used[:, None] - 1).double().mean()),
                    "macs": float(costs[used - 1].mean()),
                    "validation_macs": mean_cost(validation, thresholds, costs),
                    "students": float(used.double().mean()),
                    "thresholds": [value if math.isfinite(value) else None for value in thresholds],
                }
            )
    return made
