"""What a run says while it works, where nobody draws a bar."""

import re
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.fitting import Stage, fit
from pkd_lightning.progress import FitLines, FitProgress, progress_of
from pkd_lightning.schedules import constant
from pkd_lightning.teacher import TeacherModule
from pkd_lightning.trainer import TrainerConfig
from tests.support import patterns, tiny_run


def fitted(directory: Path, epochs: int, progress: bool, *callbacks: FitLines) -> None:
    config = TrainerConfig(
        partial(torch.optim.SGD, lr=0.1), constant, epochs, patience=None, accelerator="cpu", progress=progress
    )
    module = TeacherModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), config)
    stage = Stage("teacher", 0, directory / "metrics.jsonl")
    fit(module, DataModule(DataConfig(patterns)), stage, callbacks=callbacks)


def epochs_of(caplog: pytest.LogCaptureFixture) -> list[int]:
    found = [re.match(r"  \S+: epoch (\d+) of at most", record.message) for record in caplog.records]
    return [int(match[1]) for match in found if match]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(1.0, [1]), (10.0, [1, 4, 7]), (15.0, [1, 3, 5, 7]), (16.0, [1, 3, 5, 7]), (40.0, [1, 2, 3, 4, 5, 6, 7, 8])],
)
def test_a_line_at_the_first_epoch_and_then_at_most_one_in_thirty_seconds(
    seconds: float, expected: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    times = count(1000.0, seconds)
    fitted(tmp_path, 8, False, FitLines("teacher", lambda: next(times)))
    assert epochs_of(caplog) == expected
    assert re.search(r"  teacher: epoch 1 of at most 8, validation \d+\.\d%, loss \d\.\d\d\d", caplog.text)


def test_a_fit_draws_a_bar_on_a_terminal_and_writes_lines_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    fitted(tmp_path, 2, progress=False)
    assert epochs_of(caplog) == []
    fitted(tmp_path, 2, progress=True)
    assert epochs_of(caplog) == [1]
    assert isinstance(progress_of("teacher", 2), FitLines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert isinstance(progress_of("teacher", 2), FitProgress)


@pytest.mark.report
def test_a_run_says_what_it_begins_before_it_does_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tiny_run(tmp_path, "boosting.rounds=2", "trainer.progress=true", "teacher.trainer.progress=true")
    said = [record.message for record in caplog.records if record.name.startswith("pkd_lightning.")]
    expected = [
        "loading the data", "trying the models", "training the teacher on 101 samples", "  teacher: epoch 1",
        "teacher trained", "computing the teacher's logits of 112 samples",
        "training a student: round 1/2", "  round 1/2.*: epoch 1", "round 1/2",
        "training a student: round 2/2", "  round 2/2.*: epoch 1", "round 2/2",
        "2 students", "evaluating the teacher and 2 students on 48 test samples", "writing the report",
    ]  # fmt: skip
    positions = [next((i for i, line in enumerate(said) if re.match(start, line)), None) for start in expected]
    assert None not in positions, said
    assert positions == sorted(positions)  # type: ignore[type-var]
    assert "evaluating" in next(tmp_path.rglob("run.log")).read_text()
