"""Augmentation of whole batches: no Python loop over samples, and all randomness from the given generator."""

import math

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

ELASTIC_LENGTH = 1 / 7  # what noise is smoothed over, in image sides: 4 pixels of 28, as in Simard et al. (2003)
ELASTIC_NODES = 6  # points a side where noise is drawn: 1.4 such lengths apart, close enough for a smooth field


def crop_flip(
    images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True, erase: int = 0
) -> Tensor:
    """Crop each sample at random from its zero-padded self, mirror half of them left to right, and erase a square.

    Args:
        images: (batch, channels, height, width), any dtype; left unchanged.
        generator: source of the offsets and flips. It may live on another device than `images`: a CPU generator
            draws the same augmentation whatever the device.
        padding: pixels of zeros added on each side; each sample moves by -padding..padding in each direction.
        flip: mirror each sample with probability 0.5.
        erase: side of the square of zeros, in pixels, whose centre may be any pixel, so that some of it may lie outside
            (cutout, arXiv 1708.04552); 0 for none.

    Returns:
        A tensor like `images`, each sample with its own offset, flip and square.

    Raises:
        ValueError: `images` is not 4-dimensional, or `padding` or `erase` is negative.
    """
    if images.dim() != 4 or padding < 0 or erase < 0:
        raise ValueError(
            "crop_flip needs images (batch, channels, height, width), padding >= 0 and erase >= 0; "
            f"got shape {tuple(images.shape)}, padding {padding} and erase {erase}"
        )
    batch, channels, height, width = images.shape
    if batch == 0:
        return images.clone()
    rows, columns = torch.randint(2 * padding + 1, (2, batch), generator=generator, device=generator.device)
    padded = pad(images, (padding,) * 4)
    # In each channel a crop is `height` runs of `width` pixels that lie side by side: gathering those copies memory by
    # runs, three times as fast as indexing pixels.
    line = width + 2 * padding
    lines = torch.arange(0, padded.numel(), line, device=images.device).view(batch, channels, -1)[:, :, :height]
    starts = lines + (rows * line + columns).to(images.device)[:, None, None]
    cropped = padded.flatten().unfold(0, width, 1).index_select(0, starts.flatten()).view(images.shape)
    if flip:
        mirrored = torch.rand(batch, generator=generator, device=generator.device).to(images.device) < 0.5
        both = torch.cat([cropped, cropped.flip(3)])
        cropped = both.index_select(0, torch.arange(batch, device=images.device) + batch * mirrored)
    if erase:
        inside = [
            _square(size, erase, torch.randint(size, (batch,), generator=generator, device=generator.device))
            for size in (height, width)
        ]
        down, across = (one.to(images.device) for one in inside)
        cropped.masked_fill_((down[:, :, None] & across[:, None, :])[:, None], 0)
    return cropped


def _square(size: int, side: int, centres: Tensor) -> Tensor:
    """(batch, size) bool, which places along one direction lie in squares of that side around the centres (batch,)."""
    first = centres[:, None] - side // 2
    places = torch.arange(size, device=centres.device)
    return (places >= first) & (places < first + side)


def shift(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Move each sample by -pixels..pixels in each direction, zeros coming in: `crop_flip` without the flip."""
    return crop_flip(images, generator, padding=pixels, flip=False)


def affine(
    images: Tensor,
    generator: torch.Generator,
    degrees: float = 10.0,
    scale: float = 0.1,
    shear: float = 5.0,
    pixels: float = 2.0,
    elastic: float = 0.0,
) -> Tensor:
    """Scale, shear, rotate and move each sample about its centre, in this order, and bend it; zeros come in.

    A pixel at p from the centre goes to R H S p + t: S = diag(s_x, s_y), H = [[1, tan(phi)], [0, 1]], R a rotation.
    These numbers are drawn evenly, for each sample its own. Values between pixels are bilinear, computed in float32.

    Args:
        images: (batch, channels, height, width), any real dtype; left unchanged.
        generator: source of all draws; see `crop_flip`.
        degrees: rotation by -degrees..degrees.
        scale: s_x and s_y in 1 - scale..1 + scale, drawn apart.
        shear: phi in -shear..shear degrees.
        pixels: t in -pixels..pixels in each direction, fractions included.
        elastic: standard deviation, in pixels, of a smooth random displacement in each direction (Simard et al., Best
            Practices for Convolutional Neural Networks, ICDAR 2003; their alpha = 34, as commonly implemented, is about
            1.4 pixels). The rest of the transformation does not depend on it.

    Returns:
        A tensor like `images`, rounded where its dtype has no fractions; with all strengths 0, equal to `images`.

    Raises:
        ValueError: `images` is not 4-dimensional, or a strength is out of range.
    """
    strengths = {
        "degrees": (degrees, 360),
        "scale": (scale, 1),
        "shear": (shear, 90),
        "pixels": (pixels, math.inf),
        "elastic": (elastic, math.inf),
    }
    faults = [
        f"{name}={value}: must be at least 0 and below {limit}"
        for name, (value, limit) in strengths.items()
        if not 0 <= value < limit
    ]
    if images.dim() != 4:
        faults.insert(0, f"images of shape {tuple(images.shape)}: must be (batch, channels, height, width)")
    if faults:
        raise ValueError(f"affine: {'; '.join(faults)}")
    if images.numel() == 0 or not any((degrees, scale, shear, pixels, elastic)):
        return images.clone()
    batch, _, height, width = images.shape
    device = generator.device
    even = torch.rand(batch, 6, generator=generator, device=device) * 2 - 1
    angle, slope = even[:, 0] * math.radians(degrees), (even[:, 1] * math.radians(shear)).tan()
    cos, sin = angle.cos(), angle.sin()
    stretch, move = 1 + scale * even[:, 2:4], pixels * even[:, 4:]
    # grid_sample measures x and y from the centre, in halves of the image
    unit = torch.tensor([2 / width, 2 / height], device=device)[:, None]
    inverse = torch.stack([cos + slope * sin, sin - slope * cos, -sin, cos], 1).view(batch, 2, 2)
    inverse = inverse / stretch[:, :, None] * unit
    across = _centred(width, device) - move[:, :1]  # (batch, width)
    down = _centred(height, device) - move[:, 1:]  # (batch, height)
    # where each pixel comes from, (batch, x and y, height, width). For 128 MNIST images torch's affine_grid alone takes
    # 1 ms, all of this 0.5 ms.
    grid = inverse[:, :, :1, None] * across[:, None, None, :] + inverse[:, :, 1:, None] * down[:, None, :, None]
    if elastic:
        noise = torch.randn(batch, 2, ELASTIC_NODES, ELASTIC_NODES, generator=generator, device=device)
        noise = noise * (elastic * unit)[:, :, None]
        grid += _smoothing(height, device) @ (noise @ _smoothing(width, device).T)
    grid = grid.permute(0, 2, 3, 1).to(images.device)
    result = grid_sample(images.float(), grid, padding_mode="zeros", align_corners=False)
    return (result if images.is_floating_point() else result.round_()).to(images.dtype)


def _centred(size: int, device: torch.device) -> Tensor:
    """Where the pixels of a side lie, from its middle."""
    return torch.arange(size, device=device) - (size - 1) / 2


def _smoothing(size: int, device: torch.device) -> Tensor:
    """(size, nodes): from normal noise on nodes along a side to smooth noise on its pixels, each of variance 1."""
    nodes = torch.linspace(-0.5, 0.5, ELASTIC_NODES, device=device)
    distances = _centred(size, device)[:, None] / size - nodes
    weights = (-0.5 * (distances / ELASTIC_LENGTH) ** 2).exp()
    return weights / weights.square().sum(1, keepdim=True).sqrt()
