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
from pkd_lightning.data.classes import without_empty
from pkd_lightning.data.digits import load_digits
from pkd_lightning.data.fetch import local_directories
from pkd_lightning.data.idx import load_mnist
from pkd_lightning.data.module import DataConfig, load_source, split_rows
from pkd_lightning.errors import ConfigError, DataError
from pkd_lightning.tasks import SignalClassification, Task

logger = logging.getLogger(__name__)
CHECKED = 16  # inputs
VALIDATED = 10_000  # at most
SPLIT = ("split", "test_fraction", "validation_fraction", "split_seed", "limit", "empty_classes")  # of a `DataConfig`
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
    found = _of_run(run, tuple(task.input_shape))
    if found is not None and found.dtype == dtype_of(task):
        return found[torch.linspace(0, len(found) - 1, min(CHECKED, len(found))).long()].contiguous()
    logger.warning("checked on random inputs: the run's own data is not at hand (--images FILE.npy names others)")
    generator = torch.Generator().manual_seed(0)
    shape = (CHECKED, *task.input_shape)
    if dtype_of(task) == torch.float32:
        return task.mean + task.std * torch.randn(shape, generator=generator)  # type: ignore[attr-defined,no-any-return]
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def validation_of(task: Task, source: Path | None) -> tuple[Tensor, Tensor] | None:
    """Raw validation inputs (N, *input_shape) of a run and the right output (N,) of each; None where not at hand.

    Args:
        task: of the ensemble.
        source: the run; None: there is none.
    """
    for config in _data_of(source):
        try:
            data, _ = without_empty(load_source(config), config.empty_classes)
            _, rows, _ = split_rows(data, config)
        except (DataError, ConfigError):
            continue
        inputs = data.inputs
        fits = inputs.dtype == dtype_of(task) and tuple(inputs.shape[1:]) == tuple(task.input_shape)
        if fits and data.num_classes == task.num_classes:
            rows = rows[:VALIDATED]
            return inputs[rows], data.labels[rows]
    return None


def _from_file(task: Task, path: Path) -> Tensor:
    try:
        values = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as an array of inputs, as numpy.save writes it ({error})") from error
    shape, dtype = tuple(task.input_shape), dtype_of(task)
    if values.dtype != dtype or tuple(values.shape[1:]) != shape or len(values) == 0:
        raise DataError(f"{path}: holds {values.dtype} of shape {tuple(values.shape)}, not {dtype} of (N, *{shape})")
    return values


def _of_run(run: Path | None, shape: tuple[int, ...]) -> Tensor | None:
    """The test part of a run's data, of `shape` each, where it can be had without a download."""
    for config in _data_of(run):
        try:
            data = load_source(config)
        except (DataError, ConfigError):
            continue
        if tuple(data.inputs.shape[1:]) == shape and len(data.inputs) > data.train_size:
            return data.inputs[data.train_size :]
    return None


def _data_of(source: Path | None) -> Iterator[DataConfig]:
    """The data of a run, each with a place where it may lie; loaded by the package's own functions, nothing else."""
    split: dict[str, Any] = {}
    if source is None:
        return
    if source.parent == pretrained.FOLDER.resolve():
        root = None
        load = FETCHED.get(source.name)
    else:
        run = source.parent if source.name == "students" else source
        try:
            data = OmegaConf.load(run / "config.yaml").data
            path, root = str(data.source._target_), data.get("root")
            split = {key: data[key] for key in SPLIT if key in data}
        except (OSError, YAMLError, OmegaConfBaseException, AttributeError):
            return
        # a file of the run names it: no other code than this package's is run
        load = get_object(path) if path.startswith("pkd_lightning.data.") else None
    if load is None:
        return
    places = [root] if root is not None or load is load_digits else []
    for name in (name for name, one in FETCHED.items() if one is load and root is None):
        places += map(str, local_directories(name)[0])
    try:
        yield from (DataConfig(load, place, **split) for place in places)
    except ConfigError as error:
        logger.warning("%s: the split of its data cannot be had (%s)", source, error)
