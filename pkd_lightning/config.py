"""Options of the algorithm, validated at construction. Every fault is found at once and named with its key."""

import difflib
import inspect
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pkd_lightning.errors import ConfigError

if TYPE_CHECKING:  # where it is used it is imported: `--help` and a finished run do without its seconds
    import torch

T = TypeVar("T")
KEY = re.compile(r"[\w.]+[=:]")
MEANT = re.compile(r"(no such option\. Did you mean ')")  # what follows is a key

Require = Literal["auto", "condition", "improvement"]
OnFailure = Literal["expand", "accept"]
FirstTerm = Literal["labels", "soft", "both"]
Weights = Literal["none", "samples"]
Split = Literal["paper", "official"]
Accelerator = Literal["auto", "cpu", "gpu"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
MatmulPrecision = Literal["highest", "high", "medium"]


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the known name nearest to `name`, or '' where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_keys(given: Iterable[str], known: Iterable[str]) -> list[str]:
    """One fault for each given key that is not known, with the nearest known one."""
    known = list(known)
    return [
        f"{key}: no such option.{suggest(key, known)} Options: {', '.join(known)}" for key in given if key not in known
    ]


def build(cls: type[T], options: Mapping[str, Any]) -> T:
    """Construct the dataclass `cls` from `options`.

    Raises:
        ConfigError: for unknown keys, with suggestions, for missing ones, and for whatever `cls` itself finds.
    """
    if not isinstance(options, Mapping):
        raise ConfigError([f"must be a mapping of options, not {options!r}"])
    known = fields(cls)  # type: ignore[arg-type]
    faults = unknown_keys(options, [f.name for f in known])
    required = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    faults += [f"{name}: is missing" for name in required if name not in options]
    if faults:
        raise ConfigError(faults)
    return cls(**options)


def collect(faults: list[str], prefix: str, make: Callable[[], T]) -> T | None:
    """Call `make`; on a `ConfigError` add its faults, each under `prefix`, to `faults` and return None."""
    try:
        return make()
    except ConfigError as error:
        faults.extend(under(prefix, error.faults))
        return None


def under(prefix: str, faults: Iterable[str]) -> list[str]:
    """Faults found in the part `prefix`, with every key as it can be typed, the suggested ones too."""
    found = []
    for fault in faults:
        if KEY.match(fault):
            found.append(f"{prefix}." + MEANT.sub(lambda said: f"{said[0]}{prefix}.", fault))
        else:  # it is about `prefix` itself
            found.append(f"{prefix}: {fault}")
    return found


class Faults:
    """Collects the faults of one dataclass; each check states what is allowed."""

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.found: list[str] = []

    def whole(self, name: str, least: int, optional: bool = False) -> None:
        """`name` must be an int of at least `least` (or None where `optional`)."""
        value = getattr(self.owner, name)
        if (value is None and optional) or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            return
        null = "null or " if optional else ""
        self.found.append(f"{name}={value!r}: must be {null}a whole number of at least {least}")

    def number(
        self,
        name: str,
        low: float = -math.inf,
        high: float = math.inf,
        optional: bool = False,
        exclusive: bool = False,
    ) -> None:
        """`name` must be a finite number in [low, high], or in (low, high) where `exclusive`."""
        value = getattr(self.owner, name)
        if value is None and optional:
            return
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            inside = low < value < high if exclusive else low <= value <= high
            if inside:
                return
        null = "null or " if optional else ""
        if exclusive:
            limits = f"above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        elif high < math.inf:
            limits = f"from {low:g} to {high:g}"
        else:
            limits = f"at least {low:g}" if low > -math.inf else "finite"
        self.found.append(f"{name}={value!r}: must be {null}a number {limits}")

    def choice(self, name: str, allowed: Iterable[str]) -> None:
        """`name` must be one of `allowed`."""
        allowed = list(allowed)
        value = getattr(self.owner, name)
        if value not in allowed:
            self.found.append(f"{name}={value!r}: must be one of {', '.join(allowed)}.{suggest(str(value), allowed)}")

    def called(self, name: str, optional: bool = False) -> None:
        """`name` must be something to call (or None where `optional`)."""
        value = getattr(self.owner, name)
        if not callable(value) and not (value is None and optional):
            self.found.append(f"{name}={value!r}: must be a `_target_` with `_partial_: true`")

    def flag(self, name: str) -> None:
        """`name` must be a bool."""
        if not isinstance(getattr(self.owner, name), bool):
            self.found.append(f"{name}={getattr(self.owner, name)!r}: must be true or false")

    def works(self, name: str, call: Callable[[], object]) -> None:
        """`call`, which uses `name`, must not raise."""
        try:
            call()
        except Exception as error:  # whatever the user's function raises is the fault
            self.found.append(f"{name}: fails ({type(error).__name__}: {error})")

    def raise_if_any(self) -> None:
        """Raise one `ConfigError` with everything found."""
        if self.found:
            raise ConfigError(self.found)


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
        num_workers: loader processes; 0 loads in the training process, fastest for data in memory.
        progress: show a bar for each fit, or lines where stdout is no terminal.
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
    num_workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        import torch

        faults = Faults(self)
        faults.whole("max_epochs", 1)
        faults.whole("patience", 1, optional=True)
        faults.whole("batch_size", 1)
        faults.whole("num_workers", 0)
        faults.number("gradient_clip", 0, optional=True, exclusive=True)
        faults.choice("accelerator", get_args(Accelerator))
        faults.choice("precision", get_args(Precision))
        faults.choice("matmul_precision", get_args(MatmulPrecision))
        faults.flag("compile")
        faults.flag("progress")
        # tried out, because only they know their options
        faults.works("optimizer", lambda: self.build_optimizer([torch.nn.Parameter(torch.zeros(1))]).step())
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
    def device(self) -> "torch.device":
        """Where models are fitted and asked."""
        import torch

        from pkd_lightning.kernels.scan import cuda

        on_gpu = self.accelerator == "gpu" or (self.accelerator == "auto" and cuda.available())
        return torch.device("cuda" if on_gpu else "cpu")


def device_of(accelerator: str) -> str:
    """`accelerator`, and of `auto` the one of `TrainerConfig.device`; without torch where possible."""
    if accelerator != "auto":
        return accelerator
    if find_spec("mamba_ssm") is None:
        return "cpu"  # what `cuda.available` says without it
    from pkd_lightning.kernels.scan import cuda

    return "gpu" if cuda.available() else "cpu"


@dataclass(frozen=True)
class WeakLearnerConfig:
    """When a candidate becomes a student (METHOD: the weak-learning condition of B-DISTIL, arXiv 2302.10093).

    Attributes:
        require: `condition`: positive edges; `improvement`: the ensemble with the candidate has a lower validation loss
            than without it; `auto`: what the objective was made for.
        fraction: fraction of the classes whose edge must exceed `margin` (1 is the published condition).
        margin: what an edge must exceed (0 is the published condition).
        min_improvement: relative decrease of the validation loss that counts as an improvement.
        check_every: epochs between two checks of the condition; training stops early when it holds.
        max_attempts: candidates tried on a rung before it counts as failed, and one more where one diverges.
        on_failure: `expand`: go up one rung; `accept`: take the best candidate and say so.
    """

    require: Require = "auto"
    fraction: float = 1.0
    margin: float = 0.0
    min_improvement: float = 0.0
    check_every: int = 10
    max_attempts: int = 1
    on_failure: OnFailure = "expand"

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.choice("require", get_args(Require))
        faults.number("fraction", 0, 1)
        faults.number("margin")
        faults.number("min_improvement", 0, 1)
        faults.whole("check_every", 1)
        faults.whole("max_attempts", 1)
        faults.choice("on_failure", get_args(OnFailure))
        faults.raise_if_any()


@dataclass(frozen=True)
class BoostingConfig:
    """The boosting loop and its round losses.

    Attributes:
        rounds: most students T.
        objective: name in `pkd_lightning.boosting.objectives`, or import path of an `Objective`.
        combine: name in `pkd_lightning.boosting.combine`, or import path of a `Combination`.
        temperature: tau of the distillation loss.
        alpha: weight of the hard loss.
        anchor: weight of the ensemble's loss in the anchored objective; the student's own has 1 - anchor.
        first_term: of the published round loss, beside the barrier loss, which has the weight 1 - alpha. `soft`: the
            soft loss, weighed by alpha. `labels`: the cross-entropy of the labels, weighed by alpha. `both`: the whole
            loss of the first round. Section 3 of Mamba-PKD (arXiv 2503.01727) writes the labels, section 4.2 the
            teacher's soft labels at temperature 2; only with soft labels has that temperature an effect after round 1.
        gamma: divisor of the barrier loss, which sums over the classes.
        eta: step of the multiplicative update; None for sqrt(log(2N) / T) / B.
        bound_quantile: B is this quantile of abs(f - g) over the training rows and classes: 1, the theory's bound, is
            the largest. Below 1, residuals are clipped to [-B, B] where they enter K+ and K- or an edge.
        weights: what weighs the samples in the distillation loss that students of rounds after the first are trained
            with: `none`, or `samples`: sample i by sum_j abs(K+(i,j) - K-(i,j)), of mean 1 over the training rows.
            Learned scales are solved for without weights.
        weak_learner: see `WeakLearnerConfig`.
    """

    rounds: int = 7
    objective: str = "anchored"
    combine: str = "learned"
    temperature: float = 2.0
    alpha: float = 0.5
    anchor: float = 0.5
    first_term: FirstTerm = "soft"
    gamma: float = 1.0
    eta: float | None = None
    bound_quantile: float = 1.0
    weights: Weights = "none"
    weak_learner: WeakLearnerConfig = field(default_factory=WeakLearnerConfig)

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.whole("rounds", 1)
        faults.number("temperature", 0, exclusive=True)
        faults.number("alpha", 0, 1)
        faults.number("anchor", 0, 1)
        faults.choice("first_term", get_args(FirstTerm))
        faults.number("gamma", 0, exclusive=True)
        faults.number("eta", 0, optional=True)
        faults.number("bound_quantile", 0, 1)
        if self.bound_quantile == 0:
            faults.found.append("bound_quantile=0: must be above 0; B would be the smallest residual")
        faults.choice("weights", get_args(Weights))
        # imported here: the objectives take this configuration as an argument
        from pkd_lightning.boosting import combine, objectives

        objective = collect(
            faults.found, "objective", lambda: resolve(self.objective, objectives, objectives.Objective)
        )
        collect(faults.found, "combine", lambda: resolve(self.combine, combine, combine.Combination))
        if self.weights == "samples" and objective is not None and not objective.weighs_samples:
            faults.found.append(
                f"weights='samples': must be none with objective={self.objective!r}, whose loss does not weigh samples"
            )
        faults.raise_if_any()


def resolve(name: str, module: Any, kind: type[T]) -> T:
    """The object of type `kind` called `name` in `module`, or at the import path `name`.

    Raises:
        ConfigError: where there is none, listing what `module` offers.
    """
    from hydra.utils import get_object

    offered = sorted(key for key, value in vars(module).items() if isinstance(value, kind))
    if name in offered:
        return getattr(module, name)  # type: ignore[no-any-return]
    if "." in str(name):
        try:
            found = get_object(name)
        except Exception as error:
            raise ConfigError([f"{name!r}: cannot be imported ({error})"]) from error
        if isinstance(found, kind):
            return found
        raise ConfigError([f"{name!r} gives a {type(found).__name__}, not of type {kind.__name__}"])
    options = ", ".join(offered)
    raise ConfigError([f"{name!r}: must be one of {options}, or an import path.{suggest(str(name), offered)}"])
