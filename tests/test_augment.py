import pytest
import torch
from torch import Tensor

from pkd_lightning.data.augment import crop_flip, shift

SIDE = 7


def coded(batch: int, channels: int = 1, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Images whose pixels are all different and none 0, so that a crop tells where each pixel came from."""
    return torch.arange(1, batch * channels * height * width + 1).reshape(batch, channels, height, width)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """One (C, H, W) image moved by whole pixels, zeros coming in."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    kept = image[:, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    result[:, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = kept
    return result


def explanations(image: Tensor, result: Tensor, padding: int) -> list[tuple[int, int, bool]]:
    """Every (down, right, mirrored) that turns `image` into `result`."""
    moves = range(-padding, padding + 1)
    return [
        (down, right, mirrored)
        for down in moves
        for right in moves
        for mirrored in (False, True)
        if torch.equal(result, moved(image, down, right).flip(2) if mirrored else moved(image, down, right))
    ]


def explain_all(images: Tensor, results: Tensor, padding: int) -> list[tuple[int, int, bool]]:
    found = [explanations(image, result, padding) for image, result in zip(images, results, strict=True)]
    assert all(len(each) == 1 for each in found)
    return [each[0] for each in found]


@pytest.mark.parametrize("padding", [1, 2])
def test_crop_flip_yields_every_crop_and_flip_evenly(padding):
    images = coded(1).expand(4000, -1, -1, -1)
    results = crop_flip(images, generator(), padding=padding)
    kinds, counts = results.flatten(1).unique(dim=0, return_counts=True)
    seen = {explanations(images[0], kind.view(1, SIDE, SIDE), padding)[0] for kind in kinds}
    possible = 2 * (2 * padding + 1) ** 2
    assert len(seen) == possible
    expected = 4000 / possible
    assert (counts - expected).abs().max() < 6 * expected**0.5  # six standard deviations of a Poisson count


def test_crop_flip_treats_samples_alone_and_channels_together():
    images = coded(64, channels=3, height=6, width=8)
    found = explain_all(images, crop_flip(images, generator(), padding=2), 2)
    assert len(set(found)) > 20  # of 50; one offset for all would give 1


def test_default_crop_flip_moves_by_four_and_flips():
    images = coded(300, height=9, width=9)
    found = explain_all(images, crop_flip(images, generator()), 4)
    assert {max(abs(down), abs(right)) for down, right, _ in found} == {0, 1, 2, 3, 4}
    assert {mirrored for *_, mirrored in found} == {False, True}


def test_shift_moves_by_up_to_two_and_never_flips():
    images = coded(300)
    found = explain_all(images, shift(images, generator()), 2)
    assert {(down, right) for down, right, _ in found} == {(d, r) for d in range(-2, 3) for r in range(-2, 3)}
    assert not any(mirrored for *_, mirrored in found)


def test_without_padding_only_flips_remain():
    images = coded(4000)
    assert torch.equal(shift(images, generator(), pixels=0), images)
    results = crop_flip(images, generator(), padding=0)
    mirrored = (results == images.flip(3)).flatten(1).all(1)
    kept = (results == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert abs(int(mirrored.sum()) - 2000) < 160  # five standard deviations of a fair coin


@pytest.mark.parametrize("augment", [crop_flip, shift])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_dtype_shape_and_input_are_kept(augment, dtype):
    images = torch.randint(1, 256, (5, 3, 4, 6), generator=generator()).to(dtype)
    before = images.clone()
    result = augment(images, generator())
    assert result.dtype == dtype
    assert result.shape == images.shape
    assert torch.equal(images, before)
    assert torch.equal(result.double(), augment(images.double(), generator()))  # the dtype does not change the draw


@pytest.mark.parametrize("augment", [crop_flip, shift])
def test_the_generator_alone_decides(augment):
    images = coded(32)
    first = augment(images, generator(1))
    torch.manual_seed(5)
    assert torch.equal(first, augment(images, generator(1)))
    assert not torch.equal(first, augment(images, generator(2)))
    one = generator(1)
    assert not torch.equal(augment(images, one), augment(images, one))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    assert crop_flip(coded(batch), generator()).shape == (batch, 1, SIDE, SIDE)


@pytest.mark.parametrize(("shape", "padding"), [((3, 8, 8), 1), ((2, 3, 8, 8), -1)])
def test_wrong_arguments_are_named(shape, padding):
    with pytest.raises(ValueError, match=rf"{shape[0]}.*padding {padding}"):
        crop_flip(torch.zeros(shape), generator(), padding)
