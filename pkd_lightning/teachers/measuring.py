"""How much several teachers disagree, and how good each of those that teach is."""

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from pkd_lightning.matrix import chunks


def disagreement(members: Sequence[Tensor], together: Tensor) -> dict[str, float]:
    """How much members differ in what they answer, the class of the largest logit, and in their probabilities.

    Args:
        members: logits (rows, L) of each.
        together: those of their combination.

    Returns:
        `rows`: fraction of the rows on which not all answers are the same. `pairs`: the fraction on which two members'
        differ, mean over the pairs. `kl`: KL(member || combination) in nats, mean over members and rows; for the mean
        of probabilities this is their Jensen-Shannon divergence.
    """
    differing, pairs, kl = 0, 0, 0.0
    between = list(combinations(range(len(members)), 2))
    for rows in chunks(together.shape):
        logits = torch.stack([member[rows] for member in members])
        answers = logits.argmax(-1)
        differing += int((answers != answers[0]).any(0).sum())
        pairs += sum(int((answers[one] != answers[other]).sum()) for one, other in between)
        log_q = together[rows].log_softmax(-1).expand_as(logits)
        kl += float(F.kl_div(log_q, logits.log_softmax(-1), reduction="sum", log_target=True))
    count = len(together)
    return {
        "rows": differing / count,
        "pairs": pairs / (count * max(1, len(between))),
        "kl": kl / (count * len(members)),
    }


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the rows of logits (rows, L) whose largest is that of the label."""
    right = sum(int((logits[rows].argmax(-1) == labels[rows]).sum()) for rows in chunks(logits.shape))
    return right / len(labels)
