"""What a model costs: parameters, FLOPs as the paper counts them, and every multiply-accumulate."""

import copy
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from pkd_lightning.models.building import InputShape, brief
from pkd_lightning.outputs import output_of


@dataclass(frozen=True)
class Cost:
    """Cost of one image. A count that could not be made is None, and so is every sum with it.

    Attributes:
        params: number of parameters.
        flops_published: what fvcore counts where the fused Mamba kernel is opaque to it: of a block only `in_proj`.
            This reproduces the FLOPs of Mamba-PKD's tables (arXiv 2503.01727). They are multiply-accumulates, and far
            fewer than are computed.
        macs_total: all multiply-accumulates of convolutions and matrix products, and of the scan (see `Mamba.macs`).
    """

    params: int
    flops_published: int | None
    macs_total: int | None

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.params + other.params,
            _sum(self.flops_published, other.flops_published),
            _sum(self.macs_total, other.macs_total),
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def measure(model: nn.Module, input_shape: InputShape, missing: list[str] | None = None) -> Cost:
    """Count the cost of `model` for one input of `input_shape`.

    Args:
        model: a classifier.
        input_shape: of one input.
        missing: gets a line for each count that could not be made.
    """
    missing = [] if missing is None else missing
    params = sum(p.numel() for p in model.parameters())
    try:
        macs = total_macs(model, input_shape)
    except Exception as error:  # whatever the counter or the user's model raises inside of it
        missing.append(f"its multiply-accumulates and published FLOPs cannot be counted ({brief(error)})")
        return Cost(params, None, None)  # never published FLOPs alone: they are far fewer than are computed
    try:
        return Cost(params, published_flops(model, input_shape), macs)
    except Exception as error:  # torch.jit.trace raises many kinds
        missing.append(f"its published FLOPs cannot be counted: torch.jit cannot trace it ({brief(error)})")
        return Cost(params, None, macs)


def published_flops(model: nn.Module, input_shape: InputShape) -> int:
    """`Cost.flops_published` of one image."""
    from fvcore.nn.flop_count import FlopCountAnalysis  # half a second, which counting all operations does not need

    logging.getLogger("fvcore.nn.jit_handles").setLevel(logging.ERROR)
    replaced = with_mixers(model, "visible", lambda mixer, tokens: mixer.visible(tokens))
    analysis = FlopCountAnalysis(replaced, torch.zeros(1, *input_shape))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return int(analysis.total())


def total_macs(model: nn.Module, input_shape: InputShape) -> int:
    """`Cost.macs_total` of one image."""
    calls: list[tuple[Any, int]] = []

    def note(mixer: Any, tokens: Tensor) -> Tensor:
        calls.append((mixer, tokens.shape[1]))
        return tokens

    replaced = with_mixers(model, "macs", note)
    with torch.no_grad(), _without_dynamo(), FlopCounterMode(display=False) as counter:
        replaced(torch.zeros(1, *input_shape))
    visible = int(counter.get_total_flops()) // 2  # it counts a multiply-accumulate as two
    # not while the counter would count them too
    return visible + sum(int(mixer.macs(length)) for mixer, length in calls)


@contextmanager
def _without_dynamo() -> Iterator[None]:
    """Within the block the counter does not import torch._dynamo, which takes a second, to be left out of its graphs.

    Nothing is compiled while it counts. Where another version of torch does this in another way, it takes that second.
    """
    dispatch: Any = getattr(_FlopCounterMode.__torch_dispatch__, "__wrapped__", None)
    if dispatch is None or "torch._dynamo" in sys.modules:
        yield
        return
    dispatch.__dynamo_disable = dispatch  # what torch's wrapper calls, once it has found it
    try:
        yield
    finally:
        del dispatch.__dynamo_disable


def with_mixers(model: nn.Module, method: str, call: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A copy of `model` where `call`, of mixer and tokens, stands for the mixers that have the method.

    The counters then need not trace a loop over time. See `pkd_lightning.models.mixers` for the methods.
    """
    replaced = copy.deepcopy(model).cpu().eval()
    for module in replaced.modules():
        if callable(getattr(module, method, None)):
            module.forward = partial(call, module)
    return LogitsAlone(replaced)


class LogitsAlone(nn.Module):
    """A model whose `Output`, which tracers do not know, is given as its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The logits of images."""
        return output_of(self.model(images)).logits


@dataclass(frozen=True)
class Latency:
    """Time that one image takes.

    Attributes:
        latency_ms: the least CPU time of the calling thread in milliseconds, over all calls.
        latency_disturbed: half of the calls took over `UNEVEN` times as long, or all together took over `WAITED` times
            their CPU time: other work wanted the core, its caches or its clock, and the time may be too high.
    """

    latency_ms: float
    latency_disturbed: bool


UNEVEN, WAITED = 1.25, 1.1


@torch.inference_mode()
def latency(forward: Callable[[Tensor], object], image: Tensor, repeats: int = 30, seconds: float = 0.5) -> Latency:
    """Time of `forward` on one image (1, C, H, W), on one CPU thread, measured so that a neighbour's load hardly shows.

    CPU time does not run while another process has the core, and the least of many calls is the one that was disturbed
    least. A disturbed measurement is made again, at most twice.

    Args:
        forward: the model.
        image: its input.
        repeats: most timed calls of one measurement, after one for warming up.
        seconds: of CPU time, after which no further call of a measurement starts; but at least three are made.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    least, disturbed = math.inf, True
    try:
        forward(image)
        for _ in range(3):
            times: list[float] = []
            begin = time.perf_counter()
            while len(times) < 3 or (len(times) < repeats and sum(times) < seconds):
                start = time.thread_time()
                forward(image)
                times.append(time.thread_time() - start)
            least, wall = min(least, *times), time.perf_counter() - begin
            disturbed = statistics.median(times) > UNEVEN * least or wall > WAITED * sum(times)
            if not disturbed:
                break
    finally:
        torch.set_num_threads(threads)
    return Latency(1000 * least, disturbed)
