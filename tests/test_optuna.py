"""`hydra/sweeper=optuna`: Hydra's grammar is searched, a sweep goes on whatever stops it, and bad trials end early."""

import errno
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pkd_lightning import assembling
from pkd_lightning import run as run_module
from pkd_lightning.cli import CONF
from pkd_lightning.errors import ConfigError, Pruned
from pkd_lightning.loggers import NoTracker
from pkd_lightning.naming import Naming
from pkd_lightning.sweeps import callback, page, pruning, records
from pkd_lightning.sweeps import options as options_module
from pkd_lightning.sweeps.callback import JobRecords
from pkd_lightning.sweeps.listing import list_runs
from pkd_lightning.sweeps.options import GOALS, Options
from pkd_lightning.sweeps.records import Job, Sweep, find_sweeps, plan, sweep_name, this_job, words
from pkd_lightning.sweeps.search import PLACE, PROCESS, Trials, run_trials
from pkd_lightning.sweeps.space import Space
from pkd_lightning.sweeps.study import JOURNAL, NAME, PROCESSES, open_study, present, sampler_of
from pkd_lightning.sweeps.summary import summarise
from tests.support import TINY, stopped_by, tiny_config, tiny_run
from tests.test_launchers import sides
from tests.test_report import make_run
from tests.test_run import pkd
from tests.test_sweeps import job_config, results_of

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "guide.md").read_text()
SPACE = ("experiment=digits", "lr=tag(log, interval(1e-4,1e-1))", "size=choice(8,16,32)")
Outcome = Callable[[dict[str, str]], Any]


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep's page takes longer to draw than a tiny sweep."""
    monkeypatch.setattr(page, "sweep_page", lambda summary: "")


# ---------------------------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    ("override", "distribution"),
    [
        ("x=interval(1e-4,1e-2)", FloatDistribution(1e-4, 1e-2)),
        ("x=interval(1,8)", FloatDistribution(1, 8)),
        ("x=tag(log, interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("x=int(interval(1,8))", IntDistribution(1, 8)),
        ("x=int(tag(log, interval(1,1000)))", IntDistribution(1, 1000, log=True)),
        ("x=tag(log, int(interval(1,1000)))", IntDistribution(1, 1000, log=True)),
        ("x=range(1,8)", IntDistribution(1, 7)),
        ("x=range(1,8,3)", IntDistribution(1, 7, step=3)),
        ("x=range(8,1,-2)", IntDistribution(2, 8, step=2)),
        ("x=shuffle(range(3))", IntDistribution(0, 2)),
        ("x=tag(log, range(1,9))", IntDistribution(1, 8, log=True)),
        ("x=range(0,1,step=0.1)", FloatDistribution(0, 0.9, step=0.1)),
        ("x=float(range(2,4))", FloatDistribution(2, 3, step=1)),
        ("x=choice(a,b,c)", CategoricalDistribution(["a", "b", "c"])),
        ("x=a,b,c", CategoricalDistribution(["a", "b", "c"])),
        ("x=a,b,a", CategoricalDistribution(["a", "b"])),
        ("x=1,2.5,null,true", CategoricalDistribution(["1", "2.5", "null", "True"])),
        ("+student.rungs=[{a: 1}],[]", CategoricalDistribution(["[{a:1}]", "[]"])),
        ("x=choice(a,'b,c')", CategoricalDistribution(["a", "b\\,c"])),
    ],
)
def test_each_form_of_the_grammar_is_searched(override: str, distribution: Any) -> None:
    space = Space.of(["seed=1", override])
    ((key, axis),) = space.axes.items()
    assert axis.distribution == distribution
    assert key == override.partition("=")[0]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [space.overrides(study.ask(space.distributions).params) for _ in range(60)]
    assert {own[0] for own in drawn} == {"seed=1"}
    if "interval" not in override:  # all of the values that Hydra's own sweeper has, and written as it writes them
        assert {own[1] for own in drawn} == {own[1] for own in plan(["seed=1", override], {})}
        assert space.size == len({own[1] for own in drawn})
    again = Space.of(drawn[0] + (override,)).overrides(study.trials[0].params)  # the last of a key counts
    assert again == drawn[0]


def test_overrides_keep_their_order_and_the_command_goes_before_the_configuration() -> None:
    space = Space.of(["b=choice(1,2)", "+c=3", "a=choice(x,y)", "b=5", "~data.root"])
    assert space.overrides({"a": "y"}) == ("b=5", "+c=3", "a=y", "~data.root=null")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["x=tag(log, interval(0,1))"], "x=tag(log, interval(0,1)): a logarithmic interval starts above 0, not at 0"),
        (["x=tag(log, interval(-1,1))"], "starts above 0, not at -1"),
        (["x=int(tag(log, interval(0.5,1)))"], "starts above 0, not at 0"),
        (["x=interval(2,1)"], "ends at 1, below its start 2"),
        (["x=interval(0,inf)"], "must have finite ends"),
        (["x=choice()"], "empty choice"),
        (["x=range(3,3)"], "x=range(3,3): has no value"),
        (["x=glob(*)"], "glob cannot be searched; name the choices"),
        (["x=tag(log, choice(1,2))"], "a choice has no logarithm"),
        (["x=tag(log, range(1,9,2))"], "steps of 1, not 2"),
        (["x=tag(log, range(1,2,0.1))"], "has no logarithm"),
        (["x=tag(ordered, choice(1,2))"], "unknown tag ordered; there is log"),
        (["x=1"], "nothing to search"),
        ([], "nothing to search"),
    ],
)
def test_a_bad_space_is_one_error(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Space.of(overrides)
    assert len(error.value.faults) == 1
    assert said in error.value.faults[0]


def test_all_bad_overrides_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Space.of(["x=interval(2,1)", "y=glob(*)", "z=1,2"])
    assert [fault.partition("=")[0] for fault in error.value.faults] == ["x", "y"]


def test_few_examples_have_every_choice_and_both_ends() -> None:
    space = Space.of(["a=x,y,z", "b=interval(0,1)", "c=int(interval(2,9))", "d=range(3)"])
    assert list(space.examples()) == [
        ("a=x", "b=0.0", "c=2", "d=0"), ("a=y", "b=1.0", "c=9", "d=2"), ("a=z", "b=0.0", "c=2", "d=0"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- options


def options_of(**changes: Any) -> Options:
    """Options with `changes`, without pruning."""
    return Options(**{"pruner": "none", "sampler": "random", **changes})


def test_the_options_of_the_file_are_the_defaults() -> None:
    given = OmegaConf.load(Path(CONF) / "hydra" / "sweeper" / "optuna.yaml")
    assert Options.of(given) == Options()  # type: ignore[arg-type]


def test_all_bad_options_are_named_at_once() -> None:
    given = {
        "n_trials": 0,
        "n_jobs": 1.5,
        "goals": ["accuracy", "test_accuracy"],
        "sampler": "gp",
        "pruner": 3,
        "seed": -1,
    }
    with pytest.raises(ConfigError) as error:
        Options.of(OmegaConf.create(given))
    said = [fault.partition("=")[0].removeprefix("hydra.sweeper.") for fault in error.value.faults]
    assert sorted(said) == sorted(["n_trials", "n_jobs", "goals", "goals", "sampler", "pruner", "seed"])
    assert not any("test" in name for name in GOALS)
    for goals in ([], ["macs", "macs"], None, [{"a": 1}]):
        with pytest.raises(ConfigError, match=r"hydra\.sweeper\.goals"):
            Options.of(OmegaConf.create({"goals": goals}))
    assert Options.of(OmegaConf.create({"goals": "macs", "pruner": None})) == Options(goals=["macs"], pruner="none")


def test_goals_are_read_from_the_results_and_none_of_the_test_part() -> None:
    results = results_of(0.75, 0.5, macs=900)
    results["rounds"][-1]["validation_loss"] = 1.25
    values = {name: goal.of(results) for name, goal in GOALS.items()}
    assert values == {
        "validation_accuracy": 0.75, "validation_loss": 1.25, "macs": 900, "params": results["ensemble"]["params"],
    }  # fmt: skip
    assert {name: goal.direction for name, goal in GOALS.items()} == {
        "validation_accuracy": "maximize", "validation_loss": "minimize", "macs": "minimize", "params": "minimize",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler": {"_target_": "optuna.samplers.Nothing"}}, "sampler"),
        ({"sampler": {"_target_": "optuna.samplers.TPESampler", "n_startup": 3}}, "n_startup"),
        ({"sampler": {"_target_": "optuna.pruners.MedianPruner"}}, "gives a MedianPruner, no BaseSampler"),
    ],
)
def test_a_sampler_that_cannot_be_made_is_one_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sampler_of(Options(**changes), 0)


def test_without_optuna_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(options_module.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"it is not installed: pip install 'pkd-lightning\[optuna\]'"):
        options_module.require_optuna()
    monkeypatch.setattr(options_module.metadata, "version", lambda name: "2.10.1")
    with pytest.raises(ConfigError, match=r"2\.10\.1 is installed"):
        options_module.require_optuna()


def test_the_sweeper_is_found_in_a_clone_and_in_a_wheel() -> None:
    """Hydra takes sweepers from the namespace package `hydra_plugins` only."""
    names = [f"{found.__module__}.{found.__name__}" for found in Plugins.instance().discover(Sweeper)]
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("config", ["hydra/sweeper=optuna"], return_hydra_config=True)
    assert config.hydra.sweeper._target_ in names
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "hydra_plugins" in wheel["packages"]
    assert not (ROOT / "hydra_plugins" / "__init__.py").exists()  # or other plugins would not be found


def test_other_goals_and_another_space_in_the_configuration_are_another_sweep() -> None:
    words, name = OmegaConf.create(["seed=1"]), set()
    for sweeper in ({"goals": ["macs"]}, {"goals": ["params"]}, {"goals": ["macs"], "params": {"a.lr": "1,2"}}, {}):
        name.add(sweep_name(words, OmegaConf.create(sweeper)))
    assert len(name) == 4
    assert sum(one.startswith("lr-") for one in name) == 1
    assert sweep_name(words, OmegaConf.create({})) == sweep_name(words)  # Hydra's own sweeper keeps its directories


# ---------------------------------------------------------------------------------- the loop, on its real storage


class StubLauncher:
    """Runs jobs as a launcher does, as far as records go: `outcome` gives results, or raises what the job raises."""

    def __init__(self, sweep: Sweep, outcome: Outcome) -> None:
        self.sweep, self.outcome = sweep, outcome
        self.batches: list[list[str]] = []
        self.ran: list[tuple[str, ...]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        self.batches.append([" ".join(overrides) for overrides in job_overrides])
        for overrides in job_overrides:
            own = tuple(one for one in overrides if not one.startswith("++hydra."))
            run = self.sweep.path.parents[1] / "digits" / self.sweep.file(own).stem
            known = self.sweep.find(own)
            assert known is not None  # waiting, before it starts
            here = {"run": os.path.relpath(run, self.sweep.path), "host": os.uname().nodename, "pid": os.getpid()}
            job = Job(known.number, own, "running", started=known.started or 1e12, **here)  # type: ignore[arg-type]
            self.sweep.write(job)
            values = dict(one.split("=", 1) for one in own)
            if not (run / "DONE").exists():
                self.ran.append(own)
                try:
                    results = self.outcome(values)
                except Pruned:
                    self.sweep.write(Job(**{**vars(job), "state": "pruned"}))
                    continue
                except ArithmeticError as error:
                    self.sweep.write(Job(**{**vars(job), "state": "failed", "error": str(error)}))
                    continue
                make_run(run, results)
                (run / "DONE").touch()
            self.sweep.write(Job(**{**vars(job), "state": "finished"}))


def good(values: dict[str, str]) -> dict[str, Any]:
    """Results that are the better the larger the rate."""
    return results_of(min(0.99, 0.5 + 4 * float(values["lr"])), 0.1, macs=1000 * int(values["size"]))


def sweep_at(root: Path, total: int = 6) -> Sweep:
    sweep = Sweep(root / ".sweeps" / "some", ("experiment=digits",), total)
    sweep.save(["experiment=digits"])
    return sweep


def searched(root: Path, outcome: Outcome = good, space: Sequence[str] = SPACE, **changes: Any) -> StubLauncher:
    """Run the trials of a sweep in `root` until there are enough."""
    sweep = sweep_at(root)
    launcher = StubLauncher(sweep, outcome)
    run_trials(sweep, options_of(**{"n_trials": 6, **changes}), Space.of(space), launcher)  # type: ignore[arg-type]
    return launcher


def trials_of(root: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(root / ".sweeps" / "some" / JOURNAL)))
    return optuna.load_study(study_name=NAME, storage=storage).trials


def states(root: Path) -> list[str]:
    """Of every place's last trial."""
    last = {trial.user_attrs[PLACE]: trial.state.name for trial in trials_of(root) if PLACE in trial.user_attrs}
    assert sorted(last) == list(range(len(last)))
    return [last[place] for place in sorted(last)]


def test_the_number_of_trials_counts_over_all_invocations(tmp_path: Path) -> None:
    first = searched(tmp_path, n_trials=4)
    assert (len(first.ran), states(tmp_path)) == (4, ["COMPLETE"] * 4)
    assert searched(tmp_path, n_trials=4).batches == []
    more = searched(tmp_path, n_trials=6)
    assert len(more.ran) == 2
    assert not set(more.ran) & set(first.ran)
    jobs, _ = more.sweep.jobs()
    assert [(job.number, job.state) for job in jobs] == [(number, "finished") for number in range(6)]
    best = max(trials_of(tmp_path), key=lambda trial: trial.values[0])
    assert best.params["lr"] == max(trial.params["lr"] for trial in trials_of(tmp_path))


@pytest.mark.parametrize(
    "sampler",
    [
        "random",
        "tpe",
        "nsga2",
        {"_target_": "optuna.samplers.QMCSampler"},
        {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 3, "seed": 7},
    ],
)
def test_a_sweep_that_was_stopped_draws_what_one_that_was_not_does(sampler: Any, tmp_path: Path) -> None:
    whole = searched(tmp_path / "whole", sampler=sampler, n_trials=13)
    for trials in (2, 3, 13):
        searched(tmp_path / "parts", sampler=sampler, n_trials=trials)
    parts = [trial.params for trial in trials_of(tmp_path / "parts")]
    assert parts == [trial.params for trial in trials_of(tmp_path / "whole")]
    assert len({json.dumps(params) for params in parts}) == 13
    other = searched(tmp_path / "other", sampler=sampler, n_trials=2, seed=5)
    assert other.ran != whole.ran[:2]


def test_a_batch_goes_to_the_launcher_at_once(tmp_path: Path) -> None:
    launcher = searched(tmp_path, n_trials=7, n_jobs=3)
    assert [len(batch) for batch in launcher.batches] == [3, 3, 1]
    assert "hydra.sweeper.trial" not in launcher.batches[0][0]  # nothing is pruned
    launcher = searched(tmp_path / "pruned", n_trials=2, pruner="median")
    assert [batch[0].split("++")[1] for batch in launcher.batches] == [f"hydra.sweeper.trial={n}" for n in range(2)]


def test_a_failed_trial_stops_nothing_and_is_tried_again_by_the_same_command(tmp_path: Path) -> None:
    def fails(values: dict[str, str]) -> dict[str, Any]:
        if values["size"] == "8":
            raise ZeroDivisionError("no")
        return good(values)

    first = searched(tmp_path, fails)
    failed = [own for own in first.ran if "size=8" in own]
    assert 0 < len(failed) < 6
    assert sorted(states(tmp_path)) == ["COMPLETE"] * (6 - len(failed)) + ["FAIL"] * len(failed)
    assert [job.error for job in first.sweep.jobs()[0] if job.state == "failed"] == ["no"] * len(failed)
    again = searched(tmp_path)
    assert again.ran == failed
    assert states(tmp_path) == ["COMPLETE"] * 6
    assert [job.number for job in again.sweep.jobs()[0]] == list(range(6))


def test_a_trial_that_was_finished_before_is_found(tmp_path: Path) -> None:
    first = searched(tmp_path)
    (tmp_path / ".sweeps" / "some" / JOURNAL).unlink()
    again = searched(tmp_path)
    assert (len(first.ran), again.ran) == (6, [])
    assert states(tmp_path) == ["COMPLETE"] * 6


def test_a_pruned_trial_is_no_failure_and_not_tried_again(tmp_path: Path) -> None:
    def ends(values: dict[str, str]) -> dict[str, Any]:
        if values["size"] == "8":
            raise Pruned("after 1 of 3 rounds")
        return good(values)

    first = searched(tmp_path, ends)
    pruned = [own for own in first.ran if "size=8" in own]
    assert states(tmp_path).count("PRUNED") == len(pruned) > 0
    assert searched(tmp_path, ends).ran == []
    summary = summarise(first.sweep)
    assert summary.counts == f"{6 - len(pruned)} finished, {len(pruned)} pruned of 6 jobs"
    assert page.best_sentence(summary).endswith(f" {len(pruned)} jobs were pruned.")  # and none is unfinished


def test_no_trial_is_drawn_twice_and_a_small_space_comes_to_an_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TPE alone would draw the best again and again."""
    space = ("lr=range(0,0.15,0.1)", "size=choice(8,16,32)", "rounds=int(interval(1,2))")
    launcher = searched(tmp_path, space=space, sampler="tpe", n_trials=50)
    assert len(launcher.ran) == len(set(launcher.ran)) == 12
    assert set(launcher.ran) == set(map(tuple, plan(["lr=0.0,0.1", "size=8,16,32", "rounds=1,2"], {})))
    assert states(tmp_path) == ["COMPLETE"] * 12
    assert "there are 12 different trials" in capsys.readouterr().out


def test_a_sampler_that_repeats_itself_is_helped_by_chance(tmp_path: Path) -> None:
    fixed = {"_target_": "optuna.samplers.PartialFixedSampler", "fixed_params": {"lr": 0.05},
             "base_sampler": {"_target_": "optuna.samplers.RandomSampler", "seed": 1}}  # fmt: skip
    assert len(set(searched(tmp_path, sampler=fixed, n_trials=5).ran)) == 5  # there are three of this rate


def test_samplers_of_grids_come_to_their_end(tmp_path: Path) -> None:
    """They want to stop `Study.optimize`, which does not run here."""
    space = ("lr=0.1,0.2", "size=choice(8,16)")
    searched(tmp_path, space=space, sampler={"_target_": "optuna.samplers.BruteForceSampler"}, n_trials=4)
    assert states(tmp_path) == ["COMPLETE"] * 4


class Killed(BaseException):
    """In place of SIGKILL: nothing below handles it."""


def killed_at(root: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> bool:
    """Run trials, and stop without a word after so many writes to the journal; whether it came to that."""
    count, append = itertools.count(), JournalFileBackend.append_logs

    def counted(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        if next(count) == writes:
            raise Killed
        append(self, logs)

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", counted)
        patch.setattr("os.fsync", lambda descriptor: None)
        try:
            searched(root, n_trials=3, n_jobs=2)
        except Killed:
            return True
    return False


def test_a_kill_at_any_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed once at each write, and the process that goes on some writes later: there are as many trials as wanted."""
    whole = searched(tmp_path / "whole", n_trials=3, n_jobs=2).ran
    for writes in itertools.count():
        root = tmp_path / str(writes)
        came = killed_at(root, monkeypatch, writes)
        killed_at(root, monkeypatch, 5)
        jobs = searched(root, n_trials=3, n_jobs=2).sweep.jobs()[0]
        assert states(root) == ["COMPLETE"] * 3, writes
        assert not any(trial.state in (TrialState.RUNNING, TrialState.WAITING) for trial in trials_of(root))
        assert len([job for job in jobs if job.state == "finished"]) == 3
        done = [trial.user_attrs[PLACE] for trial in trials_of(root) if trial.state == TrialState.COMPLETE]
        assert sorted(done) == [0, 1, 2]  # none of them twice
        placed = [trial.params for trial in trials_of(root) if PROCESS in trial.user_attrs]
        assert len({json.dumps(params) for params in placed}) == 3  # what was drawn was kept
        if not came:
            break
    assert writes == 20  # all of them
    assert len(whole) == 3


def test_a_torn_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    searched(tmp_path, n_trials=2)
    journal = tmp_path / ".sweeps" / "some" / JOURNAL
    before = journal.read_bytes()
    journal.write_bytes(before + b'{"op_code":4,"worker')
    assert len(searched(tmp_path, n_trials=3).ran) == 1
    assert journal.read_bytes().startswith(before + b'{"op_code":4,"worker_id":')
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_one_process_searches_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    searched(tmp_path, n_trials=3)
    assert states(tmp_path) == ["COMPLETE"] * 3
    assert 0 < caplog.text.count("this file system has no locks") < 15  # not at each of 20 writes


def test_trials_of_a_process_that_runs_are_left_alone(tmp_path: Path) -> None:
    sweep, options, space = sweep_at(tmp_path), options_of(n_trials=3), Space.of(SPACE)
    with present(sweep.path) as process:
        (held,) = Trials(sweep, options, space, process).draw()
        assert len(searched(tmp_path, n_trials=3).ran) == 2
        assert [trial.state.name for trial in trials_of(tmp_path)] == ["RUNNING", "COMPLETE", "COMPLETE"]
    last = searched(tmp_path, n_trials=3)
    assert last.ran == [space.overrides(held.params)]
    assert states(tmp_path) == ["COMPLETE"] * 3
    assert list((sweep.path / PROCESSES).iterdir()) == []


def test_a_job_that_outlives_its_sweeper_is_left_alone_then_found(tmp_path: Path) -> None:
    """As on a cluster: its process runs on, and the study is told by the next command."""
    sweep, options, space = sweep_at(tmp_path), options_of(n_trials=2), Space.of(SPACE)
    with present(sweep.path) as process:
        (trial,) = Trials(sweep, options, space, process).draw()
    own = space.overrides(trial.params)
    other = Job(0, own, "running", host=os.uname().nodename, pid=os.getppid(), started=1.0)
    sweep.write(other)
    assert len(searched(tmp_path, n_trials=2).ran) == 1
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["RUNNING", "COMPLETE"]
    launcher = StubLauncher(sweep, good)
    sweep.write(Job(0, own))
    launcher.launch([own], 0)  # it ends
    assert searched(tmp_path, n_trials=2).ran == []
    assert states(tmp_path) == ["COMPLETE"] * 2


def test_a_job_whose_process_is_killed_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher's error ends the batch, not the sweep; one that starts no job ends the sweep."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    sweep = sweep_at(tmp_path)

    class Killing(StubLauncher):
        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
            if initial_job_idx != 1:
                return super().launch(job_overrides, initial_job_idx)
            known = self.sweep.find(job_overrides[0])
            assert known is not None
            self.sweep.write(Job(**{**vars(known), "state": "running", "pid": gone.pid, "host": os.uname().nodename,
                                    "started": 1e12}))  # fmt: skip
            raise OSError("a worker was killed")

    run_trials(sweep, options_of(n_trials=3), Space.of(SPACE), Killing(sweep, good))  # type: ignore[arg-type]
    assert states(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert [job.error for job in sweep.jobs()[0]] == [None, "its process ended before it did", None]
    said = capsys.readouterr().out
    assert "a worker was killed" in said

    def broken(job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        raise OSError("no cluster here")

    launcher = StubLauncher(sweep, good)
    launcher.launch = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no cluster"):
        run_trials(sweep, options_of(n_trials=5), Space.of(SPACE), launcher)  # type: ignore[arg-type]
    assert len(searched(tmp_path, n_trials=5).ran) == 3
    assert states(tmp_path) == ["COMPLETE"] * 5


def test_results_without_the_goal_are_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def unknown(values: dict[str, str]) -> dict[str, Any]:
        results = good(values)
        results["ensemble"]["macs_total"] = None
        return results

    searched(tmp_path, unknown, goals=["macs"], n_trials=2)
    assert states(tmp_path) == ["FAIL"] * 2
    assert "so it counts as failed" in capsys.readouterr().out


def test_another_study_in_the_same_directory_is_an_error(tmp_path: Path) -> None:
    searched(tmp_path, n_trials=1)
    with pytest.raises(ConfigError, match=r"goals: is \['macs'\], and was \['validation_accuracy'\]"):
        searched(tmp_path, n_trials=1, goals=["macs"])
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir"):
        searched(tmp_path, n_trials=1, space=("lr=0.1,0.2", "size=choice(8,16)"))


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_several_goals_have_a_front_and_no_pruning(
    sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(tmp_path, goals=["validation_accuracy", "macs"], pruner="median", n_trials=12, sampler=sampler)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no trial is pruned: Optuna prunes by one goal, and there are several"
    found = [tuple(trial.values) for trial in trials_of(tmp_path)]
    front = {one for one in found if not any(
        other != one and other[0] >= one[0] and other[1] <= one[1] for other in found)}  # fmt: skip
    assert said[1] == f"Pareto front of validation accuracy, macs: {len(front)} of 12 finished trials"
    listed = {(float(a) / 100, int(m.replace(",", ""))) for a, m in re.findall(r"accuracy ([\d.]+)%, macs ([\d,]+)",
                                                                            "\n".join(said[2:]))}  # fmt: skip
    assert listed == {(round(accuracy, 4), macs) for accuracy, macs in front}


def test_a_pruner_that_has_nothing_to_go_by_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searched(tmp_path, goals=["macs"], pruner="median", n_trials=2)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no trial is pruned: macs is not known before the end of a run"
    assert said[1] == "best by macs:"
    assert said[2].endswith("macs 8,000") or said[2].endswith("macs 16,000") or said[2].endswith("macs 32,000")


def test_processes_share_the_trials_and_run_none_twice(tmp_path: Path) -> None:
    def slow(values: dict[str, str]) -> dict[str, Any]:
        time.sleep(0.1)
        return good(values)

    def share() -> None:
        (tmp_path / str(os.getpid())).write_text(json.dumps(searched(tmp_path, slow, n_trials=20).ran))

    processes = [get_context("fork").Process(target=share) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    ran = [list(map(tuple, json.loads((tmp_path / str(process.pid)).read_text()))) for process in processes]
    assert len(ran[0]) + len(ran[1]) == 20
    assert min(map(len, ran)) > 0
    assert len({*ran[0], *ran[1]}) == 20
    assert states(tmp_path) == ["COMPLETE"] * 20
    assert len(trials_of(tmp_path)) == 20


def test_jobs_of_submitits_local_executor_share_the_cores_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the whole sweep, of which no more than a batch runs at a time."""
    shared = []
    monkeypatch.setattr(callback, "share_threads", lambda config, jobs: shared.append(jobs))
    sweep_at(tmp_path, total=20)
    config = job_config(tmp_path, "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=2")
    JobRecords().on_job_start(config, task_function=print)
    JobRecords().on_job_start(job_config(tmp_path), task_function=print)
    assert shared == [2, 20]


def test_a_job_has_its_trials_place_in_its_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra counts the jobs of a command, which may be few of the trials."""
    sweep, config = sweep_at(tmp_path, total=20), job_config(tmp_path, "seed=4", number=1)
    monkeypatch.setattr(records, "in_multirun", lambda: True)
    monkeypatch.setattr(records.HydraConfig, "get", lambda: config.hydra)
    assert str(this_job()).startswith("job 2 of 20 ")
    sweep.write(Job(7, tuple(config.hydra.overrides.task)))
    assert str(this_job()).startswith("job 8 of 20 ")


@pytest.mark.parametrize(
    ("value", "shown"),
    [("0.0019446627691580597", "0.001945"), ("1.234567890123e-05", "1.235e-05"), ("0.001", "0.001"),
     ("123456789012345", "123456789012345"), ("[0.1234567,0.99]", "[0.1234567,0.99]")],
)  # fmt: skip
def test_a_drawn_number_is_shown_with_four_digits(value: str, shown: str, tmp_path: Path) -> None:
    assert words({"trainer.lr": value}) == f"lr={shown}"
    sweep = sweep_at(tmp_path)
    sweep.write(Job(0, ("experiment=digits", f"lr={value}")))
    assert f"| 1 | {shown} | waiting |" in page.markdown(summarise(sweep))
    assert f",{value}," in page.jobs_csv(summarise(sweep)).replace('"', "")


# ---------------------------------------------------------------------------------- trials that end early


def observed(root: Path, number: int, monkeypatch: pytest.MonkeyPatch, **sweeper: Any) -> Any:
    """What observes the run of a trial, in its job's process."""
    given = OmegaConf.create(
        {"sweeper": {"trial": number, **sweeper}, "sweep": {"dir": str(root / ".sweeps" / "some")}}
    )
    monkeypatch.setattr(pruning, "in_multirun", lambda: True)
    monkeypatch.setattr(pruning.HydraConfig, "get", lambda: given)
    return pruning.this_trial()


def rounds_of(*values: float, planned: int = 3) -> dict[str, Any]:
    """What progress.json holds after rounds of such validation losses."""
    records = [{"round": index, "validation_loss": value} for index, value in enumerate(values)]
    stop = "reached boosting.rounds" if len(values) == planned else None
    return {"rounds": records, "planned_rounds": planned, "stop_reason": stop}


@pytest.mark.filterwarnings("error")  # Optuna's, of a round that is reported twice
def test_a_run_behind_the_median_of_as_many_rounds_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goals, options = ["validation_loss"], Options(goals=["validation_loss"], n_trials=9)
    folder = sweep_at(tmp_path).path
    study = open_study(folder, options, Space.of(SPACE).state())
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        trial = study.ask(Space.of(SPACE).distributions)
        for step in range(3):
            trial.report(value - 0.1 * step, step)
        study.tell(trial, value - 0.2)
    for _ in range(4):
        study.ask(Space.of(SPACE).distributions)

    better = observed(tmp_path, 5, monkeypatch, goals=goals)
    for values in ((), (2.9,), (2.9, 2.7), (2.9, 2.7, 9.0)):
        better(rounds_of(*values))
    worse = observed(tmp_path, 6, monkeypatch, goals=goals)
    worse(rounds_of(2.95))
    with pytest.raises(Pruned, match="pruned after 2 of 3 rounds"):
        worse(rounds_of(2.95, 2.95))
    resumed = observed(tmp_path, 7, monkeypatch, goals=goals)
    with pytest.raises(Pruned, match="after 2 of 3"):
        resumed(rounds_of(3.5, 3.4))
    done = observed(tmp_path, 8, monkeypatch, goals=goals)
    done(rounds_of(9.0, 9.0, 9.0))  # all is paid for: it is evaluated
    reported = [trial.intermediate_values for trial in trials_of(tmp_path)[5:]]
    assert reported[0] == {0: 2.9, 1: 2.7, 2: 9.0}
    assert reported[2] == {0: 3.5, 1: 3.4}
    assert reported[3] == {0: 9.0, 1: 9.0, 2: 9.0}


def test_a_run_that_is_no_trial_is_not_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pruning.this_trial() is None  # not under Hydra
    assert observed(tmp_path, 0, monkeypatch, trial=None) is None  # a job of another sweeper


def test_a_pruned_run_has_not_failed_to_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Tracking(NoTracker):
        def close(self, failed: bool) -> None:
            closed.append(failed)

    monkeypatch.setattr(assembling, "_tracker", lambda config: Tracking)
    config = tiny_config(tmp_path)
    for error in (Pruned("after 1 of 3 rounds"), ZeroDivisionError()):
        with pytest.raises(type(error)), assembling.open_tracker(config, tmp_path, Naming(config, "patterns")):
            raise error
    assert closed == [False, True]


# ---------------------------------------------------------------------------------- from the command line


COMMAND = ("hydra/sweeper=optuna", *TINY, "run_root=here", "trainer.optimizer.lr=tag(log, interval(1e-3,1e-1))")


@pytest.fixture
def multirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs a command in this process and in a folder of its own; its exit code."""

    def run_it(*overrides: str, command: Sequence[str] = COMMAND) -> Any:
        monkeypatch.setattr(sys, "argv", ["pkd", "-m", *command, *overrides])
        try:
            run_module.main()
        except SystemExit as stop:
            return stop.code
        return 0

    monkeypatch.chdir(tmp_path)
    handlers, level, path = logging.getLogger().handlers[:], logging.getLogger().level, sys.path[:]
    yield run_it
    logging.getLogger().handlers[:], sys.path[:] = handlers, path
    logging.getLogger().setLevel(level)


def the_study(root: Path) -> list[optuna.trial.FrozenTrial]:
    (sweep,) = find_sweeps(root / "here")
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(sweep.path / JOURNAL)))
    return optuna.load_study(study_name=NAME, storage=storage).trials


def test_a_pruned_job_is_shown_as_such_and_an_ordinary_command_goes_on_with_it(
    multirun: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruner = "hydra.sweeper.pruner={_target_: optuna.pruners.ThresholdPruner, lower: 2, n_warmup_steps: 1}"
    assert multirun("hydra.sweeper.n_trials=1", pruner) == 0
    (sweep,) = find_sweeps(tmp_path / "here")
    (job,) = sweep.jobs()[0]
    run = sweep.run_of(job)
    assert (job.state, job.error) == ("pruned", None)
    assert run is not None
    said = capsys.readouterr()
    assert re.search(r"^job 1 of 1 \(lr=[\d.e-]+\) pruned after 2 of 3 rounds: validation \d+\.\d%$", said.out, re.M)
    assert "1 pruned of 1 jobs" in said.out
    assert "pruned, 2 of" in said.out
    assert "Traceback" not in said.err
    (trial,) = the_study(tmp_path)
    assert trial.state == TrialState.PRUNED
    accuracies = [round_["prefix_accuracy"] for round_ in json.loads((run / "progress.json").read_text())["rounds"]]
    assert list(trial.intermediate_values.values()) == accuracies
    assert [row.state for row in summarise(sweep).rows] == ["pruned, 2 of 3 rounds"]
    listed = list_runs(tmp_path / "here")
    assert [row.state for row in listed] == ["pruned, 2 rounds done"]

    seconds = [round_["seconds"] for round_ in json.loads((run / "progress.json").read_text())["rounds"]]
    done = tiny_run(tmp_path / "here", *(one for one in job.overrides if "optimizer" in one))
    assert (run / "DONE").exists()
    assert [round_["seconds"] for round_ in done["rounds"]][:2] == seconds  # they were not trained again
    assert [job.state for job in sweep.jobs()[0]] == ["finished"]


def test_a_job_that_fails_is_listed_and_the_exit_code_says_so(
    multirun: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("boosting.rounds=0,1", "hydra.sweeper.params={seed: '3,4'}", "hydra.sweeper.n_trials=3")
    assert multirun("seed=0,1", "boosting.rounds=0", "hydra.sweeper.n_trials=3", command=COMMAND[:-1]) == 1
    assert "job 2 of 2 (seed=" in capsys.readouterr().out  # there are no more
    shutil.rmtree("here")
    assert multirun(*flags) == 1
    assert sorted({trial.state.name for trial in the_study(tmp_path)}) == ["COMPLETE", "FAIL"]
    said = capsys.readouterr()
    assert re.search(r"^failed: job \d of 3 \(.*rounds=0.*\): boosting\.rounds=0: must be", said.out, re.M)
    assert said.out.count(" finished: validation ") + said.out.count(" failed: boosting.rounds=0") == 3
    assert "Traceback" not in said.err
    jobs = find_sweeps(tmp_path / "here")[0].jobs()[0]
    assert {dict(one.split("=", 1) for one in job.overrides)["seed"] for job in jobs} <= {"3", "4"}
    assert [job.number for job in jobs] == [0, 1, 2]
    failed = next(trial for trial in the_study(tmp_path) if trial.state == TrialState.FAIL)
    assert failed.user_attrs[PLACE] > 0  # so that its number is not that of Hydra when it is tried again
    assert multirun(*flags) == 1  # what failed is tried again, what is finished is not
    assert [job.number for job in find_sweeps(tmp_path / "here")[0].jobs()[0]] == [0, 1, 2]
    assert " finished: validation " not in capsys.readouterr().out


def test_an_experiments_file_may_have_the_search(multirun: Callable[..., Any], tmp_path: Path) -> None:
    """As the guide has it."""
    (text,) = (text for text in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL) if "hydra/sweeper" in text)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\nname: mine\n")
    found = f"hydra.searchpath=[file://{ROOT / 'tests' / 'conf'},file://{tmp_path}]"
    flags = (*TINY[1:], "run_root=here", "experiment=mine", "hydra.sweeper.n_trials=2", "boosting.rounds=1")
    assert multirun(*flags, command=(found,)) == 0
    rates = [trial.params["trainer.optimizer.lr"] for trial in the_study(tmp_path)]
    assert len(set(rates)) == 2
    assert all(1e-3 <= rate <= 1e-1 for rate in rates)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.optimizer.lr=tag(log, interval(0,1))"], "a logarithmic interval starts above 0"),
        (["hydra.sweeper.goals=[accuracy]"], "hydra.sweeper.goals=accuracy: must be one of validation_accuracy"),
        (["hydra.sweeper.n_trails=3"], "n_trails"),
        (["boosting.rouns=1,2"], "Could not override 'boosting.rouns'"),
        (["student=choice(tiny,huge)"], "huge"),
    ],
)
def test_what_is_at_fault_is_said_before_anything_runs(
    overrides: list[str], said: str, multirun: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = multirun(*overrides)
    text = f"{capsys.readouterr().err}\n{code}"
    assert code != 0
    assert said in text
    assert "Traceback" not in text
    assert not list(tmp_path.rglob(JOURNAL))


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_in_the_same_run_directories(
    multirun: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("boosting.rounds=1", "trainer.max_epochs=40", "trainer.patience=null", "hydra.sweeper.n_trials=2")
    code, _, _ = stopped_by(signal.SIGKILL, tmp_path, ["-m", *COMMAND, *flags], lambda lines: len(lines) > 45)
    assert code == -signal.SIGKILL
    (running,) = the_study(tmp_path)
    assert running.state == TrialState.RUNNING
    (run,) = {path.parent for path in (tmp_path / "here/digits").glob("*/config.yaml")}
    assert multirun(*flags) == 0
    jobs = find_sweeps(tmp_path / "here")[0].jobs()[0]
    assert [(job.number, job.state) for job in jobs] == [(0, "finished"), (1, "finished")]
    assert find_sweeps(tmp_path / "here")[0].run_of(jobs[0]) == run
    assert len(list((tmp_path / "here/digits").glob("*/DONE"))) == 2
    assert [trial.state.name for trial in the_study(tmp_path)] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert the_study(tmp_path)[1].params == running.params


@pytest.mark.parametrize(
    "launcher",
    [sides("joblib", "hydra_joblib_launcher"), sides("submitit_local", "hydra_submitit_launcher")],
)
@pytest.mark.slow
def test_trials_run_side_by_side_and_are_pruned_in_the_processes_of_a_launcher(launcher: str, tmp_path: Path) -> None:
    flags = ("-m", *COMMAND, f"hydra/launcher={launcher}", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2",
             "hydra.sweeper.pruner={_target_: optuna.pruners.ThresholdPruner, lower: 2}")  # fmt: skip
    done = pkd(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = find_sweeps(tmp_path / "here")
    assert [job.state for job in sweep.jobs()[0]] == ["pruned"] * 3
    assert os.getpid() not in {job.pid for job in sweep.jobs()[0]}
    assert [len(trial.intermediate_values) for trial in the_study(tmp_path)] == [1, 1, 1]
    assert "pruned after 1 of 3 rounds" in done.stdout
