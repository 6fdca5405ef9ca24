"""A bare loop's whole training step (forward, cross-entropy, backward, AdamW) on one thread and on two."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.models import BATCH, BEST, BEST_BATCH, STUDENTS, TEACHER, batch, classifier
from benchmarks.timing import Row, at_most, interleaved, measured
from pkd_lightning.models.classifier import MambaClassifier

EPOCH = 49_000  # images
SECONDS_AN_EPOCH = {"S7": 60, "teacher": 300}  # on two threads
SECONDS = 6.0  # a call's share of the time


def step_call(model: MambaClassifier, size: int = BATCH) -> Callable[[], object]:
    """One step on always the same batch."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # as `TrainerConfig.build_optimizer` chooses
    images, labels = batch(size)

    def call() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return call


def rows(rounds: int, models: Mapping[str, dict[str, Any]] | None = None) -> list[Row]:
    """What the table and the JSON show; the figure is the time of an epoch of MNIST."""
    result = []
    for name, options in (models or {**STUDENTS, **TEACHER, **BEST}).items():
        size = BEST_BATCH if name in BEST else BATCH
        step = step_call(classifier(options), size)
        times = interleaved({"one": step, "two": step}, rounds, SECONDS, {"two": 2})
        for threads, taken in enumerate(times.values(), start=1):
            limit = SECONDS_AN_EPOCH.get(name) if threads == 2 else None
            of = name if size == BATCH else f"{name} at batch {size}"
            what = f"training step of {of}, {threads} thread{'s' if threads > 1 else ''}"
            row = measured(what, taken, 0.0, "")
            seconds = row["median_ms"] / 1000 * EPOCH / size
            unit = f"s per {EPOCH:,} images"
            row = measured(what, taken, seconds, unit, at_most(limit) if limit else None)
            result.append({**row, "threads": threads})
    return result
