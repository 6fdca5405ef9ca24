"""CUDA graphs of a model's training step: what is recorded, and what goes to the model itself."""

import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning import graphs
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.errors import ConfigError
from pkd_lightning.fitting import Stage, fit
from pkd_lightning.graphs import Graphs, recorded
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.schedules import cosine
from pkd_lightning.teacher import TeacherModule
from pkd_lightning.trainer import TrainerConfig
from tests.support import patterns

OPTIMIZER = partial(torch.optim.AdamW, lr=0.01)


def settings(**options: Any) -> TrainerConfig:
    given = {"optimizer": OPTIMIZER, "schedule": cosine, "max_epochs": 2, "batch_size": 16, "progress": False}
    return TrainerConfig(**{**given, "accelerator": "cpu", **options})


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


class Recorder:
    """Stands for `torch.cuda.make_graphed_callables`, which needs a GPU: calls the model, and can fail."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.recorded, self.replayed = fails, 0, 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], allow_unused_input: bool) -> nn.Module:
        forward = module.forward
        for _ in range(3):
            forward(*inputs)
        if self.fails:
            raise RuntimeError(self.fails)
        self.recorded += 1
        module.forward = partial(self.replay, forward)  # type: ignore[method-assign]
        return module

    def replay(self, forward: Any, inputs: Tensor) -> Any:
        self.replayed += 1
        return forward(inputs)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    return recorder


def test_a_model_is_recorded_once_for_inputs_of_one_shape(recorder: Recorder) -> None:
    model = network()
    called = Graphs(model)
    for rows in (16, 16, 9, 16):
        images = torch.randn(rows, 1, 8, 8)
        expected = network().load_state_dict(model.state_dict()) and model.eval()(images)
        assert torch.equal(called(images), expected)
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    called(torch.randn(16, 1, 8, 8).double().float().requires_grad_())
    assert recorder.replayed == 4


def test_recording_leaves_buffers_and_the_random_state_as_they_were(recorder: Recorder) -> None:
    model = nn.Sequential(*network(), nn.Dropout())
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert recorded(model, torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))) is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_cannot_be_recorded_is_called_itself(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    recorder.fails = "operation not permitted when stream is capturing\nand more"
    model = network().eval()
    called, images = Graphs(model), torch.randn(16, 1, 8, 8)
    with caplog.at_level(logging.WARNING):
        assert all(torch.equal(called(images), model(images)) for _ in range(2))
    (record,) = caplog.records
    assert "cannot be recorded (operation not permitted when stream is capturing)" in record.message


ON_GPU: Any = SimpleNamespace(is_cuda=True)


def test_graphs_stand_for_the_model_in_plain_training_steps_alone() -> None:
    module = TeacherModule(network(), settings(cuda_graphs=True))
    assert module._can_replay(ON_GPU)
    assert not module._can_replay(SimpleNamespace(is_cuda=False))  # type: ignore[arg-type]
    assert not module._can_replay(ON_GPU, ())  # a student that reads earlier ones, of which there are none
    with torch.no_grad():
        assert not module._can_replay(ON_GPU)
    module.eval()
    assert not module._can_replay(ON_GPU)
    module.train().reuses_graphs = True
    assert not module._can_replay(ON_GPU)
    assert TeacherModule(network(), settings(cuda_graphs=True)).train()._graphs is not None
    tapped = TeacherModule(network(), settings(cuda_graphs=True))
    tapped.taps.modules["1"] = nn.Identity()
    assert not tapped._can_replay(ON_GPU)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True, "mode": "step"}])
def test_there_are_none_unless_asked_for_and_in_the_step_mode(options: dict[str, Any]) -> None:
    assert TeacherModule(network(), settings(**options))._graphs is None


def test_they_are_refused_beside_torch_compile() -> None:
    with pytest.raises(ConfigError, match="choose one"):
        settings(cuda_graphs=True, compile=True)
    with pytest.raises(ConfigError, match="cuda_graphs='yes'"):
        settings(cuda_graphs="yes")


def fitted(tmp_path: Path, model: nn.Module, **options: Any) -> tuple[TeacherModule, dict[str, Tensor]]:
    """A fit on 441 rows: 28 batches an epoch, the last of 9."""
    module = TeacherModule(model, settings(weights="last", **options))
    fit(module, DataModule(DataConfig(partial(patterns, samples=700))), Stage("teacher", 0, tmp_path / "metrics.jsonl"))
    return module, {name: value.cpu() for name, value in module.model.state_dict().items()}


def test_on_the_cpu_a_fit_is_the_same_with_and_without(tmp_path: Path) -> None:
    (_, expected), (_, found) = (fitted(tmp_path, network(), cuda_graphs=asked) for asked in (False, True))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["batch norm", "mamba"])
def test_a_fit_with_graphs_gives_the_weights_of_one_without(name: str, precision: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        if name == "batch norm":
            return network()
        options = {"tokeniser": "patches", "patch_size": 2, "d_model": 8, "d_state": 4, "norm": "rms", "n_blocks": 2}
        return MambaClassifier((1, 8, 8), 3, direction="cross", local_conv=3, **options)

    common = {"accelerator": "gpu", "precision": precision}
    (_, expected), (module, found) = (fitted(tmp_path, model(), cuda_graphs=asked, **common) for asked in (False, True))
    assert module._graphs is not None
    assert module._graphs._replay is not None
    apart = {key: float((value.double() - found[key]).abs().max()) for key, value in expected.items()}
    assert all(gap < (1e-3 if precision == "32-true" else 0.1) for gap in apart.values()), apart


@pytest.mark.gpu
def test_a_model_that_reads_a_value_is_called_itself(caplog: pytest.LogCaptureFixture) -> None:
    class Reading(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.sum() > 0)

    model, images = Reading(4, 3).cuda(), torch.randn(5, 4, device="cuda")
    called = graphs.Graphs(model)
    assert torch.equal(called(images), model(images))
    called(images).sum().backward()
    assert model.weight.grad is not None
    assert "cannot be recorded" in caplog.text
