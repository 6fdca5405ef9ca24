"""Inputs that an exported file is checked on: real ones where they lie at hand, nothing is downloaded for them."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError  # type: ignore[import-untyped]

from pkd_lightning import pretrained
from pkd_lightning.data.cifar import load_cifar10
from pkd_lightning.data.digits import load_digits
from pkd_lightning.data.fetch import local_directories
from pkd_lightning.data.idx import load_mnist
from pkd_lightning.errors import DataError
from pkd_lightning.tasks import SignalClassification, Task

logger = logging.getLogger(__name__)
CHECKED = 16  # inputs
Load = Callable[[Path | str | None], Any]
FETCHED: dict[str, Load] = {"mnist": load_mnist, "cifar10": load_cifar10}


def dtype_of(task: Task) -> torch.dtype:
    """Of raw inputs: signals are float32, images uint8."""
    return torch.float32 if isinstance(task, SignalClassification) else torch.uint8


def inputs_to_check(task: Task, run: Path | None, images: Path | None) -> Tensor:
    """Raw inputs (N, *input_shape) to check an exported file on.

    Args:
        task: of the ensemble.
        run: the run, whose own data is taken where it is at hand; else inputs are drawn at random.
        images: a .npy file of inputs to take instead.

    Raises:
        DataError: where the file `images` cannot be read, or does not hold such inputs.
    """
    if images is not None:
        return _from_file(task, images)
    found = None if run is None else _of_run(run, tuple(task.input_shape))
    if found is not None and found.dtype == dtype_of(task):
        return found[torch.linspace(0, len(found) - 1, min(CHECKED, len(found))).long()].contiguous()
    logger.warning("checked on random inputs: the run's own data is not at hand (--images FILE.npy names others)")
    generator = torch.Generator().manual_seed(0)
    shape = (CHECKED, *task.input_shape)
    if dtype_of(task) == torch.float32:
        return task.mean + task.std * torch.randn(shape, generator=generator)  # type: ignore[attr-defined,no-any-return]
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _from_file(task: Task, path: Path) -> Tensor:
    try:
        values = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as an array of inputs, as numpy.save writes it ({error})") from error
    shape, dtype = tuple(task.input_shape), dtype_of(task)
    if values.dtype != dtype or tuple(values.shape[1:]) != shape or len(values) == 0:
        raise DataError(f"{path}: holds {values.dtype} of shape {tuple(values.shape)}, not {dtype} of (N, *{shape})")
    return values


def _of_run(run: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The test part of a run's data, of `shape` each, where it can be had without a download."""
    for load, root in _places(run):
        try:
            data = load(root)
        except DataError:
            continue
        inputs: Tensor = getattr(data, data.field)
        if tuple(inputs.shape[1:]) == shape and len(inputs) > data.train_size:
            return inputs[data.train_size :]
    return None


def _places(run: Path) -> Iterator[tuple[Load, Path | None]]:
    """The package's own functions that may load the data of a run, each with where it may lie."""
    if run.parent == pretrained.FOLDER.resolve():
        path, root = None, None
        load = FETCHED.get(run.name)
    else:
        try:
            data = OmegaConf.load(run / "config.yaml").data
            path, root = str(data.source._target_), data.get("root")
        except (OSError, YAMLError, OmegaConfBaseException, AttributeError):
            return
        # a file of the run names it: no other code than this package's is run
        load = get_object(path) if path.startswith("pkd_lightning.data.") else None
    if load is None:
        return
    if root is not None or load is load_digits:
        yield load, None if root is None else Path(root)
    for name in (name for name, one in FETCHED.items() if one is load and root is None):
        for directory in local_directories(name)[0]:
            yield load, directory
