"""The benchmark of ensembles in use: its rows, its tables, and the other checkout it compares with."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import inference, timing
from benchmarks.inference import Before, exponentials
from benchmarks.timing import Row
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.tasks import ImageClassification

ROOT = Path(__file__).parent.parent
EXPORTED = inference.exported
PATCHES = {"tokeniser": "patches", "patch_size": 4, "d_state": 3, "d_model": 4, "head": "mean"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> ProgressiveEnsemble:
    """Two students in place of both ensembles, and no call repeated to fill a timing."""
    members = [MambaClassifier((1, 8, 8), 10, n_blocks=n, **PATCHES).eval() for n in (1, 2)]
    task = ImageClassification((1, 8, 8), 10, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    ensemble = ProgressiveEnsemble(members, [(0.5, 0.5)] * 2, task).eval()
    monkeypatch.setattr(timing, "SAMPLE", 0.0)
    monkeypatch.setattr(inference, "SIDE", 16)
    monkeypatch.setattr(inference, "exported", lambda _: nullcontext(lambda count, batch: {}))  # it takes seconds
    both = {"mnist": (ensemble, members[1]), "other": (ensemble, members[1])}
    monkeypatch.setattr(inference, "models", lambda: both)
    return ensemble


def test_exported_files_are_called_too(tiny: ProgressiveEnsemble) -> None:
    pytest.importorskip("onnxruntime")
    with EXPORTED(tiny) as calls:
        assert set(calls(1, 1)) <= {"C"}
        assert set(calls(2, 256)) == {"onnxruntime"}
        for call in (*calls(2, 1).values(), *calls(2, 256).values()):
            assert call() is not None


def rows(before: Before | None = None) -> list[Row]:
    return inference.rows(2, before, ["mnist"])


def test_every_prefix_and_batch_has_its_rows() -> None:
    found = rows()
    for batch in (1, 256):
        for count in (1, 2):
            own = [row for row in found if row["what"].startswith(f"mnist, {count} of 2 students, batch {batch}")]
            against = {row.get("against") for row in own}
            assert "eager" in against
            assert ("one thread" in against) == (batch == 256)
            assert ("teacher" in against) == (count == 2)
    assert all(row["figure"] > 0 for row in found)
    assert {row["target"] for row in found if "target" in row} == {
        "at least 8", "at least 2", "at least 1.7", "at most 0.333"
    }  # fmt: skip
    json.dumps(found)


def test_an_ensemble_without_targets_is_not_compared_with_an_earlier_commit() -> None:
    class OfMnist(Before):
        def __init__(self) -> None:
            pass

        def __call__(self, name: str, batch: int, count: int) -> None:
            assert name == "mnist"

    found = [row for row in inference.rows(2, OfMnist(), ["mnist", "other"]) if row["what"].startswith("other")]
    assert {row.get("against") for row in found} >= {"eager", "one thread", "teacher"}
    assert not any("target" in row for row in found)
    assert not any(row["what"].startswith("other") for row in rows())


def test_another_checkout_takes_turns(tiny: ProgressiveEnsemble) -> None:
    before = Before(ROOT, {"mnist": tiny})
    found = rows(before)
    before.close()
    assert before.process.returncode == 0
    assert "eager before" in {row.get("against") for row in found}
    text = inference.latencies(found)
    assert text.splitlines()[0] == "| milliseconds | eager before | eager | compiled | two threads | teacher |"


def test_another_checkout_that_fails_is_an_error(tiny: ProgressiveEnsemble, tmp_path: Path) -> None:
    package = tmp_path / "pkd_lightning"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit(7)")
    before = Before(tmp_path, {"mnist": tiny})
    with pytest.raises(SystemExit, match="the other checkout's process ended with 7"):
        before("mnist", 1, 1)


def test_exponentials_are_counted_by_step_and_stem() -> None:
    student = MambaClassifier((1, 8, 8), 10, n_blocks=2, expand=2, **PATCHES)
    assert exponentials(student, (1, 8, 8)) == 2 * 4 * 8 * (3 + 3)
    options = {"tokeniser": "convolutions", "patch_size": 2, "stem_channels": 5, "d_model": 4, "d_state": 1}
    student = MambaClassifier((1, 8, 8), 10, **options)
    assert exponentials(student, (1, 8, 8)) == 16 * 5 + 1 * 8 * (1 + 3)


def test_tables_are_written_between_their_marks() -> None:
    found = rows()
    marks = "".join(f"<!-- bench: {name} -->\nold\n<!-- end of bench -->\n" for name in (*inference.TABLES, "other"))
    text = inference.fill(marks, found)
    assert text.count("old") == 1  # of the table that is not this benchmark's
    assert "| mnist, 2 of 2 students, batch 256 |" in text
    assert "| % of the product's rate |" in text
    assert len(inference.peaks(found).splitlines()) == 4


def test_ensembles_there_are_none_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inference.main(["--only", "cifar"])
    assert "--only: no ensemble cifar; there are mnist, other" in capsys.readouterr().err


def test_with_only_some_ensembles_the_others_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "RESULTS", tmp_path / "inference.json")
    new, old, other = ({"what": what} for what in ("mnist, 1 of 2 students", "mnist, 9 of 9", "other, 1 of 2 students"))
    assert inference.merged([new], ["mnist", "other"]) == [new]
    (tmp_path / "inference.json").write_text(json.dumps({"rows": [other, old, {"what": "gone, 1 of 2"}]}))
    assert inference.merged([new], ["mnist", "other"]) == [new, other]
