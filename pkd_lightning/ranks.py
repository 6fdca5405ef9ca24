"""The processes that train one run together: which one this is, and the little that they tell each other.

Each owns a part of the training and validation rows, with their inputs, logits and residuals. Between two steps they
exchange sums and decisions, by a group of their own in the processor's memory; a step's gradients go by Lightning's.
With one process, as always unless `trainer.devices` or `trainer.num_nodes` asks for more, all of it is the identity.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torch is imported where there are several processes: a finished run does without its seconds
    from torch import Tensor

T = TypeVar("T")


class _Group:
    """The group that decisions and sums go by, while there is one."""

    handle: Any = None
    rank, size = 0, 1


def join(group: Any, number: int = 0, count: int = 1) -> None:
    """Have the functions below use a process group of torch's that moves tensors of the CPU; None: this one alone."""
    _Group.handle, _Group.rank, _Group.size = group, number, count


def rank() -> int:
    """Number of this process, from 0."""
    return _Group.rank


def size() -> int:
    """Number of processes."""
    return _Group.size


def first() -> bool:
    """Whether this is the process that writes, logs and evaluates."""
    return rank() == 0


def purpose() -> tuple[str | int, ...]:
    """What tells the random draws of this process in training from those of the first."""
    return () if first() else ("rank", rank())


def own(rows: int) -> range:
    """Those of `rows` rows that this process owns: consecutive ones, as many as any other within one."""
    return range(rows * rank() // size(), rows * (rank() + 1) // size())


def gathered(value: T) -> list[T]:
    """The value of each process, in their order."""
    if size() == 1:
        return [value]
    from torch import distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value, group=_Group.handle)
    return found


def total(values: "Tensor") -> "Tensor":
    """The sum of a small tensor over all processes, in their order: the same bits in each of them."""
    if size() == 1:
        return values
    import torch

    return torch.stack(gathered(values)).sum(0)


def mean(value: float, samples: int) -> float:
    """The mean over all samples, of a mean over those `samples` that this process owns."""
    if size() == 1:
        return value
    parts = gathered((value, samples))
    return math.fsum(part * count for part, count in parts) / sum(count for _, count in parts)


def highest(value: float) -> float:
    """The largest value of any process; NaN where one has NaN."""
    values = gathered(value)
    return math.nan if any(map(math.isnan, values)) else max(values)


def either(due: bool, number: int) -> tuple[bool, int]:
    """Whether it is due in any process, and the largest of their numbers; asked after each step, so by one message."""
    if size() == 1:
        return due, number
    import torch
    from torch import distributed as dist

    both = torch.tensor([int(due), number])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=_Group.handle)
    return bool(both[0]), int(both[1])


def agreed(make: Callable[[], T]) -> T:
    """What the first process finds; an error there is one everywhere."""
    if size() == 1:
        return make()
    from torch import distributed as dist

    found: list[Any] = [None, None]
    caught: Exception | None = None
    if first():
        try:
            found[0] = make()
        except Exception as error:  # whatever it is, the others must not wait for what will not come
            found[1] = caught = error
    dist.broadcast_object_list(found, src=0, group=_Group.handle)
    if caught is not None:
        raise caught
    if found[1] is not None:
        raise found[1]
    return found[0]  # type: ignore[no-any-return]


def wait() -> None:
    """Wait until every process is here: what one has written, the others then read."""
    if size() > 1:
        from torch import distributed as dist

        dist.barrier(group=_Group.handle)
