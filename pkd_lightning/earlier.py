"""Students that read earlier ones: asking students one after another, each with what those before it gave.

A student reads earlier ones where it has an attribute `reads`, the paths of modules of each earlier student whose
outputs it wants; there may be none. It is then called `student(inputs, earlier=outputs)`, with an `Output` of each
earlier student for the same inputs, in the order of their rounds: B-DISTIL's composition of functions
(arXiv 2302.10093). Any other student is called with the inputs alone.

It may have a method `follow(students)`, which is called once when it is built, with the earlier students: to make
layers by their sizes. Our own classifier does, see `models.reuse`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pkd_lightning.errors import ConfigError
from pkd_lightning.outputs import Output, Taps, output_of

Earlier = tuple[Output, ...]


def reads(model: nn.Module) -> bool:
    """Whether a student is called with what earlier ones gave."""
    return getattr(model, "reads", None) is not None


def call(model: Callable[..., Any], inputs: Tensor, earlier: Earlier | None) -> Output:
    """What a student gives, called with what earlier ones gave, or None where it reads none."""
    return output_of(model(inputs) if earlier is None else model(inputs, earlier=earlier))


class InTurn:
    """Asks students for the same inputs, in the order of their rounds.

    Args:
        members: the students.
        after: later ones, which are not asked here, but read what these give.
    """

    def __init__(self, members: Sequence[nn.Module], after: Sequence[nn.Module] = ()) -> None:
        self.members, self.after = list(members), list(after)
        self.asked = 0
        self.outputs: list[Output] = []

    def ask(self, inputs: Tensor) -> Output:
        """What the next student gives for inputs (batch, ...).

        Raises:
            ConfigError: where it has no module that a later student reads.
        """
        t, member = self.asked, self.members[self.asked]
        readers: list[Any] = [later for later in (*self.members[t + 1 :], *self.after) if reads(later)]
        earlier = tuple(self.outputs) if reads(member) else None
        try:
            with Taps(member, list(dict.fromkeys(path for reader in readers for path in reader.reads))) as taps:
                output = taps.call(partial(call, member, earlier=earlier), inputs)
        except ConfigError as error:
            raise ConfigError(
                [f"student {t + 1}, which a later one reads: {fault}" for fault in error.faults]
            ) from error
        if readers:
            self.outputs.append(output)
        self.asked += 1
        return output

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the inputs (batch, ...), by a mask or by index."""
        self.outputs = [
            Output(logits[rows], {name: feature[rows] for name, feature in features.items()})
            for logits, features in self.outputs
        ]


@torch.no_grad()
def outputs_for(model: nn.Module, students: Sequence[nn.Module], inputs: Tensor) -> Earlier | None:
    """What `model` is called with besides inputs, None where it reads no earlier students: each one's `Output`."""
    if not reads(model):
        return None
    turn = InTurn([student.to(inputs.device).eval() for student in students], [model])
    for _ in students:
        turn.ask(inputs)
    return tuple(turn.outputs)


class Following(nn.Module):
    """A student with the earlier ones that it reads, asked like any other model: all of them are."""

    def __init__(self, model: nn.Module, students: Sequence[nn.Module]) -> None:
        super().__init__()
        self.students, self.model = nn.ModuleList(students), model
        self.train(model.training)

    def forward(self, inputs: Tensor) -> Output:
        """The student's output."""
        return call(self.model, inputs, outputs_for(self.model, list(self.students), inputs))

    def train(self, mode: bool = True) -> "Following":
        """Set the student's mode; the earlier ones stay in evaluation mode."""
        super().train(mode)
        self.students.eval()
        return self


def following(model: nn.Module, students: Sequence[nn.Module]) -> nn.Module:
    """`model`, where it reads earlier students together with these."""
    return Following(model, students) if reads(model) else model
