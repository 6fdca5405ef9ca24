"""The handwritten digits embedded in scikit-learn: small enough for tests, and there without a network."""

from pathlib import Path

import numpy as np
import torch
from sklearn import datasets

from pkd_lightning.data.images import ImageSet

TRAIN_FRACTION = 0.7  # the set has no official split


def load_digits(root: Path | str | None = None) -> ImageSet:
    """Load scikit-learn's 1,797 digits.

    Args:
        root: ignored, since the data is part of scikit-learn; it is here so that every source has the same signature.

    Returns:
        images (1797, 1, 8, 8), the source's levels 0..16 scaled to 0..255; 10 classes; the first 1,257 samples
        are the training part.
    """
    bunch = datasets.load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return ImageSet(
        name="digits",
        images=torch.from_numpy(images).unsqueeze(1),
        labels=torch.from_numpy(bunch.target.astype(np.int64)),
        num_classes=10,
        train_size=int(TRAIN_FRACTION * len(images)),
    )
