"""Trackers: one run per stage in a group, closed whatever happens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pkd_lightning.errors import ConfigError
from pkd_lightning.loggers import WandbTracker
from tests.support import tiny_run


def wandb_runs(directory: Path) -> dict[str, dict[str, object]]:
    """Name to the first records of every offline W&B run below `directory`."""
    runs = {}
    for file in directory.rglob("run-*.wandb"):
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
            capture_output=True,
            text=True,
            check=True,
        )
        records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        runs[file.name] = {"records": records, "text": done.stdout}
    return runs


def test_wandb_offline_gets_a_run_per_stage_in_one_group(tmp_path: Path) -> None:
    tiny_run(tmp_path, "logger=wandb")
    runs = wandb_runs(tmp_path)
    assert len(runs) == 5  # teacher, three rounds, summary
    text = "\n".join(str(run["text"]) for run in runs.values())
    for stage in ("teacher", "round-00", "round-01", "round-02", "summary"):
        assert stage in text
    for name in ("train_loss", "validation_loss", "prefix_accuracy"):
        assert name in text


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


def test_wandb_mode_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="offline, online"):
        WandbTracker(tmp_path, "group", {}, mode="ofline")
