"""The students of a prefix at the same time: in threads, by rows of the batch, or on CUDA streams.

Which is fastest depends on the students, the batch and the machine, so `Parallel` measures it.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from pkd_lightning.outputs import output_of

logger = logging.getLogger(__name__)
Part = TypeVar("Part")

WORTHWHILE = 0.9  # of the time in turn that a way with threads may take to be chosen
_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # a forked child has the pools but not their threads


def in_turn(members: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """The logits of each student."""
    return [output_of(member(images)).logits for member in members]


def packed(members: Sequence[nn.Module], images: Tensor, groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """`in_turn` with a thread for each of `groups`, which hold each student's index once."""
    logits: list[Tensor] = [images] * len(members)

    def call(group: Sequence[int]) -> None:
        for t in group:
            logits[t] = output_of(members[t](images)).logits

    _each(call, groups)
    return logits


def by_rows(members: Sequence[nn.Module], images: Tensor, threads: int) -> list[Tensor]:
    """`in_turn` with a thread for each of `threads` ranges of the batch, for students in evaluation mode."""
    parts = images.chunk(threads)
    found: list[list[Tensor]] = [[] for _ in parts]

    def call(part: int) -> None:
        found[part] = in_turn(members, parts[part])

    _each(call, range(len(parts)))
    return [torch.cat(logits) for logits in zip(*found, strict=True)]


def on_streams(members: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """`in_turn` with a CUDA stream for each student."""
    current, logits = torch.cuda.current_stream(images.device), []
    streams = [torch.cuda.Stream(images.device) for _ in members]
    for member, stream in zip(members, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            logits.append(output_of(member(images)).logits)
        images.record_stream(stream)
    for stream, answer in zip(streams, logits, strict=True):
        current.wait_stream(stream)
        answer.record_stream(current)
    return logits


def pack(costs: Sequence[float], groups: int) -> list[list[int]]:
    """Indices of `costs` in at most `groups` groups of about equal sums: the dearest first, to the cheapest group."""
    packed_: list[list[int]] = [[] for _ in range(min(groups, len(costs)))]
    sums = [0.0] * len(packed_)
    for t in sorted(range(len(costs)), key=lambda t: -costs[t]):
        least = sums.index(min(sums))
        packed_[least].append(t)
        sums[least] += costs[t]
    return [sorted(group) for group in packed_]


Way = Sequence[Sequence[int]] | int  # groups of students in threads, or a number of ranges of rows; 1: in turn


def ask(members: Sequence[nn.Module], images: Tensor, way: Way) -> list[Tensor]:
    """The logits of each student, in a given way."""
    if not isinstance(way, int):
        return packed(members, images, way)
    return in_turn(members, images) if way == 1 else by_rows(members, images, way)


class Parallel:
    """The fastest way on this machine: measured once for each number of students, of threads, and size of batch.

    Sizes are told apart by factors of two. The log says what was measured.
    """

    def __init__(self) -> None:
        self._ways: dict[tuple[int, int, int], Way] = {}

    def __call__(self, members: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
        """The logits of each student; on a GPU each has a stream."""
        if images.is_cuda:
            return on_streams(members, images)
        threads = torch.get_num_threads()
        if threads == 1 or not len(images) or any(member.training for member in members):
            return in_turn(members, images)
        key = (len(members), len(images).bit_length(), threads)
        if key not in self._ways:
            self._ways[key] = _fastest(members, images, threads)
        return ask(members, images, self._ways[key])


def _fastest(members: Sequence[nn.Module], images: Tensor, threads: int) -> Way:
    groups = pack([_seconds(partial(member, images)) for member in members], threads)
    ways: dict[str, Way] = {"in turn": 1}
    if len(groups) > 1:
        ways[f"students in {len(groups)} threads"] = groups
    if len(images) >= threads:
        ways[f"rows in {threads} threads"] = threads
    seconds = {name: _seconds(partial(ask, members, images, way)) for name, way in ways.items()}
    best = min(seconds, key=lambda name: seconds[name] * (WORTHWHILE if name == "in turn" else 1))
    times = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in seconds.items())
    logger.info("%d students, batch of %d: %s; from now on %s", len(members), len(images), times, best)
    return ways[best]


def _seconds(call: Callable[[], object]) -> float:
    """The least of three calls after a first."""
    call()
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def _each(call: Callable[[Part], object], parts: Sequence[Part]) -> None:
    """Call for all parts at once, with this thread's gradient and inference modes."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def one(part: Part) -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):  # a thread starts with gradients on
            call(part)

    if len(parts) not in _pools:
        _pools[len(parts)] = ThreadPoolExecutor(len(parts), "pkd-student")
    list(_pools[len(parts)].map(one, parts))
