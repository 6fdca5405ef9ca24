"""Runs are found again: `pkd list`, and the link `latest`."""

import json
import os
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from pkd_lightning.errors import ConfigError
from pkd_lightning.rundir import OVERRIDES, RunDirectory, point_latest
from pkd_lightning.sweeps import listing
from tests.support import tiny_config, tiny_run
from tests.test_report import make_run
from tests.test_sweeps import add, job_config, results_of, sweep_at


def test_list_shows_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    sweep = sweep_at(root)
    one = add(sweep, 0, ["seed=3", "student=tiny"], results_of(0.9, 0.8))
    run = sweep.run_of(one)
    assert run is not None
    (run / OVERRIDES).write_text(json.dumps(["experiment=digits", "seed=3", "logger=none", "student=tiny"]))
    add(sweep, 1, ["seed=9"], state="failed", error="broken")
    old = tiny_config(root, "seed=5")
    with RunDirectory(old).open(old):
        assert {row.state for row in listing.list_runs(root)} == {"finished", "failed: broken", "running"}
    (RunDirectory(old).path / OVERRIDES).unlink(missing_ok=True)
    rows = {row.name: row for row in listing.list_runs(root)}
    assert rows["digits/run00"].settings == ["seed=3", "student=tiny"]
    assert rows["digits/run00"].validation == "90.0%"
    assert rows["digits/run01"].settings == ["seed=9"]
    name = os.path.relpath(RunDirectory(old).path, root)
    assert rows[name].state == "stopped"
    assert "seed=5" in rows[name].settings  # told from its configuration, where its command is not known
    assert listing.main([str(root)]) == 0
    printed = capsys.readouterr().out
    assert "seed=3" in printed
    assert listing.main([str(tmp_path / "none")]) == 1
    assert "is no directory" in capsys.readouterr().err


def test_list_says_what_is_common_to_all_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        run = make_run(tmp_path / "digits" / f"run{number}")
        (run / OVERRIDES).write_text(json.dumps(["trainer.max_epochs=7", f"trainer.optimizer.lr={number}"]))
    assert listing.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("max_epochs=7") == 1
    assert " lr=1 " in printed


def test_latest_leads_to_the_last_run(tmp_path: Path) -> None:
    for seed in (0, 1, 0):  # the last one is found finished
        tiny_run(tmp_path, f"seed={seed}", "boosting.rounds=1")
        expected = RunDirectory(tiny_config(tmp_path, f"seed={seed}", "boosting.rounds=1")).path
        assert (tmp_path / "latest").resolve() == expected
        assert not Path(os.readlink(tmp_path / "latest")).is_absolute()  # so that a moved run_root keeps it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "latest", "teachers"]
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").write_text("mine")
    point_latest(tmp_path, tmp_path / "digits")  # something of the user's stays
    assert (tmp_path / "latest").read_text() == "mine"
    with pytest.raises(ConfigError, match="name='latest'"):
        tiny_run(tmp_path, "name=latest")


def test_a_run_keeps_the_overrides_of_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    hydra = job_config(tmp_path, "seed=2")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", hydra)
    with RunDirectory(config).open(config) as directory:
        assert "seed=2" in json.loads((directory.path / OVERRIDES).read_text())
