"""Classes that no sample has: which they are, and outputs for the others only."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from torch import Tensor

from pkd_lightning.data.sets import LabelledSet
from pkd_lightning.errors import DataError

logger = logging.getLogger(__name__)

EmptyClasses = Literal["renumber", "keep"]
MOST_NAMED = 8


def without_empty(data: LabelledSet, empty: EmptyClasses) -> tuple[LabelledSet, list[int] | None]:
    """Renumber the labels of a set some of whose classes have no sample, or `keep` them, and say which they are.

    An output for a class without samples costs parameters and is never right.

    Returns:
        The set, whose class k has samples for every k, and each class's label in `data`; None where that is k itself.

    Raises:
        DataError: where fewer than two classes have samples.
    """
    present, labels = data.labels.unique(return_inverse=True)  # in ascending order
    if len(present) in (0, data.num_classes):  # without any sample the split says so
        return data, None
    number = data.num_classes - len(present)
    found = f"data set {data.name!r}: no sample has label {ranges(absent(present, data.num_classes))}"
    if empty == "keep":
        logger.warning("%s; these classes have outputs all the same, as data.empty_classes=keep asks for", found)
        return data, None
    if len(present) < 2:
        raise DataError(f"{found}, so there is one class; a classifier needs at least 2")
    logger.warning(
        "%s: the outputs are the other %d classes, in the order of their labels, which results.json and ensemble.json"
        " list; data.empty_classes=keep gives %d more outputs",
        found, len(present), number,
    )  # fmt: skip
    originals = present.tolist()
    named = {} if data.classes is None else {"classes": tuple(data.classes[label] for label in originals)}
    data = replace(data, labels=labels, num_classes=len(present), **named)  # type: ignore[type-var]  # a dataclass
    return data, None if originals[-1] < len(present) else originals


def warn_of_unlearned(training: Tensor, num_classes: int, class_labels: list[int] | None) -> None:
    """Say which classes have no sample among the labels of the training rows, though elsewhere in the set they do."""
    missing = absent(training.unique(), num_classes)
    if class_labels is not None:
        missing = [(label, label) for first, last in missing for label in class_labels[first : last + 1]]
    if missing:
        logger.warning("no training sample has label %s, which cannot be learned", ranges(missing))


def absent(present: Tensor, num_classes: int) -> list[tuple[int, int]]:
    """The numbers below `num_classes` that are not in `present` (ascending), as (first, last) of each range."""
    edges = [-1, *present.tolist(), num_classes]
    return [(low + 1, high - 1) for low, high in pairwise(edges) if high - low > 1]


def ranges(found: Iterable[tuple[int, int]]) -> str:
    """Ranges in words: `3, 10 to 19`, the first of them."""
    words = [str(first) if first == last else f"{first} to {last}" for first, last in found]
    return ", ".join([*words[:MOST_NAMED], *(["..."] if len(words) > MOST_NAMED else [])])
