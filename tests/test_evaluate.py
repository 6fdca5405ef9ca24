"""The evaluation on the test part: its numbers, its memory, and models whose logits are not finite there."""

import itertools
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning import evaluate as evaluation
from pkd_lightning import matrix, metrics
from pkd_lightning.checkpoint import write_json
from pkd_lightning.cost import Cost, Latency
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import RunError
from pkd_lightning.exits import MARGIN, calibrate
from pkd_lightning.metrics import calibration_error, quality
from tests.support import patterns, tiny_run

SCALES = [(1.0, 1.0), (0.6, 0.4), (0.7, 0.3)]
NAN_ROWS = [2, 50]  # in different chunks


class Linear(nn.Module):
    """Logits of an image; NaN for the images `poison` (rows of their pixels), if any."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, poison: Tensor | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(math.prod(image_shape), num_classes)
        self.poison = poison

    def forward(self, images: Tensor) -> Tensor:
        logits = self.layer(images.flatten(1))
        if self.poison is not None:
            hit = (images.flatten(1)[:, None] == self.poison[None]).all(-1).any(-1)
            logits = logits.masked_fill(hit[:, None], math.nan)
        return logits


@pytest.fixture
def parts(monkeypatch):
    """The data, a teacher and three students, to be evaluated with other numbers than their quality."""
    monkeypatch.setattr(evaluation, "latency", lambda forward, image: Latency(1.0, False))
    data = DataModule(DataConfig(partial(patterns, samples=700, classes=5)))
    torch.manual_seed(0)
    members = [Linear(data.task.input_shape, 5) for _ in SCALES]
    teacher = SimpleNamespace(model=Linear(data.task.input_shape, 5))
    return data, teacher, ProgressiveEnsemble(members, SCALES, data.task)


def evaluated(parts, directory: Path):
    data, teacher, ensemble = parts
    records = [{"round": t} for t in range(len(ensemble))]
    return evaluation.evaluate(teacher, ensemble, data, records, torch.device("cpu"), directory)


def test_every_prefix_is_the_ensembles_own(parts, monkeypatch, tmp_path):
    data, teacher, ensemble = parts
    seen = []

    def recorded(logits, labels, teacher=None):
        seen.append((logits.clone(), None if teacher is None else teacher.clone()))
        return {"accuracy": 0.5}

    monkeypatch.setattr(metrics, "quality", recorded)
    monkeypatch.setattr(matrix, "CHUNK_BYTES", 16 * 4 * 5)  # 16 rows at a time
    monkeypatch.setattr(matrix, "MAPPED_BYTES", 0)  # in files
    evaluated(parts, tmp_path)
    images = data.task.prepare(data.inputs[data.test.start :])
    with torch.no_grad():
        expected = [teacher.model(images)]
        for t, member in enumerate(ensemble.members):
            expected += [member(images), ensemble(images, members=t + 1)]
    order = [logits for logits, _ in seen]
    alone_first = [order[0], *(order[i] for t in range(3) for i in (2 + 2 * t, 1 + 2 * t))]
    for found, right in zip(alone_first, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(given, order[0]) for _, given in seen[1:])
    assert list(tmp_path.iterdir()) == []  # and nothing is left there


def test_three_matrices_of_logits_and_two_of_validation_rows_whatever_the_number_of_students(
    parts, monkeypatch, tmp_path
):
    made, filled = [], []
    predict = evaluation.predict

    def recorded_scratch(samples, columns, directory):  # which maps large ones
        made.append(matrix.scratch(samples, columns, directory))
        return made[-1]

    def recorded_predict(*arguments, out):
        filled.append(out)
        return predict(*arguments, out=out)

    monkeypatch.setattr(evaluation, "scratch", recorded_scratch)
    monkeypatch.setattr(evaluation, "predict", recorded_predict)
    evaluated(parts, tmp_path)
    assert [tuple(one.shape) for one in made] == [(210, 5)] * 3 + [(49, 5)] * 2
    assert len(filled) == 4 + 3  # each student on the validation rows, too
    assert all(any(out is one for one in made) for out in filled)


def test_early_exits_are_calibrated_on_validation_rows_and_measured_on_test_rows(parts, monkeypatch, tmp_path):
    data, _, ensemble = parts
    for member in ensemble.members:
        with torch.no_grad():
            member.layer.weight.mul_(20)  # so that images leave at different prefixes
    found = evaluated(parts, tmp_path)
    macs = list(itertools.accumulate(row["macs_total"] for row in found["rounds"]))
    assert found["exits"]["prefix_macs"] == macs
    held, fresh = (
        list(ensemble.anytime(data.task.prepare(data.inputs[rows.start : rows.stop])))
        for rows in (data.validation, data.test)
    )
    labels = data.labels[data.test.start : data.test.stop]
    points = found["exits"]["rules"]["margin"]["budgeted"]
    assert [point["budget"] for point in points] == [0.4, 0.6, 0.8]  # the first student takes a third of all
    for point in points:
        policy = calibrate(MARGIN, held, macs, point["budget"] * macs[-1])
        logits, _, mean = policy.apply(fresh)
        assert point["thresholds"] == pytest.approx(policy.thresholds, rel=1e-5)
        assert point["macs"] == pytest.approx(mean)
        assert point["accuracy"] == float((logits.argmax(-1) == labels).double().mean())
    assert found["exits"]["rules"]["learned"]["rows"] == 25  # of 49, the others trained it

    monkeypatch.setattr(evaluation, "CALIBRATED_ROWS", 45)
    monkeypatch.setattr(evaluation, "LEARNED_ROWS", 209)
    fewer = evaluated(parts, tmp_path)["exits"]
    assert fewer["rules"]["margin"]["rows"] == 45
    assert fewer["not_learned"].startswith("more than")


def test_of_students_that_cannot_be_counted_there_are_no_early_exits(parts, monkeypatch, tmp_path):
    costs = iter([Cost(1, 1, 1), Cost(1, 1, 1), Cost(1, None, None), Cost(1, 1, 1)])
    monkeypatch.setattr(evaluation, "measure", lambda model, shape: next(costs))
    assert set(evaluated(parts, tmp_path)) == {"teacher", "rounds", "ensemble"}


@pytest.mark.parametrize("who", ["the teacher", "student 2"])
def test_logits_that_are_not_finite_on_test_rows_are_an_error_that_says_which(parts, monkeypatch, tmp_path, who):
    monkeypatch.setattr(matrix, "CHUNK_BYTES", 16 * 4 * 5)
    data, teacher, ensemble = parts
    poison = data.task.prepare(data.inputs[[data.test.start + row for row in NAN_ROWS]]).flatten(1)
    (teacher.model if who == "the teacher" else ensemble.members[1]).poison = poison
    with pytest.raises(RunError, match=rf"logits of {who} are not finite on 2 of 210 test rows \(2, 50, from 0"):
        evaluated(parts, tmp_path)


def test_a_prefix_may_overflow_where_its_students_do_not(parts, tmp_path):
    for member in parts[2].members:
        with torch.no_grad():
            member.layer.bias.fill_(3e38)
    parts[2].scales[1] = (1.0, 1.0)
    with pytest.raises(RunError, match="logits of the ensemble of the first 2 students are not finite on 210 of 210"):
        evaluated(parts, tmp_path)


def test_no_results_are_written_of_a_teacher_that_is_nan_on_a_test_row(tmp_path, monkeypatch):
    predict = evaluation.predict

    def poisoned(model, data, rows, device, out):
        predict(model, data, rows, device, out=out)[3] = math.nan

    monkeypatch.setattr(evaluation, "predict", poisoned)
    with pytest.raises(RunError, match=r"the teacher are not finite on 1 of 48 test rows \(3, from 0"):
        tiny_run(tmp_path, "boosting.rounds=1")
    assert list(tmp_path.rglob("results.json")) == []
    (ensemble,) = tmp_path.rglob("ensemble.json")
    assert len(ProgressiveEnsemble.load(ensemble.parent)) == 1  # the students are kept


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_files_hold_finite_numbers_only(tmp_path, value):
    path = tmp_path / "results.json"
    write_json(path, {"a": [1.5]})
    with pytest.raises(RunError, match=rf"results\.json: not written, rounds\[1\]\.nll is {value}$"):
        write_json(path, {"rounds": [{"nll": 0.1}, {"nll": value}], "scales": [(1.0, 2.0)]})
    assert json.loads(path.read_text()) == {"a": [1.5]}


def test_the_lines_of_metrics_are_json_where_a_loss_is_not_finite(tmp_path):
    with pytest.raises(RunError, match="the loss was not finite"):
        tiny_run(tmp_path, "teacher.trainer.optimizer.lr=1e30", "teacher.trainer.gradient_clip=null")

    def refuse(constant):
        raise AssertionError(constant)

    (metrics,) = tmp_path.rglob("metrics.jsonl")
    (line,) = [json.loads(line, parse_constant=refuse) for line in metrics.read_text().splitlines()]
    assert line["validation_loss"] is None


def counted_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    """Image by image into bins ((b - 1) / bins, b / bins], then the gaps of all bins."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for one, right in zip(confidence, correct, strict=True):
        members.setdefault(math.ceil(one * bins), []).append((one, right))
    gaps = [abs(sum(right for _, right in found) - sum(one for one, _ in found)) for found in members.values()]
    return sum(gaps) / len(correct)


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_that_of_an_independent_count(sharpness, bins):
    generator = torch.Generator().manual_seed(0)
    confidence = (sharpness * torch.randn(500, 4, generator=generator)).softmax(-1).amax(-1)
    correct = torch.rand(500, generator=generator) < 0.7
    expected = counted_calibration_error(confidence.double().numpy(), correct.numpy(), bins)
    assert calibration_error(confidence, correct, bins) == pytest.approx(expected, rel=1e-9)


def test_a_confidence_of_one_is_in_the_last_bin():
    """One image is wrong at confidence 1 and one right at 0.95: in bins of their own they would be 1 and 0.05 off."""
    assert calibration_error(torch.tensor([1.0, 0.95]), torch.tensor([False, True])) == pytest.approx((1.95 - 1) / 2)
    found = quality(torch.tensor([[200.0, 0.0], [math.log(19), 0.0]]), torch.tensor([1, 0]))
    assert found["ece"] == pytest.approx((1.95 - 1) / 2)


def test_quality_by_chunks_is_that_of_all_rows(monkeypatch):
    monkeypatch.setattr(matrix, "CHUNK_BYTES", 16 * 4 * 5)  # 16 rows at a time
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(2, 103, 5, generator=generator)).unbind()
    labels = torch.randint(0, 5, (103,), generator=generator)
    confidence, predicted = logits.softmax(-1).max(-1)
    expected = {
        "accuracy": float((predicted == labels).float().mean()),
        "nll": float(F.cross_entropy(logits.double(), labels)),
        "ece": calibration_error(confidence, predicted == labels),
        "agreement": float((predicted == teacher.argmax(-1)).float().mean()),
    }
    assert quality(logits, labels, teacher) == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}
    assert quality(logits, labels) == {
        key: pytest.approx(expected[key], rel=1e-6) for key in ("accuracy", "nll", "ece")
    }
