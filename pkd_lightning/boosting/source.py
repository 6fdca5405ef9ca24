"""Another run whose first rounds a run takes over, and goes on from."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkd_lightning.checkpoint import HASH, atomic_write, check_hash
from pkd_lightning.ensemble import load_students
from pkd_lightning.errors import RunError


@dataclass(frozen=True)
class Source:
    """Rounds of another run.

    Attributes:
        directory: of the run.
        rounds: how many of its first rounds are taken.
        same: whether the runs differ in their number of rounds alone: eta is then this run's. Otherwise K+ and K- are
            those of the source.
        clipped: whether its residuals were clipped to each round's B.
        climbs: whether its ladder is this run's, so that the next rung is its next. Otherwise it is the first.
    """

    directory: Path
    rounds: int
    same: bool
    clipped: bool
    climbs: bool

    def state(self) -> dict[str, Any]:
        """The loop's state after its last round.

        Raises:
            RunError: where it is missing or damaged, or has fewer rounds.
        """
        path = self.directory / "boosting.ckpt"
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            check_hash(path, state, state.pop(HASH, None))
        except Exception as error:  # torch raises many kinds for a damaged file
            raise RunError(f"{path}: cannot be gone on from ({error})") from error
        if state["round"] < self.rounds:
            raise RunError(f"{self.directory}: has {state['round']} rounds, and {self.rounds} are to be taken")
        return state

    def students(self) -> list[nn.Module]:
        """Those of the rounds that are taken."""
        return load_students(self.directory / "students", self.rounds)

    def copy(self, round_: int, students: Path) -> None:
        """Copy the files of the student of a round (from 0) to the folder of another run."""
        students.mkdir(parents=True, exist_ok=True)
        for kind in ("safetensors", "json"):
            name = f"{round_:02d}.{kind}"
            atomic_write(students / name, partial(shutil.copyfile, self.directory / "students" / name))
