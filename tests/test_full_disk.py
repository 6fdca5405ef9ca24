"""A full disk: one error that names the disk and the file, nothing half written, and the same command goes on."""

import errno
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pkd_lightning import matrix, teacher
from pkd_lightning.checkpoint import atomic_write
from pkd_lightning.errors import RunError, full_disk
from pkd_lightning.matrix import reserve
from pkd_lightning.rundir import RunDirectory, RunLog
from tests.support import ACCEPT, tiny_config, tiny_run

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
FLAGS = ("boosting.rounds=2", ACCEPT)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write to the temporary file of `name` fails as on a full disk, in the system and not in Python."""
    make = tempfile.mkstemp

    def mkstemp(dir: Path, prefix: str) -> tuple[int, str]:
        handle, path = make(dir=dir, prefix=prefix)
        if prefix == f".{name}.":
            os.unlink(path)
            os.symlink("/dev/full", path)
        return handle, path

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)


@pytest.mark.parametrize("name", ["logits.safetensors", "01.safetensors", "boosting.ckpt"])
def test_a_file_that_finds_no_space_is_named_and_nothing_is_lost(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_for(name, patch)
        with pytest.raises(RunError, match=rf"no space left on /.*{name} cannot be written. Nothing is lost"):
            tiny_run(tmp_path, *FLAGS)
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
    assert not list(tmp_path.rglob(name))
    (weights,) = tmp_path.rglob("teacher.safetensors")
    before = weights.stat().st_mtime_ns
    assert len(tiny_run(tmp_path, *FLAGS)["rounds"]) == 2
    assert weights.stat().st_mtime_ns == before


def test_a_fit_that_finds_no_space_is_no_candidate_that_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*FLAGS, "trainer.max_epochs=2", "trainer.checkpoint_every=1 epochs")
    whole = tiny_run(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        full_for("round-01-0.ckpt", patch)
        with pytest.raises(RunError, match=r"no space left on .*round-01-0\.ckpt cannot be written"):
            tiny_run(tmp_path / "full", *flags)
    again = tiny_run(tmp_path / "full", *flags)
    assert [row["attempts"] for row in again["rounds"]] == [1, 1]
    assert again["ensemble"]["nll"] == whole["ensemble"]["nll"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.log"])
def test_a_file_that_is_added_to_is_no_traceback_either(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    directory = RunDirectory(tiny_config(tmp_path, *FLAGS)).path
    directory.mkdir(parents=True)
    (directory / name).symlink_to("/dev/full")
    with pytest.raises(RunError, match="no space left on"):
        tiny_run(tmp_path, *FLAGS)
    assert not (directory / "boosting.ckpt").exists()  # it stopped there, in the teacher's stage


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_matrices_too_large_for_memory(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "MAPPED_BYTES", 0)

    def fallocate(handle: int, start: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(teacher, "reserve", lambda path, size: os.truncate(path, size))
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(RunError, match="no space left on"):
        tiny_run(tmp_path, *FLAGS)


def test_the_teachers_logits_have_their_space_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map of a file with holes ends the process by SIGBUS where the disk is full."""
    predict = teacher.predict
    sizes = []

    def watched(model: Any, data: Any, rows: range, device: Any, out: torch.Tensor) -> Any:
        (file,) = tmp_path.rglob(".logits.safetensors.*")
        sizes.append((file.stat().st_blocks * 512 - file.stat().st_size, file.stat().st_size - 4 * out.numel()))
        return predict(model, data, rows, device, out=out)

    monkeypatch.setattr(teacher, "predict", watched)
    tiny_run(tmp_path, "+data.source.samples=3000", "boosting.rounds=1")
    ((spare, header),) = sizes
    assert spare >= 0
    assert header > 8


def test_reserving_keeps_what_the_file_holds_and_leaves_no_holes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"header")
    reserve(path, 1_000_000)
    assert path.read_bytes() == b"header" + bytes(999_994)
    assert path.stat().st_blocks * 512 >= 1_000_000


def test_a_file_and_then_its_name_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        steps.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def note_replace(*arguments: Any) -> None:
        steps.append("replace")
        replace(*arguments)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    atomic_write(tmp_path / "file", lambda path: path.write_text("text"))
    assert steps == ["file", "replace", "directory"]


def test_what_was_there_stays_where_flushing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, lambda temporary: temporary.write_text("old"))
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunError, match=r"no space left on .*/file cannot be written"):
        atomic_write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "denied"), ValueError("no number")):
        with pytest.raises(type(error)) as caught, full_disk(tmp_path):
            raise error
        assert caught.value is error


def test_a_record_that_cannot_be_formatted_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run.log")
    log.emit(logging.LogRecord("elsewhere", logging.INFO, "", 0, "%d", ("no number",), None))
    log.close()
    assert "Logging error" in capsys.readouterr().err
