"""Runs that grow from the rounds of another run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pkd_lightning.assembling import assemble
from pkd_lightning.boosting import loop as boosting_loop
from pkd_lightning.checkpoint import HASH, content_hash
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.fitting import FitResult
from pkd_lightning.rundir import RunDirectory
from tests.support import ACCEPT, tiny_config, tiny_run
from tests.test_fit_resume import timeless

REPEAT = ("student.repeat=true", ACCEPT)


def place(root: Path, *flags: str) -> Path:
    return RunDirectory(tiny_config(root, *flags)).path


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the students' fits."""
    found: list[str] = []
    fit = boosting_loop.fit

    def noted(module: Any, data: Any, stage: Any, *given: Any) -> FitResult:
        found.append(stage.name)
        return fit(module, data, stage, *given)

    monkeypatch.setattr(boosting_loop, "fit", noted)
    return found


def without_origin(results: dict[str, Any]) -> Any:
    rows = [{key: row[key] for key in row if not key.startswith("from")} for row in results["rounds"]]
    return timeless({**results, "rounds": rows})


@pytest.mark.parametrize("flags", [(ACCEPT,), REPEAT, ("boosting.eta=0.1", "boosting=paper", ACCEPT),
                                   ("boosting.bound_quantile=0.9", "boosting.combine=mean", ACCEPT)])  # fmt: skip
def test_more_rounds_find_those_that_are_there(flags: tuple[str, ...], tmp_path: Path, fits: list[str]) -> None:
    tiny_run(tmp_path / "grown", *flags, "boosting.rounds=1")
    tiny_run(tmp_path / "grown", *flags, "boosting.rounds=2")
    assert fits == ["round-00", "round-01"]
    grown = tiny_run(tmp_path / "grown", *flags, "boosting.rounds=3")
    assert fits == ["round-00", "round-01", "round-02"]
    whole = tiny_run(tmp_path / "whole", *flags, "boosting.rounds=3")
    assert without_origin(grown) == without_origin(whole)
    one, other = (place(tmp_path / name, *flags, "boosting.rounds=3") for name in ("grown", "whole"))
    for path in sorted((one / "students").glob("*.safetensors")):
        mine, its = load_file(path), load_file(other / "students" / path.name)
        assert all(torch.equal(mine[name], its[name]) for name in mine)
    first = str(place(tmp_path / "grown", *flags, "boosting.rounds=1"))
    second = str(place(tmp_path / "grown", *flags, "boosting.rounds=2"))
    found = [(row.get("from"), row.get("from_round")) for row in grown["rounds"]]
    assert found == [(first, 0), (second, 1), (None, None)]


@pytest.mark.parametrize(
    "other", ["boosting=paper", "boosting.weak_learner.require=condition", "boosting.weights=samples"]
)
def test_where_the_first_rounds_depend_on_their_number_all_are_trained(
    other: str, tmp_path: Path, fits: list[str]
) -> None:
    for rounds in (1, 2):
        tiny_run(tmp_path, other, ACCEPT, f"boosting.rounds={rounds}")
    assert fits == ["round-00", "round-00", "round-01"]


def test_the_time_of_students_that_another_run_trained_is_not_its_own(tmp_path: Path) -> None:
    tiny_run(tmp_path, ACCEPT, "boosting.rounds=1")
    file = place(tmp_path, ACCEPT, "boosting.rounds=1") / "boosting.ckpt"
    state = torch.load(file, weights_only=True)
    del state[HASH]
    state["records"][0]["seconds"] = 1e6
    torch.save(state, file)
    seconds = tiny_run(tmp_path, ACCEPT, "boosting.rounds=2")["wall_seconds"]
    assert seconds["rounds"][0] == 1e6
    assert seconds["teacher"] + seconds["rounds"][1] < seconds["total"] < 1e6


def test_other_options_are_another_run(tmp_path: Path, fits: list[str]) -> None:
    tiny_run(tmp_path, ACCEPT, "boosting.rounds=1")
    tiny_run(tmp_path, ACCEPT, "boosting.rounds=2", "boosting.alpha=0.4")
    tiny_run(tmp_path, ACCEPT, "boosting.rounds=2", "seed=1")
    assert fits == ["round-00"] + 2 * ["round-00", "round-01"]


@pytest.mark.report
def test_a_run_that_is_named_is_gone_on_from_with_other_options(
    tmp_path: Path, fits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its students, scales and residual matrices; another objective, combination and ladder for the new rounds."""
    first = ("boosting=paper", "boosting.rounds=3", ACCEPT, "name=first")
    tiny_run(tmp_path, *first)
    source = place(tmp_path, *first)
    before = json.loads((source / "results.json").read_text())
    del fits[:]
    caplog.set_level(logging.INFO)
    grown = ("boosting.rounds=4", "boosting.objective=additive", "boosting.combine=sum", "name=grown", ACCEPT,
             f"boosting.grow_from={source}", "boosting.grow_rounds=2",
             "student.rungs=[{d_model: 5}, {d_model: 6}]")  # fmt: skip
    results = tiny_run(tmp_path, *grown)
    assert fits == ["round-02", "round-03"]
    assert f"the first 2 rounds are those of {source}" in caplog.text
    for one, other in zip(before["rounds"][:2], results["rounds"][:2], strict=True):
        for name in ("nll", "edges", "eta", "bound", "scales", "config", "accepted_by", "prefix_nll"):
            assert one[name] == other[name]
    assert [row["config"]["d_model"] for row in results["rounds"]] == [3, 4, 5, 6]
    assert results["rounds"][1]["from"] == str(source)
    ensemble = ProgressiveEnsemble.load(place(tmp_path, *grown))
    assert ensemble.scales[:2] == [(0.0, 1.0), (0.5, 0.5)]
    assert ensemble.scales[2:] == [(1.0, 1.0)] * 2
    report = (place(tmp_path, *grown) / "report.html").read_text()
    assert f"Students 1 to 2 are from {source}" in report


@pytest.mark.parametrize("other", ["data.split_seed=1", "teacher.model.d_state=3", "data.limit=100"])
def test_what_cannot_go_together_is_refused_by_name(other: str, tmp_path: Path) -> None:
    tiny_run(tmp_path, ACCEPT, "boosting.rounds=1", "name=first")
    source = place(tmp_path, ACCEPT, "boosting.rounds=1", "name=first")
    with pytest.raises(ConfigError, match=rf"boosting\.grow_from=.*: its {other.split('=')[0]} is "):
        tiny_run(tmp_path, ACCEPT, f"boosting.grow_from={source}", other)
    with pytest.raises(ConfigError, match=r"grow_from=.*elsewhere.*: is no run directory, config\.yaml, boosting"):
        tiny_run(tmp_path, ACCEPT, "boosting.grow_from=elsewhere")
    with pytest.raises(RunError, match="has 1 rounds, and 2 are to be taken"):
        tiny_run(tmp_path, ACCEPT, f"boosting.grow_from={source}", "boosting.grow_rounds=2")
    with pytest.raises(RunError, match="another teacher"):  # of another seed
        tiny_run(tmp_path, ACCEPT, f"boosting.grow_from={source}", "seed=1")
    with pytest.raises(ConfigError, match="grow_rounds=1: needs grow_from"):
        tiny_run(tmp_path, ACCEPT, "boosting.grow_rounds=1")


@pytest.mark.parametrize("grow_rounds", [(), ("boosting.grow_rounds=2",)])
def test_no_more_rounds_are_taken_than_the_run_has(
    grow_rounds: tuple[str, ...], tmp_path: Path, fits: list[str]
) -> None:
    tiny_run(tmp_path, *REPEAT, "boosting.rounds=3", "name=first")
    source = place(tmp_path, *REPEAT, "boosting.rounds=3", "name=first")
    results = tiny_run(tmp_path, *REPEAT, "boosting.rounds=2", f"boosting.grow_from={source}", *grow_rounds)
    assert (results["stop_reason"], len(results["rounds"])) == ("reached boosting.rounds=2", 2)
    assert len(fits) == 3
    with pytest.raises(ConfigError, match=r"boosting\.grow_rounds=2: is more than boosting\.rounds"):
        tiny_run(tmp_path, *REPEAT, "boosting.rounds=1", f"boosting.grow_from={source}", "boosting.grow_rounds=2")


def test_runs_of_as_many_rounds_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(tmp_path, ACCEPT, "boosting.rounds=2")
    monkeypatch.setattr("pkd_lightning.growth._config_of", lambda run: pytest.fail(f"{run} is read"))
    tiny_run(tmp_path, ACCEPT, "boosting.rounds=2", "boosting.alpha=0.4")


def test_no_round_starts_after_the_time_that_is_given(tmp_path: Path, fits: list[str]) -> None:
    results = tiny_run(tmp_path, ACCEPT, "boosting.max_time=1e-5")
    assert fits == ["round-00"]
    assert results["stop_reason"] == "ended early, after boosting.max_time=1e-05 minutes"
    assert results["ensemble"]["members"] == 1
    assert tiny_run(tmp_path, ACCEPT, "boosting.max_time=1000")["ensemble"]["members"] == 3


def test_the_time_of_rounds_that_are_taken_over_does_not_count(tmp_path: Path) -> None:
    first = (ACCEPT, "boosting.rounds=2", "name=first")
    tiny_run(tmp_path, *first)
    path = place(tmp_path, *first) / "boosting.ckpt"
    state = torch.load(path)
    state.pop(HASH)
    for record in state["records"]:
        record["seconds"] = 1e6
    torch.save({**state, HASH: content_hash(state)}, path)
    flags = (ACCEPT, "boosting.rounds=3", "boosting.max_time=100")
    assert len(tiny_run(tmp_path, *flags, f"boosting.grow_from={path.parent}", "name=grown")["rounds"]) == 3


def test_losses_of_rounds_that_are_taken_over_are_of_this_runs_alpha(tmp_path: Path) -> None:
    first = (ACCEPT, "boosting.rounds=2", "boosting.alpha=0", "boosting.objective=independent", "name=first")
    tiny_run(tmp_path, *first)
    flags = (ACCEPT, "boosting.rounds=2", "boosting.alpha=1", "boosting.objective=independent",
             f"boosting.grow_from={place(tmp_path, *first)}")  # fmt: skip
    kept, solved = (tiny_run(tmp_path, *flags, f"boosting.grow_scales={way}")["rounds"] for way in ("kept", "solved"))
    assert kept[0]["validation_loss"] == pytest.approx(solved[0]["validation_loss"], abs=1e-6)
    source = json.loads((place(tmp_path, *first) / "results.json").read_text())["rounds"]
    assert kept[0]["validation_loss"] != pytest.approx(source[0]["validation_loss"], abs=1e-3)


@pytest.mark.parametrize("combine", ["learned", "held_out", "mean", "sum"])
def test_scales_solved_anew_are_those_of_a_run_of_that_combination(
    combine: str, tmp_path: Path, fits: list[str]
) -> None:
    """Where the objective does not see the ensemble, students are the same whatever the combination."""
    flags = ("boosting.objective=independent", ACCEPT, "boosting.rounds=3")
    before = "mean" if combine != "mean" else "sum"
    tiny_run(tmp_path, *flags, f"boosting.combine={before}")
    source = place(tmp_path, *flags, f"boosting.combine={before}")
    trained = tiny_run(tmp_path / "other", *flags, f"boosting.combine={combine}")
    fits.clear()
    grown = tiny_run(
        tmp_path, *flags, f"boosting.combine={combine}", f"boosting.grow_from={source}", "boosting.grow_scales=solved"
    )
    assert not fits
    for one, other in zip(grown["rounds"], trained["rounds"], strict=True):
        assert one["scales"] == other["scales"]
        assert one["prefix_accuracy"] == other["prefix_accuracy"]
        assert one["prefix_nll"] == pytest.approx(other["prefix_nll"], abs=1e-6)
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], abs=1e-6)
        assert one["edges"] == other["edges"]
    kept = tiny_run(tmp_path, *flags, f"boosting.combine={combine}", f"boosting.grow_from={source}")
    assert kept["rounds"][1]["scales"] != trained["rounds"][1]["scales"]


def test_scales_can_be_solved_anew_only_of_a_run_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="grow_scales='solved': needs grow_from"):
        assemble(tiny_config(tmp_path, "boosting.grow_scales=solved"))
    with pytest.raises(ConfigError, match="grow_scales='anew': must be one of kept, solved"):
        assemble(tiny_config(tmp_path, "boosting.grow_scales=anew"))
