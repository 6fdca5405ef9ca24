"""What a model costs: parameters, FLOPs as the paper counts them, and every multiply-accumulate."""

import copy
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fvcore.nn.flop_count import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pkd_lightning.models.building import ImageShape
from pkd_lightning.models.mamba import Mamba
from pkd_lightning.models.scan import scan_macs

logging.getLogger("fvcore.nn.jit_handles").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Cost:
    """Cost of one image.

    Attributes:
        params: number of parameters.
        flops_published: what fvcore counts where the fused Mamba kernel is opaque to it: of a block only `in_proj`.
            This reproduces the FLOPs of Mamba-PKD's tables (arXiv 2503.01727). They are multiply-accumulates, and far
            fewer than are computed.
        macs_total: all multiply-accumulates of convolutions and matrix products, and of the scan (see `mix_macs`).
    """

    params: int
    flops_published: int
    macs_total: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.params + other.params,
            self.flops_published + other.flops_published,
            self.macs_total + other.macs_total,
        )


def measure(model: nn.Module, image_shape: ImageShape) -> Cost:
    """Count the cost of `model` for one image of `image_shape`."""
    opaque, mixed = with_opaque_mixers(model)
    image = torch.zeros(1, *image_shape)
    analysis = FlopCountAnalysis(opaque, image)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    published = int(analysis.total())
    mixed.clear()  # tracing ran the model too
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        opaque(image)
    visible = counter.get_total_flops() // 2  # it counts a multiply-accumulate as two
    hidden = sum(mix_macs(mixer, length) for mixer, length in mixed)
    return Cost(sum(p.numel() for p in model.parameters()), published, visible + hidden)


def with_opaque_mixers(model: nn.Module) -> tuple[nn.Module, list[tuple[Mamba, int]]]:
    """A copy of `model` whose Mamba blocks compute nothing after `in_proj`, and a list of (block, length) of each call.

    The counters then see what they would see of mamba_ssm's fused kernel, and need not trace a loop over time.
    """
    opaque = copy.deepcopy(model).cpu().eval()
    calls: list[tuple[Mamba, int]] = []

    def make(mixer: Mamba) -> Callable[[Tensor], Tensor]:
        def mix(xz: Tensor) -> Tensor:
            calls.append((mixer, int(xz.shape[1])))
            return xz.narrow(-1, 0, mixer.d_model)

        return mix

    for module in opaque.modules():
        if isinstance(module, Mamba):
            module.fused = False
            setattr(module, "mix", make(module))  # noqa: B010  # mypy rejects assigning a method
    return opaque, calls


def mix_macs(mixer: Mamba, length: int) -> int:
    """Multiply-accumulates of `Mamba.mix` on one sequence of `length` tokens."""
    d_inner, d_state = mixer.d_inner, mixer.d_state
    convolution = d_inner * mixer.d_conv
    x_proj = d_inner * (mixer.dt_rank + 2 * d_state)
    dt_proj = mixer.dt_rank * d_inner
    out_proj = d_inner * mixer.d_model
    return length * (convolution + x_proj + dt_proj + out_proj) + scan_macs(1, length, d_inner, d_state)


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
