"""What `predict` reads: each kind of input gives the same batch, each bad one an error that says what is expected."""

import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pkd_lightning.errors import InputError, PKDError
from pkd_lightning.inputs import read_inputs
from pkd_lightning.tasks import ImageClassification, SignalClassification
from tests.outside.counts import LogCounts

GREY = ImageClassification((1, 6, 4), 5, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
COLOUR = ImageClassification((3, 6, 4), 5, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
FIVE = ImageClassification((5, 6, 4), 5, torch.zeros(5, 1, 1), torch.ones(5, 1, 1))
SIGNALS = SignalClassification((1, 7), 3, torch.zeros(1, 1), torch.ones(1, 1))
COUNTS = LogCounts((4,), 4, 1.0)


def images(count: int, channels: int) -> Tensor:
    return torch.randint(0, 256, (count, channels, 6, 4), generator=torch.Generator().manual_seed(count)).byte()


def picture(image: Tensor) -> Image.Image:
    """The PIL image of (C, H, W)."""
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels)


def same(given: Any, expected: Tensor, task: Any) -> None:
    read = read_inputs(given, task)
    assert read.dtype == expected.dtype
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-4 if expected.is_floating_point() else 0)


# ---------------------------------------------------------------------------------- tensors and arrays


@pytest.mark.parametrize(("task", "channels"), [(GREY, 1), (COLOUR, 3)])
def test_one_and_many_tensors_and_arrays(task: Any, channels: int) -> None:
    many = images(3, channels)
    one = many[:1]
    for given in (one, one[0], one.numpy(), one[0].numpy(), one[0].permute(1, 2, 0).numpy(), [one], [one[0].numpy()]):
        same(given, one, task)
    for given in (many, many.numpy(), many.permute(0, 2, 3, 1).numpy(), list(many), tuple(many.numpy())):
        same(given, many, task)


def test_one_channel_may_be_left_out() -> None:
    many = images(3, 1)
    for given in (many[:, 0], many[:, 0].numpy(), list(many[:, 0]), [row.numpy() for row in many[:, 0]]):
        same(given, many, GREY)
    same(many[0, 0], many[:1], GREY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_floats_are_scaled_levels(dtype: torch.dtype) -> None:
    scaled = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=dtype).expand(2, 3, 6, 4)
    same(scaled, torch.tensor([0.0, 63.75, 127.5, 255.0]).expand(2, 3, 6, 4), COLOUR)
    if dtype != torch.bfloat16:
        same(scaled.numpy(), torch.tensor([0.0, 63.75, 127.5, 255.0]).expand(2, 3, 6, 4), COLOUR)


def test_levels_and_scaled_floats_prepare_to_the_same() -> None:
    many = images(3, 3)
    task = ImageClassification((3, 6, 4), 5, torch.full((3, 1, 1), 0.3), torch.full((3, 1, 1), 0.2))
    ours, theirs = (task.prepare(read_inputs(given, task)) for given in (many, many / 255))
    torch.testing.assert_close(ours, theirs)


def test_a_list_of_several_kinds() -> None:
    many = images(4, 3)
    mixed = [many[0], many[1].numpy(), picture(many[2]), many[3] / 255]
    same(mixed, many.float(), COLOUR)
    same(mixed[:3], many[:3], COLOUR)


def test_arrays_of_any_layout_are_read_and_left_as_they_are() -> None:
    many = images(2, 3)
    flipped = many.flip(0).numpy()[::-1]  # a negative stride
    frozen = many.numpy().copy()
    frozen.flags.writeable = False
    swapped = (many.numpy() / 255).astype(">f4")
    for given in (flipped, frozen):
        same(given, many, COLOUR)
    same(swapped, many.float(), COLOUR)
    same((many.numpy() / 255).astype(np.longdouble), many.float(), COLOUR)
    leaf = (many / 255).requires_grad_()
    assert not read_inputs(leaf, COLOUR).requires_grad


# ---------------------------------------------------------------------------------- PIL images and files


@pytest.mark.parametrize(("task", "channels"), [(GREY, 1), (COLOUR, 3)])
def test_pictures_files_and_bytes(task: Any, channels: int, tmp_path: Path) -> None:
    (image,) = images(1, channels)
    picture(image).save(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    for given in (picture(image), tmp_path / "one.png", str(tmp_path / "one.png"), content, [tmp_path / "one.png"]):
        same(given, image[None], task)


def test_colours_and_greys_are_converted_as_pillow_does() -> None:
    (grey,), (colour,) = images(1, 1), images(1, 3)
    same(picture(grey), grey.expand(3, 6, 4)[None], COLOUR)
    same(picture(colour), torch.from_numpy(np.array(picture(colour).convert("L")))[None, None], GREY)
    clear = picture(colour).convert("RGBA")
    same(clear, colour[None], COLOUR)
    black_and_white = picture(grey).convert("1")
    assert set(read_inputs(black_and_white, GREY).flatten().tolist()) <= {0, 255}
    palette = picture(grey).convert("P")
    same(palette, grey[None], GREY)


def test_sixteen_bits_are_scaled_to_eight() -> None:
    levels = np.array([[0, 257, 457, 65535]] * 6, np.uint16)  # 457 / 257 = 1.8
    for kind in ("<u2", ">u2"):
        same(Image.fromarray(levels.astype(kind)), torch.tensor([0, 1, 2, 255]).expand(1, 1, 6, 4).byte(), GREY)


def test_a_picture_of_another_size_is_resized_with_antialiasing_and_it_is_said(caplog: Any, tmp_path: Path) -> None:
    stripes = np.zeros((60, 40), np.uint8)
    stripes[:, ::2] = 255  # nearest pixels, or no antialiasing, would give 0 or 255
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    with caplog.at_level(logging.INFO):
        read = read_inputs([tmp_path / "wide.png", Image.new("L", (4, 6)), Image.new("L", (9, 9))], GREY)
    assert read.shape == (3, 1, 6, 4)
    assert 100 < float(read[0].float().mean()) < 155
    assert read[0].float().std() < 30
    assert caplog.messages == [f"resized to 4x6: {tmp_path / 'wide.png'} from 40x60, and 1 more"]


def test_resizing_overshoots_no_edge() -> None:
    edge = np.full((60, 40), 100, np.uint8)
    edge[:, 18:] = 200
    levels = read_inputs(Image.fromarray(edge), GREY)
    assert (int(levels.min()), int(levels.max())) == (100, 200)


def test_a_picture_of_the_right_size_is_not_resized(caplog: Any) -> None:
    read_inputs(Image.new("L", (4, 6)), GREY)
    assert caplog.messages == []


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    (image,) = images(1, 1)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture(image).save(tmp_path / "turned.png", exif=exif)
    same(tmp_path / "turned.png", image.flip(1, 2)[None], GREY)


# ---------------------------------------------------------------------------------- other tasks


def test_signals_are_numbers_of_any_kind() -> None:
    values = torch.linspace(-3, 300, 21).reshape(3, 1, 7)
    same(values, values, SIGNALS)
    same(values[:, 0].numpy(), values, SIGNALS)
    same(values[0, 0], values[:1], SIGNALS)
    same(list(values), values, SIGNALS)
    same(values.double().numpy(), values.double(), SIGNALS)  # `prepare` makes them float32
    assert SIGNALS.prepare(read_inputs(values.double(), SIGNALS)).dtype == torch.float32


def test_a_task_of_ones_own() -> None:
    counts = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    same(counts, counts, COUNTS)
    same(counts[0].numpy(), counts[:1], COUNTS)


# ---------------------------------------------------------------------------------- bad input

NAN = torch.full((3, 6, 4), 0.5)
NAN[0, 0, 0] = float("nan")
HALF = torch.full((3, 6, 4), 0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(3, 6, 5).byte(), r"of shape \(3, 6, 5\); expected uint8 \(0 to 255\) or floats \(0 to 1\) of"),
        (torch.zeros(2, 3, 5, 4).byte(), r"of shape \(2, 3, 5, 4\); expected .*\(3, 6, 4\) or \(N, 3, 6, 4\)"),
        (torch.zeros(6, 4, 3).byte(), r"of shape \(6, 4, 3\)"),  # tensors have channels first
        (np.zeros((6, 4), np.uint8), r"of shape \(6, 4\)"),  # no grey array for a colour model
        (torch.zeros(1, 6, 4).byte(), r"of shape \(1, 6, 4\)"),
        (torch.zeros(()), r"of shape \(\)"),
        (torch.zeros(1, 2, 3, 6, 4), r"of shape \(1, 2, 3, 6, 4\)"),
        (torch.zeros(3, 6, 4).long(), r"of type torch.int64; expected uint8"),
        (torch.zeros(3, 6, 4).bool(), r"of type torch.bool"),
        (np.zeros((3, 6, 4), "complex64"), "an array of complex64"),
        (np.zeros((3, 6, 4), object), "an array of object"),
        (torch.zeros(3, 6, 4, dtype=torch.complex64), "of type torch.complex64"),
        (NAN, "image 0: holds NaN or infinite values"),
        (torch.stack([HALF, NAN]), "image 1: holds NaN or infinite values"),
        ([HALF, HALF, NAN], "image 2: holds NaN or infinite values"),
        (torch.full((3, 6, 4), float("inf")), "NaN or infinite"),
        (torch.stack([HALF, 255 * HALF]), "image 1: floats from 128 to 128, .*scaled to .0, 1.*uint8.*preprocessed"),
        (-HALF, "image 0: floats from -0.5 to -0.5"),
        ([], "there are no images; expected uint8"),
        (torch.zeros(0, 3, 6, 4).byte(), "there are no images"),
        ([torch.zeros(0, 3, 6, 4).byte()], "image 0: a batch of 0 in a list"),
        ([HALF, torch.stack([HALF, HALF])], "image 1: a batch of 2 in a list; give one image an item"),
        ([[HALF]], "image 0: cannot be read from a list; expected a tensor or a NumPy array of uint8"),
        (None, "cannot be read from a NoneType; .*PIL image, or the path"),
        (3, "cannot be read from a int"),
        (object(), "cannot be read from a object"),
        ({"image": HALF}, "cannot be read from a dict"),
        ("nowhere.png", r"nowhere.png: cannot be read \(No such file or directory\); expected the file of an image"),
        ([HALF, Path("nowhere.png")], r"nowhere.png: cannot be read"),
        (".", r"\.: cannot be read \(Is a directory\)"),
        (b"", "the bytes: is no image that Pillow can read"),
        (Image.new("F", (4, 6)), "its pixels are of Pillow's mode 'F'; expected 8 bits a channel"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_an_error_that_says_what_is_expected(given: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        read_inputs(given, COLOUR)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, PKDError)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(torch.randint(0, 256, (3, 60, 40)).byte()).save(buffer, "png")
    content = buffer.getvalue()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"cut.png: is a damaged image"):
        read_inputs(tmp_path / "cut.png", COLOUR)
    for name in ("text.png", "empty.png"):
        with pytest.raises(InputError, match=rf"{name}: is no image that Pillow can read"):
            read_inputs(tmp_path / name, COLOUR)
    with pytest.raises(InputError, match="damaged image"):
        read_inputs(content[: len(content) // 2], COLOUR)


def test_an_image_too_large_to_be_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"bomb.png: is a damaged image \(DecompressionBombError"):
        read_inputs(tmp_path / "bomb.png", GREY)


def test_channels_that_no_picture_has() -> None:
    with pytest.raises(InputError, match="no picture has 5 channels"):
        read_inputs(Image.new("L", (4, 6)), FIVE)
    assert read_inputs(torch.zeros(5, 6, 4).byte(), FIVE).shape == (1, 5, 6, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            torch.zeros(2, 8),
            r"of shape \(2, 8\); expected numbers of shape \(1, 7\) or \(N, 1, 7\) or \(7\)",
        ),
        (torch.full((2, 7), float("nan")), "input 0: holds NaN"),
        ("wave.png", "cannot be read from a str; expected a tensor or a NumPy array of numbers"),
        (b"", "cannot be read from a bytes"),
        (Image.new("L", (7, 1)), "cannot be read from a Image"),
        ([], "there are no inputs"),
    ],
)
def test_what_is_no_signal(given: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_inputs(given, SIGNALS)


def test_pillow_is_imported_where_there_is_a_picture_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert read_inputs(torch.zeros(1, 6, 4).byte(), GREY).shape == (1, 1, 6, 4)
    with pytest.raises(ImportError):
        read_inputs("one.png", GREY)
