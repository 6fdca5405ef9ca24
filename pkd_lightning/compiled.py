"""Students for inference: their weights packed for a kernel that computes one, or several, from image to logits."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pkd_lightning.kernels import inference as k
from pkd_lightning.kernels.lanes import LOG2E, WIDTH
from pkd_lightning.kernels.threads import share, threads_for
from pkd_lightning.models.building import ImageShape, InputShape
from pkd_lightning.models.classifier import ORDERS, Block, MambaClassifier, as_image
from pkd_lightning.models.mamba import Mamba, only_forward, own_weights
from pkd_lightning.models.tokens import ConvolutionTokens, PatchTokens, PixelTokens
from pkd_lightning.prefixes import Scales

logger = logging.getLogger(__name__)

NORMS = {nn.Identity: k.NO_NORM, nn.RMSNorm: k.RMS, nn.LayerNorm: k.LAYER}
HEADS = {"flatten": k.FLATTEN, "mean": k.MEAN, "grid": k.GRID}
WORKED = k.STEPS + k.AT_ONCE  # rows of a chunk's buffers


def vectors(count: int) -> int:
    """Of 16 lanes, for `count` values."""
    return -(-count // WIDTH)


class _Weights:
    """Weights one after another, each of its last dimension padded with zeros to whole vectors."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.size = 0

    def add(self, values: Tensor, width: int | None = None) -> int:
        """Append (..., n) with each n padded to `width`, or to whole vectors; where it begins."""
        values = values.detach().to(torch.float32)
        width = vectors(values.shape[-1]) * WIDTH if width is None else width
        begin, padded = self.size, values.new_zeros(*values.shape[:-1], width)
        padded[..., : values.shape[-1]] = values
        self.parts.append(padded.flatten())
        self.size += padded.numel()
        return begin


class CompiledStudent(nn.Module):
    """A `MambaClassifier` with Mamba mixers as one kernel, on the CPU in float32; its weights are a copy.

    Args:
        student: the model, as it is now: what changes in it later is not seen.
        input_shape: of one of its inputs.

    Raises:
        ValueError: where there is no kernel for it, saying why.
    """

    def __init__(self, student: nn.Module, input_shape: InputShape) -> None:
        super().__init__()
        weights = _Weights()
        try:
            plan, self.room = _plan(student, as_image(input_shape), weights)
        except _Unfit as error:
            raise ValueError(str(error)) from None
        assert isinstance(student, MambaClassifier)
        self.plan = torch.tensor(plan)
        self.weights = torch.cat([*weights.parts, torch.zeros(WIDTH)])
        self.scales = torch.tensor([0.0, 1.0])  # of a student by itself
        self.input_shape = tuple(input_shape)
        self.classes = student.head.out_features
        self._build()
        blocks: list[Any] = list(student.blocks)
        states = [blocks[i % len(blocks)].mixer.A_log.numel() for i in range(student.config.n_blocks)]
        self.updates = student.tokens.length * sum(states)  # of the scans for one image

    def _build(self) -> None:
        self._table = torch.tensor(self.addresses(self.scales))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._build()  # a copy lies elsewhere in memory

    def addresses(self, scales: Tensor) -> list[int]:
        """A row of the kernel's table."""
        return [self.plan.data_ptr(), self.weights.data_ptr(), scales.data_ptr()]

    def forward(self, images: Tensor) -> Tensor:
        """Map preprocessed images (batch, C, H, W), or signals, to logits (batch, classes)."""
        return _run([self], self._table, images)


class CompiledPrefixes:
    """The first students of an ensemble, all compiled, in one call.

    Args:
        students: the students.
        scales: (a_t, c_t) of each.
    """

    def __init__(self, students: Sequence[CompiledStudent], scales: Sequence[Scales]) -> None:
        self.students = list(students)
        self.scales = torch.tensor([list(pair) for pair in scales])
        self._build()

    def _build(self) -> None:
        rows = zip(self.students, self.scales, strict=True)
        self._table = torch.tensor([row for student, scales in rows for row in student.addresses(scales)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._build()  # a copy lies elsewhere in memory

    def __len__(self) -> int:
        return len(self.students)

    def __call__(self, images: Tensor, count: int) -> Tensor:
        """Logits of the prefix of the first `count` students on preprocessed images (batch, *input_shape)."""
        return _run(self.students[:count], self._table, images)


def compile_students(members: Sequence[nn.Module], input_shape: InputShape) -> list[nn.Module]:
    """Each student compiled; where there is no kernel for one, itself, and the log says why."""
    compiled: list[nn.Module] = []
    for t, member in enumerate(members):
        try:
            compiled.append(member if isinstance(member, CompiledStudent) else CompiledStudent(member, input_shape))
        except ValueError as error:
            logger.info("student %d is not compiled: %s", t + 1, error)
            compiled.append(member)
    return compiled


_rooms: list[Tensor] = []  # working memory, used again: each call takes one a thread, and gives it back


def _run(students: Sequence[CompiledStudent], table: Tensor, images: Tensor) -> Tensor:
    """The logits of `students`, the first of the table, on images."""
    shape, classes = students[0].input_shape, students[0].classes
    if images.device.type != "cpu" or not images.is_floating_point() or images.shape[1:] != shape:
        given = f"{images.dtype} {tuple(images.shape)} on {images.device}"
        raise ValueError(f"a compiled ensemble reads preprocessed images (batch, {', '.join(map(str, shape))}) of"
                         f" floating point on the CPU, not {given}")  # fmt: skip
    images = images.detach().to(torch.float32).contiguous()
    logits = torch.empty(len(images), classes)
    memory = (table.data_ptr(), images.data_ptr(), logits.data_ptr(), math.prod(shape), classes)
    room = max(student.room for student in students)

    def run(thread: int, first: int, last: int, _alive: object = (students, table, images, logits)) -> None:
        try:
            space = _rooms.pop()
        except IndexError:
            space = torch.empty(0)
        if space.numel() < room:
            space = torch.empty(room)
        k.infer(memory, 0, len(students), first, last, space.data_ptr())
        _rooms.append(space)

    updates = len(images) * sum(student.updates for student in students)
    share(run, len(images), threads_for(len(images), updates))
    return logits


class _Unfit(Exception):
    """There is no kernel for a student; says why."""


def _plan(student: nn.Module, shape: ImageShape, weights: _Weights) -> tuple[list[int], int]:
    """What the kernel is told of a student, its weights being appended to `weights`, and the room it needs."""
    if not only_forward(student, MambaClassifier):
        raise _Unfit(f"a {type(student).__name__} that is no plain MambaClassifier")
    assert isinstance(student, MambaClassifier)
    config, tokens, plan = student.config, student.tokens, [0] * k.PLAN
    plan[k.CHANNELS], plan[k.HEIGHT], plan[k.WIDTH_] = shape
    plan[k.ROWS], plan[k.COLUMNS] = tokens.grid
    plan[k.MODEL], plan[k.MODEL_V] = config.d_model, vectors(config.d_model)
    room = max(_plan_tokens(plan, tokens, weights), _plan_head(plan, student, weights))
    plan[k.NORM], plan[k.RESIDUAL], plan[k.BLOCKS] = NORMS[type(student.norm)], config.residual, config.n_blocks
    plan[k.LAST_NORM_AT], plan[k.EPSILON_AT] = _norm(student.norm, weights)
    zeros = weights.add(torch.zeros(max(_widest(block) for block in student.blocks)))
    blocks = [_plan_block(plan, block, zeros, weights) for block in student.blocks]  # type: ignore[arg-type]
    orders = ORDERS[config.direction]
    for i in range(config.n_blocks):
        own, needed = blocks[i % len(blocks)]
        room = max(room, needed)
        by_columns, backwards = orders[i % len(orders)]
        plan += [int(by_columns), int(backwards), *own[2:]]
    return plan, tokens.length * plan[k.MODEL_V] * WIDTH + room


def _layer(layer: nn.Module, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None]:
    own = own_weights(layer, kind)
    if own is None or own[0].device.type != "cpu":
        raise _Unfit(f"a {type(layer).__name__} that is no plain {kind.__name__} on the CPU")
    return own


def _linear(layer: nn.Module, weights: _Weights) -> tuple[int, int]:
    """Where the weights (inputs, outputs) of a linear layer and its bias begin."""
    weight, bias = _layer(layer, nn.Linear)
    return weights.add(weight.T), weights.add(weight.new_zeros(len(weight)) if bias is None else bias)


def _convolution(layer: nn.Module, weights: _Weights) -> tuple[int, int]:
    """Where the weights (rows, columns, inputs, outputs) of a convolution and its bias begin."""
    weight, bias = _layer(layer, nn.Conv2d)
    assert bias is not None
    return weights.add(weight.permute(2, 3, 1, 0)), weights.add(bias)


def _norm(norm: nn.Module, weights: _Weights) -> tuple[int, int]:
    """Where the weight of a norm, then its bias, and its epsilon begin."""
    if only_forward(norm, nn.Identity):
        return 0, 0
    weight, bias = _layer(norm, nn.RMSNorm if isinstance(norm, nn.RMSNorm) else nn.LayerNorm)
    begin = weights.add(weight)
    weights.add(torch.zeros_like(weight) if bias is None else bias)
    epsilon = torch.finfo(weight.dtype).eps if norm.eps is None else norm.eps
    return begin, weights.add(torch.tensor([epsilon]))


def _plan_tokens(plan: list[int], tokens: nn.Module, weights: _Weights) -> int:
    """The tokeniser; returns the room that it needs."""
    if not only_forward(tokens, type(tokens)):
        raise _Unfit("a tokeniser with hooks")
    channels, height, width = plan[k.CHANNELS], plan[k.HEIGHT], plan[k.WIDTH_]
    if isinstance(tokens, PixelTokens):
        plan[k.POOL_ROWS], plan[k.POOL_COLUMNS] = tokens.block
        plan[k.AVERAGE] = tokens.average_channels
        if plan[k.MODEL] == 1:
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
        room += positions * plan[k.STEM_V] * WIDTH
    return room


def _plan_head(plan: list[int], student: MambaClassifier, weights: _Weights) -> int:
    """The last linear layer; returns the room that it needs with pooling."""
    weight, bias = _layer(student.head, nn.Linear)
    assert bias is not None
    features = -(-weight.shape[1] // k.AT_ONCE) * k.AT_ONCE
    plan[k.HEAD], plan[k.CLASSES_V] = HEADS[student.config.head], vectors(len(weight))
    plan[k.HEAD_AT] = weights.add(torch.cat([weight.T, weight.new_zeros(features - weight.shape[1], len(weight))]))
    plan[k.HEAD_BIAS_AT] = weights.add(bias)
    return plan[k.CLASSES_V] * WIDTH * k.AT_ONCE + features


def _widest(block: nn.Module) -> int:
    """Outputs of the widest layer without a bias."""
    mixer = block.mixer
    if not isinstance(mixer, Mamba):
        raise _Unfit(f"the mixer {type(mixer).__name__}")
    return max(mixer.d_inner, mixer.d_model, mixer.dt_rank + 2 * (vectors(mixer.d_state) + 1) * WIDTH)


def _plan_block(plan: list[int], block: Block, zeros: int, weights: _Weights) -> tuple[list[int], int]:
    """What the kernel is told of a block, and the room that it needs."""
    mixer = block.mixer
    assert isinstance(mixer, Mamba)
    given = mixer.plain_weights() if only_forward(mixer, Mamba) and only_forward(block, Block) else None
    if given is None:
        raise _Unfit(f"the mixer {type(mixer).__name__}, which is not as it was built")
    in_proj, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A_log, D, out_proj = given
    inner, states, rank, width = mixer.d_inner, mixer.d_state, mixer.dt_rank, mixer.d_conv
    own = [0] * k.BLOCK
    own[k.NORM_AT], own[k.BLOCK_EPSILON_AT] = _norm(block.norm, weights)
    own[k.INNER], own[k.INNER_V], own[k.STATES], own[k.STATES_V] = inner, vectors(inner), states, vectors(states)
    own[k.RANK], own[k.CONV], own[k.ZEROS_AT] = rank, width, zeros
    own[k.OVER_STATES] = inner * (vectors(states) + 1) < vectors(inner) * states
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
    return own, room * WIDTH


def _padded(rows: Tensor) -> Tensor:
    """(n, inputs) with rows of zeros up to whole vectors."""
    return torch.cat([rows, rows.new_zeros(vectors(len(rows)) * WIDTH - len(rows), rows.shape[1])])
