"""The loop's matrices in the checkpoint of a run of several ranks: each rank writes its rows, and reads those it needs.

They are read by any number of ranks, and those of one by several: which rows a rank owns depends on their number.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkd_lightning import ranks
from pkd_lightning.boosting.state import BoostingState
from pkd_lightning.checkpoint import atomic_write, content_hash, load_tensors
from pkd_lightning.errors import RunError
from pkd_lightning.matrix import SampleMatrix

PARTS = "parts"  # in the run directory, and the key in its checkpoint


def write_parts(state: BoostingState, sizes: tuple[int, int], directory: Path) -> list[dict[str, Any]]:
    """Write this rank's rows into a file of its own.

    Args:
        state: of this rank.
        sizes: number of training and of validation rows of all ranks.
        directory: of the run.

    Returns:
        What the checkpoint says of all files: their names, hashes and rows.
    """
    from safetensors.torch import save

    n = len(ranks.own(sizes[0]))
    tensors = {"ensemble": state.ensemble_logits[:n], "validation_ensemble": state.ensemble_logits[n:]}
    for name, matrices in (("S", state.residuals), ("validation_S", state.validation_residuals)):
        if matrices is not None:
            tensors[name] = matrices.S
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    path = directory / PARTS / f"round-{state.round:02d}-{ranks.rank()}of{ranks.size()}.safetensors"
    hash_ = content_hash(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: temporary.write_bytes(save(tensors)))
    rows = [[own.start, own.stop] for own in map(ranks.own, sizes)]
    return ranks.gathered({"file": path.name, "hash": hash_, "rows": rows})


def remove_parts(directory: Path, but: list[dict[str, Any]]) -> None:
    """Remove the files of earlier checkpoints, and of stopped processes."""
    kept = {part["file"] for part in but}
    for path in (directory / PARTS).glob("*"):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    if not kept and (directory / PARTS).is_dir():
        (directory / PARTS).rmdir()


def own_matrices(
    state: Mapping[str, Any], sizes: tuple[int, int], classes: int, directory: Path, residuals: bool = True
) -> dict[str, Tensor]:
    """The rows of this rank of the matrices in a checkpoint that several ranks have written, or one.

    Args:
        state: what the checkpoint holds.
        sizes: number of training and of validation rows of all ranks.
        classes: L.
        directory: of the run.
        residuals: whether there are residual matrices, which are of a teacher.

    Raises:
        RunError: where a file is missing or damaged.
        ValueError: where a matrix has not the shape that the data needs.
    """
    n, m = sizes
    read = _from_parts(state[PARTS], directory) if PARTS in state else _from_whole(state, n, m, classes, directory)
    training, validation = ranks.own(n), ranks.own(m)
    of_teacher = {"S": read("S", training), "validation_S": read("validation_S", validation)} if residuals else {}
    return {
        **of_teacher,
        "ensemble_logits": torch.cat([read("ensemble", training), read("validation_ensemble", validation)]),
    }


Read = Callable[[str, range], Tensor]


def _from_parts(parts: list[dict[str, Any]], directory: Path) -> Read:
    @cache
    def content(file: str, hash_: str) -> dict[str, Tensor]:
        return _whole(directory / PARTS / file, hash_)

    def pieces(name: str, rows: range) -> Iterator[Tensor]:
        for part in parts:
            start, stop = part["rows"][name.startswith("validation")]
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                yield content(part["file"], part["hash"])[name][first - start : last - start]

    def read(name: str, rows: range) -> Tensor:
        found = torch.cat(list(pieces(name, rows)))
        if len(found) != len(rows):
            raise ValueError(f"{name}: {len(found)} of {len(rows)} rows are in the files")
        return found

    return read


def _whole(path: Path, hash_: str) -> dict[str, Tensor]:
    if not path.exists():
        raise RunError(f"{path}: is missing")
    tensors = load_tensors(path)
    if content_hash(tensors) != hash_:
        raise RunError(f"{path}: is damaged, or of another checkpoint")
    return tensors


def _from_whole(state: Mapping[str, Any], n: int, m: int, classes: int, directory: Path) -> Read:
    names = {
        "S": (n, "residuals"),
        "validation_S": (m, "validation_residuals"),
        "ensemble_logits": (n + m, "ensemble_logits"),
    }

    @cache
    def whole(name: str) -> Tensor:
        samples, file = names[name]
        matrix = SampleMatrix(samples, classes, directory / file)
        matrix.load(state[name])
        return matrix.values

    def read(name: str, rows: range) -> Tensor:
        before = n if name == "validation_ensemble" else 0
        values = whole("ensemble_logits" if "ensemble" in name else name)
        return values[before + rows.start : before + rows.stop].clone()

    return read
