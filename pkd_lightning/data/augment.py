"""Augmentation of whole batches: no Python loop over samples, and all randomness from the given generator."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def crop_flip(images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Crop each sample at random from its zero-padded self, and mirror half of them left to right.

    Args:
        images: (batch, channels, height, width), any dtype; left unchanged.
        generator: source of the offsets and flips. It may live on another device than `images`: a CPU generator
            draws the same augmentation whatever the device.
        padding: pixels of zeros added on each side; each sample moves by -padding..padding in each direction.
        flip: mirror each sample with probability 0.5.

    Returns:
        A tensor like `images`, each sample with its own offset and flip.

    Raises:
        ValueError: `images` is not 4-dimensional, or `padding` is negative.
    """
    if images.dim() != 4 or padding < 0:
        raise ValueError(
            "crop_flip needs images (batch, channels, height, width) and padding >= 0; "
            f"got shape {tuple(images.shape)} and padding {padding}"
        )
    batch, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, batch), generator=generator, device=generator.device)
    rows, columns = offsets.to(images.device)
    # (batch, channels, 2 padding + 1, 2 padding + 1, height, width): a view of every possible crop, nothing copied
    crops = pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    cropped = crops[torch.arange(batch, device=images.device), :, rows, columns]
    if not flip:
        return cropped
    mirrored = torch.rand(batch, generator=generator, device=generator.device).to(images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], cropped.flip(3), cropped)


def shift(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Move each sample by -pixels..pixels in each direction, zeros coming in: `crop_flip` without the flip."""
    return crop_flip(images, generator, padding=pixels, flip=False)
