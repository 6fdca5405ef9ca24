"""The forward and backward pass of a model as CUDA graphs, recorded once and replayed in every training step."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Graphs:
    """Calls a model in training mode by CUDA graphs of its forward and its backward pass.

    The kernels of a small model take less time than starting them one by one. The graphs are recorded at the first
    batch, for inputs of its shape: others go to the model itself, as all do where it cannot be recorded. What the model
    decides in Python, such as which blocks it leaves out, is decided once, and hooks inside of it are not called again.
    A gradient lies in memory that the next backward pass writes to.

    Args:
        model: on a CUDA device, all of its parameters too. It is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._replay: nn.Module | None = None
        self._inputs: tuple[torch.Size, torch.dtype] | None = None  # what was recorded, or was tried

    def __call__(self, inputs: Tensor) -> Any:
        """What the model gives for inputs (batch, ...)."""
        kind = inputs.shape, inputs.dtype
        if self._inputs is None:
            self._inputs = kind
            self._replay = recorded(self.model, inputs)
        return self.model(inputs) if self._replay is None or kind != self._inputs else self._replay(inputs)


class _Called(nn.Module):
    """Calls a model: what is recorded has its `forward` replaced, and may have no hooks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs)


def recorded(model: nn.Module, inputs: Tensor) -> nn.Module | None:
    """A module that replays `model` for inputs like these; None, with a line in the log, where it cannot be recorded.

    Recording calls the model a few times. Its buffers and the random state are afterwards what they were.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    random = torch.cuda.get_rng_state(inputs.device)
    # casts that autocast has kept from outside of the graph would not follow the weights
    mixed = torch.is_autocast_enabled("cuda")
    autocast = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=mixed, cache_enabled=False)
    called = _Called(model)
    try:
        with autocast:
            torch.cuda.make_graphed_callables(called, (inputs.clone(),), allow_unused_input=True)
    except Exception as error:  # whatever of a model cannot be recorded: it reads a value, or synchronises
        cause = (str(error) or type(error).__name__).splitlines()[0]
        logger.warning("trainer.cuda_graphs: the model cannot be recorded (%s), its kernels are started singly", cause)
        return None
    finally:
        torch.cuda.set_rng_state(random, inputs.device)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return called
