"""Times a round's passes over all residuals, from memory-mapped files: `python -m benchmarks.rounds [--full]`.

Each pass is compared with plain reads and writes of the same bytes, timed in turn with it in one process. The memory is
that of a child process that makes the same passes; pages of mapped files do not count, the system takes those back.
"""

import argparse
import multiprocessing
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import conclude, show, write
from benchmarks.timing import Row, at_least, at_most, compared, interleaved, judged
from pkd_lightning import matrix
from pkd_lightning.boosting.residuals import ResidualMatrices
from pkd_lightning.matrix import Difference, chunks, scratch

SAMPLES, CLASSES = 100_000, 1000
FULL = 1_281_167
ROUNDS = 5


def fill(values: Tensor, seed: int, scale: float = 1.0) -> Tensor:
    """Random values of the size of logits: one block, over and over, since drawing them takes longer than all else."""
    block = scale * torch.randn(1000, values.shape[1], generator=torch.Generator().manual_seed(seed))
    for rows in values.split(len(block)):
        rows.copy_(block[: len(rows)])
    return values


@contextmanager
def all_mapped() -> Iterator[None]:
    """Within the block matrices of any size are mapped from files."""
    before, matrix.MAPPED_BYTES = matrix.MAPPED_BYTES, 0
    try:
        yield
    finally:
        matrix.MAPPED_BYTES = before


def make(samples: int, classes: int, directory: Path) -> tuple[ResidualMatrices, Tensor, Tensor]:
    """Residual matrices after one round, and the logits of a student and the teacher, all mapped."""
    with all_mapped():
        student, teacher = (fill(scratch(samples, classes, directory), seed) for seed in (0, 1))
        matrices = ResidualMatrices(samples, classes, directory / "residuals")
    matrices.update(Difference(student, teacher), 0.1)
    return matrices, student, teacher


def signs(matrices: ResidualMatrices) -> None:
    for rows in chunks(matrices.S.shape):
        matrices.indicator(rows)


def passes(
    matrices: ResidualMatrices, student: Tensor, teacher: Tensor
) -> dict[str, tuple[Callable[[], object], str, Callable[[], object]]]:
    """Each pass, and the plain reads and writes it is compared with."""
    add = lambda: matrices.S.add_(student, alpha=0.0)  # noqa: E731
    add_both = lambda: matrices.S.add_(student, alpha=0.0).sub_(teacher, alpha=0.0)  # noqa: E731
    residual = Difference(student, teacher)
    return {
        "update, residual given": (lambda: matrices.update(student, 0.0), "S += residual", add),
        "update, student and teacher given": (
            lambda: matrices.update(residual, 0.0), "S += student, S -= teacher", add_both
        ),
        "edges, residual given": (
            lambda: matrices.edges(student), "S *= 1, residual *= 1", lambda: multiply(matrices.S, student)
        ),
        "edges, student and teacher given": (
            lambda: matrices.edges(residual), "S *= 1, student *= 1, teacher *= 1",
            lambda: multiply(matrices.S, student, teacher),
        ),
        "signs": (lambda: signs(matrices), "S *= 1", lambda: multiply(matrices.S)),
    }  # fmt: skip


def multiply(*values: Tensor) -> None:
    """Read and write each."""
    for value in values:
        value.mul_(1.0)


def rows(rounds: int, samples: int = SAMPLES, classes: int = CLASSES) -> list[Row]:
    """What the table and the JSON show of the passes."""
    result = []
    with tempfile.TemporaryDirectory() as directory:
        for name, (call, against, plain) in passes(*make(samples, classes, Path(directory))).items():
            times = interleaved({"pass": call, against: plain}, min(rounds, ROUNDS))
            what = f"{name} ({samples:,} x {classes:,})"
            result.append(compared(what, times, "pass", against, at_least(0.5)))
    return result


def anonymous_memory() -> int:
    """Bytes of this process that belong to no file (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def _most_memory(connection: Any, samples: int, classes: int, directory: str) -> None:
    calls = [call for call, _, _ in passes(*make(samples, classes, Path(directory))).values()]
    for call in calls:  # what is allocated once, buffers and compiled code, before
        call()
    before = most = anonymous_memory()
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.001):
            most = max(most, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for call in calls:
        call()
    stop.set()
    watcher.join()
    connection.send((before, most))


def memory(samples: int = SAMPLES, classes: int = CLASSES) -> tuple[int, int]:
    """Bytes of anonymous memory of a process before the passes and at most during them."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        process = context.Process(target=_most_memory, args=(theirs, samples, classes, directory))
        process.start()
        theirs.close()
        before, most = ours.recv()
        process.join()
    return before, most


def memory_row(samples: int = SAMPLES, classes: int = CLASSES) -> Row:
    """What the table and the JSON show of the memory."""
    before, most = memory(samples, classes)
    row: Row = {"what": f"memory of a round's passes ({samples:,} x {classes:,})", "bytes": most}
    return judged({**row, "bytes_before": before}, most / 1e9, "GB apart from mapped files", at_most(1))


def main() -> None:
    """Print a table, and with --out write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds of each pass")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--full", action="store_true", help=f"{FULL:,} samples: 20 GB of disk, minutes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    samples = FULL if options.full else options.samples
    found = [*rows(options.rounds, samples, options.classes), memory_row(samples, options.classes)]
    show("rounds", found)
    conclude(found)
    if options.out:
        write(options.out, found)


if __name__ == "__main__":
    main()
