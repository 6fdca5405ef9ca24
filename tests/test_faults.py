"""Files that are damaged, in the way, copied or moved: noticed or made anew, never silently used."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.errors import PKDError
from pkd_lightning.fit_checkpoint import Saving
from tests.support import ACCEPT, tiny_run

FLAGS = (ACCEPT, "boosting.rounds=3", "trainer.max_epochs=3", "trainer.checkpoint_every='1 epochs'")
TIMES = ("seconds", "latency", "hardware")


class Killed(BaseException):
    """Stands for SIGKILL."""


def stopped(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run that was killed in the second epoch of its second round."""
    save = Saving.save

    def kill(self: Saving, trainer: Any, pl_module: Any, epoch: int) -> None:
        save(self, trainer, pl_module, epoch)
        if self.name == "round-01" and epoch == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Saving, "save", kill)
        with pytest.raises(Killed):
            tiny_run(root, *FLAGS)
    (run,) = root.glob("digits/*")
    return run


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if not any(name in key for name in TIMES)}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_file_is_named_or_made_anew(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = without_times(tiny_run(tmp_path / "whole", *FLAGS))
    stopped(tmp_path / "stopped", monkeypatch)
    files = [path.relative_to(tmp_path / "stopped") for path in (tmp_path / "stopped").rglob("*") if path.is_file()]
    read = [file for file in files if file.name not in (".lock", "logits.lock")]
    assert len(read) >= 15
    outcomes = {}
    for number, file in enumerate(read):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "stopped", root, symlinks=True)
        content = (root / file).read_bytes()
        if not content:
            continue
        (root / file).unlink()  # it may be a hard link to another one
        (root / file).write_bytes(damage(content))
        found: Any = None
        try:
            found = without_times(tiny_run(root, *FLAGS))
        except PKDError as error:
            found = str(error)
        assert found == whole or file.name in found, f"{file}: {found}"
        outcomes[str(file)] = "made anew" if found == whole else "named"
        shutil.rmtree(root)
    assert set(outcomes.values()) == {"made anew", "named"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "digits",
        "digits/{hash}",
        "digits/{hash}/students",
        "digits/{hash}/teacher",
        "digits/{hash}/fits",
        "digits/{hash}/parts",
        "teachers",
    ],
)
def test_a_file_where_a_directory_should_be_is_one_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path / "first", monkeypatch)
    root = tmp_path / "second"
    path = root / name.format(hash=run.name) if name else root
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    with pytest.raises(PKDError, match=path.name):
        tiny_run(root, *FLAGS)
    assert path.read_text() == "in the way"


@pytest.mark.parametrize("way", [shutil.copytree, shutil.move])
def test_a_run_that_was_copied_or_moved_goes_on_where_it_is(
    way: Callable[[Path, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = without_times(tiny_run(tmp_path / "whole", *FLAGS))
    run = stopped(tmp_path / "here", monkeypatch)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    way(tmp_path / "here", tmp_path / "there")
    seen: list[int] = []
    advance = BoostingLoop.advance
    monkeypatch.setattr(BoostingLoop, "advance", lambda self: seen.append(self.state.round) or advance(self))
    assert without_times(tiny_run(tmp_path / "there", *FLAGS)) == whole
    assert seen == [1, 2]
    if run.exists():
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_damaged_results_of_a_finished_run_are_named(tmp_path: Path) -> None:
    tiny_run(tmp_path, *FLAGS)
    (path,) = tmp_path.rglob("results.json")
    content = json.loads(path.read_text())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(PKDError, match=r"results\.json"):
        tiny_run(tmp_path, *FLAGS)
    path.write_text(json.dumps(content))
    assert tiny_run(tmp_path, *FLAGS) == content


def test_a_sweeps_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / ".sweeps").write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-m", "pkd_lightning.run", "-m", "experiment=digits", f"run_root={tmp_path}", "seed=0,1"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"error: {tmp_path / '.sweeps'}" in done.stderr
    assert "choose another run_root" in done.stderr
