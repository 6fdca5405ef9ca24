"""What killed processes leave is removed under the lock, and a finished run keeps no more than it needs."""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch

from pkd_lightning import matrix, teacher
from pkd_lightning.assembling import assemble
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.data.module import DataModule
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.teacher import cached_logits
from tests.support import ACCEPT, tiny_config, tiny_run


def leave(directory: Path) -> dict[str, list[Path]]:
    """What kills leave in a run directory, and files beside them that are none of it."""
    temporaries = []
    for folder, name in (
        ("", "boosting.ckpt"),
        ("", "scratch"),
        ("teacher", "logits.safetensors"),
        ("students", "0.j"),
    ):
        (directory / folder).mkdir(parents=True, exist_ok=True)
        _, path = tempfile.mkstemp(dir=directory / folder, prefix=f".{name}.")  # as the package does
        temporaries.append(Path(path))
    runs = {}
    for name, content in (("killed", b":W&B\xbe\xe1\x00"), ("good", b":W&B\xbe\xe1\x00 and what was logged")):
        runs[name] = directory / "wandb" / f"offline-run-{name}" / f"run-{name}.wandb"
        runs[name].parent.mkdir(parents=True)
        runs[name].write_bytes(content)
    links = {name: directory / "wandb" / f"{name}-link" for name in runs}
    for name, link in links.items():
        link.symlink_to(runs[name].parent.name)
    mine = [directory / ".notes.txt", directory / "notes.abcdefgh"]
    for path in mine:
        path.write_text("kept")
    return {
        "left": [*temporaries, runs["killed"].parent, links["killed"]],
        "kept": [runs["good"], links["good"], *mine],
    }


def remains(paths: list[Path]) -> list[bool]:
    return [path.exists() or path.is_symlink() for path in paths]


def test_a_run_that_starts_removes_what_kills_left_before_it_does_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = leave(RunDirectory(tiny_config(tmp_path)).path)

    def check(*_: object) -> None:
        assert remains(files["left"]) == [False] * 6
        assert remains(files["kept"]) == [True] * 4
        raise ZeroDivisionError

    monkeypatch.setattr("pkd_lightning.distil.prepare_teacher", check)
    with pytest.raises(ZeroDivisionError):
        tiny_run(tmp_path)


def test_a_finished_run_keeps_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "MAPPED_BYTES", 0)
    first = tiny_run(tmp_path, ACCEPT)
    (run,) = [done.parent for done in tmp_path.rglob("DONE")]
    expected = {"boosting.ckpt", "config.yaml", "DONE", ".lock", "metrics.jsonl", "results.json", "run.log"}
    expected |= {f"students/{t:02d}.{kind}" for t in range(3) for kind in ("json", "safetensors")}
    expected |= {"students/ensemble.json", "teacher/teacher.json", "teacher/teacher.safetensors"}
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} == expected
    assert not any(isinstance(value, torch.Tensor) for value in torch.load(run / "boosting.ckpt").values())
    assert len(ProgressiveEnsemble.load(run)) == 3

    (run / "DONE").unlink()  # to evaluate it again: nothing is trained
    monkeypatch.setattr(BoostingLoop, "advance", None)
    again = tiny_run(tmp_path, ACCEPT)
    assert again["ensemble"]["nll"] == first["ensemble"]["nll"]


def test_showing_a_finished_run_removes_what_a_kill_at_its_end_left(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    (run,) = [done.parent for done in tmp_path.rglob("DONE")]
    files = leave(run)
    late = [run / "residuals.0", run / "ensemble_logits.1", run / "progress.json", run / "teacher/logits.safetensors"]
    for path in late:
        path.write_bytes(b"0")
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tiny_run(tmp_path)  # shown, while another process is still at its end
        assert all(remains([*files["left"], *late]))
    tiny_run(tmp_path)
    assert not any(remains([*files["left"], *late]))
    assert all(remains([*files["kept"], run / "boosting.ckpt", run / "results.json"]))


def test_a_finished_run_is_shown_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tiny_run(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("pkd_lightning.rundir.fcntl.flock", refuse)
    assert tiny_run(tmp_path) == results


def test_temporaries_of_shared_logits_are_removed_under_their_own_lock(tmp_path: Path) -> None:
    data = DataModule(assemble(tiny_config(tmp_path)).data)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    for _ in range(3):
        tempfile.mkstemp(dir=tmp_path, prefix=".mine.safetensors.")
    _, other = tempfile.mkstemp(dir=tmp_path, prefix=".others.safetensors.")  # another process may be writing it
    cached_logits(model, data, tmp_path / "mine.safetensors", "key", torch.device("cpu"))
    assert {path.name for path in tmp_path.iterdir()} == {"mine.safetensors", "mine.lock", Path(other).name}
    assert teacher.load_tensors(tmp_path / "mine.safetensors")["key"].shape == (data.validation.stop, 3)
