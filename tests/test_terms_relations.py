"""Terms of relations between samples: similarity preserving, RKD and PKT."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.pkt import PKT
from pkd_lightning.knowledge.relations import RelationTerm, rows
from pkd_lightning.knowledge.rkd import RKD
from pkd_lightning.knowledge.sp import SP

AT = {"student": "at", "teacher": "at"}
TERMS = {
    "sp": SP(**AT),
    "sp_pooled": SP(**AT, pooled=True),
    "rkd": RKD(**AT),
    "rkd_all": RKD(**AT, pooled=False),
    "distance": RKD(**AT, angle=0),
    "angle": RKD(**AT, distance=0),
    "pkt": PKT(**AT),
}
every_term = pytest.mark.parametrize("name", TERMS)


@pytest.fixture
def theirs() -> ModuleType:
    """The losses of torchdistill."""
    return pytest.importorskip("torchdistill.losses.mid_level")  # type: ignore[no-any-return]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(drawn(size, size, seed=9)).Q


def found(term: RelationTerm, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the student's features."""
    student = student.clone().requires_grad_()
    loss = term.between(student, teacher, nn.Module())
    return loss.detach(), torch.autograd.grad(loss, student)[0]


# ---------------------------------------------------------------------------------- against other implementations


def same_as(theirs: Callable[[Tensor, Tensor], Tensor], term: RelationTerm, student: Tensor, teacher: Tensor) -> None:
    """Loss and gradient are those of torchdistill, to what its constants of 1e-7 leave."""
    own, gradient = found(term, student, teacher)
    leaf = student.clone().requires_grad_()
    loss = theirs(leaf, teacher)
    torch.testing.assert_close(own, loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, leaf)[0], rtol=1e-4, atol=1e-9)


def test_sp_is_that_of_the_paper() -> None:
    """Written out: torchdistill 1.1.5 has rows of a sum of 1 in place of a length of 1."""

    def similarities(features: Tensor) -> list[list[float]]:
        samples = features.flatten(1).tolist()
        products = [[sum(a * b for a, b in zip(one, two, strict=True)) for two in samples] for one in samples]
        return [[value / sum(other**2 for other in row) ** 0.5 for value in row] for row in products]

    student, teacher = drawn(6, 3, 4, 4), drawn(6, 5, 2, 2, seed=1)
    own, its = similarities(student), similarities(teacher)
    expected = sum((own[i][j] - its[i][j]) ** 2 for i in range(6) for j in range(6)) / 6**2
    assert float(found(TERMS["sp"], student, teacher)[0]) == pytest.approx(expected)


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
def test_rkd_is_that_of_torchdistill(theirs: ModuleType, distance: float, angle: float) -> None:
    loss = theirs.RKDLoss("at", "at", distance, angle, "mean")

    def called(student: Tensor, teacher: Tensor) -> Tensor:
        return loss({"at": {"output": student}}, {"at": {"output": teacher}})  # type: ignore[no-any-return]

    term = RKD(**AT, distance=distance, angle=angle)
    same_as(called, term, drawn(6, 4), drawn(6, 7, seed=1))
    whole = RKD(**AT, distance=distance, angle=angle, pooled=False)
    same_as(called, whole, drawn(6, 3, 2, 2), drawn(6, 5, 3, 3, seed=1))


def test_pkt_is_that_of_torchdistill(theirs: ModuleType) -> None:
    same_as(
        theirs.PKTLoss("at", "output", "at", "output").cosine_similarity_loss,
        TERMS["pkt"], drawn(6, 4), drawn(6, 7, seed=1),
    )  # fmt: skip


# ---------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sp", lambda x: x),
        ("sp", lambda x: -3 * x),
        ("sp", lambda x: x.flatten(1) @ rotation(20)),
        ("sp_pooled", lambda x: 3 * x @ rotation(4)),
        ("rkd", lambda x: x),
        ("rkd", lambda x: 3 * x @ rotation(4) + 7),
        ("rkd", lambda x: torch.nn.functional.pad(x, (0, 3))),  # more channels
        ("rkd", lambda x: torch.cat([x, x], 1)),  # more positions of the same mean
        ("rkd_all", lambda x: 3 * x.flatten(1) @ rotation(20) + 7),
        ("pkt", lambda x: x),
        ("pkt", lambda x: torch.tensor([1, 2, 0.3, 4, 5, 6.0]).view(6, 1, 1) * x @ rotation(4)),
    ],
)
def test_the_loss_and_its_gradient_are_zero_where_the_relations_are_the_same(
    name: str, change: Callable[[Tensor], Tensor]
) -> None:
    teacher = drawn(6, 5, 4)
    loss, gradient = found(TERMS[name], change(teacher), teacher)
    other, slope = found(TERMS[name], drawn(6, 5, 4, seed=1), teacher)
    assert abs(loss) < 1e-12 < 1e-4 < other
    assert gradient.abs().max() < 1e-12 < 1e-5 < slope.abs().max()


@every_term
def test_the_order_of_a_batch_does_not_matter(name: str) -> None:
    student, teacher, order = drawn(6, 5, 4), drawn(6, 9, 7, seed=1), torch.randperm(6)
    loss, gradient = found(TERMS[name], student, teacher)
    shuffled, slope = found(TERMS[name], student[order], teacher[order])
    torch.testing.assert_close(shuffled, loss)
    torch.testing.assert_close(slope, gradient[order])


@every_term
def test_gradients_are_those_of_the_loss(name: str) -> None:
    teacher = drawn(5, 3, 2, seed=1)
    student = drawn(5, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TERMS[name].between(x, teacher, nn.Module()), [student])


# ---------------------------------------------------------------------------------- where numbers are at their ends


def with_twins(features: Tensor) -> Tensor:
    features[3] = features[1]
    return features


def with_nothing(features: Tensor) -> Tensor:
    features[2] = 0
    return features


def opposite(features: Tensor) -> Tensor:
    features[1] = -features[0]
    return features


@every_term
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "student",
    [
        drawn(1, 5, 4), drawn(2, 5, 4), torch.zeros(6, 5, 4), torch.ones(6, 5, 4), with_twins(drawn(6, 5, 4)),
        with_nothing(drawn(6, 5, 4)), opposite(drawn(6, 5, 4)), 1e4 * drawn(6, 5, 4), 1e4 + drawn(6, 5, 4),
    ],
    ids=["one", "two", "zeros", "constant", "twins", "nothing", "opposite", "large", "far"],
)  # fmt: skip
def test_loss_and_gradient_are_of_ordinary_size(name: str, student: Tensor, dtype: torch.dtype) -> None:
    """Not only finite: a norm's gradient at 0, or that of F.normalize, would be NaN or 1e12."""
    loss, gradient = found(TERMS[name], student.to(dtype), drawn(len(student), 9, 7, seed=1).to(dtype))
    assert 0 <= loss < 1e3
    assert gradient.abs().max() < 1e3
    assert len(student) > 1 or loss == 0
    assert loss.dtype == gradient.dtype == dtype


@every_term
def test_what_is_far_from_zero_keeps_its_differences_in_float32(name: str) -> None:
    student, teacher = 300 + drawn(6, 5, 4), drawn(6, 9, 7, seed=1)
    exact, _ = found(TERMS[name], student, teacher)
    loss, _ = found(TERMS[name], student.float(), teacher.float())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)


@every_term
def test_relations_are_found_in_full_precision(name: str) -> None:
    student, teacher = drawn(6, 5, 4).bfloat16(), drawn(6, 9, 7, seed=1).bfloat16()
    full, _ = found(TERMS[name], student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = found(TERMS[name], student, teacher)
    assert torch.equal(loss, full)
    assert gradient.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------- options


def test_planes_and_tokens_are_pooled_or_whole() -> None:
    planes = drawn(2, 3, 4, 5)
    torch.testing.assert_close(rows(planes, pooled=True), planes.mean((2, 3)))
    assert rows(planes, pooled=False).shape == (2, 60)
    assert rows(planes[:, :, 0, 0], pooled=True).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"pooled": 1}, "pooled=1: must be true or false"),
        ({"distance": -1}, "distance=-1: must be"),
        ({"angle": float("inf")}, "angle=inf: must be"),
        ({"distance": 0, "angle": 0}, "distance=0: with angle=0, too"),
        ({"student": ()}, "student: is missing"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        RKD(**{**AT, **options})  # type: ignore[arg-type]
