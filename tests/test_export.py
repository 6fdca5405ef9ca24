"""Exported files give what the ensemble gives, and nothing is kept that does not."""

import importlib.util
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import pkd_lightning.export as exporting
from pkd_lightning import pretrained
from pkd_lightning.checkpoint import read_json
from pkd_lightning.data.digits import load_digits
from pkd_lightning.data.idx import load_mnist
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.ensemble import ProgressiveEnsemble, load_student
from pkd_lightning.errors import ConfigError, DataError, PKDError, RunError
from pkd_lightning.export import FORMATS, export
from pkd_lightning.export.command import main
from pkd_lightning.export.facts import Job
from pkd_lightning.export.inputs import inputs_to_check
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.run import main as pkd
from pkd_lightning.tasks import ImageClassification, SignalClassification, Task
from tests.support import ACCEPT, stopped_after, tiny_run
from tests.test_models import scrambled

ROOT = Path(__file__).parent.parent
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
SCALES = [(0.0, 1.0), (0.3, 0.7), (1.0, -0.5), (0.5, 2.0), (0.9, 0.4), (0.2, 1.1), (1.0, 1.0), (0.7, 0.6), (1.0, 0.3)]

GREY, COLOUR, SIGNAL = (1, 9, 14), (3, 12, 10), (2, 24)
STEM = {"tokeniser": "convolutions", "patch_size": 3}
# every option of the classifier at several values; rasters of 3x4 and 2x3 tokens have cells that overlap
CONFIGURATIONS: dict[tuple[int, ...], list[dict[str, Any]]] = {
    GREY: [
        {"seq_len": 126},
        {"seq_len": 21, "d_state": 3, "d_state_step": 2, "n_blocks": 2, "direction": "alternating"},
        {"seq_len": 18, "d_model": 5, "norm": "layer", "head": "grid", "direction": "cross", "n_blocks": 4},
        {"tokeniser": "patches", "patch_size": 3, "patch_stride": 2, "d_model": 12, "norm": "rms", "head": "mean"},
        {**STEM, "stem_channels": 3, "d_model": 9, "padding": True, "norm": "rms", "head": "grid", "d_state": 4},
        {**STEM, "stem_channels": 9, "d_model": 6, "patch_stride": 1, "shared": True, "n_blocks": 3,
         "direction": "cross", "norm": "rms"},
        {**STEM, "stem_channels": 5, "stem_blocks": 2, "d_model": 9, "padding": True, "shared": True, "n_blocks": 2,
         "direction": "alternating", "norm": "layer"},
    ],
    COLOUR: [
        {"seq_len": 30, "pixel_channels": "one", "d_model": 4, "norm": "rms", "d_conv": 1, "local_conv": 5},
        {"seq_len": 36, "pixel_channels": "all", "head": "grid", "residual": False, "n_blocks": 3,
         "direction": "cross"},
        {"seq_len": 90, "pixel_channels": "all", "d_model": 2, "d_conv": 7, "expand": 1},
        {"tokeniser": "patches", "patch_size": 4, "d_model": 17, "dt_rank": 5, "expand": 3, "d_state": 2, "d_conv": 2},
        {"tokeniser": "patches", "patch_size": 5, "patch_stride": 3, "d_model": 8, "head": "grid", "norm": "layer"},
        {**STEM, "patch_size": 4, "stem_channels": 4, "d_model": 6, "padding": True, "direction": "alternating",
         "n_blocks": 2, "norm": "rms", "d_state": 1},
        {**STEM, "stem_channels": 4, "stem_blocks": 5, "d_model": 6, "direction": "cross", "n_blocks": 2,
         "norm": "rms", "head": "mean", "local_conv": 3},
    ],
    SIGNAL: [
        {"seq_len": 24, "d_model": 6, "norm": "layer", "head": "mean"},
        {"seq_len": 16, "pixel_channels": "all", "n_blocks": 2, "direction": "alternating"},
    ],
}  # fmt: skip


def task_of(shape: tuple[int, ...], classes: int) -> Task:
    generator = torch.Generator().manual_seed(1)
    sides = (shape[0], *[1] * (len(shape) - 1))
    mean, std = torch.rand(sides, generator=generator), 0.1 + torch.rand(sides, generator=generator)
    kind = SignalClassification if len(shape) == 2 else ImageClassification
    return kind(shape, classes, mean, std)


def seeded(shape: tuple[int, ...], classes: int, seed: int, **options: Any) -> nn.Module:
    """A classifier of the same weights whatever ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return scrambled(MambaClassifier(shape, classes, **options), seed)


def ensemble_of(shape: tuple[int, ...] = GREY, classes: int = 5, **options: Any) -> ProgressiveEnsemble:
    """One of all configurations of a shape, or of the options given."""
    chosen = [options] if options else CONFIGURATIONS[shape]
    # the best conditioned of 20 draws: rounding the weights changes logits by 2e-6 of their scale, elsewhere by 1e-4
    members = [seeded(shape, classes, t + 100, **one) for t, one in enumerate(chosen)]
    for member in members:  # steps that are neither so short nor so long that states do not count
        with torch.no_grad():
            for name, parameter in member.named_parameters():
                if name.endswith("dt_proj.bias"):
                    parameter.sub_(3)
    return ProgressiveEnsemble(members, SCALES[: len(members)], task_of(shape, classes)).eval()


def inputs_of(shape: tuple[int, ...], count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if len(shape) == 2:
        return torch.randn(count, *shape, generator=generator)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def agrees(ensemble: ProgressiveEnsemble, call: exporting.Call, inputs: Tensor) -> None:
    """Every prefix, within 1e-5 of its logits' scale."""
    for members in range(1, len(ensemble) + 1):
        expected = ensemble(ensemble.preprocess(inputs), members=members)
        given = call(inputs, members)
        assert given.shape == expected.shape
        assert float((given - expected).abs().max()) < 1e-5 * float(expected.abs().max()), members


def small() -> ProgressiveEnsemble:
    """Two small students, for tests of all but their arithmetic."""
    members = [seeded((1, 8, 8), 3, t, seq_len=16, n_blocks=t + 1) for t in range(2)]
    return ProgressiveEnsemble(members, SCALES[:2], task_of((1, 8, 8), 3)).eval()


def usable(name: str) -> bool:
    """Whether the extra, or the program, of a format is here."""
    kind = FORMATS[name]
    return all(map(importlib.util.find_spec, kind.packages)) and (kind.program is None or bool(shutil.which("cc")))


READY = [name for name in FORMATS if usable(name)]
# tracing takes half a second a block: of all configurations two members, with as many kinds of parts as there are
CASES = [(name, shape, None) for name in ("safetensors", "c") if usable(name) for shape in CONFIGURATIONS]
CASES += [(name, shape, some) for name in ("pt2", "onnx") if usable(name)
          for shape, some in ((GREY, (1, 4)), (COLOUR, (1, 4)), (SIGNAL, (0,)))]  # fmt: skip


def safetensors_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def pt2_metadata(path: Path) -> dict[str, str]:
    extra = {"pkd.json": ""}
    torch.export.load(path, extra_files=extra)
    facts = json.loads(extra["pkd.json"])
    return {f"pkd.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def onnx_metadata(path: Path) -> dict[str, str]:
    return dict(pytest.importorskip("onnxruntime").InferenceSession(path).get_modelmeta().custom_metadata_map)


METADATA = {"safetensors": safetensors_metadata, "pt2": pt2_metadata, "onnx": onnx_metadata}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the embedded digits' small patterns."""
    root = tmp_path_factory.mktemp("run")
    tiny_run(root, ACCEPT)
    (done,) = root.rglob("DONE")
    return done.parent


# ------------------------------------------------------------------------------------------------------ all formats


@pytest.mark.parametrize(("format", "shape", "some"), CASES, ids=str)
def test_every_configuration_and_prefix_gives_the_logits_of_the_ensemble(
    format: str, shape: tuple[int, ...], some: tuple[int, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = ensemble_of(shape)
    if some is not None:
        ensemble = ProgressiveEnsemble([ensemble.members[t] for t in some], SCALES[: len(some)], ensemble.task).eval()
    monkeypatch.setattr(exporting, "check", lambda *_: 0.0)  # it is what this test does
    done = export(ensemble, format, tmp_path)
    job = Job(ensemble, done.facts, done.path)
    with FORMATS[format].opened(done.path, job) as call:
        for count in (1, 5):
            agrees(ensemble, call, inputs_of(shape, count))


@pytest.mark.parametrize("format", READY)
def test_a_prefix_of_a_run_is_exported_by_its_directory(format: str, run: Path, tmp_path: Path) -> None:
    done = export(run, format, tmp_path, members=2)
    assert done.path.parent == tmp_path
    assert done.path.name == f"digits-{run.name}-2{FORMATS[format].suffix}"
    assert done.facts.members == 2
    assert done.difference is not None
    assert [path.name for path in tmp_path.iterdir()] == [done.path.name]  # no temporary file is left
    ensemble = ProgressiveEnsemble.load(run)
    prefix = ProgressiveEnsemble(list(ensemble.members)[:2], ensemble.scales[:2], ensemble.task)
    with FORMATS[format].opened(done.path, Job(prefix, done.facts, done.path)) as call:
        agrees(prefix, call, inputs_of((1, 8, 8)))


@pytest.mark.parametrize("format", READY)
def test_what_differs_from_the_ensemble_is_not_kept(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = small()
    (tmp_path / f"ensemble{FORMATS[format].suffix}").write_text("before")
    whole = exporting.prefix_of

    def disturbed(*arguments: Any) -> ProgressiveEnsemble:
        """An ensemble whose second student is another one once it is written."""
        prefix = whole(*arguments)
        anytime = prefix.anytime

        def later(images: Tensor) -> Iterator[Tensor]:
            for t, logits in enumerate(anytime(images)):
                yield logits + (3e-5 * logits.abs().max() if t == 1 else 0)

        monkeypatch.setattr(prefix, "anytime", later)
        return prefix

    monkeypatch.setattr(exporting, "prefix_of", disturbed)
    with pytest.raises(RunError, match=r"not kept.*logits of 2 students differ from the ensemble's by 3\.\de-05"):
        export(ensemble, format, tmp_path, force=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_both_sizes_of_batches_and_every_prefix_are_checked(tmp_path: Path) -> None:
    ensemble, asked = small(), []

    def call(inputs: Tensor, members: int) -> Tensor:
        asked.append((len(inputs), members))
        return ensemble(ensemble.preprocess(inputs), members=members)

    assert exporting.check(call, ensemble, inputs_of((1, 8, 8), 16), tmp_path) == 0
    assert set(asked) == {(1, 1), (1, 2), (7, 1), (7, 2)}
    with pytest.raises(RunError, match="differ"):  # not a number is no agreement
        exporting.check(lambda *_: torch.full((7, 3), torch.nan), ensemble, inputs_of((1, 8, 8), 7), tmp_path)


@pytest.mark.parametrize("format", METADATA)
def test_labels_costs_shape_and_versions_are_in_the_file(format: str, tmp_path: Path) -> None:
    ensemble = small()
    ensemble.labels, ensemble.classes = [3, 5, 8], ["cat", "dog", "ship"]
    done = export(ensemble, format, tmp_path, name='a "name" */')
    first, second = (exporting.facts_of(exporting.prefix_of(ensemble, k), "x", "uint8").macs[-1] for k in (1, 2))
    assert done.facts.macs == [first, second]
    assert isinstance(second, int)
    assert isinstance(first, int)
    assert second > 2 * first
    facts = read_facts(format, done.path)
    assert facts["labels"] == [3, 5, 8]
    assert facts["classes"] == ["cat", "dog", "ship"]
    assert facts["macs"] == [first, second]
    assert facts["input_shape"] == [1, 8, 8]
    assert facts["name"] == 'a "name" */'
    assert str(torch.__version__) in str(facts["versions"])


def test_a_safetensors_file_comes_back_with_the_names_of_its_classes(tmp_path: Path) -> None:
    ensemble = small()
    ensemble.classes = ["cat", "dog", "ship"]
    assert ProgressiveEnsemble.load(export(ensemble, "safetensors", tmp_path).path).classes == ["cat", "dog", "ship"]


def read_facts(format: str, path: Path) -> dict[str, Any]:
    """What a file says of itself, read without this package."""
    texts = METADATA[format](path)
    return {
        key.removeprefix("pkd."): value if key in ("pkd.name", "pkd.input_type", "pkd.weights") else json.loads(value)
        for key, value in texts.items()
        if key.startswith("pkd.")
    }


# -------------------------------------------------------------------------------------------------------- bad input


def test_an_unknown_format_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"must be one of safetensors.*Did you mean 'safetensors'"):
        export(small(), "safetensor")


@pytest.mark.parametrize("members", [0, 3, -1])
def test_members_out_of_range_are_refused(members: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"members={members}: the ensemble has prefixes of 1 to 2"):
        export(small(), "safetensors", tmp_path, members)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "ensemble.safetensors"
    path.write_text("mine")
    with pytest.raises(RunError, match="is there already; --force replaces it"):
        export(small(), "safetensors", tmp_path)
    assert path.read_text() == "mine"
    assert export(small(), "safetensors", tmp_path, force=True).path == path
    assert len(ProgressiveEnsemble.load(path)) == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/out/ensemble\.safetensors: cannot be written \(Not a directory\)"):
        export(small(), "safetensors", tmp_path / "file" / "out")


def test_a_missing_run_is_named_with_the_nearest_pretrained_one() -> None:
    listed = r"mnits: there is no such path.*those are: cifar10, mnist\. Did you mean 'mnist'"
    with pytest.raises(RunError, match=listed):
        export("mnits", "safetensors")


def test_a_folder_without_an_ensemble_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds neither ensemble\.json nor students/ensemble\.json"):
        export(tmp_path, "safetensors", tmp_path)


def test_an_unfinished_run_is_exported_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = stopped_after(2, tmp_path / "runs", monkeypatch)
    with caplog.at_level(logging.WARNING):
        done = export(directory, "safetensors", tmp_path)
    assert "the run is not finished; its first 2 students are loaded" in caplog.text
    assert done.facts.members == 2
    caplog.clear()
    assert len(ProgressiveEnsemble.load(done.path)) == 2
    assert not caplog.text


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = exporting.Format(
        ".x", FORMATS["safetensors"].write, FORMATS["safetensors"].opened, packages=("json", "no_such_package")
    )
    monkeypatch.setitem(FORMATS, "x", kind)
    with pytest.raises(RunError, match=r"needs no_such_package: pip install 'pkd-lightning\[export\]'"):
        export(small(), "x")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    ensemble = small()
    with torch.no_grad():
        ensemble.members[1].head.bias[0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(ConfigError, match=r"member 2: head\.bias is not finite"):
        export(ensemble, "safetensors", tmp_path)


def test_the_ensemble_itself_is_left_as_it_is(tmp_path: Path) -> None:
    ensemble = small().double().train()
    export(ensemble, "safetensors", tmp_path)
    assert ensemble.training
    assert {p.dtype for p in ensemble.parameters()} == {torch.float64}


# ------------------------------------------------------------------------------------------------ inputs to check on


def test_a_run_is_checked_on_its_own_test_images(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = task_of((1, 8, 8), 10)
    config = tmp_path / "config.yaml"
    config.write_text("data: {source: {_target_: pkd_lightning.data.digits.load_digits}, root: null}")
    found = inputs_to_check(task, tmp_path, None)
    test = load_digits().images[1257:]
    assert len(found) == 16
    assert all((test == image).flatten(1).all(1).any() for image in found)
    assert not caplog.text
    # code that is not this package's is not run, and other images are not taken
    for source in ("tests.support.patterns", "pkd_lightning.data.idx.load_idx"):
        config.write_text(f"data: {{source: {{_target_: {source}}}, root: nowhere}}")
        assert inputs_to_check(task, tmp_path, None).float().std() > 70
    assert "checked on random inputs" in caplog.text
    config.write_text("data: {source: {_target_: pkd_lightning.data.digits.load_digits}, root: null}")
    assert inputs_to_check(task_of((1, 9, 8), 10), tmp_path, None).shape[1:] == (1, 9, 8)


def test_the_folder_of_a_runs_students_stands_for_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(exporting, "inputs_to_check", lambda task, *given: asked.append(given) or inputs_of((1, 8, 8)))
    (tmp_path / "link").symlink_to(run)
    for i, place in enumerate((run, run / "students", tmp_path / "link")):
        done = export(place, "safetensors", tmp_path / str(i))
        assert done.path.name == f"digits-{run.name}.safetensors"
        assert read_json(done.path / "00.json") == read_json(run / "students" / "00.json")
    assert asked == [(run.resolve(), None)] * 3


def test_given_images_are_those_it_is_checked_on(tmp_path: Path) -> None:
    file = tmp_path / "images.npy"
    images = inputs_of((1, 8, 8), 9)
    np.save(file, images.numpy())
    assert torch.equal(inputs_to_check(task_of((1, 8, 8), 3), None, file), images)
    for wrong in (images.float(), images[:, 0], images[:0]):
        np.save(file, wrong.numpy())
        with pytest.raises(DataError, match=r"not torch\.uint8 of \(N, \*\(1, 8, 8\)\)"):
            export(small(), "safetensors", tmp_path, images=file)
    file.write_text("no array")
    with pytest.raises(DataError, match=r"images\.npy: cannot be read as an array"):
        export(small(), "safetensors", tmp_path, images=file)
    assert not list(tmp_path.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_line_writes_a_file_and_says_what_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(run), "--format", "safetensors", "--members", "2", "--out", str(tmp_path), "--name", "two"]
    monkeypatch.setattr("sys.argv", ["pkd", "export", *arguments])
    with pytest.raises(SystemExit) as end:
        pkd()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'two-2.safetensors'}: " in said
    assert "2 students, " in said
    assert "multiply-accumulates" in said
    assert "logits are the ensemble's within 0" in said
    assert main(arguments) == 1
    assert "error: " in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


# --------------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("format", READY)
def test_the_pretrained_ensemble_is_as_accurate_as_the_study_says_in_every_format(format: str, tmp_path: Path) -> None:
    try:
        data = DataModule(DataConfig(load_mnist))
    except PKDError as error:
        pytest.skip(f"no MNIST: {error}")
    results = json.loads((ROOT / "experiments" / "mnist_best" / "results" / "anchored-seed0.json").read_text())
    done = export("mnist", format, tmp_path)
    rows = slice(data.test.start, data.test.stop)
    job = Job(pretrained.load("mnist").ensemble, done.facts, done.path)
    with FORMATS[format].opened(done.path, job) as call, torch.inference_mode():
        logits = torch.cat([call(images, 7) for images in data.inputs[rows].split(256)])
    accuracy = float((logits.argmax(-1) == data.labels[rows]).float().mean())
    assert abs(accuracy - results["ensemble"]["accuracy"]) < 2e-4  # a few images on another processor


# ------------------------------------------------------------------------------------------------------- safetensors


def test_one_file_loads_as_the_ensemble(tmp_path: Path, run: Path) -> None:
    done = export(run, "safetensors", tmp_path, name="one")
    expected, given = ProgressiveEnsemble.load(run), ProgressiveEnsemble.load(done.path)
    assert given.scales == expected.scales
    assert type(given.task) is type(expected.task)
    x = expected.preprocess(inputs_of((1, 8, 8)))
    with torch.no_grad():
        assert torch.equal(given(x), expected(x))
    assert not given.training
    again = export(done.path, "safetensors", tmp_path / "again", members=1)  # from the file itself
    assert again.path.name == "one-1.safetensors"
    assert len(ProgressiveEnsemble.load(str(again.path))) == 1
    assert load_student(done.path / "01").state_dict().keys() == expected.members[1].state_dict().keys()


class Own(nn.Module):
    """A user's student."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def test_one_file_trusts_no_code_but_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{__name__}.Own"
    own = (f"student.model={path}", "student.common=null", "student.rungs=[{width: 5}]", "boosting.rounds=1", ACCEPT)
    tiny_run(tmp_path, *own)
    (done,) = tmp_path.rglob("DONE")
    exported = export(done.parent, "safetensors", tmp_path, trust=path)
    monkeypatch.setattr("pkd_lightning.models.building.configured", set())
    with pytest.raises(RunError, match=r"00\.json: its student cannot be built: .*trust="):
        ProgressiveEnsemble.load(exported.path)
    assert len(ProgressiveEnsemble.load(exported.path, trust=path)) == 1
    student = Own((1, 8, 8), 3, 5)
    ensemble = ProgressiveEnsemble([student], SCALES[:1], task_of((1, 8, 8), 3))
    with pytest.raises(ConfigError, match=r"member 1: the options that build a .*Own are not known; export its run"):
        export(ensemble, "safetensors", tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = export(small(), "safetensors", tmp_path).path
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1  # in a tensor of the last student
    path.write_bytes(bytes(changed))
    with pytest.raises(RunError, match=r"ensemble\.safetensors/01\.safetensors: is damaged"):
        ProgressiveEnsemble.load(path)
    path.write_bytes(whole.replace(b'\\"n_blocks\\": 2', b'\\"n_blocks\\": 3'))
    with pytest.raises(RunError, match=r"ensemble\.safetensors/01\.json: is damaged"):
        ProgressiveEnsemble.load(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(RunError, match=r"ensemble\.json: cannot be read"):
        ProgressiveEnsemble.load(path)
    other = pretrained.FOLDER / "mnist" / "00.safetensors"
    with pytest.raises(RunError, match=r"has no ensemble\.json in its metadata: is it a file of pkd export"):
        ProgressiveEnsemble.load(other)
