"""What users bring needs one .py and one .yaml at most, and no change of the package: the files are in tests/outside
and tests/conf.
"""

import io
import json
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from pkd_lightning import memory
from pkd_lightning.boosting.objectives import RoundBatch
from pkd_lightning.checkpoint import save_weights
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.data.signals import SignalSet, load_npz
from pkd_lightning.ensemble import ProgressiveEnsemble, save_description, save_student
from pkd_lightning.errors import ConfigError, DataError, RunError
from pkd_lightning.models import building
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.mamba import Mamba
from pkd_lightning.outputs import Output, Taps, output_of
from pkd_lightning.tasks import ImageClassification, SignalClassification
from pkd_lightning.teacher import CachedTeacher
from tests.outside import attention, averaging, counts
from tests.support import ACCEPT, TINY, tiny_run
from tests.test_run import pkd

CONF = Path(__file__).parent / "conf"
MAMBA = "pkd_lightning.models.classifier.MambaClassifier"

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
    task = ImageClassification((1, 8, 8), 3, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    save_description(tmp_path, [(1.0, 1.0)], task)
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


# ---------------------------------------------------------------------------------- a data source of signals


def waves(samples: int = 240, channels: int = 2, length: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Signals of three frequencies under noise, on another scale in each channel."""
    rng = np.random.default_rng(0)
    labels = np.arange(samples) % 3
    time = np.arange(length) * 2 * np.pi / length
    signals = np.sin((1 + labels)[:, None, None] * time + rng.uniform(0, 6, (samples, 1, 1)))
    signals = signals + 0.2 * rng.standard_normal((samples, channels, length))
    return signals * np.array([1.0, 100.0])[:channels, None] + 5, labels


SIGNALS = ("data=signals", "student.common={tokeniser: pixels, seq_len: 16, norm: rms, d_state: 2, head: mean}",
           "~teacher.model.patch_size", "teacher.model.tokeniser=pixels", "+teacher.model.seq_len=16")  # fmt: skip


def test_signals_go_through_a_run_as_images_do(tmp_path: Path) -> None:
    signals, labels = waves()
    np.savez(tmp_path / "waves.npz", signals=signals, labels=labels, train_size=180)
    tiny = [f"data.root={tmp_path / 'waves.npz'}", "data.source._target_=pkd_lightning.data.signals.load_npz"]
    results = tiny_run(tmp_path / "runs", *SIGNALS, *tiny, ACCEPT)
    assert results["dataset"] == "waves"
    assert len(results["rounds"]) == 3
    assert results["rounds"][0]["macs_total"] > 0
    (run,) = (path.parent for path in tmp_path.rglob("results.json"))
    ensemble = ProgressiveEnsemble.load(run)
    assert isinstance(ensemble.task, SignalClassification)
    assert (ensemble.task.input_shape, ensemble.task.num_classes) == ((2, 16), 3)
    raw = torch.from_numpy(signals[:5].astype(np.float32))
    prepared = ensemble.preprocess(raw)
    mean, std = ensemble.task.mean, ensemble.task.std
    torch.testing.assert_close(prepared, (raw - mean) / std)
    assert 60 < float(std[1] / std[0]) < 140
    assert ensemble(prepared).shape == (5, 3)


def test_statistics_of_signals_are_those_of_the_training_originals() -> None:
    signals, labels = waves()
    whole = SignalSet("waves", torch.from_numpy(signals.astype(np.float32)), torch.from_numpy(labels), 3, 180)
    data = DataModule(DataConfig(lambda root: whole))
    prepared = data.task.prepare(data.inputs[: data.originals]).double()
    assert prepared.mean((0, 2)).abs().max() < 1e-5
    assert (prepared.std((0, 2), correction=0) - 1).abs().max() < 1e-5
    assert data.task.prepare(data.inputs[data.test.start :]).double().mean((0, 2)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"signals": np.zeros((4, 8))}, "has no array labels; it has signals"),
        ({"signals": np.zeros((4, 8)), "labels": np.array(list("abab"))}, "labels: must be numbers, not of type <U1"),
        (
            {"signals": np.zeros((4, 8)), "labels": np.array([0.0, 1, 0, 1])},
            "labels: must be whole numbers, not of type float64",
        ),
        ({"signals": np.zeros((4, 1, 8, 8)), "labels": np.arange(4) % 2}, "torch.float32 of shape (4, 1, 8, 8), not"),
        ({"signals": np.full((4, 8), np.nan), "labels": np.arange(4) % 2}, "4 signals hold values that are not finite"),
        ({"signals": np.zeros((4, 8)), "labels": np.array(2)}, "labels are a single value"),
        ({"signals": np.array([[{}]]), "labels": np.arange(1)}, "signals: must be numbers, not of type object"),
        ({"signals": np.zeros((4, 0)), "labels": np.arange(4) % 2}, "have no values"),
        (
            {"signals": np.zeros((4, 8)), "labels": np.arange(5) % 2},
            "labels are torch.int64 of shape (5,), not",
        ),
        (
            {"signals": np.zeros((4, 8)), "labels": np.arange(4) % 2, "train_size": 9},
            "train_size=9 is not within",
        ),
    ],
)
def test_a_file_without_such_signals_is_one_error(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(DataError) as error:
        load_npz(str(tmp_path / "mine.npz"))
    assert said in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut", b"no archive"])
def test_a_file_that_cannot_be_read_is_one_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        load_npz(str(path))
    np.savez_compressed(path, signals=waves()[0], labels=waves()[1])
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        load_npz(str(path))
    np.save(tmp_path / "mine.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"mine\.npy: cannot be read as a \.npz file"):
        load_npz(str(tmp_path / "mine.npy"))
    with pytest.raises(DataError, match=r"data\.root: must name a \.npz file"):
        load_npz()


def with_header(array: np.ndarray[Any, Any], **changes: object) -> bytes:
    """The content of a .npy file whose header states other than the array is."""
    whole, content = io.BytesIO(), io.BytesIO()
    np.save(whole, array)
    npy.write_array_header_1_0(content, {**npy.header_data_from_array_1_0(array), **changes})
    return content.getvalue() + whole.getvalue()[-array.nbytes :]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        # multiplied by NumPy as int64, the second of these is 0
        ("signals", with_header(np.zeros((4, 8)), shape=(10**12, 8)), "(1000000000000, 8), 64,000,000,000,000 bytes"),
        ("signals", with_header(np.zeros((4, 8)), shape=(2**40, 2**40)), "bytes; the archive has 256 bytes"),
        ("signals", with_header(np.zeros((4, 8)), shape=(4, 7)), "shape (4, 7), 224 bytes; the archive has 256 bytes"),
        ("labels", with_header(np.arange(4) % 2, shape=(10**12,)), "shape (1000000000000,), 8,000,000,000,000 bytes"),
        ("train_size", with_header(np.arange(3), shape=(10**12,)), "bytes; the archive has 24 bytes"),
        ("labels", b"no array", "cannot be read as a .npz file (ValueError"),
    ],
)
def test_an_array_of_another_size_than_its_header_states_is_not_read(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.npz"
    arrays = {"signals": with_header(np.zeros((4, 8))), "labels": with_header(np.arange(4) % 2)}
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in {**arrays, name: content}.items():
            archive.writestr(f"{key}.npy", value)
    with pytest.raises(DataError, match=rf"mine\.npz: ({name}: the header states )?") as error:
        load_npz(str(path))
    assert said in str(error.value)


def test_an_array_that_memory_has_no_room_for_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, zeros = tmp_path / "mine.npz", np.zeros((2**10, 2**12), np.float32)  # 16 MiB
    np.savez_compressed(path, signals=zeros, labels=np.arange(2**10) % 2)
    assert path.stat().st_size < zeros.nbytes / 500
    monkeypatch.setattr("pkd_lightning.memory.available_memory", lambda: 10**6)
    said = r"mine\.npz: signals: reading it takes 33,554,432 bytes of memory, and 1,000,000 are available"
    tracemalloc.start()
    with pytest.raises(DataError, match=said):
        load_npz(str(path))
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_available_memory_is_within_the_limit_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "none", limit))
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.available_memory() == physical
    meminfo.write_text("MemTotal:  90 kB\nMemAvailable:   40 kB\nSwapFree:   2 kB\nHugePages_Total:   0\n")
    limit.write_text("max\n")
    assert memory.available_memory() == 42 * 1024
    limit.write_text("2048\n")
    assert memory.available_memory() == 2048
    memory.check_memory(2048, "here", DataError)
    with pytest.raises(RunError, match="here: reading it takes 2,049 bytes"):
        memory.check_memory(2049, "here", RunError)


# ---------------------------------------------------------------------------------- another task


def test_another_task(tmp_path: Path) -> None:
    model = "tests.outside.counts.Perceptron"
    results = tiny_run(
        tmp_path, "data=counts", "data.source._target_=tests.outside.counts.load", f"student.model={model}",
        "~student.common", "student.rungs=[{width: 4}, {width: 6}, {width: 8}]", "~teacher.model",
        f"+teacher.model={{_target_: {model}, _partial_: true, width: 16}}", "+name=counts", ACCEPT,
    )  # fmt: skip
    assert results["ensemble"]["accuracy"] <= results["rounds"][-1]["prefix_top_2"] <= 1
    assert 0 < results["teacher"]["top_2"] <= 1
    (run,) = (path.parent for path in tmp_path.rglob("results.json"))
    ensemble = ProgressiveEnsemble.load(run)
    assert isinstance(ensemble.task, counts.LogCounts)
    raw = counts.load().counts[:7]
    torch.testing.assert_close(ensemble.preprocess(raw), (raw + ensemble.task.offset).log())


def test_a_task_that_a_file_names_is_imported_only_where_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "configured", set())
    save_student(MambaClassifier((1, 8, 8), 3, seq_len=4), tmp_path / "00", MAMBA, {"seq_len": 4}, (1, 8, 8), 3)
    save_description(tmp_path, [(1.0, 1.0)], counts.LogCounts((1, 8, 8), 3, 2.5))
    with pytest.raises(RunError, match=r"task='tests.outside.counts.LogCounts': is not of pkd_lightning"):
        ProgressiveEnsemble.load(tmp_path)
    task = ProgressiveEnsemble.load(tmp_path, trust="tests.outside.counts").task
    assert isinstance(task, counts.LogCounts)
    assert task.offset == 2.5
    content = json.loads((tmp_path / "ensemble.json").read_text())
    for name, value in (("task", "os.system"), ("task", "pkd_lightning.models.mamba.Mamba"), ("input_shape", [1, "x"])):
        (tmp_path / "ensemble.json").write_text(json.dumps({**content, name: value, "blake2b": None}))
        with pytest.raises(RunError, match=r"ensemble\.json"):
            ProgressiveEnsemble.load(tmp_path, trust=True)


def test_an_ensemble_of_an_earlier_version_has_the_task_of_its_images(tmp_path: Path) -> None:
    """Its ensemble.json has the statistics alone, its students their `image_shape`."""
    model = MambaClassifier((2, 8, 8), 3, seq_len=4)
    save_student(model, tmp_path / "00", MAMBA, {"seq_len": 4}, (2, 8, 8), 3)
    student = json.loads((tmp_path / "00.json").read_text())
    student["image_shape"] = student.pop("input_shape")
    for entry in (student, old := {"scales": [[0.0, 1.0]], "mean": [0.1, 0.2], "std": [0.3, 0.4]}):
        entry.pop("blake2b", None)
    (tmp_path / "00.json").write_text(json.dumps(student))
    (tmp_path / "ensemble.json").write_text(json.dumps(old))
    ensemble = ProgressiveEnsemble.load(tmp_path)
    assert isinstance(ensemble.task, ImageClassification)
    assert (ensemble.task.input_shape, ensemble.task.num_classes) == ((2, 8, 8), 3)
    raw = torch.randint(0, 256, (3, 2, 8, 8), dtype=torch.uint8)
    expected = (raw / 255 - torch.tensor([0.1, 0.2])[:, None, None]) / torch.tensor([0.3, 0.4])[:, None, None]
    torch.testing.assert_close(ensemble.preprocess(raw), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ensemble(expected), model(expected))


# ---------------------------------------------------------------------------------- a second teacher


def test_two_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        tiny_run(tmp_path / "alone", f"seed={seed}", "boosting.rounds=1", "name=alone")
    weights = sorted((tmp_path / "alone").rglob("teacher.safetensors"))
    flags = ("teacher=two", f"teacher.model.weights=[{weights[0]},{weights[1]}]", "boosting.rounds=2", ACCEPT)
    results = tiny_run(tmp_path / "both", *flags)
    (run,) = (path.parent for path in (tmp_path / "both").rglob("results.json"))
    assert results["wall_seconds"]["teacher"] == 0
    assert not any('"stage": "teacher"' in line for line in (run / "metrics.jsonl").read_text().splitlines())
    (logits,) = load_file(next((tmp_path / "both").rglob("logits.safetensors"))).values()
    each = [next(iter(load_file(path).values())) for path in (tmp_path / "alone").rglob("logits.safetensors")]
    torch.testing.assert_close(logits, (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-5)
    # the same command shows what it has
    monkeypatch.setattr("pkd_lightning.boosting.loop.BoostingLoop.run", None)
    assert tiny_run(tmp_path / "both", *flags) == results


def test_a_student_without_a_parameter_to_train_is_still_a_fault(tmp_path: Path) -> None:
    weights = tmp_path / "none.safetensors"
    options = {"tokeniser": "patches", "norm": "rms", "d_state": 2, "head": "mean"}  # as in the tiny ladder
    model = MambaClassifier((1, 8, 8), 3, d_model=2, **options)
    save_weights(model, weights)
    rungs = f"student.rungs=[{{weights: [{weights}], d_model: 2}}]"
    student = ("student.model=tests.outside.two_teachers.TwoTeachers", rungs)
    with pytest.raises(ConfigError, match="a training step on 2 inputs fails"):
        tiny_run(tmp_path / "runs", *student, "student.repeat=true")


# ---------------------------------------------------------------------------------- a launcher


def test_a_launcher_of_hydra_needs_a_yaml_alone(tmp_path: Path) -> None:
    flags = ("boosting.rounds=1", "seed=0,1", "hydra/launcher=mine", "run_root=here")
    done = pkd("--multirun", *TINY, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("here/digits/*/DONE"))) == 2
    (file,) = tmp_path.glob("here/.sweeps/*/multirun.yaml")
    composed = OmegaConf.load(file).hydra
    assert composed.runtime.choices["hydra/launcher"] == "mine"
    assert composed.launcher == OmegaConf.load(CONF / "hydra" / "launcher" / "mine.yaml")
