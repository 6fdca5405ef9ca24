"""What users bring needs one .py and one .yaml, and no change of the package: the files are in tests/outside
and tests/conf.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.boosting.objectives import RoundBatch
from pkd_lightning.ensemble import ProgressiveEnsemble, save_description, save_student
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.models import building
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.mamba import Mamba
from pkd_lightning.outputs import Output, Taps, output_of
from pkd_lightning.teacher import CachedTeacher
from tests.outside import attention, averaging
from tests.support import ACCEPT, tiny_run

# ---------------------------------------------------------------------------------- a loss on features


def test_a_loss_on_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[bool, tuple[str, ...], tuple[str, ...], bool]] = set()
    loss = attention.AttentionTransfer.loss

    def watched(self: attention.AttentionTransfer, batch: RoundBatch) -> Tensor:
        of_student, of_teacher = batch.student_features, batch.teacher_features
        learns = all(feature.requires_grad for feature in of_student.values()) == torch.is_grad_enabled()
        frozen = not any(feature.requires_grad for feature in of_teacher.values())
        seen.add((learns, tuple(of_student), tuple(of_teacher), frozen))
        assert of_student["blocks.0"].shape[:2] == of_teacher["blocks.0"].shape[:2] == (len(batch.target), 4)
        return loss(self, batch)

    monkeypatch.setattr(attention.AttentionTransfer, "loss", watched)
    flags = ("objective=attention", "boosting.rounds=2", ACCEPT)
    results = tiny_run(tmp_path, *flags)
    assert results["objective"] == "attentiontransfer"
    assert seen == {(True, ("blocks.0",), ("blocks.0",), True)}
    other = tiny_run(tmp_path, *flags, "boosting.objective.beta=0")
    plain = tiny_run(tmp_path, "boosting.rounds=2", ACCEPT)
    assert results["rounds"][0]["nll"] == other["rounds"][0]["nll"]  # the first round has the student alone
    assert results["rounds"][1]["nll"] != other["rounds"][1]["nll"] == plain["rounds"][1]["nll"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "student_features=[blocks.9]",
            "boosting.objective.student_features: 'blocks.9': no module of the model;",
        ),
        ("teacher_features=[bloks.0]", "boosting.objective.teacher_features: 'bloks.0': no module of the model;"),
        ("student_features=[head]", "boosting.objective: fails (RuntimeError"),
    ],
)
def test_features_that_do_not_fit_are_found_before_anything_is_trained(
    override: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_run(tmp_path, "objective=attention", f"boosting.objective.{override}")
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


class Twice(nn.Module):
    """Calls one of its modules twice, another never, and gives an `Output`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.never, self.pair = nn.Linear(3, 3), nn.Linear(3, 3), Pair()

    def forward(self, inputs: Tensor) -> Output:
        return Output(self.pair(self.inner(self.inner(inputs)))[0], {"own": inputs + 1})


class Pair(nn.Module):
    """Gives no tensor."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, inputs


def test_taps_take_what_modules_give_and_leave_no_hook() -> None:
    model, inputs = Twice(), torch.randn(2, 3)
    taps = Taps(model, ["inner"])
    with taps:
        logits, features = taps.call(model, inputs)
    assert list(features) == ["own", "inner"]
    torch.testing.assert_close(features["inner"], model.inner(model.inner(inputs)))  # the last call
    torch.testing.assert_close(logits, features["inner"])
    assert not any(module._forward_hooks for module in model.modules())
    for path, said in (("never", "was not called"), ("pair", "gave a tuple")):
        with Taps(model, [path]) as taps, pytest.raises(ConfigError, match=f"'{path}': this module {said}"):
            taps.call(model, inputs)
    with pytest.raises(ConfigError, match=r"'iner': no module of the model; nearest: inner"):
        Taps(model, ["iner"])
    assert output_of(model(inputs)).features.keys() == {"own"}
    assert output_of(inputs) == Output(inputs)


def test_a_teacher_is_only_called_where_its_features_are_asked_for() -> None:
    logits, inputs, index = torch.randn(5, 3), torch.randn(2, 3), torch.tensor([4, 1])
    model = Twice().train()
    asked = CachedTeacher(logits, model, ["inner"]).outputs(index, inputs)
    assert torch.equal(asked.logits, logits[index])
    torch.testing.assert_close(asked.features["inner"], model.inner(model.inner(inputs)))
    assert not asked.features["inner"].requires_grad
    assert not model.training
    teacher = CachedTeacher(logits, model)
    model.inner = None  # type: ignore[assignment]  # a call would fail
    assert teacher.outputs(index, inputs).features == {}
    assert not list(teacher.parameters())
    assert not teacher.state_dict()


# ---------------------------------------------------------------------------------- a mixer


def test_a_mixer(tmp_path: Path) -> None:
    results = tiny_run(tmp_path, "student=averaging", ACCEPT)
    first, _, last = results["rounds"]
    tokens, head = 4 * 16 * 3, 3 * 3  # 4 tokens of 4x4 pixels; the mean's three classes
    assert first["macs_total"] == first["flops_published"] == tokens + 4 * 3 * 3 + head  # counted: the gate
    assert last["flops_published"] == tokens + 4 * 3 * 3 + 4 * 3 * 12 + head  # of Mamba in_proj alone
    assert last["macs_total"] == tokens + 4 * 3 * 3 + Mamba(3, 2).macs(4) + head
    (run,) = (path.parent for path in tmp_path.rglob("results.json"))
    ensemble = ProgressiveEnsemble.load(run)  # this process has configured the mixer itself
    assert [type(block.mixer).__name__ for block in ensemble.members[2].blocks] == ["Averaging", "Mamba"]
    assert ensemble.members[1].blocks[0].mixer.gain == 2.0


def test_a_mixer_that_a_file_names_is_imported_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "configured", set())
    options = {"tokeniser": "patches", "norm": "rms", "d_model": 3, "head": "mean"}
    mixer = "tests.outside.averaging.Averaging"
    model = MambaClassifier((1, 8, 8), 3, mixer=mixer, **options)
    path = "pkd_lightning.models.classifier.MambaClassifier"
    save_student(model, tmp_path / "00", path, {**options, "mixer": mixer}, (1, 8, 8), 3)
    save_description(tmp_path, [(1.0, 1.0)], torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    monkeypatch.setattr(building, "configured", set())  # as in another process
    with pytest.raises(RunError, match=rf"mixer='{mixer}': is not of pkd_lightning; where you trust its code"):
        ProgressiveEnsemble.load(tmp_path)
    monkeypatch.setattr(averaging, "Averaging", os.system)
    with pytest.raises(RunError, match="must be a class of"):
        ProgressiveEnsemble.load(tmp_path, trust=mixer)
    monkeypatch.undo()
    assert isinstance(ProgressiveEnsemble.load(tmp_path, trust=mixer).members[0].blocks[0].mixer, averaging.Averaging)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixer": "tests.outside.averaging.Averagin"}, "mixer='tests.outside.averaging.Averagin': cannot be imported"),
        ({"mixer": "math.sqrt"}, "mixer='math.sqrt': must be a class of torch.nn.Module"),
        ({"mixer": 3}, "mixer=3: must be the import path of a mixer, or a list of them"),
        ({"mixer": []}, r"mixer=\[\]: must be the import path"),
        ({"mixer": ["a.b", "c.d"], "shared": True}, "blocks that share weights have one mixer"),
        ({"mixer_options": {"gian": 2}}, "mixer_options.gian: no such option"),
        ({"mixer_options": 3}, "mixer_options=3: must be a mapping"),
    ],
)
def test_what_is_no_mixer_is_a_fault(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MambaClassifier((1, 8, 8), 3, **{"tokeniser": "patches", "d_model": 3, "norm": "rms", **options})
