"""The data path: images a second, as the training loop consumes them, on one core."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import Row, at_least, interleaved, measured
from pkd_lightning.checks import build
from pkd_lightning.data.augment import crop_flip
from pkd_lightning.data.epochs import EpochLoader
from pkd_lightning.data.images import ImageSet
from pkd_lightning.data.module import DataConfig, DataModule

SECONDS = 4.0  # a row's share of the time


def images_like(channels: int, side: int, samples: int) -> Callable[..., ImageSet]:
    """A source of random images."""

    def source(root: object = None) -> ImageSet:
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(256, (samples, channels, side, side), dtype=torch.uint8, generator=draw)
        return ImageSet("random", images, torch.randint(10, (samples,), generator=draw), 10, samples * 6 // 7)

    return source


def module_of(source: Callable[..., ImageSet], **options: object) -> DataModule:
    return DataModule(build(DataConfig, {"source": source, **options}))


def epoch_call(data: DataModule, batch_size: int) -> Callable[[], object]:
    """One epoch of training batches, fetched as `fit` does."""
    epochs = EpochLoader(data.training_loader(batch_size, 0, "bench"))

    def call() -> None:
        for batches in epochs:
            for _ in batches:
                pass

    return call


def rows(rounds: int, mnist: int = 70_000, cifar: int = 60_000) -> list[Row]:
    """What the table and the JSON show, of data sets of so many images."""
    kinds = (
        ("MNIST-sized", partial(module_of, images_like(1, 28, mnist)), (32, 128, 512), at_least(1_000_000)),
        (
            "CIFAR-sized with crop_flip",
            partial(module_of, images_like(3, 32, cifar), augment=crop_flip), (32, 128), at_least(100_000),
        ),
    )  # fmt: skip
    result = []
    for name, make, sizes, target in kinds:
        data = make()
        times = interleaved({str(size): epoch_call(data, size) for size in sizes}, rounds, SECONDS)
        for size, taken in times.items():
            what = f"epoch of {name} images, batch {size}"
            row = measured(what, taken, 0.0, "")
            images = len(data.training) / row["median_ms"] * 1000
            result.append(measured(what, taken, images, "images a second", target))
    return result
