"""Teachers: trained here, loaded from a checkpoint, from another library; and what is refused."""

import fcntl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pkd_lightning import distil, teacher
from pkd_lightning.assembling import assemble
from pkd_lightning.boosting.student import StudentModule
from pkd_lightning.cli import load_config
from pkd_lightning.data.module import Batch, DataModule
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.run import run
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.teacher import cached_logits, fingerprint
from pkd_lightning.weights import load_weights
from tests.support import ACCEPT, TINY, tiny_config, tiny_run

RGB = (
    *(flag for flag in TINY if flag != "teacher=tiny"),
    "teacher=resnet18", "+data.source.channels=3", "+data.source.side=32", "+data.source.classes=10",
    "student.common.patch_size=8",
)  # fmt: skip


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "lightning"])
def test_a_torchvision_resnet_from_a_checkpoint_teaches(form: str, tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=10)
    path = tmp_path / f"teacher.{'safetensors' if form == 'safetensors' else 'ckpt'}"
    if form == "safetensors":
        save_file(resnet.state_dict(), path)
    elif form == "state_dict":
        torch.save(resnet.state_dict(), path)
    else:
        torch.save({"state_dict": {f"model.{name}": value for name, value in resnet.state_dict().items()}}, path)
    results = run(load_config(*RGB, f"teacher.checkpoint={path}", f"run_root={tmp_path}"))
    assert results["teacher"]["params"] == 11_181_642
    assert len(results["rounds"]) == 3

    config = load_config(*RGB, f"teacher.checkpoint={path}", f"run_root={tmp_path}")
    data = DataModule(assemble(config).data)
    resnet.eval()
    (stored,) = tmp_path.rglob("teachers/*/logits.safetensors")
    logits = cached_logits(resnet, data, stored, fingerprint(resnet, data), torch.device("cpu"))
    with torch.no_grad():
        direct = resnet(data.task.prepare(data.inputs[data.validation.start : data.validation.start + 4]))
    torch.testing.assert_close(logits[data.validation.start : data.validation.start + 4], direct, rtol=1e-3, atol=1e-3)
    assert not list(tmp_path.rglob("teacher.json"))  # nothing was trained


class Frozen(MambaClassifier):
    """A model that comes with its weights."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, **options: Any) -> None:
        super().__init__(input_shape, num_classes, **options)
        self.requires_grad_(False)


FROZEN = "teacher.model._target_=tests.test_teacher.Frozen"


@pytest.mark.parametrize(
    ("overrides", "tried", "times"),
    [
        ((FROZEN,), 1, 2),
        ((f"teacher.checkpoint={__file__}",), 1, None),
        ((), 2, 3),  # trained here: its weights are saved, and loaded into another
        ((FROZEN, "objective=attention"), 1, 2),  # for three rungs
    ],
)
def test_a_teacher_is_built_once_to_be_tried_and_once_to_teach(
    overrides: tuple[str, ...], tried: int, times: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pretrained one may take seconds and gigabytes each time."""
    build, built = teacher.build_classifier, []

    def counted(*arguments: Any) -> nn.Module:
        built.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(teacher, "build_classifier", counted)
    experiment = assemble(tiny_config(tmp_path, *overrides))
    experiment.check(DataModule(experiment.data))
    assert len(built) == tried
    if times is not None:
        built.clear()
        tiny_run(tmp_path, *overrides, "boosting.rounds=1", ACCEPT)
        assert len(built) == times


def test_a_teacher_that_does_not_fit_the_images_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read inputs"):
        run(load_config(*RGB, "data.source.channels=1", f"run_root={tmp_path}"))
    with pytest.raises(ConfigError, match=r"gives shape \(2, 10\)"):
        run(load_config(*RGB, "data.source.classes=4", f"run_root={tmp_path}"))


def test_a_missing_checkpoint_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        assemble(tiny_config(tmp_path, "teacher.checkpoint=elsewhere.ckpt"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    for suffix in ("ckpt", "safetensors"):
        path = tmp_path / f"teacher.{suffix}"
        path.write_bytes(content)
        with pytest.raises(RunError, match=f"teacher.{suffix}"):
            tiny_run(tmp_path, f"teacher.checkpoint={path}")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(RunError, match="do not fit"):
        load_weights(torch.nn.Linear(3, 3), path)


def test_a_trained_teacher_can_be_given_to_another_run(tmp_path: Path) -> None:
    first = tiny_run(tmp_path)
    (weights,) = tmp_path.rglob("teacher.safetensors")
    second = tiny_run(tmp_path, f"teacher.checkpoint={weights}", "seed=5")
    assert second["teacher"]["nll"] == first["teacher"]["nll"]
    assert second["rounds"][0]["nll"] != first["rounds"][0]["nll"]


SHIFTED = "data.augment={_target_: pkd_lightning.data.augment.shift, _partial_: true, pixels: 2}"


@pytest.mark.parametrize("online", [True, False])
def test_a_teacher_asked_in_the_step_sees_what_the_student_sees(
    online: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    losses = StudentModule.losses

    def watched(self: StudentModule, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        model = whose[0].model
        asked = self.targets.teacher if self.training else self.targets.known
        given = asked.outputs(batch.index, batch.inputs).logits
        assert not given.requires_grad
        if self.training:  # of augmented images
            seen.append(bool(torch.allclose(given, model(batch.inputs), atol=1e-5)))
            assert torch.equal(given, whose[0].logits[batch.index]) is not online
        else:
            torch.testing.assert_close(given, model(batch.inputs), rtol=1e-4, atol=1e-4)
            assert torch.equal(given, whose[0].logits[batch.index])
        return losses(self, batch)

    whose: list[teacher.Teacher] = []
    prepare = teacher.prepare_teacher
    monkeypatch.setattr(distil, "prepare_teacher", lambda *given: whose.append(prepare(*given)) or whose[0])
    monkeypatch.setattr(StudentModule, "losses", watched)
    tiny_run(tmp_path, SHIFTED, f"teacher.online={str(online).lower()}", "boosting.rounds=2", ACCEPT)
    assert set(seen) == {online}


@pytest.mark.parametrize(
    "flags",
    [
        ("boosting.rounds=2", ACCEPT), ("boosting=mutual", "boosting.rounds=2", "boosting.alpha=0.5"),
        ("boosting.rounds=1", "+teacher.assistants.middle.model=${teacher.model}"),
    ],
)  # fmt: skip
def test_an_online_teacher_is_not_asked_for_validation_rows(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the same in every epoch, so its logits of them are known."""
    rows: list[int] = []
    outputs = teacher.OnlineTeacher.outputs

    def counted(self: teacher.OnlineTeacher, index: torch.Tensor, inputs: torch.Tensor) -> Any:
        rows.extend(index.tolist())
        return outputs(self, index, inputs)

    monkeypatch.setattr(teacher.OnlineTeacher, "outputs", counted)
    results = tiny_run(tmp_path, SHIFTED, "teacher.online=true", *flags)
    assert set(rows) == set(range(results["sizes"]["train"]))


def test_without_augmentation_it_makes_no_difference_when_a_teacher_is_asked(tmp_path: Path) -> None:
    flags = ("boosting.rounds=2", ACCEPT, "trainer.max_epochs=2")
    cached, online = (tiny_run(tmp_path, *flags, f"teacher.online={asked}") for asked in ("false", "true"))
    for one, other in zip(cached["rounds"], online["rounds"], strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-3)
    with pytest.raises(ConfigError, match=r"teacher\.online='perhaps': must be"):
        tiny_run(tmp_path, *flags, "teacher.online=perhaps")


def test_runs_that_load_the_same_teacher_share_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(tmp_path / "first")
    (weights,) = tmp_path.rglob("teacher.safetensors")
    asked = []
    write = teacher.write_logits
    monkeypatch.setattr(teacher, "write_logits", lambda *args: asked.append(args) or write(*args))
    loads = (f"teacher.checkpoint={weights}", "boosting.rounds=1")
    alone = tiny_run(tmp_path / "alone", *loads, "seed=7")
    tiny_run(tmp_path / "shared", *loads)
    shared = tiny_run(tmp_path / "shared", *loads, "seed=7", "name=other", "teacher.trainer.optimizer.lr=0.5")
    assert len(asked) == 2
    assert shared["rounds"][0]["nll"] == alone["rounds"][0]["nll"]
    assert len(list((tmp_path / "shared" / "teachers").iterdir())) == 1
    places = {
        RunDirectory(tiny_config(tmp_path, *loads, other)).shared_teacher("data")
        for other in ("teacher.model.d_state=2", "data.limit=100", "data.split_seed=1", "threads=2", "seed=0")
    }
    assert len(places) == 5


def test_logits_that_another_process_computes_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataModule(assemble(tiny_config(tmp_path)).data)
    path, key, expected = tmp_path / "logits.safetensors", "key", torch.ones(data.validation.stop, 3)
    lock = path.with_suffix(".lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def other_process() -> None:
        while "waiting" not in caplog.text:
            time.sleep(0.01)
        save_file({key: expected}, path)
        lock.close()

    monkeypatch.setattr(teacher, "write_logits", None)  # asking the model itself would fail
    thread = threading.Thread(target=other_process, daemon=True)
    with caplog.at_level("INFO"):
        thread.start()
        found = cached_logits(torch.nn.Identity(), data, path, key, torch.device("cpu"))
    thread.join()
    assert torch.equal(found, expected)


def test_the_fingerprint_follows_weights_and_images(tmp_path: Path) -> None:
    data = DataModule(assemble(tiny_config(tmp_path)).data)
    model = torch.nn.Linear(2, 2)
    one = fingerprint(model, data)
    assert fingerprint(model, data) == one
    other_image, other_label = (DataModule(assemble(tiny_config(tmp_path)).data) for _ in range(2))
    other_image.inputs[0, 0, 0, 0] += 1
    other_label.labels[0] = (other_label.labels[0] + 1) % 3
    two, three = fingerprint(model, other_image), fingerprint(model, other_label)
    with torch.no_grad():
        model.bias[0] += 1e-6
    assert len({one, two, three, fingerprint(model, data)}) == 4


def test_training_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not finite"):
        tiny_run(tmp_path, "trainer.optimizer.lr=1e30", "trainer.gradient_clip=null", "trainer.max_epochs=3")
