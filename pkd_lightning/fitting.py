"""One fit of one model: the LightningModule base, the callbacks, and `fit`, used by the teacher and every student."""

import json
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.optim.lr_scheduler import LambdaLR

from pkd_lightning.checkpoint import append_line
from pkd_lightning.data.epochs import EpochLoader
from pkd_lightning.data.module import Batch, DataModule
from pkd_lightning.earlier import Earlier, call
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.fit_checkpoint import FitCheckpoint, Saving
from pkd_lightning.loggers import rank_zero
from pkd_lightning.outputs import Output, Taps, output_of
from pkd_lightning.process import stop
from pkd_lightning.progress import progress_of
from pkd_lightning.trainer import Interval, TrainerConfig

logger = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hardware notes before every one of many fits
warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # data lies in memory
warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")  # once an epoch is intended
warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # a fit is one process, srun or not
warnings.filterwarnings("ignore", message=".*treespec.*is deprecated")  # lightning 2.6.6 with torch 2.13


class FitTrainer(L.Trainer):
    """A Trainer that takes its arguments from its call alone.

    Lightning fills what is not given from `PL_TRAINER_*` variables, named after the class. One of these, inherited from
    a shell, would change results under the same run directory.
    """


class FitModule(L.LightningModule):
    """A model with its loss, optimiser and schedule.

    To Lightning an epoch is one training step (see `EpochLoader`), whose optimiser steps are taken here: its hooks
    around a step, and reading or logging a loss every step, cost more than a tiny model. So a callback's
    `on_train_batch_*` hooks come once an epoch, and those around backward and the optimiser do not come.
    Subclasses give `losses(batch)` and may add parameters of their own.

    Args:
        model: what is trained.
        trainer: how.
        features: paths of the modules whose outputs `forward` gives beside the logits.

    Attributes:
        total_steps: optimiser steps of the whole fit, over which the learning rate is scheduled; `fit` sets it.
    """

    def __init__(self, model: nn.Module, trainer: TrainerConfig, features: Sequence[str] = ()) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.taps = Taps(model, features)
        self.settings = trainer
        self.total_steps = 1
        # a function, not a module: the state dict's names stay those of the model
        self._compiled = compiled(model) if trainer.compile else None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._skipped = self._skipped_now = 0  # steps of the whole fit; those of the epoch under way
        self._batch = 0  # batches of the epoch under way that are done
        self._random: dict[str, Any] | None = None  # to be restored before the next step
        self._trained: dict[str, Any] | None = None  # random state after the last step, while the epoch is validated
        self.saving: Saving | None = None  # `fit` sets it

    def forward(self, inputs: Tensor) -> Output:
        """What the model gives, by way of torch.compile where that is configured; `losses` calls it like this."""
        return self.taps.call(partial(call, self._compiled or self.model, earlier=self.earlier(inputs)), inputs)

    def earlier(self, inputs: Tensor) -> Earlier | None:
        """What earlier students gave for the same inputs, where the model reads them."""
        return None

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss (scalar) and the logits that accuracy is measured on (batch, classes)."""
        raise NotImplementedError

    def training_step(self, batches: Iterable[Batch], batch_idx: int) -> None:
        """An optimiser step for each batch of an epoch."""
        trainer, settings, device = self.trainer, self.settings, self.device
        optimizer = trainer.optimizers[0]
        schedule: Any = self.lr_schedulers()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        scaler = getattr(trainer.precision_plugin, "scaler", None) or torch.amp.GradScaler(device.type, enabled=False)
        # Lightning runs all of this under autocast; backward belongs outside of it
        mixed = settings.precision != "32-true"
        full_precision = torch.autocast(device.type, enabled=False) if mixed else nullcontext()
        progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress  # counts trainer.global_step
        total = self._sums.setdefault("train_loss", torch.zeros((), device=device))
        self._counts.setdefault("train", 0)
        for batch in batches:
            self._restore_random()
            optimizer.zero_grad()
            loss, _ = self.losses(Batch(*(part.to(device, non_blocking=True) for part in batch)))
            with full_precision:
                scaler.scale(loss).backward()
            usable = True
            if settings.gradient_clip is not None:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
                # one image that explodes in a model without norms must not take the weights with it
                usable = bool(norm.isfinite())
            if usable:
                scaler.step(optimizer)
                total.add_(loss.detach(), alpha=len(batch.labels))  # stays on the device: read once an epoch
                self._counts["train"] += len(batch.labels)
            else:
                self._skipped_now += 1
            scaler.update()
            schedule.step()
            progress.increment_completed()
            self._batch += 1
            if self.saving is not None:
                self.saving.after_step(trainer, self)
        self._restore_random()
        if self._skipped_now:
            logger.warning(
                "epoch %d: skipped %d steps, their gradients were not finite", self.current_epoch, self._skipped_now
            )
            self._skipped, self._skipped_now = self._skipped + self._skipped_now, 0
        self._trained = random_state()

    def progress(self) -> dict[str, Any]:
        """Where the epoch under way is after a step, and the random state there: what resuming it needs of this module.

        Validation starts anew, so that what it has found so far is left out.
        """
        return {
            "batch": self._batch,
            "loss": self._sums.get("train_loss"),
            "count": self._counts.get("train", 0),
            "skipped": [self._skipped, self._skipped_now],
            "random": self._trained or random_state(),  # a loader of validation data draws, and will again
        }

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Go on where `progress` was taken."""
        self._batch = progress["batch"]
        if progress["loss"] is not None:
            self._sums["train_loss"], self._counts["train"] = progress["loss"].to(self.device), progress["count"]
        self._skipped, self._skipped_now = progress["skipped"]
        self._random = progress["random"]

    def _restore_random(self) -> None:
        """Restore torch's random state, if a fit has just been resumed: what came before the step may have drawn."""
        if self._random is not None:
            torch.set_rng_state(self._random["cpu"])
            if self._random["cuda"]:
                torch.cuda.set_rng_state_all(self._random["cuda"])
            self._random = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one validation batch to the epoch's sums."""
        loss, logits = self.losses(batch)
        for name, value in (
            ("validation_loss", loss * len(batch.labels)),
            ("validation_accuracy", (logits.argmax(-1) == batch.labels).sum()),
        ):
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts["validation"] = self._counts.get("validation", 0) + len(batch.labels)
        if self.saving is not None:
            self.saving.after_step(self.trainer, self)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's means. Lightning validates at the end of each training epoch, so both parts are complete."""
        counts = {name: self._counts[name.split("_")[0]] or math.nan for name in self._sums}
        means = {name: float(value) / counts[name] for name, value in self._sums.items()}
        if self._skipped:  # over the whole fit; the losses of these steps are not in train_loss
            means["skipped_steps"] = self._skipped
        self._sums, self._counts, self._batch, self._trained = {}, {}, 0, None
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            logger.warning("epoch %d: weights are not finite any more, the fit ends", self.current_epoch)
            self.trainer.should_stop = True
        self.log_dict(means, logger=False)
        for tracker in self.loggers:  # by optimiser step, where Lightning counts its own
            tracker.log_metrics({**means, "epoch": self.current_epoch}, step=self.global_step - 1)
            tracker.save()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is optimised, in torch's form of parameter groups."""
        return [{"params": list(self.model.parameters())}]

    def configure_optimizers(self) -> Any:
        """The configured optimiser, its learning rate scheduled per step."""
        optimizer = self.settings.build_optimizer(self.parameter_groups())
        schedule = LambdaLR(optimizer, lambda step: self.settings.schedule(min(1.0, step / self.total_steps)))
        return [optimizer], [schedule]


def random_state() -> dict[str, Any]:
    """The state of torch's global generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def compiled(model: nn.Module) -> Callable[..., Any]:
    """Calls `model` by way of torch.compile, as a function."""
    torch.compiler.reset()  # or torch would stop compiling at the eighth model of a class, with no more than a warning
    return torch.compile(lambda inputs, earlier=None: call(model, inputs, earlier))


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn a failure of torch.compile inside the block into a `ConfigError` that says how to do without."""
    try:
        yield
    except TorchDynamoException as error:
        cause = " ".join(str(error).split("\n")[:2])  # the backend's name, then its error
        fault = f"trainer.compile=true: torch.compile fails ({cause}); trainer.compile=false trains without it"
        raise ConfigError([fault]) from error


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

    def state_dict(self) -> dict[str, Any]:
        """The best weights so far, their loss and epoch."""
        return {"loss": self.loss, "epoch": self.epoch, "state": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.loss, self.epoch, self.state = state_dict["loss"], state_dict["epoch"], state_dict["state"]

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
        metrics = {
            name: float(value) if math.isfinite(value) else None  # JSON has no NaN
            for name, value in trainer.callback_metrics.items()
        }
        line = {"stage": self.stage, "attempt": self.attempt, "epoch": trainer.current_epoch, **metrics}
        line["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        line["seconds"] = round(time.perf_counter() - self.start, 4)
        append_line(self.path, json.dumps(line, allow_nan=False))


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
    """One fit: its name and place.

    Attributes:
        name: `teacher` or `round-03`.
        seed: the run's.
        metrics: file of the epochs' lines.
        attempt: within the round.
        description: for progress and log.
        checkpoint: file of its checkpoints; None: it is not saved.
        identity: what it depends on besides its options, such as earlier students.
    """

    name: str
    seed: int
    metrics: Path
    attempt: int = 0
    description: str = ""
    checkpoint: Path | None = None
    identity: str = ""

    @property
    def key(self) -> str:
        """Name and attempt, for seeding."""
        return f"{self.name}/{self.attempt}"

    def checkpoint_of(self, settings: TrainerConfig, identity: str) -> FitCheckpoint | None:
        """The fit's checkpoint, where it has one, of this stage and what else it depends on."""
        every = Interval.of(settings.checkpoint_every)
        if self.checkpoint is None or not every.any:
            return None
        return FitCheckpoint(self.checkpoint, every, f"{self.key} {self.seed} {self.identity} {identity}")


def fit(
    module: FitModule,
    data: DataModule,
    stage: Stage,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[L.Callback] = (),
) -> FitResult:
    """Train `module` on the training rows and leave it with the weights of its best epoch on the validation rows.

    A fit that was stopped goes on from its checkpoint, and one that has ended there gives what it gave.

    Raises:
        RunError: where the loss was not finite in any epoch.
        ConfigError: where torch.compile was asked for and fails.
    """
    settings = module.settings
    best = BestWeights()
    watchers: list[L.Callback] = [best, EpochLines(stage.metrics, stage.name, stage.attempt), *callbacks]
    if settings.patience is not None:
        watchers.append(EarlyStopping("validation_loss", patience=settings.patience, check_finite=True))
    loader = data.training_loader(settings.batch_size, stage.seed, stage.key, settings.num_workers)
    module.total_steps = settings.max_epochs * len(loader)
    checkpoint = stage.checkpoint_of(settings, f"{data.fingerprint} {module.total_steps}")
    module.saving = saving = Saving(stage.name, checkpoint, watchers)
    saved = None if checkpoint is None else checkpoint.read()
    if saved is not None and "ended" in saved:
        return _ended_before(stage, module, saving, saved)
    if settings.progress:
        watchers.append(progress_of(stage.description or stage.name, module.total_steps))
    trainer, epochs = _trainer(settings, stage, loggers, [*watchers, saving]), EpochLoader(loader)
    if saved is not None:
        epochs.start = saving.resume(trainer, saved)
    with stop.deferred():
        try:
            with rank_zero(), matmul_precision(settings.matmul_precision), compile_errors(), module.taps:
                trainer.fit(module, epochs, data.loader(data.validation, max(settings.batch_size, 256)))
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
                raise SystemExit(128 + signal.SIGINT) from end
            raise
        best.restore(module)
        result = FitResult(trainer.current_epoch, best.epoch, saving.seconds)
        saving.ended(module, asdict(result))
    return _checked(stage, result)


def _trainer(
    settings: TrainerConfig, stage: Stage, loggers: Sequence[Logger], callbacks: list[L.Callback]
) -> FitTrainer:
    return FitTrainer(  # a fresh one every time: a used Trainer fits 0 steps
        max_epochs=settings.max_epochs,
        accelerator="gpu" if settings.device.type == "cuda" else "cpu",
        devices=1,
        # one process, whatever variables of a launcher are inherited. Under SLURM's, Lightning would checkpoint on
        # SIGUSR1, and start every fit from an hpc_ckpt_*.ckpt in its root: that is a folder nobody makes
        plugins=[LightningEnvironment()],
        default_root_dir=stage.metrics.parent / "lightning",
        precision=settings.precision,
        logger=list(loggers) or False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1_000_000,  # losses are logged once an epoch
    )


def _ended_before(stage: Stage, module: FitModule, saving: Saving, saved: dict[str, Any]) -> FitResult:
    """What a fit gave that had ended when its process was stopped."""
    module.load_state_dict(saved["module"])
    saving.restore_callbacks(saved)
    logger.info("%s: trained before", stage.description or stage.name)
    return _checked(stage, FitResult(**saved["ended"]))


def _checked(stage: Stage, result: FitResult) -> FitResult:
    if result.best_epoch < 0:
        raise RunError(
            f"{stage.name}: the loss was not finite in any epoch; lower"
            f" {'teacher.' if stage.name == 'teacher' else ''}trainer.optimizer.lr or gradient_clip"
        )
    return result


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """`torch.set_float32_matmul_precision` for the length of the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def predict(
    model: nn.Module,
    data: DataModule,
    rows: range,
    device: torch.device,
    batch_size: int = 512,
    out: Tensor | None = None,
) -> Tensor:
    """Logits of `model` in evaluation mode on `rows` of the data, in order: (rows, classes) float32 on the CPU.

    The model is asked on `device` and stays there. The logits are written to `out`, where it is given.
    """
    training = model.training
    model.to(device).eval()
    logits = torch.empty(len(rows), data.num_classes) if out is None else out
    for batch, part in zip(data.loader(rows, batch_size), logits.split(batch_size), strict=True):
        part.copy_(output_of(model(batch.inputs.to(device))).logits)
    model.train(training)
    return logits
