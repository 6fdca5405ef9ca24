"""The bridge from a teacher's attention to a student's B and C."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.assembling import assemble
from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.bridge import AttentionBridge, bridge_loss, similarities
from pkd_lightning.knowledge.term import Pair
from pkd_lightning.models.blocks import ORDERS
from pkd_lightning.outputs import Output
from tests.support import tiny_config, tiny_run
from tests.test_knowledge import lines
from tests.test_taps import DIRECTIONS, model_of, order_of, tapped

SEEN = torch.ones(5, 5).tril().bool()


def bridge_of(seen: Tensor = SEEN, d_state: int = 3, channels: int = 7, seed: int = 0) -> list[Tensor]:
    """C, B, q, k and what is seen."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (d_state, d_state, channels, channels)
    return [*(torch.randn(2, 5, size, generator=generator) for size in sizes), seen]


def correlations(C: Tensor, B: Tensor, query: Tensor, key: Tensor, seen: Tensor) -> float:
    """2 - 2r, averaged over the rows; of a row with one entry 0."""
    total = 0.0
    for n in range(len(C)):
        for i in range(C.shape[1]):
            columns = [j for j in range(C.shape[1]) if seen[i, j]]
            rows = []
            for left, right in ((C, B), (query, key)):
                row = [sum(float(a) * float(b) for a, b in zip(left[n, i], right[n, j], strict=True)) for j in columns]
                rows.append([value - sum(row) / len(row) for value in row])
            norms = [math.sqrt(sum(value**2 for value in row)) for row in rows]
            if len(columns) > 1:
                total += 2 - 2 * sum(a * b for a, b in zip(*rows, strict=True)) / (norms[0] * norms[1])
    return total / (len(C) * C.shape[1])


@pytest.mark.parametrize("seen", [SEEN, SEEN.T, torch.ones(5, 5).bool()])
def test_the_bridge_is_of_the_correlations_of_rows(seen: Tensor) -> None:
    given = bridge_of(seen)
    assert float(bridge_loss(*given)) == pytest.approx(correlations(*given), rel=1e-5)
    doubled = [part.double() if part.is_floating_point() else part for part in given]
    assert bridge_loss(*doubled).dtype == torch.float64
    assert float(bridge_loss(*doubled)) == pytest.approx(correlations(*given), rel=1e-6)


def test_scale_rotation_and_offsets_do_not_count() -> None:
    C, B, query, key, seen = bridge_of()
    expected = bridge_loss(C, B, query, key, seen)
    turned = torch.linalg.qr(torch.randn(3, 3)).Q
    rows = torch.rand(2, 5, 1) + 0.5
    for same in (
        (C @ turned, B @ turned, query, key),
        (C * rows, B * 3, query / 2, key * 7),
        (C, B, query, key + torch.randn(2, 1, 7)),  # which softmax does not see
        (C.flip(0), B.flip(0), query.flip(0), key.flip(0)),
        (C, B, torch.cat([query, query], -1), torch.cat([key, key], -1)),  # another number of channels
    ):
        torch.testing.assert_close(bridge_loss(*same, seen), expected, rtol=1e-4, atol=1e-6)


def test_the_bridge_is_zero_and_flat_where_similarities_agree() -> None:
    C, B, _, _, seen = bridge_of()
    C.requires_grad_()
    loss = bridge_loss(C, B, 2 * C.detach(), B, seen)
    loss.backward()
    assert loss < 1e-12
    assert C.grad is not None
    assert C.grad.abs().max() < 1e-6


def test_what_is_not_seen_does_not_count() -> None:
    C, B, query, key, seen = bridge_of()
    later = B.clone()
    later[:, 3:] += 1
    changed = similarities(C, later, seen) != similarities(C, B, seen)
    assert not changed[:, :3].any()
    assert changed[:, 3:].any()
    assert not similarities(C, B, seen)[:, ~seen].any()
    assert bridge_loss(C, later, query, key, seen) != bridge_loss(C, B, query, key, seen)


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part[:1],
        lambda part: torch.ones_like(part),
        lambda part: torch.zeros_like(part),
        lambda part: 1e4 * part,
        lambda part: part.double(),
        lambda part: part.bfloat16(),
    ],
    ids=["one", "constant", "zero", "large", "float64", "bfloat16"],
)
def test_losses_and_gradients_are_finite(change: Callable[[Tensor], Tensor]) -> None:
    C, B, query, key, seen = bridge_of()
    given = [change(part).requires_grad_() for part in (C, B, query, key)]
    loss = bridge_loss(*given, seen)
    loss.backward()
    assert loss.isfinite()
    for part in given:
        assert part.grad is not None
        assert part.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert bridge_loss(*given, seen).dtype == torch.promote_types(given[0].dtype, torch.float32)


def test_a_student_whose_tokens_are_all_alike_has_a_finite_gradient() -> None:
    _, _, query, key, seen = bridge_of()
    C, B = (torch.zeros(2, 5, 3, requires_grad=True), torch.ones(2, 5, 3))
    bridge_loss(C, B, query, key, seen).backward()
    assert C.grad is not None
    assert C.grad.isfinite().all()


# ---------------------------------------------------------------------------------- a teacher with attention


D = 7  # channels of its tokens


class Attention(nn.Module):
    """One head, by two or three linear layers, or one for all three."""

    def __init__(self, d: int, together: bool) -> None:
        super().__init__()
        if together:
            self.qkv = nn.Linear(d, 3 * d)
        else:
            self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.together = together

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).chunk(3, -1) if self.together else (self.q(tokens), self.k(tokens), self.v(tokens))
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


class Transformer(nn.Module):
    """A class token, one token for every 2x2 pixels, and layers of attention."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, together: bool = True, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(input_shape[0], D, 2, 2)
        self.first = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention(D, together)}) for _ in range(layers))
        self.head = nn.Linear(D, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(tokens), 1, D), tokens], 1)
        for block in self.blocks:
            tokens = tokens + block["attn"](tokens)  # type: ignore[index]
        return self.head(tokens[:, 0])  # type: ignore[no-any-return]


X_PROJ = "blocks.*.mixer.x_proj"


def seen_by(term: AttentionBridge, student: nn.Module, teacher: nn.Module) -> Pair:
    """What the term sees of two images."""
    logits, own = tapped(student, *term.student_features)
    _, its = tapped(teacher, *term.teacher_features)
    return Pair(Output(logits, own), Output(logits, its), torch.arange(2), torch.arange(2))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_bridge_compares_what_each_block_reads_with_the_same_tokens_of_the_teacher(
    direction: str, together: bool, causal: bool
) -> None:
    student, teacher = model_of(direction, n_blocks=4, dt_rank=2), Transformer((1, 6, 4), 3, together, layers=4)
    paths = {"teacher": "blocks.*.attn.qkv"} if together else {"teacher": "blocks.*.attn.q", "key": "blocks.*.attn.k"}
    term = AttentionBridge(student=X_PROJ, **paths, skip=1, causal=causal).for_models(student, teacher)
    pair = seen_by(term, student, teacher)
    parts, expected = term.parts(pair, 2), 0.0
    for i in range(4):
        x = pair.student.features[f"blocks.{i}.mixer.x_proj"]
        assert x.shape == (2, 6, 2 + 3 + 3)
        attention = teacher.blocks[i]["attn"]  # type: ignore[index]
        with torch.no_grad():
            _, tokens = tapped(teacher, *(f"blocks.{j}.attn" for j in range(i)), "patches")
            before = torch.cat([teacher.first.expand(2, 1, D), tokens["patches"].flatten(2).transpose(1, 2)], 1) + sum(
                tokens[f"blocks.{j}.attn"] for j in range(i)
            )
            q, k = attention.qkv(before).chunk(3, -1)[:2] if together else (attention.q(before), attention.k(before))
        order = order_of(*ORDERS[direction][i % len(ORDERS[direction])])  # type: ignore[index]
        seen = torch.ones(6, 6).tril().bool() if causal else torch.ones(6, 6).bool()
        x, q, k = x[:, order], q[:, 1:][:, order], k[:, 1:][:, order]  # all of it as the student reads it
        expected += correlations(x[..., 5:], x[..., 2:5], q, k, seen) / 4
    assert float(term.loss(pair, parts)) == pytest.approx(expected, rel=1e-3)


def test_tokens_of_another_number_are_those_of_the_student() -> None:
    student, teacher = model_of("alternating", patch_size=4, patch_stride=2), Transformer((1, 6, 4), 3, layers=2)
    term = AttentionBridge(student=X_PROJ, teacher="blocks.*.attn.qkv", skip=1).for_models(student, teacher)
    assert [link.student for link in term.links] == ["blocks.1.mixer.x_proj", "blocks.3.mixer.x_proj"]
    pair = seen_by(term, student, teacher)
    assert term.loss(pair, term.parts(pair, 2)).isfinite()


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        ({}, [r"teacher: 'blocks\.\*\.attn\.qkv': no module of .*needs the modules of the teacher's attention"]),
        ({"teacher": "blocks.*", "key": "blocks.0"}, [r"key='blocks\.0': 1 modules that give k for 4 that give q"]),
        ({"teacher": "blocks.*", "student": "blocks.*"}, [r"student='blocks\.3': has no dt_proj beside it"]),
        ({"teacher": "blocks.*", "student": "bloks.*"}, [r"student: 'bloks\.\*': no module"]),
        ({"skip": -1}, ["skip=-1: must be"]),
        ({"key": 3}, ["key=3: must be the path"]),
        ({"causal": 1}, ["causal=1: must be true or false"]),
    ],
)
def test_what_a_bridge_lacks_is_said(options: dict[str, object], faults: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        AttentionBridge(**{"student": X_PROJ, "teacher": "blocks.*.attn.qkv", **options}).for_models(  # type: ignore[arg-type]
            model_of(), model_of()
        )
    for fault in faults:
        assert any(re.search(fault, found) for found in error.value.faults), error.value.faults


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"student": "blocks.-1.mixer.in_proj", "teacher": "blocks.-1.attn.qkv"}, "not tokens of dt_rank"),
        ({"teacher": "blocks.-1.attn"}, "blocks.-1.attn': gives 7 channels, not q, k and v side by side"),
        ({"teacher": "head"}, "skip=0: leaves fewer than 2 of the 1 tokens of 'head'"),
        (
            {"teacher": "blocks.-1.attn.qkv", "key": "blocks.-1.attn"},
            r"key='blocks.-1.attn': gives \(2, 7, 7\), and the module of q \(2, 7, 21\)",
        ),
        ({"skip": 6}, "skip=6: leaves fewer than 2 of the 7 tokens"),
    ],
)
def test_shapes_are_checked_before_anything_is_trained(options: dict[str, object], fault: str) -> None:
    student, teacher = model_of(dt_rank=3), Transformer((1, 6, 4), 3)
    made = AttentionBridge(**{"student": X_PROJ, "teacher": "blocks.*.attn.qkv", **options})  # type: ignore[arg-type]
    term = made.for_models(student, teacher)
    pair = seen_by(term, student, teacher)
    with pytest.raises(ConfigError, match=fault):
        term.parts(pair, 2)


# ---------------------------------------------------------------------------------- in a run


def test_a_run_with_a_bridge_from_attention(tmp_path: Path) -> None:
    tiny_run(tmp_path, "knowledge=attention_bridge", "teacher=attention", "boosting.knowledge.attention_bridge.skip=1")
    found = [line for line in lines(tmp_path) if str(line["stage"]).startswith("round")]
    assert len(found) == 3
    assert all(0 < line["knowledge/attention_bridge"] < 4 for line in found)
    assert all(0 < line["gradient_share/attention_bridge"] < 1 for line in found)


def test_a_bridge_from_a_teacher_without_attention_is_refused(tmp_path: Path) -> None:
    assemble(tiny_config(tmp_path, "knowledge=attention_bridge"))
    said = r"boosting\.knowledge\.attention_bridge\.teacher: 'blocks\.\*\.attn\.qkv': no module .*attention that give q"
    with pytest.raises(ConfigError, match=said):
        tiny_run(tmp_path, "knowledge=attention_bridge")
    assert not list(tmp_path.rglob("metrics.jsonl"))
