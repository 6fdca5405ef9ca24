"""The models whose blocks and training steps are timed: Mamba-PKD's students and teacher on MNIST, and patch models."""

from typing import Any

import torch
from torch import Tensor

from pkd_lightning.models.classifier import MambaClassifier

BATCH = 32
STUDENTS: dict[str, dict[str, Any]] = {
    "S1": {"n_blocks": 1, "d_state": 16, "d_state_step": 2, "seq_len": 49},
    "S3": {"n_blocks": 1, "d_state": 64, "d_state_step": 2, "seq_len": 196},
    "S5": {"n_blocks": 7, "d_state": 32, "d_state_step": 2, "seq_len": 196},
    "S7": {"n_blocks": 14, "d_state": 32, "d_state_step": 2, "seq_len": 784},
}
TEACHER = {"teacher": {"n_blocks": 28, "d_state": 128, "d_state_step": 2, "seq_len": 784, "dt_rank": 2}}
PATCHES: dict[str, dict[str, Any]] = {
    f"patches, d_model {d_model}": {"tokeniser": "patches", "patch_size": 4, "d_model": d_model, "head": "mean"}
    for d_model in (16, 64)
}
# of conf/student/mnist_best.yaml the last rung, of conf/teacher/mnist_best.yaml all; a test compares them
BEST: dict[str, dict[str, Any]] = {
    name: {"tokeniser": "convolutions", "norm": "rms", "direction": "cross", "head": "grid", "patch_size": 5,
           "padding": True, **options}
    for name, options in (
        ("mnist_best S7", {"n_blocks": 3, "d_model": 16, "d_state": 8, "stem_channels": 16}),
        ("mnist_best teacher", {"n_blocks": 4, "d_model": 31, "d_state": 4, "stem_channels": 12}),
    )
}  # fmt: skip
BEST_BATCH = 128


def classifier(options: dict[str, Any]) -> MambaClassifier:
    """A model for MNIST, initialised alike every time."""
    torch.manual_seed(0)
    return MambaClassifier((1, 28, 28), 10, **options)


def batch(size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 28, 28, generator=draw), torch.randint(10, (size,), generator=draw)
