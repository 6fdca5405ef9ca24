"""Students for inference: their weights packed for a kernel that computes one, or several, from image to logits."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pkd_lightning.kernels import inference as k
from pkd_lightning.kernels.inference_batch import infer_batch
from pkd_lightning.kernels.lanes import WIDTH
from pkd_lightning.kernels.threads import share, threads_for
from pkd_lightning.models.blocks import Raster
from pkd_lightning.models.building import InputShape
from pkd_lightning.models.classifier import MambaClassifier, as_image
from pkd_lightning.packing import Weights, batch_plan_of, plan_of
from pkd_lightning.prefixes import Scales

logger = logging.getLogger(__name__)

FILLED = 10  # images from which on a group of 16, a lane each, takes less time than each image by itself


class CompiledStudent(nn.Module):
    """A `MambaClassifier` with Mamba mixers as one kernel, on the CPU in float32; its weights are a copy.

    Args:
        student: the model, as it is now: what changes in it later is not seen.
        input_shape: of one of its inputs.

    Raises:
        ValueError: where there is no kernel for it, saying why.
    """

    def __init__(self, student: nn.Module, input_shape: InputShape) -> None:
        super().__init__()
        weights = Weights(WIDTH)
        plan, room = plan_of(student, as_image(input_shape), weights)
        assert isinstance(student, MambaClassifier)
        self.plan, self.weights = torch.tensor(plan), weights.packed()
        weights = Weights(1)
        plan, more = batch_plan_of(student, as_image(input_shape), weights)
        self.batch_plan, self.batch_weights = torch.tensor(plan), weights.packed()
        self.room = max(room, more)
        self.scales = torch.tensor([0.0, 1.0])  # of a student by itself
        self.input_shape = tuple(input_shape)
        self.classes = student.head.out_features
        self._build()
        self.updates = sum(_updates(raster) for raster in student.rasters())

    def _build(self) -> None:
        self._table = torch.tensor(self.addresses(self.scales))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._build()  # a copy lies elsewhere in memory

    def addresses(self, scales: Tensor) -> list[int]:
        """A row of the kernel's table."""
        return [x.data_ptr() for x in (self.plan, self.weights, scales, self.batch_plan, self.batch_weights)]

    def forward(self, images: Tensor) -> Tensor:
        """Map preprocessed images (batch, C, H, W), or signals, to logits (batch, classes)."""
        return _run([self], self._table, images)


def _updates(raster: Raster) -> int:
    """How many states the scans of the blocks of a raster update for one image."""
    blocks: list[Any] = list(raster.blocks)
    states: int = sum(blocks[i].mixer.A_log.numel() for i, *_ in raster.calls())
    return math.prod(raster.grid) * states


class CompiledPrefixes:
    """The first students of an ensemble, all compiled, in one call.

    Args:
        students: the students.
        scales: (a_t, c_t) of each.
    """

    def __init__(self, students: Sequence[CompiledStudent], scales: Sequence[Scales]) -> None:
        self.students = list(students)
        self.scales = torch.tensor([list(pair) for pair in scales])
        self._build()

    def _build(self) -> None:
        rows = zip(self.students, self.scales, strict=True)
        self._table = torch.tensor([row for student, scales in rows for row in student.addresses(scales)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._build()  # a copy lies elsewhere in memory

    def __len__(self) -> int:
        return len(self.students)

    def __call__(self, images: Tensor, count: int) -> Tensor:
        """Logits of the prefix of the first `count` students on preprocessed images (batch, *input_shape)."""
        return _run(self.students[:count], self._table, images)


def compile_students(members: Sequence[nn.Module], input_shape: InputShape) -> list[nn.Module]:
    """Each student compiled; where there is no kernel for one, itself, and the log says why.

    A kernel gives logits alone, so that the students whose modules a later one reads stay as they are.
    """
    last = max((t for t, member in enumerate(members) if getattr(member, "reads", None)), default=0)
    if last:
        logger.info("students 1 to %d are not compiled: student %d reads what their modules give", last, last + 1)
    compiled: list[nn.Module] = list(members[:last])
    for t, member in enumerate(members[last:], last):
        try:
            compiled.append(member if isinstance(member, CompiledStudent) else CompiledStudent(member, input_shape))
        except ValueError as error:
            logger.info("student %d is not compiled: %s", t + 1, error)
            compiled.append(member)
    return compiled


_rooms: list[Tensor] = []  # working memory, used again: each call takes one a thread, and gives it back


def _run(students: Sequence[CompiledStudent], table: Tensor, images: Tensor) -> Tensor:
    """The logits of `students`, the first of the table, on images."""
    shape, classes = students[0].input_shape, students[0].classes
    if images.device.type != "cpu" or not images.is_floating_point() or images.shape[1:] != shape:
        given = f"{images.dtype} {tuple(images.shape)} on {images.device}"
        raise ValueError(f"a compiled ensemble reads preprocessed images (batch, {', '.join(map(str, shape))}) of"
                         f" floating point on the CPU, not {given}")  # fmt: skip
    images = images.detach().to(torch.float32).contiguous()
    logits = torch.empty(len(images), classes, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
    memory = (table.data_ptr(), images.data_ptr(), logits.data_ptr(), math.prod(shape), classes)
    room = max(student.room for student in students) + classes * WIDTH
    count, updates = len(images), sum(student.updates for student in students)
    groups = count // WIDTH + (count % WIDTH >= FILLED)
    grouped = min(count, groups * WIDTH)
    alive = (students, table, images, logits)  # threads hold on to what they read and write

    def by_groups(thread: int, first: int, last: int, _alive: object = alive) -> None:
        with _space(room) as address:
            infer_batch((*memory, count), len(students), first, last, address)

    def by_images(thread: int, first: int, last: int, _alive: object = alive) -> None:
        with _space(room) as address:
            k.infer(memory, len(students), grouped + first, grouped + last, address)

    if groups:
        share(by_groups, groups, threads_for(groups, grouped * updates))
    if grouped < count:
        share(by_images, count - grouped, threads_for(count - grouped, (count - grouped) * updates))
    return logits


@contextmanager
def _space(room: int) -> Iterator[int]:
    """The address of so many floats of working memory."""
    try:
        space = _rooms.pop()
    except IndexError:
        space = torch.empty(0)
    if space.numel() < room:
        space = torch.empty(room, dtype=torch.float32, device="cpu")
    yield space.data_ptr()
    _rooms.append(space)
