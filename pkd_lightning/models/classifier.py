"""The image classifier: tokens, blocks of Mamba or of another mixer, head."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

from pkd_lightning.checks import unknown_keys
from pkd_lightning.earlier import Earlier
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.blocks import Raster, StemBlocks, fused_cells, make_blocks, make_norm
from pkd_lightning.models.building import ImageShape, InputShape, path_of
from pkd_lightning.models.config import CELLS, GRID, MambaClassifierConfig
from pkd_lightning.models.mamba import LINEAR, Mamba
from pkd_lightning.models.mixers import as_read
from pkd_lightning.models.reuse import READ, ReusedTokens
from pkd_lightning.models.tokens import (
    ConvolutionTokens,
    PatchTokens,
    PixelTokens,
)


class MambaClassifier(nn.Module):
    """Images to logits: tokeniser, Mamba blocks, head.

    With `tokeniser=pixels, d_model=1, norm=none, head=flatten` this is the classifier of Mamba-PKD (arXiv 2503.01727,
    Table 1).

    Attributes:
        reads: what it reads of earlier students, see `pkd_lightning.earlier`; None where it reads none.

    Args:
        image_shape: (channels, height, width), or (channels, length) of signals, which are read as images of one row.
        num_classes: number of classes L.
        options: the fields of `MambaClassifierConfig`.

    Raises:
        ConfigError: listing every impossible or unknown option.
    """

    reads: tuple[str, ...] | None = None

    def __init__(self, image_shape: InputShape, num_classes: int, **options: object) -> None:
        super().__init__()
        faults = self.faults(options, image_shape)
        if faults:
            raise ConfigError(faults)
        image_shape = as_image(image_shape)
        config = MambaClassifierConfig(**options)  # type: ignore[arg-type]
        self.config = config
        if config.tokeniser == "pixels":
            assert config.seq_len is not None
            self.tokens: PixelTokens | PatchTokens | ConvolutionTokens = PixelTokens(
                image_shape, config.seq_len, config.d_model, config.pixel_channels
            )
        elif config.tokeniser == "convolutions":
            assert config.stem_channels is not None
            self.tokens = ConvolutionTokens(
                image_shape,
                config.d_model,
                config.stem_channels,
                config.patch_size,
                config.patch_stride or 2,
                config.padding,
                partial(StemBlocks, config) if config.stem_blocks else None,
            )
        else:
            self.tokens = PatchTokens(
                image_shape, config.d_model, config.patch_size, config.patch_stride or config.patch_size
            )
        self.blocks = make_blocks(config, self.tokens.grid)
        self.norm = make_norm(config.norm, config.d_model)
        features = {"flatten": self.tokens.length, "mean": 1, "grid": GRID * GRID}[config.head] * config.d_model
        self.head = nn.Linear(features, num_classes)
        self.reuse: ReusedTokens | None = None
        if config.reuse != "none":
            self.reads = (READ,)  # until `follow` tells it that there are none

    def follow(self, students: Sequence[nn.Module]) -> None:
        """Make the layers that read earlier students, where it has the option `reuse`; after none it reads none.

        Raises:
            ConfigError: where one is no `MambaClassifier`.
        """
        how, sources = self.config.reuse, []
        if how == "none":
            return
        for t, student in enumerate(students):
            if not isinstance(student, MambaClassifier):
                kind = path_of(type(student))
                raise ConfigError([f"reuse={how!r}: reads MambaClassifiers, and student {t + 1} is a {kind}; use none"])
            sources.append((student.tokens.grid, student.config.d_model))
        self.reads = (READ,) if sources else None
        self.reuse = ReusedTokens(how, self.config.d_model, self.tokens.grid, sources) if sources else None

    @staticmethod
    def faults(options: dict[str, object], image_shape: InputShape | None = None) -> list[str]:
        """Every fault of `options`, unknown names included; see `MambaClassifierConfig.faults`."""
        names = [field.name for field in fields(MambaClassifierConfig)]
        known = {name: value for name, value in options.items() if name in names}
        found, config = unknown_keys(options, names), MambaClassifierConfig(**known)  # type: ignore[arg-type]
        if image_shape is not None and len(image_shape) not in (2, 3):
            return [*found, *config.faults(), f"{image_shape}: it reads images (C, H, W) and signals (C, length)"]
        return found + config.faults(None if image_shape is None else as_image(image_shape))

    def forward(self, images: Tensor, earlier: Earlier = ()) -> Tensor:
        """Map images (batch, channels, height, width), or signals, to logits (batch, num_classes).

        `earlier` is what the students gave that it follows.
        """
        if images.ndim == 3:  # signals
            images = images.unsqueeze(2)
        tokens = self.tokens(images)
        if self.reuse is not None:
            tokens = self.reuse(tokens, earlier)
        elif earlier:
            raise ConfigError(["a student that has not been told which ones it follows: call its `follow` first"])
        tokens = self.raster.through(tokens)
        cells = CELLS.get(self.config.head)
        pooled = None if cells is None else fused_cells(self.norm, tokens, self.tokens.grid, cells)
        logits: Tensor = self.head(self._pool(self.norm(tokens)) if pooled is None else pooled)
        return logits

    @property
    def raster(self) -> Raster:
        """The blocks on its tokens."""
        config = self.config
        return Raster("", self.blocks, config.n_blocks, self.norm, self.tokens.grid, config.d_model, config.direction)

    def rasters(self) -> list[Raster]:
        """The blocks between the convolutions, where there are any, then those on its tokens."""
        between = getattr(self.tokens, "between", None)
        return [between.raster, self.raster] if isinstance(between, StemBlocks) else [self.raster]

    def raster_positions(self, path: str) -> Tensor | None:
        """Where in the raster each token lies that the module at `path` gives: (length,). None where in its order.

        A mixer has the order in which its block reads, and so have the linear layers of a `Mamba`. Blocks that share
        weights have that of the last call.
        """
        raster = next(raster for raster in self.rasters() if path.startswith(raster.path))
        owner, number, name, *inside = [*path.removeprefix(raster.path).split("."), "", ""]
        if owner != "blocks" or name != "mixer":
            return None
        mixer = raster.blocks[int(number)].mixer
        tokens_inside = not inside[0] or (isinstance(mixer, Mamba) and inside[0] in LINEAR)
        *_, (columns, backwards) = ((by, back) for i, by, back in raster.calls() if i == int(number))
        if not (columns or backwards) or not tokens_inside or not getattr(mixer, "reads_in_order", True):
            return None
        places = torch.arange(raster.grid[0] * raster.grid[1]).view(1, -1, 1)
        return as_read(places, raster.grid, columns, backwards).flatten()

    def _pool(self, tokens: Tensor) -> Tensor:
        if self.config.head == "flatten":
            return tokens.flatten(1)
        if self.config.head == "mean":
            return tokens.mean(1)
        planes = tokens.transpose(1, 2).unflatten(2, self.tokens.grid)
        return torch.nn.functional.adaptive_avg_pool2d(planes, GRID).flatten(1)


def as_image(shape: InputShape) -> ImageShape:
    """(channels, height, width); of a signal (channels, length), one row."""
    channels, *sides = shape
    height, width = [1, *sides][-2:]
    return channels, height, width
