"""The form in which every data source delivers: inputs and labels in memory, and the task they are for."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from operator import index
from typing import ClassVar

import torch
from torch import Tensor

from pkd_lightning.errors import DataError
from pkd_lightning.tasks import Task


class LabelledSet(ABC):
    """A labelled data set in memory. Subclasses are frozen dataclasses of these fields, and of their inputs.

    Attributes:
        task: the class of the task that they are for.
        field: name of the field with the inputs, (N, *input_shape).
        name: short name, used in reports.
        labels: (N,) int64 in [0, num_classes).
        num_classes: number of classes L.
        train_size: the first `train_size` samples are the official training part, the rest the official test part.
        classes: the name of each class, where the set names them.

    Raises:
        DataError: where they are not of their form, naming everything that is wrong.
    """

    task: ClassVar[type[Task]]
    field: ClassVar[str]
    name: str
    labels: Tensor
    num_classes: int
    train_size: int
    classes: tuple[str, ...] | None = None

    @property
    def inputs(self) -> Tensor:
        """(N, *input_shape)."""
        inputs: Tensor = getattr(self, self.field)
        return inputs

    @abstractmethod
    def input_faults(self) -> Iterator[str]:
        """Why the inputs, which are a tensor in memory, are not of their form."""

    def __post_init__(self) -> None:
        faults = [f"name is {self.name!r}, not a word"] if not isinstance(self.name, str) else []
        for key in ("num_classes", "train_size"):
            try:  # NumPy's integers and tensors count, but cannot be written as JSON
                object.__setattr__(self, key, index(getattr(self, key)))
            except (TypeError, ValueError, RuntimeError):
                faults.append(f"{key} is {getattr(self, key)!r}, not a whole number")
        faults += [*_tensor_faults(self.field, self.inputs), *_tensor_faults("labels", self.labels)]
        if not faults:
            faults += [*self.input_faults(), *self._label_faults()]
        if faults:
            raise DataError(f"data set {self.name!r}: {'; '.join(faults)}")

    def _label_faults(self) -> Iterator[str]:
        labels, count = self.labels, len(self.inputs)
        if labels.dtype != torch.int64 or labels.shape != self.inputs.shape[:1]:
            advice = ": give labels.reshape(-1).long()" if labels.numel() == count else ""
            one = f"one per {self.field.removesuffix('s')}"
            yield f"labels are {labels.dtype} of shape {tuple(labels.shape)}, not torch.int64, {one}{advice}"
        elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            yield f"labels go from {labels.min()} to {labels.max()}, not within 0 to {self.num_classes - 1}"
        if self.num_classes < 2:
            yield f"there are {self.num_classes} classes; a classifier needs at least 2"
        if self.classes is not None:
            words = all(isinstance(name, str) and name for name in self.classes)
            if not words or len(set(self.classes)) != self.num_classes or len(self.classes) != self.num_classes:
                yield f"classes are {self.classes!r}, not a name of its own for each of {self.num_classes} classes"
        if not 0 <= self.train_size <= count:
            yield f"train_size={self.train_size} is not within the {count} samples"


def _tensor_faults(key: str, value: object) -> Iterator[str]:
    """Why `value` cannot be looked at as a tensor in the CPU's memory."""
    if not isinstance(value, Tensor):
        yield f"{key} are a {type(value).__name__}, not a tensor: give torch.as_tensor({key})"
    elif value.device.type != "cpu" or value.layout != torch.strided:
        yield f"{key} are a {value.layout} tensor on {value.device}, not a dense one on the CPU"
    elif value.ndim == 0:
        yield f"{key} are a single value"
