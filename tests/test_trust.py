"""Loading a run runs no code but this package's, unless the caller or the configuration names it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pkd_lightning.ensemble import ProgressiveEnsemble, load_student, save_student
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.models import building
from pkd_lightning.models.ladder import Ladder
from tests.support import tiny_run

SHAPE = (1, 8, 8)
HERE = __name__  # as pytest imports it
called: list[object] = []


class Own(nn.Module):
    """A user's student."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        called.append(self)
        self.layer = nn.Linear(image_shape[1] * image_shape[2], num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(images.flatten(1))
        return logits


def make_own(image_shape: tuple[int, int, int], num_classes: int) -> Own:
    """A function that says what it returns."""
    return Own(image_shape, num_classes)


def unannotated(image_shape, num_classes):  # type: ignore[no-untyped-def]
    """One that does not."""
    return Own(image_shape, num_classes)


def command(num_classes: int, text: str) -> int:
    """Stands for os.system."""
    called.append(text)
    return 0


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    """No ladder has been built, nothing called."""
    before = building.configured.copy()
    building.configured.clear()
    called.clear()
    yield
    building.configured.update(before)


def run_of(folder: Path, model: str, **options: Any) -> Path:
    """A run's files that name `model`."""
    students = folder / "students"
    save_student(Own(SHAPE, 3), students / "00", model, options, SHAPE, 3)
    description = {"scales": [[0.0, 1.0]], "mean": [0.5], "std": [0.5]}
    (students / "ensemble.json").write_text(json.dumps(description))
    called.clear()
    return folder


@pytest.mark.parametrize("trust", [(), HERE[:-1], f"{HERE}.Ow", f"x.{HERE}.Own", ["os", "torch"], False, ""], ids=repr)
def test_a_class_that_nobody_trusts_is_not_called(trust: Any, tmp_path: Path) -> None:
    run = run_of(tmp_path, f"{HERE}.Own")
    with pytest.raises(RunError, match=rf"00\.json.*trust='{HERE}.Own'"):
        ProgressiveEnsemble.load(run, trust)
    with pytest.raises(RunError, match=r"00\.json"):
        load_student(run / "students" / "00", trust)
    assert not called


@pytest.mark.parametrize("trust", [f"{HERE}.Own", HERE, HERE.split(".")[0], ["os", HERE], (f"{HERE}.Own",), True])
def test_a_class_the_caller_trusts_is_loaded(trust: Any, tmp_path: Path) -> None:
    (member,) = ProgressiveEnsemble.load(run_of(tmp_path, f"{HERE}.Own"), trust).members
    assert isinstance(member, Own)


@pytest.mark.parametrize("trust", [(), True, HERE, f"{HERE}.command"])
def test_what_gives_no_module_is_not_called_however_trusted(trust: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"00\.json.*{HERE}\.command"):
        ProgressiveEnsemble.load(run_of(tmp_path, f"{HERE}.command", text="pwned"), trust)
    assert not called


def test_an_untrusted_module_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_a_run.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match="trust"):
        ProgressiveEnsemble.load(run_of(tmp_path, "imported_by_a_run.Model"))
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    "model",
    [
        "pkd_lightning.models.building.nn.Sequential",  # a module of torch's, imported by this package
        "pkd_lightning.ensemble.load_student",
        "pkd_lightning.ensemble.ProgressiveEnsemble.load",  # would take a trust of its own from the file
        "pkd_lightning_other.Model",
    ],
)
def test_what_this_package_only_imports_or_calls_is_not_its_class(model: str, tmp_path: Path) -> None:
    inner = run_of(tmp_path / "inner", f"{HERE}.Own")
    run = run_of(tmp_path / "outer", model, directory=str(inner), trust=True)
    with pytest.raises(RunError, match="where you trust its code"):
        ProgressiveEnsemble.load(run)
    assert not called


@pytest.mark.parametrize("model", ["Own", "make_own"])
def test_a_users_student_is_trained_and_loaded_in_the_same_process(model: str, tmp_path: Path) -> None:
    path = f"{HERE}.{model}"
    own = (f"student.model={path}", "student.common=null", "student.rungs=[{}]", "boosting.rounds=1")
    tiny_run(tmp_path, *own)
    (run,) = [done.parent for done in tmp_path.rglob("DONE")]
    assert len(ProgressiveEnsemble.load(run)) == 1
    (run / "DONE").unlink()  # resumed, as by another process
    building.configured.clear()
    assert len(tiny_run(tmp_path, *own)["rounds"]) == 1
    building.configured.clear()
    with pytest.raises(RunError, match="trust"):
        ProgressiveEnsemble.load(run)


def test_a_file_changed_behind_a_run_is_not_trusted_by_resuming_it(tmp_path: Path) -> None:
    own = (f"student.model={HERE}.Own", "student.common=null", "student.rungs=[{}]", "boosting.rounds=1")
    tiny_run(tmp_path, *own)
    (done,) = tmp_path.rglob("DONE")
    done.unlink()
    (description,) = tmp_path.rglob("00.json")
    options = {"model": f"{HERE}.command", "options": {"text": "pwned"}}
    description.write_text(json.dumps({"image_shape": SHAPE, "num_classes": 3, **options}))
    called.clear()
    with pytest.raises(RunError, match=r"00\.json"):
        tiny_run(tmp_path, *own)
    assert "pwned" not in called


@pytest.mark.parametrize("model", [f"{HERE}.unannotated", f"{HERE}.command", "os.system"])
def test_a_ladder_of_what_could_not_be_loaded_again_is_refused_at_once(model: str) -> None:
    with pytest.raises(ConfigError, match="or a function annotated to return one"):
        Ladder(model, [{}])
    assert not called
