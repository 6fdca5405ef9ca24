"""The image classifier: tokens, blocks of Mamba or of another mixer, head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import get_args, get_type_hints

import torch
from torch import Tensor, nn

from pkd_lightning.checks import Faults, unknown_keys
from pkd_lightning.earlier import Earlier
from pkd_lightning.errors import ConfigError
from pkd_lightning.kernels.scan import takes
from pkd_lightning.kernels.scan.order import Order
from pkd_lightning.models.building import ImageShape, InputShape, import_part, path_of
from pkd_lightning.models.mamba import LINEAR, Mamba, rms_weight
from pkd_lightning.models.mixers import MAMBA, as_read, build_mixer, in_order
from pkd_lightning.models.options import Direction, Head, Norm, PixelChannels, Reuse, Tokeniser
from pkd_lightning.models.reuse import READ, ReusedTokens
from pkd_lightning.models.tokens import (
    ConvolutionTokens,
    PatchTokens,
    PixelTokens,
    convolved_grids,
    pooled_grid,
    possible_lengths,
)

CELLS: dict[Head, int] = {"mean": 1, "grid": 2}  # on each side, over which these heads average
IN_STEM = "tokens.between."  # before the paths of the modules of `StemBlocks`
GRID = CELLS["grid"]  # the `grid` head averages the tokens over a GRID x GRID raster
# in which orders the blocks read the tokens' raster, one block after another: (by columns, backwards)
ORDERS: dict[Direction, tuple[tuple[bool, bool], ...]] = {
    "forward": ((False, False),),
    "alternating": ((False, False), (False, True)),
    "cross": ((False, False), (False, True), (True, False), (True, True)),
}


@dataclass(frozen=True)
class MambaClassifierConfig:
    """Options of a `MambaClassifier`.

    Attributes:
        n_blocks: number of blocks.
        d_model: channels of a token.
        d_state: state size N of the first block.
        d_state_step: block i has state size d_state + i * d_state_step (2 in Mamba-PKD's Table 1).
        d_conv: width of the causal convolution.
        expand: d_inner = expand * d_model.
        dt_rank: rank of the step-size projection; None for ceil(d_model / 16).
        tokeniser: `pixels`: average-pooled to `seq_len` scalar tokens; `patches`: a strided convolution to d_model;
            `convolutions`: two strided convolutions, see `ConvolutionTokens`.
        seq_len: number of tokens L (pixels only).
        pixel_channels: `one`: tokens of the mean over colour channels; `all`: every channel's plane, one after another.
        patch_size: side of a square patch, or of the first convolution's kernel.
        patch_stride: step between patches, or of the first convolution; smaller than patch_size for overlap. None for
            patch_size, and for 2 with convolutions.
        stem_channels: channels between the two convolutions (convolutions only).
        stem_blocks: blocks between the two convolutions, on the raster and of the channels there, instead of SiLU
            (convolutions only).
        padding: pad the convolutions with zeros (convolutions only).
        norm: normalisation before each block and before the head.
        residual: add each block's input to its output.
        local_conv: side of a depthwise convolution over the tokens' raster, whose result is added to the tokens before
            each block; None for none. It tells the block where a token lies and what is around it (conditional
            positional encoding, Chu et al., arXiv 2102.10882).
        direction: `forward`: every block reads the tokens in order; `alternating`: every second one in reverse;
            `cross`: by rows, by rows in reverse, by columns, by columns in reverse, and again (cf. VMamba,
            arXiv 2401.10166).
        shared: all blocks of a raster have the same weights (cf. ALBERT, arXiv 1909.11942).
        mixer: import path of what mixes the tokens of each block, see `models.mixers`; of several, block i has the
            i-th, and after the last the first again.
        mixer_options: options of the mixer itself.
        head: `flatten`: all tokens; `mean`: their average; `grid`: their average in each cell of a 2x2 raster.
        reuse: what the tokens take from those that the heads of earlier students read, see `models.reuse`: `none`;
            `concat`: both in one linear layer; `gate`: a gated sum. The first student of an ensemble has none to read.
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
    stem_channels: int | None = None
    stem_blocks: int = 0
    padding: bool = False
    norm: Norm = "none"
    residual: bool = True
    local_conv: int | None = None
    direction: Direction = "forward"
    shared: bool = False
    mixer: str | Sequence[str] = MAMBA
    mixer_options: Mapping[str, object] = field(default_factory=dict)
    head: Head = "flatten"
    reuse: Reuse = "none"

    def faults(self, image_shape: ImageShape | None = None) -> list[str]:
        """Every reason why this model cannot be built; those that depend on the image only where its shape is given."""
        faults = Faults(self)
        for name in ("n_blocks", "d_model", "d_state", "d_conv", "expand", "patch_size"):
            faults.whole(name, 1)
        for name in ("d_state_step", "stem_blocks"):
            faults.whole(name, 0)
        for name in ("dt_rank", "seq_len", "patch_stride", "stem_channels", "local_conv"):
            faults.whole(name, 1, optional=True)
        hints = get_type_hints(type(self))
        for name in ("tokeniser", "pixel_channels", "norm", "direction", "head", "reuse"):
            faults.choice(name, get_args(hints[name]))
        for name in ("residual", "shared", "padding"):
            faults.flag(name)
        if not isinstance(self.mixer_options, Mapping):
            faults.found.append(f"mixer_options={self.mixer_options!r}: must be a mapping of options")
        faults.found += self._mixer_faults()
        at_fault = {fault.split("=")[0] for fault in faults.found}
        widths = {"d_model": self.d_model} | ({"stem_channels": self.stem_channels} if self.stem_blocks else {})
        for name, width in widths.items():
            if width == 1 and self.norm in ("rms", "layer"):
                faults.found.append(
                    f"norm={self.norm!r}: over the one channel of {name}=1 it keeps at most a token's sign; use none"
                )
        if "local_conv" not in at_fault and self.local_conv is not None and self.local_conv % 2 == 0:
            faults.found.append(f"local_conv={self.local_conv}: must be odd, so that it has a middle")
        if self.shared is True and self.d_state_step != 0:
            faults.found.append(
                f"d_state_step={self.d_state_step}: blocks that share weights have one state size; use 0"
            )
        if self.tokeniser in ("pixels", "patches"):
            for name in ("stem_channels", "stem_blocks", "padding"):
                if name not in at_fault and getattr(self, name):
                    faults.found.append(f"{name}={getattr(self, name)!r}: only the convolutions tokeniser has it")
        if self.tokeniser == "pixels" and not at_fault & {"seq_len", "pixel_channels"}:
            faults.found += self._pixel_faults(image_shape)
        if self.tokeniser == "patches" and not at_fault & {"patch_size", "patch_stride"}:
            faults.found += self._patch_faults(image_shape)
        if self.tokeniser == "convolutions" and not at_fault & {"patch_size", "patch_stride", "stem_channels"}:
            faults.found += self._convolution_faults(image_shape)
        return faults.found

    def _mixer_faults(self) -> list[str]:
        try:
            mixers = self.mixers
        except TypeError:
            mixers = []
        if not mixers or not all(isinstance(path, str) for path in mixers):
            return [f"mixer={self.mixer!r}: must be the import path of a mixer, or a list of them"]
        if self.shared is True and len(mixers) > 1:
            return [f"mixer={self.mixer!r}: blocks that share weights have one mixer"]
        found: list[str] = []
        for path in mixers:
            try:
                import_part("mixer", path)
            except ConfigError as error:
                found += error.faults
        return found

    @property
    def mixers(self) -> list[str]:
        """The import paths of `mixer`."""
        return [self.mixer] if isinstance(self.mixer, str) else list(self.mixer)

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

    def _convolution_faults(self, image_shape: ImageShape | None) -> list[str]:
        found = []
        if self.seq_len is not None:
            found.append(f"seq_len={self.seq_len}: with convolutions the length follows from their sizes and strides")
        if self.stem_channels is None:
            found.append("stem_channels=None: the convolutions tokeniser needs a number of channels")
        stride = self.patch_stride or 2
        if stride > self.patch_size:
            found.append(f"patch_stride={stride}: larger than patch_size={self.patch_size}, pixels would be skipped")
        if image_shape is not None:
            grids = convolved_grids(image_shape, self.patch_size, stride, self.padding)
            size = f"{image_shape[1]}x{image_shape[2]}"
            if grids is None:
                found.append(f"patch_size={self.patch_size}: the two convolutions do not fit into a {size} image")
            elif self.head == "grid" and min(grid := grids[1]) < GRID:
                found.append(f"head='grid': {grid[0]}x{grid[1]} tokens are fewer than {GRID}x{GRID}")
        return found


class Block(nn.Module):
    """One block of the classifier, in any of the `ORDERS`.

    Optional local convolution, optional pre-norm, a mixer, optional residual connection.
    """

    def __init__(self, config: MambaClassifierConfig, index: int, grid: tuple[int, int]) -> None:
        super().__init__()
        channels, side = config.d_model, config.local_conv
        self.local = nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels) if side else None
        self.norm = make_norm(config.norm, channels)
        offered = {
            "d_model": config.d_model,
            "d_state": config.d_state + index * config.d_state_step,
            "d_conv": config.d_conv,
            "expand": config.expand,
            "dt_rank": config.dt_rank,
            "grid": grid,
            "length": grid[0] * grid[1],
        }
        self.mixer = build_mixer(config.mixers[index % len(config.mixers)], config.mixer_options, offered)
        self.residual = config.residual

    def forward(self, tokens: Tensor, grid: tuple[int, int], columns: bool = False, backwards: bool = False) -> Tensor:
        """Map tokens (batch, length, d_model) of a raster `grid` (rows, columns) to the same shape.

        The block reads them row by row, or by `columns`, from the end where `backwards`.
        """
        tokens = with_local(self.local, tokens, grid)
        if isinstance(self.mixer, Mamba) and getattr(self.mixer, "reads_in_order", True):
            order = Order(*grid, backwards) if columns else Order(backwards=backwards)
            out = self.mixer.fused_residual(tokens, self.norm, order, self.residual)
            if out is not None:
                return out
        x = in_order(self.mixer, self.norm(tokens), grid, columns, backwards)
        return tokens + x if self.residual else x


def with_local(local: nn.Module | None, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (batch, length, d_model) of a raster and their local convolution, where there is one."""
    if local is None:
        return tokens
    planes: Tensor = local(tokens.transpose(1, 2).unflatten(2, grid))
    return tokens + planes.flatten(2).transpose(1, 2)


def through(blocks: nn.ModuleList, count: int, direction: Direction, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (batch, length, d_model) of a raster after `count` blocks, which are fewer where they share weights."""
    orders = ORDERS[direction]
    for i in range(count):
        tokens = blocks[i % len(blocks)](tokens, grid, *orders[i % len(orders)])
    return tokens


class StemBlocks(nn.Module):
    """Blocks and a norm between the two convolutions of `ConvolutionTokens`: planes of a raster `grid` to the same."""

    def __init__(self, config: MambaClassifierConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        assert config.stem_channels is not None
        config = replace(config, d_model=config.stem_channels, n_blocks=config.stem_blocks)
        self.count, self.direction, self.grid = config.n_blocks, config.direction, grid
        self.blocks = make_blocks(config, grid)
        self.norm = make_norm(config.norm, config.d_model)

    def forward(self, planes: Tensor) -> Tensor:
        """Map planes (batch, stem_channels, rows, columns) to the same shape."""
        tokens = planes.flatten(2).transpose(1, 2).contiguous()
        tokens = self.norm(through(self.blocks, self.count, self.direction, tokens, self.grid))
        planes = tokens.transpose(1, 2).unflatten(2, self.grid)
        return planes


def make_blocks(config: MambaClassifierConfig, grid: tuple[int, int]) -> nn.ModuleList:
    """The blocks of a raster; one where they share weights."""
    return nn.ModuleList(Block(config, i, grid) for i in range(1 if config.shared else config.n_blocks))


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
        tokens = through(self.blocks, self.config.n_blocks, self.config.direction, tokens, self.tokens.grid)
        pooled = self._fused_pool(tokens)
        logits: Tensor = self.head(self._pool(self.norm(tokens)) if pooled is None else pooled)
        return logits

    def _fused_pool(self, tokens: Tensor) -> Tensor | None:
        """The last norm and `_pool` by one kernel; None where there is none for it, or a call of the norm does more."""
        weight = rms_weight(self.norm, self.config.d_model) if self.config.head in CELLS else None
        if weight is None or torch.is_autocast_enabled("cpu"):
            return None
        if not takes(tokens, *(x for x in weight if x is not None)):
            return None
        from pkd_lightning.kernels.pool import pool_cpu  # numba takes a second to import

        return pool_cpu(tokens, *weight, self.tokens.grid, CELLS[self.config.head])

    def raster_positions(self, path: str) -> Tensor | None:
        """Where in the raster each token lies that the module at `path` gives: (length,). None where in its order.

        A mixer has the order in which its block reads, and so have the linear layers of a `Mamba`. Blocks that share
        weights have that of the last call.
        """
        between = getattr(self.tokens, "between", None)
        blocks, count, grid = self.blocks, self.config.n_blocks, self.tokens.grid
        if isinstance(between, StemBlocks) and path.startswith(IN_STEM):
            path = path.removeprefix(IN_STEM)
            blocks, count, grid = between.blocks, between.count, between.grid
        owner, number, name, *inside = [*path.split("."), "", ""]
        if owner != "blocks" or name != "mixer":
            return None
        mixer, orders = blocks[int(number)].mixer, ORDERS[self.config.direction]
        tokens_inside = not inside[0] or (isinstance(mixer, Mamba) and inside[0] in LINEAR)
        last = count - 1 if self.config.shared else int(number)
        columns, backwards = orders[last % len(orders)]
        if not (columns or backwards) or not tokens_inside or not getattr(mixer, "reads_in_order", True):
            return None
        places = torch.arange(grid[0] * grid[1]).view(1, -1, 1)
        return as_read(places, grid, columns, backwards).flatten()

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


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The normalisation layer over `channels` features of a token."""
    layers: dict[Norm, Callable[[int], nn.Module]] = {"none": nn.Identity, "rms": nn.RMSNorm, "layer": nn.LayerNorm}
    return layers[norm](channels)
