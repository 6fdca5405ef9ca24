"""Matrices of one row a sample: in memory, or mapped from files where they are large."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pkd_lightning import ranks
from pkd_lightning.checkpoint import HASH, check_hash, content_hash

CHUNK_BYTES = 2**21  # float32 worked on at a time: temporaries stay in the processor's cache
MAPPED_BYTES = 2**27  # matrices from here on are mapped from files: some six of them exist at once


class Rows(Protocol):
    """An (N, L) matrix read by rows: a tensor, or one computed as it is read."""

    @property
    def shape(self) -> torch.Size:
        """(N, L)."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """The rows of a slice: (rows, L)."""


@dataclass(frozen=True)
class Difference:
    """student - teacher, each (N, L), computed when rows of it are read, and clipped to [-bound, bound].

    What is not finite is not hidden by the clipping: it becomes NaN.
    """

    student: Tensor
    teacher: Tensor
    bound: float = math.inf

    @property
    def shape(self) -> torch.Size:
        """(N, L)."""
        return self.student.shape

    def __getitem__(self, rows: slice, /) -> Tensor:
        difference = self.student[rows] - self.teacher[rows]
        if self.bound == math.inf:
            return difference
        return difference.clamp(-self.bound, self.bound) + 0 * difference  # 0 * infinity is NaN


def chunks(shape: torch.Size) -> Iterator[slice]:
    """Slices of the rows of an (N, L) matrix, each of about `CHUNK_BYTES` and, but the last, of 16, 32, ... rows."""
    samples, columns = shape
    step = max(16, CHUNK_BYTES // (4 * max(1, columns)) // 16 * 16)  # so that each begins at a multiple of 64 bytes
    return (slice(start, min(start + step, samples)) for start in range(0, samples, step))


def largest(matrix: Rows) -> float:
    """The largest abs() of a matrix, of the rows of all ranks: NaN where there is a NaN, 0 where it is empty."""
    parts = [matrix[rows].abs().max() for rows in chunks(matrix.shape)]
    return ranks.highest(float(torch.stack(parts).max()) if parts else 0.0)


def quantile(matrix: Rows, q: float) -> float:
    """The `q` quantile of abs() of a matrix, 0 < q <= 1: of its n values in order the one of rank floor(q * (n - 1)).

    So q = 1 gives the `largest`. Any other q gives a value that the largest one has no part in, however large it is;
    interpolated between two ranks it could have. Exact at any size without a copy of the matrix: float32 of one sign
    are in the order of their bits, of which one pass finds the upper 16 and a second the lower 16. The rows of all
    ranks count.
    """
    values = int(ranks.total(torch.tensor(matrix.shape.numel())))
    if q == 1 or values == 0:
        return largest(matrix)

    def at(rank: int, digits: Callable[[Tensor], Tensor]) -> tuple[int, int]:
        """The digit of that rank among the `digits` of all bits, and its rank among those equal to it."""
        counts = torch.zeros(2**16, dtype=torch.int64)
        for rows in chunks(matrix.shape):
            bits = matrix[rows].float().abs().contiguous().view(-1).view(torch.int32)
            counts += torch.bincount(digits(bits), minlength=2**16)
        counts = ranks.total(counts)
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, rank, right=True))
        return digit, rank - int(up_to[digit] - counts[digit])

    upper, rank = at(math.floor(q * (values - 1)), lambda bits: bits >> 16)
    lower, _ = at(rank, lambda bits: bits[bits >> 16 == upper] & 0xFFFF)
    return float(torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32))


def scratch(samples: int, columns: int, directory: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised matrix for the time being. A large one is in a file of `directory` that has no name any more.

    So its disk space is free again when the tensor is gone, or the process.
    """
    if not is_mapped(samples, columns):
        return torch.empty(samples, columns, dtype=dtype, device="cpu")
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=directory, prefix=".scratch.")
    os.close(handle)
    try:
        return _map(Path(name), samples, columns, dtype)
    finally:
        Path(name).unlink()


def is_mapped(samples: int, columns: int) -> bool:
    """Whether a float32 matrix is large enough to be mapped from a file."""
    return 4 * samples * columns >= MAPPED_BYTES


def _map(path: Path, samples: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    reserve(path, samples * columns * dtype.itemsize)
    mapped = torch.from_file(str(path), shared=True, size=samples * columns, dtype=dtype)
    return mapped.view(samples, columns)


def reserve(path: Path, size: int) -> None:
    """Make a file `size` bytes long, all of them with room on the disk; what it holds up to there stays.

    A full disk is an error here. Written to by way of a map of a file with holes, it would end the process (SIGBUS).
    """
    with path.open("ab") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


class SampleMatrix:
    """An (N, L) float32 matrix that starts as zeros and is only ever replaced as a whole.

    A large one is in one of two files that take turns: the next matrix is written to the other one. With a checkpoint
    after every replacement, the file that the last checkpoint names is whole, whenever the process is killed.

    Args:
        samples: N.
        columns: L.
        path: the files are `path`.0 and `path`.1; None keeps any size in memory.

    Attributes:
        values: (N, L) the matrix; not to be written to.
    """

    def __init__(self, samples: int, columns: int, path: Path | None = None) -> None:
        self.path = path if is_mapped(samples, columns) else None
        # no memory before the first real values
        self.values = torch.zeros(1, 1, dtype=torch.float32, device="cpu").expand(samples, columns)
        self._file = 1
        self._maps: dict[int, Tensor] = {}  # kept: a new map costs a page fault for every 4 kB, half the time of a pass

    def blank(self) -> Tensor:
        """Uninitialised memory of the matrix's shape, to be filled and given to `replace`."""
        samples, columns = self.values.shape
        if self.path is None:
            return torch.empty(samples, columns, dtype=torch.float32, device="cpu")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self._open(1 - self._file)

    def replace(self, values: Tensor) -> None:
        """Make `values`, which came from `blank`, the matrix."""
        self.values, self._file = values, 1 - self._file

    def _open(self, file: int) -> Tensor:
        if file not in self._maps:
            samples, columns = self.values.shape
            self._maps[file] = _map(self._name(file), samples, columns)
        return self._maps[file]

    def _name(self, file: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.{file}")

    def state(self) -> Tensor | dict[str, str]:
        """What a checkpoint stores: the matrix, or the name of its file, which is on the disk then, and its hash."""
        if self.values is not self._maps.get(self._file):  # in memory: small, or the zeros of the start
            return self.values
        name = self._name(self._file)
        with name.open("rb+") as file:
            os.fsync(file.fileno())
        return {"file": name.name, HASH: content_hash({name.name: self.values})}

    def load(self, state: Tensor | dict[str, str] | str) -> None:
        """Restore what `state` gave; of an earlier version, a file's name alone.

        Raises:
            ValueError: where it does not have the matrix's shape, or its file is not there.
            RunError: where its file is damaged.
        """
        samples, columns = self.values.shape
        if isinstance(state, Tensor):
            if state.shape != self.values.shape:
                raise ValueError(f"shape {tuple(state.shape)}, the data needs {(samples, columns)}")
            self.values = state
            return
        stored = {"file": state} if isinstance(state, str) else state
        name = stored["file"]
        if self.path is None or name not in (self._name(0).name, self._name(1).name):
            raise ValueError(f"it is in the file {name!r}, which does not belong to a matrix of this size")
        path = self.path.with_name(name)
        if not path.exists() or path.stat().st_size != 4 * samples * columns:
            raise ValueError(f"{path} is missing or of another size")
        values = self._open(int(name[-1]))
        check_hash(path, {name: values}, stored.get(HASH))
        self._file, self.values = int(name[-1]), values
