"""A study is run once, wherever and however often it is started: order, collection, refusal, failure, interruption."""

import copy
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig

from experiments import plan, study
from experiments.plan import load_study
from experiments.study import collected
from pkd_lightning.cli import load_config
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.run import run
from pkd_lightning.rundir import RunDirectory

ROOT = Path(__file__).parent.parent

# stands for `pkd_lightning.run`: leaves what it leaves, in a fraction of a second; `max_epochs` says what else it does
FAKE = """
import json, os, pathlib, signal, sys, time
directory, epochs, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
stopped = directory / "stopped"
if epochs == 13:
    print("all is well")
    sys.exit("error: no luck")
if epochs >= 100 and not stopped.exists():  # the signal comes in the middle of it
    directory.mkdir(parents=True)
    stopped.touch()
    os.kill(os.getppid(), epochs - 100)
    time.sleep(100)
if epochs == 16:
    time.sleep(0.6)
print(f"round 1/1: rung {seed}")
print("noise")
accuracy = {"accuracy": 0.5 + seed / 10}
results = {"teacher": accuracy, "ensemble": accuracy, "wall_seconds": {"total": 60.0}, "epochs": epochs}
for name, text in {
    "results.json": json.dumps(results), "teacher/teacher.safetensors": f"teacher {seed}", "teacher/teacher.json": "{}",
    "teacher/logits.safetensors": "x" * 2_000_000, "students/ensemble.json": "{}", "students/00.json": "{}",
    "students/00.safetensors": "x" * (2_000_000 if epochs == 14 else 10), "metrics.jsonl": "{}", "figures/cost.png": "",
}.items():
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)
if epochs != 15:
    (directory / "DONE").touch()
"""


@dataclass
class Bench:
    """A study in a temporary folder; `started` are the names of the children in order, with what was collected then."""

    folder: Path
    runs: Path
    started: list[str] = field(default_factory=list)
    arguments: dict[str, list[str]] = field(default_factory=dict)
    there: dict[str, set[str]] = field(default_factory=dict)
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)
    most: int = 0

    def write(self, text: str) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "study.yaml").write_text(text.replace("FOLDER", str(self.folder)))

    def run(self, *options: str) -> int:
        """The command, with a fresh list of what it starts."""
        self.started.clear()
        return study.main([str(self.folder), "--runs", str(self.runs), *options])

    def collected(self) -> set[str]:
        return {path.stem for path in (self.folder / "results").glob("*.json")}

    def results(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "results" / f"{name}.json").read_text())
        return found


def processes(start: Callable[..., Any]) -> SimpleNamespace:
    """The module `subprocess` with another Popen, for the runner alone."""
    return SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)


composed = functools.cache(load_config)  # for the runner and its fakes, which compose the same many times


def compose(*overrides: str) -> DictConfig:
    return copy.deepcopy(composed(*overrides))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Children are fakes, in the run directory that `pkd_lightning.run` would use with their arguments."""
    made = Bench(tmp_path / "some study", tmp_path / "it's here")
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)

    def start(command: list[str], **options: Any) -> subprocess.Popen[Any]:
        assert command[:3] == [sys.executable, "-m", "pkd_lightning.run"]
        config = compose(*command[3:])
        name = Path(options["stdout"].name).stem
        made.started.append(name)
        made.arguments[name], made.there[name] = command[3:], made.collected()
        told = (RunDirectory(config).path, config.trainer.max_epochs, config.seed)
        made.processes.append(subprocess.Popen([sys.executable, str(fake), *map(str, told)], **options))
        made.most = max(made.most, sum(process.poll() is None for process in made.processes))
        return made.processes[-1]

    monkeypatch.setattr(study, "subprocess", processes(start))
    monkeypatch.setattr(plan, "load_config", compose)
    return made


TWO = "seeds: [0, 1]\ncommon: [experiment=digits]\nruns: {one: {overrides: [boosting.rounds=2]}, other: {seeds: [3]}}"


def test_what_is_collected_is_not_run_again_on_any_machine(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(TWO)
    assert bench.run() == 0
    assert sorted(bench.started) == ["one-seed0", "one-seed1", "other-seed3"]
    assert bench.collected() == set(bench.started)
    said = capsys.readouterr().out
    assert "one-seed1: round 1/1: rung 1" in said
    assert "noise" not in said
    assert "teacher 60.0%, ensemble 60.0%" in said
    assert "180 seconds" in said

    elsewhere = Bench(bench.folder, bench.runs.with_name("elsewhere"))
    assert elsewhere.run() == 0
    assert bench.started == ["one-seed0", "one-seed1", "other-seed3"]  # the fixture counts for both
    assert not elsewhere.runs.exists()
    assert "all 3 runs are collected" in capsys.readouterr().out


def test_results_say_what_they_are_of_and_tables_can_read_them(bench: Bench) -> None:
    bench.write("seeds: [4, 7]\ncommon: [experiment=digits]\nruns: {one: {overrides: ['name=s{seed}', threads=2]}}")
    assert bench.run() == 0
    jobs = load_study(bench.folder).jobs
    assert [job.name for job in jobs] == ["one-seed4", "one-seed7"]
    for job in jobs:
        results = collected(job)
        assert results is not None
        assert results["study"]["run"] == "one"
        assert results["study"]["overrides"] == ["experiment=digits", f"name=s{job.seed}", "threads=2"]
        config = load_config(*bench.arguments[job.name])
        assert (config.seed, config.name, config.threads) == (job.seed, f"s{job.seed}", 2)  # not the runner's threads=1
        assert config.logger._target_.endswith("NoTracker")
        assert config.trainer.progress is False
        assert results["teacher"]["accuracy"] == pytest.approx(0.5 + job.seed / 10)


def test_results_of_other_overrides_are_refused_until_told_to_run_again(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(TWO)
    assert bench.run("--only", "one-*") == 0
    before = bench.results("one-seed0")
    bench.write(TWO.replace("rounds=2", "rounds=3"))
    assert bench.run() == 1
    assert bench.started == ["other-seed3"]
    said = capsys.readouterr()
    assert "one-seed1" in said.err
    assert "boosting.rounds=2 only in the results; boosting.rounds=3 only in study.yaml" in said.err
    assert bench.results("one-seed0") == before
    with pytest.raises(RunError, match=r"rounds=3 only in study\.yaml"):
        collected(load_study(bench.folder).jobs[0])

    assert bench.run("--again", "--only", "one-seed0") == 0
    assert bench.started == ["one-seed0"]
    assert bench.results("one-seed0")["study"]["overrides"] == ["experiment=digits", "boosting.rounds=3"]
    assert bench.run() == 1  # the other seed still is of the old ones
    assert bench.started == []


def test_results_without_overrides_are_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(TWO)
    (bench.folder / "results").mkdir()
    (bench.folder / "results" / "one-seed0.json").write_text('{"teacher": {}}')
    (bench.folder / "results" / "one-seed1.json").write_text("{")
    assert bench.run() == 1
    assert bench.started == ["other-seed3"]
    said = capsys.readouterr().err
    assert "one-seed0.json: does not say" in said
    assert "one-seed1.json: cannot be read" in said


AFTER = """
seeds: [0, 1]
common: [experiment=digits]
runs:
  first: {overrides: [FIRST], keep: [teacher]}
  second: {overrides: ["teacher.checkpoint=FOLDER/kept/first-seed{seed}/teacher.safetensors"], after: [first]}
  third: {overrides: [boosting.rounds=3], seeds: [0]}
"""


def test_a_run_starts_after_all_seeds_of_those_it_needs(bench: Bench) -> None:
    bench.folder = bench.folder.with_name("plain")  # Hydra's unquoted overrides allow no space in a path
    bench.write(AFTER.replace("FIRST", "boosting.rounds=2"))
    assert bench.run("--jobs", "3") == 0
    assert bench.started[:3] == ["first-seed0", "first-seed1", "third-seed0"]  # the third waits for nothing
    assert len(bench.started) == 5
    for name in ("second-seed0", "second-seed1"):
        assert {"first-seed0", "first-seed1"} <= bench.there[name]
    # a teacher of other content makes another run directory
    paths = {RunDirectory(load_config(*bench.arguments[f"second-seed{s}"], "seed=0")).path for s in (0, 1)}
    assert len(paths) == 2
    assert bench.run("--again", "--only", "second-seed1") == 0  # what it needs stays collected
    assert bench.started == ["second-seed1"]


def test_as_many_processes_as_told_run_side_by_side(bench: Bench) -> None:
    bench.write("seeds: [0, 1, 2, 3, 4]\nruns: {one: {overrides: [trainer.max_epochs=16]}}")
    assert bench.run("--jobs", "3") == 0
    assert bench.most == 3


def test_a_failure_stops_only_what_needs_it(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.folder = bench.folder.with_name("plain")
    bench.write(AFTER.replace("FIRST", "'trainer.max_epochs=1{seed}', boosting.rounds=1").replace("[0, 1]", "[0, 3]"))
    assert bench.run("--jobs", "1") == 1
    assert bench.started == ["first-seed0", "first-seed3", "third-seed0"]
    assert bench.collected() == {"first-seed0", "third-seed0"}
    said = capsys.readouterr()
    log = bench.runs / "plain" / "first-seed3.log"
    assert "error: no luck" in said.err
    assert str(log) in said.err
    assert "all is well" in log.read_text()
    for seed in (0, 3):
        assert f"second-seed{seed}: not started, it waits for first-seed3" in said.err

    (bench.runs.parent / "fake.py").write_text(FAKE.replace("epochs == 13", "False"))  # what failed is repaired
    assert bench.run() == 0
    assert sorted(bench.started) == ["first-seed3", "second-seed0", "second-seed3"]
    assert log.read_text().count("pkd_lightning.run") == 2  # appended


def test_only_waits_for_what_is_not_chosen(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.folder = bench.folder.with_name("plain")
    bench.write(AFTER.replace("FIRST", "boosting.rounds=2"))
    assert bench.run("--only", "third-*", "--only", "first-seed1") == 0
    assert sorted(bench.started) == ["first-seed1", "third-seed0"]
    capsys.readouterr()
    assert bench.run("--only", "second-*") == 1
    assert bench.started == []
    assert "no such file" in capsys.readouterr().err  # nobody is about to leave its teacher
    assert bench.run("--only", "fourth") == 1
    assert "'fourth': matches none of first-seed0" in capsys.readouterr().err


def test_a_run_that_ends_well_but_unfinished_is_not_collected(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write("seeds: [0]\nruns: {one: {overrides: [trainer.max_epochs=15]}}")
    assert bench.run() == 1
    assert bench.collected() == set()
    assert "not finished" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_study_goes_on_with_the_same_command(
    number: int, code: int, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    # the children of `then` send the signal when they are first started
    bench.write(f"seeds: [0]\nruns: {{first: {{}}, then: {{overrides: [trainer.max_epochs={100 + number}], "
                f"seeds: [1, 2], after: [first]}}, last: {{seeds: [3], after: [then]}}}}")  # fmt: skip

    def unhandled(*_: object) -> None:
        raise AssertionError("the runner does not handle the signal")

    before = signal.signal(number, unhandled)
    try:
        assert bench.run("--jobs", "3") == code
        assert signal.getsignal(number) is unhandled  # given back
    finally:
        signal.signal(number, before)
    assert "the same command goes on" in capsys.readouterr().err
    assert all(process.poll() is not None for process in bench.processes)
    assert bench.collected() == {"first-seed0"}

    while bench.run("--jobs", "3") == code:  # where the signal came before the second child had noted its own
        pass
    assert "first-seed0" not in bench.started
    assert bench.collected() == {"first-seed0", "then-seed1", "then-seed2", "last-seed3"}


def test_all_faults_are_found_at_once_before_anything_starts(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.folder = bench.folder.with_name("plain")
    bench.write("""
seed: [0]
seeds: [0, one]
common: [experiment=digits, boosting.rouns=2]
runs:
  one/two: {override: [boosting=paper]}
  early: {after: [late, early, erly], keep: [techer]}
  late: {overrides: [seed=3, boosting.rounds=0], seeds: []}
  words: {overrides: boosting=paper}
  nothing:
  group: {overrides: [boosting=papr]}
""")
    assert bench.run() == 1
    assert bench.started == []
    said = capsys.readouterr().err
    for fault in (
        "seed: no such option. Did you mean 'seeds'?",
        "seeds=[0, 'one']",
        "runs.one/two.name='one/two'",
        "override: no such option. Did you mean 'overrides'?",
        "runs.early.after='late': only runs above 'early'",
        "runs.early.after='early': only runs above 'early'",
        "runs.early.after='erly': no such run.",
        "runs.early.keep='techer': must be one of teacher, students, metrics, figures. Did you mean 'teacher'?",
        "runs.late.seeds=[]",
        "runs.words.overrides='boosting=paper': must be a list",
        "runs.nothing.value=None",
        "Did you mean 'boosting.rounds'?",
        "one/two, early, late, words, nothing",  # of the common override once, for all
    ):
        assert fault in said
    assert said.count("'boosting.rouns'") <= 3

    bench.write("""
seeds: [0]
common: [experiment=digits]
runs:
  late: {overrides: [seed=3, boosting.rounds=0]}
  group: {overrides: [boosting=papr]}
  own: {overrides: [teacher.checkpoint=here.pt], keep: [teacher]}
  lost: {overrides: [teacher.checkpoint=FOLDER/kept/late-seed0/teacher.safetensors], after: [late]}
""")
    assert bench.run() == 1
    assert bench.started == []
    said = capsys.readouterr().err
    for fault in ("late: seed=3", "late: boosting.rounds=0", "group: ", "papr", "own: keep='teacher'", "here.pt"):
        assert fault in said
    assert "lost: teacher.checkpoint=" in said  # `late` does not keep its teacher
    assert "search path" not in said


def test_two_runs_of_one_configuration_are_a_fault(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    same, other = "{overrides: [trainer.progress=true]}", "{overrides: [boosting=paper]}"
    bench.write(f"seeds: [0, 1]\nruns: {{one: {{}}, same: {same}, other: {other}}}")
    assert bench.run() == 1
    assert bench.started == []
    said = capsys.readouterr().err
    assert said.count("the same configuration as one") == 1
    assert "other" not in said


@pytest.mark.parametrize("text", ["", "[1, 2]", "seeds: [0", "seeds: [0]", "seeds: [0]\nruns: {}", None])
def test_a_study_that_is_none_says_so(text: str | None, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        bench.write(text)
        with pytest.raises(ConfigError):
            load_study(bench.folder)
    assert bench.run() == 1
    assert "study.yaml" in capsys.readouterr().err


def test_kept_files_are_those_asked_for_and_replaced_as_a_whole(bench: Bench) -> None:
    bench.write(
        "seeds: [0]\nruns: {all: {keep: [teacher, students, metrics, figures]}, some: {seeds: [1], keep: [metrics]}}"
    )
    assert bench.run() == 0
    kept = bench.folder / "kept"
    assert {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()} == {
        "all-seed0/teacher.safetensors", "all-seed0/teacher.json", "all-seed0/students/ensemble.json",
        "all-seed0/students/00.json", "all-seed0/students/00.safetensors", "all-seed0/metrics.jsonl",
        "all-seed0/figures/cost.png", "some-seed1/metrics.jsonl",
    }  # fmt: skip
    (kept / "some-seed1" / "old").touch()
    assert bench.run("--again", "--only", "some-*") == 0
    assert [path.name for path in (kept / "some-seed1").iterdir()] == ["metrics.jsonl"]


def test_nothing_large_is_kept(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write("seeds: [0]\nruns: {one: {overrides: [trainer.max_epochs=14], keep: [metrics, students]}}")
    assert bench.run() == 1
    assert "students/00.safetensors: 2,000,000 bytes" in capsys.readouterr().err
    assert bench.collected() == set()
    assert not (bench.folder / "kept").exists()
    bench.write("seeds: [0]\nruns: {one: {overrides: [trainer.max_epochs=14], keep: [metrics]}}")
    assert bench.run() == 0
    bench.write("seeds: [0]\nruns: {one: {overrides: [trainer.max_epochs=14], keep: [students]}}")
    assert bench.run("--again") == 1
    assert bench.collected() == {"one-seed0"}  # what was there before stays
    assert (bench.folder / "kept" / "one-seed0" / "metrics.jsonl").exists()


def test_the_list_tells_done_from_unfinished_and_missing_and_starts_nothing(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(TWO)
    assert bench.run("--only", "one-seed0") == 0
    bench.write(TWO.replace("runs: {", "runs: {half: {seeds: [0], overrides: [trainer.max_epochs=15]}, "))
    assert bench.run("--only", "half-seed0") == 1
    capsys.readouterr()
    assert bench.run("--list") == 0
    assert bench.started == []
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "-seed" in line}
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert all(word in lines["one-seed0"] for word in ("done", "60.0 s", "50.0%", today[:7]))
    assert "missing" in lines["one-seed1"]
    assert "unfinished" in lines["half-seed0"]


REAL = """
seeds: [0]
common: [experiment=digits, data.limit=200, trainer.max_epochs=1]
runs:
  first: {overrides: [boosting.rounds=2], keep: [teacher, students, metrics, figures]}
  second:
    overrides: [boosting.rounds=1, "teacher.checkpoint=FOLDER/kept/first-seed{seed}/teacher.safetensors"]
    after: [first]
"""


def test_a_teacher_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real runs, in this process."""

    class Here:
        def __init__(self, command: list[str], **_: Any) -> None:
            run(load_config(*command[3:]))

        def poll(self) -> int:
            return 0

    bench = Bench(tmp_path / "study", tmp_path / "runs")
    bench.write(REAL.replace(", figures]", "]"))
    monkeypatch.setattr(study, "subprocess", processes(Here))
    assert bench.run() == 0
    first, second = bench.results("first-seed0"), bench.results("second-seed0")
    assert (len(first["rounds"]), len(second["rounds"])) == (2, 1)
    assert first["teacher"]["nll"] == second["teacher"]["nll"]
    assert second["wall_seconds"]["teacher"] == 0  # not trained again
    assert len(ProgressiveEnsemble.load(bench.folder / "kept" / "first-seed0")) == 2


def test_the_directory_of_a_real_run_is_found(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "study", tmp_path / "runs")
    bench.write(REAL.replace("rounds=2", "rounds=1"))
    assert bench.run("--only", "first-*") == 0
    assert bench.results("first-seed0")["sizes"]["train"] > 0
    assert (bench.folder / "kept" / "first-seed0" / "figures" / "cost.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_real_command_killed_in_the_middle_goes_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "study", tmp_path / "runs")
    bench.write(REAL.replace("max_epochs=1", "max_epochs=40"))
    command = [sys.executable, "-m", "experiments.study", str(bench.folder), "--runs", str(bench.runs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def until(process: subprocess.Popen[str], seen: Callable[[str], bool]) -> None:
        assert process.stdout is not None
        while not seen(line := process.stdout.readline()):
            assert line, "ended too early"

    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(process, lambda line: "first-seed0: round 1/2" in line)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command goes on" in said
    assert not bench.collected()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resumed after 1 of 2 rounds" in again.stdout
    assert bench.collected() == {"first-seed0", "second-seed0"}


def test_a_study_in_another_encoding_than_the_terminals(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    bench.folder = bench.folder.with_name("größe")
    bench.write("seeds: [0]\ncommon: [experiment=digits]\nruns: {one: {}}")
    assert bench.run() == 0
    sys.stdout.flush()
    assert b"gr??e" in file.getvalue()
