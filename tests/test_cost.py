"""Costs counted by hand, by torch's counter on the real model, and from the literature."""

import itertools
import math
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pkd_lightning import cost
from pkd_lightning.cost import Cost, Latency, latency, measure
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.mamba import Mamba
from tests.support import tiny_run

MODELS = {
    "paper": ((1, 28, 28), {"seq_len": 49, "n_blocks": 3, "d_state": 16, "d_state_step": 2, "norm": "none"}),
    "pixels, embedded": ((3, 8, 8), {"seq_len": 16, "d_model": 5, "dt_rank": 2, "expand": 3, "head": "mean"}),
    "patches": (
        (3, 9, 9),
        {"tokeniser": "patches", "patch_size": 3, "patch_stride": 2, "d_model": 6, "d_conv": 3, "n_blocks": 2,
         "head": "grid", "direction": "alternating"},
    ),
}  # fmt: skip


def build(name: str) -> tuple[MambaClassifier, tuple[int, int, int]]:
    shape, options = MODELS[name]
    torch.manual_seed(0)
    return MambaClassifier(shape, 10, **options), shape


def scan_by_hand(block: Mamba, length: int) -> int:
    """Products (with or without a sum) of the recurrence, counted one by one."""
    count = 0
    for _, _ in itertools.product(range(length), range(block.d_inner)):
        count += 1  # delta * u
        for _ in range(block.d_state):
            count += 1  # delta * A
            count += 1  # (delta * u) * B
            count += 1  # decay * h + ...
            count += 1  # C * h + ...
        count += 1  # D * u + ...
        count += 1  # y * silu(z)
    return count


@pytest.mark.parametrize("name", MODELS)
def test_total_without_the_scan_is_what_torch_counts_on_the_real_model(name, monkeypatch):
    monkeypatch.setenv("PKD_SCAN_BACKEND", "reference")  # elementwise, so its counter sees everything but the scan
    model, shape = build(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *shape))
    visible = counter.get_total_flops() // 2
    length = model.tokens.length
    for layer in model.blocks:
        block = layer.mixer
        # the padded convolution also computes d_conv - 1 outputs past the end, which nobody needs
        visible -= (block.d_conv - 1) * block.d_conv * block.d_inner
        visible += scan_by_hand(block, length)
    assert measure(model, shape).macs_total == visible


def test_a_tiny_model_counted_on_paper():
    model = MambaClassifier((1, 2, 2), 3, seq_len=4, n_blocks=1, d_state=2, expand=2, d_conv=3, dt_rank=1, norm="none")
    counted = measure(model, (1, 2, 2))
    head = 4 * 3
    in_proj = 4 * 1 * 4
    convolution, x_proj, dt_proj, out_proj = 4 * 2 * 3, 4 * 2 * 5, 4 * 1 * 2, 4 * 2 * 1
    scan = 4 * 2 * (3 + 2 * 4)
    assert counted.flops_published == in_proj + head
    assert counted.macs_total == in_proj + convolution + x_proj + dt_proj + scan + out_proj + head
    # in_proj, conv1d, x_proj, dt_proj, A, D, out_proj, head
    assert counted.params == 4 + (6 + 2) + 10 + (2 + 2) + 4 + 2 + 2 + (12 + 3)


def test_adapters_are_counted():
    """An adapter of rank 2 on dt_proj and on x_proj, beside all that is counted without them."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.low_rank = nn.Sequential(nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.low_rank(x)

    model, shape = build("pixels, embedded")
    before = measure(model, shape)
    mixer = model.blocks[0].mixer
    mixer.dt_proj, mixer.x_proj = Adapted(mixer.dt_proj), Adapted(mixer.x_proj)
    after = measure(model, shape)
    adapters = 2 * (mixer.dt_rank + mixer.d_inner) + 2 * (mixer.d_inner + mixer.dt_rank + 2 * mixer.d_state)
    padded = (mixer.d_conv - 1) * mixer.d_conv * mixer.d_inner  # of a convolution that is called
    assert after.macs_total == before.macs_total + model.tokens.length * adapters + padded
    assert after.flops_published == before.flops_published


def test_published_flops_of_a_patch_model_count_its_convolution():
    shape, options = MODELS["patches"]
    model = MambaClassifier(shape, 10, **options | {"norm": "none", "head": "flatten"})
    patches = 4 * 4
    convolution = patches * 6 * 3 * 3 * 3
    in_proj = 2 * patches * 6 * 24
    head = patches * 6 * 10
    assert measure(model, shape).flops_published == convolution + in_proj + head


def test_a_teacher_that_is_no_mamba():
    from torchvision.models import resnet18

    counted = measure(resnet18(num_classes=10), (3, 32, 32))
    assert counted.params == 11_181_642
    # 1,813,561,344 in the convolutions at 224x224 (published: 1.81 G), 49 times fewer at 32x32; and the last layer
    assert counted.macs_total == 1_813_561_344 // 49 + 512 * 10
    assert counted.flops_published >= counted.macs_total


def test_a_plain_network_has_no_hidden_part():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    assert measure(model, (3, 2, 2)) == Cost(60 + 5 + 15, 75, 75)


def test_measuring_leaves_the_model_as_it_was():
    model, shape = build("patches")
    model.train()
    images = torch.randn(2, *shape)
    before = model(images)
    measure(model, shape)
    assert model.training
    assert all(block.mixer.training for block in model.blocks)
    assert torch.equal(model(images), before)


def test_cost_does_not_depend_on_weights_and_grows_linearly_in_the_length():
    short, long = (
        measure(MambaClassifier((1, 8, 8), 2, seq_len=n, d_state=3, norm="none", head="mean"), (1, 8, 8))
        for n in (16, 64)
    )
    head = 2
    assert long.macs_total - head == 4 * (short.macs_total - head)
    assert long.params == short.params


def test_costs_add_up_field_by_field():
    costs = [Cost(1, 20, 300), Cost(4, 50, 600), Cost(7, 80, 900)]
    assert costs[0] + costs[1] == Cost(5, 70, 900)
    assert sum(costs[1:], costs[0]) == Cost(12, 150, 1800)
    assert costs[0] + Cost(1, None, 5) == Cost(2, None, 305)
    assert Cost(1, 2, None) + costs[0] == Cost(2, 22, None)


class Untraceable(nn.Module):
    """torch.jit knows no operator for a tensor and a bool."""

    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.head = nn.Linear(math.prod(image_shape), num_classes)

    def forward(self, x):
        logits = self.head(x.flatten(1))
        return logits * ((logits > 0) & True) + logits


class Uncopied(Untraceable):
    """Holds what cannot be copied."""

    def __init__(self, image_shape, num_classes):
        super().__init__(image_shape, num_classes)
        self.lock = threading.Lock()


def test_what_cannot_be_counted_is_missing_with_the_reason_and_nothing_else_is():
    missing = []
    assert measure(Untraceable((1, 2, 2), 3), (1, 2, 2), missing) == Cost(15, None, 12)
    (line,) = missing
    assert "published FLOPs" in line
    assert "__and__" in line
    missing = []
    assert measure(Uncopied((1, 2, 2), 3), (1, 2, 2), missing) == Cost(15, None, None)
    assert "lock" in missing[0]


@pytest.mark.parametrize("cls", ["Untraceable", "Uncopied"])
@pytest.mark.report
def test_a_run_whose_costs_cannot_be_counted_ends_with_them_missing(cls, tmp_path, caplog):
    overrides = (
        f"student.model=tests.test_cost.{cls}", "~student.common", "student.rungs=[{}]", "student.repeat=true",
        "~teacher.model", f"+teacher.model={{_target_: tests.test_cost.{cls}, _partial_: true}}",
        "boosting.rounds=1", "logger=tensorboard",
    )  # fmt: skip
    results = tiny_run(tmp_path, *overrides)
    for name in ("student.rungs", "teacher.model"):
        assert any(name in line and "cannot be counted" in line for line in caplog.messages)
    macs = None if cls == "Uncopied" else 192
    for row in (results["teacher"], results["rounds"][0], results["ensemble"]):
        assert (row["params"], row["flops_published"], row["macs_total"]) == (195, None, macs)
    assert results["ensemble"]["fraction_of_teacher"] == {
        "params": 1.0, "flops_published": None, "macs_total": macs and 1.0
    }  # fmt: skip
    (run,) = tmp_path.glob("digits/*/")
    assert "n/a" in (run / "report.html").read_text()


@pytest.fixture
def clock(monkeypatch):
    """Clocks that only move when told to, as where nothing else runs: `clock[0]` is their time in seconds."""
    now = [0.0]
    for name in ("thread_time", "perf_counter"):
        monkeypatch.setattr(cost.time, name, lambda: now[0])
    return now


def timed(clock, durations, **options) -> tuple[Latency, int]:
    """The latency of a model that takes these times, and how often it ran."""
    ran = []
    left = iter(durations)

    def forward(image):
        ran.append(torch.get_num_threads())
        clock[0] += next(left)

    found = latency(forward, torch.zeros(1, 1, 2, 2), **options)
    assert set(ran) == {1}
    return found, len(ran)


def test_latency_is_the_least_of_the_calls_after_warming_up(clock):
    assert timed(clock, [0.001, 0.011, 0.3, 0.01, 0.0124, 0.0125], repeats=5) == (Latency(pytest.approx(10), False), 6)


@pytest.mark.parametrize(("waited", "disturbed"), [(0.0009, False), (0.0011, True)])
def test_what_the_thread_waits_is_not_counted_but_flagged(clock, monkeypatch, waited, disturbed):
    """A neighbour who takes the core lets the wall clock run on, not the thread's CPU time."""
    wall = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0] + wall[0])

    def forward(image):
        clock[0] += 0.01
        wall[0] += waited

    assert latency(forward, torch.zeros(1, 1, 2, 2), repeats=3) == Latency(pytest.approx(10), disturbed)


def test_a_sleeping_thread_takes_no_cpu_time():
    assert latency(lambda image: time.sleep(0.02), torch.zeros(1, 1, 2, 2), repeats=3).latency_ms < 20


def test_a_disturbed_measurement_is_made_again_and_flagged_where_it_stays_so(clock):
    noisy, quiet = [0.03, 0.01, 0.02, 0.02, 0.02], [0.011] * 5
    assert timed(clock, [1, *noisy, *quiet, *noisy], repeats=5) == (Latency(pytest.approx(10), False), 11)
    assert timed(clock, [1, *noisy, *noisy, *noisy], repeats=5) == (Latency(pytest.approx(10), True), 16)
    slow = [0.02] * 5  # even, but twice as slow as before
    assert timed(clock, [1, *noisy, *slow, *slow], repeats=5) == (Latency(pytest.approx(10), True), 16)


def test_latency_stops_when_its_time_is_spent_but_not_before_three_calls(clock):
    assert timed(clock, itertools.repeat(5.0)) == (Latency(pytest.approx(5000), False), 4)
    assert timed(clock, itertools.repeat(0.25), seconds=1.0) == (Latency(pytest.approx(250), False), 5)


def test_latency_of_a_real_model_is_positive_and_the_thread_count_comes_back():
    before = torch.get_num_threads()
    model, shape = build("paper")
    other = 3 if before != 3 else 2
    torch.set_num_threads(other)
    try:
        found = latency(model.eval(), torch.zeros(1, *shape), repeats=3)
        assert torch.get_num_threads() == other
        with pytest.raises(RuntimeError):
            latency(model, torch.zeros(1, 5, 5, 5))
        assert torch.get_num_threads() == other
    finally:
        torch.set_num_threads(before)
    assert 0 < found.latency_ms < math.inf
