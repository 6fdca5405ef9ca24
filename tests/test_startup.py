"""Asking for help, completing and showing what is finished start at once: none of them imports what training needs.

Loading an ensemble and asking it imports torch, and nothing that only training needs.
"""

import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkd_lightning.cli import log_to_terminal
from pkd_lightning.commands import end_with_reader
from tests.support import TINY, tiny_run

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "lightning", "numba", "matplotlib", "torchvision", "sklearn", "scipy", "wandb", "optuna"}
# what a process that loads an ensemble and asks it need not have; numba comes with the kernels, at their first use
TRAINING = {"lightning", "hydra", "omegaconf", "torchmetrics", "torchvision", "wandb", "fvcore", "matplotlib"}
KERNELS = {"numba", "llvmlite", "scipy", "torch._dynamo"}
MAIN = """
import atexit, sys
atexit.register(lambda: print("IMPORTED", *sys.modules, file=sys.stderr))
from pkd_lightning.run import main
main()
"""


def start(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The command line in a process of its own, and the modules it imported."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", MAIN, *arguments]
    done = subprocess.run(command, env=whole, capture_output=True, text=True, timeout=100, check=False)
    imported = next(line for line in done.stderr.splitlines() if line.startswith("IMPORTED"))
    return done, set(imported.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "pkd experiment=digits"),
        (["--help"], "pkd list [RUN_ROOT]"),
        (["--help"], "pkd predict RUN FILE..."),
        (["experiment=digits", "--cfg", "job", "--resolve"], "name: digits"),
        (["-sc", "query=bash"], "experiment=mnist_paper"),
        (["experiment=digits", "boosting.rouns=3"], ""),
    ],
)
def test_what_trains_nothing_imports_nothing_of_it(arguments: list[str], said: str) -> None:
    done, imported = start(*arguments, COMP_LINE="pkd experiment=", COMP_POINT="15")
    assert said in done.stdout
    assert "pkd_lightning.run" in imported
    assert not HEAVY & imported


def test_a_finished_run_is_shown_without_torch_and_in_any_encoding(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    done, imported = start(*TINY, f"run_root={tmp_path}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "finished before" in done.stdout
    assert "teacher" in done.stdout
    assert "?" in done.stdout  # in place of the table's dashes
    assert not HEAVY & imported


def imported_by(code: str) -> set[str]:
    """The modules that are imported once some code has run in a process of its own."""
    whole = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    done = subprocess.run(command, env=whole, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("module", ["ensemble", "pretrained"])
def test_the_ensemble_is_imported_without_what_training_needs(module: str) -> None:
    imported = imported_by(f"import pkd_lightning.{module}")
    assert f"pkd_lightning.{module}" in imported
    assert not (TRAINING | KERNELS) & imported


def test_an_ensemble_is_loaded_and_asked_without_what_training_needs() -> None:
    imported = imported_by(
        "import torch\n"
        "from pkd_lightning.ensemble import ProgressiveEnsemble\n"
        "ensemble = ProgressiveEnsemble.load('mnist')\n"
        "ensemble.predict(torch.zeros(1, 28, 28, dtype=torch.uint8), budget_macs=1e5)\n"
    )
    assert "pkd_lightning.kernels" in imported
    assert not (TRAINING | {"torch._dynamo", "PIL"}) & imported


def unread(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of the command line where nobody reads its stdout."""
    command = [sys.executable, "-m", "pkd_lightning.run", *arguments]
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # print keeps what it has, as for users
    process = subprocess.Popen(command, env=whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    return process.wait(timeout=100), said


def test_what_nobody_reads_on_ends_quietly(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    for arguments in (["--help"], ["list", str(tmp_path)], [*TINY, f"run_root={tmp_path}"]):
        assert unread(*arguments) == (128 + signal.SIGPIPE, ""), arguments


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError), end_with_reader():
            raise BrokenPipeError


def test_torchvision_is_repaired_when_it_is_imported_and_not_before() -> None:
    code = "import sys, pkd_lightning; print('torch' in sys.modules); import torchvision; print('torch' in sys.modules)"
    whole = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=whole, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_runs_are_listed_without_torch(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    done, imported = start("list", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    assert not HEAVY & imported


def test_messages_in_another_encoding_than_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    log_to_terminal()
    logging.getLogger("pkd_lightning").info("größer")
    sys.stdout.flush()
    logging.getLogger().handlers.clear()
    assert file.getvalue() == b"gr??er\n"
