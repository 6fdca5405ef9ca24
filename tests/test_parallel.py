"""The students of a prefix at the same time: each way gives what they give in turn, and the fastest is kept."""

import copy
import logging
import os
import pickle
import threading

import pytest
import torch
from torch import nn

from pkd_lightning import parallel
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.parallel import Parallel, by_rows, in_turn, on_streams, pack, packed
from pkd_lightning.tasks import ImageClassification


class Student(nn.Module):
    """Counts its calls, and notes the threads and modes they came in."""

    def __init__(self, seed):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(seed))
        self.calls = []

    def forward(self, images):
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.calls.append((threading.current_thread().name, len(images), mode))
        return self.layer(images.flatten(1))


@pytest.fixture
def students():
    return [Student(seed).eval() for seed in range(4)]


@pytest.fixture
def images():
    return torch.randn(7, 1, 2, 2)


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def timed(monkeypatch, *seconds):
    """Have the measurements give these seconds, one after another."""
    given = iter(seconds)
    monkeypatch.setattr(parallel, "_seconds", lambda call: (call(), next(given))[1])


def test_costs_are_packed_into_groups_of_about_equal_sums():
    assert pack([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert pack([1, 9, 1, 1], 2) == [[1], [0, 2, 3]]
    assert pack([1, 1], 5) == [[0], [1]]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_way_gives_what_they_give_in_turn(students, images, mode):
    with mode():
        expected = in_turn(students, images)
        for found in (packed(students, images, [[0, 3], [1, 2]]), by_rows(students, images, 3)):
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)
                assert one.requires_grad == other.requires_grad
    modes = {call[2] for student in students for call in student.calls}
    assert len(modes) == 1  # those of the thread that asked


def test_groups_and_ranges_are_in_threads_of_their_own(students, images):
    packed(students, images, [[0, 3], [1, 2]])
    names = [student.calls[0][0] for student in students]
    assert names[0].startswith("pkd-student")
    assert names[0] == names[3]
    by_rows(students, images, 3)
    assert sorted(call[1] for call in students[0].calls[1:]) == [1, 3, 3]


def test_an_error_in_a_thread_is_raised(students, images):
    students[2].layer = nn.Linear(5, 3)
    for call in (lambda: packed(students, images, [[0], [1, 2, 3]]), lambda: by_rows(students, images, 2)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call()


def test_a_forked_process_starts_threads_of_its_own(students, images):
    packed(students, images, [[0, 3], [1, 2]])
    assert parallel._pools
    child = os.fork()
    if child == 0:  # it has the pools without their threads: what it asked them would wait for ever
        os._exit(len(parallel._pools))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("seconds", "best", "calls"),
    [((0.10, 0.10, 0.10), "in turn", [7]), ((0.10, 0.08, 0.09), "students in 2 threads", [7]),
     ((0.10, 0.08, 0.07), "rows in 2 threads", [3, 4]), ((0.10, 0.095, 0.2), "in turn", [7])],
)  # fmt: skip
@pytest.mark.usefixtures("two_threads")
def test_the_fastest_way_is_measured_once_and_said(students, images, monkeypatch, caplog, seconds, best, calls):
    timed(monkeypatch, 1, 2, 3, 4, *seconds)
    chosen = Parallel()
    with caplog.at_level(logging.INFO):
        chosen(students, images)
    assert f"4 students, batch of 7: in turn {1e3 * seconds[0]:.3g} ms" in caplog.text
    assert caplog.text.rstrip().endswith(f"from now on {best}")
    students[0].calls.clear()
    found = chosen(students, images)  # a further measurement would find no seconds
    assert sorted(call[1] for call in students[0].calls) == calls
    assert all(torch.equal(one, other) for one, other in zip(found, in_turn(students, images), strict=True))


@pytest.mark.usefixtures("two_threads")
def test_other_sizes_are_measured_for_themselves(students, monkeypatch):
    timed(monkeypatch, 1, 1, 1, 1, 1, 1, 0.5, 1, 1, 1, 1, 0.5, 1)
    chosen = Parallel()
    chosen(students, torch.zeros(7, 1, 2, 2))
    chosen(students, torch.zeros(1, 1, 2, 2))  # rows cannot be shared
    students[0].calls.clear()
    chosen(students, torch.zeros(6, 1, 2, 2))
    assert len(students[0].calls) == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_measured_where_there_is_nothing_to_choose(students, monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    timed(monkeypatch)
    assert Parallel()(students, torch.zeros(0, 1, 2, 2))[0].shape == (0, 3)
    if threads == 2:
        students[0].train()  # rows apart are not the same batch to it
    assert len(Parallel()(students, torch.zeros(4, 1, 2, 2))) == 4


@pytest.mark.usefixtures("two_threads")
def test_the_ensemble_asks_so(students, images, monkeypatch):
    timed(monkeypatch, 1, 1, 1, 1, 1, 0.5, 1)
    task = ImageClassification((1, 2, 2), 3, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    ensemble = ProgressiveEnsemble(students, [(0.5, 0.5)] * 4, task)
    assert torch.equal(ensemble(images, parallel="auto"), ensemble(images))
    assert students[0].calls[-2][0].startswith("pkd-student")
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(other(images, parallel="auto"), ensemble(images))
    with pytest.raises(ValueError, match="parallel='threads': must be True, False or 'auto'"):
        ensemble(images, parallel="threads")


@pytest.mark.gpu
def test_streams_give_what_they_give_in_turn(students, images):
    students, images = [student.cuda() for student in students], images.cuda()
    for one, other in zip(on_streams(students, images), in_turn(students, images), strict=True):
        torch.testing.assert_close(one, other)
