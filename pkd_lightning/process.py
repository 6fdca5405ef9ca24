"""What this process is to whatever started it: one of several tasks, and asked to stop by signals."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

# number of tasks, own number: srun, torchrun and torch.distributed.launch, Open MPI, MPICH, jsrun of LSF
TASKS = (
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("WORLD_SIZE", "RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
)
# Ctrl-C, the end of a job, and what schedulers send some time before: USR1 by `sbatch --signal` and SGE, USR2 by LSF
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def task() -> str:
    """' (task 2 of 4 ...)' where a launcher started this command several times, else ''."""
    for size, rank in TASKS:
        count, number = os.environ.get(size, ""), os.environ.get(rank, "")
        if count.isdecimal() and number.isdecimal() and int(count) > 1:
            return (
                f" (this is task {int(number) + 1} of {count}, by {size}: one process trains a run; start the command"
                f" once, or give each task a seed or a name of its own)"
            )
    return ""


def in_multirun() -> bool:
    """Whether this process runs a job of Hydra's multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


class Stop:
    """The signal that is to stop this process, where whoever `deferred` it takes care of it first."""

    def __init__(self) -> None:
        self.deferring = False
        self.signal: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal where it is deferred; the second one, and any other, stops the process at once."""
        if not self.deferring or self.signal is not None:
            raise SystemExit(128 + number)
        self.signal = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a first signal is only noted; where nobody stops by it, the process is stopped after it."""
        before, self.deferring = self.deferring, True
        try:
            yield
        except (
            SystemExit
        ) as end:  # Lightning ends a fit by itself, with the code 0, where SIGTERM comes while one is saved
            if end.code is None and self.signal is not None:
                raise SystemExit(128 + self.signal) from end
            raise
        finally:
            self.deferring = before
            number, self.signal = self.signal, None
        if number is not None:
            raise SystemExit(128 + number)


stop = Stop()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within the block the signals of `STOPS` raise a SystemExit of 128 + their number, so that what is open is closed.

    What is `stop.deferred` is asked to end first. A signal that the process was started to ignore stays ignored. Python
    runs handlers in the main thread only; in any other this does nothing.
    """

    before = {}
    if threading.current_thread() is threading.main_thread():
        untouched = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.getsignal(number) for number in STOPS if signal.getsignal(number) in untouched}
    for number in before:
        signal.signal(number, stop.handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
