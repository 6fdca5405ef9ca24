"""A page to look at while a run goes on, and W&B's rows of the rounds as they come."""

import json
from pathlib import Path
from typing import Any

import pytest

from pkd_lightning import distil
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.errors import RunError
from pkd_lightning.fitting import EpochLines
from pkd_lightning.live import LivePage, Looks
from pkd_lightning.loggers import NoTracker
from pkd_lightning.report import main
from tests.support import ACCEPT, tiny_run


class Clock:
    """Seconds that only a test lets pass."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def page_of(cost: float) -> tuple[LivePage, Clock, list[bool]]:
    """A page that takes so many seconds to draw with figures."""
    clock, written = Clock(), list[bool]()

    def write(figures: bool) -> None:
        written.append(figures)
        clock.now += cost if figures else 0.0

    return LivePage(NoTracker(Path(), None, {}), write, clock), clock, written  # type: ignore[arg-type]


def test_the_first_page_comes_at_once_and_the_next_ones_take_2_percent_of_the_time() -> None:
    page, clock, written = page_of(cost=3.0)
    page.look()
    assert written == [False]
    for seconds, expected in ((49.0, 0), (2.0, 1), (140.0, 1), (11.0, 2), (100.0, 2), (51.0, 3)):
        clock.now += seconds
        page.look()
        assert written == [False] + [True] * expected


def test_it_is_looked_after_in_every_epoch_after_every_stage_and_round() -> None:
    page, clock, written = page_of(cost=1.0)
    with page.stage("teacher") as loggers:
        (callback,) = loggers
        assert isinstance(callback, Looks)
        callback.on_validation_end(None, None)  # type: ignore[arg-type]
        assert written == [False]
        clock.now += 60
    assert written == [False, True]
    clock.now += 60
    page.progress({"rounds": []})
    assert written == [False, True, True]


def test_trouble_with_the_page_is_one_line_and_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    page, _, _ = page_of(cost=1.0)

    def refuse(figures: bool) -> None:
        raise RunError("no space left")

    page.write = refuse
    page.look()
    page.look()
    assert [line for line in caplog.messages if "no report" in line] == [
        "no report while the run goes on: no space left"
    ]


def test_a_run_has_a_page_from_its_first_epoch_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    lines = EpochLines.on_validation_end

    def look(self: EpochLines, *given: Any) -> None:
        (page,) = (path for path in tmp_path.rglob("report.html"))
        text = page.read_text()
        seen.append((self.stage, "This run is not finished: 0 of 3 rounds" in text))
        assert '<meta http-equiv="refresh" content="20">' in text
        lines(self, *given)

    monkeypatch.setattr(EpochLines, "on_validation_end", look)
    from pkd_lightning.report import write_report

    monkeypatch.setattr(distil, "write_report", lambda run, figures=True: write_report(run, figures=False))
    tiny_run(tmp_path, ACCEPT)
    assert seen[0] == ("teacher", True)
    (page,) = tmp_path.rglob("report.html")
    assert "not finished" not in page.read_text()
    assert 'http-equiv="refresh"' not in page.read_text()


@pytest.mark.report
def test_a_run_that_trains_its_teacher_has_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(Exception):
        """Ends the run before its rounds."""

    def stop(self: BoostingLoop, *_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(BoostingLoop, "run", stop)
        with pytest.raises(Stopped):
            tiny_run(tmp_path, "trainer.max_epochs=2")
    (run,) = tmp_path.glob("digits/*")
    assert json.loads((run / "progress.json").read_text())["teacher"]["accuracy"] is None
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "0 of 3 rounds are done. Its last epoch was epoch 2 of the teacher." in text
