"""Trackers other than W&B's, and the lines of metrics.jsonl."""

import json
from pathlib import Path

from tests.support import tiny_run


def test_tensorboard_gets_a_folder_per_stage(tmp_path: Path) -> None:
    tiny_run(tmp_path, "logger=tensorboard")
    stages = {path.parent.parent.name for path in tmp_path.rglob("events.out.*")}
    assert stages == {"teacher", "round-00", "round-01", "round-02", "summary"}


def test_no_logger_writes_nothing_besides_the_run(tmp_path: Path) -> None:
    tiny_run(tmp_path, "logger=none")
    assert not list(tmp_path.rglob("wandb"))
    assert not list(tmp_path.rglob("tensorboard"))


def test_metrics_lines_hold_every_epoch_of_every_stage(tmp_path: Path) -> None:
    tiny_run(tmp_path, "trainer.max_epochs=2")
    (path,) = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    stages = ["teacher", "round-00", "round-01", "round-02"]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        (stage, epoch) for stage in stages for epoch in (0, 1)
    ]
    assert all(
        {"train_loss", "validation_loss", "validation_accuracy", "lr", "seconds"} <= line.keys() for line in lines
    )
