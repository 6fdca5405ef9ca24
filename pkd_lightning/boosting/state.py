"""Everything the boosting loop knows between two rounds, in one object."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkd_lightning.boosting.residuals import ResidualMatrices
from pkd_lightning.matrix import SampleMatrix, chunks, scratch
from pkd_lightning.prefixes import Scales, mix


@dataclass
class BoostingState:
    """State of the loop. Primitives and tensors only, so that its file loads without unpickling code.

    Attributes:
        residuals: K+ and K- of the training rows; None without a teacher, as the following.
        validation_residuals: the same sum S for the validation rows. It enters no normaliser and no edge; its signs
            give the validation loss of the published objective.
        ensemble: (training + validation rows, L) F_{t-1} by sample index.
        round: rounds done, the number of students.
        rung: of the ladder, from 0, that the next candidate is built from.
        bound: B of the students so far on the training rows: the largest of each one's quantile of abs(f - g).
        scales: (a_t, c_t) of each student.
        records: what each round reports.
        stop_reason: why the loop is done, or None while it is not.
        teacher: fingerprint of the teacher and of the images it was asked on.
    """

    residuals: ResidualMatrices | None
    validation_residuals: ResidualMatrices | None
    ensemble: SampleMatrix
    round: int = 0
    rung: int = 0
    bound: float = 0.0
    scales: list[Scales] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str | None = None
    teacher: str = ""

    @classmethod
    def fresh(
        cls,
        training: int,
        validation: int,
        classes: int,
        teacher: str,
        directory: Path | None,
        residuals: bool = True,
    ) -> "BoostingState":
        """The state before the first round.

        Args:
            training: training rows.
            validation: validation rows.
            classes: L.
            teacher: see `BoostingState`.
            directory: keeps, in files, matrices that are too large for memory; None for none.
            residuals: whether there are residual matrices, which are of a teacher.
        """
        return cls(
            ResidualMatrices(training, classes, directory and directory / "residuals") if residuals else None,
            ResidualMatrices(validation, classes, directory and directory / "validation_residuals")
            if residuals
            else None,
            SampleMatrix(training + validation, classes, directory and directory / "ensemble_logits"),
            teacher=teacher,
        )

    @property
    def ensemble_logits(self) -> Tensor:
        """(training + validation rows, L) F_{t-1} by sample index."""
        return self.ensemble.values

    def add_logits(self, logits: Tensor, scales: Scales) -> None:
        """Make F_t of F_{t-1}, with the student's logits f_t (training + validation rows, L)."""
        following = self.ensemble.blank()
        for rows in chunks(following.shape):
            following[rows] = mix(self.ensemble_logits[rows], logits[rows], scales)
        self.ensemble.replace(following)

    def indicator(self, directory: Path) -> Tensor:
        """1[K+ > K-] of the training and then the validation rows: (N, L) bool; all False without a teacher."""
        samples, classes = self.ensemble_logits.shape
        if self.residuals is None or self.validation_residuals is None:
            return torch.zeros(1, 1, dtype=torch.bool, device="cpu").expand(samples, classes)
        signs = scratch(samples, classes, directory, torch.bool)
        start = 0
        for matrices in (self.residuals, self.validation_residuals):
            for rows in chunks(matrices.S.shape):
                signs[start + rows.start : start + rows.stop] = matrices.indicator(rows)
            start += len(matrices.S)
        return signs

    def sample_weights(self) -> Tensor:
        """(training + validation rows,) weights of the samples' losses; 1 on validation rows, to compare their loss."""
        assert self.residuals is not None  # or `faults_without_teacher` has refused them
        assert self.validation_residuals is not None
        return torch.cat([self.residuals.sample_weights(), torch.ones(len(self.validation_residuals.S))])

    def state_dict(self, matrices: bool = True) -> dict[str, Any]:
        """A dict of primitives and tensors; without `matrices` enough for a loop that is done."""
        large = {name: matrix.state() for name, matrix in self.matrices().items()} if matrices else {}
        return {
            **large,
            "round": self.round,
            "class_index": self.rung,  # as in records
            "bound": self.bound,
            "scales": [list(pair) for pair in self.scales],
            "records": self.records,
            "stop_reason": self.stop_reason,
            "teacher": self.teacher,
        }

    def matrices(self) -> dict[str, ResidualMatrices | SampleMatrix]:
        """The matrices that there are, by their names in a checkpoint."""
        every = (("S", self.residuals), ("validation_S", self.validation_residuals), ("ensemble_logits", self.ensemble))
        return {name: matrix for name, matrix in every if matrix is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: where it belongs to another teacher or other data.
        """
        if state["teacher"] != self.teacher:
            raise ValueError("its students were distilled from another teacher, or on other images")
        # 1. the matrices, 2. where the loop is, 3. what it has found
        for name, matrix in self.matrices().items():
            if name not in state and state["stop_reason"] is not None:  # of a finished run
                continue
            try:
                matrix.load(state[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        self.round, self.rung, self.bound = state["round"], state["class_index"], state["bound"]
        self.scales = [(a, c) for a, c in state["scales"]]
        self.records, self.stop_reason = state["records"], state["stop_reason"]
