"""How one model is fitted: the options, and the device that they mean."""

import inspect
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from pkd_lightning.checks import Faults, unknown_keys

if TYPE_CHECKING:  # where it is used it is imported: `--help` and a finished run do without its seconds
    import torch

Accelerator = Literal["auto", "cpu", "gpu"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
MatmulPrecision = Literal["highest", "high", "medium"]
Mode = Literal["auto", "fast", "step"]
Weights = Literal["best", "last"]
Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_true"]


@dataclass(frozen=True)
class Interval:
    """When a checkpoint of a fit is due: after seconds, after epochs, by itself, or never.

    Attributes:
        automatic: often enough to lose little, seldom enough to cost little (see `FitCheckpoint`).
        seconds: after so many.
        epochs: after so many.
    """

    automatic: bool = False
    seconds: float | None = None
    epochs: int | None = None

    @property
    def any(self) -> bool:
        """Whether there are checkpoints at all."""
        return self.automatic or self.seconds is not None or self.epochs is not None

    @classmethod
    def of(cls, value: object) -> "Interval":
        """From `auto`, a number of minutes, `"3 epochs"`, or None.

        Raises:
            ValueError: where it is none of these.
        """
        match value:
            case None | "auto":
                return cls(automatic=value == "auto")
            case int() | float() if not isinstance(value, bool) and 0 < value < math.inf:
                return cls(seconds=60 * value)
            case str() if (found := re.fullmatch(r"(\d+) epochs?", value)) and int(found[1]) > 0:
                return cls(epochs=int(found[1]))
        raise ValueError("must be auto, a number of minutes above 0, a number of epochs such as '3 epochs', or null")


@dataclass(frozen=True)
class TrainerConfig:
    """How one model is fitted.

    Attributes:
        optimizer: parameters to a torch optimiser (a Hydra partial); see `build_optimizer`.
        schedule: progress in [0, 1] to a multiplier of the learning rate (see `pkd_lightning.schedules`).
        max_epochs: most epochs of one fit.
        patience: epochs without a better validation loss before a fit stops; None never stops it early.
        batch_size: samples per step. The last step of an epoch has what is left; a single sample joins the step before.
        gradient_clip: largest gradient norm; a step whose norm is not finite is skipped. None does neither.
        accelerator: `cpu`, `gpu`, or `auto`: a GPU where mamba_ssm's CUDA scan can run on it, else the CPU.
        precision: `32-true`, `bf16-mixed` or `16-mixed`.
        matmul_precision: of float32 matrix products during the fit, as in `torch.set_float32_matmul_precision`:
            `highest`, or `high` or `medium`, which let TF32 or bfloat16 compute them. It is reset after the fit.
        compile: run the model through torch.compile during the fit; on the CPU this needs a C++ compiler.
        cuda_graphs: on a GPU, record the model's forward and backward pass once and replay them for every full batch,
            which takes a small model a fraction of the time. For models that compute the same way every time: what they
            decide in Python is decided once. In the fast mode, where no features are taken from inside of the model.
        num_workers: loader processes; 0 loads in the training process, fastest for data in memory.
        progress: show a bar for each fit, or lines where stdout is no terminal.
        mode: `step`: each batch is a training step of Lightning's. `fast`: an epoch is, which for small models takes a
            fraction of the time; callbacks are then called once an epoch. `auto`: `fast`, unless `callbacks` or
            `lightning` have something in them, or several processes train together.
        callbacks: each gives a Lightning callback, a new one for each fit (Hydra partials).
        lightning: more arguments of `lightning.Trainer`.
        checkpoint_every: when a fit under way is saved: `auto`, minutes, or `"3 epochs"`; None never saves it. `auto`
            takes at most 2% of the time, and loses at most five minutes of it.
        devices: processes on each machine that train a run together, each on its GPU or on `threads` cores of the CPU.
            `batch_size` is of all of them.
        num_nodes: machines; with more than one, srun or torchrun starts the processes.
        strategy: `ddp`, which is what `auto` means for several processes, or Lightning's
            `ddp_find_unused_parameters_true` for a model some of whose parameters have no part in the loss.
        weights: those a fit leaves: of the epoch with the `best` validation loss, or of its `last`.
    """

    optimizer: Callable[..., Any]
    schedule: Callable[[float], float]
    max_epochs: int = 50
    patience: int | None = 5
    batch_size: int = 32
    gradient_clip: float | None = 1.0
    accelerator: Accelerator = "auto"
    precision: Precision = "32-true"
    matmul_precision: MatmulPrecision = "highest"
    compile: bool = False
    cuda_graphs: bool = False
    num_workers: int = 0
    progress: bool = True
    mode: Mode = "auto"
    callbacks: Sequence[Callable[[], Any]] | None = None
    lightning: Mapping[str, Any] | None = None
    checkpoint_every: str | float | None = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Strategy = "auto"
    weights: Weights = "best"

    def __post_init__(self) -> None:
        import torch

        faults = Faults(self)
        faults.whole("max_epochs", 1)
        faults.whole("patience", 1, optional=True)
        faults.choice("weights", get_args(Weights))
        faults.whole("batch_size", 1)
        faults.whole("num_workers", 0)
        faults.number("gradient_clip", 0, optional=True, exclusive=True)
        faults.choice("accelerator", get_args(Accelerator))
        faults.choice("precision", get_args(Precision))
        faults.choice("matmul_precision", get_args(MatmulPrecision))
        faults.flag("compile")
        faults.flag("cuda_graphs")
        if self.compile is True and self.cuda_graphs is True:
            faults.found.append("cuda_graphs=True: beside compile=True, which starts kernels of its own; choose one")
        faults.flag("progress")
        faults.choice("mode", get_args(Mode))
        faults.whole("devices", 1)
        faults.whole("num_nodes", 1)
        faults.choice("strategy", get_args(Strategy))
        if self.mode == "fast" and self.processes > 1:
            faults.found.append("mode='fast': must be auto or step where several processes train together")
        faults.found += _callback_faults(self.callbacks) + _argument_faults(self.lightning)
        if self.mode == "fast" and (self.callbacks or self.lightning):
            faults.found.append("mode='fast': must be auto or step with callbacks, or arguments in lightning")
        try:
            Interval.of(self.checkpoint_every)
        except ValueError as error:
            faults.found.append(f"checkpoint_every={self.checkpoint_every!r}: {error}")
        # tried out, because only they know their options
        if not faults.misspelt("optimizer"):
            faults.works("optimizer", lambda: self.build_optimizer([torch.nn.Parameter(torch.zeros(1))]).step())
        if not faults.misspelt("schedule"):
            faults.works("schedule", lambda: [float(self.schedule(progress)) for progress in (0.0, 0.5, 1.0)])
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            faults.found.append("accelerator='gpu': torch sees no GPU")
        elif self.compile is True and self.device.type == "cpu":
            compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what inductor asks
            if shutil.which(compiler) is None:
                faults.found.append(
                    f"compile=True: torch.compile needs a C++ compiler on the CPU, and there is no {compiler!r};"
                    " install one (apt install g++), name yours in the environment variable CXX, or set compile=false"
                )
        faults.raise_if_any()

    def build_optimizer(self, parameters: Iterable[Any]) -> "torch.optim.Optimizer":
        """The optimiser of `parameters`, or of groups of them, fused where it offers that and nothing else is chosen.

        Over many small tensors, a fused step of Adam takes a fraction of the time of the other two kinds.
        """
        make, given = getattr(self.optimizer, "func", self.optimizer), getattr(self.optimizer, "keywords", {})
        chosen = [name for name in ("fused", "foreach") if given.get(name) is not None]
        free = not chosen and "fused" in inspect.signature(make).parameters
        optimizer: torch.optim.Optimizer = self.optimizer(parameters, **({"fused": True} if free else {}))
        return optimizer

    @property
    def by_step(self) -> bool:
        """Whether a batch is a training step to Lightning."""
        return self.mode == "step" or (
            self.mode == "auto" and bool(self.callbacks or self.lightning or self.processes > 1)
        )

    @property
    def processes(self) -> int:
        """How many processes train a run together."""
        whole = type(self.devices) is type(self.num_nodes) is int
        return self.devices * self.num_nodes if whole else 1

    @property
    def device(self) -> "torch.device":
        """Where models are fitted and asked."""
        import torch

        from pkd_lightning.kernels.scan import cuda

        on_gpu = self.accelerator == "gpu" or (self.accelerator == "auto" and cuda.available())
        return torch.device("cuda" if on_gpu else "cpu")


# arguments of a Trainer that are an option of ours, or that a fit is built on
OWN = {
    "accelerator": "accelerator", "precision": "precision", "max_epochs": "max_epochs", "callbacks": "callbacks",
    "gradient_clip_val": "gradient_clip", "enable_progress_bar": "progress", "devices": "devices",
    "num_nodes": "num_nodes", "strategy": "strategy",
}  # fmt: skip
BUILT_ON = (
    "logger", "default_root_dir", "enable_checkpointing", "num_sanity_val_steps", "max_steps",
    "min_steps", "min_epochs", "val_check_interval", "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs",
    "gradient_clip_algorithm", "enable_model_summary", "fast_dev_run", "limit_val_batches", "overfit_batches",
    "use_distributed_sampler",
)  # fmt: skip


def _argument_faults(given: Mapping[str, Any] | None) -> list[str]:
    """Faults of the arguments for `lightning.Trainer`."""
    import lightning as L

    if given is None:
        return []
    if not isinstance(given, Mapping):
        return [f"lightning={given!r}: must be a mapping of arguments of lightning.Trainer"]
    known = [name for name in inspect.signature(L.Trainer).parameters if name not in (*OWN, *BUILT_ON)]
    faults = [f"lightning.{name}: is set by `trainer.{OWN[name]}`" for name in given if name in OWN]
    faults += [f"lightning.{name}: a fit is built on what it sets itself" for name in given if name in BUILT_ON]
    left = [name for name in given if name not in OWN and name not in BUILT_ON]
    return faults + [f"lightning.{fault}" for fault in unknown_keys(left, known)]


def _callback_faults(given: Any) -> list[str]:
    """Faults of the callbacks, each of which is made once."""
    import lightning as L

    if given is None:
        return []
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [f"callbacks={given!r}: must be a list of `_target_`s"]
    faults = []
    for index, make in enumerate(given):
        try:
            made = make() if callable(make) else make
        except Exception as error:  # whatever the user's callback raises
            faults.append(f"callbacks.{index}: cannot be made ({type(error).__name__}: {error})")
            continue
        if not isinstance(made, L.Callback) or not callable(make):
            faults.append(f"callbacks.{index}: must be the `_target_` of a Lightning callback, not {made!r}")
    return faults


def device_of(accelerator: str) -> str:
    """`accelerator`, and of `auto` the one of `TrainerConfig.device`; without torch where possible."""
    if accelerator != "auto":
        return accelerator
    if find_spec("mamba_ssm") is None:
        return "cpu"  # what `cuda.available` says without it
    from pkd_lightning.kernels.scan import cuda

    return "gpu" if cuda.available() else "cpu"
