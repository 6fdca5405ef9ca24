"""What a run takes at sizes nobody has on a laptop: `python -m benchmarks.scaling [--write]`.

Measures on this machine, with one thread, what a round does for each sample and class, and what processes take to tell
each other something; then multiplies. `--write` puts the tables into docs/scaling.md.
"""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from pkd_lightning import ranks
from pkd_lightning.boosting.residuals import ResidualMatrices
from pkd_lightning.checkpoint import content_hash
from pkd_lightning.matrix import Difference, quantile

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
SLOT = re.compile(r"(<!-- scaling: (\w+) -->\n).*?(<!-- end of scaling -->)", re.DOTALL)
SAMPLES, CLASSES = 50_000, 1000  # measured
# bytes for each sample and class: S, F and f, the teacher's logits, the one of S and F that is being made, the signs
KEPT = {"S": 4, "F": 4, "f": 4, "g": 4, "the next of S or F": 4, "signs": 1}
STORED = 8  # of these in a checkpoint: S and F
SIZES = {  # N, L, side of an RGB image, processes, parameters of a student
    "ImageNet-1k, 8 processes": (1_281_167, 1000, 224, 8, 5_000_000),
    "ImageNet-1k, 64 processes": (1_281_167, 1000, 224, 64, 5_000_000),
    "10^9 samples, 64 processes": (10**9, 1000, 224, 64, 25_000_000),
}


def seconds(call: Callable[[], object], times: int = 5) -> float:
    """Median time of a call, after one that is not counted."""
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def of_a_round() -> dict[str, float]:
    """Nanoseconds for each sample and class of what a round does once, or a candidate."""
    elements = SAMPLES * CLASSES
    student, teacher = (torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    residual, matrices = Difference(student, teacher), ResidualMatrices(SAMPLES, CLASSES)
    matrices.update(residual, 0.01)
    return {
        "update of K+ and K-": 1e9 * seconds(lambda: matrices.update(residual, 0.0)) / elements,
        "edges of a candidate": 1e9 * seconds(lambda: matrices.edges(residual)) / elements,
        "signs": 1e9 * seconds(matrices.indicator) / elements,
        "B, a quantile": 1e9 * seconds(lambda: quantile(residual, 0.999)) / elements,
        "hash of the checkpoint": 1e9 * seconds(lambda: content_hash({"S": student})) / elements,
    }


def of_an_epoch() -> float:
    """Nanoseconds for each sample of an epoch's order."""
    return 1e9 * seconds(lambda: torch.randperm(10_000_000)) / 10_000_000


def _talk(rank: int, file: str, found: "mp.Queue[dict[str, float]]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    ranks.join(dist.group.WORLD, rank, 2)
    edges = torch.zeros(CLASSES, dtype=torch.float64)
    gradient = torch.zeros(1_000_000)
    measured = {
        "whether to save or stop, after each step": 1e3 * seconds(lambda: ranks.either(False, 0), 50),
        f"a sum of {CLASSES:,} numbers, for edges and normalisers": 1e3 * seconds(lambda: ranks.total(edges), 50),
        "gradients, for each million of parameters": 1e3 * seconds(lambda: dist.all_reduce(gradient), 20),
    }
    if rank == 0:
        found.put(measured)
    dist.barrier()
    dist.destroy_process_group()


def between_processes() -> dict[str, float]:
    """Milliseconds that two processes of this machine take, by gloo."""
    context = mp.get_context("spawn")
    found: mp.Queue[dict[str, float]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        both = [context.Process(target=_talk, args=(rank, f"{folder}/meeting", found)) for rank in (0, 1)]
        for process in both:
            process.start()
        measured = found.get(timeout=120)
        for process in both:
            process.join()
    return measured


def size_of(count: float) -> str:
    """Bytes in words: `3.4 GB`."""
    for unit, worth in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= worth:
            return f"{count / worth:,.3g} {unit}"
    return f"{count / 1e3:,.3g} kB"


def time_of(value: float) -> str:
    """Seconds in words."""
    for unit, worth in (("h", 3600.0), ("min", 60.0)):
        if value >= 2 * worth:
            return f"{value / worth:,.3g} {unit}"
    return f"{value:,.2g} s"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def tables() -> dict[str, str]:
    """The tables of the page, by name."""
    per_element, per_sample, talk = of_a_round(), of_an_epoch(), between_processes()
    measured = [[what, f"{value:.2f} ns a sample and class"] for what, value in per_element.items()]
    measured += [["order of an epoch", f"{per_sample:.1f} ns a sample"]]
    measured += [[what, f"{value:.2g} ms"] for what, value in talk.items()]
    once = sum(per_element.values())
    rows: dict[str, list[str]] = {
        "matrices in all": [], "matrices a process": [], "images in all, uint8": [], "images a process": [],
        "order of an epoch, a process": [], "checkpoint of a round, in all": [], "gradients, a step and process": [],
        "edges and normalisers, a check and process": [], "a round's passes, a process": [],
        "drawing an epoch's order, a process": [],
    }  # fmt: skip
    kept = sum(KEPT.values())
    for n, classes, side, processes, parameters in SIZES.values():
        cells = [
            size_of(kept * n * classes), size_of(kept * n * classes / processes), size_of(3 * side**2 * n),
            size_of(3 * side**2 * n / processes), size_of(8 * n), size_of(STORED * n * classes),
            size_of(2 * 4 * parameters), size_of(2 * 8 * classes * processes),
            time_of(once * n * classes / processes / 1e9), time_of(per_sample * n / 1e9),
        ]  # fmt: skip
        for row, cell in zip(rows.values(), cells, strict=True):
            row.append(cell)
    return {
        "measured": markdown(["measured here, one thread", "takes"], measured),
        "sizes": markdown(["", *SIZES], [[name, *cells] for name, cells in rows.items()]),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = tables()
    print(*found.values(), sep="\n")
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(SLOT.sub(lambda slot: slot[1] + found[slot[2]] + slot[3], text), encoding="utf-8")


if __name__ == "__main__":
    main()
