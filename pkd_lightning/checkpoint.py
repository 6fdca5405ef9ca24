"""Files that are whole or absent, whatever happens while they are written, and hold a hash of their content.

The hash is in the file itself, so that both are written at once and copied together: in the metadata of safetensors,
else under the key `HASH`. A file without one, of an earlier version or from elsewhere, is read as it is.

`load_tensors` and `read_json` read the files of a folder from one safetensors file as well, which `pkd export` writes:
FILE/00.json is the text `00.json` in its metadata, FILE/00.safetensors its tensors `00/NAME`.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkd_lightning.errors import RunError, full_disk

logger = logging.getLogger(__name__)
HASH = "blake2b"
HASHED_BYTES = 2**21  # worked on at a time: a tensor that is not contiguous is copied only in parts

if TYPE_CHECKING:  # torch is imported where tensors are met: a finished run is shown without it
    from torch import Tensor, nn


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then move it into place.

    Raises:
        RunError: where the disk is full; a file that was there before is left as it was.
    """
    with full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            _flush(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush(path.parent)  # or a power cut could leave the file without its name


def unlocked(path: Path, error: OSError) -> None:
    """Warn that the file system has no locks; any other error of taking one is raised again."""
    if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
        raise error
    logger.warning("%s: this file system has no locks (%s); start no second process on it", path, error.strerror)


def remove_temporaries(directory: Path, name: str = "*") -> None:
    """Remove what processes killed in `atomic_write`, or in `scratch`, left; only under the lock of who writes there.

    Args:
        directory: where it lies.
        name: of the file that was to be written; any by default.
    """
    for path in directory.glob(f".{name}.*"):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name):  # as tempfile.mkstemp names them
            path.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file. One that a killed process left torn is ended first, or it would swallow this one."""
    with path.open("ab+") as file:
        torn = False
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")


def _flush(path: Path) -> None:
    """Put a file, or the names in a directory, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network filesystems
            raise
    finally:
        os.close(handle)


def weights_of(model: "nn.Module") -> "dict[str, Tensor]":
    """A model's state dict as safetensors takes it: on the CPU, contiguous, no two tensors in the same memory.

    A tied weight has its values under each of its names, so that a model that ties it, or does not, can load them.
    """
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        weights[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return weights


def save_weights(model: "nn.Module", path: Path) -> None:
    """Write a model's state dict as safetensors, whole or not at all."""
    save_tensors(weights_of(model), path)


def save_tensors(weights: "dict[str, Tensor]", path: Path) -> None:
    """Write tensors by name as safetensors, with their hash, whole or not at all."""
    from safetensors.torch import save

    content = save(weights, {HASH: content_hash(weights)})
    # not by `save_file`, whose errors do not say in a form to be tested that the disk is full
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a safetensors file by name, and compare it with its hash where it has one. The tensors are mapped from it.

    Raises:
        RunError: where it is missing or damaged, naming it.
    """
    from safetensors import SafetensorError, safe_open

    whole = not path.parent.is_file()
    source, prefix, key = (path, "", HASH) if whole else (path.parent, f"{path.stem}/", f"{path.stem}.{HASH}")
    try:
        with safe_open(source, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  (not a mapping)
            values = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
            stored = (file.metadata() or {}).get(key)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
    check_hash(path, values, stored)
    return values


def content_hash(values: Mapping[str, Any]) -> str:
    """A hash of tensors and JSON values by name, in any order of the names: 0.2 s for 100 MB."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(values.items()):
        if isinstance(value, (dict, list, tuple, str, int, float, type(None))):
            digest.update(json.dumps([name, value]).encode())
        else:
            digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            for part in _bytes(value):
                digest.update(part)
    return digest.hexdigest()


def _bytes(tensor: "Tensor") -> Iterator[memoryview]:
    """The bytes of a tensor, in parts."""
    from torch import uint8

    rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    size = max(1, rows[:1].numel() * rows.element_size())
    for part in rows.split(max(1, HASHED_BYTES // size)):
        yield part.cpu().contiguous().view(-1).view(uint8).numpy().data


def check_hash(path: Path, values: Mapping[str, Any], stored: str | None) -> None:
    """Compare what was read from `path` with the hash stored with it; without one nothing is compared.

    Raises:
        RunError: where they differ.
    """
    if stored is not None and stored != content_hash(values):
        raise RunError(
            f"{path}: is damaged, its content does not match the {HASH} hash in it. Restore it from a copy; where you"
            " have edited it yourself, remove the hash"
        )


def write_json(path: Path, value: Any, hashed: bool = False) -> None:
    """Write `value` as indented JSON, whole or not at all; a dict can be `hashed`, for `read_json` to check.

    Raises:
        RunError: where a number in it is not finite, which JSON cannot hold, naming its place.
    """
    content = {**value, HASH: content_hash(value)} if hashed else value
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise RunError(f"{path}: not written, {'; '.join(not_finite(value)) or error}") from error
    atomic_write(path, lambda temporary: temporary.write_text(text))


def not_finite(value: Any, place: str = "") -> Iterator[str]:
    """Where in a value of JSON's types there are numbers that are not finite: `rounds[1].nll is nan`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from not_finite(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from not_finite(inner, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}"


def read_json(path: Path) -> Any:
    """Read a JSON file; without its hash, where it has one.

    Raises:
        RunError: where it is missing, not JSON, or does not match its hash, naming it.
    """
    try:
        value = json.loads(_text_inside(path) if path.parent.is_file() else path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
    if isinstance(value, dict):
        check_hash(path, value, value.pop(HASH, None))
    return value


def _text_inside(path: Path) -> str:
    """A text in the metadata of the safetensors file that stands for its folder.

    Raises:
        ValueError: where there is none, or the file is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path.parent, "pt") as file:
            texts = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if path.name not in texts:
        raise ValueError(f"{path.parent.name} has no {path.name} in its metadata: is it a file of pkd export?")
    return str(texts[path.name])
