"""What rounding its weights does to an ensemble: its size, its accuracy, its answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.rounding import Weights

BATCH = 256
ALLOWED = 0.005  # fall of the accuracy


@dataclass(frozen=True)
class Effect:
    """Of float32 weights that were rounded.

    Attributes:
        weights: what they are now.
        sizes: bytes of the file before and after.
        images: on how many inputs it was measured.
        accuracies: of each prefix before and after; None where the inputs have no labels.
        same: the share of the inputs on which each prefix gives the same answer as before.
    """

    weights: Weights
    sizes: tuple[int, int]
    images: int
    accuracies: list[tuple[float, float]] | None
    same: list[float]

    def __str__(self) -> str:
        """All of it on a line."""
        before, after = self.sizes
        parts = [f"{self.weights} weights: {before:,} -> {after:,} bytes"]
        if self.accuracies is None:
            parts.append("accuracy unknown, as no labelled validation inputs are at hand")
            on = f" on {self.images:,} inputs"
        else:
            first, second = self.accuracies[-1]
            parts.append(f"accuracy on {self.images:,} validation inputs {100 * first:.2f}% -> {100 * second:.2f}%")
            on = ""
        least = min(self.same)
        of_each = "" if least == self.same[-1] else f", {100 * least:.2f}% or more of each prefix"
        return "; ".join([*parts, f"{100 * self.same[-1]:.2f}% of the answers stay{on}{of_each}"])

    def falls(self) -> list[str]:
        """The prefixes that lose more than `ALLOWED` of accuracy, in words."""
        return [
            f"{count} students {100 * before:.2f}% -> {100 * after:.2f}%"
            for count, (before, after) in enumerate(self.accuracies or [], 1)
            if before - after > ALLOWED
        ]


def effect_of(
    before: ProgressiveEnsemble,
    after: ProgressiveEnsemble,
    inputs: Tensor,
    labels: Tensor | None,
    weights: Weights,
    sizes: tuple[int, int],
) -> Effect:
    """Compare an ensemble with itself after its weights were rounded.

    Args:
        before: with float32 weights.
        after: with rounded ones.
        inputs: raw inputs (N, *input_shape).
        labels: the right output (N,) of each, where it is known.
        weights: see `Effect`.
        sizes: see `Effect`.
    """
    old, new = answers(before, inputs), answers(after, inputs)
    accuracies = None if labels is None else list(zip(_shares(old == labels), _shares(new == labels), strict=True))
    return Effect(weights, sizes, len(inputs), accuracies, _shares(old == new))


@torch.inference_mode()
def answers(ensemble: ProgressiveEnsemble, inputs: Tensor) -> Tensor:
    """The output that each prefix answers with on raw inputs (N, *input_shape): (prefixes, N)."""
    batches = (ensemble.anytime(ensemble.preprocess(batch)) for batch in inputs.split(BATCH))
    return torch.cat([torch.stack([logits.argmax(-1) for logits in prefixes]) for prefixes in batches], dim=1)


def _shares(right: Tensor) -> list[float]:
    return [float(share) for share in right.double().mean(1)]
