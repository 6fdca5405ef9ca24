"""The rows of Mamba-PKD's Table 2, by arithmetic, and what is measured of its teacher."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from experiments import readme
from experiments.cifar10_paper import rows, teacher
from pkd_lightning.checkpoint import write_json
from pkd_lightning.cli import load_config
from pkd_lightning.cost import measure
from pkd_lightning.models.classifier import MambaClassifier


@pytest.mark.parametrize(
    ("image", "options"),
    [
        ((1, 28, 28), {"seq_len": 196, "n_blocks": 4, "d_state": 64, "d_state_step": 2}),
        ((3, 32, 32), {"seq_len": 192, "n_blocks": 3, "d_state": 16, "expand": 4, "d_model": 2, "dt_rank": 3}),
    ],
)
def test_the_arithmetic_of_the_rows_is_that_of_models(image: tuple[int, ...], options: dict[str, int]) -> None:
    model = MambaClassifier(image, 10, **{"dt_rank": 1, "pixel_channels": "all", **options})
    cost, config = measure(model, image), model.config
    known = config.seq_len, config.expand, config.d_model
    assert rows.parameters(config.n_blocks, config.d_state, *known, config.dt_rank, config.d_state_step) == cost.params
    assert rows.flops(config.n_blocks, *known) == cost.flops_published


def test_the_nearest_students_have_fewer_parameters_than_the_rows_and_their_blocks_and_states() -> None:
    ladder = instantiate(load_config("student=paper_cifar10").student)
    built = [ladder.build(i, (3, 32, 32), 10) for i in range(len(ladder))]
    assert [sum(p.numel() for p in model.parameters()) for model in built] == [20_938, 37_930, 53_482]
    for model, row in zip(built, rows.STUDENTS, strict=False):
        assert (model.config.n_blocks, model.config.d_state) == (row.blocks, row.state)
        assert 0.8 * row.params < sum(p.numel() for p in model.parameters()) < row.params


def test_the_teacher_of_table_2_is_one_architecture_and_its_students_are_none() -> None:
    assert rows.architectures(rows.TEACHER) == [(3072, 4, 1, 6, 2)]
    assert [rows.architectures(row) for row in rows.STUDENTS] == [[]] * 7
    assert [rows.tokens_by_flops(row) for row in rows.STUDENTS] == [{}] * 7
    found = rows.tokens_by_parameters(rows.STUDENTS[4])
    assert found == {(2, 1, 5, 0): 125}
    assert rows.parameters(48, 256, 125, 2, 1, 5, 0) == 76_908


def test_the_rows_as_a_table() -> None:
    lines = rows.as_table().splitlines()
    assert "| student 5 | 48 / 256 | 76,908 | 420,202 | 17.3 / 17.6 | 1 of 384 | 0 of 16 | 0 |" in lines
    assert "| teacher | 96 / 256 | 443,530 | 2,390,016 | 100.0 / 100.0 | 6 of 384 | 1 of 16 | 1 |" in lines
    assert "| all students | | 437,022 | 2,383,098 | 98.5 / 99.7 | | | |" in lines


def test_the_rows_stand_in_a_slot_that_is_of_no_study() -> None:
    filled = readme.fill("<!-- table: - architectures -->\nold\n<!-- end of table -->\n")
    assert filled == f"<!-- table: - architectures -->\n{rows.as_table()}\n<!-- end of table -->\n"


def test_images_with_a_logit_that_is_not_finite_are_not_counted() -> None:
    images = torch.tensor([[1.0, 2.0], [float("inf"), 1.0], [0.0, float("nan")], [3.0, 4.0]])
    assert teacher.finite(nn.Identity(), images) == 2


def test_an_epoch_of_the_published_teacher_takes_what_its_steps_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "FILE", tmp_path / "teacher.json")
    measured = {"finite": {"a": [1, 2, 3], "b": [4, 4, 4]}, "images": 4, "step_seconds": 2.0}
    write_json(teacher.FILE, {**measured, "hardware": {"cpu": "a processor"}})
    head, _, row = teacher.as_table().splitlines()
    assert "pixels b, seeds 0 to 2" in head
    assert "seconds a step of 4 (a processor, one core)" in head
    # 37,800 images, two seconds for four
    assert row == "| 1 of 4, 2 of 4, 3 of 4 | 4 of 4, 4 of 4, 4 of 4 | 2.0 | 5.2 | 11 |"
