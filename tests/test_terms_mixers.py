"""Alignment of a student's mixers with a teacher's."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pkd_lightning.knowledge.mixers import Mixers, alignment_loss
from pkd_lightning.knowledge.term import Pair
from pkd_lightning.outputs import Output
from tests.support import tiny_run
from tests.test_knowledge import lines

TEACHER = ("teacher.model.n_blocks=3", "+teacher.model.direction=alternating")


def test_alignment_is_the_mean_norm_of_the_differences() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    norms = [
        math.sqrt(sum((float(student[n, i, c]) - float(teacher[n, i, c])) ** 2 for c in range(4)))
        for n in range(2)
        for i in range(3)
    ]
    assert float(alignment_loss(student, teacher)) == pytest.approx(sum(norms) / 6, rel=1e-6)
    turned = torch.linalg.qr(torch.randn(4, 4)).Q
    torch.testing.assert_close(alignment_loss(student @ turned, teacher @ turned), alignment_loss(student, teacher))
    swapped = torch.tensor([1, 0])
    torch.testing.assert_close(alignment_loss(student[swapped], teacher[swapped]), alignment_loss(student, teacher))


def test_alignment_is_zero_and_flat_where_both_are_the_same() -> None:
    student = torch.randn(2, 3, 4, requires_grad=True)
    loss = alignment_loss(student, student.detach().clone())
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


def pair(student: Tensor, teacher: Tensor) -> Pair:
    """Of one feature each, called `at`."""
    logits, index = torch.zeros(len(student), 3), torch.arange(len(student))
    return Pair(Output(logits, {"at": student}), Output(logits, {"at": teacher}), index, index)


def test_only_other_channels_have_a_map_and_other_grids_are_resized() -> None:
    term = Mixers(student="at", teacher="at")
    same, grids, channels = (pair(torch.randn(2, *of), torch.randn(2, 16, 5)) for of in ((16, 5), (4, 5), (9, 3)))
    assert not list(term.parts(same, 2).parameters())
    torch.testing.assert_close(term.loss(same, term.parts(same, 2)), alignment_loss(*term.taken(same)[0]))
    assert not list(term.parts(grids, 2).parameters())
    student, teacher = grids.student.features["at"], grids.teacher.features["at"]
    repeated = student.mean(1, keepdim=True).expand(2, 4, 5)  # constant over the raster, whatever its size
    constant = pair(repeated, teacher)
    expected = alignment_loss(repeated[:, :1].expand(2, 16, 5), teacher)
    torch.testing.assert_close(term.loss(constant, term.parts(constant, 2)), expected)
    assert [weight.shape for weight in term.parts(channels, 2).parameters()] == [(5, 3)]
    assert term.loss(channels, term.parts(channels, 2)).isfinite()


def test_one_file_of_mixers_fits_every_rung(tmp_path: Path) -> None:
    tiny_run(tmp_path, "knowledge=mixers", "+student.common.direction=alternating", *TEACHER)
    found = [line for line in lines(tmp_path) if str(line["stage"]).startswith("round")]
    assert len(found) == 3
    assert all(line["knowledge/mixers"] > 0 and 0 < line["gradient_share/mixers"] < 1 for line in found)


@pytest.mark.parametrize("of", ["one", "constant", "large", "float64"])
def test_alignment_is_finite_and_so_are_its_gradients(of: str) -> None:
    changes = {
        "one": lambda x: x[:1],
        "constant": torch.ones_like,
        "large": lambda x: 1e4 * x,
        "float64": Tensor.double,
    }
    student, teacher = (changes[of](torch.randn(2, 3, 4)).requires_grad_() for _ in range(2))
    loss = alignment_loss(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
