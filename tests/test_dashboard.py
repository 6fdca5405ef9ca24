"""The W&B workspace, serialised without a server: it shows what runs log."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkd_lightning import dashboard
from pkd_lightning.wandb_tracker import WandbTracker, figures_of
from tests.support import ACCEPT, tiny_run


def panels(definition: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Panels by the name of their section."""
    sections = definition["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert dashboard.main(["me/mine", "--print"]) == 1
    assert "pip install 'pkd-lightning[dashboard]'" in capsys.readouterr().err


@pytest.mark.parametrize("project", ["mine", "/mine", "me/", "me/mine/more"])
def test_a_project_has_an_entity(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dashboard.main([project])
    assert "ENTITY/PROJECT" in capsys.readouterr().err


def test_it_shows_what_a_run_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces", reason="pkd-lightning[dashboard] is not installed")
    logged: dict[str, str] = {}
    log = WandbTracker.log

    def note(self: WandbTracker, values: Any, axis: str, position: int | None) -> None:
        logged.update(dict.fromkeys(values, axis))
        log(self, values, axis, position)

    monkeypatch.setattr(WandbTracker, "log", note)
    summary: dict[str, float] = {}

    def final(results: Any) -> dict[str, float]:
        summary.update(figures_of(results))
        return summary

    monkeypatch.setattr("pkd_lightning.wandb_tracker.figures_of", final)
    tiny_run(tmp_path, ACCEPT, "logger=wandb", "boosting.rounds=2", "knowledge=fitnet")

    capsys.readouterr()
    assert dashboard.main(["me/mine", "--print", "--rounds", "2", "--swept", "seed", "boosting.rounds"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["entity"], made["project"]) == ("me", "mine")
    shown = panels(made)
    kinds = [panel["viewType"] for panel in shown["Runs side by side"]]
    assert kinds == ["Scatter Plot", "Scatter Plot", "Parallel Coordinates Plot"]
    accessors = [text for text in strings(shown["Runs side by side"]) if ":" in text]
    assert {text.removeprefix("summary:") for text in accessors if text.startswith("summary:")} <= summary.keys()
    assert [text for text in accessors if text.startswith("config:")] == [
        "config:seed.value", "config:boosting.value.rounds",
    ]  # fmt: skip
    sections = ("Students", "Curves by round", "Knowledge by round")
    curves = [panel["config"] for name in sections for panel in shown[name]]
    assert len(curves) == 5 + 3 * 3 + 2 * 2
    for curve in curves:
        names = curve["metrics"] or [name for name in logged if re.fullmatch(curve["metricRegex"], name)]
        assert names
        assert {logged[name] for name in names} == {curve["xAxis"]}
