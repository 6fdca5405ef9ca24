"""The command line before Hydra: commands of our own, and what their output goes to. Nothing heavy is imported."""

import io
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

# each with the module whose `main` takes the arguments and returns the exit code
COMMANDS = {
    "export": "pkd_lightning.export.command",
    "finish": "pkd_lightning.finish",
    "list": "pkd_lightning.sweeps.listing",
    "predict": "pkd_lightning.predict",
    "report": "pkd_lightning.report",
}


def run_command() -> None:
    """Run the command of our own that the first argument names, and exit; return where it is no name."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in COMMANDS:
        sys.exit(import_module(COMMANDS[first]).main(sys.argv[2:]))
    if re.fullmatch(r"[a-z][\w-]*", first):
        from pkd_lightning.checks import suggest

        known = sorted(COMMANDS)
        sys.exit(
            f"error: {first}: no such command; there are {', '.join(known)}, and overrides.{suggest(first, known)}"
        )


def spare_terminal() -> None:
    """Print characters that the terminal's encoding lacks as `?`, where an error would end what is all but done."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # elsewhere, as in a notebook, it is Unicode; stderr escapes them
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def end_with_reader() -> Iterator[None]:
    """End this process without a word where whoever reads its stdout, such as `head`, has ended."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _unread(sys.stdout.fileno()):  # it is another pipe that broke
            raise
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())  # for what is flushed at exit
        sys.exit(128 + signal.SIGPIPE)


def _unread(descriptor: int) -> bool:
    """Whether a descriptor is that of a pipe or socket that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))  # no event is asked for, and those of errors come all the same
