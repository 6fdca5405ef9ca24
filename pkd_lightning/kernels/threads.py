"""Shares the work of a CPU kernel out over threads. Kernels release the GIL, so plain Python threads run them at once.

numba's own threads are not used: one of its layers aborts when two Python threads use it, the other kills a child
forked after its first use.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

WORTHWHILE = 400_000  # state updates below which waking a thread costs more than it gains

_pool: ThreadPoolExecutor | None = None
_size = 0


def _forget() -> None:
    """A forked child has the pool but not its threads: it makes its own at first use."""
    global _pool, _size
    _pool, _size = None, 0


os.register_at_fork(after_in_child=_forget)


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _size
    pool = _pool
    if pool is None or _size < count:  # a pool that is replaced finishes what it has, then ends
        _pool, _size = ThreadPoolExecutor(count, "pkd-scan"), count
        pool = _pool
    return pool


def threads_for(units: int, updates: int) -> int:
    """How many threads to use: at most torch's own number, and one where the work is small.

    Args:
        units: independent pieces.
        updates: state updates (batch * length * d_inner * d_state) of the whole.
    """
    return min(torch.get_num_threads(), units) if updates >= WORTHWHILE else 1


def share(call: Callable[[int, int, int], object], units: int, threads: int) -> None:
    """Run `call(thread, first, last)` for `threads` equal ranges of `units`, one of them in this thread.

    Returns, or raises what a call raised, when all have ended. A second interrupt may leave some running: `call` has to
    hold on to the memory it writes to.
    """
    if threads <= 1:
        call(0, 0, units)
        return
    bounds = [units * i // threads for i in range(threads + 1)]
    waiting: list[Future[object]] = []
    try:
        for i in range(1, threads):
            waiting.append(_workers(threads - 1).submit(call, i, bounds[i], bounds[i + 1]))
        call(0, bounds[0], bounds[1])
    finally:
        wait(waiting)
    for result in waiting:
        result.result()


def share_kernel(
    kernel: Callable[..., object], sizes: object, addresses: list[tuple[int, ...]], units: int, space: int, held: object
) -> None:
    """`share` of a kernel that is called with sizes, addresses, a range of `units`, and the address of its workspace.

    Args:
        kernel: the kernel.
        sizes: its first argument.
        addresses: those of each thread, of which there are as many.
        units: independent pieces; where there are none, nothing is called.
        space: float32 elements of each thread's workspace.
        held: whatever owns the memory at the addresses.
    """

    def run(thread: int, first: int, last: int, _alive: object = held) -> None:
        workspace = torch.empty(space, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        kernel(sizes, addresses[thread], first, last, workspace.data_ptr())

    if units:
        share(run, units, len(addresses))
