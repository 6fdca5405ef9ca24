"""A whole Mamba block: fused against PyTorch's operations around the scan, and against the scan alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import BATCH, PATCHES, STUDENTS, TEACHER, classifier
from benchmarks.scan import fused, inputs, scan_call
from benchmarks.timing import Row, at_most, compared, interleaved
from pkd_lightning.models.mamba import Mamba

MODELS = {**STUDENTS, **TEACHER, **PATCHES}
OF_THE_SCAN = {1: 2, 64: 1.6}  # by d_model: how many times the time of its scan a block may take
SECONDS = 1.0  # a call's share of the time


def block_call(mixer: Mamba, tokens: Tensor, fuse: bool, backward: bool) -> Callable[[], object]:
    """A call of the block, fused or not, with `backward` also for the gradients of tokens and weights."""

    def forward() -> Tensor:
        mixer.fused = fuse
        y: Tensor = mixer(tokens)
        return y

    if not backward:
        return torch.no_grad()(forward)
    leaves = [tokens.requires_grad_(), *mixer.parameters()]
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(forward(), leaves, grad)


def rows(rounds: int, models: Mapping[str, dict[str, Any]] = MODELS, batch: int = BATCH) -> list[Row]:
    """The middle block of each model: what the table and the JSON show."""
    result = []
    for name, options in models.items():
        model = classifier(options)
        mixer = model.blocks[len(model.blocks) // 2].mixer
        length = model.tokens.length
        tokens = torch.randn(batch, length, mixer.d_model, generator=torch.Generator().manual_seed(0))
        for backward in (False, True):
            what = f"block of {name} ({length}, {mixer.d_inner}, {mixer.d_state})"
            what += f" forward{'+backward' if backward else ''}"
            calls = {
                "block": block_call(mixer, tokens, True, backward),
                "unfused block": block_call(mixer, tokens, False, backward),
                "scan alone": scan_call(fused, inputs(length, mixer.d_inner, mixer.d_state, batch), backward),
            }
            times = interleaved(calls, rounds, SECONDS)
            result.append(compared(what, times, "block", "unfused block"))
            share = at_most(OF_THE_SCAN[mixer.d_model]) if mixer.d_model in OF_THE_SCAN else None
            result.append(compared(what, times, "block", "scan alone", share, cost=True))
    return result
