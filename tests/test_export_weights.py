"""Exported weights in bf16 and int8: what they are rounded to, what the files give, what is said of it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import pkd_lightning.export as exporting
from pkd_lightning import pretrained
from pkd_lightning.data.digits import load_digits
from pkd_lightning.data.idx import load_mnist
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.ensemble import ProgressiveEnsemble, save_description, save_student
from pkd_lightning.errors import ConfigError, PKDError, RunError
from pkd_lightning.export import FORMATS, export, rounded_to
from pkd_lightning.export.c_source import loaded
from pkd_lightning.export.command import main
from pkd_lightning.export.effect import Effect, effect_of
from pkd_lightning.export.facts import Job
from pkd_lightning.export.inputs import validation_of
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.rounding import Weights, joined, restored, round_weights, rounded_names, split, stored
from tests.test_export import (
    CONFIGURATIONS,
    ROOT,
    SCALES,
    ensemble_of,
    inputs_of,
    needs_cc,
    seeded,
    small,
    task_of,
    usable,
)

ROUNDED: tuple[Weights, ...] = ("bf16", "int8")
STORING = [name for name in ("safetensors", "c") if usable(name)]


# ---------------------------------------------------------------------------------------------------------- rounding


def test_int8_has_a_scale_for_each_output_and_errs_by_half_of_it_at_most() -> None:
    weight = torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-30, 30, 7)[:, None, None, None]
    weight[3] = 0
    values, scale = split(weight, "int8")
    assert scale is not None
    assert (values.dtype, values.shape, scale.shape) == (torch.int8, weight.shape, (7,))
    largest = values.flatten(1).abs().amax(1)
    assert largest.tolist() == [127, 127, 127, 0, 127, 127, 127]
    error = (joined(values, scale) - weight).flatten(1).abs().amax(1)
    assert (error <= 0.501 * scale).all()
    assert (error[largest > 0] > 0).all()
    assert joined(-values, scale).equal(-joined(values, scale))  # symmetric


def test_bf16_is_rounded_to_the_nearest() -> None:
    values, scale = split(torch.tensor([[1.0, 1 + 2**-8 + 2**-12, -(1 + 2**-7)]]), "bf16")
    assert scale is None
    assert joined(values, scale).tolist() == [[1.0, 1 + 2**-7, -(1 + 2**-7)]]


def test_an_output_of_one_value_loses_nothing_in_int8() -> None:
    weight = torch.randn(5, 1)
    assert joined(*split(weight, "int8")).equal(weight)
    assert stored({"weight": weight}, ["weight"], "int8").keys() == {"weight"}


@pytest.mark.parametrize("weights", ROUNDED)
def test_layers_are_rounded_and_everything_else_stays(weights: Weights) -> None:
    model = MambaClassifier((1, 8, 8), 3, tokeniser="patches", patch_size=4, n_blocks=2, d_model=4, norm="rms")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    round_weights(model, weights)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    mixer = ("in_proj", "conv1d", "x_proj", "out_proj")
    expected = {f"blocks.{i}.mixer.{name}.weight" for i in range(2) for name in mixer}
    expected |= {"tokens.project.weight", "head.weight"}
    if weights == "bf16":  # in int8 a row of one value stays
        expected |= {f"blocks.{i}.mixer.dt_proj.weight" for i in range(2)}
    assert changed == expected
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_tied_weights_and_tensors_of_ones_own_are_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight
            self.register_buffer("codes", torch.tensor([[1, 2]], dtype=torch.int8))

    model = Model()
    assert set(rounded_names(model)) == {"one.weight", "other.weight"}
    held = stored(model.state_dict(), rounded_names(model), "int8")
    assert held["one.weight"].dtype == torch.int8
    state = restored(held)
    assert state.keys() == model.state_dict().keys()
    assert state["codes"].equal(model.codes)
    assert state["one.weight"].equal(state["other.weight"])
    round_weights(model, "int8")
    assert model.one.weight is model.other.weight
    assert set(rounded_names(nn.Linear(2, 2))) == {"weight"}


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("weights", ROUNDED)
@pytest.mark.parametrize("shape", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("format", STORING)
def test_every_configuration_and_prefix_gives_the_logits_of_the_rounded_ensemble(
    format: str, shape: tuple[int, ...], weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = ensemble_of(shape)
    monkeypatch.setattr(exporting, "check", lambda *_: 0.0)  # it is what this test does
    done = export(ensemble, format, tmp_path, weights=weights)
    rounded, inputs = rounded_to(weights, ensemble), inputs_of(shape)
    with FORMATS[format].opened(done.path, Job(ensemble, done.facts, done.path)) as call, torch.no_grad():
        for members in range(1, len(ensemble) + 1):
            expected = rounded(rounded.preprocess(inputs), members=members)
            scale = float(expected.abs().max())
            assert float((call(inputs, members) - expected).abs().max()) < 3e-5 * scale, members
            plain = ensemble(ensemble.preprocess(inputs), members=members)
            assert float((expected - plain).abs().max()) > 1e-4 * scale, members


@pytest.mark.parametrize("weights", ROUNDED)
@pytest.mark.parametrize("format", STORING)
def test_rounded_weights_may_differ_by_1e_4_and_by_no_more(
    format: str, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = exporting.rounded_to

    def disturbed(by: float) -> None:
        def changed(kind: Weights, ensemble: ProgressiveEnsemble) -> ProgressiveEnsemble:
            rounded = allowed(kind, ensemble)
            rounded.scales = [(a * (1 + by), c * (1 + by)) for a, c in rounded.scales]
            return rounded

        monkeypatch.setattr(exporting, "rounded_to", changed)

    disturbed(3e-5)  # too much for float32
    assert export(small(), format, tmp_path, weights=weights).path.exists()
    monkeypatch.setattr(exporting, "rounded_to", lambda _, one: allowed("bf16", one))
    with pytest.raises(RunError, match=r"not kept.*at most 1e-05 is allowed"):
        export(small(), format, tmp_path, name="float32")
    disturbed(2e-4)
    with pytest.raises(RunError, match=r"not kept.*at most 0\.0001 is allowed"):
        export(small(), format, tmp_path, name="other", weights=weights)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("weights", "dtype", "scales"), [("bf16", "BF16", 0), ("int8", "I8", 1)])
def test_a_safetensors_file_is_smaller_and_loads_as_float32(
    weights: Weights, dtype: str, scales: int, tmp_path: Path
) -> None:
    ensemble = ensemble_of((1, 9, 14), tokeniser="patches", patch_size=3, d_model=32)
    done = export(ensemble, "safetensors", tmp_path, weights=weights)
    assert done.effect is not None
    assert done.effect.sizes[1] == done.path.stat().st_size
    assert done.effect.sizes[0] == export(ensemble, "safetensors", tmp_path / "float32").path.stat().st_size
    assert done.effect.sizes[1] < (0.5 if weights == "int8" else 0.7) * done.effect.sizes[0]
    with safe_open(done.path, "pt") as file:
        assert file.metadata()["pkd.weights"] == weights
        assert file.get_slice("00/head.weight").get_dtype() == dtype
        assert file.get_slice("00/head.bias").get_dtype() == "F32"
        assert sum(name == "00/head.weight.scale" for name in file.keys()) == scales  # noqa: SIM118
    given, expected = ProgressiveEnsemble.load(done.path), rounded_to(weights, ensemble)
    for name, value in given.state_dict().items():
        assert value.dtype == torch.float32
        assert value.equal(expected.state_dict()[name]), name
    again = export(done.path, "safetensors", tmp_path / "again").path  # what was rounded is an ensemble like others
    with safe_open(again, "pt") as file:
        assert file.metadata()["pkd.weights"] == "float32"
        assert file.get_tensor("00/head.weight").equal(expected.state_dict()["members.0.head.weight"])


def test_damaged_scales_are_noticed(tmp_path: Path) -> None:
    path = export(small(), "safetensors", tmp_path, weights="int8").path
    changed = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        scale = file.get_tensor("01/head.weight.scale").numpy().tobytes()
    at = changed.rindex(scale)
    changed[at] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(RunError, match=r"01\.safetensors: is damaged"):
        ProgressiveEnsemble.load(path)


@needs_cc
@pytest.mark.parametrize("flags", [["-O0"], ["-O3", "-march=native"], ["-O3", "-U__GNUC__"]], ids=str)
@pytest.mark.parametrize("weights", [*ROUNDED, "float32"])
def test_compilers_without_vectors_give_the_same(weights: Weights, flags: list[str], tmp_path: Path) -> None:
    ensemble = small()
    path = export(ensemble, "c", tmp_path, weights=weights).path
    if "-U__GNUC__" in flags:  # the headers of the system need it: it is gone after them
        flags, last = flags[:-1], "#include <string.h>\n"
        path.write_text(path.read_text().replace(last, f"{last}#undef __GNUC__\n#undef __clang__\n"))
    rounded = rounded_to(weights, ensemble)
    images, logits = inputs_of((1, 8, 8)), torch.empty(3)
    with loaded(path, path, [*flags, "-Wno-unused-function"]) as predict, torch.no_grad():
        for image, expected in zip(images, rounded(rounded.preprocess(images)), strict=True):
            predict(image.data_ptr(), 2, logits.data_ptr())
            assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------- what is said of it


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_other_formats_say_which_ones_can(format: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--format {format} stores float32 only; int8 is for safetensors, c"):
        export(small(), format, tmp_path, weights="int8")
    with pytest.raises(ConfigError, match=r"weights 'int4': must be one of float32, bf16, int8\. Did you mean 'int8'"):
        export(small(), format, tmp_path, weights="int4")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_accuracy_and_answers_are_those_of_each_prefix() -> None:
    ensemble = small()
    other = small()
    with torch.no_grad():
        other.members[1].head.bias.add_(torch.tensor([100.0, 0.0, 0.0]))  # type: ignore[operator, union-attr]
    inputs = inputs_of((1, 8, 8), 300)  # more than a batch
    with torch.no_grad():
        first, last = (ensemble(ensemble.preprocess(inputs), k).argmax(-1) for k in (1, 2))
        changed = other(other.preprocess(inputs)).argmax(-1)
    labels = last.clone()
    labels[:30] = (labels[:30] + 1) % 3
    effect = effect_of(ensemble, other, inputs, labels, "int8", (10_000, 3_000))
    right = float((first == labels).double().mean())
    assert effect.accuracies is not None
    assert effect.accuracies[0] == pytest.approx((right, right))
    assert effect.accuracies[1] == pytest.approx((0.9, float((changed == labels).double().mean())))
    assert effect.same == pytest.approx([1.0, float((changed == last).double().mean())])
    assert effect.same[1] < 1
    assert effect_of(ensemble, other, inputs, None, "int8", (1, 1)).accuracies is None


def test_the_effect_is_a_line() -> None:
    effect = Effect("int8", (10_000, 3_000), 4900, [(0.5, 0.5), (0.99, 0.9812)], [0.75, 0.9996])
    assert str(effect) == (
        "int8 weights: 10,000 -> 3,000 bytes; accuracy on 4,900 validation inputs 99.00% -> 98.12%; 99.96% of the"
        " answers stay, 75.00% or more of each prefix"
    )
    assert effect.falls() == ["2 students 99.00% -> 98.12%"]
    effect = Effect("bf16", (10_000, 6_000), 16, None, [1.0, 1.0])
    assert str(effect) == (
        "bf16 weights: 10,000 -> 6,000 bytes; accuracy unknown, as no labelled validation inputs are at hand; 100.00%"
        " of the answers stay on 16 inputs"
    )
    assert effect.falls() == []
    assert Effect("int8", (1, 1), 1000, [(0.9, 0.8951)], [1.0]).falls() == []  # half a point is allowed


def digits_config(folder: Path, **split: Any) -> Path:
    """A run's configuration with the embedded digits."""
    data = {"source": {"_target_": "pkd_lightning.data.digits.load_digits"}, "root": None, **split}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps({"data": data}))
    return folder


def test_validation_rows_are_those_of_the_run(tmp_path: Path) -> None:
    task = task_of((1, 8, 8), 10)
    split_of_run = {"split_seed": 3, "validation_fraction": 0.2, "limit": 900}
    source = digits_config(tmp_path / "run", **split_of_run)
    data = DataModule(DataConfig(load_digits, **split_of_run))  # type: ignore[arg-type]
    rows = slice(data.validation.start, data.validation.stop)
    for place in (source, source / "students"):
        found = validation_of(task, place)
        assert found is not None
        assert found[0].equal(data.inputs[rows])
        assert found[1].equal(data.labels[rows])
    assert validation_of(task, None) is None
    assert validation_of(task, tmp_path) is None  # no configuration
    assert validation_of(task_of((1, 9, 8), 10), source) is None  # other images
    assert validation_of(task_of((1, 8, 8), 9), source) is None  # other classes
    assert validation_of(task, digits_config(tmp_path / "wrong", validation_fraction=2)) is None


def digits_run(folder: Path) -> Path:
    """A run of the embedded digits with two students as they were drawn."""
    students = digits_config(folder) / "students"
    options = {"tokeniser": "patches", "patch_size": 4, "d_model": 8}
    path = "pkd_lightning.models.classifier.MambaClassifier"
    for t in range(2):
        student = seeded((1, 8, 8), 10, t, **options)
        save_student(student, students / f"{t:02d}", path, options, (1, 8, 8), 10)
    save_description(students, SCALES[:2], DataModule(DataConfig(load_digits)).task)
    return folder


@pytest.mark.parametrize("format", STORING)
@pytest.mark.parametrize("weights", ROUNDED)
def test_the_command_line_says_what_rounding_did(
    format: str, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = digits_run(tmp_path / "run")
    assert main([str(run), "--format", format, "--out", str(tmp_path), "--weights", weights]) == 0
    said = capsys.readouterr().out
    data, ensemble = DataModule(DataConfig(load_digits)), ProgressiveEnsemble.load(run)
    rows = slice(data.validation.start, data.validation.stop)
    with torch.no_grad():
        x = ensemble.preprocess(data.inputs[rows])
        old, new = (one(x).argmax(-1) for one in (ensemble, rounded_to(weights, ensemble)))
    before, after = (100 * float((found == data.labels[rows]).double().mean()) for found in (old, new))
    assert f"; accuracy on 126 validation inputs {before:.2f}% -> {after:.2f}%; " in said
    assert f"; {100 * float((old == new).double().mean()):.2f}% of the answers stay" in said
    (path,) = tmp_path.glob(f"*{FORMATS[format].suffix}")
    assert f" -> {path.stat().st_size:,} bytes; " in said
    assert "logits are those of the ensemble with such weights within" in said
    assert main([str(run), "--format", format, "--out", str(tmp_path / "plain")]) == 0
    assert "weights:" not in capsys.readouterr().out  # there is nothing to say of float32


def test_a_loss_of_accuracy_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lossy = Effect("int8", (1, 1), 1000, [(0.9, 0.9), (0.9, 0.89)], [1.0, 0.9])
    monkeypatch.setattr(exporting, "effect_of", lambda *_: lossy)
    with caplog.at_level(logging.WARNING):
        done = export(small(), "safetensors", tmp_path, weights="int8")
    assert f"{done.path}: int8 weights cost accuracy: 2 students 90.00% -> 89.00%" in caplog.text


# --------------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("weights", ROUNDED)
@pytest.mark.parametrize("format", STORING)
def test_the_pretrained_ensemble_stays_as_accurate_with_rounded_weights(
    format: str, weights: Weights, tmp_path: Path
) -> None:
    try:
        data = DataModule(DataConfig(load_mnist))
    except PKDError as error:
        pytest.skip(f"no MNIST: {error}")
    results = json.loads((ROOT / "experiments" / "mnist_best" / "results" / "anchored-seed0.json").read_text())
    done = export("mnist", format, tmp_path, weights=weights)
    assert done.effect is not None
    assert done.effect.images == 4900
    assert not done.effect.falls()
    assert min(done.effect.same) > 0.98
    rows = slice(data.test.start, data.test.stop)
    job = Job(pretrained.load("mnist").ensemble, done.facts, done.path)
    with FORMATS[format].opened(done.path, job) as call, torch.inference_mode():
        logits = torch.cat([call(images, 7) for images in data.inputs[rows].split(256)])
    accuracy = float((logits.argmax(-1) == data.labels[rows]).double().mean())
    assert abs(accuracy - results["ensemble"]["accuracy"]) < 2e-3
