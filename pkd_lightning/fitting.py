"""One fit of one model: the callbacks and `fit`, used by the teacher and every student."""

import json
import logging
import math
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch._functorch.config
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from pkd_lightning import ranks
from pkd_lightning.checkpoint import append_line
from pkd_lightning.data.epochs import EpochLoader
from pkd_lightning.data.module import DataModule
from pkd_lightning.errors import ConfigError, Diverged
from pkd_lightning.fit_checkpoint import FitCheckpoint, Saving
from pkd_lightning.fit_module import FitModule
from pkd_lightning.loggers import rank_zero
from pkd_lightning.outputs import output_of
from pkd_lightning.process import stop
from pkd_lightning.processes import Joined
from pkd_lightning.progress import progress_of
from pkd_lightning.trainer import Interval, TrainerConfig

logger = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hardware notes before every one of many fits
warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # data lies in memory
warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")  # once an epoch is intended
warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # the means are those of all ranks
warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # a fit is one process, srun or not
# once a process, of parameters whose gradients came from the stream that recorded them
warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
warnings.filterwarnings("ignore", message=".*treespec.*is deprecated")  # lightning 2.6.6 with torch 2.13


class FitTrainer(L.Trainer):
    """A Trainer that takes its arguments from its call alone.

    Lightning fills what is not given from `PL_TRAINER_*` variables, named after the class. One of these, inherited from
    a shell, would change results under the same run directory.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if ranks.size() > 1:  # Lightning's handler of SIGTERM broadcasts, in the middle of whatever else is exchanged
            self._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn a failure of torch.compile inside the block into a `ConfigError` that says how to do without."""
    try:
        yield
    except TorchDynamoException as error:
        cause = " ".join(str(error).split("\n")[:2])  # the backend's name, then its error
        fault = f"trainer.compile=true: torch.compile fails ({cause}); trainer.compile=false trains without it"
        raise ConfigError([fault]) from error


@contextmanager
def reusable_graphs(needed: bool) -> Iterator[None]:
    """Within the block torch.compile makes backward passes that can run again, where that is needed.

    They take more memory. Others reuse that of the forward pass, and then refuse to be run with `retain_graph`.
    """
    with torch._functorch.config.patch(donated_buffer=False) if needed else nullcontext():
        yield


class BestWeights(L.Callback):
    """Keeps the weights of the epoch with the lowest validation loss in memory; `restore` puts them back."""

    def __init__(self) -> None:
        self.loss = float("inf")
        self.epoch = -1
        self.state: dict[str, Tensor] | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare this epoch with the best one so far, while the module has the weights that were validated.

        Callbacks that average weights, which come later, take them out of it again.
        """
        assert isinstance(pl_module, FitModule)
        loss = pl_module.validation_loss
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
        self.start: float | None = None
        self.before = 0.0  # seconds of the epoch under way in processes that were stopped

    @property
    def state_key(self) -> str:
        """One for each file: a teacher's fit has lines in its own folder and in the run's."""
        return f"EpochLines {self.path}"

    @property
    def seconds(self) -> float:
        """Wall time of the epoch under way."""
        return self.before + (0.0 if self.start is None else time.perf_counter() - self.start)

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
        line["seconds"] = round(self.seconds, 4)
        append_line(self.path, json.dumps(line, allow_nan=False))
        self.start, self.before = None, 0.0

    def state_dict(self) -> dict[str, Any]:
        """What the epoch under way has taken."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.before = state_dict["seconds"]


REFUSED: dict[type[L.Callback], str] = {  # callbacks, and what to use in their place
    Checkpoint: "fits are saved by trainer.checkpoint_every",
    GradientAccumulationScheduler: "the schedule counts steps by +trainer.lightning.accumulate_grad_batches=N",
}


@dataclass(frozen=True)
class FitResult:
    """What a fit gave.

    Attributes:
        epochs: epochs trained.
        best_epoch: epoch (from 0) with the best validation loss.
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
        label: its name in the run's metrics and trackers, where another stands there: one of several teachers.
        options: where those of its trainer are, if that does not follow from its name.
    """

    name: str
    seed: int
    metrics: Path
    attempt: int = 0
    description: str = ""
    checkpoint: Path | None = None
    identity: str = ""
    label: str = ""
    options: str = ""

    @property
    def shown(self) -> str:
        """Its name in the run's metrics and trackers."""
        return self.label or self.name

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
    loggers: Sequence[Logger | L.Callback] = (),
    callbacks: Sequence[L.Callback] = (),
) -> FitResult:
    """Train `module` on the training rows and leave it with the weights of its best epoch on the validation rows, or of
    its last (`TrainerConfig.weights`).

    A fit that was stopped goes on from its checkpoint, and one that has ended there gives what it gave.

    Raises:
        Diverged: where the loss was not finite in any epoch.
        ConfigError: where torch.compile was asked for and fails.
    """
    settings = module.settings
    best = BestWeights()
    lines = [EpochLines(stage.metrics, stage.shown, stage.attempt)] if ranks.first() else []
    looking = [one for one in loggers if isinstance(one, L.Callback)]
    watchers: list[L.Callback] = [best, *lines, *callbacks]
    if settings.patience is not None:
        watchers.append(EarlyStopping("validation_loss", patience=settings.patience, check_finite=True))
    loader = data.training_loader(settings.batch_size, stage.seed, stage.key, settings.num_workers)
    module.total_steps = settings.max_epochs * _steps(len(loader), settings.lightning or {})
    watchers += [make() for make in settings.callbacks or ()]
    pairs = [(one, use) for kind, use in REFUSED.items() for one in watchers if isinstance(one, kind)]
    if pairs:
        raise ConfigError([f"trainer.callbacks: {type(one).__name__}: {use}" for one, use in pairs])
    checkpoint = stage.checkpoint_of(settings, f"{data.fingerprint} {module.total_steps}")
    module.saving = saving = Saving(stage.name, checkpoint, watchers)
    saved = None if checkpoint is None else ranks.agreed(checkpoint.read)
    if saved is not None and "ended" in saved:
        return _ended_before(stage, module, saving, saved)
    if settings.progress and ranks.first():
        watchers.append(progress_of(stage.description or stage.name, module.total_steps))
    if settings.by_step:
        logger.info("%s: a training step a batch, with Lightning's hooks around it", stage.description or stage.name)
    try:
        kept = [one for one in loggers if isinstance(one, Logger)]
        trainer = _trainer(settings, stage, kept, [*watchers, *looking, saving])
    except (MisconfigurationException, RuntimeError, ValueError, TypeError) as error:  # of arguments that users give
        raise ConfigError([f"trainer: Lightning refuses it: {error}"]) from error
    if saved is not None:
        saving.resume(trainer, module, loader, saved)
    with stop.deferred():
        try:
            reusable = reusable_graphs(module.reuses_graphs and settings.compile)
            with rank_zero(), matmul_precision(settings.matmul_precision), compile_errors(), reusable, module.taps:
                epochs = loader if settings.by_step else EpochLoader(loader)
                trainer.fit(module, epochs, data.loader(data.validation, max(settings.batch_size, 256)))
        except MisconfigurationException as error:
            raise ConfigError([f"trainer: Lightning refuses it: {error}"]) from error
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
                raise SystemExit(128 + signal.SIGINT) from end
            raise
        if settings.weights == "best":
            best.restore(module)
        result = FitResult(trainer.current_epoch, best.epoch, saving.seconds)
        saving.ended(module, asdict(result))
    return _checked(stage, result)


def _steps(batches: int, given: Mapping[str, Any]) -> int:
    """Steps of an epoch of so many batches, by the arguments given to the Trainer."""
    limit = given.get("limit_train_batches")
    if limit is not None:  # a number of them, or a share
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return max(1, math.ceil(batches / int(given.get("accumulate_grad_batches", 1))))


def _trainer(
    settings: TrainerConfig, stage: Stage, loggers: Sequence[Logger], callbacks: list[L.Callback]
) -> FitTrainer:
    return FitTrainer(  # a fresh one every time: a used Trainer fits 0 steps
        max_epochs=settings.max_epochs,
        accelerator="gpu" if settings.device.type == "cuda" else "cpu",
        **_processes(settings),
        default_root_dir=stage.metrics.parent / "lightning",
        precision=settings.precision,
        logger=list(loggers) or False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"log_every_n_steps": 1_000_000, **(settings.lightning or {})},  # losses are logged once an epoch
    )


def _processes(settings: TrainerConfig) -> dict[str, Any]:
    """What a Trainer is told of the processes of the run.

    They are there already, whatever variables of a launcher are inherited. Under SLURM's, Lightning would checkpoint on
    SIGUSR1, and start every fit from an hpc_ckpt_*.ckpt in its root: that is a folder nobody makes.
    """
    if ranks.size() == 1:
        return {"devices": 1, "plugins": [LightningEnvironment()]}
    unused = settings.strategy == "ddp_find_unused_parameters_true"
    strategy = DDPStrategy(
        cluster_environment=Joined(), find_unused_parameters=unused,
        forward_sync_buffers=False,  # of which ranks have different numbers; see FitModule
    )  # fmt: skip
    return {
        "devices": settings.devices, "num_nodes": settings.num_nodes, "strategy": strategy,
        "use_distributed_sampler": False,  # each rank has its rows
    }  # fmt: skip


def _ended_before(stage: Stage, module: FitModule, saving: Saving, saved: dict[str, Any]) -> FitResult:
    """What a fit gave that had ended when its process was stopped."""
    module.load_state_dict(saved["module"])
    saving.restore_callbacks(saved)
    logger.info("%s: trained before", stage.description or stage.name)
    return _checked(stage, FitResult(**saved["ended"]))


def _checked(stage: Stage, result: FitResult) -> FitResult:
    if result.best_epoch < 0:
        options = stage.options or ("teacher.trainer" if stage.name == "teacher" else "trainer")
        raise Diverged(
            f"{stage.name}: the loss was not finite in any epoch; lower {options}.optimizer.lr or gradient_clip"
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
