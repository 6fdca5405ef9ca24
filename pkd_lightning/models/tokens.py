"""From images to token sequences."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.kernels.scan import takes
from pkd_lightning.models.building import ImageShape
from pkd_lightning.models.mamba import own_weights
from pkd_lightning.models.options import PixelChannels

SECOND_KERNEL, SECOND_STRIDE = 3, 2  # of ConvolutionTokens
FUSED = 8  # images from which on one kernel for both convolutions, of 16 at a time, is the faster way


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _grids(image_shape: ImageShape, channels: PixelChannels) -> dict[int, tuple[int, int]]:
    """Every sequence length that equal pooling blocks can give, with its most nearly square (rows, columns)."""
    planes = image_shape[0] if channels == "all" else 1
    grids: dict[int, tuple[int, int]] = {}
    # rows before columns: of two equally square rasters the one with more rows wins
    for rows in reversed(_divisors(image_shape[1])):
        for columns in _divisors(image_shape[2]):
            length = planes * rows * columns
            best = grids.get(length)
            if best is None or abs(rows - columns) < abs(best[0] - best[1]):
                grids[length] = (rows, columns)
    return grids


def pooled_grid(image_shape: ImageShape, seq_len: int, channels: PixelChannels) -> tuple[int, int] | None:
    """The (rows, columns) to pool an image to so that it gives `seq_len` tokens, or None where none divides it."""
    return _grids(image_shape, channels).get(seq_len)


def possible_lengths(image_shape: ImageShape, channels: PixelChannels) -> list[int]:
    """The sequence lengths `pooled_grid` can reach, ascending."""
    return sorted(_grids(image_shape, channels))


class PixelTokens(nn.Module):
    """Average-pools an image to `seq_len` scalars, one token each, row by row (Mamba-PKD's reading of an image).

    With d_model > 1 each scalar is embedded by one linear layer.
    """

    def __init__(self, image_shape: ImageShape, seq_len: int, d_model: int, channels: PixelChannels) -> None:
        super().__init__()
        grid = pooled_grid(image_shape, seq_len, channels)
        assert grid is not None, "checked by MambaClassifierConfig.faults"
        self.length = seq_len
        self.grid = (seq_len // grid[1], grid[1])  # with all channels, their planes lie below each other
        self.block = (image_shape[1] // grid[0], image_shape[2] // grid[1])
        self.average_channels = channels == "one" and image_shape[0] > 1
        self.embed = nn.Identity() if d_model == 1 else nn.Linear(1, d_model)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to tokens (batch, length, d_model)."""
        if self.average_channels:
            images = images.mean(1, keepdim=True)
        if self.block != (1, 1):
            images = F.avg_pool2d(images, self.block)
        tokens: Tensor = self.embed(images.flatten(1).unsqueeze(-1))
        return tokens


class PatchTokens(nn.Module):
    """One token per square patch by a strided convolution to d_model channels, row by row; patches may overlap."""

    def __init__(self, image_shape: ImageShape, d_model: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(image_shape[0], d_model, patch_size, stride)
        rows, columns = ((side - patch_size) // stride + 1 for side in image_shape[1:])
        self.grid = (rows, columns)
        self.length = rows * columns

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to tokens (batch, length, d_model)."""
        tokens: Tensor = self.project(images)
        return tokens.flatten(2).transpose(1, 2)


class ConvolutionTokens(nn.Module):
    """Two convolutions with SiLU or other layers between them, one token per position of the second, row by row.

    The first has `stem_channels` channels, kernels of patch_size and the given stride; the second has d_model channels,
    kernels of 3x3 and stride 2. For the same parameters such a stem sees far more of small images than one layer of
    patches does (cf. Xiao et al., arXiv 2106.14881).

    Args:
        image_shape: (channels, height, width).
        d_model: channels of a token.
        stem_channels: channels between the two convolutions.
        patch_size: side of the first kernel.
        stride: of the first convolution.
        padding: pad both with zeros by half their kernels; without, only whole windows count.
        between: makes what stands between them, of (rows, columns) there: a module of planes (batch, stem_channels,
            rows, columns) to the same. None for SiLU.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        d_model: int,
        stem_channels: int,
        patch_size: int,
        stride: int,
        padding: bool,
        between: Callable[[tuple[int, int]], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        grids = convolved_grids(image_shape, patch_size, stride, padding)
        assert grids is not None, "checked by MambaClassifierConfig.faults"
        self.grid = grids[1]
        self.length = self.grid[0] * self.grid[1]
        first, second = (size // 2 if padding else 0 for size in (patch_size, SECOND_KERNEL))
        self.stem = nn.Conv2d(image_shape[0], stem_channels, patch_size, stride, first)
        self.between = None if between is None else between(grids[0])
        self.project = nn.Conv2d(stem_channels, d_model, SECOND_KERNEL, SECOND_STRIDE, second)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to tokens (batch, length, d_model)."""
        fused = self._fused(images)
        if fused is not None:
            return fused
        planes = self.stem(images)
        tokens: Tensor = self.project(F.silu(planes) if self.between is None else self.between(planes))
        return tokens.flatten(2).transpose(1, 2)

    def _fused(self, images: Tensor) -> Tensor | None:
        """The tokens by one kernel; None where there is none for it, for a few images, or where a layer does more."""
        own = [own_weights(self._modules.get(name), nn.Conv2d) for name in ("stem", "project")]
        if self.between is not None or None in own or torch.is_autocast_enabled("cpu") or images.requires_grad:
            return None
        (stem, bias), (project, bias_2) = own  # type: ignore[misc]
        as_built = all(
            (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
            and all(value[0] == value[1] for value in (layer.kernel_size, layer.stride))
            and isinstance(layer.padding, tuple)
            and layer.padding[0] == layer.padding[1]
            for layer in (self.stem, self.project)
        )
        if bias is None or bias_2 is None or not as_built or not takes(images, stem, bias, project, bias_2):
            return None
        if len(images) < FUSED:  # asked last: in a graph that is exported it would be a limit of the batch
            return None
        from pkd_lightning.kernels.stem import stem_cpu  # numba takes a second to import

        layers = self.stem, self.project
        strides, paddings = ([int(getattr(x, name)[0]) for x in layers] for name in ("stride", "padding"))
        return stem_cpu(images, (stem, bias), (project, bias_2), (strides[0], strides[1]), (paddings[0], paddings[1]))


def convolved_grids(
    image_shape: ImageShape, patch_size: int, stride: int, padding: bool
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(rows, columns) after each convolution of `ConvolutionTokens`; None where the image is too small for both."""
    grids, sides = [], list(image_shape[1:])
    for size, step in ((patch_size, stride), (SECOND_KERNEL, SECOND_STRIDE)):
        sides = [(side + 2 * (size // 2 if padding else 0) - size) // step + 1 if side > 0 else 0 for side in sides]
        grids.append((sides[0], sides[1]))
    return (grids[0], grids[1]) if min(sides) > 0 else None
