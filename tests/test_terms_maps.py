"""Terms of maps and flows inside of a model: attention transfer and FSP."""

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.attention_transfer import AttentionTransfer, attention, attention_loss
from pkd_lightning.knowledge.fsp import FSP, flow
from pkd_lightning.knowledge.term import FeatureTerm, Pair
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.outputs import Output

AT = AttentionTransfer(student="a", teacher="a")
FLOW = FSP(student=["a", "b"], teacher=["a", "b"])


@pytest.fixture
def theirs() -> ModuleType:
    """The losses of torchdistill."""
    return pytest.importorskip("torchdistill.losses.mid_level")  # type: ignore[no-any-return]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(drawn(size, size, seed=9)).Q


def pair(student: list[Tensor], teacher: list[Tensor]) -> Pair:
    """Of features called a, b, c."""
    logits, index = torch.zeros(len(student[0]), 3), torch.arange(len(student[0]))
    own, its = (Output(logits, dict(zip("abc", features, strict=False))) for features in (student, teacher))
    return Pair(own, its, index % 3, index)


def found(term: FeatureTerm, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients by the student's features."""
    leaves = [feature.clone().requires_grad_() for feature in student]
    seen = pair(leaves, teacher)
    loss = term.loss(seen, term.parts(seen, 10).to(student[0].dtype))
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


# ---------------------------------------------------------------------------------- attention transfer


def test_attention_transfer_is_that_of_torchdistill(theirs: ModuleType) -> None:
    at = {"io": "output", "path": "a"}
    their = theirs.ATLoss({"one": {"student": at, "teacher": at}}, mode="code")
    student, teacher = drawn(5, 3, 4, 4), drawn(5, 7, 4, 4, seed=1)
    loss, (gradient,) = found(AT, [student], [teacher])
    leaf = student.clone().requires_grad_()
    expected = their({"a": {"output": leaf}}, {"a": {"output": teacher}})
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


def test_attention_is_the_same_whatever_the_size_and_the_channels() -> None:
    teacher, other = drawn(5, 9, 4), drawn(5, 9, 4, seed=1)
    sizes = torch.tensor([1, -2, 0.3, 4, 5.0]).view(5, 1, 1)
    for student in (teacher, sizes * teacher @ rotation(4), torch.cat([teacher, teacher], 2)):
        loss, (gradient,) = found(AT, [student], [teacher])
        assert loss < 1e-12 < 1e-4 < found(AT, [other], [teacher])[0]
        assert gradient.abs().max() < 1e-12
    moved = torch.randperm(9)  # both alike: positions have no neighbours here
    torch.testing.assert_close(found(AT, [other[:, moved]], [teacher[:, moved]])[0], found(AT, [other], [teacher])[0])


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_is_averaged_to_the_smaller(larger: str) -> None:
    fine, coarse = drawn(3, 5, 4, 4), drawn(3, 2, 2, 2, seed=1)
    maps = torch.nn.functional.avg_pool2d(fine.square().sum(1), 2).flatten(1)
    expected = attention_loss(maps, coarse.square().sum(1).flatten(1))
    student, teacher = (fine, coarse) if larger == "student" else (coarse, fine)
    torch.testing.assert_close(found(AT, [student], [teacher])[0], expected)


def test_attention_is_read_of_tokens_as_of_planes() -> None:
    planes = drawn(2, 5, 3, 3)
    tokens = planes.flatten(2).transpose(1, 2)
    torch.testing.assert_close(attention(tokens), planes.square().sum(1).flatten(1))


@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 6), (4, 6, 1, 1)])
def test_one_position_is_no_map(shape: tuple[int, ...]) -> None:
    seen = pair([drawn(*shape)], [drawn(4, 9, 3)])
    with pytest.raises(ConfigError, match="of 1 positions of the student and 9 of the teacher there is no map"):
        AT.parts(seen, 10)


# ---------------------------------------------------------------------------------- FSP


def test_a_flow_is_that_of_torchdistill(theirs: ModuleType) -> None:
    first, last = drawn(3, 4, 5, 5), drawn(3, 6, 5, 5, seed=1)
    own = flow(first.flatten(2).transpose(1, 2), last.flatten(2).transpose(1, 2))
    torch.testing.assert_close(own, theirs.FSPLoss.compute_fsp_matrix(first, last))


def test_fsp_is_the_mean_squared_difference_of_the_flows() -> None:
    student, teacher = [drawn(2, 4, 3), drawn(2, 4, 2, seed=1)], [drawn(2, 9, 3, seed=2), drawn(2, 9, 2, seed=3)]
    total = 0.0
    for sample in range(2):
        for i in range(3):
            for j in range(2):
                own = sum(float(student[0][sample, at, i] * student[1][sample, at, j]) for at in range(4)) / 4
                its = sum(float(teacher[0][sample, at, i] * teacher[1][sample, at, j]) for at in range(9)) / 9
                total += (own - its) ** 2
    loss, gradients = found(FLOW, student, teacher)
    assert float(loss) == pytest.approx(total / (2 * 3 * 2))
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_flows_are_the_same_in_whatever_order_positions_are() -> None:
    teacher, order = [drawn(3, 9, 4), drawn(3, 9, 5, seed=1)], torch.randperm(9)
    loss, gradients = found(FLOW, [feature[:, order] for feature in teacher], teacher)
    assert loss < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)
    turned = [teacher[0] @ rotation(4), teacher[1]]
    assert found(FLOW, turned, teacher)[0] > 1e-3


def test_the_larger_of_two_layers_is_averaged() -> None:
    first, last = drawn(2, 3, 4, 4), drawn(2, 5, 2, 2, seed=1)
    small = torch.nn.functional.avg_pool2d(first, 2)
    expected = torch.einsum("bihw,bjhw->bij", small, last) / 4
    own = flow(first.flatten(2).transpose(1, 2), last.flatten(2).transpose(1, 2))
    torch.testing.assert_close(own, expected)
    other_way = flow(last.flatten(2).transpose(1, 2), first.flatten(2).transpose(1, 2))
    torch.testing.assert_close(other_way, expected.transpose(1, 2))


def test_other_channels_are_mapped_by_what_is_trained() -> None:
    student, teacher = [drawn(3, 9, 2), drawn(3, 9, 5)], [drawn(3, 9, 4, seed=1), drawn(3, 9, 5, seed=2)]
    seen = pair(student, teacher)
    parts = FLOW.parts(seen, 10).double()
    assert isinstance(parts, nn.ModuleList)
    assert [list(part.parameters()) != [] for part in parts] == [True, False]
    weight = parts[0].weight
    assert weight.shape == (4, 2)
    mapped = [student[0] @ weight.T, student[1]]
    loss = FLOW.loss(seen, parts)
    torch.testing.assert_close(loss, found(FLOW, mapped, teacher)[0])
    assert torch.autograd.grad(loss, weight)[0].abs().max() > 0


def test_several_modules_have_flows_from_each_to_the_next() -> None:
    term = FSP(student=["a", "b", "c"], teacher=["a", "b", "c"])
    student = [drawn(2, 4, 3), drawn(2, 4, 2, seed=1), drawn(2, 4, 5, seed=2)]
    teacher = [drawn(2, 9, 3, seed=3), drawn(2, 9, 2, seed=4), drawn(2, 4, 5, seed=5)]
    alone = [found(FLOW, student[at : at + 2], teacher[at : at + 2])[0] for at in (0, 1)]
    torch.testing.assert_close(found(term, student, teacher)[0], (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("paths", ["a", ["a"]])
def test_a_flow_needs_two_modules(paths: str | list[str]) -> None:
    with pytest.raises(ConfigError, match="a flow is from one module to another"):
        FSP(student=paths, teacher=paths)
    with pytest.raises(ConfigError, match="student: is missing"):
        FSP(teacher=paths)


def test_flows_of_all_blocks() -> None:
    """Two or more: of one block there is none."""
    models = [
        MambaClassifier((1, 8, 8), 3, tokeniser="patches", patch_size=2, d_model=4, norm="rms", n_blocks=n, head="mean")
        for n in (3, 2, 1)
    ]
    term = FSP(student="blocks.*", teacher="blocks.*").for_models(*models[:2])
    assert (term.student_features, term.teacher_features) == (("blocks.1", "blocks.2"), ("blocks.0", "blocks.1"))
    with pytest.raises(ConfigError, match="a flow is from one module to another"):
        FSP(student="blocks.*", teacher="blocks.*").for_models(models[2], models[1])


# ---------------------------------------------------------------------------------- where numbers are at their ends


def with_nothing(features: Tensor) -> Tensor:
    features[2] = 0
    return features


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "student",
    [drawn(1, 9, 4), torch.zeros(4, 9, 4), torch.ones(4, 9, 4), with_nothing(drawn(4, 9, 4)), 1e4 * drawn(4, 9, 4)],
    ids=["one", "zeros", "constant", "nothing", "large"],
)
def test_loss_and_gradient_are_finite(student: Tensor, dtype: torch.dtype) -> None:
    teacher = drawn(len(student), 4, 4, seed=1).to(dtype)
    loss, (gradient,) = found(AT, [student.to(dtype)], [teacher])
    assert 0 <= loss <= 2
    assert gradient.abs().max() < 10
    assert loss.dtype == gradient.dtype == dtype
    loss, gradients = found(FLOW, [student.to(dtype)] * 2, [teacher] * 2)
    assert all(value.isfinite().all() for value in (loss, *gradients))


def test_squares_and_products_are_summed_in_full_precision() -> None:
    student, teacher = drawn(4, 9, 4).bfloat16(), drawn(4, 9, 4, seed=1).bfloat16()
    for term, times in ((AT, 1), (FLOW, 2)):
        full, _ = found(term, [student.float()] * times, [teacher.float()] * times)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = found(term, [student] * times, [teacher] * times)
        assert torch.equal(loss, full)
