"""Locks on files that say who holds them. The system takes a lock from a process that dies."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO

from pkd_lightning.checkpoint import unlocked
from pkd_lightning.errors import RunError, full_disk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lock:
    """How a lock was taken.

    Attributes:
        held: False where the file system has no locks, so that another process may be at the same work.
        waited: whether another process held it before.
    """

    held: bool = True
    waited: bool = False


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[Lock]:
    """Hold the lock on a file, which is made, for the length of the block; where another process has it, wait for it.

    Args:
        path: the file.
        waiting: what is logged where it is waited for, before the holder's process number and host.

    Raises:
        RunError: where the file cannot be made.
    """
    waited = False
    while True:
        with _opened(path) as file:
            held = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    logger.info("%s%s", waiting, holder(path))
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                unlocked(path.parent, error)
                held = False
            if held and not _is_at(path, file):  # deleted while it was waited for: others lock the next one
                continue
            sign(file)
            try:
                yield Lock(held, waited)
            finally:
                unsign(file)
            return


def _opened(path: Path) -> FileIO:
    try:
        with full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("ab+", buffering=0)
    except OSError as error:
        raise RunError(
            f"{path.parent}: cannot be written ({error.strerror}); make that possible, or choose another run_root"
        ) from error


def taken(path: Path) -> bool:
    """Whether a process holds the lock on a file, on whatever host."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no lock file, or no locks on this file system
    return False


def holder(path: Path) -> str:
    """`: process 12 on host`, who holds the lock on a file, where that is known, else nothing."""
    try:
        name = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        name = ""
    return f": {name}" if name else ""


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def sign(file: IO[bytes]) -> None:
    """Write who this process is into a lock file that it holds."""
    unsign(file)
    with suppress(OSError):  # of a full disk: to wait is possible without a name
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()


def unsign(file: IO[bytes]) -> None:
    """Empty a lock file that is given back."""
    with suppress(OSError):
        file.truncate(0)
