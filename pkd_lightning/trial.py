"""Everything that a run does to a model, tried on two samples before anything is trained."""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from pkd_lightning.checkpoint import weights_of
from pkd_lightning.cost import measure
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.building import brief, check_logits, evaluated
from pkd_lightning.outputs import output_of
from pkd_lightning.trainer import TrainerConfig

logger = logging.getLogger(__name__)


def try_model(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Tensor,
    num_classes: int,
    trainer: TrainerConfig | None,
    samples: int = 2,
    model: nn.Module | None = None,
) -> None:
    """Build a model, ask it for logits, train it by a step, save it, build and load it again, and count its costs.

    Args:
        name: what the model is called in the log.
        build: gives a new one, as it is built when its weights are loaded.
        inputs: two of them (2, *input_shape), prepared.
        num_classes: L.
        trainer: how it is trained; None where it is only loaded and asked.
        samples: of the training part; where all batches hold one of them, that is tried.
        model: the one to try, where it is built already; `build` is then called only where it is trained.

    Raises:
        ConfigError: at the first step that fails. A cost that cannot be counted is no fault, but a line in the log.
    """
    model = build() if model is None else model
    first = set(model.state_dict())
    for batch in (inputs, inputs[:1]):  # the last batch of a part may have one sample, and latency is that of one
        check_logits(evaluated(model, batch), len(batch), num_classes)
    _check_state(model, first)
    if trainer is not None:
        _try_training(model, inputs[: min(samples, trainer.batch_size)], num_classes, trainer)
        _check_state(model, first)
        _try_loading(model, build, inputs)
    with torch.inference_mode():  # as its latency is measured
        evaluated(model, inputs[:1])
    missing: list[str] = []
    measure(model, tuple(inputs.shape[1:]), missing)
    for line in missing:
        logger.warning("%s: %s; results and report show n/a", name, line)


def _check_state(model: nn.Module, first: set[str]) -> None:
    """Check that all weights were there before the first call, and that they are tensors."""
    state = model.state_dict()
    if later := sorted(set(state) ^ first):
        raise ConfigError(
            [
                f"its first call adds or removes weights ({', '.join(later[:4])}); make them in the constructor, which"
                " is given input_shape and num_classes where it names them, or use torch's lazy layers"
            ]
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigError([f"its state dict holds a {type(value).__name__} as {key!r}; only tensors can be saved"])


def _try_training(model: nn.Module, inputs: Tensor, num_classes: int, trainer: TrainerConfig) -> None:
    """One optimiser step in training mode."""
    model.train().to(trainer.device)  # where it will be trained: some kernels and optimisers are of one device only
    inputs = inputs.to(trainer.device)
    try:
        optimizer = trainer.build_optimizer(model.parameters())
        with torch.enable_grad():  # as a fit has it, also where a program calls a run without gradients
            logits = output_of(model(inputs)).logits
            if not isinstance(logits, Tensor):
                raise ConfigError(
                    [
                        f"gives type {type(logits).__name__} in training mode, and logits in evaluation; it must give"
                        " the logits in both (for torchvision's models with auxiliary heads: aux_logits=false)"
                    ]
                )
            check_logits(logits, len(inputs), num_classes)
            F.cross_entropy(logits, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)).backward()
        if trainer.gradient_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), trainer.gradient_clip)
        optimizer.step()
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's model or optimiser raises
        on = "a batch of one sample, as all batches are here," if len(inputs) == 1 else f"{len(inputs)} inputs"
        raise ConfigError([f"a training step on {on} fails ({brief(error)})"]) from error
    model.zero_grad()
    model.cpu()


def _try_loading(model: nn.Module, build: Callable[[], nn.Module], inputs: Tensor) -> None:
    """Save, build and load the model, whose logits must stay the same."""
    expected = evaluated(model, inputs)
    if not _same(evaluated(model, inputs), expected):
        raise ConfigError(["gives other logits each time it is asked for the same inputs in evaluation mode"])
    again = build()
    try:
        again.load_state_dict(load(save(weights_of(model))))
    except Exception as error:  # torch, safetensors and the user's hooks have their own
        raise ConfigError([f"its weights cannot be saved and loaded ({brief(error)})"]) from error
    if not _same(evaluated(again, inputs), expected):
        raise ConfigError(
            ["gives other logits after its weights are saved and loaded: it computes with values that are no parameter"]
        )


def _same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
