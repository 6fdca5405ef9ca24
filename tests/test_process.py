"""A run is one process: what launchers and schedulers put into its environment, and the signals they send."""

import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.errors import RunError
from pkd_lightning.fitting import Stage, fit
from pkd_lightning.process import STOPS, stopped_by_signals, task
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.schedules import constant
from pkd_lightning.teacher import TeacherModule
from pkd_lightning.trainer import TrainerConfig
from tests.support import patterns, tiny_config, tiny_run

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0",
    "SLURM_NODELIST": "node1",
}  # fmt: skip
LAUNCHERS = {
    "one task of SLURM": {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "four tasks of SLURM": {**SLURM, "SLURM_NTASKS": "4"},
    "four tasks a node": {**SLURM, "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"},
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3",
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    },
    "a Kubeflow worker": {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    "LSF": {
        "LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/none", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "3",
        "JSM_NAMESPACE_LOCAL_RANK": "3",
    },
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
    "defaults of Lightning": {"PL_TRAINER_LIMIT_TRAIN_BATCHES": "0", "PL_TRAINER_NUM_NODES": "2"},
}  # fmt: skip
SEVERAL = ("four tasks of SLURM", "four tasks a node", "torchrun", "a Kubeflow worker", "LSF", "Open MPI")


def trained(directory: Path) -> dict[str, Tensor]:
    """The weights of a fit of one epoch, whose lines go to `directory`."""
    directory.mkdir()
    torch.manual_seed(0)
    config = TrainerConfig(
        partial(torch.optim.SGD, lr=0.1), constant, max_epochs=1, batch_size=16, accelerator="cpu", progress=False
    )
    module = TeacherModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), config)
    fit(module, DataModule(DataConfig(patterns)), Stage("teacher", 0, directory / "metrics.jsonl"))
    return module.model.state_dict()


@pytest.mark.parametrize("variables", LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_fit_is_the_same_under_every_launcher_and_touches_nothing_but_its_directory(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(tmp_path / "plain")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "hpc_ckpt_1.ckpt").write_text("a checkpoint nobody asked for")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    found = trained(here / "run")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert dict(os.environ) == before
    assert sorted(path.name for path in here.rglob("*")) == ["hpc_ckpt_1.ckpt", "metrics.jsonl", "run"]


def test_a_fit_reads_no_checkpoint_of_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def with_checkpoint(path: Path, *args: int, **kwargs: bool) -> None:
        make(path, *args, **kwargs)  # type: ignore[arg-type]
        (path / "hpc_ckpt_1.ckpt").write_text("left by an earlier version")

    for name, value in LAUNCHERS["one task of SLURM"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "mkdir", with_checkpoint)
    assert trained(tmp_path / "run")


@pytest.mark.parametrize("launcher", SEVERAL)
def test_of_several_tasks_one_trains_and_the_others_are_told(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    config = tiny_config(tmp_path)
    said = "this is task 4 of [48]"
    with RunDirectory(config).open(config), pytest.raises(RunError, match=f"another process .*{said}"):
        tiny_run(tmp_path)
    assert tiny_run(tmp_path)["rounds"]  # whatever its rank, where no other task is at work


def test_one_task_is_not_called_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHERS["one task of SLURM"].items():
        monkeypatch.setenv(name, value)
    assert task() == ""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.delenv("SLURM_PROCID")  # in the batch script itself, before any srun
    assert task() == ""


def test_trackers_write_whatever_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(rank_zero_only, "rank", 3)
    tiny_run(tmp_path, "logger=tensorboard")
    for stage, tag in (("teacher", "train_loss"), ("summary", "accuracy")):
        (events,) = tmp_path.rglob(f"{stage}/attempt-0/events.out.*")
        reader = EventAccumulator(str(events))
        reader.Reload()
        assert tag in reader.Tags()["scalars"]
    assert rank_zero_only.rank == 3


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_closes_what_is_open(number: int) -> None:
    handler = signal.signal(number, signal.SIG_DFL)
    closed = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
        finally:
            closed.append(number)

    try:
        with pytest.raises(SystemExit) as stop, stopped_by_signals():
            work()
        assert stop.value.code == 128 + number
        assert closed == [number]
        assert signal.getsignal(number) == signal.SIG_DFL  # as before
        signal.signal(number, signal.SIG_IGN)
        with stopped_by_signals():
            os.kill(os.getpid(), number)  # as `nohup` and a shell's background jobs have it
    finally:
        signal.signal(number, handler)
