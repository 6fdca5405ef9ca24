"""The teacher of Mamba-PKD's Table 2 as it is initialised: how many logits are finite, and what a training step takes.

python -m experiments.cifar10_paper.teacher    # some minutes of one core; writes teacher.json beside it
"""

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn

from experiments.tables import table
from pkd_lightning.assembling import assemble
from pkd_lightning.checkpoint import read_json, write_json
from pkd_lightning.cli import load_config
from pkd_lightning.data.module import DataModule
from pkd_lightning.evaluate import hardware
from pkd_lightning.seeding import seeded

FILE = Path(__file__).with_name("teacher.json")
SEEDS, BATCH, STEPS = (0, 1, 2), 32, 3  # the paper's batch
IMAGES = 37_800  # of training: 60,000, less 30% for the test and a tenth of the rest for validation
EPOCHS = 50


def initialised(seed: int) -> nn.Module:
    """The teacher as a run of this seed begins with it."""
    with seeded(seed, "teacher", "init"):
        model: nn.Module = instantiate(load_config("experiment=cifar10_paper", "teacher=paper_cifar10").teacher.model)(
            image_shape=(3, 32, 32), num_classes=10
        )
    return model


@torch.no_grad()
def finite(model: nn.Module, images: Tensor) -> int:
    """Of how many images the logits are finite."""
    return int(model(images).isfinite().all(1).sum())


def step_seconds(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Seconds of one training step, the median of several."""
    found = []
    for _ in range(STEPS):
        start = time.perf_counter()
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Measure, and write the file."""
    torch.set_num_threads(1)
    data = DataModule(assemble(load_config("experiment=cifar10_paper", f"data.limit={10 * BATCH}")).data)
    images, labels = data.inputs[:BATCH], data.labels[:BATCH]
    read = {"standardised": data.task.prepare(images), "from 0 to 1": images / 255}
    found = {name: [finite(initialised(seed), given) for seed in SEEDS] for name, given in read.items()}
    seconds = step_seconds(initialised(SEEDS[0]), read["from 0 to 1"], labels)
    write_json(FILE, {"finite": found, "images": BATCH, "step_seconds": seconds, "hardware": hardware()})
    print(as_table())


def as_table() -> str:
    """How many logits are finite, and what a step, an epoch and a training take."""
    measured = read_json(FILE)
    epoch = IMAGES / measured["images"] * measured["step_seconds"] / 3600
    finite = [", ".join(f"{count} of {measured['images']}" for count in row) for row in measured["finite"].values()]
    head = [f"logits that are finite, pixels {name}, seeds 0 to {len(SEEDS) - 1}" for name in measured["finite"]]
    head.append(f"seconds a step of {measured['images']} ({measured['hardware']['cpu']}, one core)")
    head += [f"hours an epoch of {IMAGES:,}", f"days for {EPOCHS}"]
    return table(head, [[*finite, f"{measured['step_seconds']:.1f}", f"{epoch:.1f}", f"{EPOCHS * epoch / 24:.0f}"]])


if __name__ == "__main__":
    main()
