"""Inputs as users have them: tensors, NumPy arrays, PIL images, files; one or many. They become a batch for a task.

Images are 8-bit levels, 0 to 255, as in data sets. Floats are read as levels scaled to [0, 1].
"""

import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pkd_lightning.errors import InputError
from pkd_lightning.tasks import ImageClassification, Task

if TYPE_CHECKING:  # Pillow is imported where there are files or images of its own
    from PIL.Image import Image

logger = logging.getLogger(__name__)

One: TypeAlias = Union[Tensor, NDArray[Any], "Image", str, "os.PathLike[str]", bytes]
Inputs: TypeAlias = One | Sequence[One]
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
LEVELS = 255


def read_inputs(given: Inputs, task: Task) -> Tensor:
    """One input or many as a batch (N, *task.input_shape) for `task.prepare`.

    Args:
        given: a tensor or an array of one input or of N; for images also a PIL image, the path of a file, or a file's
            bytes. Or a list of inputs, each of any of these kinds.

            *Tensors and arrays* have the task's shape. One channel may be left out, and arrays of images may have
            their channels last. Images are uint8, or floats in [0, 1], which are read as level / 255.

            *Files and PIL images* are turned as their EXIF data say, and converted by Pillow to the task's number of
            channels. They are resized (bilinear, antialiased, proportions not kept) to the task's size, and a warning
            in the log says so. Of several frames the first is read.
        task: says what is expected.

    Raises:
        InputError: where there is none, or one cannot be read, naming it and what is expected.
    """
    reader = _Reader(task)
    if isinstance(given, (list, tuple)):
        parts = [reader.read(item, f"{reader.noun} {i}") for i, item in enumerate(given)]
        for i, part in enumerate(parts):
            if len(part) != 1:
                raise InputError(f"{reader.noun} {i}: a batch of {len(part)} in a list; give one {reader.noun} an item")
    else:
        parts = [reader.read(given, "")]
    if sum(map(len, parts)) == 0:
        raise InputError(f"there are no {reader.noun}s; expected {reader.expected}")
    reader.say_what_was_resized()
    devices = {part.device for part in parts}
    return torch.cat([part.cpu() for part in parts] if len(devices) > 1 else parts)  # levels among floats become floats


class _Reader:
    """Reads inputs for a task, each as a batch, and notes which were resized."""

    def __init__(self, task: Task) -> None:
        self.shape = tuple(task.input_shape)
        self.images = isinstance(task, ImageClassification)
        self.noun = "image" if self.images else "input"
        self.resized: list[str] = []

    @property
    def expected(self) -> str:
        """What a tensor or an array must be."""
        size = ", ".join(map(str, self.shape))
        shapes = [f"({size})", f"(N, {size})"]
        if self.shape[0] == 1:
            inner = ", ".join(map(str, self.shape[1:]))
            shapes += [f"({inner})", f"(N, {inner})"]
        if not self.images:
            return f"numbers of shape {' or '.join(shapes)}"
        last = ", ".join(map(str, (*self.shape[1:], self.shape[0])))
        kinds = "uint8 (0 to 255) or floats (0 to 1)"
        return f"{kinds} of shape {' or '.join(shapes)}, of NumPy also ({last}) or (N, {last})"

    def read(self, item: object, where: str) -> Tensor:
        """A batch of one or more inputs; `where` names the item, "" where it is all that is given."""
        if isinstance(item, Tensor):
            return self._values(item.detach(), where, channels_last=False)
        if isinstance(item, np.ndarray):
            return self._values(self._tensor(item, where), where, channels_last=self.images)
        kind = type(item).__name__
        if self.images and isinstance(item, (str, os.PathLike, bytes)):
            return self._file(item, where)
        if self.images and not isinstance(item, (list, tuple, int, float, type(None))):
            from PIL import Image

            if isinstance(item, Image.Image):
                return self._picture(item, where or "the image")
        files = ", a PIL image, or the path or bytes of an image's file" if self.images else ""
        raise InputError(
            f"{self._at(where)}cannot be read from a {kind}; expected a tensor or a NumPy array of {self.expected}"
            f"{files}; or a list of these"
        )

    def _at(self, where: str, row: int | None = None) -> str:
        """The beginning of a message: which input it is about."""
        if row is not None and not where:
            return f"{self.noun} {row}: "
        return f"{where}: " if where else ""

    def _tensor(self, array: NDArray[Any], where: str) -> Tensor:
        if array.dtype.kind not in "biuf":
            raise InputError(f"{self._at(where)}an array of {array.dtype}; expected {self.expected}")
        # a copy of its own: torch takes neither negative strides, other byte orders nor long floats
        if array.dtype.kind == "f" and array.dtype.itemsize not in (2, 4, 8):
            array = array.astype(np.float64)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))

    def _values(self, values: Tensor, where: str, channels_last: bool) -> Tensor:
        """The batch that a tensor is, of its own type; floats of images as levels."""
        batch = self._batch(values, channels_last)
        if batch is None:
            raise InputError(f"{self._at(where)}of shape {tuple(values.shape)}; expected {self.expected}")
        if self.images and batch.dtype != torch.uint8 and not batch.is_floating_point():
            raise InputError(f"{self._at(where)}of type {values.dtype}; expected {self.expected}")
        if not batch.is_floating_point() or batch.numel() == 0:
            return batch
        flat = batch.flatten(1)
        for row in (~flat.isfinite().all(1)).nonzero()[:1, 0].tolist():
            raise InputError(f"{self._at(where, row)}holds NaN or infinite values; expected {self.expected}")
        if not self.images:
            return batch
        low, high = flat.amin(1), flat.amax(1)
        for row in ((low < 0) | (high > 1)).nonzero()[:1, 0].tolist():
            raise InputError(
                f"{self._at(where, row)}floats from {float(low[row]):.3g} to {float(high[row]):.3g}, and floats are"
                f" read as levels scaled to [0, 1]. Give levels of 0 to 255 as uint8; what is already preprocessed goes"
                f" to the ensemble itself: ensemble(x)"
            )
        return batch.to(torch.float32) * LEVELS

    def _batch(self, values: Tensor, channels_last: bool) -> Tensor | None:
        """`values` as (N, *shape); None where they are of another shape."""
        given, shape = tuple(values.shape), self.shape
        if given == shape:
            return values[None]
        if given[1:] == shape and values.ndim == len(shape) + 1:
            return values
        if shape[0] == 1 and given == shape[1:]:
            return values[None, None]
        if shape[0] == 1 and values.ndim == len(shape) and given[1:] == shape[1:]:
            return values[:, None]
        if channels_last and given[-3:] == (*shape[1:], shape[0]) and values.ndim in (3, 4):
            return (values if values.ndim == 4 else values[None]).permute(0, 3, 1, 2).contiguous()
        return None

    def _file(self, item: "str | os.PathLike[str] | bytes", where: str) -> Tensor:
        """The image in a file, or in its bytes."""
        from PIL import Image, UnidentifiedImageError

        if isinstance(item, bytes):
            place, source = where or "the bytes", io.BytesIO(item)
        else:
            path = Path(item).expanduser()
            place = str(path)
            try:
                source = io.BytesIO(path.read_bytes())
            except OSError as error:
                raise InputError(
                    f"{place}: cannot be read ({error.strerror}); expected the file of an image"
                ) from error
        try:
            with Image.open(source) as picture:
                picture.load()
                return self._picture(picture, place)
        except InputError:
            raise
        except UnidentifiedImageError as error:
            raise InputError(f"{place}: is no image that Pillow can read; expected PNG, JPEG or the like") from error
        except Exception as error:  # of a damaged file: each of Pillow's formats has its own
            raise InputError(f"{place}: is a damaged image ({type(error).__name__}: {error})") from error

    def _picture(self, picture: "Image", where: str) -> Tensor:
        """A PIL image as uint8 (1, C, H, W)."""
        from PIL import Image, ImageOps

        channels, height, width = self.shape
        mode = MODES.get(channels)
        if mode is None:
            raise InputError(f"{where}: no picture has {channels} channels; expected {self.expected}")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # Pillow would cut its levels off at 255
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        elif picture.mode in ("I", "F"):
            raise InputError(f"{where}: its pixels are of Pillow's mode {picture.mode!r}; expected 8 bits a channel")
        if picture.mode != mode:
            picture = picture.convert(mode)
        if picture.size != (width, height):
            self.resized.append(f"{where} from {picture.size[0]}x{picture.size[1]}")
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.array(picture).reshape(1, height, width, channels)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def say_what_was_resized(self) -> None:
        """One line in the log, where any was."""
        if self.resized:
            more = f", and {len(self.resized) - 1} more" if len(self.resized) > 1 else ""
            logger.warning("resized to %dx%d: %s%s", self.shape[2], self.shape[1], self.resized[0], more)
