"""A bare loop's whole training step (forward, cross-entropy, backward, AdamW) on one thread and on two."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.models import BATCH, BEST, CIFAR, STUDENTS, TEACHER, batch, classifier, shape_of, size_of
from benchmarks.timing import Row, at_most, compared, interleaved, measured
from pkd_lightning.models.blocks import Block
from pkd_lightning.models.classifier import MambaClassifier

EPOCH = 49_000  # images
SECONDS_AN_EPOCH = {"S7": 60, "teacher": 300}  # on two threads
SECONDS = 6.0  # a call's share of the time


def step_call(
    model: MambaClassifier, size: int = BATCH, image_shape: tuple[int, int, int] = (1, 28, 28)
) -> Callable[[], object]:
    """One step on always the same batch."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # as `TrainerConfig.build_optimizer` chooses
    images, labels = batch(size, image_shape)

    def call() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return call


def through_torch(model: MambaClassifier) -> MambaClassifier:
    """The model, its local convolutions and the norms after its blocks called as modules: a hook asks for that."""
    local = [block.local for block in model.modules() if isinstance(block, Block) and block.local is not None]
    between = getattr(model.tokens, "between", None)
    for module in (*local, model.norm, *([between.norm] if isinstance(between, nn.Module) else [])):
        module.register_forward_hook(lambda *_: None)
    return model


def rows(rounds: int, models: Mapping[str, dict[str, Any]] | None = None) -> list[Row]:
    """What the table and the JSON show; the figure is the time of as many images as an epoch of MNIST has."""
    result = []
    for name, options in (models or {**STUDENTS, **TEACHER, **BEST, **CIFAR}).items():
        size, shape = size_of(name), shape_of(name)
        step = step_call(classifier(options, shape), size, shape)
        calls = {"one": step, "two": step}
        if "local_conv" in options:
            calls["torch"] = step_call(through_torch(classifier(options, shape)), size, shape)
        times = interleaved(calls, rounds, SECONDS, {"two": 2})
        for threads, taken in enumerate((times["one"], times["two"]), start=1):
            limit = SECONDS_AN_EPOCH.get(name) if threads == 2 else None
            of = name if size == BATCH else f"{name} at batch {size}"
            what = f"training step of {of}, {threads} thread{'s' if threads > 1 else ''}"
            row = measured(what, taken, 0.0, "")
            seconds = row["median_ms"] / 1000 * EPOCH / size
            unit = f"s per {EPOCH:,} images"
            row = measured(what, taken, seconds, unit, at_most(limit) if limit else None)
            result.append({**row, "threads": threads})
        if "torch" in times:
            what = f"training step of {name} at batch {size}, local convolutions and norms by kernels"
            result.append(compared(what, times, "one", "torch"))
    return result
