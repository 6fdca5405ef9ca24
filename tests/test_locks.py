"""Locks on files."""

import fcntl
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from pkd_lightning.locks import locked


def test_a_lock_whose_file_is_deleted_while_it_is_waited_for_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "there" / ".lock"
    flock = fcntl.flock

    def deleted_meanwhile(file: Any, operation: int) -> None:
        flock(file, operation)
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(path.parent)

    monkeypatch.setattr(fcntl, "flock", deleted_meanwhile)
    with locked(path, "") as lock:
        assert lock.held
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        with path.open() as other, pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert path.read_text() == ""
