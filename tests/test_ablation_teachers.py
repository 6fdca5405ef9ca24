"""What is measured of the teachers of cifar10_ablation."""

import math
from pathlib import Path

import pytest
import torch

from experiments.cifar10_ablation import teachers
from experiments.plan import load_study
from pkd_lightning.checkpoint import write_json
from pkd_lightning.cli import load_config


def entropy(p: float) -> float:
    return -(p * math.log(p) + (1 - p) * math.log(1 - p))


def test_what_answers_tell_is_measured_at_the_students_temperatures() -> None:
    """Odds of 16 to 1 are odds of 4 to 1 at a temperature of 2, and of 2 to 1 at 4."""
    logits = torch.tensor([[math.log(16), 0.0], [0.0, math.log(16)]])
    told = teachers.told(logits, torch.tensor([0, 0]))
    assert told["accuracy"] == 0.5
    assert told["cross_entropy"] == pytest.approx(-(math.log(16 / 17) + math.log(1 / 17)) / 2)
    assert told["entropy_2"] == pytest.approx(entropy(4 / 5))
    assert told["entropy_4"] == pytest.approx(entropy(2 / 3))


def test_they_are_the_teachers_and_the_temperatures_of_runs_of_the_study() -> None:
    jobs = {job.run.name: job for job in load_study(teachers.FOLDER).jobs}
    for run in teachers.RUNS.values():
        config = load_config(*jobs[run].overrides)
        assert Path(config.teacher.checkpoint).is_file()
        assert config.boosting.temperature == teachers.TEMPERATURES[0]
    first, soft = (load_config(*jobs[run].overrides) for run in (teachers.RUNS["Mamba"], "independent_soft"))
    assert soft.teacher.checkpoint == first.teacher.checkpoint
    assert soft.boosting.temperature == teachers.TEMPERATURES[1]


def test_a_row_is_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "FILE", tmp_path / "teachers.json")
    values = {"accuracy": 0.5, "cross_entropy": 0.25, "entropy_2": 0.125, "entropy_4": 0.5}
    write_json(teachers.FILE, {"one": {"training": values, "test": {**values, "accuracy": 0.75}}})
    head, _, row = teachers.as_table().splitlines()
    assert head.startswith(
        "| teacher | training: accuracy | training: cross-entropy | training: entropy at temperature 2"
    )
    assert row == "| one | 50.0 | 0.250 | 0.125 | 0.500 | 75.0 | 0.250 | 0.125 | 0.500 |"
