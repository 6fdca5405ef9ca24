"""The progressive ensemble: every prefix of it is a usable model."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pkd_lightning.checkpoint import read_json
from pkd_lightning.earlier import InTurn, reads
from pkd_lightning.errors import ConfigError, InputError, RunError
from pkd_lightning.inputs import Inputs
from pkd_lightning.models.building import Trust, brief
from pkd_lightning.parallel import Parallel, packed
from pkd_lightning.predicting import (
    Limits,
    Pace,
    Prediction,
    as_sure_as,
    largest_prefix,
    member_macs,
    predict,
    prefixes,
    stream,
)
from pkd_lightning.prefixes import Scales, mix
from pkd_lightning.saved import folder_of, load_student, load_students, load_task, save_description, save_student
from pkd_lightning.tasks import ImageClassification, Task

if TYPE_CHECKING:
    from pkd_lightning.exits.policy import ExitPolicy

__all__ = ["ProgressiveEnsemble", "load_student", "load_students", "save_description", "save_student"]

logger = logging.getLogger(__name__)


class ProgressiveEnsemble(nn.Module):
    """Students f_1..f_T and their scales (a_t, c_t), see `prefixes.mix`.

    Args:
        members: the students, in the order of their rounds.
        scales: (a_t, c_t) of each.
        task: how inputs are prepared.
        labels: the label of each output in the data set; None where they are 0, 1, ...
        classes: the name of each output; None where the data set does not name them.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        scales: Sequence[Scales],
        task: Task,
        labels: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not members or len(members) != len(scales):
            raise ValueError(f"{len(members)} members with {len(scales)} scales; needs as many, at least one")
        self.members = nn.ModuleList(members)
        self.scales = [(float(a), float(c)) for a, c in scales]
        self.labels = None if labels is None else [int(label) for label in labels]
        self.classes = None if classes is None else [str(name) for name in classes]
        for name, found in (("labels", self.labels), ("classes", self.classes)):
            if found is not None and len(found) != task.num_classes:
                raise ValueError(f"{len(found)} {name} for {task.num_classes} outputs")
        self.task = task
        self._parallel = Parallel()
        self._counted: tuple[ProgressiveEnsemble, ...] = ()  # the ensemble that this one costs as much as
        self._together: Any = None  # of the first students, what asks them all at once, see `compiled`

    def __len__(self) -> int:
        return len(self.members)

    def preprocess(self, inputs: Tensor) -> Tensor:
        """Raw inputs, such as uint8 images (batch, C, H, W), to what the students read, as in training.

        Raises:
            InputError: where images are no uint8 tensor of that shape. `predict` reads others.
        """
        if isinstance(self.task, ImageClassification):
            kind = f"{inputs.dtype} of {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
            whole = isinstance(inputs, Tensor) and inputs.dtype == torch.uint8
            if not whole or tuple(inputs.shape[1:]) != tuple(self.task.input_shape):
                shape = ", ".join(map(str, self.task.input_shape))
                raise InputError(
                    f"images are a {kind}; expected a tensor of torch.uint8 of (batch, {shape})."
                    " ensemble.predict reads others, such as floats, arrays and files"
                )
        return self.task.prepare(inputs)

    def forward(self, images: Tensor, members: int | None = None, parallel: bool | Literal["auto"] = False) -> Tensor:
        """Logits (batch, L) of the prefix of the first `members` students (None: all) on preprocessed images.

        Args:
            images: (batch, *input_shape).
            members: students of the prefix.
            parallel: True: each student in a thread of its own, or on a CUDA stream. "auto": what `parallel.Parallel`
                finds fastest, at the first call with such a batch. Students that read earlier ones run in turn all the
                same.
        """
        if parallel not in (True, False, "auto"):
            raise ValueError(f"parallel={parallel!r}: must be True, False or 'auto'")
        count = self._count(members)
        if self._together is not None and count <= len(self._together):
            return self._together(images, count)  # type: ignore[no-any-return]
        chosen = list(self.members)[:count]
        if not parallel or any(map(reads, chosen)):
            turn = InTurn(chosen)
            logits = [turn.ask(images).logits for _ in chosen]
        elif parallel == "auto" or images.is_cuda:
            logits = self._parallel(chosen, images)
        else:
            logits = packed(chosen, images, [[t] for t in range(count)])
        prefix = None
        for student, scales in zip(logits, self.scales, strict=False):  # of the prefix's members
            prefix = mix(prefix, student, scales)
        assert prefix is not None
        return prefix

    def compiled(self) -> "ProgressiveEnsemble":
        """The same ensemble for inference on the CPU: students packed for kernels, without gradients.

        The weights are copies: what changes in this ensemble later is not seen. A student for which there is no kernel
        is called as it is, and the log says so. Images of a batch are shared out to torch's number of threads.
        """
        from pkd_lightning.compiled import CompiledPrefixes, CompiledStudent, compile_students

        members = compile_students(list(self.members), self.task.input_shape)
        ensemble = ProgressiveEnsemble(members, self.scales, self.task, self.labels, self.classes).eval()
        ensemble._counted = (self,)
        first = list(itertools.takewhile(lambda member: isinstance(member, CompiledStudent), members))
        if first:
            ensemble._together = CompiledPrefixes(first, self.scales[: len(first)])  # type: ignore[arg-type]
        return ensemble

    def predicted(self, logits: Tensor) -> Tensor:
        """The label, as the data set has it, of the largest of the logits (batch, L) of each image: (batch,)."""
        largest = logits.argmax(-1)
        return largest if self.labels is None else torch.tensor(self.labels, device=logits.device)[largest]

    def anytime(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the logits of prefix 1, 2, ..., T; each costs one more student. Stop whenever time is up."""
        logits: Tensor | None = None
        turn = InTurn(list(self.members))
        for scales in self.scales:
            logits = mix(logits, turn.ask(images).logits, scales)
            yield logits

    def predict(
        self,
        images: Inputs,
        members: int | None = None,
        confidence: float | None = None,
        budget_macs: float | None = None,
        budget_ms: float | None = None,
    ) -> Prediction:
        """The answer for images as they are: tensors, NumPy arrays, PIL images, files; one or many.

        Args:
            images: see `read_inputs`. Floats are levels scaled to [0, 1]; what is preprocessed goes to `forward`.
            members: ask the first so many students. At most one of this and the following is given, see `Limits`.
            confidence: ask each further student only for the images whose prefix is less sure than this.
            budget_macs: ask as many as cost at most so many multiply-accumulates an image.
            budget_ms: ask no further one that would end later than so many milliseconds after the call.

        Raises:
            InputError: where an image cannot be read, or the limit is impossible, saying what is expected.
        """
        return predict(self, images, Limits(members, confidence, budget_macs, budget_ms))

    def stream(
        self,
        images: Inputs,
        members: int | None = None,
        confidence: float | None = None,
        budget_macs: float | None = None,
        budget_ms: float | None = None,
    ) -> Iterator[Prediction]:
        """The answer of each prefix as it is ready; each costs one more student. Arguments and errors as in `predict`.

        Images are read at the call. Where some are done by `confidence`, they keep their answer.
        """
        return stream(self, images, Limits(members, confidence, budget_macs, budget_ms))

    @cached_property
    def macs(self) -> list[int] | None:
        """Multiply-accumulates of each student for one input; None, with a warning, where they cannot be counted."""
        if self._counted:
            return self._counted[0].macs
        try:
            return member_macs(list(self.members), self.task.input_shape)
        except Exception as error:  # whatever the counter or a user's model raises inside of it
            logger.warning("the students' multiply-accumulates cannot be counted (%s)", brief(error))
            return None

    @cached_property
    def pace(self) -> Pace:
        """How long each student took in the calls of `predict` and `stream` so far."""
        return Pace(self.macs)

    def early_exit(
        self, images: Tensor, confidence: float | None = None, exits: "ExitPolicy | None" = None
    ) -> tuple[Tensor, Tensor]:
        """Ask one student after another, only for the images no prefix is yet sure of.

        Args:
            images: (batch, C, H, W), preprocessed.
            confidence: an image is done when the largest softmax probability of its prefix reaches this.
            exits: in its place, a rule with thresholds that were calibrated, see `pkd_lightning.exits`.

        Returns:
            Logits (batch, L) of each image's last prefix, and the number of students each image used (batch,).

        Raises:
            ValueError: unless one of `confidence` and `exits` is given.
            ConfigError: where `exits` is of an ensemble with other numbers of students or classes.
        """
        if (confidence is None) == (exits is None):
            raise ValueError("early_exit needs either confidence=P or exits=POLICY")
        if exits is None:
            assert confidence is not None
            sure = as_sure_as(confidence)
        else:
            exits.check(len(self), self.task.num_classes)
            sure = exits.leaving()
        *_, last = prefixes(list(self.members), self.scales, images, sure)
        return last.logits, last.students

    def largest_prefix(self, costs: Sequence[float], budget: float) -> int:
        """See `predicting.largest_prefix`; it is a ValueError, too, where there are not as many costs as students."""
        if len(costs) != len(self):
            raise ValueError(f"{len(costs)} costs for {len(self)} students")
        return largest_prefix(costs, budget)

    def _count(self, members: int | None) -> int:
        if members is None:
            return len(self)
        if not 1 <= members <= len(self):
            raise ValueError(f"members={members}: the ensemble has prefixes of 1 to {len(self)} students")
        return members

    @classmethod
    def from_students(
        cls,
        directory: Path,
        scales: Sequence[Scales],
        task: Task,
        labels: Sequence[int] | None = None,
        trust: Trust = (),
        classes: Sequence[str] | None = None,
    ) -> "ProgressiveEnsemble":
        """Load students 00, 01, ... of `directory`, as many as there are scales; `trust` as in `load`."""
        return cls(load_students(directory, len(scales), trust), scales, task, labels, classes).eval()

    @classmethod
    def load(cls, directory: Path | str, trust: Trust = ()) -> "ProgressiveEnsemble":
        """Load the ensemble of a run, by its directory or `students` folder, of an export's safetensors file, or a
        pretrained one by its name.

        Of an unfinished run these are the students so far, and a warning says so.

        Args:
            directory: where it is, or a name such as `mnist`. What exists goes before a name.
            trust: import paths of models, or of packages, that a file of the run may name besides this package's own
                models: their code is run. True: any. Models of the ladders of this process need no mention.

        Raises:
            RunError: where files are missing, damaged or do not fit, or name a model that is not trusted.
        """
        directory = folder_of(directory)
        path = directory / "ensemble.json"
        description = read_json(path)
        try:
            finished = description.get("finished", True)
            scales = [(float(a), float(c)) for a, c in description["scales"]]
            labels = description.get("labels")  # older files have none
            labels = None if labels is None else [int(label) for label in labels]
            classes = description.get("classes")  # older files have none
            if not torch.tensor(scales).isfinite().all():
                raise ValueError(f"scales: {description['scales']} are not all finite numbers")
            task = load_task(description, directory, trust)
        except ConfigError as error:
            raise RunError(f"{path}: its task cannot be had: {'; '.join(error.faults)}") from error
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
            raise RunError(f"{path}: does not describe an ensemble ({error!r})") from error
        if not finished:
            logger.warning("%s: the run is not finished; its first %d students are loaded", path, len(scales))
        try:
            return cls.from_students(directory, scales, task, labels, trust, classes)
        except ValueError as error:
            raise RunError(f"{path}: does not describe an ensemble ({error})") from error
