"""Errors a user can act on. They are printed as one message, without a traceback."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


class PKDError(Exception):
    """Base of every error whose message alone tells the user what to do.

    Each survives `copy` and `pickle`: launchers such as joblib and submitit bring it from other processes.
    """


class ConfigError(PKDError):
    """A configuration that cannot run. Lists every fault found, not only the first."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        super().__init__(self.faults)  # as it came: copies are made by calling the class with `args` again

    def __str__(self) -> str:
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        return f"the configuration has {len(self.faults)} fault(s):\n{lines}"


class DataError(PKDError):
    """A data set that is missing, incomplete or damaged."""


class InputError(PKDError, ValueError):
    """Images, or other inputs, that an ensemble cannot read."""


class RunError(PKDError):
    """A run that cannot start or continue, for example because another process holds its directory."""


class Diverged(RunError):
    """A model whose loss or logits are not finite after its training: in a round, a failed attempt."""


class Pruned(PKDError):
    """A run that a sweep has ended between two rounds, because others are better. The same command goes on with it."""


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Turn what a full disk, or a used-up quota, makes of the block into one error.

    Args:
        path: what the block writes: a file, or the directory of several.

    Raises:
        RunError: naming the disk and `path`.
    """
    try:
        yield
    except PKDError:
        raise
    except Exception as error:
        cause: BaseException | None = error  # libraries raise errors of their own on top of the system's
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in FULL):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        disk = next(folder for folder in path.absolute().parents if folder.is_mount())
        raise RunError(
            f"no space left on {disk}: {path} cannot be written. Nothing is lost: free some space, then the same"
            " command goes on from the last finished stage"
        ) from error
