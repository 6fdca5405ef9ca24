"""The search of a ladder under two budgets, on the embedded digits."""

import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("optuna")

from experiments import search
from pkd_lightning.checkpoint import read_json
from pkd_lightning.cost import Cost, measure
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.classifier import MambaClassifier

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "experiment": ["data=digits", "data.limit=120"],
    "epochs": 1,
    "trainer": {"lr": 0.01, "batch_size": 64, "weight_decay": 0.01, "gradient_clip": 1.0},
    "trials": 3,
    "seed": 0,
    "rungs": {
        "student-1": {"params": 400, "macs": 8000},
        "student-2": {"params": 900, "macs": 40000},
        "teacher": {"params": 2000, "macs": 200000, "trials": 1},
    },
    "d_model": 12,
    "common": {"tokeniser": "patches", "norm": "rms"},
    "space": {"patch_size": [2, 4], "d_state": [2, 4], "n_blocks": [1, 2], "shared": [False, True]},
    "first": [{"patch_size": 4, "d_state": 2, "n_blocks": 1, "shared": False}],
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a small search.yaml, and a conf/ the found models are written to."""
    for name in ("student", "teacher"):
        (tmp_path / "conf" / name).mkdir(parents=True)
    monkeypatch.setattr(search, "CONF", tmp_path / "conf")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "search.yaml").write_text(yaml.safe_dump(SETTINGS))
    return tmp_path / "tiny"


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["search", *map(str, arguments)])
    search.main()


def test_the_search_keeps_its_budgets_goes_on_and_writes_what_it_found(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "--trials", 1)
    first = read_json(folder / "search.json")
    run(monkeypatch, folder)  # two trials more of each student
    found = read_json(folder / "search.json")
    assert {name: row["trials"] for name, row in found.items()} == {"student-1": 3, "student-2": 3, "teacher": 1}
    for name, budget in SETTINGS["rungs"].items():
        cost = measure(MambaClassifier((1, 8, 8), 10, **found[name]["options"]), (1, 8, 8))
        assert cost.params == found[name]["params"] <= budget["params"]
        assert cost.macs_total == found[name]["macs_total"] <= budget["macs"]
        assert found[name]["validation_loss"] <= first[name]["validation_loss"]
    ladder = yaml.safe_load((folder.parent / "conf" / "student" / "tiny.yaml").read_text())
    assert [{**ladder["common"], **rung} for rung in ladder["rungs"]] == [
        found[name]["options"] for name in ("student-1", "student-2")
    ]
    teacher = yaml.safe_load((folder.parent / "conf" / "teacher" / "tiny.yaml").read_text())["model"]
    assert found["teacher"]["options"].items() <= teacher.items()
    capsys.readouterr()
    monkeypatch.setattr(search, "DataModule", lambda config: pytest.fail("a finished search trains nothing"))
    run(monkeypatch, folder)
    assert read_json(folder / "search.json") == found
    assert "student-2: " in capsys.readouterr().out


def test_no_model_is_trained_twice(folder, monkeypatch):
    run(monkeypatch, folder, "--only", "student-1", "--trials", 4)
    storage = search.JournalStorage(search.JournalFileBackend(str(folder / "search.journal")))
    study = search.open_study(storage, "student-1", search.read(folder / "search.yaml"))
    trained = [str(sorted(trial.user_attrs["options"].items())) for trial in search.finished(study)]
    assert len(trained) == len(set(trained)) == 4


@pytest.mark.parametrize(("budget", "width"), [(Cost(50, 0, 10**9), 5), (Cost(10**9, 0, 50), 7), (Cost(1, 0, 1), None)])
def test_the_width_is_the_largest_within_both_budgets(budget, width):
    def cost(options: dict) -> Cost:
        return Cost(2 * options["d_model"] ** 2, 0, 7 * options["d_model"])

    found = search.widest({"n_blocks": 1}, budget, 30, cost)
    assert found == (None if width is None else {"n_blocks": 1, "d_model": width})


def test_a_wrong_entry_is_named(folder):
    (folder / "search.yaml").write_text(yaml.safe_dump({**SETTINGS, "trails": 3}))
    with pytest.raises(ConfigError, match="trails is not an option"):
        search.read(folder / "search.yaml")
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="cannot be read"):
        search.read(folder / "search.yaml")


def test_the_committed_ladder_is_what_the_committed_search_found():
    folder = ROOT / "experiments" / "mnist_best"
    found = read_json(folder / "search.json")
    settings = search.read(folder / "search.yaml")
    for name, text in search.configurations(found, settings.common, folder.name).items():
        assert (ROOT / "conf" / name).read_text() == text
    for name, budget in settings.budgets.items():
        cost = measure(MambaClassifier((1, 28, 28), 10, **found[name]["options"]), (1, 28, 28))
        assert cost.params <= budget.params
        assert cost.macs_total <= budget.macs_total
