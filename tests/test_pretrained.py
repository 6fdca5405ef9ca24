"""A pretrained ensemble loads with one call and is the run of the study it claims to be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from experiments.publish import main, publish
from pkd_lightning import pretrained
from pkd_lightning.cost import measure
from pkd_lightning.data.cifar import load_cifar10
from pkd_lightning.data.idx import load_mnist
from pkd_lightning.data.images import ImageSet
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.ensemble import ProgressiveEnsemble, load_student
from pkd_lightning.errors import ConfigError, PKDError, RunError
from pkd_lightning.fitting import predict
from tests.support import tiny_run

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


class Published(NamedTuple):
    """What is published by a name.

    Attributes:
        study: whose run it is.
        job: the run.
        shape: of an image.
        size: of all its files at most, in bytes.
        surely: at most this part of the MACs where a prefix of 99.9% confidence is enough.
        rounding: what the teacher's accuracy may differ by from the study's; of the weights, and of the processor.
        source: what loads the data set.
    """

    study: str
    job: str
    shape: tuple[int, int, int]
    size: int
    surely: float
    rounding: float
    source: Callable[[Path], ImageSet]

    @property
    def results(self) -> dict[str, Any]:
        """Of the run."""
        return json.loads((ROOT / "experiments" / self.study / "results" / f"{self.job}.json").read_text())

    @property
    def data(self) -> DataModule:
        """The split that it was trained on; skips the test where the files are not there."""
        try:
            return DataModule(DataConfig(self.source))
        except PKDError as error:
            pytest.skip(f"no images: {error}")


PUBLISHED = {
    "cifar10": Published("cifar10_best", "long-seed0", (3, 32, 32), 3_000_000, 0.9, 5e-4, load_cifar10),
    "mnist": Published("mnist_best", "anchored-seed0", (1, 28, 28), 500_000, 0.25, 2e-4, load_mnist),
}
each = pytest.mark.parametrize("name", PUBLISHED)


def test_all_are_tested():
    assert pretrained.names() == list(PUBLISHED)


@each
def test_it_is_the_run_of_the_study(name):
    ensemble, teacher = pretrained.load(name)
    results, shape = PUBLISHED[name].results, PUBLISHED[name].shape
    assert len(ensemble) == len(results["rounds"]) == 7
    for member, row in zip(ensemble.members, results["rounds"], strict=True):
        cost = measure(member, shape)
        assert (cost.params, cost.macs_total) == (row["params"], row["macs_total"])
    assert ensemble.macs == [row["macs_total"] for row in results["rounds"]]
    assert [list(scales) for scales in ensemble.scales] == [row["scales"] for row in results["rounds"]]
    assert measure(teacher, shape).params == results["teacher"]["params"]
    assert not ensemble.training
    assert not teacher.training


@each
def test_it_is_small(name):
    sizes = [path.stat().st_size for path in (pretrained.FOLDER / name).iterdir()]
    assert sum(sizes) < PUBLISHED[name].size


@each
def test_images_go_in_and_logits_come_out(name):
    ensemble, teacher = pretrained.load(name)
    x = ensemble.preprocess(torch.zeros(2, *PUBLISHED[name].shape, dtype=torch.uint8))
    with torch.no_grad():
        assert ensemble(x, members=3).shape == teacher(x).shape == (2, 10)


def test_mnist_is_loaded_where_no_name_is_given():
    assert pretrained.load().ensemble.macs == pretrained.load("mnist").ensemble.macs


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ConfigError, match="Did you mean 'mnist'"):
        pretrained.load("minst")


def test_publishing_what_is_not_there_leaves_what_is(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(RunError, match="anchored-seed9"):
        publish(ROOT / "experiments" / "mnist_best", "anchored-seed9", tmp_path / "old")
    assert (tmp_path / "old").exists()


@pytest.mark.parametrize("name", ["/tmp/elsewhere", ".", "..", "a/b", ""])
def test_a_name_that_would_be_another_folder_is_refused(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["publish", "mnist_best", "anchored-seed0", name])
    monkeypatch.setattr("experiments.publish.publish", None)  # nothing is to be written
    with pytest.raises(SystemExit):
        main()
    assert "a name is of letters" in capsys.readouterr().err


def test_publishing_again_gives_the_files_of_the_package(tmp_path):
    weights = ROOT / "experiments" / "cifar10_ablation" / "kept" / "teacher_residual-seed0" / "teacher.safetensors"
    publish(ROOT / "experiments" / "cifar10_best", "long-seed0", tmp_path / "cifar10", weights, "bf16")
    written, there = (
        {path.name: path.read_bytes() for path in (folder / "cifar10").iterdir()}
        for folder in (tmp_path, pretrained.FOLDER)
    )
    assert written == there


def study_of_one(folder):
    """A study whose one run keeps its students, in `folder`; its results, and its teacher's weights."""
    results = tiny_run(folder, "boosting.weak_learner.on_failure=accept")
    (run,) = folder.glob("*/*/results.json")
    (folder / "study" / "results").mkdir(parents=True)
    (folder / "study" / "results" / "one-seed0.json").write_text(json.dumps(results))
    shutil.copytree(run.parent / "students", folder / "study" / "kept" / "one-seed0" / "students")
    return results, run.parent / "teacher" / "teacher.safetensors"


def test_a_run_is_published_with_its_teacher_or_the_one_it_loaded(tmp_path):
    results, weights = study_of_one(tmp_path)
    target = tmp_path / "published"
    with pytest.raises(RunError, match="no teacher"):
        publish(tmp_path / "study", "one-seed0", target)
    assert not target.exists()
    publish(tmp_path / "study", "one-seed0", target, weights)
    shutil.copy(weights, tmp_path / "study" / "kept" / "one-seed0")
    publish(tmp_path / "study", "one-seed0", target)  # replaces it
    assert len(ProgressiveEnsemble.load(target)) == len(results["rounds"])
    assert measure(load_student(target / "teacher"), (1, 8, 8)).params == results["teacher"]["params"]


@pytest.mark.parametrize("teacher", [None, {"members": {}}])
def test_a_run_without_one_teacher_is_not_published(teacher, tmp_path):
    results, weights = study_of_one(tmp_path)
    (tmp_path / "study" / "results" / "one-seed0.json").write_text(json.dumps({**results, "teacher": teacher}))
    with pytest.raises(RunError, match="study one-seed0: has no teacher, or several"):
        publish(tmp_path / "study", "one-seed0", tmp_path / "published", weights)


def test_a_teacher_is_published_with_rounded_weights(tmp_path):
    _, weights = study_of_one(tmp_path)
    publish(tmp_path / "study", "one-seed0", tmp_path / "whole", weights)
    publish(tmp_path / "study", "one-seed0", tmp_path / "half", weights, "bf16")
    whole, half = (load_student(tmp_path / name / "teacher") for name in ("whole", "half"))
    assert half.head.weight.dtype == torch.float32
    torch.testing.assert_close(half.head.weight, whole.head.weight.bfloat16().float(), rtol=0, atol=0)
    assert half.head.bias.equal(whole.head.bias)
    sizes = [(tmp_path / name / "teacher.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < sizes[0]


@pytest.mark.slow
@each
def test_it_is_as_accurate_as_the_study_says(name):
    data, results = PUBLISHED[name].data, PUBLISHED[name].results
    ensemble, teacher = pretrained.load(name)
    labels = data.labels[data.test.start : data.test.stop]
    for model, row, within in (
        (ensemble, results["ensemble"], 2e-4),  # a few images on another processor
        (teacher, results["teacher"], PUBLISHED[name].rounding),
    ):
        accuracy = (predict(model, data, data.test, CPU).argmax(-1) == labels).float().mean()
        assert abs(float(accuracy) - row["accuracy"]) < within


@pytest.mark.slow
@each
def test_it_predicts_from_images_as_they_are_as_accurately(name: str) -> None:
    data, results = PUBLISHED[name].data, PUBLISHED[name].results
    ensemble = ProgressiveEnsemble.load(name)
    rows = range(data.test.start, data.test.stop, 500)
    labels = data.labels[data.test.start : data.test.stop]

    def accuracy(**limits: float) -> tuple[float, float]:
        """Accuracy, and multiply-accumulates an image."""
        answers = [ensemble.predict(data.inputs[i : i + 500].numpy(), **limits) for i in rows]
        found = torch.cat([answer.labels for answer in answers])
        return float((found == labels).float().mean()), float(torch.cat([a.macs for a in answers]).float().mean())

    assert abs(accuracy()[0] - results["ensemble"]["accuracy"]) < 2e-4
    assert abs(accuracy(members=3)[0] - results["rounds"][2]["prefix_accuracy"]) < 2e-4
    right, macs = accuracy(confidence=0.999)
    assert results["ensemble"]["accuracy"] - right < 0.002
    assert macs < PUBLISHED[name].surely * sum(ensemble.macs)
