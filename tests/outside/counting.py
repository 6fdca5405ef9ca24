"""A callback of Lightning's that counts the hooks it is called by."""

from typing import Any, ClassVar

import lightning as L
import torch


class Counting(L.Callback):
    """Counts the hooks that are called; a new one counts from 0."""

    made: ClassVar[list["Counting"]] = []

    def __init__(self) -> None:
        self.batches = self.backwards = self.steps = 0
        self.made.append(self)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *given: Any) -> None:
        self.batches += 1

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.backwards += 1

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.steps += 1
