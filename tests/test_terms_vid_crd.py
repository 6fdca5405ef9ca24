"""Terms that train something beside the student: VID and CRD. Against another implementation, and what they claim."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning import ranks
from pkd_lightning.assembling import assemble
from pkd_lightning.data.module import DataModule
from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.attached import shares
from pkd_lightning.knowledge.crd import CRD, Contrast, contrastive_loss
from pkd_lightning.knowledge.term import FeatureTerm, Pair
from pkd_lightning.knowledge.tokens import resized
from pkd_lightning.knowledge.vid import VID, Gaussian
from pkd_lightning.outputs import Output
from tests.support import ACCEPT, patterns, tiny_config, tiny_run
from tests.test_fit_resume import assert_same, killed_at, run_until_done

__all__ = ["patterns"]
AT: dict[str, Any] = {"student": "at", "teacher": "at"}
SAMPLES = 32  # a power of two: torchdistill's table of equal probabilities has no rounding then


def pair(student: Tensor, teacher: Tensor, index: Tensor | None = None, target: Tensor | None = None) -> Pair:
    """Of one feature each, called `at`; every sample has a class of its own, unless labels are given."""
    index = torch.arange(len(student)) if index is None else index
    logits = torch.zeros(len(student), 3)
    return Pair(
        Output(logits, {"at": student}), Output(logits, {"at": teacher}), index if target is None else target, index
    )


def part_of(term: FeatureTerm, seen: Pair, samples: int = SAMPLES) -> tuple[nn.ModuleList, Any]:
    parts = term.parts(seen, samples)
    assert isinstance(parts, nn.ModuleList)
    return parts, parts[0]


def theirs(name: str) -> Any:
    return getattr(pytest.importorskip("torchdistill.losses.mid_level"), name)


# ---------------------------------------------------------------------------------- VID


def gaussian(student: Tensor, teacher: Tensor, **options: Any) -> tuple[VID, nn.ModuleList, Gaussian]:
    term = VID(**AT, **options)
    parts, part = part_of(term, pair(student, teacher))
    with torch.no_grad():
        part.alpha += torch.linspace(-3, 3, len(part.alpha))
    return term, parts, part


def test_vid_is_that_of_torchdistill() -> None:
    student, teacher = torch.randn(4, 9, 6), torch.randn(4, 9, 5)
    term, parts, part = gaussian(student, teacher)
    pairs = {"one": {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}}
    other = theirs("VIDLoss")(pairs)({"s": {"output": (part.mean(student), part.variance)}}, {"t": {"output": teacher}})
    torch.testing.assert_close(term.loss(pair(student, teacher), parts), other, rtol=1e-6, atol=0)


def test_the_variance_starts_where_it_is_told() -> None:
    for variance in (5.0, 0.3):
        torch.testing.assert_close(Gaussian(3, 4, variance).variance, torch.full((4,), variance))


def test_vid_is_least_where_the_mean_is_the_teacher_and_the_variance_that_of_the_errors() -> None:
    student, teacher = torch.randn(4, 9, 6), torch.randn(4, 16, 5)
    term, parts, part = gaussian(student, teacher)
    mean = part.mean(resized(student, torch.zeros(1, 16, 1))).detach()
    exact = term.loss(pair(student, mean), parts)  # the teacher is the mean
    torch.testing.assert_close(exact, part.variance.log().mean() / 2)
    gradients = torch.autograd.grad(exact, list(part.mean.parameters()))
    assert all(float(one.abs().max()) == 0 for one in gradients)
    errors = (mean - teacher).square().mean((0, 1))
    with torch.no_grad():
        part.alpha.copy_(torch.log(torch.expm1(errors - 1e-5)))
    (slope,) = torch.autograd.grad(term.loss(pair(student, teacher), parts), part.alpha)
    assert slope.abs().max() < 1e-6


def test_vid_learns_what_the_student_does_not_know() -> None:
    """A channel that is noise gets a large variance, and one that the student has a small one."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(256, 2, generator=generator).abs()
    teacher = torch.stack([student[:, 0], torch.randn(256, generator=generator)], 1)
    term, parts, part = gaussian(student, teacher)
    with torch.no_grad():
        for layer in part.mean[::2]:
            layer.weight.copy_(torch.eye(2))
    optimizer = torch.optim.Adam(parts.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        term.loss(pair(student, teacher), parts).backward()
        optimizer.step()
    assert part.variance[0] < 0.1 < 0.5 < part.variance[1] < 1.5


# ---------------------------------------------------------------------------------- CRD


def batches(count: int, size: int = 6, channels: tuple[int, int] = (5, 7)) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        student, teacher = (torch.randn(size, one, generator=generator) for one in channels)
        made.append(pair(student, teacher, torch.randperm(SAMPLES, generator=generator)[:size]))
    return made


@pytest.mark.parametrize(("temperature", "momentum", "negatives"), [(0.07, 0.5, 20), (1.0, 0.9, 3)])
def test_crd_and_its_banks_are_those_of_torchdistill(temperature: float, momentum: float, negatives: int) -> None:
    term = CRD(**AT, dim=8, negatives=negatives, temperature=temperature, momentum=momentum)
    seen = batches(4)
    _, part = part_of(term, seen[0])
    other = theirs("CRDLoss")("norm", "empty", "norm", 8, SAMPLES, negatives, SAMPLES, temperature, momentum)
    other.memory_v1.copy_(part.student_bank)
    other.memory_v2.copy_(part.teacher_bank)
    for one in seen:
        embedded = part.embedded(one.student.features["at"], one.teacher.features["at"])
        drawn = torch.randint(SAMPLES, (len(one.index), negatives))
        supplement = {"pos_idx": one.index, "contrast_idx": torch.cat([one.index[:, None], drawn], 1)}
        student = {"norm": {"output": embedded[0]}, "empty": {"input": supplement}}
        expected = other(student, {"norm": {"output": embedded[1]}})
        mine = term.contrasted(part, embedded, one.index, drawn, torch.ones_like(drawn).bool())
        torch.testing.assert_close(mine, expected.squeeze(), rtol=1e-5, atol=0)
        torch.testing.assert_close(part.student_bank, other.memory_v1, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part.teacher_bank, other.memory_v2, rtol=1e-5, atol=1e-6)
    layers = list(part.student.parameters())
    gradients = [torch.autograd.grad(one, layers, retain_graph=True) for one in (mine, expected.squeeze())]
    for own, its in zip(*gradients, strict=True):
        torch.testing.assert_close(own, its, rtol=1e-4, atol=1e-5)


def test_the_contrastive_loss_is_that_of_the_paper() -> None:
    """h(s) by probabilities, sample by sample; negatives that do not count are as if they had not been drawn."""
    scores, log_z = torch.randn(3, 5, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    counted = torch.tensor([[True] * 4, [True, False, True, False], [False] * 3 + [True]])
    alone = []
    for row, which in zip(scores.tolist(), counted.tolist(), strict=True):
        noise = sum(which) / 10
        critic = [math.exp(one) / math.exp(1.3) / (math.exp(one) / math.exp(1.3) + noise) for one in row]
        alone.append(
            -math.log(critic[0]) - sum(math.log(1 - one) for one, kept in zip(critic[1:], which, strict=True) if kept)
        )
    assert float(contrastive_loss(scores, counted, log_z, 10)) == pytest.approx(sum(alone) / 3, rel=1e-12)


def test_the_embeddings_of_a_sample_come_together() -> None:
    """A student that knows which sample it is comes near to the teacher's embedding, and nearer than to others'."""
    torch.manual_seed(0)
    student, teacher = torch.randn(SAMPLES, 12), torch.randn(SAMPLES, 9)
    term, seen = CRD(**AT, dim=16, negatives=24), pair(student, teacher)
    parts, part = part_of(term, seen)
    optimizer = torch.optim.Adam(parts.parameters(), 0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(term.loss(seen, parts))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    own, its = part.embedded(student, teacher)
    assert ((own @ its.T).argmax(1) == torch.arange(SAMPLES)).float().mean() > 0.6


def test_negatives_are_other_samples_and_of_other_classes_once_their_labels_were_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    contrasted = CRD.contrasted

    def noted(self: CRD, part: Contrast, embedded: Any, index: Tensor, drawn: Tensor, counted: Tensor) -> Tensor:
        calls.append((index, drawn, counted))
        return contrasted(self, part, embedded, index, drawn, counted)

    monkeypatch.setattr(CRD, "contrasted", noted)
    labels = torch.arange(SAMPLES) % 4
    term, supervised = (CRD(**AT, dim=4, negatives=500, other_classes=one) for one in (False, True))
    seen = [pair(torch.randn(8, 3), torch.randn(8, 3), rows, labels[rows]) for rows in torch.randperm(SAMPLES).split(8)]
    parts, _ = part_of(supervised, seen[0])
    for one in seen:
        supervised.loss(one, parts)
    known: set[int] = set()
    for index, drawn, counted in calls:
        known |= set(index.tolist())
        assert not (drawn == index[:, None]).any()
        assert set(drawn.unique().tolist()) == set(range(SAMPLES))
        told = torch.tensor([row in known for row in range(SAMPLES)])
        assert torch.equal(counted, ~(told[drawn] & (labels[drawn] == labels[index][:, None])))
    term.loss(seen[0], parts)
    assert calls[-1][2].all()


def test_a_bank_has_what_was_seen_of_each_sample_and_no_batch_that_exploded() -> None:
    term = CRD(**AT, dim=4, negatives=8, momentum=0.25)
    seen = pair(torch.randn(3, 5), torch.randn(3, 7), torch.tensor([4, 0, 9]))
    parts, part = part_of(term, seen)
    before = part.student_bank.clone()
    term.loss(seen, parts)
    embedded, _ = part.embedded(seen.student.features["at"], seen.teacher.features["at"])
    moved = F.normalize(0.25 * before[seen.index] + 0.75 * embedded, dim=1)
    torch.testing.assert_close(part.student_bank[seen.index], moved)
    others = [row for row in range(SAMPLES) if row not in (4, 0, 9)]
    assert torch.equal(part.student_bank[others], before[others])
    state = {name: value.clone() for name, value in part.state_dict().items()}
    for wrong in (math.nan, math.inf):
        student = seen.student.features["at"].clone()
        student[0] = wrong
        term.loss(pair(student, seen.teacher.features["at"], seen.index), parts)
    assert torch.equal(part.student_bank[4], state["student_bank"][4])
    assert all(one.isfinite().all() for one in part.state_dict().values())


def test_the_constant_is_that_of_the_first_finite_batch() -> None:
    term, seen = CRD(**AT, dim=4, negatives=8), batches(3)
    parts, part = part_of(term, seen[0])
    wrong = pair(torch.full((6, 5), math.nan), torch.randn(6, 7))
    term.loss(wrong, parts)
    assert not part.log_z[0].isfinite()
    term.loss(seen[0], parts)
    first = part.log_z.clone()
    assert first.isfinite().all()
    term.loss(seen[1], parts)
    assert torch.equal(part.log_z, first)


def test_the_gradient_can_be_taken_after_the_bank_has_moved() -> None:
    term, (first, second) = CRD(**AT, dim=4, negatives=8), batches(2)
    parts, part = part_of(term, first)
    losses = {"one": term.loss(first, parts), "two": term.loss(second, parts)}
    found = shares(losses, list(part.parameters()))
    assert 0 < found["one"] < 1


def test_tokens_and_planes_are_averaged() -> None:
    tokens, planes = torch.randn(4, 9, 5), torch.randn(4, 7, 3, 3)
    term = CRD(**AT, dim=4, negatives=8)
    _, part = part_of(term, pair(tokens, planes))
    own, its = part.embedded(tokens, planes)
    again = part.embedded(tokens.mean(1), planes.mean((2, 3)))
    torch.testing.assert_close(own, again[0])
    torch.testing.assert_close(its, again[1])


def test_several_processes_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = assemble(tiny_config(tmp_path, "knowledge=crd"))
    data = DataModule(experiment.data)
    monkeypatch.setattr(ranks._Group, "size", 2)
    with pytest.raises(
        ConfigError, match=r"boosting\.knowledge\.crd: has one memory bank .* 2 processes .*trainer\.devices=1"
    ):
        experiment.check(data)


def test_one_training_row_has_nothing_to_contrast_with() -> None:
    with pytest.raises(ConfigError, match="contrasts training rows with each other, and there is 1"):
        CRD(**AT).parts(pair(torch.zeros(2, 3), torch.zeros(2, 3)), 1)


@pytest.mark.parametrize("mode", ["fast", "step"])
def test_a_fit_with_a_bank_resumes_to_the_same_bits(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("knowledge=crd", "boosting.knowledge.crd.negatives=16", "boosting.knowledge.crd.dim=8", ACCEPT,
             "boosting.rounds=2", "trainer.max_epochs=3", f"trainer.mode={mode}")  # fmt: skip
    tiny_run(tmp_path / "whole", *flags)
    with killed_at(11, monkeypatch) as kills:
        run_until_done(tmp_path / "parts", *flags)
    assert {kill.split()[0] for kill in kills} >= {"round-00", "round-01"}
    assert_same(tmp_path / "whole", tmp_path / "parts")
    curves = [
        [
            {name: line[name] for name in ("train_loss", "knowledge/crd", "gradient_share/crd")}
            for path in (tmp_path / one).rglob("metrics.jsonl")
            for line in map(json.loads, path.read_text().splitlines())
            if line["stage"] != "teacher"
        ]
        for one in ("whole", "parts")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 6


# ---------------------------------------------------------------------------------- both


@pytest.mark.parametrize("make", [VID, lambda **given: CRD(dim=4, negatives=8, **given)], ids=["VID", "CRD"])
@pytest.mark.parametrize("case", ["usual", "large", "constant", "alike"])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_finite(
    make: Callable[..., FeatureTerm], case: str, samples: int, dtype: torch.dtype
) -> None:
    half = dtype == torch.bfloat16
    student, teacher = torch.randn(samples, 9, 5), torch.randn(samples, 9, 5)
    if case == "large":
        student, teacher = 1e4 * student, 1e4 * teacher
    elif case == "constant":
        student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    elif case == "alike":
        student = teacher
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    term = make(**AT)
    parts, part = part_of(term, pair(student, teacher))
    parts.to(torch.float32 if half else dtype)
    if isinstance(part, Contrast):
        with torch.no_grad():
            part.teacher.bias.zero_()  # of features that are 0 the embedding is, too
    seen = pair(student, teacher, target=torch.zeros(samples, dtype=torch.int64))
    for _ in range(2):  # with random rows in the bank, and with what was there before
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = term.loss(seen, parts)
        assert loss.isfinite()
        assert loss.dtype == (torch.float32 if half else dtype)
        gradients = torch.autograd.grad(loss, [student, *parts.parameters()])
        assert all(one.isfinite().all() for one in gradients)


@pytest.mark.parametrize(
    ("make", "options", "fault"),
    [
        (VID, {"variance": 0}, "variance=0: must be a number above 1e-05"),
        (VID, {"teacher": ["a", "b"]}, "2 modules for 1 of the student"),
        (CRD, {"dim": 0, "negatives": 1.5}, r"dim=0: must be(.|\n)*negatives=1\.5: must be"),
        (CRD, {"temperature": 0, "momentum": 1.1}, r"temperature=0: must be(.|\n)*momentum=1\.1: must be"),
        (CRD, {"other_classes": "no"}, "other_classes='no': must be true or false"),
    ],
)
def test_wrong_options_are_named(make: type[FeatureTerm], options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        make(**{**AT, **options})


def test_the_files_have_what_the_sources_have(tmp_path: Path) -> None:
    terms = assemble(tiny_config(tmp_path, "knowledge=[vid,crd]")).boosting.knowledge
    assert terms["vid"] == VID(student="blocks.-1", teacher="blocks.-1")
    assert terms["crd"] == CRD(weight=0.8, student="blocks.-1", teacher="blocks.-1")
