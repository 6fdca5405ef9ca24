"""Files that are whole or absent, whatever happens while they are written."""

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from pkd_lightning.errors import RunError, full_disk


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


def weights_of(model: nn.Module) -> dict[str, Tensor]:
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


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state dict as safetensors, whole or not at all."""
    weights = weights_of(model)
    # not by `save_file`, whose errors do not say in a form to be tested that the disk is full
    atomic_write(path, lambda temporary: temporary.write_bytes(save(weights)))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunError: where it is missing or not JSON, naming it.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
