"""The models whose blocks and training steps are timed: Mamba-PKD's students and teacher on MNIST, and patch models;
of our own ladders the last student and the teacher.
"""

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
# of conf/student/NAME.yaml the last rung, of conf/teacher/NAME.yaml all; a test compares them
BEST: dict[str, dict[str, Any]] = {
    name: {"tokeniser": "convolutions", "norm": "rms", "direction": "cross", "head": "grid", "patch_size": 5,
           "padding": True, **options}
    for name, options in (
        ("mnist_best S7", {"n_blocks": 3, "d_model": 16, "d_state": 8, "stem_channels": 16}),
        ("mnist_best teacher", {"n_blocks": 4, "d_model": 31, "d_state": 4, "stem_channels": 12}),
    )
}  # fmt: skip
CIFAR: dict[str, dict[str, Any]] = {
    name: {"tokeniser": "convolutions", "norm": "rms", "direction": "cross", "head": "grid", "patch_size": 3,
           "padding": True, "stem_channels": 32, "stem_blocks": 4, "local_conv": 3, "n_blocks": 6, "expand": 1,
           "d_state": 2, "d_model": d_model}
    for name, d_model in (("cifar10_best S7", 31), ("cifar10_best teacher", 128))
}  # fmt: skip
BEST_BATCH = 128


def classifier(options: dict[str, Any], image_shape: tuple[int, int, int] = (1, 28, 28)) -> MambaClassifier:
    """A model for images of ten classes, initialised alike every time."""
    torch.manual_seed(0)
    return MambaClassifier(image_shape, 10, **options)


def batch(size: int = BATCH, image_shape: tuple[int, int, int] = (1, 28, 28)) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(size, *image_shape, generator=draw), torch.randint(10, (size,), generator=draw)


def shape_of(name: str) -> tuple[int, int, int]:
    """(channels, height, width) of the images that the model of this name reads."""
    return (3, 32, 32) if name in CIFAR else (1, 28, 28)


def size_of(name: str) -> int:
    """How many images a step of the model of this name reads."""
    return BEST_BATCH if name in {**BEST, **CIFAR} else BATCH
