"""Answers of an ensemble's prefixes: how many students an image is given, and what the answer is and has cost."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pkd_lightning.cost import total_macs
from pkd_lightning.earlier import InTurn, following, reads
from pkd_lightning.errors import InputError
from pkd_lightning.inputs import Inputs, read_inputs
from pkd_lightning.models.building import InputShape
from pkd_lightning.prefixes import Scales, mix
from pkd_lightning.tasks import Task

clock = time.perf_counter


@dataclass(frozen=True)
class Limits:
    """How many students to ask: at most one of these is given, and without any all are asked.

    Attributes:
        members: so many, the first.
        confidence: an image is done when the largest softmax probability of its prefix reaches this.
        budget_macs: as many as cost at most so many multiply-accumulates an image.
        budget_ms: no further one when it is expected to end later than so many milliseconds after the call. The first
            is always asked. Expected is what a student took before, see `Pace`.

    Raises:
        InputError: where several are given, or one is impossible.
    """

    members: int | None = None
    confidence: float | None = None
    budget_macs: float | None = None
    budget_ms: float | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} are given; give at most one of them")
        for name in given:
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if name == "members":
                fits, allowed = (
                    isinstance(value, Integral) and number and int(value) >= 1,
                    "a whole number of at least 1",
                )
            elif name == "confidence":
                fits, allowed = number and 0 <= value <= 1, "a probability from 0 to 1"
            else:
                fits, allowed = number and value >= 0, "a number of at least 0"
            if not fits:
                raise InputError(f"{name}={value!r}: must be {allowed}")

    def most(self, macs: Sequence[int] | None, students: int) -> int:
        """The most students that are asked, of so many with such costs (of each one, for one image).

        Raises:
            InputError: where there are not as many, the budget pays for none, or the costs are not known.
        """
        if self.members is not None:
            if self.members > students:
                raise InputError(f"members={self.members}: the ensemble has prefixes of 1 to {students} students")
            return self.members
        if self.budget_macs is None:
            return students
        if macs is None:
            raise InputError(
                f"budget_macs={self.budget_macs:g}: the multiply-accumulates of these students cannot be counted"
            )
        return largest_prefix(macs, self.budget_macs, "budget_macs")


def largest_prefix(costs: Sequence[float], budget: float, name: str = "budget") -> int:
    """The number of students of the largest prefix whose summed `costs` (one a student) stay within `budget`.

    Raises:
        InputError: where not even the first student does, giving the budget this `name`.
    """
    count = sum(total <= budget for total in accumulate(costs))
    if count == 0:
        raise InputError(f"{name}={budget:g}: does not pay for the first student, which costs {costs[0]:,}")
    return count


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer for N images, on the CPU; for one image N is 1.

    Attributes:
        labels: (N,) the label of each, as the data set has it.
        classes: its name, for each, where the data set names its classes; else None.
        probabilities: (N, L), softmax of the logits.
        logits: (N, L), of the last prefix that each was given.
        students: (N,) number of students asked for each.
        macs: (N,) multiply-accumulates spent on each; None where they cannot be counted.
        seconds: from the call until this answer, for all images, with reading and preparing them.
    """

    labels: Tensor
    classes: list[str] | None
    probabilities: Tensor
    logits: Tensor
    students: Tensor
    macs: Tensor | None
    seconds: float

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self) -> list[dict[str, Any]]:
        """For each image what can be printed or sent as JSON: class, label, probability, students and macs.

        `class` is its label where it has no name, `macs` None where they cannot be counted.
        """
        largest, labels, students = self.probabilities.amax(-1).tolist(), self.labels.tolist(), self.students.tolist()
        macs = [None] * len(self) if self.macs is None else self.macs.tolist()
        return [
            {
                "class": str(labels[i]) if self.classes is None else self.classes[i],
                "label": labels[i],
                "probability": largest[i],
                "students": students[i],
                "macs": macs[i],
            }
            for i in range(len(self))
        ]


class Pace:
    """How long each student took, from which follows how long it will take.

    What a student takes is the least time of its calls for as many images, but for the first, in which kernels are
    loaded. That is scaled by how much longer the students before it took in this call than at their best. One of which
    nothing is known yet is expected to take as long, by its multiply-accumulates, as those before it.

    Args:
        macs: multiply-accumulates of each student for one input; None where they cannot be counted.
    """

    def __init__(self, macs: Sequence[int] | None = None) -> None:
        self.macs = macs
        self.least: dict[tuple[int, int], float] = {}  # by (student, number of images)
        self.known: set[tuple[int, int]] = set()  # those that were called more than once

    def note(self, student: int, images: int, seconds: float) -> None:
        """A student's call has taken so many seconds."""
        key = student, images
        if key in self.known:
            self.least[key] = min(self.least[key], seconds)
        elif key in self.least:
            self.known.add(key)
            self.least[key] = seconds  # that of the first call does not count
        else:
            self.least[key] = seconds

    def expected(self, images: int, taken: Sequence[float]) -> float:
        """Seconds that the next student will take for so many images.

        Args:
            images: their number.
            taken: seconds of the students before it in this call; of at least one.
        """
        t = len(taken)
        if (t, images) not in self.known:
            return max(taken) if self.macs is None else sum(taken) / max(1, sum(self.macs[:t])) * self.macs[t]
        known = [(seconds, self.least[i, images]) for i, seconds in enumerate(taken) if (i, images) in self.known]
        slower = statistics.median(seconds / max(least, 1e-9) for seconds, least in known) if known else 1.0
        return self.least[t, images] * max(1.0, slower)


class Prefix(NamedTuple):
    """What the students asked so far give.

    Attributes:
        logits: (batch, L) of each image's last prefix.
        students: (batch,) how many were asked for each.
    """

    logits: Tensor
    students: Tensor


@torch.inference_mode()
def prefixes(
    members: Sequence[nn.Module],
    scales: Sequence[Scales],
    images: Tensor,
    sure: Callable[[Tensor], Tensor] | None = None,
    pace: Pace | None = None,
    end: float = math.inf,
) -> Iterator[Prefix]:
    """Ask students one after another, each only for the images that need it, and give the prefix after each.

    Args:
        members: the students.
        scales: of each.
        images: (batch, *input_shape), preprocessed.
        sure: which images need no further student, (batch,) by the logits (batch, L) of their prefix; None: none.
        pace: how long students take; this call is noted in it.
        end: no student but the first is asked that is expected to go on after this, on `clock`.
    """
    pace = pace or Pace()
    open_rows = torch.arange(len(images), device=images.device)
    used = torch.zeros_like(open_rows)
    logits: Tensor | None = None
    turn, taken = InTurn(members), list[float]()
    for t, pair in enumerate(scales):
        if taken and end < math.inf and clock() + pace.expected(len(images), taken) > end:
            return
        before = clock()
        student = turn.ask(images if len(open_rows) == len(images) else images[open_rows]).logits
        if logits is None:
            logits = mix(None, student, pair)
        else:  # not in place: who has the prefix before keeps it
            logits = logits.index_copy(0, open_rows, mix(logits[open_rows], student, pair))
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        taken.append(clock() - before)
        pace.note(t, len(open_rows), taken[-1])
        used = used.index_fill(0, open_rows, t + 1)
        yield Prefix(logits, used)
        if sure is not None:
            unsure = ~sure(logits[open_rows])
            open_rows = open_rows[unsure]
            turn.keep(unsure)
            if len(open_rows) == 0:
                return


def as_sure_as(confidence: float) -> Callable[[Tensor], Tensor]:
    """Which logits (batch, L) have a largest softmax probability of at least `confidence`: (batch,)."""
    return lambda logits: logits.softmax(-1).amax(-1) >= confidence


def member_macs(members: Sequence[nn.Module], input_shape: InputShape) -> list[int]:
    """Multiply-accumulates of each student for one input, given what earlier ones gave.

    Whatever a counter or a user's model raises inside of it is raised.
    """
    costs: list[int] = []
    for t, member in enumerate(members):
        asked = following(member, list(members)[:t])  # one that reads runs those before it
        costs.append(total_macs(asked, input_shape) - (sum(costs) if reads(member) else 0))
    return costs


class Asked(Protocol):
    """What is known of an ensemble that is asked, see `ProgressiveEnsemble`."""

    members: nn.ModuleList
    scales: list[Scales]
    task: Task
    classes: list[str] | None

    @property
    def macs(self) -> list[int] | None:
        """Of each student, for one input."""

    @property
    def pace(self) -> Pace:
        """How long each takes."""

    def predicted(self, logits: Tensor) -> Tensor:
        """Labels (batch,) of logits (batch, L)."""


def predict(ensemble: Asked, images: Inputs, limits: Limits) -> Prediction:
    """The last answer of `stream`."""
    start, asked = _asked(ensemble, images, limits)
    (last,) = deque(asked, maxlen=1)
    return _prediction(ensemble, last, start)


def stream(ensemble: Asked, images: Inputs, limits: Limits) -> Iterator[Prediction]:
    """The answer of each prefix of an ensemble, as it is ready, within limits. Images are read at the call.

    Raises:
        InputError: where one cannot be read, or the limits are not possible for this ensemble.
    """
    start, asked = _asked(ensemble, images, limits)
    return (_prediction(ensemble, prefix, start) for prefix in asked)


def _asked(ensemble: Asked, images: Inputs, limits: Limits) -> tuple[float, Iterator[Prefix]]:
    """When it was asked for, on `clock`, and its prefixes."""
    start = clock()
    count = limits.most(ensemble.macs, len(ensemble.members))
    sure = None if limits.confidence is None else as_sure_as(limits.confidence)
    end = math.inf if limits.budget_ms is None else start + limits.budget_ms / 1000
    device = next((parameter.device for parameter in ensemble.members.parameters()), torch.device("cpu"))
    prepared = ensemble.task.prepare(read_inputs(images, ensemble.task).to(device))
    chosen, scales = list(ensemble.members)[:count], ensemble.scales[:count]
    return start, prefixes(chosen, scales, prepared, sure, ensemble.pace, end)


def _prediction(ensemble: Asked, prefix: Prefix, start: float) -> Prediction:
    """What a prefix gives, in the data set's terms."""
    logits, students = prefix.logits.cpu().clone(), prefix.students.cpu().clone()  # no inference tensors any more
    totals = None if ensemble.macs is None else torch.tensor(list(accumulate(ensemble.macs)))
    names, largest = ensemble.classes, logits.argmax(-1).tolist()
    return Prediction(
        labels=ensemble.predicted(logits),
        classes=None if names is None else [names[index] for index in largest],
        probabilities=logits.softmax(-1),
        logits=logits,
        students=students,
        macs=None if totals is None else totals[students - 1],
        seconds=clock() - start,
    )
