"""What a run will do to a model is tried before training: what fails later is found, what works is let through."""

import itertools
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from pkd_lightning.checkpoint import save_weights
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.building import build_classifier
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.run import run
from pkd_lightning.trainer import TrainerConfig
from pkd_lightning.trial import try_model
from pkd_lightning.weights import load_weights
from tests.support import ACCEPT, tiny_config, tiny_run

SHAPE = (1, 8, 8)
CLASSES = 3
IMAGES = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
TRAINER = TrainerConfig(partial(torch.optim.Adam, lr=0.01), lambda progress: 1 - progress, accelerator="cpu")
COUNTER = itertools.count(1)


class Plain(nn.Module):
    """One linear layer."""

    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.head = nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))


class Tied(Plain):
    """One tensor under two names."""

    def __init__(self, image_shape, num_classes):
        super().__init__(image_shape, num_classes)
        n = self.head.in_features
        self.a, self.b = nn.Linear(n, n), nn.Linear(n, n)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x.flatten(1)).relu()).relu())


class Lazy(nn.Module):
    """Its first call gives its layer a size."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, x):
        return self.net(x)


Outputs = namedtuple("Outputs", ["logits", "aux"])


class Auxiliary(Plain):
    def forward(self, x):
        logits = super().forward(x)
        return Outputs(logits, logits) if self.training else logits


class Stateful(Plain):
    def __init__(self, image_shape, num_classes):
        super().__init__(image_shape, num_classes)
        self.scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = nn.Parameter(torch.ones(1))
        return self.scale * super().forward(x)


class Detached(Plain):
    def forward(self, x):
        return super().forward(x).detach()


class OneValuePerChannel(Plain):
    def __init__(self, image_shape, num_classes):
        super().__init__(image_shape, num_classes)
        self.norm = nn.BatchNorm1d(num_classes)

    def forward(self, x):
        return self.norm(super().forward(x))


class Squeezed(Plain):
    """Loses its batch dimension where there is one image."""

    def forward(self, x):
        return super().forward(x).squeeze()


class Asserting(Plain):
    def forward(self, x):
        assert x.shape[-1] == 224
        return super().forward(x)


class Random(Plain):
    def forward(self, x):
        return super().forward(x) + torch.randn(len(x), 1)


class Unsaved(Plain):
    """Computes with random values that its state dict lacks."""

    def __init__(self, image_shape, num_classes):
        super().__init__(image_shape, num_classes)
        self.fixed = torch.randn(num_classes)

    def forward(self, x):
        return super().forward(x) * self.fixed


class Renamed(nn.Module):
    """No two have the same names."""

    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.names = nn.ModuleDict({f"head{next(COUNTER)}": Plain(image_shape, num_classes)})

    def forward(self, x):
        return next(iter(self.names.values()))(x)


class ExtraState(Plain):
    def get_extra_state(self):
        return {"calls": 1}

    def set_extra_state(self, state):
        pass


def attempt(cls, trainer=TRAINER):
    try_model("model", partial(build_classifier, cls, {}, SHAPE, CLASSES), IMAGES, CLASSES, trainer)


@pytest.mark.parametrize("cls", [Plain, Tied, Lazy, OneValuePerChannel])
def test_a_model_that_can_be_trained_and_kept_is_let_through(cls):
    attempt(cls)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Auxiliary, "Outputs in training mode.*aux_logits=false"),
        (Stateful, "first call adds.*scale.*constructor"),
        (Detached, "training step on 2 inputs fails"),
        (Squeezed, r"shape \(3,\) for 1 input of 3 classes, not \(1, 3\)"),
        (Asserting, "cannot read inputs of 1x8x8"),
        (Random, "other logits each time"),
        (Unsaved, "other logits after its weights are saved and loaded"),
        (Renamed, "cannot be saved and loaded"),
        (ExtraState, "dict as '_extra_state'"),
    ],
)
def test_what_would_fail_later_is_a_fault_before_training(cls, words):
    with pytest.raises(ConfigError, match=words):
        attempt(cls)


def test_batches_of_one_image_are_tried_where_they_will_be_trained_on():
    one = TrainerConfig(TRAINER.optimizer, TRAINER.schedule, accelerator="cpu", batch_size=1)
    with pytest.raises(ConfigError, match=r"training step on a batch of one sample.*more than 1 value"):
        attempt(OneValuePerChannel, one)


def test_a_teacher_that_is_only_loaded_need_not_be_trainable():
    attempt(Auxiliary, None)
    attempt(Detached, None)
    with pytest.raises(ConfigError, match="adds"):
        attempt(Stateful, None)


def test_a_lazy_model_is_built_with_all_its_parameters():
    model = build_classifier(Lazy, {}, SHAPE, CLASSES)
    assert [parameter.shape for parameter in model.parameters()] == [(CLASSES, 64), (CLASSES,)]


def students(cls: str) -> tuple[str, ...]:
    """Overrides: a ladder of one class of this module."""
    return (f"student.model=tests.test_trial.{cls}", "~student.common", "student.rungs=[{}]", "student.repeat=true")


def teacher(cls: str) -> tuple[str, ...]:
    """Overrides: a teacher of this module."""
    return ("~teacher.model", f"+teacher.model={{_target_: tests.test_trial.{cls}, _partial_: true}}")


def test_the_faults_of_every_model_are_listed_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        run(tiny_config(tmp_path, *students("Auxiliary"), *teacher("Stateful")))
    student, of_teacher = caught.value.faults
    assert student.startswith("student.rungs")
    assert of_teacher.startswith("teacher.model: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cls", ["Tied", "Lazy"])
def test_tied_and_lazy_models_teach_and_are_taught(cls: str, tmp_path: Path):
    overrides = (*students(cls), *teacher(cls), "boosting.rounds=2", ACCEPT)
    results = tiny_run(tmp_path, *overrides)
    (weights,) = tmp_path.rglob("teacher.safetensors")
    ensemble = ProgressiveEnsemble.load(weights.parents[1])
    assert len(ensemble) == len(results["rounds"]) == 2
    if cls == "Tied":
        assert all(member.b.weight is member.a.weight for member in ensemble.members)
    again = tiny_run(tmp_path, *overrides, f"teacher.checkpoint={weights}", "boosting.rounds=1")
    assert again["teacher"]["nll"] == results["teacher"]["nll"]


def test_tied_weights_are_saved_under_each_name_and_loaded_tied_or_not(tmp_path: Path):
    model = Tied(SHAPE, CLASSES)
    save_weights(model, tmp_path / "tied.safetensors")
    tied, untied = Tied(SHAPE, CLASSES), Tied(SHAPE, CLASSES)
    untied.b.weight = nn.Parameter(torch.zeros(64, 64))
    for other in (tied, untied):
        load_weights(other, tmp_path / "tied.safetensors")
        assert torch.equal(other(IMAGES), model(IMAGES))
    assert tied.b.weight is tied.a.weight


def test_a_student_is_built_from_the_options_that_are_saved():
    assert Ladder("tests.test_trial.Plain", [{"sizes": (4, 2)}]).rungs == [{"sizes": [4, 2]}]
    with pytest.raises(ConfigError, match=r"rungs\.0\.act=ReLU\(\): cannot be saved as JSON"):
        Ladder("tests.test_trial.Plain", [{"act": nn.ReLU()}])
    with pytest.raises(ConfigError, match=r"rungs\.0\.limits=\[0\.0, inf\]: cannot be saved as JSON"):
        Ladder("tests.test_trial.Plain", [{"limits": [0.0, float("inf")]}])
