"""Files of public data sets, plain, gzipped or in a tar archive, read up to a size that none of them has."""

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from pkd_lightning.errors import DataError

# Files come from elsewhere: a few megabytes of gzip can expand to gigabytes. Of the data sets here MNIST's training
# images are the largest file (45 MiB), and CIFAR-10's archive the largest download (163 MiB) and content (178 MiB).
FILE_BYTES = 2**27
ARCHIVE_BYTES = 2**29
PART_BYTES = 2**20


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
