"""The options of a `MambaClassifier`, and what is wrong with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args, get_type_hints

from pkd_lightning.checks import Faults
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.building import ImageShape, import_part
from pkd_lightning.models.mixers import MAMBA
from pkd_lightning.models.options import Direction, Head, Norm, PixelChannels, Reuse, Tokeniser
from pkd_lightning.models.tokens import convolved_grids, pooled_grid, possible_lengths

CELLS: dict[Head, int] = {"mean": 1, "grid": 2}  # on each side, over which these heads average
GRID = CELLS["grid"]  # the `grid` head averages the tokens over a GRID x GRID raster


@dataclass(frozen=True)
class MambaClassifierConfig:
    """Options of a `MambaClassifier`.

    Attributes:
        n_blocks: number of blocks, besides those between the convolutions.
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
        stem_blocks: blocks between the two convolutions, and a norm after them, on the raster and of the channels
            there, instead of SiLU (convolutions only). State sizes, mixers and directions begin anew after them.
        padding: pad the convolutions with zeros (convolutions only).
        norm: normalisation before each block and before the head.
        residual: add each block's input to its output.
        local_conv: side of a depthwise convolution over the tokens' raster, whose result is added to the tokens before
            each block; None for none. It tells the block where a token lies and what is around it (conditional
            positional encoding, Chu et al., arXiv 2102.10882). Not where there is no such raster: of signals, or with
            pixel_channels=all.
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
        if "local_conv" not in at_fault and self.local_conv is not None:
            if image_shape is not None and image_shape[1] == 1:
                faults.found.append(f"local_conv={self.local_conv}: signals have no raster of tokens")
            elif self.pixel_channels == "all" and (image_shape is None or image_shape[0] > 1):
                faults.found.append(
                    f"local_conv={self.local_conv}: with pixel_channels=all the colours lie below each other; use one"
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
