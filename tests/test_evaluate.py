"""Evaluation against counts made by hand."""

import math

import numpy as np
import pytest
import torch

from pkd_lightning.evaluate import calibration_error, quality


def counted_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Image by image into bins ((b - 1) / bins, b / bins], then the mean gap weighed by the bin's share."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities, labels, strict=True):
        confidence = max(row)
        members.setdefault(math.ceil(confidence * bins), []).append((confidence, int(np.argmax(row)) == label))
    gaps = [abs(sum(right for _, right in found) - sum(c for c, _ in found)) for found in members.values()]
    return sum(gaps) / len(labels)


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_that_of_an_independent_count(sharpness: float, bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = sharpness * torch.randn(500, 4, generator=generator)
    labels = torch.where(torch.rand(500, generator=generator) < 0.7, logits.argmax(-1), torch.arange(500) % 4)
    probabilities = logits.softmax(-1)
    expected = counted_calibration_error(probabilities.double().numpy(), labels.numpy(), bins)
    assert float(calibration_error(probabilities, labels, bins)) == pytest.approx(expected, rel=1e-9)


def test_a_confidence_of_one_is_in_the_last_bin() -> None:
    """Half of the images are right at confidence 1 and half wrong at 0.95: apart, the bins would be 0 and 0.95 off."""
    probabilities = torch.tensor([[1.0, 0.0], [0.95, 0.05]])
    labels = torch.tensor([0, 1])
    assert float(calibration_error(probabilities, labels)) == pytest.approx((1.95 - 1) / 2)
    assert quality(torch.tensor([[200.0, 0.0], [math.log(19), 0.0]]), labels)["ece"] == pytest.approx((1.95 - 1) / 2)
