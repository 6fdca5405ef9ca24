"""One fit of one model: the LightningModule base, the callbacks, and `fit`, used by the teacher and every student."""

import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pkd_lightning.config import TrainerConfig
from pkd_lightning.data.module import Batch, DataModule
from pkd_lightning.errors import RunError

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hardware notes before every one of many fits
warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # data lies in memory
warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")  # once an epoch is intended
warnings.filterwarnings("ignore", message=".*treespec.*is deprecated")  # lightning 2.6.6 with torch 2.13


class FitModule(L.LightningModule):
    """A model with its loss, optimiser and schedule.

    Losses are summed as tensors and read once an epoch: reading or logging one every step costs more than a tiny model.
    Subclasses give `losses(batch)` and may add parameters of their own.
    """

    def __init__(self, model: nn.Module, trainer: TrainerConfig) -> None:
        super().__init__()
        self.model = model
        self.settings = trainer
        self._sums: dict[str, Tensor] = {}

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss (scalar) and the logits that accuracy is measured on (batch, classes)."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one training batch."""
        loss, _ = self.losses(batch)
        self._add("train_loss", loss.detach() * len(batch.labels))
        self._add("train_count", torch.tensor(float(len(batch.labels))))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one validation batch to the epoch's sums."""
        loss, logits = self.losses(batch)
        self._add("validation_loss", loss * len(batch.labels))
        self._add("validation_correct", (logits.argmax(-1) == batch.labels).sum())
        self._add("validation_count", torch.tensor(float(len(batch.labels))))

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's means. Lightning validates at the end of each training epoch, so both parts are complete."""
        sums, self._sums = {name: float(value) for name, value in self._sums.items()}, {}
        self.log_dict(
            {
                "train_loss": sums["train_loss"] / sums["train_count"],
                "validation_loss": sums["validation_loss"] / sums["validation_count"],
                "validation_accuracy": sums["validation_correct"] / sums["validation_count"],
            }
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is optimised, in torch's form of parameter groups."""
        return [{"params": list(self.model.parameters())}]

    def configure_optimizers(self) -> Any:
        """The configured optimiser, its learning rate scheduled per step."""
        optimizer = self.settings.optimizer(self.parameter_groups())
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = LambdaLR(optimizer, lambda step: self.settings.schedule(min(1.0, step / steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class BestWeights(L.Callback):
    """Keeps the weights of the epoch with the lowest validation loss in memory; `restore` puts them back."""

    def __init__(self) -> None:
        self.loss = float("inf")
        self.epoch = -1
        self.state: dict[str, Tensor] | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare this epoch with the best one so far."""
        loss = float(trainer.callback_metrics["validation_loss"])
        if loss < self.loss:
            self.loss, self.epoch = loss, trainer.current_epoch
            self.state = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    def restore(self, module: L.LightningModule) -> None:
        """Load the best weights into `module`."""
        if self.state is not None:
            module.load_state_dict(self.state)


class EpochLines(L.Callback):
    """Appends one JSON line an epoch to `metrics.jsonl`; a resumed run adds to it, nothing is rewritten."""

    def __init__(self, path: Path, stage: str, attempt: int) -> None:
        self.path, self.stage, self.attempt = path, stage, attempt
        self.start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the epoch's clock."""
        self.start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the epoch's line."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        line = {"stage": self.stage, "attempt": self.attempt, "epoch": trainer.current_epoch, **metrics}
        line["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        line["seconds"] = round(time.perf_counter() - self.start, 4)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class FitProgress(L.Callback):
    """One progress bar for a whole fit, drawn by rich's own thread, so a step only sets a number."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.progress: Progress | None = None
        self.task = TaskID(0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self.progress.start()
        total = int(trainer.estimated_stepping_batches)
        self.task = self.progress.add_task(self.description, total=total, loss="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self.progress is not None:
            self.progress.update(self.task, completed=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the epoch's validation figures."""
        if self.progress is not None:
            metrics = trainer.callback_metrics
            text = f"validation {metrics['validation_accuracy']:.1%}, loss {metrics['validation_loss']:.3f}"
            self.progress.update(self.task, loss=text)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the bar, after an error too."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


@dataclass(frozen=True)
class FitResult:
    """What a fit gave.

    Attributes:
        epochs: epochs trained.
        best_epoch: epoch (from 0) of the weights kept.
        seconds: wall time.
    """

    epochs: int
    best_epoch: int
    seconds: float


@dataclass(frozen=True)
class Stage:
    """Names one fit: `teacher` or `round-03`, the attempt within it, the run's seed, and where its lines go."""

    name: str
    seed: int
    metrics: Path
    attempt: int = 0
    description: str = ""

    @property
    def key(self) -> str:
        """Name and attempt, for seeding."""
        return f"{self.name}/{self.attempt}"


def fit(
    module: FitModule,
    data: DataModule,
    stage: Stage,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[L.Callback] = (),
) -> FitResult:
    """Train `module` on the training rows and leave it with the weights of its best epoch on the validation rows.

    Raises:
        RunError: where the loss was not finite in any epoch.
    """
    settings = module.settings
    best = BestWeights()
    watchers: list[L.Callback] = [best, EpochLines(stage.metrics, stage.name, stage.attempt), *callbacks]
    if settings.patience is not None:
        watchers.append(EarlyStopping("validation_loss", patience=settings.patience, check_finite=True))
    if settings.progress:
        watchers.append(FitProgress(stage.description or stage.name))
    trainer = L.Trainer(  # a fresh one every time: a used Trainer fits 0 steps
        max_epochs=settings.max_epochs,
        accelerator="gpu" if settings.device.type == "cuda" else "cpu",
        devices=1,
        precision=settings.precision,
        gradient_clip_val=settings.gradient_clip,
        logger=list(loggers) or False,
        callbacks=watchers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1_000_000,  # losses are logged once an epoch
    )
    start = time.perf_counter()
    try:
        trainer.fit(
            module,
            data.training_loader(settings.batch_size, stage.seed, stage.key, settings.num_workers),
            data.loader(data.validation, max(settings.batch_size, 256)),
        )
    except SIGTERMException as stop:  # a SystemExit of code 0: make, CI and schedulers would see success
        raise SystemExit(128 + signal.SIGTERM) from stop
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        raise SystemExit(128 + signal.SIGINT) from stop
    if best.state is None:
        raise RunError(
            f"{stage.name}: the loss was not finite in any epoch; lower"
            f" {'teacher.' if stage.name == 'teacher' else ''}trainer.optimizer.lr or gradient_clip"
        )
    best.restore(module)
    return FitResult(trainer.current_epoch, best.epoch, time.perf_counter() - start)


@torch.no_grad()
def predict(model: nn.Module, data: DataModule, rows: range, device: torch.device, batch_size: int = 512) -> Tensor:
    """Logits of `model` in evaluation mode on `rows` of the data, in order: (rows, classes) float32 on the CPU.

    The model is asked on `device` and stays there.
    """
    training = model.training
    model.to(device).eval()
    logits = torch.cat([model(batch.images.to(device)).float().cpu() for batch in data.loader(rows, batch_size)])
    model.train(training)
    return logits
