"""Everything the boosting loop knows between two rounds, in one object."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pkd_lightning.boosting.combine import Scales
from pkd_lightning.boosting.residuals import ResidualMatrices


@dataclass
class BoostingState:
    """State of the loop. Primitives and tensors only, so that its file loads without unpickling code.

    Attributes:
        residuals: K+ and K- of the training rows.
        validation_residuals: the same sum S for the validation rows. It enters no normaliser and no edge; its signs
            give the validation loss of the published objective.
        ensemble_logits: (training + validation rows, L) F_{t-1} by sample index.
        round: rounds done, the number of students.
        class_index: rung of the ladder the next candidate is built from.
        bound: B, the largest abs(f - g) of the students so far on the training rows.
        scales: (a_t, c_t) of each student.
        records: what each round reports.
        stop_reason: why the loop is done, or None while it is not.
        teacher: fingerprint of the teacher and of the images it was asked on.
    """

    residuals: ResidualMatrices
    validation_residuals: ResidualMatrices
    ensemble_logits: Tensor
    round: int = 0
    class_index: int = 0
    bound: float = 0.0
    scales: list[Scales] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str | None = None
    teacher: str = ""

    @classmethod
    def fresh(cls, training: int, validation: int, classes: int, teacher: str) -> "BoostingState":
        """The state before the first round."""
        return cls(
            ResidualMatrices(training, classes),
            ResidualMatrices(validation, classes),
            torch.zeros(training + validation, classes),
            teacher=teacher,
        )

    def raise_student(self) -> Tensor:
        """1[K+ > K-] of the training and then the validation rows: (N, L) bool."""
        return torch.cat([self.residuals.raise_student(), self.validation_residuals.raise_student()])

    def state_dict(self) -> dict[str, Any]:
        """A dict of primitives and tensors."""
        return {
            "S": self.residuals.S,
            "validation_S": self.validation_residuals.S,
            "ensemble_logits": self.ensemble_logits,
            "round": self.round,
            "class_index": self.class_index,
            "bound": self.bound,
            "scales": [list(pair) for pair in self.scales],
            "records": self.records,
            "stop_reason": self.stop_reason,
            "teacher": self.teacher,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: where it belongs to another teacher or other data.
        """
        if state["teacher"] != self.teacher:
            raise ValueError("its students were distilled from another teacher, or on other images")
        for name, current in (
            ("S", self.residuals.S),
            ("validation_S", self.validation_residuals.S),
            ("ensemble_logits", self.ensemble_logits),
        ):
            if state[name].shape != current.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, the data needs {tuple(current.shape)}")
        # 1. the matrices, 2. where the loop is, 3. what it has found
        self.residuals.S, self.validation_residuals.S = state["S"], state["validation_S"]
        self.ensemble_logits = state["ensemble_logits"]
        self.round, self.class_index, self.bound = state["round"], state["class_index"], state["bound"]
        self.scales = [(a, c) for a, c in state["scales"]]
        self.records, self.stop_reason = state["records"], state["stop_reason"]
