"""A signal to a sweep, whose launcher runs its jobs in other processes."""

import os
import signal
import socket
import time
from contextlib import suppress
from types import FrameType

from pkd_lightning.process import STOPS, stop
from pkd_lightning.rundir import held
from pkd_lightning.sweeps.records import Sweep

LAUNCHER = "PKD_LAUNCHER"  # a variable of the environment: the process that launches jobs, in those of the jobs


def launched_here() -> str:
    """What tells the jobs of this process from those of another one that works on the same sweep."""
    return f"{socket.gethostname()}:{os.getpid()}"


def stop_jobs_first(sweep: Sweep) -> None:
    """From now on send a signal to the jobs that this process launches, and stop when they have saved their fits.

    Launchers kill them. A second signal does not wait. Those of another process that works on the sweep, too, go on.
    """
    os.environ[LAUNCHER] = launched_here()
    numbers = [number for number in STOPS if signal.getsignal(number) == stop.handle]

    def handle(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, stop.handle)
        running = [job for job in sweep.jobs()[0] if job.state == "running" and job.launcher == launched_here()]
        others = {job.pid: sweep.run_of(job) for job in running if job.pid and job.pid != os.getpid()}
        for pid in others:
            if number != signal.SIGINT or not os.isatty(0):  # a terminal's Ctrl-C has reached them already
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        while any(run is not None and held(run) for run in others.values()):
            time.sleep(0.1)
        stop.handle(number, frame)

    for number in numbers:
        signal.signal(number, handle)
