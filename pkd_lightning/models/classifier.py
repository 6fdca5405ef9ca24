"""The image classifier: tokens, Mamba blocks, head."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import get_args, get_type_hints

import torch
from torch import Tensor, nn

from pkd_lightning.config import Faults, unknown_keys
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.building import ImageShape
from pkd_lightning.models.mamba import Mamba
from pkd_lightning.models.options import Direction, Head, Norm, PixelChannels, Tokeniser
from pkd_lightning.models.tokens import PatchTokens, PixelTokens, pooled_grid, possible_lengths

GRID = 2  # the `grid` head averages the tokens over a GRID x GRID raster


@dataclass(frozen=True)
class MambaClassifierConfig:
    """Options of a `MambaClassifier`.

    Attributes:
        n_blocks: number of Mamba blocks.
        d_model: channels of a token.
        d_state: state size N of the first block.
        d_state_step: block i has state size d_state + i * d_state_step (2 in Mamba-PKD's Table 1).
        d_conv: width of the causal convolution.
        expand: d_inner = expand * d_model.
        dt_rank: rank of the step-size projection; None for ceil(d_model / 16).
        tokeniser: `pixels`: average-pooled to `seq_len` scalar tokens; `patches`: a strided convolution to d_model.
        seq_len: number of tokens L (pixels only).
        pixel_channels: `one`: tokens of the mean over colour channels; `all`: every channel's plane, one after another.
        patch_size: side of a square patch (patches only).
        patch_stride: step between patches, smaller than patch_size for overlap; None for patch_size.
        norm: normalisation before each block and before the head.
        residual: add each block's input to its output.
        direction: `forward`: every block reads the tokens in order; `alternating`: every second one in reverse.
        head: `flatten`: all tokens; `mean`: their average; `grid`: their average in each cell of a 2x2 raster.
    """

    n_blocks: int = 1
    d_model: int = 1
    d_state: int = 16
    d_state_step: int = 0
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    tokeniser: Tokeniser = "pixels"
    seq_len: int | None = None
    pixel_channels: PixelChannels = "one"
    patch_size: int = 4
    patch_stride: int | None = None
    norm: Norm = "none"
    residual: bool = True
    direction: Direction = "forward"
    head: Head = "flatten"

    def faults(self, image_shape: ImageShape | None = None) -> list[str]:
        """Every reason why this model cannot be built; those that depend on the image only where its shape is given."""
        faults = Faults(self)
        for name in ("n_blocks", "d_model", "d_state", "d_conv", "expand", "patch_size"):
            faults.whole(name, 1)
        faults.whole("d_state_step", 0)
        for name in ("dt_rank", "seq_len", "patch_stride"):
            faults.whole(name, 1, optional=True)
        hints = get_type_hints(type(self))
        for name in ("tokeniser", "pixel_channels", "norm", "direction", "head"):
            faults.choice(name, get_args(hints[name]))
        faults.flag("residual")
        at_fault = {fault.split("=")[0] for fault in faults.found}
        if self.d_model == 1 and self.norm in ("rms", "layer"):
            faults.found.append(
                f"norm={self.norm!r}: over the one channel of d_model=1 it keeps at most a token's sign; use none"
            )
        if self.tokeniser == "pixels" and not at_fault & {"seq_len", "pixel_channels"}:
            faults.found += self._pixel_faults(image_shape)
        if self.tokeniser == "patches" and not at_fault & {"patch_size", "patch_stride"}:
            faults.found += self._patch_faults(image_shape)
        return faults.found

    def _pixel_faults(self, image_shape: ImageShape | None) -> list[str]:
        if self.patch_stride is not None:
            return [f"patch_stride={self.patch_stride}: the pixels tokeniser has no patches"]
        if self.seq_len is None:
            return ["seq_len=None: the pixels tokeniser needs a number of tokens"]
        if image_shape is None:
            return []
        grid = pooled_grid(image_shape, self.seq_len, self.pixel_channels)
        if grid is None:
            lengths = possible_lengths(image_shape, self.pixel_channels)
            nearest = sorted(sorted(lengths, key=lambda length: abs(length - self.seq_len))[:4])  # type: ignore[operator]
            return [
                f"seq_len={self.seq_len}: does not divide a {image_shape[1]}x{image_shape[2]} image into equal blocks;"
                f" nearest lengths that do: {', '.join(map(str, nearest))}"
            ]
        if self.head == "grid" and min(grid) < GRID:
            return [f"head='grid': {grid[0]}x{grid[1]} tokens are fewer than {GRID}x{GRID}"]
        return []

    def _patch_faults(self, image_shape: ImageShape | None) -> list[str]:
        found = []
        stride = self.patch_stride or self.patch_size
        if self.seq_len is not None:
            found.append(f"seq_len={self.seq_len}: with patches the length follows from patch_size and patch_stride")
        if stride > self.patch_size:
            found.append(f"patch_stride={stride}: larger than patch_size={self.patch_size}, pixels would be skipped")
        if image_shape is not None:
            side = min(image_shape[1:])
            if self.patch_size > side:
                found.append(f"patch_size={self.patch_size}: larger than the {image_shape[1]}x{image_shape[2]} image")
            elif self.head == "grid" and (side - self.patch_size) // stride + 1 < GRID:
                found.append(f"head='grid': fewer than {GRID}x{GRID} patches")
        return found


class MambaLayer(nn.Module):
    """One block of the classifier: optional pre-norm, Mamba, optional residual connection, optionally reversed."""

    def __init__(self, config: MambaClassifierConfig, index: int) -> None:
        super().__init__()
        self.norm = make_norm(config.norm, config.d_model)
        self.mixer = Mamba(
            config.d_model,
            config.d_state + index * config.d_state_step,
            config.d_conv,
            config.expand,
            config.dt_rank,
        )
        self.residual = config.residual
        self.reverse = config.direction == "alternating" and index % 2 == 1

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length, d_model) to (batch, length, d_model)."""
        x = self.norm(tokens)
        mixed: Tensor = self.mixer(x.flip(1)).flip(1) if self.reverse else self.mixer(x)
        return tokens + mixed if self.residual else mixed


class MambaClassifier(nn.Module):
    """Images to logits: tokeniser, Mamba blocks, head.

    With `tokeniser=pixels, d_model=1, norm=none, head=flatten` this is the classifier of Mamba-PKD (arXiv 2503.01727,
    Table 1).

    Args:
        image_shape: (channels, height, width).
        num_classes: number of classes L.
        options: the fields of `MambaClassifierConfig`.

    Raises:
        ConfigError: listing every impossible or unknown option.
    """

    def __init__(self, image_shape: ImageShape, num_classes: int, **options: object) -> None:
        super().__init__()
        faults = self.faults(options, image_shape)
        if faults:
            raise ConfigError(faults)
        config = MambaClassifierConfig(**options)  # type: ignore[arg-type]
        self.config = config
        if config.tokeniser == "pixels":
            assert config.seq_len is not None
            self.tokens: PixelTokens | PatchTokens = PixelTokens(
                image_shape, config.seq_len, config.d_model, config.pixel_channels
            )
        else:
            self.tokens = PatchTokens(
                image_shape, config.d_model, config.patch_size, config.patch_stride or config.patch_size
            )
        self.blocks = nn.Sequential(*(MambaLayer(config, i) for i in range(config.n_blocks)))
        self.norm = make_norm(config.norm, config.d_model)
        features = {"flatten": self.tokens.length, "mean": 1, "grid": GRID * GRID}[config.head] * config.d_model
        self.head = nn.Linear(features, num_classes)

    @staticmethod
    def faults(options: dict[str, object], image_shape: ImageShape | None = None) -> list[str]:
        """Every fault of `options`, unknown names included; see `MambaClassifierConfig.faults`."""
        names = [field.name for field in fields(MambaClassifierConfig)]
        known = {name: value for name, value in options.items() if name in names}
        return unknown_keys(options, names) + MambaClassifierConfig(**known).faults(image_shape)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to logits (batch, num_classes)."""
        tokens = self.norm(self.blocks(self.tokens(images)))
        logits: Tensor = self.head(self._pool(tokens))
        return logits

    def _pool(self, tokens: Tensor) -> Tensor:
        if self.config.head == "flatten":
            return tokens.flatten(1)
        if self.config.head == "mean":
            return tokens.mean(1)
        planes = tokens.transpose(1, 2).unflatten(2, self.tokens.grid)
        return torch.nn.functional.adaptive_avg_pool2d(planes, GRID).flatten(1)


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The normalisation layer over `channels` features of a token."""
    layers: dict[Norm, Callable[[int], nn.Module]] = {"none": nn.Identity, "rms": nn.RMSNorm, "layer": nn.LayerNorm}
    return layers[norm](channels)
