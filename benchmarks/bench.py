"""Times the scan, a training step and the data path on this machine: `make bench`.

The two things compared in a row are timed in turn, round by round, in one process, so that other load on the machine
meets both. Reported is the median over the rounds and, as the spread, the interquartile range in percent of it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from pkd_lightning.config import build
from pkd_lightning.data.images import ImageSet
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.evaluate import hardware, versions
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.scan import selective_scan

# (length, d_inner, d_state), batch 32: the scans of paper_mnist's students 1, 3 and 7, and of patch models
SCANS = {"a": (49, 2, 16), "b": (196, 2, 64), "c": (784, 2, 58), "e": (64, 192, 16)}
STUDENTS = {
    "S1": {"n_blocks": 1, "d_state": 16, "seq_len": 49},
    "S3": {"n_blocks": 1, "d_state": 64, "seq_len": 196},
    "S5": {"n_blocks": 7, "d_state": 32, "seq_len": 196},
    "S7": {"n_blocks": 14, "d_state": 32, "seq_len": 784},
}
BATCH = 32


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def summary(times: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(times, n=4)
    median = statistics.median(times)
    return {"median_ms": median, "spread_percent": 100 * (quartiles[2] - quartiles[0]) / median}


def scan_call(backend: str, length: int, channels: int, states: int, backward: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    u, delta, z = (torch.randn(BATCH, channels, length).requires_grad_(backward) for _ in range(3))
    B, C = (torch.randn(BATCH, length, states).transpose(1, 2).requires_grad_(backward) for _ in range(2))
    A = (-torch.rand(channels, states) - 0.5).requires_grad_(backward)
    D, bias = torch.ones(channels), torch.zeros(channels)

    def call() -> None:
        y = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, backend=backend)
        if backward:
            y.sum().backward()

    return call


def scans(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, (length, channels, states) in SCANS.items():
        for backward in (False, True):
            calls = {
                backend: scan_call(backend, length, channels, states, backward) for backend in ("cpu", "reference")
            }
            times = interleaved(calls, rounds)
            cpu, reference = summary(times["cpu"]), summary(times["reference"])
            rows.append(
                {
                    "what": f"scan {name} ({length}, {channels}, {states}) forward{'+backward' if backward else ''}",
                    **cpu,
                    "against": "plain loop",
                    "ratio": reference["median_ms"] / cpu["median_ms"],
                }
            )
    return rows


def steps(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, options in STUDENTS.items():
        torch.manual_seed(0)
        model = MambaClassifier((1, 28, 28), 10, d_state_step=2, **options)
        optimizer = torch.optim.AdamW(model.parameters())
        images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))

        def step(model: MambaClassifier = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()  # noqa: B023
            optimizer.step()

        row = summary(interleaved({name: step}, rounds)[name])
        seconds = row["median_ms"] * 49_000 / BATCH / 1000
        rows.append({"what": f"training step {name}, batch {BATCH} ({seconds:.0f} s per 49,000 images)", **row})
    return rows


def random_images(root: object = None) -> ImageSet:
    images = torch.randint(0, 256, (70_000, 1, 28, 28), dtype=torch.uint8)
    return ImageSet("random", images, torch.randint(0, 10, (70_000,)), 10, 60_000)


def data_path(rounds: int) -> list[dict[str, Any]]:
    data = DataModule(build(DataConfig, {"source": random_images}))
    rows = []
    for batch_size in (32, 512):
        loader = data.training_loader(batch_size, 0, "bench")

        def epoch(loader: Any = loader) -> None:
            for _ in loader:
                pass

        row = summary(interleaved({"epoch": epoch}, min(rounds, 5))["epoch"])
        rate = data.sizes[0] / row["median_ms"] * 1000
        rows.append({"what": f"MNIST-sized epoch of batches of {batch_size} ({rate:,.0f} images a second)", **row})
    return rows


def main() -> None:
    """Run all, print a table, write benchmarks/results/cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each row")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(options.threads)
    rows = scans(options.rounds) + steps(options.rounds) + data_path(options.rounds)
    table = Table("what", "median ms", "spread %", "times faster than", box=None)
    for row in rows:
        ratio = f"{row['ratio']:.1f} x {row['against']}" if "ratio" in row else ""
        table.add_row(row["what"], f"{row['median_ms']:.3g}", f"{row['spread_percent']:.0f}", ratio)
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"hardware": hardware(), "versions": versions(), "rounds": options.rounds, "rows": rows}
    options.out.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
