"""Terms of logits: standardised ones, DKD, DIST. Each against another implementation, and what it claims."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.assembling import assemble
from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.dist import DIST
from pkd_lightning.knowledge.dkd import DKD, target_and_others
from pkd_lightning.knowledge.standardised import Standardised
from pkd_lightning.knowledge.term import Pair, Term
from pkd_lightning.losses import soft_loss
from pkd_lightning.outputs import Output
from pkd_lightning.schedules import warmup
from tests.support import patterns, tiny_config

__all__ = ["patterns"]
TERMS = [Standardised(), DKD(), DIST()]


def loss(term: Term, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
    """Of a batch of logits; the labels are 0, 1, 2, ... unless they are given."""
    index = torch.arange(len(student))
    target = index % student.shape[1] if target is None else target
    return term.loss(Pair(Output(student), Output(teacher), target, index), nn.Module())


def logits(samples: int = 6, classes: int = 5, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = scale * torch.randn(2, samples, classes, generator=generator, dtype=torch.float64)
    return drawn[0], drawn[1]


def gradient(term: Term, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(term, student, teacher), student)[0]


# ---------------------------------------------------------------------------------- other implementations


def theirs(name: str, student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    """A loss of torchdistill's of these logits."""
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    found = getattr(losses, name)("at", "output", "at", "output", **options)
    return found({"at": {"output": student}}, {"at": {"output": teacher}})  # type: ignore[no-any-return]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_standardised_logits_are_those_of_torchdistill(temperature: float) -> None:
    student, teacher = logits()
    other = theirs("LogitStdKDLoss", student, teacher, temperature=temperature, beta=1.0)  # without tau^2
    torch.testing.assert_close(
        loss(Standardised(temperature=temperature), student, teacher), temperature**2 * other, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("options", [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (0.0, 1.0, 1.5)])
def test_dist_is_that_of_torchdistill(options: tuple[float, float, float]) -> None:
    student, teacher = logits()
    beta, gamma, temperature = options
    other = theirs("DISTLoss", student, teacher, beta=beta, gamma=gamma, tau=temperature)
    mine = loss(DIST(beta=beta, gamma=gamma, temperature=temperature), student, teacher)
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


def decoupled(student: list[float], teacher: list[float], target: int, options: tuple[float, float, float]) -> float:
    """DKD of one sample, by the paper's sums of probabilities."""
    alpha, beta, temperature = options
    own, its = ([math.exp(value / temperature) for value in row] for row in (student, teacher))
    p, q = ([value / sum(row) for value in row] for row in (own, its))
    tckd = q[target] * math.log(q[target] / p[target]) + (1 - q[target]) * math.log((1 - q[target]) / (1 - p[target]))
    nckd = 0.0
    for one in range(len(p)):
        if one != target:
            within = [row[one] / (1 - row[target]) for row in (p, q)]
            nckd += within[1] * math.log(within[1] / within[0])
    return temperature**2 * (alpha * tckd + beta * nckd)


@pytest.mark.parametrize("options", [(1.0, 8.0, 4.0), (2.0, 0.0, 1.0), (0.0, 1.0, 2.5)])
def test_dkd_is_that_of_the_paper(options: tuple[float, float, float]) -> None:
    student, teacher = logits()
    labels = [4, 0, 2, 2, 1, 3]
    alone = [decoupled(*rows, options) for rows in zip(student.tolist(), teacher.tolist(), labels, strict=True)]
    alpha, beta, temperature = options
    mine = loss(DKD(alpha=alpha, beta=beta, temperature=temperature), student, teacher, torch.tensor(labels))
    assert float(mine) == pytest.approx(sum(alone) / len(alone), rel=1e-12)


def test_dkd_with_the_weights_of_plain_distillation_is_that() -> None:
    """KL = TCKD + (1 - q_target) NCKD, sample by sample (equation 5)."""
    student, teacher = logits()
    for row in range(len(student)):
        own, its, target = student[row : row + 1], teacher[row : row + 1], torch.tensor([row % 5])
        rest = 1 - float((its / 3).softmax(1)[0, row % 5])
        mine = loss(DKD(alpha=1.0, beta=rest, temperature=3.0), own, its, target)
        torch.testing.assert_close(mine, soft_loss(own, its, 3.0), rtol=1e-10, atol=0)


def test_the_other_classes_are_all_but_the_target() -> None:
    student, _ = logits(classes=4)
    labels = torch.tensor([0, 1, 2, 3, 3, 0])
    binary, others = target_and_others(student, labels, 2.0)
    for row, label in enumerate(labels.tolist()):
        assert others[row].tolist() == [student[row, one].item() for one in range(4) if one != label]
        torch.testing.assert_close((binary[row] / 2).softmax(0)[0], (student[row] / 2).softmax(0)[label])


# ---------------------------------------------------------------------------------- what they claim


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_it_is_0_and_pulls_nowhere_where_the_student_is_the_teacher(term: Term) -> None:
    _, teacher = logits()
    assert abs(float(loss(term, teacher, teacher))) < 1e-12
    assert gradient(term, teacher, teacher).abs().max() < 1e-7
    student, _ = logits(seed=1)
    assert loss(term, student, teacher) > 0.1


def positive(rows: Tensor) -> Tensor:
    return torch.linspace(0.2, 5, len(rows), dtype=rows.dtype)[:, None]


INVARIANCES: list[tuple[Term, Callable[[Tensor], Tensor]]] = [
    (Standardised(), lambda rows: rows + 10 * positive(rows)),
    (Standardised(), lambda rows: rows * positive(rows)),
    (DKD(), lambda rows: rows + 10 * positive(rows)),
    (DIST(), lambda rows: rows + 10 * positive(rows)),
]


@pytest.mark.parametrize(("term", "change"), INVARIANCES)
def test_what_does_not_count(term: Term, change: Callable[[Tensor], Tensor]) -> None:
    """Shifts of a sample's logits, and factors where they are standardised: of the student and of the teacher."""
    student, teacher = logits()
    expected = loss(term, student, teacher)
    for own, its in ((change(student), teacher), (student, change(teacher))):
        torch.testing.assert_close(loss(term, own, its), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("term", [DKD(), DIST()], ids=lambda term: type(term).__name__)
def test_a_factor_counts_where_logits_are_not_standardised(term: Term) -> None:
    student, teacher = logits()
    assert abs(loss(term, 3 * student, teacher) - loss(term, student, teacher)) > 1e-2


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_the_order_of_samples_and_of_classes_does_not_count(term: Term) -> None:
    student, teacher = logits()
    rows, columns = torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor([2, 0, 4, 1, 3])
    target = torch.arange(6) % 5
    permuted = columns.argsort()[target[rows]]  # where each label's column has gone
    again = loss(term, student[rows][:, columns], teacher[rows][:, columns], permuted)
    torch.testing.assert_close(again, loss(term, student, teacher, target), rtol=1e-12, atol=0)


def test_dist_knows_a_linear_answer_of_the_teachers() -> None:
    """Probabilities that are a mixture of the teacher's and of equal ones have correlation 1 with them."""
    _, teacher = logits()
    mixed = (0.3 * teacher.softmax(1) + 0.7 / 5).log()
    assert float(loss(DIST(gamma=0.0, temperature=1.0), mixed, teacher)) < 1e-12
    assert float(soft_loss(mixed, teacher, 1.0)) > 0.1


# ---------------------------------------------------------------------------------- numbers at their limits


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("case", ["usual", "large", "equal", "opposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite(term: Term, classes: int, samples: int, case: str, dtype: torch.dtype) -> None:
    student, teacher = (one.to(dtype) for one in logits(samples, classes))
    if case == "large":
        student, teacher = 1e4 * student, 1e4 * teacher
    elif case == "equal":
        student = torch.zeros_like(student)
    elif case == "opposed":
        student, teacher = torch.full_like(student, 1e4), -1e4 * teacher
    for own, its in ((student, teacher), (teacher, student), (student, student)):
        assert loss(term, own, its).isfinite()
        assert loss(term, own, its).dtype == dtype
        assert gradient(term, own, its).isfinite().all()


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_half_precision_is_computed_in_float32(term: Term) -> None:
    student, teacher = (one.float() for one in logits())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(term, student.bfloat16(), teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(term, student.bfloat16().float(), teacher), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("kind", "options", "fault"),
    [
        (Standardised, {"temperature": 0}, "temperature=0: must be"),
        (DKD, {"alpha": -1.0, "beta": math.inf}, r"alpha=-1\.0: must be(.|\n)*beta=inf: must be"),
        (DKD, {"temperature": -4.0}, r"temperature=-4\.0: must be"),
        (DIST, {"beta": "much", "gamma": -1}, "beta='much': must be(.|\n)*gamma=-1: must be"),
        (DIST, {"temperature": 0.0}, r"temperature=0\.0: must be"),
    ],
)
def test_wrong_options_are_named(kind: type[Term], options: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        kind(**options)  # type: ignore[arg-type]


def test_the_weight_rises_over_a_share_of_the_fit() -> None:
    assert [warmup(progress, 0.2) for progress in (0.0, 0.1, 0.2, 0.7, 1.0)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert [warmup(progress, 0.0) for progress in (0.0, 0.5)] == [1.0, 1.0]


def test_the_files_have_what_the_sources_have(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "knowledge=[standardised,dkd,dist]")
    terms = assemble(config).boosting.knowledge
    assert terms["standardised"] == Standardised(weight=9.0)
    assert terms["dist"] == DIST(weight=2.0)
    dkd = terms["dkd"]
    assert dkd == DKD(schedule=dkd.schedule)
    assert [round(dkd.weight_at(epoch / 240), 2) for epoch in (0, 10, 20, 240)] == [0.0, 0.5, 1.0, 1.0]
