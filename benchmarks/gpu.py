"""Times the scan and training steps on a CUDA device: our choice of backend, mamba_ssm's scan called directly, and the
reference: `make bench-gpu`.

As on the CPU (see `benchmarks.timing`), but by CUDA events.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import CIFAR, PATCHES, STUDENTS, batch, classifier, shape_of, size_of
from benchmarks.report import show, write
from benchmarks.scan import WORKLOADS, inputs, reference, scan_call
from benchmarks.timing import FEWEST, Row, compared, measured
from pkd_lightning.graphs import Graphs
from pkd_lightning.kernels.scan import cuda, selective_scan

SCANS = {name: WORKLOADS[name] for name in "cdef"} | {"g": (256, 1536, 16)}
MODELS = {"S7": STUDENTS["S7"], "patches, d_model 64": PATCHES["patches, d_model 64"], **CIFAR}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPEATS = 5  # of a call in one timing


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after a warm-up; of those under the key `reference` in two rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            slow = name == "reference"
            if slow and round_ > FEWEST:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            repeats = 1 if slow else REPEATS
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            torch.cuda.synchronize()
            if round_:
                times[name].append(start.elapsed_time(end) / repeats)
    return times


def ours(*tensors: Tensor) -> Tensor:
    """The scan on the backend that it chooses by itself."""
    y = selective_scan(*tensors, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y


def mamba_ssm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """mamba_ssm's own function, called directly."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y: Tensor = selective_scan_fn(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True)
    return y


def scans(rounds: int, direct: bool) -> list[Row]:
    """Of each workload; `direct`: mamba_ssm can be called."""
    result = []
    for workload, sizes in SCANS.items():
        for dtype_name, dtype in DTYPES.items():
            u, delta, A, B, C, D, z, bias = (x.cuda() for x in inputs(*sizes))
            u, delta, B, C, z = (x.to(dtype) for x in (u, delta, B, C, z))  # the parameters stay in float32
            tensors = (u, delta, A, B, C, D, z, bias)
            for backward in (False, True):
                what = f"scan {workload} {sizes} {dtype_name} forward{'+backward' if backward else ''}"
                scans_ = {"reference": reference, "ours": ours} | ({"mamba_ssm": mamba_ssm} if direct else {})
                calls = {name: scan_call(scan, tensors, backward) for name, scan in scans_.items()}
                times = interleaved(calls, rounds)
                if direct:
                    result.append(compared(what, times, "ours", "mamba_ssm", cost=True))
                result.append(compared(what, times, "ours", "reference"))
    return result


def steps(rounds: int, direct: bool) -> list[Row]:
    """A bare loop's training step, its kernels started singly and as CUDA graphs.

    On the backend that is chosen: mamba_ssm's with `direct`, else associative.
    """
    backend, result = "cuda" if direct else "associative", []
    for name, options in MODELS.items():
        shape, size = shape_of(name), size_of(name)
        images, labels = (x.cuda() for x in batch(size, shape))
        for dtype_name, dtype in DTYPES.items():
            calls: dict[str, Callable[[], object]] = {}
            for way in (backend, "graphs"):
                model = classifier(options, shape).cuda()
                called = Graphs(model) if way == "graphs" else model
                optimizer = torch.optim.AdamW(model.parameters(), fused=True)
                calls[way] = partial(step, called, optimizer, images, labels, dtype)
            times = interleaved(calls, rounds)
            what = f"training step of {name} {dtype_name}"
            for way, taken in times.items():
                rate = size / statistics.median(taken) * 1000
                result.append(measured(f"{what}, {way}", taken, rate, "images a second"))
            result.append(compared(f"{what}, graphs", times, "graphs", backend))
    return result


def step(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
) -> None:
    """One training step, under autocast unless `dtype` is float32."""
    optimizer.zero_grad()
    with nullcontext() if dtype == torch.float32 else torch.autocast("cuda", dtype):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()


def main(arguments: list[str] | None = None) -> None:
    """Print tables, write benchmarks/results/gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; two of the reference")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("bench-gpu needs a CUDA device, torch sees none; `make bench` measures the CPU")
    if options.rounds < FEWEST:
        parser.error(f"--rounds must be at least {FEWEST}")
    direct = cuda.available()
    if not direct:
        print(f"mamba_ssm cannot be used (install: {cuda.INSTALL}): ours is plain PyTorch (associative)")
    rows = []
    for name, found in (("scan", scans(options.rounds, direct)), ("step", steps(options.rounds, direct))):
        show(name, found)
        rows += [{"section": name, **row} for row in found]
    write(options.out, rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
