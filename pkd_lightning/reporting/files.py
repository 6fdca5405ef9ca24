"""Files of a run directory that came from anywhere: only plain ones of a sane size and depth are read."""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 2**28  # of results.json and metrics.jsonl; those of a thousand epochs take less than a megabyte
LEVELS = 32  # of lists and objects within one another; results have at most 6
DIGITS = 300  # of an integer that float64 can hold


def read_plain(file: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file.

    Raises:
        OSError: it is not there or cannot be read, is a link or a special file (a page must not show what lies outside
            of its run), or has more than `most` bytes. `strerror` says which.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link, and links are not followed", str(file)) from error
        raise
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(file))
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most} bytes", str(file))
    return content


def parse_json(text: str) -> Any:
    """The value of a JSON text; an integer that float64 cannot hold is infinite, as a float would be.

    Raises:
        ValueError: the text is not JSON, or nested more than LEVELS deep.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {LEVELS} levels deep") from error
    level = [value]
    for _ in range(LEVELS):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [child for part in inner for child in part]
        if not level:
            return value
    raise ValueError(f"it is nested more than {LEVELS} levels deep")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= DIGITS else -math.inf if digits.startswith("-") else math.inf
