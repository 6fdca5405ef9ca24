"""The search of a ladder under two budgets, on the embedded digits."""

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
    journal = (folder / "search.journal").read_bytes()
    run(monkeypatch, folder)
    assert read_json(folder / "search.json") == found
    assert (folder / "search.journal").read_bytes() == journal
    assert "student-2: " in capsys.readouterr().out


def test_no_model_is_trained_twice(folder, monkeypatch):
    run(monkeypatch, folder, "--trials", 4)
    _, study = studies(folder)
    trained = [str(sorted(trial.user_attrs["options"].items())) for trial in search.finished(study)]
    assert len(trained) == len(set(trained)) == 4


@pytest.mark.parametrize(("budget", "width"), [(Cost(50, 0, 10**9), 5), (Cost(10**9, 0, 50), 7), (Cost(1, 0, 1), None)])
def test_the_width_is_the_largest_within_both_budgets(budget, width):
    def cost(options: dict) -> Cost:
        return Cost(2 * options["d_model"] ** 2, 0, 7 * options["d_model"])

    found = search.widest({"n_blocks": 1}, budget, 30, cost)
    assert found == (None if width is None else {"n_blocks": 1, "d_model": width})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"trails": 3}, "trails: no such option. Did you mean 'trials'"),
        ({"trials": "many"}, "trials='many': must be of type int"),
        ({"trainer": {"lr": 0.1}}, "trainer.batch_size: is missing"),
        ({"rungs": {"student-1": {"params": 1}}}, "rungs.student-1.macs: is missing"),
        ({"rungs": [1]}, "rungs=[1]: must be of type dict"),
        ({"space": {"d_stat": [1]}}, "space.d_stat: no such option. Did you mean 'd_state'"),
        ({"space": {"d_state": 3}}, "space.d_state=3: must be a list"),
        ({"first": [{"patch_size": 3}]}, "first[0]={'patch_size': 3}: must have a value of the space"),
        ({"first": [1]}, "first[0]=1: must have a value of the space"),
        ({"space": {"norm": ["rms", "none"]}}, "space.norm: is in common"),
        ({"space": {"d_model": [3]}}, "space.d_model: is found by the budget"),
        ({"experiment": ["data=digts"]}, "experiment=['data=digts']"),
    ],
)
def test_a_wrong_entry_is_named(folder, changes, fault):
    (folder / "search.yaml").write_text(yaml.safe_dump({**SETTINGS, **changes}))
    with pytest.raises(ConfigError) as caught:
        search.read(folder / "search.yaml")
    assert fault in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_file_that_is_no_mapping(folder, text):
    (folder / "search.yaml").write_text(text)
    with pytest.raises(ConfigError):
        search.read(folder / "search.yaml")


def studies(folder: Path, name: str = "student-1") -> tuple[search.Search, search.optuna.Study]:
    settings = search.read(folder / "search.yaml")
    storage = search.JournalStorage(search.JournalFileBackend(str(folder / "search.journal")))
    return settings, search.open_study(storage, name, settings)


def test_a_mistake_seen_before_anything_is_trained_can_be_corrected(folder):
    _, study = studies(folder)
    study.ask().suggest_categorical("n_blocks", [1])
    corrected = {**SETTINGS, "common": {"tokeniser": "patches", "norm": "none"}}
    (folder / "search.yaml").write_text(yaml.safe_dump(corrected))
    _, study = studies(folder)
    assert len(study.trials) == len(SETTINGS["first"])


def test_a_space_that_is_used_up_completes_its_rung(folder, monkeypatch, capsys):
    rungs = {"student-1": {"params": 400, "macs": 8000, "trials": 5}}
    space = {"patch_size": [4], "d_state": [2], "n_blocks": [1], "shared": [False]}
    (folder / "search.yaml").write_text(yaml.safe_dump({**SETTINGS, "space": space, "rungs": rungs}))
    monkeypatch.setattr(search, "IDLE", 3)
    run(monkeypatch, folder)
    assert "3 draws in a row" in capsys.readouterr().out
    assert read_json(folder / "search.json")["student-1"]["trials"] == 1
    before = (folder / "search.journal").read_text()
    run(monkeypatch, folder)
    assert (folder / "search.journal").read_text() == before


def test_a_budget_that_nothing_meets_is_said(folder, monkeypatch):
    rungs = {"student-1": {"params": 20, "macs": 8000}}
    (folder / "search.yaml").write_text(yaml.safe_dump({**SETTINGS, "rungs": rungs}))
    monkeypatch.setattr(search, "IDLE", 3)
    with pytest.raises(SystemExit, match="within the budget of student-1"):
        run(monkeypatch, folder)
    assert not (folder / "search.json").exists()


def test_other_settings_do_not_join_trials_of_a_journal(folder):
    _, study = studies(folder)
    study.tell(study.ask(), 0.5)
    (folder / "search.yaml").write_text(yaml.safe_dump({**SETTINGS, "epochs": 2}))
    with pytest.raises(ConfigError, match="epochs=1, not 2"):
        studies(folder)
    (folder / "search.yaml").write_text(yaml.safe_dump({**SETTINGS, "trials": 9}))
    assert studies(folder)[0].trials["student-1"] == 9


def test_a_trial_whose_process_was_killed_is_drawn_again(folder):
    _, study = studies(folder)
    trial = study.ask()  # the first draw, made by a process that is gone
    trial.set_user_attr("process", [search.MACHINE, 2**22 + 1])
    _, study = studies(folder)
    states = [trial.state.name for trial in study.trials]
    assert states == ["FAIL", "WAITING"]
    assert search.first_draw(study.trials[1]) == SETTINGS["first"][0]
    _, study = studies(folder)  # once only
    assert len(study.trials) == 2


def test_an_interrupted_trial_is_free_again(folder, monkeypatch):
    settings, study = studies(folder)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "run_trial", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search.advance(study, settings, "student-1", None)
    assert [trial.state.name for trial in study.trials] == ["FAIL"]


def test_what_another_process_trains_is_not_trained_as_well(folder):
    settings, study = studies(folder)
    data = search.DataModule(search.assemble(search.load_config(*settings.data)).data)
    budget = settings.budgets["student-1"]
    assert isinstance(search.run_trial(study.ask(), settings, budget, data), float)  # its trial is still RUNNING
    study.enqueue_trial(SETTINGS["first"][0])
    assert search.run_trial(study.ask(), settings, budget, data) == search.TrialState.FAIL


def test_nothing_is_written_before_every_rung_is_complete(folder, monkeypatch, capsys):
    run(monkeypatch, folder, "--only", "student-1")
    assert "student-2 0 of 3" in capsys.readouterr().out
    assert not (folder / "search.json").exists()
    with pytest.raises(SystemExit, match="Did you mean 'student-1'"):
        run(monkeypatch, folder, "--only", "studnt-1")


def test_the_committed_ladder_is_what_the_committed_search_found():
    folder = ROOT / "experiments" / "mnist_best"
    found = read_json(folder / "search.json")
    settings = search.read(folder / "search.yaml")
    for name, text in search.configurations(found, settings.common, folder.name).items():
        assert (ROOT / "conf" / name).read_text() == text
    results = read_json(folder / "results" / "anchored-seed0.json")
    assert [row["config"] for row in results["rounds"]] == [
        row["options"] for name, row in found.items() if name != "teacher"
    ]
    for name, budget in settings.budgets.items():
        cost = measure(MambaClassifier((1, 28, 28), 10, **found[name]["options"]), (1, 28, 28))
        assert cost.params <= budget.params
        assert cost.macs_total <= budget.macs_total
