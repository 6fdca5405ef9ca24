"""A multirun's jobs are on disk as they go, and its report, also while it runs, is of all of them."""

import csv
import fcntl
import io
import itertools
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from pkd_lightning import report
from pkd_lightning.assembling import assemble
from pkd_lightning.cli import CONF, log_to_terminal
from pkd_lightning.composition import without_bars
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.reporting.grouping import grouped, short_keys
from pkd_lightning.reporting.load import load_run
from pkd_lightning.rundir import RunDirectory, held
from pkd_lightning.sweeps import callback, page, stopping
from pkd_lightning.sweeps.callback import Follower, JobRecords, share_threads
from pkd_lightning.sweeps.records import Job, Sweep, common, find_sweeps, one_line, parsed, plan, sweep_name
from pkd_lightning.sweeps.stopping import LAUNCHER, launched_here, stop_jobs_first
from pkd_lightning.sweeps.summary import Summary, summarise
from tests.support import TINY, tiny_config, tiny_run
from tests.test_report import make_results, make_run, visible

HERE = {"host": os.uname().nodename, "pid": os.getpid()}
pytestmark = pytest.mark.report


def results_of(validation: float, test: float, macs: int = 1000, rounds: int = 3, **changes: object) -> dict:
    """Results whose ensemble has these accuracies."""
    results = make_results(rounds, **changes)
    results["rounds"][-1] |= {"prefix_validation_accuracy": validation, "prefix_accuracy": test}
    for row in results["rounds"]:
        row["macs_total"] = macs // rounds
    results["ensemble"] |= {"accuracy": test, "macs_total": macs}
    return results


def sweep_at(root: Path, common: Sequence[str] = ("experiment=digits",), total: int | None = None) -> Sweep:
    sweep = Sweep(root / ".sweeps" / "some", tuple(common), total)
    sweep.save(common)
    return sweep


def add(sweep: Sweep, number: int, own: Sequence[str], results: dict | None = None, **changes: object) -> Job:
    """A job, finished where it has results."""
    run = sweep.path.parents[1] / "digits" / f"run{number:02d}"
    state = "waiting"
    if results is not None:
        make_run(run, results, config="".join(f"{one.replace('=', ': ', 1)}\n" for one in own))
        (run / "DONE").touch()
        state = "finished"
    fields = {"state": state, "run": os.path.relpath(run, sweep.path), "started": 1.0, "ended": 2.0, **HERE, **changes}
    job = Job(number, (*sweep.common, *own), **fields)  # type: ignore[arg-type]
    sweep.write(job)
    return job


def job_config(tmp_path: Path, *overrides: str, number: int = 0) -> DictConfig:
    """The configuration of a job, as Hydra gives it to callbacks."""
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("config", [*TINY, f"run_root={tmp_path}", *overrides], return_hydra_config=True)
    OmegaConf.set_readonly(config.hydra, False)
    with open_dict(config):
        config.hydra.mode, config.hydra.job.num = RunMode.MULTIRUN, number
        config.hydra.sweep.dir = str(tmp_path / ".sweeps" / "some")
    return config


def ended(error: Exception | None = None) -> JobReturn:
    done = JobReturn(status=JobStatus.COMPLETED if error is None else JobStatus.FAILED)
    done.return_value = error
    return done


# ---------------------------------------------------------------------------------- on disk


def test_the_same_command_finds_its_sweep_in_any_order_and_with_another_logger() -> None:
    def name(*overrides: str) -> str:
        return sweep_name(OmegaConf.create(list(overrides)))

    first = name("seed=0,1", "trainer.optimizer.lr=0.1,0.2", "logger=none", "run_root=a")
    assert first.startswith("seed-lr-")
    assert name("run_root=b", "trainer.optimizer.lr=0.1,0.2", "logger=wandb", "seed=0,1").split("-")[-1] == first[-8:]
    assert name("seed=0,1", "trainer.optimizer.lr=0.1,0.3", "run_root=a") != first


def test_a_job_knows_its_sweeps_folder_though_its_overrides_are_its_own() -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        whole, job = (compose("config", [f"seed={seed}"], return_hydra_config=True) for seed in (1, 2))
    folder = whole.hydra.sweep.dir
    assert folder.startswith("runs/.sweeps/")
    OmegaConf.copy_cache(whole, job)  # as Hydra does
    assert job.hydra.sweep.dir == folder


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=0,1", "boosting=default,paper"],
        ["seed=range(3)", "trainer.optimizer.lr=0.1,1e-3", "name=x"],
        ["+student.rungs=[{a: 1, b: [2, 3]}],[]", "name='a b'", "seed=1", "seed=0,2"],
        ["name=choice(a,'b,c')", "~data.root", "seed=null"],
    ],
)
def test_the_jobs_known_beforehand_are_those_hydra_runs(overrides: list[str]) -> None:
    (batch,) = BasicSweeper.split_arguments(parsed(overrides), None)
    jobs = plan(overrides, {})
    assert jobs == batch
    shared = common(overrides)
    assert all(set(shared) - {"seed=1"} <= set(job) for job in jobs)
    assert len(plan(["seed=1"], {"name": "c,d"})) == 2  # what the sweeper's configuration sweeps


def test_a_jobs_file_is_found_by_its_overrides_in_any_order(tmp_path: Path) -> None:
    sweep = sweep_at(tmp_path)
    job = add(sweep, 0, ["seed=1", "lr=2"])
    assert sweep.find(("lr=2", "experiment=digits", "seed=1", "run_root=elsewhere")) == job
    assert sweep.find(("lr=2", "experiment=digits", "seed=2")) is None
    assert Sweep.read(sweep.path) == sweep


def test_a_job_runs_as_long_as_its_process_does(tmp_path: Path) -> None:
    sweep = sweep_at(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    add(sweep, 0, ["seed=0"], state="running")
    add(sweep, 1, ["seed=1"], state="running", pid=gone.pid)
    run = tmp_path / "digits" / "run02"
    run.mkdir(parents=True)
    add(sweep, 2, ["seed=2"], state="running", host="elsewhere", run=os.path.relpath(run, sweep.path))
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert held(run)
        assert [job.state for job in sweep.jobs()[0]] == ["running", "stopped", "running"]
    assert not held(run)
    assert [job.state for job in sweep.jobs()[0]] == ["running", "stopped", "stopped"]


def test_looking_at_a_run_lets_it_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`held` may have the lock for an instant when a run takes it."""
    config = tiny_config(tmp_path)
    directory = RunDirectory(config)
    directory.path.mkdir(parents=True)
    lock = (directory.path / ".lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_SH)
    monkeypatch.setattr("pkd_lightning.rundir.time.sleep", lambda seconds: lock.close())
    with directory.open(config):
        assert held(directory.path)


def test_a_damaged_file_is_named_and_written_again(tmp_path: Path) -> None:
    sweep = sweep_at(tmp_path)
    for number in range(2):
        add(sweep, number, [f"seed={number}"], results_of(0.5, 0.5, seed=number))
    file = sweep.file(("experiment=digits", "seed=0"))
    file.write_text(file.read_text().replace('"finished"', '"failed"'))
    jobs, notes = sweep.jobs()
    assert [job.number for job in jobs] == [1]
    assert str(file) in notes[0]
    assert str(file) in visible(page.write_summary(summarise(sweep)))
    assert sweep.find(("experiment=digits", "seed=0")) is None  # so the same command writes it
    (sweep.path / "sweep.json").write_text("[]")
    with pytest.raises(RunError, match=r"sweep\.json"):
        find_sweeps(sweep.path)


def test_results_that_were_removed_do_not_count_as_finished(tmp_path: Path) -> None:
    sweep = sweep_at(tmp_path)
    add(sweep, 0, ["seed=0"], results_of(0.5, 0.5))
    (tmp_path / "digits" / "run00" / "results.json").unlink()
    assert [job.state for job in sweep.jobs()[0]] == ["removed"]


def test_a_job_that_another_command_finished_is_finished(tmp_path: Path) -> None:
    sweep = sweep_at(tmp_path)
    add(sweep, 0, ["seed=0"], results_of(0.5, 0.5), state="failed", error="no")
    assert [(job.state, job.error) for job in sweep.jobs()[0]] == [("finished", None)]


def test_a_sweep_that_was_moved_finds_its_runs(tmp_path: Path) -> None:
    add(sweep_at(tmp_path / "a"), 0, ["seed=0"], results_of(0.5, 0.5))
    (tmp_path / "a").rename(tmp_path / "b")
    (sweep,) = find_sweeps(tmp_path / "b")
    assert summarise(sweep).rows[0].finished


# ---------------------------------------------------------------------------------- while it goes


def test_each_job_is_recorded_from_its_start_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_at(tmp_path, common=TINY, total=2)
    records, config = JobRecords(), job_config(tmp_path, "seed=4")
    records.on_job_start(config, task_function=print)
    (found,) = find_sweeps(tmp_path)[0].jobs()[0]
    assert (found.state, found.number, found.pid) == ("running", 0, os.getpid())
    tiny_run(tmp_path, "seed=4")
    records.on_job_end(config, ended())
    (found,) = find_sweeps(tmp_path)[0].jobs()[0]
    assert (found.state, found.error) == ("finished", None)
    assert (found.ended or 0) >= (found.started or 1)
    (run,) = tmp_path.glob("digits/*")
    assert find_sweeps(tmp_path)[0].run_of(found) == run
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("job ")]
    assert lines[0].endswith("started")
    assert "seed=4" in lines[0]
    assert "finished: validation " in lines[1]
    assert ", test " in lines[1]
    records.on_job_start(config, task_function=print)
    records.on_job_end(config, ended())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("job ")]
    assert "found: validation " in line


def test_a_run_alone_is_no_job(tmp_path: Path) -> None:
    config = job_config(tmp_path)
    config.hydra.mode = RunMode.RUN
    records = JobRecords()
    records.on_job_start(config, task_function=print)
    records.on_job_end(config, ended())
    assert not (tmp_path / ".sweeps").exists()


@pytest.mark.parametrize("basic", [True, False])
def test_a_failure_is_recorded_and_hydras_sweeper_goes_on(
    basic: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra's own sweeper would raise the first error, and drop the batches to come; another one must know of it."""
    sweep_at(tmp_path)
    records, config = JobRecords(), job_config(tmp_path, "data.split=half")
    if not basic:
        config.hydra.sweeper._target_ = "some.other.Sweeper"
    records.on_job_start(config, task_function=print)
    done = ended(ConfigError(["data.split='half': must be paper", "seed=-1: too small"]))
    records.on_job_end(config, done)
    assert (done.status == JobStatus.COMPLETED) is basic
    (job,) = find_sweeps(tmp_path)[0].jobs()[0]
    assert (job.state, job.error) == ("failed", "data.split='half': must be paper; seed=-1: too small")
    said = capsys.readouterr()
    assert "failed: data.split='half'" in said.out
    assert "Traceback" not in said.err


def test_a_fault_of_the_program_shows_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, config = JobRecords(), job_config(tmp_path)
    sweep_at(tmp_path)
    records.on_job_start(config, task_function=print)
    records.on_job_end(config, ended(ZeroDivisionError("division\nby zero")))
    assert find_sweeps(tmp_path)[0].jobs()[0][0].error == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert one_line(KeyError()) == "KeyError"


def test_a_job_that_another_process_runs_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweep_at(tmp_path)
    config = job_config(tmp_path, "seed=1")
    other = Job(0, tuple(config.hydra.overrides.task), "running", host=HERE["host"], pid=os.getppid(), started=1.0)
    sweep.write(other)
    records = JobRecords()
    records.on_job_start(config, task_function=print)
    done = ended(RunError("another process is running this experiment"))
    records.on_job_end(config, done)
    assert sweep.find(other.overrides) == other
    assert done.status == JobStatus.FAILED
    assert "is running already" in capsys.readouterr().out
    sweep.write(Job(0, other.overrides, "failed", host=HERE["host"], pid=os.getppid()))  # it has ended: tried again
    records.on_job_start(config, task_function=print)
    found = sweep.find(other.overrides)
    assert found is not None
    assert (found.state, found.pid) == ("running", os.getpid())


@pytest.mark.parametrize(("state", "code"), [("finished", None), ("failed", 1), ("running", 1)])
def test_the_exit_code_says_whether_all_are_finished(
    state: str, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "sweep_page", lambda summary: "")
    sweep = sweep_at(tmp_path)
    add(sweep, 0, ["seed=0"], results_of(0.5, 0.5))
    done = results_of(0.5, 0.5, seed=1) if state == "finished" else None
    add(sweep, 1, ["seed=1"], done, state=state)
    records, config = JobRecords(), job_config(tmp_path)
    if code is None:
        records.on_multirun_end(config)
    else:
        with pytest.raises(SystemExit) as stop:
            records.on_multirun_end(config)
        assert stop.value.code == code
        config.hydra.sweeper._target_ = "some.other.Sweeper"  # which may leave jobs to others, and has old failures
        records.on_multirun_end(config)


def test_every_job_is_there_before_it_starts_and_none_is_forgotten(tmp_path: Path) -> None:
    config, records = job_config(tmp_path), JobRecords()
    config.hydra.overrides.task.append("seed=0,1,2")
    records.on_multirun_start(config)
    (sweep,) = find_sweeps(tmp_path)
    assert [job.state for job in sweep.jobs()[0]] == ["waiting"] * 3
    assert sweep.total == 3
    job = sweep.jobs()[0][1]
    sweep.write(Job(1, job.overrides, "failed", error="some"))
    records.on_multirun_start(config)
    assert [job.state for job in find_sweeps(tmp_path)[0].jobs()[0]] == ["waiting", "failed", "waiting"]
    assert (tmp_path / "latest").resolve() == sweep.path


def test_bars_are_off_and_the_terminal_shows_a_jobs_warnings_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, "trainer.progress=true", "teacher.trainer.progress=true")
    experiment = assemble(without_bars(config))
    assert (experiment.trainer.progress, experiment.teacher.trainer.progress) == (False, False)
    handlers = logging.getLogger().handlers[:]
    try:
        log_to_terminal("job 3 of 9 (lr=5%)")
        logging.getLogger("pkd_lightning.x").info("a round")
        logging.getLogger("pkd_lightning.x").warning("a warning")
        assert capsys.readouterr().out == "job 3 of 9 (lr=5%): a warning\n"
    finally:
        logging.getLogger().handlers[:] = handlers


def test_jobs_of_submitits_local_executor_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.create({"hydra": {"launcher": {"cpus_per_task": None}}})
    monkeypatch.setattr(callback.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(callback.os, "environ", {})
    share_threads(config, 3)
    assert callback.os.environ == {}
    callback.os.environ["SUBMITIT_EXECUTOR"] = "local"
    share_threads(config, 3)
    assert callback.os.environ["OMP_NUM_THREADS"] == "4"


def test_jobs_that_write_elsewhere_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweep_at(tmp_path)
    add(sweep, 0, ["seed=0"], results_of(0.5, 0.25), ended=99.0)  # before this command
    add(sweep, 1, ["seed=1"])
    add(sweep, 2, ["seed=2"], state="running", started=101.0, ended=None)
    follower = Follower(sweep, since=100.0)
    follower.look()
    add(sweep, 2, ["seed=2"], results_of(0.5, 0.25, seed=2), ended=102.0)
    follower.look()
    follower.start()
    follower.end()
    assert capsys.readouterr().out.splitlines() == [
        "job 3 (seed=2) started",
        "job 3 (seed=2) finished: validation 50.0%, test 25.0%, 60.0 s",
    ]
    assert pickle.loads(pickle.dumps(JobRecords())).follower is None


# ---------------------------------------------------------------------------------- what was found


@pytest.fixture
def sixteen(tmp_path: Path) -> Summary:
    """Eight settings of two seeds, one job failed, one running, one waiting."""
    sweep = sweep_at(tmp_path, total=18)
    number = 0
    for lr, size in itertools.product((0.1, 0.01, 0.001, 0.0001), (8, 16)):
        for seed in (0, 1):
            own = [f"trainer.optimizer.lr={lr}", f"trainer.batch_size={size}", f"seed={seed}"]
            validation = 0.9 + lr / 10 + 0.002 * seed
            add(sweep, number, own, results_of(validation, 0.8 - lr / 10, 1000 * size, seed=seed))
            number += 1
    add(
        sweep,
        16,
        ["trainer.optimizer.lr=-1", "trainer.batch_size=8", "seed=0"],
        state="failed",
        error="lr=-1 | no rate",
    )
    add(sweep, 17, ["trainer.optimizer.lr=-1", "trainer.batch_size=8", "seed=1"])
    return summarise(sweep)


def test_the_best_is_chosen_by_validation_and_of_equal_ones_the_cheaper(sixteen: Summary) -> None:
    best = sixteen.best
    assert best is not None
    assert best.values == {"trainer.optimizer.lr": "0.1", "trainer.batch_size": "8"}
    assert best.test.mean == min(setting.test.mean for setting in sixteen.settings if setting.finished)
    assert best.validation.mean == pytest.approx(0.911)
    assert best.validation.deviation == pytest.approx(0.002 / 2**0.5)
    assert [len(setting.rows) for setting in sixteen.settings] == [2] * 9
    assert sixteen.settings[-1].values["trainer.optimizer.lr"] == "-1"
    said = page.best_sentence(sixteen)
    assert "among 8 settings" in said
    assert "batch_size=8" in said
    assert "2 jobs are not finished" in said


def test_no_point_of_the_front_is_beaten_and_every_other_one_is(sixteen: Summary) -> None:
    front, points = sixteen.front, sixteen.points
    assert len(points) == 8 * 3
    assert 0 < len(front) < len(points)
    for point in points:
        beaten = any(
            other.macs <= point.macs and other.validation >= point.validation
            and (other.macs, other.validation) != (point.macs, point.validation)
            for other in points
        )  # fmt: skip
        twin = any((other.macs, other.validation) == (point.macs, point.validation) for other in front)
        assert beaten is not twin


def test_accuracies_that_differ_in_rounding_alone_are_equal(tmp_path: Path) -> None:
    sweep = sweep_at(tmp_path)
    for number, (validation, macs) in enumerate([(4 / 21, 2000), (4 / 21 - 4e-9, 1000)]):
        add(sweep, number, [f"trainer.batch_size={number}", "seed=0"], results_of(validation, 0.5, macs, rounds=1))
    summary = summarise(sweep)
    assert summary.best is not None
    assert len(summary.points) == 2
    assert summary.best.values == {"trainer.batch_size": "1"}
    assert all(point.setting is summary.best for point in summary.front)


def test_the_page_and_the_tables_beside_it_hold_every_job(sixteen: Summary) -> None:
    file = page.write_summary(sixteen)
    text = visible(file)
    assert "16 finished, 1 failed, 1 waiting of 18 jobs" in text
    assert "job 17: lr=-1 | no rate" in text
    assert "which chose nothing" in text
    for lr in ("0.1", "0.01", "0.001", "0.0001"):
        assert f" {lr} 8 2 of 2 " in text
    rows = list(csv.DictReader(io.StringIO(file.with_suffix(".csv").read_text())))
    assert len(rows) == 18
    assert rows[0]["trainer.optimizer.lr"] == "0.1"
    assert (rows[0]["validation_accuracy"], rows[0]["test_accuracy"], rows[0]["macs_total"]) == ("0.91", "0.79", "8000")
    assert (rows[16]["state"], rows[16]["error"], rows[16]["test_accuracy"]) == ("failed", "lr=-1 | no rate", "")
    tables = file.with_suffix(".md").read_text()
    assert "- job 17 of 18 (lr=-1 batch_size=8 seed=0): lr=-1 | no rate" in tables
    assert tables.count("\n| ") == 2 + 9 + 2 + len(sixteen.front) + 2 + 18
    stream = io.StringIO()
    page.print_summary(sixteen, Console(file=stream, width=60))
    printed = stream.getvalue().splitlines()
    assert "failed: job 17 of 18 (lr=-1 batch_size=8 seed=0): lr=-1 | no rate" in printed
    assert sum("0.0001 " in line for line in printed) == 2  # the swept values keep their room on a narrow terminal


def test_what_was_swept_is_drawn_and_named(sixteen: Summary, tmp_path: Path) -> None:
    text = page.sweep_page(sixteen)
    assert 'aria-label="Validation accuracy against trainer.optimizer.lr"' in text
    assert 'aria-label="Validation accuracy against trainer.batch_size"' in text
    assert 'aria-label="Validation accuracy against seed"' not in text
    odd = sweep_at(tmp_path / "odd")
    for number, value in enumerate(["$x$", "null", "1e3", "[1,2]", "<b>"]):
        add(odd, number, [f"key={value}"], results_of(0.5 + number / 10, 0.5))
    assert "&lt;b&gt;" in page.sweep_page(summarise(odd))


def test_a_sweep_is_reported_while_it_runs(tmp_path: Path) -> None:
    sweep = sweep_at(tmp_path, total=3)
    assert "none started of 3 jobs" in visible(page.write_summary(summarise(sweep)))
    add(sweep, 0, ["seed=0"], results_of(0.9, 0.8))
    run = tmp_path / "digits" / "run01"
    make_run(run, results_of(0.7, 0.6, seed=1) | {"part": "validation", "planned_rounds": 5})
    (run / "results.json").rename(run / "progress.json")
    add(sweep, 1, ["seed=1"], state="running")
    summary = summarise(sweep)
    assert [row.state for row in summary.rows] == ["finished", "running, 3 of 5 rounds"]
    assert summary.rows[1].validation == 0.7
    assert summary.rows[1].test != summary.rows[1].test  # not yet known
    assert summary.best is not None
    assert summary.best.validation.mean == 0.9  # what is not finished does not count
    assert "1 finished, 1 running of 3 jobs" in visible(page.write_summary(summary))


def test_none_is_best_where_the_data_differ(tmp_path: Path) -> None:
    sweep = sweep_at(tmp_path)
    for number, name in enumerate(("digits", "mnist")):
        add(sweep, number, [f"data={name}"], results_of(0.9, 0.8, dataset=name))
    summary = summarise(sweep)
    assert (summary.best, summary.front) == (None, [])
    assert "do not compare" in visible(page.write_summary(summary))


# ---------------------------------------------------------------------------------- commands


def test_report_finds_the_sweep_in_its_folder_and_in_a_run_root_of_its_own(
    sixteen: Summary, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = sixteen.sweep.path, sixteen.sweep.path.parents[1]
    for given in (path, root):
        assert report.main([str(given)]) == 0
        assert capsys.readouterr().out.splitlines()[0] == str(path / "report.html")
    make_run(root / "digits" / "another", make_results(seed=7))
    out = root / "all.html"
    assert report.main([str(root), "--out", str(out)]) == 0
    assert "lr=-1 | no rate" in capsys.readouterr().err
    text = visible(out)
    assert "lr=-1 | no rate" in text  # a job that failed does not vanish
    assert "validation accuracy" in text


def test_labels_of_a_comparison_tell_all_settings_apart_by_what_was_swept(sixteen: Summary) -> None:
    """The teacher's rate is taken from the swept one, and does not stand in its place."""
    runs = []
    for row in sixteen.rows[:16]:
        assert row.run is not None
        config = row.run / "config.yaml"
        lr = row.values["trainer.optimizer.lr"]
        taken = "".join(f"teacher.{letter}: {lr}\n" for letter in "abcdef")
        config.write_text(f"{config.read_text()}{taken}teacher.trainer.optimizer.lr: {lr}\n")
        runs.append(load_run(row.run))
    groups, _ = grouped(runs)
    labels = [group.label for group in groups]
    assert len(set(labels)) == 8
    assert all("lr=" in label and "batch_size=" in label for label in labels)
    assert all(label.count("=") == 2 for label in labels)


def test_short_names_are_unambiguous() -> None:
    keys = ["trainer.optimizer.lr", "teacher.trainer.optimizer.lr", "seed", "student.rungs.0.d_model", "rungs.0"]
    short = short_keys(keys)
    assert len(set(short.values())) == len(keys)
    assert short["student.rungs.0.d_model"] == "d_model"
    assert short["rungs.0"] == "rungs.0"


def test_the_comparison_names_the_best_by_validation(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", results_of(0.9, 0.5), config="epochs: 3\n")
    lucky = make_run(tmp_path / "lucky", results_of(0.8, 0.95), config="epochs: 9\n")
    text = visible(report.compare([good, lucky], tmp_path / "out.html"))
    assert "[epochs=3], validation 90.00%. Its test accuracy: 50.00%" in text


@pytest.mark.parametrize("command", ["list", "report"])
def test_commands_are_not_hydras(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pkd_lightning import run

    monkeypatch.setattr(sys, "argv", ["pkd", command, "--help"])
    monkeypatch.setattr(run, "_job", None)
    with pytest.raises(SystemExit) as stop:
        run.main()
    assert stop.value.code == 0


@pytest.mark.parametrize(("own", "signalled"), [(True, True), (False, False)])
def test_a_signal_reaches_the_jobs_of_this_launch_alone(
    own: bool, signalled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that work on one sweep would send each other signals, and each wait for the other to end."""
    run = tmp_path / "run"
    run.mkdir()
    holding = f"import fcntl, time; lock = open({str(run / '.lock')!r}, 'ab'); fcntl.flock(lock, fcntl.LOCK_EX); "
    job = subprocess.Popen([sys.executable, "-c", holding + "print('held', flush=True); time.sleep(60)"], stdout=-1)
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == b"held\n"
        sweep = Sweep(tmp_path)
        launcher = launched_here() if own else f"{socket.gethostname()}:1"
        sweep.write(Job(0, ("seed=0",), "running", "run", host=socket.gethostname(), pid=job.pid, launcher=launcher))
        monkeypatch.setenv(LAUNCHER, "")
        ended: list[int] = []
        monkeypatch.setattr(stopping.stop, "handle", lambda number, frame: ended.append(number))
        before = signal.signal(signal.SIGTERM, stopping.stop.handle)
        try:
            stop_jobs_first(sweep)
            assert os.environ[LAUNCHER] == launched_here()
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert ended == [signal.SIGTERM]
        assert (job.poll() is not None) == signalled
    finally:
        job.kill()
        job.wait()
