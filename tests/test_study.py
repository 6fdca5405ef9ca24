"""A study is run once, wherever and however often it is started: order, collection, refusal, failure, interruption."""

import copy
import functools
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from experiments import plan, study
from experiments.plan import load_study
from experiments.study import collected
from pkd_lightning.cli import load_config
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.sweeps.records import find_sweeps
from tests.support import TINY, stopped_by


def fake(config: DictConfig, unlucky: int = 13) -> None:
    """Stands for a run: leaves what it leaves, in an instant; `max_epochs` says what else it does."""
    directory, epochs, seed = RunDirectory(config).path, config.trainer.max_epochs, config.seed
    if epochs == unlucky:
        raise RunError("no\nluck")
    if epochs >= 100 and not directory.exists():  # the signal comes in the middle of it
        directory.mkdir(parents=True)
        os.kill(os.getpid(), epochs - 100)
    accuracy = {"accuracy": 0.5 + seed / 10}
    results = {"teacher": accuracy, "ensemble": accuracy, "wall_seconds": {"total": 60.0}, "rounds": []}
    for name, text in {
        "results.json": json.dumps(results), "teacher/teacher.safetensors": f"teacher {seed}",
        "teacher/teacher.json": "{}", "teacher/logits.safetensors": "x" * 2_000_000, "students/ensemble.json": "{}",
        "students/00.json": "{}", "students/00.safetensors": "x" * (2_000_001 if epochs == 14 else 10),
        "metrics.jsonl": "{}", "figures/cost.png": "",
    }.items():  # fmt: skip
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    if epochs != 15:
        (directory / "DONE").touch()


@dataclass
class Bench:
    """A study in a temporary folder; `started` are the names of the jobs in order, with what was collected then."""

    folder: Path
    runs: Path
    started: list[str] = field(default_factory=list)
    arguments: dict[str, list[str]] = field(default_factory=dict)
    there: dict[str, set[str]] = field(default_factory=dict)

    def write(self, text: str) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "study.yaml").write_text(text.replace("FOLDER", str(self.folder)))

    def run(self, *options: str) -> int:
        """The command, in this process where no option says otherwise, with a fresh list of what it starts."""
        self.started.clear()
        aside = any(option.startswith(("--jobs", "hydra/launcher")) for option in options)
        return study.main([str(self.folder), "--runs", str(self.runs), *options, *([] if aside else ["--jobs", "1"])])

    def collected(self) -> set[str]:
        return {path.stem for path in (self.folder / "results").glob("*.json")}

    def results(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "results" / f"{name}.json").read_text())
        return found

    def records(self) -> dict[str, str]:
        """The state of each job's record, by what its overrides set `name` to."""
        (sweep,) = find_sweeps(self.runs / self.folder.name)
        return {job.overrides[-1].removeprefix("name="): job.state for job in sweep.jobs()[0]}


composed = functools.cache(load_config)  # the same is composed many times


def compose(*overrides: str) -> DictConfig:
    return copy.deepcopy(composed(*overrides))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Jobs are fakes, in the run directories of real ones."""
    made = Bench(tmp_path / "some study", tmp_path / "it's here")
    real = study.run_and_collect

    def start(job: plan.Job, config: DictConfig) -> None:
        made.started.append(job.name)
        made.arguments[job.name], made.there[job.name] = job.arguments(made.runs), made.collected()
        real(job, config)

    monkeypatch.setattr(study, "run_and_collect", start)
    monkeypatch.setattr(study, "_job", fake)
    monkeypatch.setattr(plan, "load_config", compose)
    return made


TWO = "seeds: [0, 1]\ncommon: [experiment=digits]\nruns: {one: {overrides: [boosting.rounds=2]}, other: {seeds: [3]}}"


def test_what_is_collected_is_not_run_again_on_any_machine(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(TWO)
    assert bench.run() == 0
    assert sorted(bench.started) == ["one-seed0", "one-seed1", "other-seed3"]
    assert bench.collected() == set(bench.started)
    said = capsys.readouterr().out
    assert "job 2 of 3 (seed=1 rounds=2) started" in said
    assert "job 2 of 3 (seed=1 rounds=2) finished: " in said
    assert re.search(r"one-seed1 +done .* 60\.0% +60\.0%", said)
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
    assert bench.run() == 0
    assert bench.started[:3] == ["first-seed0", "first-seed1", "third-seed0"]  # the third waits for nothing
    assert len(bench.started) == 5
    for name in ("second-seed0", "second-seed1"):
        assert {"first-seed0", "first-seed1"} <= bench.there[name]
    # a teacher of other content makes another run directory
    paths = {RunDirectory(load_config(*bench.arguments[f"second-seed{s}"], "seed=0")).path for s in (0, 1)}
    assert len(paths) == 2
    assert bench.run("--again", "--only", "second-seed1") == 0  # what it needs stays collected
    assert bench.started == ["second-seed1"]


def test_a_run_is_told_where_another_one_of_its_seed_is(bench: Bench) -> None:
    text = """seeds: [0, 1]
common: [experiment=digits, boosting.objective=independent]
runs:
  one: {overrides: [boosting.combine=mean]}
  other:
    overrides: ["boosting.grow_from={run:one}", boosting.grow_scales=solved]
    after: [one]
"""
    bench.write(text)
    assert bench.run() == 0
    planned = load_study(bench.folder)
    jobs = {job.name: job for job in planned.jobs}
    for seed in (0, 1):
        assert planned.before(jobs[f"other-seed{seed}"]) == [jobs[f"one-seed{seed}"]]  # it waits for that one alone
        place = jobs[f"one-seed{seed}"].directory(bench.runs).path
        assert place.is_dir()
        given = compose(*bench.arguments[f"other-seed{seed}"])
        assert Path(given.boosting.grow_from) == place
        assert bench.results(f"other-seed{seed}")["study"]["overrides"][2] == "boosting.grow_from={run:one}"
    bench.write(text.replace("combine=mean", "combine=sum"))
    assert bench.run("--again", "--only", "one-seed0") == 0
    planned = load_study(bench.folder)
    jobs = {job.name: job for job in planned.jobs}
    assert collected(jobs["one-seed0"]) is not None
    with pytest.raises(
        RunError, match=r"other-seed0.* goes on from one .*: boosting\.combine=mean only in the results"
    ):
        collected(jobs["other-seed0"])


def test_a_member_of_a_teacher_may_be_one_that_an_earlier_run_will_keep(bench: Bench) -> None:
    bench.write(f"""seeds: [0]
common: [experiment=digits]
runs:
  one: {{keep: [teacher]}}
  pair:
    overrides:
    - teacher=mamba_pair
    - "+teacher.members.small.checkpoint={bench.folder}/kept/one-seed0/teacher.safetensors"
    after: [one]
""")
    assert bench.run("--list") == 0
    assert bench.run() == 0
    assert bench.started == ["one-seed0", "pair-seed0"]


def test_another_run_that_is_not_waited_for_is_a_fault(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.write(
        "seeds: [0]\ncommon: [experiment=digits]\nruns: {one: {}, other: {overrides: ['boosting.grow_from={run:one}']}}"
    )
    assert bench.run() == 1
    assert "runs.other.overrides: {run:one} must be in after" in capsys.readouterr().err
    bench.write(
        "seeds: [0]\ncommon: [experiment=digits]\nruns: {one: {seeds: [1]}, "
        "other: {overrides: ['boosting.grow_from={run:one}'], after: [one]}}"
    )
    assert bench.run() == 1
    assert "{run:one}: that run has no seed 0" in capsys.readouterr().err


def installed(plugin: str) -> pytest.MarkDecorator:
    absent = find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None
    return pytest.mark.skipif(absent, reason=f"{plugin} is not installed: pip install 'pkd-lightning[launchers]'")


JOBLIB, SUBMITIT = installed("hydra_joblib_launcher"), installed("hydra_submitit_launcher")


def meet(job: plan.Job, config: DictConfig) -> None:
    """A job that ends when two have begun, or the process of one has been killed."""
    begun = Path(config.run_root) / "begun"
    begun.mkdir(parents=True, exist_ok=True)
    (begun / f"{os.getpid()}").touch()
    until = time.monotonic() + 60
    while len(list(begun.iterdir())) < 2:
        assert time.monotonic() < until, "alone"
        time.sleep(0.05)
    fake(config)
    study.collect(job, RunDirectory(config))


@JOBLIB
def test_jobs_run_side_by_side_and_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path / "study", tmp_path / "runs")
    monkeypatch.setattr(study, "run_and_collect", meet)
    bench.write("seeds: [0]\ncommon: [experiment=digits]\nruns: {a: {overrides: [name=a]}, b: {overrides: [name=b]}}")
    assert bench.run("--jobs", "2") == 0
    assert bench.collected() == {"a-seed0", "b-seed0"}
    assert bench.records() == {"a": "finished", "b": "finished"}
    assert f"{os.getpid()}" not in os.listdir(bench.runs / "study" / "begun")


def test_a_job_that_another_process_runs_is_left_to_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write("seeds: [0]\ncommon: [experiment=digits]\nruns: {a: {overrides: [name=a]}}")
    assert bench.run() == 0
    (sweep,) = find_sweeps(bench.runs / bench.folder.name)
    (job,) = sweep.jobs()[0]
    sweep.write(replace(job, state="running", pid=os.getppid()))

    def refuse(config: DictConfig) -> None:
        raise RunError("another process is running this experiment")

    monkeypatch.setattr(study, "_job", refuse)
    assert bench.run("--again") == 1
    assert "a-seed0: failed: another process runs it" in capsys.readouterr().err
    assert bench.records() == {"a": "running"}


def test_without_joblibs_launcher_one_job_runs_at_a_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ConfigStore.instance(), "list", lambda path: ["basic.yaml"])
    bench.write(TWO)
    assert bench.run("--jobs", "2") == 0
    assert len(bench.started) == 3
    assert "one job at a time: joblib's launcher is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "fault"),
    [
        (["hydra/launcher=joblip"], 1, "hydra/launcher/joblip"),
        (["hydra.launcher.size=2"], 1, "hydra.launcher.size"),
        (["seed=3"], 2, "seed=3: only options of the launcher"),
        (["--jobs", "2", "hydra/launcher=basic"], 2, "--jobs 2: hydra/launcher=basic has its own options"),
    ],
)
def test_what_is_no_option_of_a_launcher_is_refused(
    options: list[str], code: int, fault: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write(TWO)
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            bench.run(*options)
    else:
        assert bench.run(*options) == code
    assert bench.started == []
    assert fault in capsys.readouterr().err
    assert not bench.runs.exists()


def test_where_a_launcher_fails_the_same_command_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As joblib does where the system kills the process of a job."""
    bench.write("seeds: [0]\ncommon: [experiment=digits]\nruns: {a: {overrides: [name=a]}, b: {overrides: [name=b]}}")
    instantiate = Plugins.instantiate_launcher

    def breaking(*arguments: Any) -> Launcher:
        launcher = instantiate(*arguments)
        launch = launcher.launch

        def first_only(jobs: Sequence[Sequence[str]], number: int) -> None:
            launch(jobs[:1], number)
            raise OSError("killed")

        launcher.launch = first_only
        return launcher

    with monkeypatch.context() as patched:
        patched.setattr(Plugins, "instantiate_launcher", breaking)
        assert bench.run() == 1
    assert "b-seed0: failed: the launcher failed: OSError: killed" in capsys.readouterr().err
    assert bench.collected() == {"a-seed0"}
    assert bench.records() == {"a": "finished", "b": "waiting"}
    assert bench.run() == 0
    assert bench.started == ["b-seed0"]


def test_a_failure_stops_only_what_needs_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.folder = bench.folder.with_name("plain")
    bench.write(AFTER.replace("FIRST", "'trainer.max_epochs=1{seed}', boosting.rounds=1").replace("[0, 1]", "[0, 3]"))
    assert bench.run() == 1
    assert bench.started == ["first-seed0", "first-seed3", "third-seed0"]
    assert bench.collected() == {"first-seed0", "third-seed0"}
    said = capsys.readouterr()
    assert "first-seed3: failed: no luck\n" in said.err
    assert ") failed: no luck\n" in said.out
    for seed in (0, 3):
        assert f"second-seed{seed}: not started, it waits for first-seed3" in said.err

    monkeypatch.setattr(study, "_job", functools.partial(fake, unlucky=0))  # what failed is repaired
    assert bench.run() == 0
    assert sorted(bench.started) == ["first-seed3", "second-seed0", "second-seed3"]


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
    # the jobs of `then` send the signal when they are first started
    bench.write(f"seeds: [0]\nruns: {{first: {{}}, then: {{overrides: [trainer.max_epochs={100 + number}], "
                f"seeds: [1, 2], after: [first]}}, last: {{seeds: [3], after: [then]}}}}")  # fmt: skip

    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert bench.run() == code
        assert signal.getsignal(number) is signal.SIG_DFL  # given back
        assert "the same command goes on" in capsys.readouterr().err
        assert bench.collected() == {"first-seed0"}
        assert bench.run() == code  # of the second seed
        assert bench.started == ["then-seed1", "then-seed2"]
    finally:
        signal.signal(number, before)
    assert bench.run() == 0
    assert bench.started == ["then-seed2", "last-seed3"]
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
    assert "students/00.safetensors: 2,000,001 bytes" in capsys.readouterr().err
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


REAL = f"""
seeds: [0]
common: {json.dumps(TINY)}
runs:
  first: {{overrides: [boosting.rounds=2], keep: [teacher, students, metrics, figures]}}
  second:
    overrides: [boosting.rounds=1, "teacher.checkpoint=FOLDER/kept/first-seed{{seed}}/teacher.safetensors"]
    after: [first]
"""


@pytest.mark.report
def test_real_runs_hand_a_teacher_on_and_are_found(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "study", tmp_path / "runs")
    bench.write(REAL)
    assert bench.run() == 0
    first, second = bench.results("first-seed0"), bench.results("second-seed0")
    assert (len(first["rounds"]), len(second["rounds"])) == (2, 1)
    assert first["teacher"]["nll"] == second["teacher"]["nll"]
    assert second["wall_seconds"]["teacher"] == 0  # not trained again
    kept = bench.folder / "kept" / "first-seed0"
    assert len(ProgressiveEnsemble.load(kept)) == 2
    assert (kept / "figures" / "cost.png").stat().st_size > 1000
    for job in load_study(bench.folder).jobs:
        assert job.directory(bench.runs).finished
    assert bench.run("--again") == 0  # finds them
    assert bench.results("first-seed0") == first


@SUBMITIT
@pytest.mark.slow
def test_a_study_goes_through_submitit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path / "study", tmp_path / "runs")
    bench.write(REAL.replace(", figures]", "]"))
    assert bench.run("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5") == 0
    assert bench.collected() == {"first-seed0", "second-seed0"}
    assert len(re.findall(r"^job [12] of 2 \(.*\) finished: ", capsys.readouterr().out, re.MULTILINE)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--jobs=1", pytest.param("--jobs=2", marks=JOBLIB)])
def test_the_real_command_stopped_in_the_middle_saves_and_goes_on(option: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "study", tmp_path / "runs")
    seeds = int(option[-1])
    bench.write(REAL.replace("max_epochs=1", "max_epochs=200").replace("[0]", str([*range(seeds)]))
                .replace(", figures]", "]"))  # fmt: skip
    command = [str(bench.folder), "--runs", str(bench.runs), option]

    def far_enough(_: list[str]) -> bool:
        return len([path for path in bench.runs.rglob("metrics.jsonl") if path.stat().st_size]) == seeds

    code, _, said = stopped_by(signal.SIGTERM, tmp_path, command, far_enough, module="experiments.study")
    assert code == 143
    assert "the same command goes on" in said
    assert not bench.collected()
    assert len(list(bench.runs.rglob("fits/*.ckpt"))) == seeds  # by the signal: it took less than half a minute
    assert bench.run(option) == 0
    logs = [path.read_text() for path in bench.runs.rglob("run.log")]
    assert sum("goes on in epoch" in log for log in logs) == seeds
    assert len(bench.collected()) == 2 * seeds


def test_a_study_in_another_encoding_than_the_terminals(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    bench.folder = bench.folder.with_name("größe")
    bench.write("seeds: [0]\ncommon: [experiment=digits]\nruns: {one: {}}")
    assert bench.run() == 0
    sys.stdout.flush()
    assert b"gr??e" in file.getvalue()
