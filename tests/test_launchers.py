"""A multirun with jobs side by side: recorded, said, and their cores divided, whichever launcher starts them."""

import json
import os
import re
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from pkd_lightning.sweeps.records import find_sweeps
from tests.support import TINY, stopped_by
from tests.test_run import pkd

COMMAND = ("--multirun", *TINY, "boosting.rounds=1", "run_root=here", "threads=null", "data.split=half,paper",
           "seed=0,1")  # fmt: skip


def sides(launcher: str, plugin: str) -> object:
    """The name of a launcher, skipped where its plugin is not installed."""
    absent = find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None
    why = f"{plugin} is not installed: pip install 'pkd-lightning[{'ray' if launcher == 'ray' else 'launchers'}]'"
    marks = [pytest.mark.skipif(absent, reason=why)] + ([] if launcher == "joblib" else [pytest.mark.slow])
    return pytest.param(launcher, marks=marks)


@pytest.mark.parametrize(
    "launcher",
    [
        sides("joblib", "hydra_joblib_launcher"),
        sides("submitit_local", "hydra_submitit_launcher"),
        sides("ray", "hydra_ray_launcher"),
    ],
)
def test_jobs_side_by_side_are_recorded_and_share_the_cores(launcher: str, tmp_path: Path) -> None:
    side_by_side = {"joblib": ("hydra.launcher.n_jobs=2",)}.get(launcher, ())
    done = pkd(*COMMAND, f"hydra/launcher={launcher}", *side_by_side, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (sweep,) = find_sweeps(tmp_path / "here")
    jobs, notes = sweep.jobs()
    assert [job.state for job in jobs] == ["failed", "failed", "finished", "finished"]
    assert notes == []
    assert os.getpid() not in {job.pid for job in jobs}
    assert len(re.findall(r"^failed: job [12] of 4 .*half", done.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"job [1-4] of 4 \(.*\) finished: validation", done.stdout)) == 2
    assert (sweep.path / "report.html").is_file()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for file in tmp_path.glob("here/digits/*/results.json"):
        assert json.loads(file.read_text())["hardware"]["threads"] <= max(1, cores // 2)
    again = pkd(*COMMAND, f"hydra/launcher={launcher}", *side_by_side, cwd=tmp_path)
    assert len(re.findall(r"job [34] of 4 \(.*\) found: validation", again.stdout)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [sides("joblib", "hydra_joblib_launcher"), "basic"])
def test_a_signal_saves_the_jobs_under_way_and_the_same_command_goes_on(launcher: str, tmp_path: Path) -> None:
    side_by_side = {"joblib": ("hydra.launcher.n_jobs=2",)}.get(launcher, ())
    flags = ["--multirun", *TINY, "run_root=here", "seed=0,1", f"hydra/launcher={launcher}", *side_by_side,
             "boosting.rounds=1", "trainer.max_epochs=200", "trainer.patience=null"]  # fmt: skip
    count = 2 if side_by_side else 1

    def far_enough(_: list[str]) -> bool:
        return len([path for path in tmp_path.rglob("metrics.jsonl") if path.stat().st_size]) == count

    code, _, said = stopped_by(signal.SIGTERM, tmp_path, flags, far_enough)
    assert code == 143, said
    assert len(list(tmp_path.rglob("fits/*.ckpt"))) == count  # by the signal: it took less than half a minute
    done = pkd(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logs = [path.read_text() for path in tmp_path.rglob("run.log")]
    assert sum("goes on in epoch" in log for log in logs) == count
