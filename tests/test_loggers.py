"""Trackers: one run per stage in a group, closed whatever happens."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

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


AGENT = {
    "WANDB_RUN_ID": "agent7", "WANDB_RESUME": "allow", "WANDB_SWEEP_ID": "sweep7", "WANDB_NAME": "agentname",
    "WANDB_RUN_GROUP": "agentgroup", "WANDB_JOB_TYPE": "agentjob", "WANDB_PROJECT": "agentproject",
    "WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40,
}  # fmt: skip


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where W&B would go online, under an agent's variables; a session begun by other tests has not read these."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        for name, value in {**AGENT, "WANDB_BASE_URL": f"http://127.0.0.1:{listening.getsockname()[1]}"}.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()
        yield listening
    monkeypatch.undo()
    wandb.teardown()


@pytest.mark.parametrize("begun", [False, True], ids=["the command line", "within a session"])
def test_an_agents_variables_do_not_make_one_run_of_all_stages(
    begun: bool, server: socket.socket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if begun:
        wandb.setup()
    caplog.set_level("INFO")
    tracker = WandbTracker(tmp_path, "group7", {})
    seen = []
    for name in ("teacher", "round-00", "round-01"):
        with tracker.stage(name) as loggers:
            run = loggers[0].experiment
            seen.append((run.id, run.name, run.group, run.job_type, run.project, run.sweep_id, run.offline))
    ids = {run[0] for run in seen}
    assert len(ids) == 3
    assert "agent7" not in ids
    assert [run[1:] for run in seen] == [
        (name, "group7", name.split("-")[0], "pkd-lightning", None, True)
        for name in ("teacher", "round-00", "round-01")
    ]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == 3
    said = [record.message for record in caplog.records if "not used" in record.message]
    assert len(said) == 1
    assert all(name in said[0] for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SWEEP_ID"))
    assert wandb.setup().settings.run_id == "agent7"  # the user's own session is left as it was
    with pytest.raises(BlockingIOError):
        server.accept()  # nobody called
