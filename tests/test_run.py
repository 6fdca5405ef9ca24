"""The command line: what a user types, sees and gets."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkd_lightning.assembling import assemble
from pkd_lightning.ensemble import ProgressiveEnsemble
from tests.support import TINY, stopped_by, tiny_config, tiny_run
from tests.test_process import LAUNCHERS

ROOT = Path(__file__).parent.parent


def pkd(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "pkd_lightning.run", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_a_run_prints_a_line_a_round_the_table_and_where_the_report_is(tmp_path: Path) -> None:
    done = pkd(*TINY, "run_root=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("round ") for line in lines) == 3
    (report,) = [line.removeprefix("report: ") for line in lines if line.startswith("report: ")]
    assert (tmp_path / report).is_file()
    again = pkd(*TINY, "run_root=here", cwd=tmp_path)
    assert "finished before" in again.stdout
    assert not any(line.startswith("round ") for line in again.stdout.splitlines())
    assert again.returncode == 0


def test_errors_are_one_message_and_exit_code_1(tmp_path: Path) -> None:
    done = pkd(*TINY, "boosting.rounds=0", "data.split=half", cwd=tmp_path)
    assert done.returncode == 1
    assert "boosting.rounds=0" in done.stderr
    assert "data.split='half'" in done.stderr
    assert "Traceback" not in done.stderr

    misspelt = pkd("experiment=digits", "boosting.rouns=3", cwd=tmp_path)
    assert misspelt.returncode == 1
    assert "Did you mean 'boosting.rounds'?" in misspelt.stderr

    unknown = pkd("experiment=digit", cwd=tmp_path)
    assert unknown.returncode == 1
    assert "digits" in unknown.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_multirun_runs_every_job_and_fails_if_one_fails(tmp_path: Path) -> None:
    """The first and the third of four jobs fail; the same command tries these again, and finds the others."""
    command = ("--multirun", *TINY, "run_root=here", "data.split=half,paper", "seed=0,1")
    done = pkd(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert len(list(tmp_path.rglob("DONE"))) == 2
    lines = done.stdout.splitlines()
    (path,) = [line.removeprefix("sweep: ") for line in lines if line.startswith("sweep: ")]
    assert re.search(r"^job 3 of 4 \(split=paper seed=0\) finished: validation .*%, test .*%, .* s$", done.stdout, re.M)
    assert [line[:8] for line in lines if line.endswith(" started")] == ["job 1 of", "job 2 of", "job 3 of", "job 4 of"]
    failed = [line for line in lines if line.startswith("failed: ")]
    assert len(failed) == 2
    assert "job 1 of 4 (split=half seed=0): data.split='half': must be" in failed[0]
    assert not [line for line in lines if line.startswith(("round ", "trying ", "teacher "))]  # a line a job, no more
    assert done.stdout.count("Settings of ") == sum(line.startswith("report: ") for line in lines) == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "here" / "latest").resolve() == (tmp_path / path).resolve()
    assert {file.suffix for file in (tmp_path / path).glob("report.*")} == {".html", ".csv", ".md"}

    again = pkd(*command, cwd=tmp_path)
    assert again.returncode == 1
    assert sum("found: validation" in line for line in again.stdout.splitlines()) == 2
    assert sum(line.endswith(" started") for line in again.stdout.splitlines()) == 2
    assert len(list((tmp_path / path / "jobs").iterdir())) == 4  # no second record of a job

    good = pkd("--multirun", *TINY, "run_root=here", "data.split=paper", "seed=0,1", cwd=tmp_path)
    assert good.returncode == 0, good.stderr


@pytest.mark.report
def test_the_run_directory_holds_what_the_design_promises(tmp_path: Path) -> None:
    results = tiny_run(tmp_path)
    (run,) = [path.parent for path in tmp_path.rglob("DONE")]
    assert run.parent.name == "digits"
    for name in ("config.yaml", "teacher/teacher.safetensors", "boosting.ckpt", "metrics.jsonl", "results.json",
                 "report.html", "run.log", "students/00.safetensors", "students/ensemble.json"):  # fmt: skip
        assert (run / name).is_file(), name
    assert list((run / "figures").glob("*.png"))
    assert results == json.loads((run / "results.json").read_text())
    assert {"schema", "experiment", "dataset", "split", "seed", "objective", "combine", "versions", "hardware",
            "wall_seconds", "teacher", "rounds", "ensemble"} <= results.keys()  # fmt: skip
    assert {"accuracy", "nll", "ece", "params", "flops_published", "macs_total", "config"} <= results["teacher"].keys()
    assert {"round", "class_index", "attempts", "epochs", "config", "params", "flops_published", "macs_total",
            "accuracy", "prefix_accuracy", "prefix_agreement", "prefix_nll", "prefix_ece", "edges", "accepted_by",
            "seconds"} <= results["rounds"][0].keys()  # fmt: skip
    assert {"min", "max", "satisfied", "classes"} <= results["rounds"][0]["edges"].keys()
    assert {"members", "accuracy", "agreement", "nll", "ece", "params", "flops_published", "macs_total",
            "fraction_of_teacher"} <= results["ensemble"].keys()  # fmt: skip
    assert {"params", "flops_published", "macs_total"} <= results["ensemble"]["fraction_of_teacher"].keys()


def test_reported_accuracies_are_those_of_the_saved_ensemble(tmp_path: Path) -> None:
    """The students on disk, loaded as a user loads them and given raw pixels, score what results.json says."""
    from pkd_lightning.data.module import DataModule

    results = tiny_run(tmp_path)
    data = DataModule(assemble(tiny_config(tmp_path)).data)
    (done,) = tmp_path.rglob("DONE")
    ensemble = ProgressiveEnsemble.load(done.parent)
    images, labels = data.inputs[data.test.start :], data.labels[data.test.start :]
    for t, row in enumerate(results["rounds"]):
        logits = ensemble(ensemble.preprocess(images), members=t + 1)
        assert (logits.argmax(-1) == labels).float().mean().item() == pytest.approx(row["prefix_accuracy"])
        alone = ensemble.members[t](ensemble.preprocess(images))
        assert (alone.argmax(-1) == labels).float().mean().item() == pytest.approx(row["accuracy"])
    total = sum(row["params"] for row in results["rounds"])
    assert results["ensemble"]["params"] == total
    assert results["ensemble"]["fraction_of_teacher"]["params"] == pytest.approx(total / results["teacher"]["params"])


def test_the_test_part_decides_nothing(tmp_path: Path) -> None:
    """With the test images replaced by noise, everything but the test figures stays the same."""
    from tests import support

    whole = tiny_run(tmp_path / "whole", "data.split=official")
    original = support.patterns

    def noisy(**options: object) -> object:
        data = original(**options)  # type: ignore[arg-type]
        data.inputs[data.train_size :] = 255 - data.inputs[data.train_size :].flip(0)
        return data

    support.patterns = noisy  # type: ignore[assignment]
    try:
        changed = tiny_run(tmp_path / "changed", "data.split=official")
    finally:
        support.patterns = original
    for one, two in zip(whole["rounds"], changed["rounds"], strict=True):
        for key in ("validation_loss", "edges", "scales", "accepted_by", "epochs"):
            assert one[key] == two[key]
    assert whole["ensemble"]["nll"] != changed["ensemble"]["nll"]


def test_the_entry_file_stays_a_story() -> None:
    assert len((ROOT / "pkd_lightning" / "run.py").read_text().splitlines()) <= 100


def test_nothing_private_is_imported_from_lightning() -> None:
    import re

    private = re.compile(
        r"^\s*(from lightning\S*\._\S* import|import lightning\S*\._|from lightning\S* import .*\b_\w)", re.M
    )
    sources = list((ROOT / "pkd_lightning").rglob("*.py"))
    assert len(sources) > 30
    assert not [path.name for path in sources if private.search(path.read_text())]
    assert private.search("from lightning.pytorch.loops import _Loop")  # the pattern finds what it is meant to


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_stopped_run_says_so_by_its_exit_code(number: int, code: int, tmp_path: Path) -> None:
    """In a job of SLURM, which sends SIGUSR1 before its time limit, as elsewhere."""
    flags = (*TINY, "trainer.max_epochs=100000", "trainer.patience=null")
    stopped, _, said = stopped_by(number, tmp_path, flags, lambda lines: bool(lines), LAUNCHERS["one task of SLURM"])
    assert stopped == code
    assert "the same command goes on" in said
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
