"""What the two teachers of cifar10_ablation tell their students: their answers on training and on test images.

python -m experiments.cifar10_ablation.teachers    # some minutes of one core; writes teachers.json beside it
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.plan import load_study
from experiments.tables import table
from pkd_lightning.assembling import assemble
from pkd_lightning.checkpoint import read_json, write_json
from pkd_lightning.cli import load_config
from pkd_lightning.data.module import DataModule
from pkd_lightning.fitting import predict
from pkd_lightning.metrics import quality
from pkd_lightning.weights import load_weights

FOLDER = Path(__file__).parent
FILE = FOLDER / "teachers.json"
RUNS = {"Mamba": "independent", "residual network": "independent_residual"}  # that learn from them
TEMPERATURES = (2, 4)  # of the students' loss: of all runs but `independent_soft`, and its own


def teacher_of(run: str) -> tuple[nn.Module, DataModule]:
    """The teacher of a run of the study, and the images, a moved and flipped copy of each beside it."""
    job = next(job for job in load_study(FOLDER).jobs if job.run.name == run)
    config = load_config(*job.overrides, "data.copies=1")
    experiment = assemble(config)
    data = DataModule(experiment.data)
    model = experiment.teacher.build(data.task.input_shape, data.num_classes)
    load_weights(model, Path(config.teacher.checkpoint))
    return model, data


def told(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and cross-entropy, and the entropies of soft labels at the students' temperatures, in nats."""
    soft = {temperature: (logits / temperature).log_softmax(1) for temperature in TEMPERATURES}
    entropies = {f"entropy_{temperature}": float(-(log.exp() * log).sum(1).mean()) for temperature, log in soft.items()}
    found = quality(logits, labels)
    return {"accuracy": found["accuracy"], "cross_entropy": found["nll"], **entropies}


def main() -> None:
    """Ask both, and write the file."""
    torch.set_num_threads(1)
    found = {}
    for name, run in RUNS.items():
        model, data = teacher_of(run)
        copies = data.training[len(data.training) // 2 :]
        parts = {"training": copies, "test": data.test}
        device = torch.device("cpu")
        found[name] = {
            part: told(predict(model, data, rows, device), data.labels[rows.start : rows.stop])
            for part, rows in parts.items()
        }
    write_json(FILE, found)
    print(as_table())


def as_table() -> str:
    """A row a teacher."""
    found = read_json(FILE)
    parts = list(next(iter(found.values())))
    rows = [[name, *(cell for part in parts for cell in cells(by_part[part]))] for name, by_part in found.items()]
    kinds = ("accuracy", "cross-entropy", *(f"entropy at temperature {temperature}" for temperature in TEMPERATURES))
    return table(["teacher", *(f"{part}: {kind}" for part in parts for kind in kinds)], rows)


def cells(values: dict[str, float]) -> list[str]:
    """Of one part of the images."""
    entropies = [f"{values[f'entropy_{temperature}']:.3f}" for temperature in TEMPERATURES]
    return [f"{100 * values['accuracy']:.1f}", f"{values['cross_entropy']:.3f}", *entropies]


if __name__ == "__main__":
    main()
