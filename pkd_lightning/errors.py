"""Errors a user can act on. They are printed as one message, without a traceback."""

from collections.abc import Sequence


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


class RunError(PKDError):
    """A run that cannot start or continue, for example because another process holds its directory."""
