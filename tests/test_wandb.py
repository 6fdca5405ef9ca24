"""Weights & Biases: one run an experiment, continued by the next process, and never in a run's way."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from pkd_lightning import wandb_tracker
from pkd_lightning.assembling import assemble
from pkd_lightning.cli import CONF, load_config
from pkd_lightning.errors import ConfigError
from pkd_lightning.fitting import EpochLines
from pkd_lightning.wandb_tracker import WandbTracker, figures_of, stage_name
from tests.support import ACCEPT, tiny_run
from tests.test_knowledge import FITNET
from tests.wandb_server import Server

FLAGS = ("logger=wandb", ACCEPT, "boosting.rounds=2", "trainer.max_epochs=2", "trainer.checkpoint_every='1 epochs'")
ONLINE = (*FLAGS, "logger.mode=online")
STAGES = ("teacher", "round-1", "round-2")
VARIABLES = (
    "API_KEY", "RUN_ID", "RESUME", "SWEEP_ID", "BASE_URL", "MODE", "PROJECT", "IDENTITY_TOKEN_FILE", "SERVICE",
    "FORK_FROM",
)  # fmt: skip


class Killed(BaseException):
    """Stands for whatever ends a process."""


class Names:
    """What a run is called, where nothing is composed."""

    name, group, tags = "mine seed=1", "sweep", ("mine", "anchored")

    def __init__(self, swept: bool = False) -> None:
        self.swept = swept


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account, no variable of W&B, and a session of W&B's for this test alone."""
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    (tmp_path / "home").mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    wandb_tracker.reset()
    yield
    wandb_tracker.reset()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    with server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb_tracker.reset()
        yield server
        wandb_tracker.reset()
        server.shutdown()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A server that answers nobody, and tells whether somebody called."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb_tracker.reset()
        yield listening


def records(file: Path) -> list[dict[str, Any]]:
    """What a file of W&B's holds."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=file.parent, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def offline(root: Path) -> list[list[dict[str, Any]]]:
    """The records of each offline run below `root`, in the order of their beginnings."""
    found = [records(file) for file in root.rglob("offline-run-*/run-*.wandb")]
    return sorted(found, key=lambda run: str(header(run)["start_time"]))


def header(run: list[dict[str, Any]]) -> dict[str, Any]:
    return next(dict(record["run"]) for record in run if record["type"] == "run")


def history(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in run if record["type"] == "history"]


def summary(run: list[dict[str, Any]]) -> dict[str, Any]:
    """The last values; those of a medium by names such as `results._type`."""
    found: dict[str, Any] = {}
    for record in run:
        found |= record.get("summary", {}).get("update", {})
    return found


def curve(rows: list[dict[str, Any]], name: str, axis: str) -> list[float]:
    """Where on its axis a curve has points."""
    return [row[axis] for row in rows if name in row]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_an_experiment_is_one_run_with_the_curves_of_every_stage(tmp_path: Path) -> None:
    results = tiny_run(tmp_path, *FLAGS, "seed=3")
    (run,) = offline(tmp_path)
    about, rows = header(run), history(run)
    assert about["run_group"] == "digits"
    assert about["display_name"] == "digits seed=3"
    assert {"digits", "patterns", "anchored", "learned"} == set(about["tags"])
    assert about["config"]["update"]["boosting"]["rounds"] == 2
    for stage in STAGES:
        assert curve(rows, f"{stage}/validation_loss", f"{stage}/step") == [6, 13]
    assert curve(rows, "rounds/prefix_accuracy", "students") == [1, 2]
    assert curve(rows, "rounds/edge/class_2", "students") == [1, 2]
    axes = {record["metric"]["name"]: record["metric"].get("step_metric") for record in run if "metric" in record}
    assert axes["teacher/train_loss"] == "teacher/step"
    assert axes["round-2/train_loss"] == "round-2/step"
    assert axes["rounds/edge/class_0"] == "students"
    assert not any("*" in name for name in axes)
    final = summary(run)
    for name in ("accuracy", "macs_total", "params", "flops_published"):
        assert final[f"ensemble/{name}"] == results["ensemble"][name]
    assert final["ensemble/validation_accuracy"] == results["rounds"][-1]["prefix_validation_accuracy"]
    assert final["results._type"] == "table-file"
    assert (final["results.nrows"], final["results.ncols"]) == (2, len(wandb_tracker.COLUMNS))


def test_terms_of_knowledge_are_curves_beside_the_losses(tmp_path: Path) -> None:
    tiny_run(tmp_path, *FLAGS, FITNET, "boosting.rounds=1")
    (run,) = offline(tmp_path)
    rows = history(run)
    axes = {record["metric"]["name"]: record["metric"].get("step_metric") for record in run if "metric" in record}
    for name in ("knowledge/fitnet", "gradient_share/fitnet", "gradient_share/objective"):
        assert curve(rows, f"round-1/{name}", "round-1/step") == [6, 13]
        assert axes[f"round-1/{name}"] == "round-1/step"
        assert not any(f"teacher/{name}" in row for row in rows)


@pytest.mark.report
def test_the_figures_of_the_report_are_images(tmp_path: Path) -> None:
    tiny_run(tmp_path, *FLAGS)
    (run,) = offline(tmp_path)
    drawn = {f"figures/{path.stem}" for path in tmp_path.rglob("digits/*/figures/*.png")}
    assert drawn
    images = {name for name, value in summary(run).items() if value == "image-file"}
    assert images == {f"{name}._type" for name in drawn}


def test_the_stages_of_several_attempts(tmp_path: Path) -> None:
    assert [stage_name(*fit) for fit in (("teacher", 0), ("round-00", 0), ("round-09", 2))] == [
        "teacher", "round-1", "round-10/attempt-3",
    ]  # fmt: skip
    tiny_run(tmp_path, *FLAGS, "boosting.weak_learner.max_attempts=2", "boosting.weak_learner.min_improvement=0.99")
    (run,) = offline(tmp_path)
    assert curve(history(run), "round-2/attempt-2/train_loss", "round-2/attempt-2/step") == [6, 13]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_resumed_run_continues_the_same_curves(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    flags = (*FLAGS, f"logger.mode={mode}", "trainer.checkpoint_every=null")  # so that epochs are repeated
    on_validation_end = EpochLines.on_validation_end
    ends = iter([("teacher", 1), ("round-01", 0)])

    def after(self: EpochLines, trainer: Any, module: Any) -> None:
        on_validation_end(self, trainer, module)
        if (self.stage, trainer.current_epoch) == self.kill:  # type: ignore[attr-defined]
            raise Killed

    monkeypatch.setattr(EpochLines, "on_validation_end", after)
    for end in [*ends, None]:
        monkeypatch.setattr(EpochLines, "kill", end, raising=False)
        if end is None:
            tiny_run(tmp_path, *flags)
        else:
            with pytest.raises(Killed):
                tiny_run(tmp_path, *flags)
    if mode == "offline":
        assert not server.asked
        runs = offline(tmp_path)
        assert len(runs) == 3
        assert len({header(run)["run_id"] for run in runs}) == 1
        (first, *_) = tmp_path.rglob("offline-run-*")
        command = [sys.executable, "-m", "wandb", "sync", str(first.parent)]  # as the guide has it
        subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=tmp_path)
    ((id_, rows),) = server.history.items()
    assert set(server.runs) == {id_}
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    for stage in STAGES:
        assert curve(rows, f"{stage}/validation_loss", f"{stage}/step") == [6, 13]
    assert curve(rows, "rounds/accuracy", "students") == [1, 2]


def test_directories_with_one_configuration_are_two_runs(tmp_path: Path) -> None:
    ids = set()
    for root in ("one", "other"):
        tracker = WandbTracker(tmp_path / root / "hash", Names(), {})
        ids.add(tracker.run.id)
        tracker.close(failed=False)
    assert len(ids) == 2
    assert all(id_.startswith("hash-") for id_ in ids)


def test_a_damaged_file_of_what_was_logged_begins_a_new_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = []
    for _ in range(2):
        tracker = WandbTracker(tmp_path, Names(), {})
        ids.append(tracker.run.id)
        tracker.log({"a": 1.0}, "step", 3)
        tracker.close(failed=True)
        (tmp_path / "wandb" / "continued.json").write_text('{"id": ')
    assert len(set(ids)) == 2
    assert [line for line in warnings(caplog) if "continued.json" in line and "new W&B run" in line]


def test_online_it_goes_to_the_server(tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tracker = WandbTracker(tmp_path, Names(), {"seed": 1}, mode="online")
    with tracker.stage("teacher") as loggers:
        loggers[0].log_metrics({"train_loss": 1.0}, step=4)
    tracker.close(failed=False)
    ((id_, run),) = server.runs.items()
    assert (run["displayName"], run["groupName"], run["tags"]) == (Names.name, Names.group, list(Names.tags))
    assert json.loads(run["config"])["seed"]["value"] == 1
    (row,) = server.history[id_]
    assert (row["teacher/train_loss"], row["teacher/step"]) == (1.0, 4)
    assert f"W&B: {server.url}/entity/pkd-lightning/runs/{id_}" in caplog.messages


def test_online_the_students_are_an_artifact(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    monkeypatch.setattr(wandb.Run, "log_artifact", lambda self, artifact: logged.append(artifact))
    tiny_run(tmp_path, *FLAGS)
    assert not [artifact for artifact in logged if artifact.type == "model"]
    results = tiny_run(tmp_path, *ONLINE, "seed=1")
    (artifact,) = [artifact for artifact in logged if artifact.type == "model"]
    assert {"students/00.safetensors", "students/01.json", "students/ensemble.json"} <= set(artifact.manifest.entries)
    assert artifact.metadata["ensemble/accuracy"] == results["ensemble"]["accuracy"]


@pytest.mark.parametrize(
    "answers", [pytest.param(True, id="no answer", marks=pytest.mark.slow), pytest.param(False, id="refused")]
)
def test_without_a_server_it_is_written_offline_after_one_line(
    answers: bool, tmp_path: Path, silent: socket.socket, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(wandb_tracker, "START", 0.5)
    if not answers:
        silent.close()
    assert len(tiny_run(tmp_path, *ONLINE)["rounds"]) == 2
    (line,) = warnings(caplog)
    assert "the server cannot be used" in line
    assert "`wandb sync " in line
    assert "uploads later" in line
    (run,) = offline(tmp_path)
    (begun,) = tmp_path.rglob("wandb/run-*/run-*.wandb")
    assert header(run)["run_id"] == header(records(begun))["run_id"]  # `wandb sync` takes both for one run
    assert curve(history(run), "round-2/train_loss", "round-2/step") == [6, 13]


@pytest.mark.slow
def test_a_server_that_is_gone_in_the_middle_is_one_line(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = WandbTracker.stage

    def gone(self: WandbTracker, name: str, attempt: int = 0) -> Any:
        if name == "round-01":
            server.close()
        return stage(self, name, attempt)

    monkeypatch.setattr(wandb_tracker, "END", 0.5)
    monkeypatch.setattr(WandbTracker, "stage", gone)
    assert len(tiny_run(tmp_path, *ONLINE)["rounds"]) == 2
    (line,) = warnings(caplog)
    assert "wandb sync --include-online" in line
    (file,) = tmp_path.rglob("wandb/run-*/run-*.wandb")
    assert str(file.parent.parent) in line
    assert curve(history(records(file)), "round-2/train_loss", "round-2/step") == [6, 13]


def test_a_process_of_wandb_that_is_killed_is_one_line_and_the_next_run_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage, killed = WandbTracker.stage, []

    def kill(self: WandbTracker, name: str, attempt: int = 0) -> Any:
        if name == "round-00" and not killed:
            children = subprocess.run(
                ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
            )
            killed.extend(int(line.split()[0]) for line in children.stdout.splitlines() if "wandb-core" in line)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return stage(self, name, attempt)

    monkeypatch.setattr(WandbTracker, "stage", kill)
    assert len(tiny_run(tmp_path, *FLAGS)["rounds"]) == 2
    assert killed
    (line,) = warnings(caplog)
    assert line.startswith("W&B: not tracked any further (")
    tiny_run(tmp_path / "next", *FLAGS)
    assert len(warnings(caplog)) == 1
    (run,) = offline(tmp_path / "next")
    assert curve(history(run), "round-2/train_loss", "round-2/step") == [6, 13]


@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (wandb, "init", wandb.errors.CommError("no luck\nand much more")),
        (wandb.Run, "finish", TimeoutError()),
        (wandb.Run, "finish", ConnectionResetError("no luck")),
        (wandb, "Table", wandb.errors.AuthenticationError("no luck")),
    ],
)
def test_trouble_at_the_start_or_the_end_is_one_line(
    place: Any, name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        tracker = WandbTracker(tmp_path, Names(), {})
        with tracker.stage("teacher") as loggers:
            for logger in loggers:
                logger.log_metrics({"train_loss": 1.0}, step=4)
        tracker.summarise({"rounds": [], "ensemble": {}, "teacher": {}, "wall_seconds": {"total": 1.0}})
        tracker.close(failed=False)
    (line,) = warnings(caplog)
    assert line.startswith("W&B: ")
    assert "much more" not in line
    assert f"`wandb sync --include-online {tmp_path / 'wandb'}`" in line


def test_a_fit_that_fails_is_still_an_error_and_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(EpochLines, "on_validation_end", fail)
    with pytest.raises(ZeroDivisionError):
        tiny_run(tmp_path, *FLAGS)
    (run,) = offline(tmp_path)
    assert [record["exit"]["exit_code"] for record in run if "exit" in record] == [1]


def test_wandb_mode_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="offline, online"):
        WandbTracker(tmp_path, Names(), {}, mode="ofline")


@pytest.mark.parametrize("key", [None, "short"])
@pytest.mark.parametrize("before", ["nothing", "a run"])
def test_online_without_a_key_is_an_error_before_anything_trains(
    before: str, key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before == "a run":  # of a key that is too short, a session of W&B raises or says False
        wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)).finish()
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(ConfigError, match=r"online: there is no valid key.*wandb login"):
        tiny_run(tmp_path, *ONLINE)
    assert not list(tmp_path.rglob("metrics.jsonl"))


AGENT = {
    "WANDB_RUN_ID": "agent7", "WANDB_SWEEP_ID": "sweep7", "WANDB_PROJECT": "agentproject", "WANDB_RESUME": "never",
    "WANDB_MODE": "online",
}  # fmt: skip


def test_a_sweeps_agent_names_the_run(tmp_path: Path, silent: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(tmp_path, *FLAGS)
    for name, value in AGENT.items():
        monkeypatch.setenv(name, value)
    wandb_tracker.reset()
    tiny_run(tmp_path, *FLAGS, "seed=1")
    tiny_run(tmp_path, *FLAGS)  # finished before: the sweep is told its figures all the same
    wandb_tracker.reset()
    with pytest.raises(BlockingIOError):
        silent.accept()  # nobody called
    own, first, second = offline(tmp_path)
    assert header(own)["run_id"] != "agent7"
    for run in (first, second):
        about = header(run)
        assert (about["run_id"], about["sweep_id"], about["project"]) == ("agent7", "sweep7", "agentproject")
        assert 0 <= summary(run)["ensemble/validation_accuracy"] <= 1
        assert curve(history(run), "rounds/accuracy", "students") == [1, 2]
    assert wandb.setup().settings.run_id == "agent7"  # the session is left as it was


def test_an_agents_run_is_not_that_of_every_job_of_a_multirun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name, value in AGENT.items():
        monkeypatch.setenv(name, value)
    wandb_tracker.reset()
    ids = set()
    for job in ("0", "1"):
        tracker = WandbTracker(tmp_path / job, Names(swept=True), {})
        ids.add(tracker.run.id)
        assert tracker.run.sweep_id is None
        tracker.close(failed=False)
    assert len(ids - {"agent7"}) == 2
    assert any("WANDB_RUN_ID" in line and "WANDB_SWEEP_ID" in line for line in caplog.messages)


def test_a_variable_that_names_another_run_to_go_on_from_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_FORK_FROM", "other?_step=3")
    tracker = WandbTracker(tmp_path / "hash", Names(), {})
    assert tracker.run.id.startswith("hash-")
    assert wandb.setup().settings.fork_from is not None  # the session is left as it was
    tracker.close(failed=False)


def test_a_run_of_the_callers_own_goes_on(tmp_path: Path) -> None:
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True, console="off")) as mine:
        tracker = WandbTracker(tmp_path, Names(), {})
        tracker.close(failed=False)
        mine.log({"a": 1})
        assert wandb.run is mine


def test_the_sweep_of_the_repository_is_of_options_and_of_what_a_run_logs() -> None:
    sweep = yaml.safe_load((Path(CONF) / "wandb_sweep.yaml").read_text())
    drawn = {
        name: {"value": parameter.get("values", [parameter.get("max")])[-1]}
        for name, parameter in sweep["parameters"].items()
    }
    words = create_sweep_command_args({"args": drawn})["args_no_hyphens"]  # as an agent does
    command = [
        word for part in create_sweep_command(sweep["command"]) for word in (words if "args" in part else [part])
    ]
    assert command[:3] == ["python", "-m", "pkd_lightning.run"]
    config = load_config(*command[3:])
    assemble(config)
    for name, one in drawn.items():
        assert OmegaConf.select(config, name) == one["value"]
    assert config.logger.mode == "online"
    row = {"prefix_validation_accuracy": 0.5}
    results = {"rounds": [row], "ensemble": {}, "teacher": {}, "wall_seconds": {"total": 1.0}}
    assert figures_of(results)[sweep["metric"]["name"]] == 0.5
