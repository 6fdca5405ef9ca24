"""What a run meets on other machines: file systems without locks, packages that are not installed, other encodings."""

import errno
import fcntl
import io
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pkd_lightning import evaluate, report
from pkd_lightning.errors import ConfigError
from tests.support import ACCEPT, tiny_run


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    tiny_run(tmp_path, "boosting.rounds=1")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("no locks" in line for line in warnings)
    assert list(tmp_path.rglob("DONE"))


def test_any_other_error_of_a_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        tiny_run(tmp_path, "boosting.rounds=1")


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without(name: str) -> str:
        if name in ("wandb", "pkd-lightning", "torchvision"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    found = evaluate.versions()
    assert {"python", "torch", "pkd-lightning"} <= found.keys()
    assert not {"wandb", "torchvision"} & found.keys()


def test_without_wandb_the_default_runs_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert len(tiny_run(tmp_path, ACCEPT, "logger=wandb")["rounds"]) == 3
    assert len([line for line in caplog.messages if "wandb" in line]) == 1
    assert "nothing is tracked" in caplog.text
    with pytest.raises(ConfigError, match=r"logger.mode=online: .*or logger=none"):
        tiny_run(tmp_path, "logger=wandb", "logger.mode=online", "seed=1")


def test_a_tracker_that_was_chosen_and_is_not_installed_fails_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed"):
        tiny_run(tmp_path, "logger=tensorboard")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_report_in_another_encoding_than_the_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    monkeypatch.setattr(report, "write_report", lambda run, out: run / "report.html")
    (tmp_path / "größe").mkdir()
    (tmp_path / "größe" / "results.json").touch()
    assert report.main([str(tmp_path / "größe")]) == 0
    sys.stdout.flush()
    assert b"gr??e/report.html" in file.getvalue()
