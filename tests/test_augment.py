import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from pkd_lightning.data.augment import affine, crop_flip, shift

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


@pytest.mark.parametrize("erase", [2, 3])
def test_squares_are_erased_around_every_pixel_evenly(erase):
    """Whole ones inside, cut ones at the border; through all channels, and nothing else changes."""
    images = coded(1, channels=2, height=4, width=5).expand(6000, -1, -1, -1)
    results = crop_flip(images, generator(), padding=0, flip=False, erase=erase)
    changed = results != images
    assert (results[changed] == 0).all()
    assert torch.equal(changed[:, 0], changed[:, 1])
    seen, counts = changed[:, 0].flatten(1).unique(dim=0, return_counts=True)
    expected = set()
    for y in range(4):
        for x in range(5):
            inside = torch.zeros(4, 5, dtype=torch.bool)
            top, left = y - erase // 2, x - erase // 2
            inside[max(0, top) : top + erase, max(0, left) : left + erase] = True
            expected.add(tuple(inside.flatten().tolist()))
    assert {tuple(one.tolist()) for one in seen} == expected
    assert len(expected) == 20
    assert (counts - 300).abs().max() < 6 * 300**0.5
    assert torch.equal(crop_flip(images, generator(), erase=0), crop_flip(images, generator()))


def test_squares_are_erased_after_crop_and_flip():
    """Which are those without squares, where these are not."""
    images = coded(64, channels=3)
    plain, erased = (crop_flip(images, generator(3), padding=1, erase=side) for side in (0, 5))
    changed = plain != erased
    assert (erased[changed] == 0).all()
    assert changed.flatten(1).any(1).all()


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


@pytest.mark.parametrize("augment", [crop_flip, shift, affine])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_dtype_shape_and_input_are_kept(augment, dtype):
    images = torch.randint(1, 256, (5, 3, 4, 6), generator=generator()).to(dtype)
    before = images.clone()
    result = augment(images, generator())
    assert result.dtype == dtype
    assert result.shape == images.shape
    assert torch.equal(images, before)
    same = augment(images.double(), generator())  # the dtype does not change the draw
    assert torch.equal(result.double(), same if dtype.is_floating_point else same.round())


@pytest.mark.parametrize("augment", [crop_flip, shift, affine])
def test_the_generator_alone_decides(augment):
    images = coded(32)
    first = augment(images, generator(1))
    torch.manual_seed(5)
    assert torch.equal(first, augment(images, generator(1)))
    assert not torch.equal(first, augment(images, generator(2)))
    one = generator(1)
    assert not torch.equal(augment(images, one), augment(images, one))


@pytest.mark.parametrize("augment", [crop_flip, shift, affine])
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(augment, batch):
    assert augment(coded(batch), generator()).shape == (batch, 1, SIDE, SIDE)


@pytest.mark.parametrize(
    ("shape", "padding", "erase"), [((3, 8, 8), 1, 0), ((2, 3, 8, 8), -1, 0), ((2, 3, 8, 8), 0, -2)]
)
def test_wrong_arguments_are_named(shape, padding, erase):
    with pytest.raises(ValueError, match=rf"{shape[0]}.*padding {padding} and erase {erase}"):
        crop_flip(torch.zeros(shape), generator(), padding, erase=erase)


# ---------------------------------------------------------------------------------- affine

NONE = {"degrees": 0.0, "scale": 0.0, "shear": 0.0, "pixels": 0.0, "elastic": 0.0}
STRONG = {"degrees": 25.0, "scale": 0.3, "shear": 20.0, "pixels": 2.5}


def centred(height: int, width: int) -> Tensor:
    """(2, height, width): x and y of each pixel from the image's centre, float64."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.stack([x - (width - 1) / 2, y - (height - 1) / 2])


class Seen(NamedTuple):
    """What `affine` made of probes: bilinear sampling leaves x and y, as pixel values, exact inside the image.

    source: (batch, 2, height, width) the place each pixel comes from; inside: (batch, height, width) where that holds;
    picture, result: (batch, height, width) random pixels before and after.
    """

    source: Tensor
    inside: Tensor
    picture: Tensor
    result: Tensor


def see(batch: int, height: int = 17, width: int = 20, seed: int = 0, **strengths: float) -> Seen:
    picture = torch.rand(batch, height, width, generator=generator(seed + 100)) * 255
    places = centred(height, width).float().expand(batch, -1, -1, -1)
    images = torch.cat([places, torch.ones(batch, 1, height, width), picture[:, None]], 1)
    result = affine(images, generator(seed), **{**NONE, **strengths})
    return Seen(result[:, :2].double(), result[:, 2] > 1 - 1e-6, picture, result[:, 3])


def maps(seen: Seen) -> tuple[Tensor, Tensor]:
    """By least squares, (batch, 2, 2) A and (batch, 2) t of p -> A p + t, where a pixel goes."""
    places = torch.cat([centred(*seen.inside.shape[1:]), torch.ones(1, *seen.inside.shape[1:])])
    fits = []
    for source, inside in zip(seen.source, seen.inside, strict=True):
        fit = torch.linalg.lstsq(places[:, inside].T, source[:, inside].T).solution
        assert (places[:, inside].T @ fit - source[:, inside].T).abs().max() < 1e-4
        fits.append(fit.T)
    forward = torch.stack(fits)[:, :, :2].inverse()
    return forward, -(forward @ torch.stack(fits)[:, :, 2:]).squeeze(2)


def parameters(seen: Seen) -> dict[str, Tensor]:
    """Degrees, scales (batch, 2) minus 1, shear and translation (batch, 2): A = rotation @ shear @ scales."""
    a, t = maps(seen)
    angle = torch.atan2(a[:, 1, 0], a[:, 0, 0])
    cos, sin = angle.cos(), angle.sin()
    scales = torch.stack([a[:, :, 0].norm(dim=1), -sin * a[:, 0, 1] + cos * a[:, 1, 1]], 1)
    shear = torch.atan((cos * a[:, 0, 1] + sin * a[:, 1, 1]) / scales[:, 1])
    return {"degrees": angle.rad2deg(), "scale": scales - 1, "shear": shear.rad2deg(), "pixels": t}


def bilinear(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Float64 bilinear values of one (height, width) image, zero outside, at places measured from its centre."""
    height, width = image.shape
    x, y = x + (width - 1) / 2, y + (height - 1) / 2
    total = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            weight = (1 - (y - row).abs()).clamp(min=0) * (1 - (x - column).abs()).clamp(min=0)
            total += weight * image[row, column].double()
    return total


@pytest.mark.parametrize("strengths", [*({name: limit} for name, limit in STRONG.items()), STRONG], ids=", ".join)
def test_strengths_of_affine_are_filled_evenly_and_nothing_else_moves(strengths):
    for name, values in parameters(see(600, **strengths)).items():
        if name not in strengths:
            assert values.abs().max() < 2e-4
            continue
        relative = values / strengths[name]
        assert 0.97 < relative.abs().max() < 1 + 1e-4
        # five standard deviations of the mean, and of the mean square, of 600 even draws
        assert relative.mean(0).abs().max() < 5 * (1 / 3 / 600) ** 0.5
        assert (relative.square().mean(0) - 1 / 3).abs().max() < 5 * (4 / 45 / 600) ** 0.5
        if values.dim() == 2:  # both directions are drawn apart
            assert abs(float(torch.corrcoef(values.T)[0, 1])) < 5 / 600**0.5


def test_affine_agrees_with_torchvision():
    seen = see(24, **{**STRONG, "scale": 0.0})  # torchvision scales both sides alike
    found = parameters(seen)
    for k, (picture, result) in enumerate(zip(seen.picture, seen.result, strict=True)):
        expected = torchvision.affine(
            picture[None], float(found["degrees"][k]), found["pixels"][k].tolist(), 1.0,
            [-float(found["shear"][k]), 0.0], InterpolationMode.BILINEAR,
        )  # fmt: skip
        torch.testing.assert_close(result[None], expected, rtol=0, atol=0.02)


def test_affine_agrees_with_a_float64_computation():
    seen = see(12, **STRONG)
    forward, t = maps(seen)
    places = centred(*seen.picture.shape[1:])
    for k, (picture, result) in enumerate(zip(seen.picture, seen.result, strict=True)):
        x, y = torch.einsum("ij,jhw->ihw", forward[k].inverse(), places - t[k][:, None, None])
        torch.testing.assert_close(result.double(), bilinear(picture, x, y), rtol=0, atol=0.02)
    assert (seen.result == 0).any()  # zeros came in


def test_elastic_pixels_come_from_where_they_say():
    seen = see(12, **STRONG, elastic=1.0)
    assert seen.inside.double().mean() > 0.5
    for (x, y), inside, picture, result in zip(*seen, strict=True):
        torch.testing.assert_close(result[inside].double(), bilinear(picture, x[inside], y[inside]), rtol=0, atol=0.02)


def test_elastic_displacements_are_smooth_and_of_the_given_deviation():
    images, strength = 3000, 0.8
    seen = see(images, 28, 28, elastic=strength)
    inner = slice(4, 24)  # five deviations from the border
    assert seen.inside[:, inner, inner].all()
    moved = (seen.source - centred(28, 28))[:, :, inner, inner] / strength
    noise = 5 / images**0.5  # five standard deviations, roughly, of the estimates
    assert moved.mean(0).abs().max() < noise
    assert (moved.square().mean(0) - 1).abs().max() < 1.5 * noise
    assert (moved[:, 0] * moved[:, 1]).mean(0).abs().max() < noise  # the two directions are independent
    along, across = moved.diff(dim=3), moved.diff(dim=2)
    assert max(along.square().mean(0).max(), across.square().mean(0).max()) < 0.2**2  # neighbours move together
    assert (moved[..., 0, 0] * moved[..., -1, -1]).mean(0).abs().max() < noise  # and corners apart
    assert (moved[..., 0] * moved[..., -1]).mean((0, 2)).abs().max() < 0.05 + noise


def test_elastic_changes_nothing_of_the_rest():
    plain, bent = see(8, **STRONG), see(8, **STRONG, elastic=1e-3)
    both = (plain.inside & bent.inside)[:, None].expand(-1, 2, -1, -1)
    assert 0 < (plain.source - bent.source)[both].abs().max() < 0.01


def test_affine_treats_samples_alone_and_channels_together():
    one = torch.randint(0, 256, (1, 1, 12, 12), generator=generator(), dtype=torch.uint8)
    results = affine(one.expand(64, 3, -1, -1), generator(), elastic=1.0)
    assert torch.equal(results, results[:, :1].expand(-1, 3, -1, -1))
    assert len(results.flatten(1).unique(dim=0)) == 64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_affine_without_strength_is_the_identity(dtype):
    images = (torch.rand(5, 2, 9, 6, generator=generator(), dtype=torch.float64) * 255).to(dtype)
    result = affine(images, generator(), **NONE)
    assert torch.equal(result, images)
    assert result is not images
    if dtype == torch.uint8:  # rounded, not truncated: where almost nothing happens, nothing does
        assert torch.equal(affine(images, generator(), *[1e-5] * 5), images)


@pytest.mark.parametrize("name", list(NONE))
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_each_wrong_strength_is_named(name, value):
    with pytest.raises(ValueError, match=f"affine: {name}={value}: must be at least 0 and below [^;]*$"):
        affine(torch.zeros(2, 1, 8, 8), generator(), **{name: value})


def test_all_wrong_arguments_of_affine_are_named_at_once():
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\).*degrees=360.*scale=1: must .* below 1; shear=90"):
        affine(torch.zeros(3, 8, 8), generator(), degrees=360, scale=1, shear=90)
