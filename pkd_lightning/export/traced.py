"""An ensemble as torch.export traces it, and as a pt2 file: it needs torch to run, and nothing of this package."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pkd_lightning.earlier import InTurn, reads
from pkd_lightning.errors import ConfigError
from pkd_lightning.export.facts import Job
from pkd_lightning.export.inputs import dtype_of
from pkd_lightning.export.plain import PlainEnsemble
from pkd_lightning.models.building import brief, path_of

T = TypeVar("T")
FACTS = "pkd.json"  # extra file of a pt2 file


def attempted(model: PlainEnsemble, attempt: Callable[[nn.Module, Tensor], T], cannot: str) -> T:
    """What `attempt` makes of an ensemble and inputs to trace it with.

    Args:
        model: the ensemble.
        attempt: it is called with a member alone, too, to find which one it fails on.
        cannot: what it then cannot do, for the message.

    Raises:
        ConfigError: where it fails, naming the member.
    """
    task = model.task
    inputs = torch.zeros(2, *task.input_shape, dtype=dtype_of(task))
    try:
        return attempt(model, inputs)
    except Exception as error:  # whatever tracers raise, and the user's model inside of them
        found = error
    prepared = model.prepare(inputs)
    for t, member in enumerate(model.members):
        try:
            attempt(_Logits(list(model.members)[:t] if reads(member) else [], member), prepared)
        except Exception as own:
            raise ConfigError([f"member {t + 1}: {cannot} a {path_of(type(member))} ({brief(own)})"]) from own
    raise ConfigError([f"{cannot} the ensemble ({brief(found)})"]) from found


class _Logits(nn.Module):
    """A member alone, or after those that it reads."""

    def __init__(self, before: Sequence[nn.Module], member: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList([*before, member])

    def forward(self, inputs: Tensor) -> Tensor:
        """Its logits."""
        turn = InTurn(list(self.members))
        return [turn.ask(inputs).logits for _ in self.members][-1]


def traced(model: nn.Module, inputs: Tensor) -> ExportedProgram:
    """The program of a module that is called with such inputs, for batches of any size."""
    with torch.no_grad():
        return torch.export.export(model, (inputs,), dynamic_shapes=({0: Dim("batch")},), strict=False)


def write(job: Job, path: Path) -> None:
    """Write a pt2 file, whose extra file `FACTS` has the facts in JSON; for errors see `attempted`."""
    content = io.BytesIO()
    program = attempted(PlainEnsemble(job.ensemble), traced, "torch.export cannot trace")
    torch.export.save(program, content, extra_files={FACTS: json.dumps(vars(job.facts))})
    path.write_bytes(content.getvalue())


@contextmanager
def opened(path: Path, job: Job) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """The program of a file as a function of raw inputs and a number of members."""
    with path.open("rb") as file:
        program = torch.export.load(file).module()

    def call(inputs: Tensor, members: int) -> Tensor:
        logits, prefixes = program(inputs)
        given: Tensor = logits if members == job.facts.members else prefixes[:, members - 1]
        return given

    yield call
