"""How good logits are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pkd_lightning.matrix import chunks


def quality(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
    """Accuracy, NLL (nats) and calibration error (15 bins) of logits (N, L); agreement with the teacher's, if given.

    By chunks of rows: what is taken in between does not grow with L.
    """
    from torchmetrics.classification import MulticlassAccuracy  # a second and a half, which no prediction needs

    accuracy, nll, agreeing = MulticlassAccuracy(logits.shape[-1], average="micro"), 0.0, 0
    confidence, correct = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.bool)
    for rows in chunks(logits.shape):
        log_p = F.log_softmax(logits[rows], -1)
        largest, predicted = log_p.max(-1)
        accuracy.update(predicted, labels[rows])
        nll += float(F.nll_loss(log_p, labels[rows], reduction="sum"))
        confidence[rows], correct[rows] = largest.exp(), predicted == labels[rows]
        if teacher is not None:
            agreeing += int((predicted == teacher[rows].argmax(-1)).sum())
    values = {"accuracy": float(accuracy.compute()), "nll": nll / len(logits)}
    values["ece"] = calibration_error(confidence, correct)
    return values if teacher is None else {**values, "agreement": agreeing / len(logits)}


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error of predictions in `bins` bins (0, 1/15], ..., (14/15, 1] of equal width.

    sum_b n_b / N * abs(accuracy_b - confidence_b) (Guo et al., arXiv 1706.04599). torchmetrics puts a confidence of
    exactly 1, which float32 often gives, into a bin of its own.

    Args:
        confidence: (N,) largest probability of each row.
        correct: (N,) bool, whether the class of that probability is the label.
        bins: their number.
    """
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    which = torch.bucketize(confidence.double(), inner)  # of a bin's two edges the upper one belongs to it
    surplus = torch.bincount(which, correct.double() - confidence.double(), minlength=bins)
    return float(surplus.abs().sum()) / len(confidence)
