"""A student's sizes and weights as the inference kernels read them: a plan of integers, and one row of weights."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.kernels import inference as k
from pkd_lightning.kernels import inference_batch as batch
from pkd_lightning.kernels.lanes import LOG2E, WIDTH
from pkd_lightning.kernels.scan.block import BLOCK
from pkd_lightning.kernels.scan.states import CHUNK
from pkd_lightning.models.blocks import Block, Raster, StemBlocks, local_weights
from pkd_lightning.models.building import ImageShape
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.config import MambaClassifierConfig
from pkd_lightning.models.mamba import Mamba, only_forward, own_weights
from pkd_lightning.models.options import Norm
from pkd_lightning.models.tokens import ConvolutionTokens, PatchTokens, PixelTokens

NORMS: dict[Norm, tuple[type[nn.Module], int]] = {
    "none": (nn.Identity, k.NO_NORM),
    "rms": (nn.RMSNorm, k.RMS),
    "layer": (nn.LayerNorm, k.LAYER),
}
HEADS = {"flatten": k.FLATTEN, "mean": k.MEAN, "grid": k.GRID}
WORKED = k.STEPS + k.AT_ONCE  # rows of a chunk's buffers


def vectors(count: int) -> int:
    """Of 16 lanes, for `count` values."""
    return -(-count // WIDTH)


class Weights:
    """Weights one after another, each of its last dimension padded with zeros to a multiple of `unit`."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.parts: list[Tensor] = []
        self.size = 0

    def add(self, values: Tensor) -> int:
        """Append (..., n); where it begins."""
        padded = F.pad(values.detach().to(torch.float32), (0, -values.shape[-1] % self.unit)).flatten()
        begin = self.size
        self.parts.append(padded)
        self.size += padded.numel()
        return begin

    def packed(self) -> Tensor:
        """All of them, with a vector of zeros at the end."""
        return torch.cat([*self.parts, torch.zeros(WIDTH)])


def plan_of(student: nn.Module, shape: ImageShape, weights: Weights) -> tuple[list[int], int]:
    """What the kernel is told of a student, its weights being appended to `weights`, and the room it needs.

    Raises:
        ValueError: where there is no kernel for it, saying why.
    """
    if not only_forward(student, MambaClassifier):
        raise ValueError(f"a {type(student).__name__} that is no plain MambaClassifier")
    assert isinstance(student, MambaClassifier)
    if student.reuse is not None:
        raise ValueError("a MambaClassifier that reads earlier students")
    config, tokens, plan = student.config, student.tokens, [0] * k.PLAN
    plan[k.CHANNELS], plan[k.HEIGHT], plan[k.WIDTH_] = shape
    before = _plan_tokens(plan, tokens, weights)
    room = max(before, _plan_head(plan, student, weights), _plan_raster(plan, student.raster, config, weights))
    between = getattr(tokens, "between", None)
    if between is not None:
        if not only_forward(between, StemBlocks):
            raise ValueError(f"a {type(between).__name__} between the convolutions that is no plain StemBlocks")
        inner = [0] * k.PLAN
        room = max(room, before + _plan_raster(inner, between.raster, config, weights))
        plan[k.BETWEEN] = len(plan)
        plan += inner
    return plan, tokens.length * plan[k.MODEL_V] * WIDTH + room


def _plan_raster(plan: list[int], raster: Raster, config: MambaClassifierConfig, weights: Weights) -> int:
    """The sizes of a raster of tokens, its norm, and its blocks appended to the plan; returns the room they need."""
    plan[k.ROWS], plan[k.COLUMNS] = raster.grid
    plan[k.MODEL], plan[k.MODEL_V] = raster.channels, vectors(raster.channels)
    kind, plan[k.NORM] = NORMS[config.norm]
    plan[k.RESIDUAL], plan[k.BLOCKS] = config.residual, raster.n_blocks
    plan[k.LAST_NORM_AT], plan[k.EPSILON_AT] = _norm(raster.norm, kind, weights)
    zeros = weights.add(torch.zeros(max(_widest(block) for block in raster.blocks)))
    made = [_plan_block(plan, block, kind, zeros, weights) for block in raster.blocks]  # type: ignore[arg-type]
    for i, by_columns, backwards in raster.calls():
        plan += [int(by_columns), int(backwards), *made[i][0][2:]]
    return max(needed for _, needed in made)


def _layer(layer: nn.Module, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None]:
    own = own_weights(layer, kind)
    if own is None or own[0].device.type != "cpu":
        raise ValueError(f"a {type(layer).__name__} that is no plain {kind.__name__} on the CPU")
    return own


def _linear(layer: nn.Module, weights: Weights) -> tuple[int, int]:
    """Where the weights (inputs, outputs) of a linear layer and its bias begin."""
    weight, bias = _layer(layer, nn.Linear)
    return weights.add(weight.T), weights.add(weight.new_zeros(len(weight)) if bias is None else bias)


def _convolution(layer: nn.Module, weights: Weights) -> tuple[int, int]:
    """Where the weights (rows, columns, inputs, outputs) of a convolution and its bias begin."""
    weight, bias = _layer(layer, nn.Conv2d)
    if bias is None:
        raise ValueError("a Conv2d without a bias")
    assert isinstance(layer, nn.Conv2d)
    square = all(len(set(sides)) == 1 for sides in (layer.kernel_size, layer.stride, layer.padding))
    if not square or (layer.dilation, layer.groups, layer.padding_mode) != ((1, 1), 1, "zeros"):
        raise ValueError("a Conv2d that is not as it was built")
    return weights.add(weight.permute(2, 3, 1, 0)), weights.add(bias)


def _norm(norm: nn.Module, kind: type[nn.Module], weights: Weights) -> tuple[int, int]:
    """Where the weight of a norm, then its bias, and its epsilon begin."""
    if kind is nn.Identity and only_forward(norm, kind):
        return 0, 0
    weight, bias = _layer(norm, kind)
    begin = weights.add(weight)
    weights.add(torch.zeros_like(weight) if bias is None else bias)
    epsilon = torch.finfo(weight.dtype).eps if norm.eps is None else norm.eps
    return begin, weights.add(torch.tensor([epsilon]))


def _plan_tokens(plan: list[int], tokens: nn.Module, weights: Weights) -> int:
    """The tokeniser; returns the room that it needs."""
    if not only_forward(tokens, type(tokens)):
        raise ValueError("a tokeniser with hooks")
    channels, height, width = plan[k.CHANNELS], plan[k.HEIGHT], plan[k.WIDTH_]
    if isinstance(tokens, PixelTokens):
        plan[k.POOL_ROWS], plan[k.POOL_COLUMNS] = tokens.block
        plan[k.AVERAGE] = tokens.average_channels
        if only_forward(tokens.embed, nn.Identity):
            plan[k.TOKENS_AT], plan[k.TOKENS_BIAS_AT] = weights.add(torch.ones(1)), weights.add(torch.zeros(1))
        else:
            plan[k.TOKENS_AT], plan[k.TOKENS_BIAS_AT] = _linear(tokens.embed, weights)
        return 0
    assert isinstance(tokens, PatchTokens | ConvolutionTokens)
    plan[k.CONVOLUTIONS] = 1
    begin = tokens.project
    if isinstance(tokens, ConvolutionTokens):
        plan[k.CONVOLUTIONS], begin = 2, tokens.stem
        plan[k.STEM_AT], plan[k.STEM_BIAS_AT] = _convolution(tokens.stem, weights)
        plan[k.KERNEL_2], plan[k.STRIDE_2] = tokens.project.kernel_size[0], tokens.project.stride[0]
        plan[k.PADDING_2] = int(tokens.project.padding[0])
    plan[k.TOKENS_AT], plan[k.TOKENS_BIAS_AT] = _convolution(tokens.project, weights)
    size, stride, padding = begin.kernel_size[0], begin.stride[0], int(begin.padding[0])
    plan[k.KERNEL], plan[k.STRIDE], plan[k.PADDING] = size, stride, padding
    planes = channels * (height + 2 * padding) * (width + 2 * padding) + k.AT_ONCE * stride
    room = (planes // WIDTH + 1) * WIDTH
    if plan[k.CONVOLUTIONS] == 2:
        rows, columns = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
        plan[k.STEM], plan[k.STEM_V] = begin.out_channels, vectors(begin.out_channels)
        plan[k.STEM_ROWS], plan[k.STEM_COLUMNS] = rows, columns
        rim = 2 * plan[k.PADDING_2]
        positions = (rows + rim) * (columns + rim) + k.AT_ONCE * plan[k.STRIDE_2]
        if tokens.between is not None:
            positions += rows * columns
        room += positions * plan[k.STEM_V] * WIDTH
    return room


def _plan_head(plan: list[int], student: MambaClassifier, weights: Weights) -> int:
    """The last linear layer; returns the room that it needs with pooling."""
    weight, bias = _layer(student.head, nn.Linear)
    if bias is None:
        raise ValueError("a head without a bias")
    features = -(-weight.shape[1] // k.AT_ONCE) * k.AT_ONCE
    plan[k.HEAD], plan[k.CLASSES_V] = HEADS[student.config.head], vectors(len(weight))
    plan[k.HEAD_AT] = weights.add(torch.cat([weight.T, weight.new_zeros(features - weight.shape[1], len(weight))]))
    plan[k.HEAD_BIAS_AT] = weights.add(bias)
    return plan[k.CLASSES_V] * WIDTH * k.AT_ONCE + features


def _widest(block: nn.Module) -> int:
    """Outputs of the widest layer without a bias."""
    mixer = block.mixer
    if not isinstance(mixer, Mamba):
        raise ValueError(f"the mixer {type(mixer).__name__}")
    return max(mixer.d_inner, mixer.d_model, mixer.dt_rank + 2 * (vectors(mixer.d_state) + 1) * WIDTH)


def _plan_block(
    plan: list[int], block: Block, kind: type[nn.Module], zeros: int, weights: Weights
) -> tuple[list[int], int]:
    """What the kernel is told of a block, and the room that it needs. kind: of its norm."""
    mixer = block.mixer
    assert isinstance(mixer, Mamba)
    if not only_forward(block, Block) or block.residual != plan[k.RESIDUAL]:
        raise ValueError("a block that is not as it was built")
    given = mixer.plain_weights() if only_forward(mixer, Mamba) and "mix" not in mixer.__dict__ else None
    if given is None:
        raise ValueError(f"the mixer {type(mixer).__name__}, which is not as it was built")
    in_proj, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A_log, D, out_proj = given
    inner, states, rank, width = mixer.d_inner, mixer.d_state, mixer.dt_rank, mixer.d_conv
    own = [0] * k.BLOCK
    own[k.NORM_AT], own[k.BLOCK_EPSILON_AT] = _norm(block.norm, kind, weights)
    own[k.INNER], own[k.INNER_V], own[k.STATES], own[k.STATES_V] = inner, vectors(inner), states, vectors(states)
    own[k.RANK], own[k.CONV], own[k.ZEROS_AT] = rank, width, zeros
    own[k.OVER_STATES] = inner * (vectors(states) + 1) < vectors(inner) * states
    if block.local is not None:
        local = local_weights(block.local, mixer.d_model)
        if local is None or local[0].device.type != "cpu":
            raise ValueError("a local convolution that is not as it was built")
        own[k.LOCAL] = local[0].shape[-1]
        own[k.LOCAL_AT], own[k.LOCAL_BIAS_AT] = weights.add(local[0].permute(1, 2, 0)), weights.add(local[1])
    own[k.X_AT], own[k.Z_AT] = weights.add(in_proj[:inner].T), weights.add(in_proj[inner:].T)
    own[k.CONV_AT], own[k.CONV_BIAS_AT] = weights.add(conv_weight[:, 0].T), weights.add(conv_bias)
    steps, B, C = x_proj.split([rank, states, states])
    A = -torch.exp(A_log.detach().float()) * float(LOG2E)
    if own[k.OVER_STATES]:  # B and C begin vectors of their own: beyond the states there are zeros
        parts = [_padded(steps), _padded(B), C]
        own[k.A_AT] = weights.add(A)
    else:
        parts = [steps, B, C]
        own[k.A_AT] = weights.add(A.T)
    own[k.B_PLACE] = len(parts[0])
    own[k.C_PLACE] = own[k.B_PLACE] + len(parts[1])
    mixed = torch.cat(parts)
    own[k.ROW_V], own[k.MIX_AT] = vectors(len(mixed)), weights.add(mixed.T)
    own[k.STEP_AT], own[k.STEP_BIAS_AT] = weights.add(dt_weight.T), weights.add(dt_bias)
    own[k.D_AT], own[k.OUT_AT] = weights.add(D), weights.add(out_proj.T)
    state = inner * own[k.STATES_V] if own[k.OVER_STATES] else states * own[k.INNER_V]
    room = state + (WORKED + width - 1) * own[k.INNER_V]
    room += WORKED * (5 * own[k.INNER_V] + plan[k.MODEL_V] + own[k.ROW_V] + 1)
    if block.local is not None:
        room = max(room, plan[k.ROWS] * plan[k.COLUMNS] * plan[k.MODEL_V])
    return own, room * WIDTH


def _padded(rows: Tensor) -> Tensor:
    """(n, inputs) with rows of zeros up to whole vectors."""
    return torch.cat([rows, rows.new_zeros(vectors(len(rows)) * WIDTH - len(rows), rows.shape[1])])


def batch_plan_of(student: MambaClassifier, shape: ImageShape, weights: Weights) -> tuple[list[int], int]:
    """What `inference_batch` is told of a student that `plan_of` has found fit, and the room it needs."""
    tokens, head, plan = student.tokens, student.head, [0] * batch.PLAN
    room = math.prod(shape)
    if isinstance(tokens, PixelTokens):
        embed: Any = tokens.embed
        plain = isinstance(embed, nn.Identity)
        plan[batch.TOKENS_AT] = weights.add(torch.ones(1) if plain else embed.weight.flatten())
        plan[batch.TOKENS_BIAS_AT] = weights.add(torch.zeros(1) if plain else embed.bias)
    else:
        plan[batch.TOKENS_AT], plan[batch.TOKENS_BIAS_AT] = _convolution_of(tokens.project, weights)
        begin = tokens.stem if isinstance(tokens, ConvolutionTokens) else tokens.project
        size, stride, padding = begin.kernel_size[0], begin.stride[0], int(begin.padding[0])
        room = shape[0] * math.prod(side + 2 * padding for side in shape[1:]) + k.AT_ONCE * stride
        if isinstance(tokens, ConvolutionTokens):
            plan[batch.STEM_AT], plan[batch.STEM_BIAS_AT] = _convolution_of(tokens.stem, weights)
            rim = 2 * int(tokens.project.padding[0])
            sides = ((side + 2 * padding - size) // stride + 1 + rim for side in shape[1:])
            room += begin.out_channels * math.prod(sides) + k.AT_ONCE * (tokens.project.stride[0] + 1)
    plan[batch.HEAD_AT], plan[batch.HEAD_BIAS_AT] = weights.add(head.weight), weights.add(head.bias)
    room = max(room, head.out_features + head.in_features)
    kind, _ = NORMS[student.config.norm]
    needed = _batch_raster(plan, student.raster, kind, weights)
    for raster in student.rasters()[:-1]:
        inner = [0] * batch.PLAN
        room += math.prod(raster.grid) * raster.channels + _batch_raster(inner, raster, kind, weights)
        plan[batch.BETWEEN] = len(plan)
        plan += inner
    return plan, (tokens.length * student.config.d_model + max(room, needed)) * WIDTH


def _batch_raster(plan: list[int], raster: Raster, kind: type[nn.Module], weights: Weights) -> int:
    """The places of a raster's norm, and of its blocks appended to the plan; returns the vectors of room they need."""
    plan[batch.LAST_NORM_AT], plan[batch.EPSILON_AT] = _norm(raster.norm, kind, weights)
    made = [_batch_block(block, math.prod(raster.grid), kind, weights) for block in raster.blocks]
    for i, *_ in raster.calls():
        plan += made[i][0]
    return max(needed for _, needed in made)


def _convolution_of(layer: nn.Conv2d, weights: Weights) -> tuple[int, int]:
    assert layer.bias is not None
    return weights.add(layer.weight), weights.add(layer.bias)


def _batch_block(block: Any, length: int, kind: type[nn.Module], weights: Weights) -> tuple[list[int], int]:
    """A block's places by the order of `inference_batch`, and the vectors of room that it needs."""
    mixer: Mamba = block.mixer
    in_proj, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A_log, D, out_proj = mixer.plain_weights() or ()
    inner, states, width = mixer.d_inner, mixer.d_state, mixer.d_conv
    A = -torch.exp(A_log.detach().float()) * float(LOG2E)
    A = F.pad(A.where(~A.isnan(), math.nan), (0, states % 2))  # of one kind of NaN; the states in pairs
    norm, epsilon = _norm(block.norm, kind, weights)
    parts = (in_proj, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, out_proj)
    local = [0, 0] if block.local is None else [weights.add(block.local.weight), weights.add(block.local.bias)]
    own = [norm, *(weights.add(part) for part in parts), epsilon, *local]
    room = inner * (states + 1 + batch.width(width) + 6 * CHUNK) + (mixer.dt_rank + mixer.d_model) * CHUNK
    return own, max(room + 2 * BLOCK * (CHUNK + 1), length)
