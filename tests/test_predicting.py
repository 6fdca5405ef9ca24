"""`predict` and `stream`: what they answer, what they spend, and where they stop."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pkd_lightning import predicting
from pkd_lightning.data.images import ImageSet
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.data.sets import LabelledSet
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import DataError, InputError, RunError
from pkd_lightning.outputs import Output
from pkd_lightning.predicting import Limits, Pace, Prediction
from pkd_lightning.saved import PRETRAINED
from pkd_lightning.tasks import ImageClassification, SignalClassification
from tests.support import patterns, tiny_run

SHAPE, CLASSES = (1, 6, 4), 5
TASK = ImageClassification(SHAPE, CLASSES, torch.full((1, 1, 1), 0.4), torch.full((1, 1, 1), 0.3))
SCALES = [(0.0, 1.5), (0.7, 0.4), (2.0, 0.1)]
MACS = [24 * 5, 24 * 7 + 7 * 5, 24 * 9 + 9 * 5]
STEPS = [0.010, 0.020, 0.040]  # seconds of each student, on the clock of the tests


class Clock:
    """A clock that students push on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Student(nn.Module):
    """Layers of so many multiplications, which notes how many images it was asked for."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        sizes = [24, CLASSES] if width is None else [24, width, CLASSES]
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
        self.asked: list[int] = []
        self.seconds, self.clock = 0.0, Clock()

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append(len(images))
        self.clock.now += self.seconds
        return 9 * self.layers(images.flatten(1))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(predicting, "clock", found)
    return found


@pytest.fixture
def ensemble(clock: Clock) -> ProgressiveEnsemble:
    torch.manual_seed(0)
    students = [Student(None), Student(7), Student(9)]
    made = ProgressiveEnsemble(students, SCALES, TASK).eval()
    assert made.macs == MACS
    for student, seconds in zip(students, STEPS, strict=True):
        student.asked.clear()
        student.seconds, student.clock = seconds, clock
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (30, *SHAPE), generator=torch.Generator().manual_seed(1)).byte()


def eager(ensemble: ProgressiveEnsemble, images: Tensor, members: int) -> Tensor:
    with torch.no_grad():
        return ensemble(ensemble.preprocess(images), members)


def asked(ensemble: ProgressiveEnsemble) -> list[list[int]]:
    return [list(member.asked) for member in ensemble.members]  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------- what is answered


def test_all_students_are_asked_without_a_limit(ensemble: ProgressiveEnsemble, images: Tensor) -> None:
    answer = ensemble.predict(images)
    logits = eager(ensemble, images, 3)
    torch.testing.assert_close(answer.logits, logits)
    torch.testing.assert_close(answer.probabilities, logits.softmax(-1))
    assert torch.equal(answer.labels, logits.argmax(-1))
    assert answer.students.tolist() == [3] * 30
    assert answer.macs is not None
    assert answer.macs.tolist() == [sum(MACS)] * 30
    assert answer.classes is None
    assert answer.seconds == pytest.approx(sum(STEPS))
    assert len(answer) == 30


def test_one_image_is_a_batch_of_one(ensemble: ProgressiveEnsemble, images: Tensor, tmp_path: Path) -> None:
    Image.fromarray(images[0, 0].numpy()).save(tmp_path / "one.png")
    for given in (images[0], images[0, 0].numpy(), tmp_path / "one.png", str(tmp_path / "one.png")):
        answer = ensemble.predict(given)
        assert len(answer) == 1
        torch.testing.assert_close(answer.logits, eager(ensemble, images[:1], 3))


def test_an_answer_is_no_inference_tensor_and_cannot_be_changed_by_later_ones(
    ensemble: ProgressiveEnsemble, images: Tensor
) -> None:
    answers = list(ensemble.stream(images))
    before = answers[0].logits.clone()
    answers[1].logits.add_(1)
    assert torch.equal(answers[0].logits, before)
    with pytest.raises(AttributeError):
        answers[0].seconds = 0.0  # type: ignore[misc]


def test_a_stream_is_every_prefix_and_asks_no_student_early(ensemble: ProgressiveEnsemble, images: Tensor) -> None:
    for t, answer in enumerate(ensemble.stream(images), 1):
        assert asked(ensemble) == [[30]] * t + [[]] * (3 - t)
        assert answer.students.tolist() == [t] * 30
        assert answer.macs is not None
        assert answer.macs.tolist() == [sum(MACS[:t])] * 30
        assert answer.seconds == pytest.approx(sum(STEPS[:t]))
    assert t == 3
    for t, answer in enumerate(ensemble.stream(images), 1):
        torch.testing.assert_close(answer.logits, eager(ensemble, images, t))


def test_a_stream_reads_images_and_limits_when_it_is_called(ensemble: ProgressiveEnsemble) -> None:
    with pytest.raises(InputError):
        ensemble.stream(torch.zeros(3))
    with pytest.raises(InputError):
        ensemble.stream(torch.zeros(SHAPE), members=4)


def test_rows_are_what_can_be_sent(ensemble: ProgressiveEnsemble, images: Tensor) -> None:
    ensemble.labels, ensemble.classes = [3, 1, 4, 15, 9], ["a", "b", "c", "d", "e"]
    answer = ensemble.predict(images, members=2)
    largest = eager(ensemble, images, 2).argmax(-1).tolist()
    assert answer.labels.tolist() == [ensemble.labels[index] for index in largest]
    assert answer.classes == [ensemble.classes[index] for index in largest]
    row = json.loads(json.dumps(answer.rows()))[4]
    assert row == {
        "class": ensemble.classes[largest[4]],
        "label": ensemble.labels[largest[4]],
        "probability": pytest.approx(float(answer.probabilities[4].max())),
        "students": 2,
        "macs": sum(MACS[:2]),
    }
    ensemble.classes = None
    assert ensemble.predict(images).rows()[4]["class"] == str(ensemble.predict(images).labels[4].item())


def test_signals_are_predicted_too() -> None:
    task = SignalClassification((2, 12), CLASSES, torch.zeros(2, 1), torch.ones(2, 1))
    ensemble = ProgressiveEnsemble([Student(None)], [(0.0, 1.0)], task)
    signals = np.random.default_rng(0).normal(size=(4, 2, 12))
    answer = ensemble.predict(signals)
    torch.testing.assert_close(answer.logits, ensemble(torch.from_numpy(signals).float()).detach())
    assert len(ensemble.predict(signals[0])) == 1


def test_the_answer_of_students_that_read_earlier_ones_counts_each_once() -> None:
    class Reading(Student):
        reads = ()

        def forward(self, images: Tensor, earlier: tuple[Output, ...] = ()) -> Tensor:  # type: ignore[override]
            return super().forward(images) + earlier[-1].logits

    ensemble = ProgressiveEnsemble([Student(None), Reading(7), Reading(9)], SCALES, TASK)
    assert ensemble.macs == MACS
    for member in ensemble.members:
        member.asked.clear()  # type: ignore[union-attr]
    images = torch.zeros(2, *SHAPE).byte()
    answer = ensemble.predict(images)
    assert asked(ensemble) == [[2]] * 3
    torch.testing.assert_close(answer.logits, eager(ensemble, images, 3))


# ---------------------------------------------------------------------------------- limits


def test_members(ensemble: ProgressiveEnsemble, images: Tensor) -> None:
    for members in (1, 2, 3, np.int64(2)):
        answer = ensemble.predict(images, members=int(members))
        torch.testing.assert_close(answer.logits, eager(ensemble, images, int(members)))
        assert answer.students.tolist() == [members] * 30
    assert len(list(ensemble.stream(images, members=2))) == 2


def test_confidence_is_early_exit(ensemble: ProgressiveEnsemble, images: Tensor) -> None:
    expected, used = ensemble.early_exit(ensemble.preprocess(images), 0.7)
    assert len(used.unique()) > 1
    for member in ensemble.members:
        member.asked.clear()  # type: ignore[union-attr]
    answer = ensemble.predict(images, confidence=0.7)
    torch.testing.assert_close(answer.logits, expected)
    assert torch.equal(answer.students, used)
    assert answer.macs is not None
    assert answer.macs.tolist() == [sum(MACS[:count]) for count in used.tolist()]
    assert asked(ensemble) == [[int((used > t).sum())] for t in range(3)]
    last: Prediction | None = None
    for streamed in ensemble.stream(images, confidence=0.7):
        if last is not None:  # those that are done keep their answer
            done = last.probabilities.amax(-1) >= 0.7
            assert torch.equal(streamed.logits[done], last.logits[done])
        last = streamed
    assert last is not None
    torch.testing.assert_close(last.logits, expected)
    assert len(list(ensemble.stream(images, confidence=0.0))) == 1


@pytest.mark.parametrize(("budget", "count"), [(MACS[0], 1), (sum(MACS[:2]) - 1, 1), (sum(MACS[:2]), 2), (1e9, 3)])
def test_a_budget_of_multiply_accumulates(
    ensemble: ProgressiveEnsemble, images: Tensor, budget: float, count: int
) -> None:
    answer = ensemble.predict(images, budget_macs=budget)
    assert answer.students.tolist() == [count] * 30
    assert asked(ensemble) == [[30]] * count + [[]] * (3 - count)


def test_macs_that_cannot_be_counted(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    class Uncounted(Student):
        def __deepcopy__(self, memo: object) -> "Uncounted":
            raise RuntimeError("no copies")

    ensemble = ProgressiveEnsemble([Uncounted(None)], SCALES[:1], TASK)
    assert ensemble.predict(images).macs is None
    assert ensemble.predict(images, budget_ms=5).rows()[0]["macs"] is None
    with pytest.raises(InputError, match="budget_macs=9: the multiply-accumulates of these students cannot be counted"):
        ensemble.predict(images, budget_macs=9)
    assert caplog.messages == ["the students' multiply-accumulates cannot be counted (RuntimeError: no copies)"]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"members": 0}, "members=0: must be a whole number of at least 1"),
        ({"members": 4}, "members=4: the ensemble has prefixes of 1 to 3 students"),
        ({"members": 1.5}, "members=1.5: must be a whole number"),
        ({"members": True}, "members=True: must be"),
        ({"members": "2"}, "members='2': must be"),
        ({"confidence": 95}, "confidence=95: must be a probability from 0 to 1"),
        ({"confidence": -0.1}, "confidence=-0.1: must be"),
        ({"confidence": math.nan}, "confidence=nan: must be"),
        ({"budget_macs": MACS[0] - 1}, "budget_macs=119: does not pay for the first student, which costs 120"),
        ({"budget_macs": -1}, "budget_macs=-1: must be a number of at least 0"),
        ({"budget_ms": -1}, "budget_ms=-1: must be a number of at least 0"),
        ({"budget_ms": math.inf}, "budget_ms=inf: must be"),
        ({"members": 1, "budget_ms": 5.0}, "members and budget_ms are given; give at most one"),
        ({"confidence": 0.5, "budget_macs": 5.0, "budget_ms": 5.0}, "confidence and budget_macs and budget_ms"),
    ],
)
def test_impossible_limits(ensemble: ProgressiveEnsemble, images: Tensor, limits: Any, said: str) -> None:
    for call in (ensemble.predict, ensemble.stream):
        with pytest.raises(InputError, match=said):
            call(images, **limits)
    assert asked(ensemble) == [[], [], []]


# ---------------------------------------------------------------------------------- a budget of time


@pytest.mark.parametrize(("budget", "count"), [(0, 1), (29, 1), (31, 2), (69, 2), (71, 3)])
def test_a_budget_of_time_that_students_took_before(
    ensemble: ProgressiveEnsemble, images: Tensor, budget: float, count: int
) -> None:
    for _ in range(2):
        ensemble.predict(images)
    answer = ensemble.predict(images, budget_ms=budget)
    assert answer.students.tolist() == [count] * 30
    assert answer.seconds == pytest.approx(sum(STEPS[:count]))


def test_the_first_call_does_not_count(ensemble: ProgressiveEnsemble, images: Tensor) -> None:
    for member in ensemble.members:
        member.seconds += 1.0  # type: ignore[operator]  # as while kernels are loaded
    ensemble.predict(images)
    for member in ensemble.members:
        member.seconds -= 1.0  # type: ignore[operator]
    # nothing is known of the second: by its operations it takes 1.7 times as long as the first
    assert ensemble.predict(images, budget_ms=26).students[0] == 1
    assert ensemble.predict(images, budget_ms=32).students[0] == 2
    assert ensemble.predict(images, budget_ms=29).students[0] == 1  # now it is: twice as long


def test_a_call_that_is_slower_than_those_before_stops_earlier(ensemble: ProgressiveEnsemble, images: Tensor) -> None:
    for _ in range(3):
        ensemble.predict(images)
    assert ensemble.predict(images, budget_ms=50).students[0] == 2
    for member in ensemble.members:
        member.seconds *= 2  # type: ignore[operator]  # another process wants the core
    assert ensemble.predict(images, budget_ms=50).students[0] == 1
    assert ensemble.predict(images, budget_ms=61).students[0] == 2


def test_time_before_the_first_student_counts(
    ensemble: ProgressiveEnsemble, images: Tensor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        ensemble.predict(images)
    read = predicting.read_inputs

    def slowly(*arguments: Any) -> Tensor:
        clock.now += 0.1
        return read(*arguments)

    monkeypatch.setattr(predicting, "read_inputs", slowly)
    answer = ensemble.predict(images, budget_ms=100)
    assert answer.students[0] == 1
    assert answer.seconds == pytest.approx(0.11)


def test_a_prefix_stays_as_it_was_when_further_students_are_asked(
    ensemble: ProgressiveEnsemble, images: Tensor
) -> None:
    kept = list(predicting.prefixes(list(ensemble.members), SCALES, ensemble.preprocess(images)))
    for t, prefix in enumerate(kept, 1):
        torch.testing.assert_close(prefix.logits, eager(ensemble, images, t))
        assert prefix.students.tolist() == [t] * 30


def test_the_pace_is_of_the_images_that_a_student_was_asked_for(ensemble: ProgressiveEnsemble, images: Tensor) -> None:
    ensemble.predict(images, confidence=0.7)
    counts = [count for (count,) in asked(ensemble)]
    assert len(set(counts)) == 3
    assert set(ensemble.pace.least) == set(enumerate(counts))


def test_a_pace_is_of_as_many_images(ensemble: ProgressiveEnsemble, images: Tensor) -> None:
    pace = Pace()
    for seconds in (9.0, 3.0, 4.0):
        pace.note(1, 30, seconds)
    assert pace.expected(30, [1.0]) == 3.0
    assert pace.expected(1, [1.0]) == 1.0  # as long as the one before, where nothing more is known
    assert Pace([10, 40]).expected(1, [1.0]) == 4.0


def test_a_pace_of_students_that_take_or_cost_nothing_and_of_a_call_that_is_faster() -> None:
    assert Pace([0, 40]).expected(1, [2.0]) == 80.0
    pace = Pace()
    for first, second in ((9.0, 9.0), (0.0, 3.0)):
        pace.note(0, 1, first)
        pace.note(1, 1, second)
    assert pace.expected(1, [0.0]) == 3.0
    assert pace.expected(1, [1e-10]) == 3.0  # no less than at its best
    assert Limits(confidence=1).confidence == 1


# ---------------------------------------------------------------------------------- classes


def named(root: object = None) -> ImageSet:
    plain = patterns()
    return ImageSet("named", plain.images, plain.labels * 2, 5, plain.train_size, ("a", "b", "c", "d", "e"))


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "b"), ("a", "", "c"), ("a", 1, "c")])
def test_classes_need_a_name_each(classes: Any) -> None:
    plain = patterns()
    with pytest.raises(DataError, match="not a name of its own for each of 3 classes"):
        ImageSet("named", plain.images, plain.labels, 3, plain.train_size, classes)


def test_names_stay_with_their_classes_where_some_have_no_samples() -> None:
    data = DataModule(DataConfig(named))
    assert (data.class_labels, data.class_names) == ([0, 2, 4], ["a", "c", "e"])
    assert DataModule(DataConfig(patterns)).class_names is None
    assert LabelledSet.classes is None  # a set of one's own need not have the field


def test_an_ensemble_of_a_run_has_the_names(tmp_path: Path) -> None:
    tiny_run(tmp_path, "data.source._target_=tests.test_predicting.named", "boosting.rounds=1")
    (run,) = (path.parent for path in tmp_path.rglob("results.json"))
    ensemble = ProgressiveEnsemble.load(run)
    assert ensemble.classes == ["a", "c", "e"]
    answer = ensemble.predict(named().images[:5])
    assert answer.classes == [dict(zip((0, 2, 4), "ace", strict=True))[label] for label in answer.labels.tolist()]
    described = json.loads((run / "students" / "ensemble.json").read_text())
    del described["classes"], described["blake2b"]  # as an earlier version wrote it
    (run / "students" / "ensemble.json").write_text(json.dumps(described))
    assert ProgressiveEnsemble.load(run).classes is None
    (run / "students" / "ensemble.json").write_text(json.dumps({**described, "classes": ["a"]}))
    with pytest.raises(RunError, match=r"ensemble.json: does not describe an ensemble \(1 classes for 3 outputs\)"):
        ProgressiveEnsemble.load(run)


# ---------------------------------------------------------------------------------- loading by name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_pretrained_ensemble_is_loaded_by_its_name(here: Path) -> None:
    assert len(ProgressiveEnsemble.load("mnist")) == 7
    assert len(ProgressiveEnsemble.load(PRETRAINED / "mnist")) == 7


def test_a_path_that_exists_goes_before_a_name(here: Path) -> None:
    (here / "mnist").mkdir()
    with pytest.raises(RunError, match=r"mnist: holds neither ensemble.json nor .*pretrained ensemble is '.*mnist'"):
        ProgressiveEnsemble.load("mnist")


@pytest.mark.parametrize("place", ["minst", "runs/nowhere"])
def test_what_is_neither_a_path_nor_a_name_lists_both(here: Path, place: str) -> None:
    with pytest.raises(
        RunError, match=rf"{place}: there is no such path, of a run .*no pretrained .*those are: cifar10, mnist\."
    ):
        ProgressiveEnsemble.load(place)
    with pytest.raises(RunError, match="Did you mean 'mnist'"):
        ProgressiveEnsemble.load("minst")


def test_at_most_one_limit_is_given() -> None:
    assert Limits() == Limits(None, None, None, None)
    with pytest.raises(InputError):
        Limits(members=1, confidence=0.5)
