"""The layers of a `MambaClassifier` as calls of the functions in runtime.c, with their weights as C arrays."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pkd_lightning.errors import ConfigError
from pkd_lightning.models.blocks import Raster, StemBlocks, local_weights
from pkd_lightning.models.classifier import MambaClassifier, as_image
from pkd_lightning.models.config import GRID
from pkd_lightning.models.mamba import Mamba, own_weights
from pkd_lightning.models.tokens import SECOND_KERNEL, SECOND_STRIDE, ConvolutionTokens, PatchTokens, PixelTokens
from pkd_lightning.rounding import Weights, joined, split

NORMS: Mapping[type, str] = {
    nn.Identity: "PKD_NO_NORM",
    nn.RMSNorm: "PKD_RMS_NORM",
    nn.LayerNorm: "PKD_LAYER_NORM",
}
# what each type of values is in C, and how many stand in a line
TYPES: Mapping[torch.dtype, tuple[str, int]] = {
    torch.float32: ("float", 8),
    torch.bfloat16: ("uint16_t", 16),
    torch.int8: ("int8_t", 24),
}


def padded(channels: int) -> int:
    """Floats of a row of channels: whole vectors of 4, or of 8."""
    return 4 if channels <= 4 else -(-channels // 8) * 8


@dataclass
class Buffers:
    """Floats that each static array of the C file must hold, by name."""

    sizes: dict[str, int] = field(default_factory=dict)

    def need(self, **sizes: int) -> None:
        """Of arrays that several layers share, the largest size counts."""
        for name, size in sizes.items():
            self.sizes[name] = max(size, self.sizes.get(name, 0))


@dataclass(frozen=True)
class BlockShape:
    """What the code of a block is compiled for; weights differ."""

    rows: int
    columns: int
    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int
    norm: str
    eps: float
    residual: bool

    @property
    def projected(self) -> int:
        """Floats of a row that x_proj gives."""
        return padded(self.dt_rank + 2 * self.d_state)

    def arguments(self) -> str:
        """Of `pkd_mamba` from d_model on."""
        row, inner = padded(self.d_model), padded(self.d_inner)
        sizes = (self.d_model, row, inner, self.d_state, self.dt_rank, self.projected, self.d_conv)
        return ", ".join([*map(str, sizes), self.norm, number(self.eps), str(int(self.residual))])


class Student:
    """One member as C: arrays of weights, and the statements of a function that computes its logits.

    Args:
        model: the member.
        place: its number in the ensemble, from 1.
        input_shape: of the ensemble's inputs.
        num_classes: of the ensemble.
        weights: what those of its layers are stored as.

    Raises:
        ConfigError: where a part of it has no C form, naming the member and the module.
    """

    def __init__(
        self, model: nn.Module, place: int, input_shape: tuple[int, ...], num_classes: int, weights: Weights
    ) -> None:
        self.place, self.num_classes, self.weights = place, num_classes, weights
        if type(model) is not MambaClassifier or _changed(model):
            raise self._no_form("itself", model)
        if model.reuse is not None:
            raise ConfigError(
                [
                    f"member {place}: it reads earlier students (reuse={model.config.reuse}), which --format c does not"
                    f" write; the formats onnx and pt2 do, and --members {place - 1} leaves it out"
                ]
            )
        self.model, self.image_shape = model, as_image(input_shape)
        self.arrays: dict[str, Tensor] = {}
        self.structs: list[str] = []
        self.statements: list[str] = []
        self.blocks: list[tuple[BlockShape, str]] = []  # in the order they are called, with further arguments
        self.buffers = Buffers()
        self._tokens()
        self._blocks(model.raster, "pkd_tokens")
        self._head()

    def _no_form(self, name: str, module: object) -> ConfigError:
        return ConfigError(
            [
                f"member {self.place}: {name} is a {type(module).__module__}.{type(module).__qualname__}, or was"
                " changed since it was built: --format c writes MambaClassifier with Mamba mixers as they are built."
                " The formats onnx and pt2 take other modules"
            ]
        )

    def _own(self, name: str, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, in float32, of a layer that is as it was built."""
        layer = self.model.get_submodule(name)
        own = own_weights(layer, kind)
        if own is None:
            raise self._no_form(name, layer)
        weight, bias = own
        return weight.detach().float(), None if bias is None else bias.detach().float()

    def _array(self, name: str, values: Tensor) -> str:
        """Keep an array under a name of this student's; the C name."""
        full = f"pkd_{self.place}_{name}"
        self.arrays[full] = values
        return full

    def _matrix(self, name: str, weight: Tensor) -> str:
        """Keep a weight (outputs, ...), whose outputs C has last; the C names of its values and of its scales."""
        values, scale = split(weight, self.weights)
        array = self._array(name, values.movedim(0, -1))
        return f"{array}, {'NULL' if scale is None else self._array(f'{name}_scale', scale)}"

    def _widens(self, weight: Tensor) -> None:
        """Have room for a matrix as floats, where it is no such."""
        if self.weights != "float32":
            self.buffers.need(matrix=weight.numel())

    def _bias(self, name: str, bias: Tensor | None, row: int) -> str:
        return "NULL" if bias is None else self._array(name, _row(bias, row))

    def _convolution(
        self, name: str, shape: tuple[int, int, int], outputs: str, stride: int, source: str
    ) -> tuple[int, int, int]:
        """Write a convolution of an image (height, width, channels of a row); the same of its outputs."""
        layer: Any = self.model.get_submodule(f"tokens.{name}")
        weight, bias = self._own(f"tokens.{name}", nn.Conv2d)
        height, width, channels = shape
        kernel, padding, row = weight.shape[-1], int(layer.padding[0]), padded(weight.shape[0])
        built = ((kernel, kernel), (stride, stride), (padding, padding), (1, 1), 1, "zeros")
        if built != (
            layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
        ):  # fmt: skip
            raise self._no_form(f"tokens.{name}", layer)
        taps = weight.new_zeros(row, kernel, kernel, channels)
        taps[: weight.shape[0], :, :, : weight.shape[1]] = weight.permute(0, 2, 3, 1)
        if padding:
            self.statements.append(f"pkd_pad({source}, pkd_padded, {height}, {width}, {channels}, {padding});")
            source = "pkd_padded"
            self.buffers.need(padded=(height + 2 * padding) * (width + 2 * padding) * channels)
        wide = width + 2 * padding
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        names = f"{self._matrix(f'{name}_weight', taps)}, {self._bias(f'{name}_bias', bias, row)}"
        self.statements.append(
            f"pkd_convolve({source}, {wide}, {channels}, {kernel}, {stride}, {names}, {outputs},"
            f" {rows}, {columns}, {row});"
        )
        self.buffers.need(windows=columns * kernel * kernel * channels)
        self._widens(taps)
        return rows, columns, row

    def _tokens(self) -> None:
        """From `pkd_image` to `pkd_tokens`."""
        tokens, config = self.model.tokens, self.model.config
        channels, height, width = self.image_shape
        shape = (height, width, channels)
        if type(tokens) is PixelTokens:
            planes = 1 if config.pixel_channels == "one" else channels
            rows, columns = tokens.grid[0] // planes, tokens.grid[1]
            row, names = padded(config.d_model), "NULL, NULL"
            if config.d_model > 1:
                weight, bias = self._own("tokens.embed", nn.Linear)
                names = self._array("embed_weight", _row(joined(*split(weight, self.weights))[:, 0], row))
                names += f", {self._bias('embed_bias', bias, row)}"
            elif type(tokens.embed) is not nn.Identity:
                raise self._no_form("tokens.embed", tokens.embed)
            block = f"{tokens.block[0]}, {tokens.block[1]}"
            self.statements.append(
                f"pkd_pool(pkd_image, {channels}, {planes}, {rows}, {columns}, {block}, {names}, pkd_tokens, {row});"
            )
        elif type(tokens) is PatchTokens:
            self._convolution("project", shape, "pkd_tokens", config.patch_stride or config.patch_size, "pkd_image")
        elif type(tokens) is ConvolutionTokens:
            rows, columns, row = self._convolution("stem", shape, "pkd_stem", config.patch_stride or 2, "pkd_image")
            self.buffers.need(stem=rows * columns * row)
            source = "pkd_stem"
            if tokens.between is None:
                self.statements.append(f"pkd_silu_all(pkd_stem, {rows * columns * row});")
            else:
                self._between(tokens.between)
                source = "pkd_normed"
            assert self.model.tokens.project.kernel_size[0] == SECOND_KERNEL  # type: ignore[index, union-attr]
            self._convolution("project", (rows, columns, row), "pkd_tokens", SECOND_STRIDE, source)
        else:
            raise self._no_form("tokens", tokens)
        size = tokens.length * padded(config.d_model)
        self.buffers.need(tokens=size, normed=size)

    def _between(self, between: nn.Module) -> None:
        """Write the blocks between the convolutions, in place on `pkd_stem`, and their norm to `pkd_normed`."""
        if type(between) is not StemBlocks or _changed(between):
            raise self._no_form("tokens.between", between)
        self._blocks(between.raster, "pkd_stem")
        self._last_norm(between.raster, "pkd_stem")

    def _last_norm(self, raster: Raster, source: str) -> None:
        """Write the norm of all tokens of a raster, to `pkd_normed`."""
        kind, eps, names = self._norm(f"{raster.path}norm", raster.channels)
        row, length = padded(raster.channels), math.prod(raster.grid)
        self.statements.append(f"for (t = 0; t < {length}; t++)")
        place = f"{source} + t * {row}, pkd_normed + t * {row}"
        self.statements.append(f"    pkd_norm({place}, {kind}, {raster.channels}, {row}, {names}, {number(eps)});")
        self.buffers.need(normed=length * row)

    def _norm(self, name: str, channels: int) -> tuple[str, float, str]:
        """(kind, eps, C names of weight and bias) of a norm layer."""
        layer: Any = self.model.get_submodule(name)
        kind, row = NORMS.get(type(layer)), padded(channels)
        if kind is None or _changed(layer):
            raise self._no_form(name, layer)
        if kind == "PKD_NO_NORM":
            return kind, 0.0, "NULL, NULL"
        weight, bias = self._own(name, type(layer))
        eps = torch.finfo(torch.float32).eps if layer.eps is None else layer.eps
        stem = name.replace(".", "_")
        array = self._array(f"{stem}_weight", _row(weight, row))
        return kind, eps, f"{array}, {self._bias(f'{stem}_bias', bias, row)}"

    def _blocks(self, raster: Raster, tokens: str) -> None:
        """Write the blocks of a raster, in place on `tokens`."""
        names = [f"{raster.path}blocks.{i}" for i in range(len(raster.blocks))]
        made = [self._block(name, raster.grid) for name in names]
        local = [self._local(name, raster.grid, raster.channels, tokens) for name in names]
        for i, by_columns, backwards in raster.calls():
            shape, struct = made[i]
            call = f"&{struct}, {tokens}, {int(by_columns)}, {int(backwards)}"
            self.statements += local[i]
            self.statements.append(f"BLOCK({len(self.blocks)})")  # filled in when all shapes are known
            self.blocks.append((shape, call))

    def _local(self, name: str, grid: tuple[int, int], channels: int, tokens: str) -> list[str]:
        """Write the weights of a block's local convolution; the statement, or none where the block has none."""
        block: Any = self.model.get_submodule(name)
        if block.local is None:
            return []
        own = local_weights(block.local, channels)
        if own is None:
            raise self._no_form(f"{name}.local", block.local)
        weight, bias = (x.detach().float() for x in own)
        side, row = weight.shape[-1], padded(channels)
        taps = weight.new_zeros(row, side, side)
        taps[:channels] = weight
        place = name.replace(".", "_")
        names = f"{self._matrix(f'{place}_local_weight', taps)}, {self._bias(f'{place}_local_bias', bias, row)}"
        self._widens(taps)
        self.buffers.need(normed=grid[0] * grid[1] * row)
        return [f"pkd_local({tokens}, {grid[0]}, {grid[1]}, {row}, {side}, {names});"]

    def _block(self, name: str, grid: tuple[int, int]) -> tuple[BlockShape, str]:
        """Write the weights of a block; its shape, and the C name of the struct."""
        block: Any = self.model.get_submodule(name)
        mixer: Any = block.mixer
        if _changed(block):
            raise self._no_form(name, block)
        weights = mixer.plain_weights() if type(mixer) is Mamba and not _changed(mixer) else None
        if weights is None:
            raise self._no_form(f"{name}.mixer", mixer)
        kind, eps, norm = self._norm(f"{name}.norm", mixer.d_model)
        rank, states, d_inner = mixer.dt_rank, mixer.d_state, mixer.d_inner
        place = name.replace(".", "_")
        shape = BlockShape(*grid, mixer.d_model, d_inner, states, rank, mixer.d_conv, kind, eps, bool(block.residual))
        names = [norm]
        for part, values in _mamba_arrays(mixer, weights, shape).items():
            if values.dim() == 1 or part == "A":
                names.append(self._array(f"{place}_{part}", values))
            else:
                names.append(self._matrix(f"{place}_{part}", values))
                self._widens(values)
        struct = f"pkd_{self.place}_{place}"
        body = ",\n    ".join(names)
        self.structs.append(f"static const pkd_block {struct} = {{\n    {body}}};")
        length, inner = grid[0] * grid[1], padded(d_inner)
        self.buffers.need(
            normed=length * padded(mixer.d_model), xz=(length + mixer.d_conv - 1) * 2 * inner, x=length * inner,
            projected=length * shape.projected, delta=length * inner, state=inner * states, input=inner, sum=inner,
        )  # fmt: skip
        return shape, struct

    def _head(self) -> None:
        """From `pkd_tokens` to `pkd_student`, the student's logits."""
        config, (rows, columns) = self.model.config, self.model.tokens.grid
        row, outputs = padded(config.d_model), padded(self.num_classes)
        weight, bias = self._own("head", nn.Linear)
        self._last_norm(self.model.raster, "pkd_tokens")
        source, cells = "pkd_normed", rows * columns
        # features by token or cell, then by channel
        by_cell = weight.unflatten(1, (-1, config.d_model))
        if config.head != "flatten":
            side = 1 if config.head == "mean" else GRID
            source, cells = "pkd_features", side * side
            self.statements.append(f"pkd_average(pkd_normed, {rows}, {columns}, {row}, {side}, pkd_features);")
            by_cell = weight.unflatten(1, (config.d_model, cells)).transpose(1, 2)
            self.buffers.need(features=cells * row)
        taps = weight.new_zeros(outputs, cells, row)
        taps[: self.num_classes, :, : config.d_model] = by_cell
        head = f"{self._matrix('head_weight', taps)}, {self._bias('head_bias', bias, outputs)}"
        self.statements.append(f"pkd_project_once({source}, {head}, pkd_student, {cells * row}, {outputs});")
        self.buffers.need(student=outputs)

    def declarations(self) -> Iterator[str]:
        """The arrays and structs of weights."""
        for name, values in self.arrays.items():
            yield array(name, values)
        yield from self.structs


def _mamba_arrays(mixer: Mamba, weights: tuple[Tensor, ...], shape: BlockShape) -> dict[str, Tensor]:
    """The weights of a block in the order of `pkd_block`, without those of its norm; matrices (outputs, inputs)."""
    d_model, d_inner, rank, states = shape.d_model, shape.d_inner, shape.dt_rank, shape.d_state
    row, inner, projected = padded(d_model), padded(d_inner), shape.projected
    in_proj, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, _, D, out_proj = (w.detach().float() for w in weights)
    both = torch.zeros(2, inner, d_model)
    both[:, :d_inner] = in_proj.unflatten(0, (2, d_inner))
    taps = torch.zeros(inner, shape.d_conv)
    taps[:d_inner] = conv_weight[:, 0]
    steps = torch.zeros(projected, inner)
    steps[: rank + 2 * states, :d_inner] = x_proj
    spread = torch.zeros(inner, rank)
    spread[:d_inner] = dt_weight
    decay = torch.zeros(states, inner)
    decay[:, :d_inner] = mixer._decay().detach().float().T
    back = torch.zeros(row, inner)
    back[:d_model, :d_inner] = out_proj
    return {
        "in_proj": both.flatten(0, 1), "conv_weight": taps, "conv_bias": _row(conv_bias, inner), "x_proj": steps,
        "dt_weight": spread, "dt_bias": _row(dt_bias, inner), "A": decay, "D": _row(D, inner), "out_proj": back,
    }  # fmt: skip


def _row(values: Tensor, row: int) -> Tensor:
    """A vector filled up with zeros."""
    return torch.nn.functional.pad(values, (0, row - len(values)))


def _changed(module: nn.Module) -> bool:
    """Whether a call of a module runs hooks or a `forward` of its own, besides its class's."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or any(name in module.__dict__ for name in ("forward", "mix", "_pool"))


def number(value: float) -> str:
    """A float32 as a C constant that is read as the same value."""
    text = f"{value:.9g}"
    return f"{text}f" if "e" in text or "." in text else f"{text}.0f"


def array(name: str, values: Tensor) -> str:
    """A definition of a static array of floats, or of weights that are rounded."""
    kind, in_line = TYPES[values.dtype]
    bits = values.contiguous().view(torch.uint16) if values.dtype == torch.bfloat16 else values
    flat = [(number(value) if kind == "float" else str(value)) if value else "0" for value in bits.flatten().tolist()]
    lines = (", ".join(flat[i : i + in_line]) for i in range(0, len(flat), in_line))
    body = ",\n    ".join(lines)
    return f"static const {kind} {name}[{len(flat)}] = {{\n    {body}}};"
