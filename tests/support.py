"""Small data and settings shared by the tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.cli import load_config
from pkd_lightning.data.images import ImageSet
from pkd_lightning.data.signals import SignalSet
from pkd_lightning.run import run

# quick settings for any experiment
QUICK = ("trainer.max_epochs=1", "trainer.batch_size=16", "trainer.progress=false", "logger=none")


def patterns(
    root: object = None, samples: int = 160, classes: int = 3, channels: int = 1, side: int = 8, noise: int = 60
) -> ImageSet:
    """Images of `classes` fixed random patterns under noise: learnable in an epoch or two."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 196, (classes, channels, side, side), generator=generator)
    labels = torch.arange(samples) % classes
    images = prototypes[labels] + torch.randint(0, noise, (samples, channels, side, side), generator=generator)
    return ImageSet("patterns", images.to(torch.uint8), labels, classes, samples * 3 // 4)


def waves(root: object = None, samples: int = 160, classes: int = 3) -> SignalSet:
    """Signals of one channel and 16 values: as many periods as the label and one, under noise."""
    generator = torch.Generator().manual_seed(0)
    labels, time = torch.arange(samples) % classes, torch.arange(16) * torch.pi / 8
    clean = torch.sin((1 + labels)[:, None, None] * time)
    signals = clean + 0.3 * torch.randn(samples, 1, 16, generator=generator)
    return SignalSet("waves", signals, labels, classes, samples * 3 // 4)


# as many students as rounds, however poor
ACCEPT = "boosting.weak_learner.on_failure=accept"

# a ladder and a teacher that train in a fraction of a second, added as a user adds theirs
TINY = (
    f"hydra.searchpath=[file://{Path(__file__).parent / 'conf'}]",
    "data.source._target_=tests.support.patterns",
    "student=tiny",
    "teacher=tiny",
    "boosting.rounds=3",
    *QUICK,
)


def tiny_config(run_root: Path, *overrides: str) -> DictConfig:
    """The embedded experiment on `patterns` with a tiny ladder."""
    return load_config(*TINY, f"run_root={run_root}", *overrides)


def tiny_run(run_root: Path, *overrides: str) -> dict[str, Any]:
    """Run `tiny_config`; results.json."""
    return run(tiny_config(run_root, *overrides))


def stopped_by(
    number: int,
    root: Path,
    flags: Sequence[str],
    when: Callable[[list[str]], bool],
    environment: Mapping[str, str] | None = None,
    module: str = "pkd_lightning.run",
) -> tuple[int, str, str]:
    """Run a command line in `root`, with a signal once its epochs' lines are such; exit code, stdout, stderr."""
    handled = number != signal.SIGKILL
    if handled:  # a shell's background jobs ignore Ctrl-C, and so would the run
        inherited = signal.signal(number, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *flags], cwd=root,
        env={**os.environ, **(environment or {}), "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if handled:
        signal.signal(number, inherited)
    try:
        for _ in range(600):
            time.sleep(0.1)
            if when([line for path in root.rglob("metrics.jsonl") for line in path.read_text().splitlines()]):
                break
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, said


class Stopped(Exception):
    """Stands for whatever ends a process between two rounds."""


def stopped_after(rounds: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run of three rounds that ended after `rounds`."""
    advance = BoostingLoop.advance

    def stop(self: BoostingLoop) -> None:
        if self.state.round == rounds:
            raise Stopped
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(BoostingLoop, "advance", stop)
        with pytest.raises(Stopped):
            tiny_run(root, ACCEPT)
    (directory,) = root.glob("digits/*")
    return directory
