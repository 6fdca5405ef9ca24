"""Our training against a bare hand-written loop over the same model, data and optimiser.

Ours is `pkd_lightning.fitting.fit` with all it does: fetch, step, schedule, clipping as configured, curves, progress
bar. An epoch's time is what its line in metrics.jsonl says, for all epochs but the first. Both sides include the
validation at the end of each epoch.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.data import images_like, module_of
from benchmarks.models import BATCH, STUDENTS, classifier
from benchmarks.timing import Row, at_most, compared
from pkd_lightning.data.module import DataModule
from pkd_lightning.fitting import Stage, fit
from pkd_lightning.schedules import decay
from pkd_lightning.teacher import TeacherModule
from pkd_lightning.trainer import TrainerConfig

LIMITS = {"S1": 1.6, "S3": 1.25}
STEPS = 400  # of an epoch: a fixed cost of an epoch weighs three times as much as on MNIST's 1378
EPOCHS = 3
ROUNDS = 5


def trainer_config() -> TrainerConfig:
    """As conf/trainer/paper.yaml."""
    return TrainerConfig(
        partial(torch.optim.Adam, lr=1e-4), partial(decay, final=0.1), EPOCHS, None, BATCH, gradient_clip=None,
        accelerator="cpu",
    )  # fmt: skip


def our_epochs(options: dict[str, Any], data: DataModule) -> list[float]:
    """Milliseconds of each epoch of a fit but the first."""
    with tempfile.TemporaryDirectory() as directory:
        metrics = Path(directory) / "metrics.jsonl"
        fit(TeacherModule(classifier(options), trainer_config()), data, Stage("bench", 0, metrics))
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [1000 * line["seconds"] for line in lines[1:]]


def bare_epochs(options: dict[str, Any], data: DataModule) -> list[float]:
    """The same of a loop as one writes it by hand."""
    model = classifier(options)
    optimizer = trainer_config().build_optimizer(model.parameters())
    pixels, labels = data.inputs, data.labels
    mean, std = 255 * data.task.mean, 255 * data.task.std
    training, validation = torch.tensor(data.training), torch.tensor(data.validation)
    times = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for rows in training[torch.randperm(len(training))].split(BATCH):
            loss = F.cross_entropy(model((pixels[rows].float() - mean) / std), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        total, correct = 0.0, 0
        with torch.no_grad():
            for rows in validation.split(256):
                logits = model((pixels[rows].float() - mean) / std)
                total += float(F.cross_entropy(logits, labels[rows])) * len(rows)
                correct += int((logits.argmax(-1) == labels[rows]).sum())
        times.append(1000 * (time.perf_counter() - start))
    return times[1:]


def rows(
    rounds: int, models: Mapping[str, dict[str, Any]] | None = None, steps: int = STEPS, each: int = ROUNDS
) -> list[Row]:
    """What the table and the JSON show, in milliseconds a step. A round is a fit of each."""
    data = module_of(images_like(1, 28, round(steps * BATCH / 0.63)))  # a training part of that many steps
    count = len(data.training) / BATCH
    kinds: dict[str, Callable[[dict[str, Any], DataModule], list[float]]] = {"fit": our_epochs, "bare": bare_epochs}
    result = []
    for name, options in (models or {key: STUDENTS[key] for key in LIMITS}).items():
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for (round_), (kind, epochs) in itertools.product(range(1 + min(rounds, each)), kinds.items()):
            taken = epochs(options, data)
            if round_:  # the first is the warm-up
                times[kind].append(statistics.mean(taken) / count)
        what = f"step of fit, {name}, batch {BATCH}, epochs of {count:.0f} steps with validation"
        row = compared(what, times, "fit", "bare", at_most(LIMITS[name]), cost=True)
        result.append({**row, "against": "bare loop"})
    return result
