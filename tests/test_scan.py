"""Every scan backend against the reference in float64, and the reference against loops written from the equations."""

import copy
import logging
import math
import multiprocessing
import shutil
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from pkd_lightning.kernels import scan, threads
from pkd_lightning.kernels.lanes import WIDTH
from pkd_lightning.kernels.scan import cuda, scan_macs, selective_scan, selective_scan_step
from pkd_lightning.kernels.scan.associative import selective_scan_associative
from pkd_lightning.kernels.scan.cpu import CHUNK, selective_scan_cpu, sizes_of
from pkd_lightning.kernels.scan.reference import selective_scan_reference
from pkd_lightning.models.classifier import MambaClassifier

OPTIONAL = ("D", "z", "delta_bias")


COTANGENTS = 3


def make_inputs(
    batch: int, channels: int, length: int, states: int, seed: int = 0, leave_out: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Float32 inputs; delta is before softplus, which gives about 0.02-0.7, or absolute for use without it.

    delta and its bias are multiples of 2^-12, so that their sum is exact: softplus, and the decay after it, turn the
    rounding of a sum whose terms cancel into a relative error that no float32 computation avoids.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "u": normal(batch, channels, length),
        "delta": coarse(normal(batch, channels, length) - 2),
        "A": -0.1 - 8 * torch.rand(channels, states, generator=generator),
        "B": normal(batch, states, length),
        "C": normal(batch, states, length),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": coarse(normal(channels)),
    }
    return {name: x for name, x in inputs.items() if name not in leave_out}


def coarse(x: Tensor) -> Tensor:
    return (4096 * x).round() / 4096


def over_channels(inputs: dict[str, Tensor]) -> bool:
    """Whether the lanes of the kernels are channels, else sequences."""
    tensors = tuple(inputs.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))
    return bool(sizes_of(tensors, softplus=True).over_channels)


# each with lanes that are not filled and an odd number of states; names for test reports
LAYOUTS = {"over sequences": (19, 2), "over channels": (2, 19)}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    """Batch and channels of a scan whose lanes are sequences, or channels."""
    batch, channels = LAYOUTS[request.param]
    assert over_channels(make_inputs(batch, channels, 2, 3)) == (request.param == "over channels")
    return batch, channels


def gradients(function, inputs: dict[str, Tensor], dtype: torch.dtype, softplus: bool, several: int):
    """The output, the last state, and all gradients under each of some fixed random cotangents."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    results = function(**leaves, delta_softplus=softplus, return_last_state=True)
    generator = torch.Generator().manual_seed(1)
    grads = []
    for _ in range(several):
        cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in results]
        each = torch.autograd.grad(results, list(leaves.values()), cotangents, retain_graph=True)
        grads.append(dict(zip(leaves, each, strict=True)))
    return {name: x.detach() for name, x in zip(("out", "state"), results, strict=True)}, grads


def run(function, inputs: dict[str, Tensor], dtype: torch.dtype, softplus: bool = True) -> dict[str, Tensor]:
    """The output, the last state and all gradients under fixed random cotangents."""
    results, (grads,) = gradients(function, inputs, dtype, softplus, 1)
    return results | grads


def check_cpu(inputs: dict[str, Tensor], softplus: bool = True) -> None:
    """Relative L2 errors of the float32 scan against the reference on the same inputs in float64.

    A gradient is measured by its typical size, the root mean square over the cotangents, and the output by at least
    1 an element, the size of its terms: a sum of few of them may cancel.
    """
    actual = run(selective_scan_cpu, inputs, torch.float32, softplus)
    expected, grads = gradients(selective_scan_reference, inputs, torch.float64, softplus, COTANGENTS)
    for name, x in (expected | grads[0]).items():
        if name in expected:
            limit, size = 2e-7, max(x.norm().item(), math.sqrt(x.numel()))
        else:
            limit, size = 3e-6, math.sqrt(sum(each[name].norm().item() ** 2 for each in grads) / COTANGENTS)
        assert actual[name].shape == x.shape
        error = (actual[name].double() - x).norm().item()
        assert error <= limit * size, f"{name}: relative error {error / max(size, 1e-300):.1e}"


def at(x, b, d, n, t, channels):
    """The number of B or C for a sequence, channel, state and step."""
    if x.ndim == 2:
        return x[d, n]
    return x[b, n, t] if x.ndim == 3 else x[b, d * x.shape[1] // channels, n, t]


def scan_by_hand(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False):
    """Scalar loops over the equations, one state at a time."""
    batch, channels, length = u.shape
    out = np.zeros_like(u)
    last = np.zeros((batch, channels, A.shape[1]))
    for b, d, t in np.ndindex(batch, channels, length):
        step = delta[b, d, t] + (0 if delta_bias is None else delta_bias[d])
        step = math.log(1 + math.exp(step)) if softplus else step
        y = 0.0 if D is None else D[d] * u[b, d, t]
        for n in range(A.shape[1]):
            last[b, d, n] = math.exp(step * A[d, n]) * last[b, d, n] + step * at(B, b, d, n, t, channels) * u[b, d, t]
            y += at(C, b, d, n, t, channels) * last[b, d, n]
        out[b, d, t] = y if z is None else y * z[b, d, t] / (1 + math.exp(-z[b, d, t]))
    return out, last


@pytest.mark.parametrize("leave_out", [(), ("D",), ("z",), ("delta_bias",), OPTIONAL])
@pytest.mark.parametrize("softplus", [False, True])
def test_reference_follows_the_equations(leave_out, softplus):
    inputs = {name: x.double() for name, x in make_inputs(2, 3, 7, 4, leave_out=leave_out).items()}
    if not softplus:
        inputs["delta"] = inputs["delta"].exp()
    out, state = selective_scan_reference(**inputs, delta_softplus=softplus, return_last_state=True)
    expected, last = scan_by_hand(**{name: x.numpy() for name, x in inputs.items()}, softplus=softplus)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(state.numpy(), last, rtol=1e-12, atol=1e-13)


FORMS = ("one for all", "one group", "two groups", "a group a channel", "constant")
PAIRS = [*((form, form) for form in FORMS), ("constant", "two groups"), ("two groups", "constant")]
PAIRS += [("one for all", "two groups"), ("two groups", "a group a channel"), ("one group", "constant")]


def in_form(x: Tensor, form: str, channels: int) -> Tensor:
    """A random B or C of the sizes of `x`, which is (batch, d_state, length)."""
    batch, states, length = x.shape
    groups = {"one group": 1, "two groups": 2, "a group a channel": channels}
    shape = (batch, groups[form], states, length) if form in groups else (channels, states)
    new = torch.randn(shape, generator=torch.Generator().manual_seed(len(form)))
    return x if form == "one for all" else new.to(x)


def inputs_of(forms: tuple[str, str], sizes: tuple[int, int, int, int], **options) -> dict[str, Tensor]:
    inputs = make_inputs(*sizes, **options)
    return inputs | {name: in_form(inputs[name], form, sizes[1]) for name, form in zip("BC", forms, strict=True)}


def selective_scan_operator(**inputs):
    from pkd_lightning.kernels.scan.custom_op import selective_scan_operator

    return selective_scan_operator(**inputs)


@pytest.mark.parametrize("forms", PAIRS)
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (2, 6, 5, 3), (17, 2, CHUNK + 1, 3), (1, 40, 3, 2)])
def test_every_backend_takes_every_form_of_B_and_C(forms, sizes):
    """The output and the last state against loops, gradients against the reference; (4, 4, 4, 4): sizes coincide."""
    inputs = inputs_of(forms, sizes)
    by_hand = scan_by_hand(**{name: x.double().numpy() for name, x in inputs.items()}, softplus=True)
    expected = run(selective_scan_reference, inputs, torch.float64)
    for name, x in zip(("out", "state"), by_hand, strict=True):
        np.testing.assert_allclose(expected[name].numpy(), x, rtol=1e-12, atol=1e-12)
    single = (selective_scan_cpu, selective_scan_operator)
    for function, dtype in ((selective_scan_associative, torch.float64), *((each, torch.float32) for each in single)):
        actual = run(function, inputs, dtype)
        limit = 1e-12 if dtype == torch.float64 else 5e-6
        for name, x in expected.items():
            assert actual[name].shape == x.shape
            error, size = (actual[name].double() - x).norm(), max(x.norm().item(), math.sqrt(x.numel()))
            assert error <= limit * size, f"{function.__name__}, {name}: relative error {error / size:.1e}"


def test_B_and_C_in_groups_need_no_other_option():
    inputs = inputs_of(("two groups", "constant"), (2, 4, 5, 3), leave_out=OPTIONAL)
    inputs["delta"] = inputs["delta"].exp()  # without softplus
    expected = selective_scan_reference(**inputs)
    for backend in ("cpu", "associative"):
        torch.testing.assert_close(selective_scan(**inputs, backend=backend), expected)


@pytest.mark.parametrize("forms", PAIRS)
def test_mamba_ssm_is_given_B_and_C_as_its_kernels_take_them(forms):
    """They take a constant B or C, and a B and C that change in time only with one number of groups, B's (or 1)."""
    inputs = inputs_of(forms, (2, 6, 5, 3))
    B, C = cuda.with_equal_groups(inputs["B"], inputs["C"], *inputs["u"].shape)
    groups = B.shape[1] if B.ndim == 4 else 1
    assert C.ndim == 2 or (C.shape[1] if C.ndim == 4 else 1) == groups
    assert all(x.ndim == 2 or (x.shape[0] == 2 and x.shape[-2:] == (3, 5)) for x in (B, C))
    assert groups <= (2 if "constant" not in forms and "a group a channel" not in forms else 6)
    torch.testing.assert_close(
        selective_scan_reference(**inputs | {"B": B, "C": C}), selective_scan_reference(**inputs)
    )


REFUSED = {
    "B of another batch": {"B": torch.ones(1, 4, 7)},
    "B that is transposed": {"B": torch.ones(2, 7, 4)},
    "constant C of other sizes": {"C": torch.ones(4, 6)},
    "groups that do not divide the channels": {"B": torch.ones(2, 4, 4, 7)},
    "no groups": {"C": torch.ones(2, 0, 4, 7)},
    "groups of another length": {"C": torch.ones(2, 3, 4, 1)},
    "B of five dimensions": {"B": torch.ones(2, 1, 1, 4, 7)},
    "one bias for all": {"delta_bias": torch.ones(1)},
    "D for each state": {"D": torch.ones(6, 4)},
    "a gate of one step": {"z": torch.ones(2, 6, 1)},
    "one step size for all": {"delta": torch.ones(2, 1, 7)},
    "A for one channel": {"A": torch.ones(1, 4)},
    "A for each sequence": {"A": torch.ones(2, 6, 4)},
    "u without a batch": {"u": torch.ones(6, 7)},
    "whole numbers": {"u": torch.ones(2, 6, 7, dtype=torch.long)},
    "complex A": {"A": torch.ones(6, 4, dtype=torch.complex64)},
    "another device": {"D": torch.ones(6, device="meta")},
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_every_backend_refuses_the_same(wrong):
    inputs = make_inputs(2, 6, 7, 4) | REFUSED[wrong]
    said = set()
    for function in (
        *(selective_scan_reference, selective_scan_associative, selective_scan_cpu, selective_scan_operator),
        *(cuda.selective_scan_cuda, selective_scan),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**inputs, delta_softplus=True)
        said.add(f"{caught.type.__name__}: {caught.value}")
    assert len(said) == 1
    assert next(iter(REFUSED[wrong])) in said.pop()


@pytest.mark.parametrize("forms", [("one for all", "one for all"), ("two groups", "constant")])
@pytest.mark.parametrize("sizes", [(0, 4, 5, 4), (2, 4, 0, 4), (2, 4, 5, 0), (2, 0, 5, 4)])
def test_every_backend_takes_what_is_empty(sizes, forms):
    inputs = inputs_of(forms, sizes)
    for function in (selective_scan_reference, selective_scan_associative, selective_scan_cpu, selective_scan_operator):
        out, state = function(**inputs, delta_softplus=True, return_last_state=True)
        assert out.shape == inputs["u"].shape
        assert state.shape == (*sizes[:2], sizes[3])


def test_a_trace_is_checked_and_does_not_warn():
    inputs = make_inputs(2, 3, 5, 4, leave_out=OPTIONAL)
    inputs["delta"] = inputs["delta"].exp()  # without softplus
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(selective_scan, tuple(inputs.values()), check_trace=False)
    torch.testing.assert_close(traced(*inputs.values()), selective_scan(**inputs))
    with pytest.raises(ValueError, match="B is"):
        torch.jit.trace(selective_scan, tuple((inputs | {"B": torch.ones(1, 4, 5)}).values()), check_trace=False)


@pytest.mark.parametrize("forms", [("two groups", "one for all"), ("constant", "two groups")])
def test_reference_gradients_in_groups(forms):
    inputs = inputs_of(forms, (2, 2, 3, 2))
    leaves = [x.double().requires_grad_() for x in inputs.values()]

    def function(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan_reference(**named, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("leave_out", [(), OPTIONAL])
def test_reference_gradients(leave_out):
    inputs = make_inputs(2, 2, 3, 2, leave_out=leave_out)
    leaves = [x.double().requires_grad_() for x in inputs.values()]

    def function(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan_reference(**named, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(function, leaves)


def as_projected(x: Tensor) -> Tensor:
    """As a projection of (batch, length, features) leaves it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0]


def window(x: Tensor) -> Tensor:
    around = x.new_full([n + 3 for n in x.shape], math.nan)
    inside = around[tuple(slice(1, n + 1) for n in x.shape)]
    return inside.copy_(x)


def reversed_dimensions(x: Tensor) -> Tensor:
    return x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1])


def one_for_all(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


VIEWS = (torch.Tensor.contiguous, as_projected, every_other, window, reversed_dimensions, one_for_all)
BY_ELEMENT = tuple(view for view in VIEWS if view is not as_projected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 10**6),
    softplus=st.booleans(),
    leave_out=st.sets(st.sampled_from(OPTIONAL)).map(lambda names: tuple(sorted(names))),
    views=st.fixed_dictionaries(
        {name: st.sampled_from(VIEWS) for name in ("u", "delta", "z", "B", "C")}
        | {name: st.sampled_from(BY_ELEMENT) for name in ("A", "D", "delta_bias")}
    ),
)
@example(sizes=(2, 24, 64, 155), seed=0, softplus=True, leave_out=(), views={})
@example(sizes=(17, 2, 33, 155), seed=0, softplus=True, leave_out=(), views={"B": as_projected, "C": as_projected})
@example(sizes=(1, 2, 40, 446), seed=0, softplus=True, leave_out=(), views={"B": as_projected, "C": as_projected})
@example(sizes=(16, 1, 20, 446), seed=0, softplus=False, leave_out=("delta_bias",), views={})
@example(sizes=(1, 2, 300, 58), seed=0, softplus=True, leave_out=(), views={})
@example(sizes=(3, 4, CHUNK - 1, 1), seed=0, softplus=True, leave_out=(), views={})
@example(sizes=(16, 16, 2 * CHUNK, 32), seed=0, softplus=True, leave_out=(), views={})
def test_cpu_agrees_on_any_shape_strides_and_optional_arguments(sizes, seed, softplus, leave_out, views):
    inputs = make_inputs(*sizes, seed, leave_out)
    if not softplus:
        inputs["delta"] = coarse(inputs["delta"].exp())
        inputs |= {"delta_bias": inputs["delta_bias"].abs()} if "delta_bias" in inputs else {}
    check_cpu({name: views[name](x) if name in views else x for name, x in inputs.items()}, softplus)


def test_strides_do_not_change_the_result(layout):
    inputs = make_inputs(*layout, 70, 17)
    expected = run(selective_scan_cpu, inputs, torch.float32)
    for view in VIEWS:
        if view is one_for_all:
            continue
        strided = {name: x if view is as_projected and x.ndim < 3 else view(x) for name, x in inputs.items()}
        actual = run(selective_scan_cpu, strided, torch.float32)
        assert all(torch.equal(actual[name], expected[name]) for name in expected), view.__name__
    # a cotangent that is an expanded scalar
    u = inputs["u"].requires_grad_()
    out = selective_scan_cpu(**inputs, delta_softplus=True)
    (dense,) = torch.autograd.grad(out, u, torch.ones_like(out), retain_graph=True)
    (expanded,) = torch.autograd.grad(out.sum(), u)
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_the_output_or_the_last_state_alone(used, layout):
    inputs = make_inputs(*layout, 20, 5)
    grads = []
    for function, dtype in ((selective_scan_cpu, torch.float32), (selective_scan_reference, torch.float64)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        result = function(**leaves, delta_softplus=True, return_last_state=True)[used]
        cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
        each = torch.autograd.grad(result, list(leaves.values()), cotangent, materialize_grads=True)
        grads.append(dict(zip(leaves, each, strict=True)))
    for name, x in grads[1].items():
        assert (grads[0][name].double() - x).norm() <= 3e-6 * x.norm(), name


@pytest.mark.parametrize("sizes", [(0, 3, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0), (2, 0, 5, 4)])
def test_nothing_in_nothing_out(sizes):
    inputs = make_inputs(*sizes)
    actual = run(selective_scan_cpu, inputs, torch.float32)
    for name, x in inputs.items():
        assert actual[name].shape == x.shape
        assert sizes[3] == 0 or not actual[name].any()


@pytest.mark.parametrize("delta", [0.0, 1e-4, 50.0])
@pytest.mark.parametrize("softplus", [False, True])
def test_extreme_steps_and_decays(delta, softplus, layout):
    _, channels = layout
    inputs = make_inputs(*layout, 40, 21, leave_out=("delta_bias",))
    inputs["A"] = -torch.logspace(-3, math.log10(500), channels * 21).reshape(channels, 21)
    inputs["A"][0, :3] = 0
    # not the same step everywhere: the rounding of a decay near 1 would then add up over the sequence
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(inputs["delta"].shape, generator=generator)
    inputs["delta"] = delta + noise / 4 if softplus else delta * (1 + noise.abs())
    check_cpu(inputs, softplus)


def test_softplus_over_its_whole_range():
    inputs = make_inputs(1, 1, 241, 3, leave_out=("delta_bias",))
    inputs["delta"] = torch.linspace(-60, 60, 241).reshape(1, 1, 241)
    inputs["z"] = torch.linspace(80, -80, 241).reshape(1, 1, 241)
    check_cpu(inputs)


def test_a_decay_that_underflows_is_zero():
    inputs = make_inputs(1, 2, 3, 18, leave_out=OPTIONAL)
    inputs["A"] = torch.full((2, 18), -500.0)
    inputs["delta"] = torch.full((1, 2, 3), 50.0)
    inputs["u"] = torch.tensor([1.0, 0.0, 0.0]).expand(1, 2, 3)
    out, state = selective_scan_cpu(**inputs, return_last_state=True)
    assert out[..., 0].abs().min() > 0
    assert torch.equal(out[..., 1:], torch.zeros(1, 2, 2))
    assert torch.equal(state, torch.zeros(1, 2, 18))


def test_a_growth_that_overflows_is_infinite(layout):
    inputs = make_inputs(*layout, 12, 5, leave_out=OPTIONAL)
    inputs["A"][:, 2] = 60.0  # e^120 is beyond float32
    inputs["delta"] = torch.ones_like(inputs["delta"])
    expected, state = selective_scan_reference(**inputs, return_last_state=True)
    assert expected[..., 2:].isinf().all()
    assert expected[..., :2].isfinite().all()
    actual = selective_scan_cpu(**inputs, return_last_state=True)
    for ours, theirs in zip(actual, (expected, state), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_lanes_without_a_sequence_or_a_channel_do_not_overflow(layout):
    """A grows too fast where delta is 0, as in a lane that is not used, and not where it is that of the inputs."""
    inputs = make_inputs(*layout, 20, 5, leave_out=("delta_bias",))
    inputs["A"] = torch.full_like(inputs["A"], 200.0)
    inputs["delta"] = torch.full_like(inputs["delta"], -12.0)
    check_cpu(inputs)


INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("states", [5, 37])
def test_nan_and_inf_come_out_where_the_reference_has_them(name, value, states, layout):
    inputs = make_inputs(*layout, CHUNK + 3, states)
    inputs[name][(1,) * inputs[name].ndim] = value
    actual, expected = (
        function(**inputs, delta_softplus=True, return_last_state=True)
        for function in (selective_scan_cpu, selective_scan_reference)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
    if math.isnan(value):  # and one NaN reaches the gradients
        ours, theirs = (
            run(function, inputs, torch.float32) for function in (selective_scan_cpu, selective_scan_reference)
        )
        for key in theirs:
            assert torch.equal(ours[key].isnan(), theirs[key].isnan()), key


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_a_nan_does_not_leave_its_sequence(name, value, layout):
    inputs = make_inputs(*layout, 2 * CHUNK + 1, 7)
    clean = run(selective_scan_cpu, inputs, torch.float32)
    inputs[name][1, 0, 4] = value
    dirty = run(selective_scan_cpu, inputs, torch.float32)
    assert not dirty["out"][1].isfinite().all()
    others = torch.arange(layout[0]) != 1
    for key in ("out", "state", "u", "delta", "B", "C", "z"):
        assert torch.equal(dirty[key][others], clean[key][others]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype):
    inputs = {name: x.to(dtype) for name, x in make_inputs(2, 3, 70, 16).items()}
    half = run(selective_scan_cpu, inputs, dtype)
    single = run(selective_scan_cpu, inputs, torch.float32)
    assert half["state"].dtype == torch.float32
    assert torch.equal(half["out"], single["out"].to(dtype))  # only the result is rounded
    for name in inputs:
        assert half[name].dtype == dtype
        # the cotangents are rounded, too
        assert (half[name].float() - single[name]).norm() < 0.02 * single[name].norm()


def peak_memory(function):
    """The most bytes that torch held at once beyond what it held before, and the result of `function`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert sizes
    return np.cumsum(sizes).max(), result


WORKSPACE = 500_000  # bytes: for the chunk that is worked on, the same for any batch and length


@pytest.mark.parametrize(
    ("batch", "channels", "length", "states"),
    [(8, 192, 256, 16), (16, 192, 512, 16), (32, 2, 784, 58), (64, 2, 1568, 58)],
)
def test_memory_is_that_of_the_results_and_of_the_states_at_chunk_boundaries(batch, channels, length, states):
    inputs = make_inputs(batch, channels, length, states)
    inputs |= {name: as_projected(inputs[name]) for name in ("B", "C")}
    leaves = [x.requires_grad_() for x in inputs.values()]
    with torch.no_grad():
        peak, out = peak_memory(lambda: selective_scan_cpu(**inputs, delta_softplus=True))
    assert peak <= out.nbytes + WORKSPACE
    cotangent = torch.ones_like(out)

    def forward_and_backward():
        out = selective_scan_cpu(**inputs, delta_softplus=True)
        return out, *torch.autograd.grad(out, leaves, cotangent)

    peak, results = peak_memory(forward_and_backward)
    boundaries = 4 * batch * channels * states * -(-length // CHUNK)
    limit = sum(x.nbytes for x in results) + boundaries + WORKSPACE
    assert peak <= limit
    assert limit - sum(x.nbytes for x in results) < 4 * batch * channels * length * states / 2  # all states show


def test_the_backward_pass_keeps_states_only_at_chunk_boundaries(layout):
    chunks, states = 5, 32
    inputs = make_inputs(*layout, chunks * CHUNK, states)
    inputs["u"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        selective_scan_cpu(**inputs)
    arguments = sum(x.numel() for x in inputs.values())
    batch, channels = (-(-n // WIDTH) * WIDTH if n == max(layout) else n for n in layout)  # lanes are kept whole
    assert sum(saved) == arguments + batch * channels * chunks * states


def test_no_grad_gives_the_same_output_and_repeats_are_identical():
    inputs = make_inputs(2, 3, 150, 37)
    first, second = (run(selective_scan_cpu, inputs, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(selective_scan_cpu(**inputs, delta_softplus=True), first["out"])


def test_inputs_that_do_not_fit_are_all_named():
    inputs = make_inputs(2, 3, 7, 4)
    with pytest.raises(ValueError, match=r"C is \(2, 5, 7\), expected \(2, 4, 7\); D is \(4,\), expected \(3,\)"):
        selective_scan_cpu(**inputs | {"C": torch.ones(2, 5, 7), "D": torch.ones(4)})
    with pytest.raises(ValueError, match="u must be"):
        selective_scan_cpu(**inputs | {"u": torch.ones(3, 7)})
    with pytest.raises(TypeError, match=r"A is torch.float64.*reference"):
        selective_scan_cpu(**inputs | {"A": inputs["A"].double()})


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def large_inputs(layout, seed: int = 0) -> dict[str, Tensor]:
    """Enough work for several threads."""
    batch, channels = layout
    states = -(-threads.WORTHWHILE // (batch * channels * 100))
    inputs = make_inputs(batch, channels, 100, states, seed)
    return inputs | {name: as_projected(inputs[name]) for name in ("B", "C")}


SUMMED = ("A", "D", "delta_bias")  # gradients that are summed over the batch


def assert_same_on_any_threads(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        if name in SUMMED:
            assert (actual[name] - x).norm() <= 2e-6 * x.norm(), name
        else:
            assert torch.equal(actual[name], x), name


def threads_used(function) -> int:
    """The most ranges that one call of `share` was split into."""
    most = []
    with pytest.MonkeyPatch.context() as patch:
        threads_for = threads.threads_for
        for module in ("scan.cpu", "threads"):
            target = f"pkd_lightning.kernels.{module}.threads_for"
            patch.setattr(target, lambda *work: most.append(threads_for(*work)) or most[-1])
        function()
    return max(most)


def test_two_threads_compute_what_one_computes(layout, two_threads):
    inputs = large_inputs(layout)
    both = {}
    assert threads_used(lambda: both.update(run(selective_scan_cpu, inputs, torch.float32))) == 2
    torch.set_num_threads(1)
    assert_same_on_any_threads(both, run(selective_scan_cpu, inputs, torch.float32))


@pytest.mark.parametrize("work", [make_inputs, large_inputs])
def test_two_python_threads_at_once(work, two_threads):
    sizes = ((4, 3, 150, 37),) if work is make_inputs else ((19, 2),)
    cases = [work(*sizes[0] if work is make_inputs else sizes, seed) for seed in range(2)]
    alone = [run(selective_scan_cpu, inputs, torch.float32) for inputs in cases]
    barrier = threading.Barrier(2, timeout=30)

    def repeat(inputs):
        barrier.wait()
        return [run(selective_scan_cpu, inputs, torch.float32) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        for expected, results in zip(alone, pool.map(repeat, cases), strict=True):
            assert all(torch.equal(result[name], expected[name]) for result in results for name in expected)


def test_many_sizes_one_after_the_other_as_the_pool_grows(layout):
    inputs = large_inputs((5, 19) if layout[0] < layout[1] else (70, 2))
    expected = run(selective_scan_cpu, inputs, torch.float32)
    try:
        for count in (2, 1, 4, 3, 5):
            torch.set_num_threads(count)
            assert_same_on_any_threads(run(selective_scan_cpu, inputs, torch.float32), expected)
            small = make_inputs(count, 3, 20, count)
            assert threads_used(lambda small=small: selective_scan_cpu(**small)) == 1
    finally:
        torch.set_num_threads(1)


def _run_in_child(inputs, expected, threads):
    torch.set_num_threads(threads)
    result = run(selective_scan_cpu, inputs, torch.float32)
    # numpy: torch compares large tensors in threads of OpenMP, which hang in a forked child
    if not all(np.array_equal(result[name].numpy(), expected[name].numpy()) for name in expected):
        sys.exit(3)


@pytest.mark.parametrize("count", [1, 2])  # 1 as in a worker of a DataLoader
def test_fork_after_use(count, layout, two_threads):
    inputs = large_inputs(layout)
    torch.set_num_threads(count)
    expected = run(selective_scan_cpu, inputs, torch.float32)
    torch.set_num_threads(2)
    run(selective_scan_cpu, inputs, torch.float32)
    assert threads._pool is not None
    child = multiprocessing.get_context("fork").Process(target=_run_in_child, args=(inputs, expected, count))
    child.start()
    child.join(timeout=30)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert torch.equal(run(selective_scan_cpu, inputs, torch.float32)["u"], expected["u"])


class Scanned(Dataset):
    def __init__(self, cases: list[dict[str, Tensor]]) -> None:
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Tensor:
        return selective_scan_cpu(**self.cases[index], delta_softplus=True)


def test_workers_of_a_data_loader_scan(two_threads):
    data = Scanned([large_inputs((19, 2), seed) for seed in range(4)])
    expected = [data[index] for index in range(4)]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(x, y) for x, y in zip(loader, expected, strict=True))


def test_importing_the_package_imports_neither_numba_nor_mamba_ssm():
    code = "import sys, pkd_lightning.kernels.scan; print({'numba', 'mamba_ssm'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "set()"


@pytest.fixture
def chosen(monkeypatch):
    """The name of the backend that a call would reach."""
    monkeypatch.delenv("PKD_SCAN_BACKEND", raising=False)
    monkeypatch.setattr(scan, "_load", lambda name: lambda *arguments: name)
    return lambda dtype=torch.float32, **options: selective_scan(
        *(x.to(dtype) for x in make_inputs(1, 1, 2, 1, leave_out=OPTIONAL).values()), **options
    )


def test_dispatch(chosen, monkeypatch):
    assert chosen() == "cpu"
    assert chosen(torch.bfloat16) == "cpu"
    assert chosen(torch.float64) == chosen(torch.float64, backend="cpu") == "reference"
    assert chosen(torch.float64, backend="associative") == "associative"
    assert chosen(D=torch.ones(1, dtype=torch.float64)) == "reference"
    assert [chosen(backend=name) for name in scan.BACKENDS] == list(scan.BACKENDS)
    monkeypatch.setenv("PKD_SCAN_BACKEND", "reference")
    assert chosen() == "reference"
    assert chosen(backend="cpu") == "cpu"


@pytest.mark.parametrize("backend", [None, "cuda"])
def test_more_states_than_mamba_ssm_has_kernels_for(backend, monkeypatch):
    monkeypatch.delenv("PKD_SCAN_BACKEND", raising=False)
    monkeypatch.setattr(cuda, "available", lambda: True)
    assert scan._choose(backend, "cuda", 256) == "cuda"
    assert scan._choose(backend, "cuda", 257) == "associative"


def test_dispatch_rejects_unknown_names(chosen, monkeypatch):
    with pytest.raises(ValueError, match=r"backend is 'triton', allowed are reference, cpu, cuda, associative"):
        chosen(backend="triton")
    monkeypatch.setenv("PKD_SCAN_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"PKD_SCAN_BACKEND is 'fast', allowed are reference, cpu, cuda, associative"):
        chosen()


def test_dispatch_on_a_gpu_without_mamba_ssm_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("PKD_SCAN_BACKEND", raising=False)
    scan._say.cache_clear()
    monkeypatch.setattr(cuda, "available", lambda: True)
    assert scan._choose(None, "cuda", 16) == "cuda"
    monkeypatch.setattr(cuda, "available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert [scan._choose(None, "cuda", 16) for _ in range(2)] == ["associative"] * 2
    assert len(caplog.records) == 1
    assert "pkd-lightning[cuda]" in caplog.text
    scan._say.cache_clear()


def scan_of_mamba_ssm(u, delta, A, B, C, **options):
    return selective_scan_reference(u, delta, A, B, C, **options)


def raising(error):
    def function(*_, **options):
        raise error

    return function


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins of mamba_ssm and causal_conv1d, tried on the CPU; `installed(name, function)` replaces a function."""
    names = ("selective_scan_cuda", "mamba_ssm", "mamba_ssm.ops", "causal_conv1d", "causal_conv1d_cuda")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    interface.selective_scan_fn = scan_of_mamba_ssm
    interface.mamba_inner_fn = lambda xz, *weights, **options: xz.mT[..., : weights[4].shape[0]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    cuda.available.cache_clear()
    cuda.convolution_available.cache_clear()
    yield lambda name, function: monkeypatch.setattr(interface, name, function)
    cuda.available.cache_clear()
    cuda.convolution_available.cache_clear()


def test_kernels_that_run_are_used(installed, caplog):
    assert cuda.available()
    assert cuda.fits_block(16, 4)
    assert scan._choose(None, "cuda", 16) == "cuda"
    assert not caplog.records


FIRST_CALLS = {
    "no kernel image": raising(RuntimeError("CUDA error: no kernel image is available for execution on the device")),
    "another signature": raising(TypeError("causal_conv1d_fwd(): incompatible function arguments")),
    "not compiled": raising(AttributeError("'NoneType' object has no attribute 'fwd'")),
    "wrong": lambda u, *rest, **options: 2 * u,
    "not numbers": lambda u, *rest, **options: torch.full((1, 8, 8), math.nan),
}


@pytest.mark.parametrize("fault", FIRST_CALLS)
def test_kernels_whose_first_call_fails_are_not_used(fault, installed, caplog):
    installed("mamba_inner_fn", FIRST_CALLS[fault])
    assert not cuda.fits_block(16, 4)
    assert cuda.available()
    installed("selective_scan_fn", FIRST_CALLS[fault])
    cuda.available.cache_clear()
    assert not any(cuda.available() for _ in range(2))
    assert scan._choose(None, "cuda", 16) == "associative"
    assert [record.message.partition(" cannot")[0] for record in caplog.records[:2]] == [
        "Mamba blocks on CUDA run unfused, causal-conv1d",
        "no CUDA selective scan, mamba-ssm",
    ]
    assert all("--no-build-isolation" in record.message for record in caplog.records[:2])


@pytest.mark.parametrize(
    "error",
    [ImportError("undefined symbol"), AttributeError("no attribute"), RuntimeError("transformers")],
)
def test_kernels_that_cannot_be_imported_are_not_used(error, installed, monkeypatch, caplog):
    monkeypatch.setattr(cuda.importlib, "import_module", raising(error))
    assert not cuda.available()
    assert not cuda.convolution_available()
    assert caplog.text.count(str(error)) == 2


def test_each_name_loads_its_backend():
    inputs = make_inputs(1, 2, 5, 3)
    expected = selective_scan_reference(**inputs)
    assert torch.equal(selective_scan(**inputs, backend="reference"), expected)
    assert torch.equal(selective_scan(**inputs, backend="cpu"), selective_scan_cpu(**inputs))
    if not cuda.available():
        with pytest.raises(RuntimeError, match="mamba-ssm"):
            selective_scan(**inputs, backend="cuda")


# ---------------------------------------------------------------------------------- token by token


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("leave_out", [(), ("D",), ("z",), ("delta_bias",), OPTIONAL])
@pytest.mark.parametrize("softplus", [False, True])
def test_steps_give_what_the_scan_gives(backend, leave_out, softplus):
    inputs = make_inputs(3, 4, 2 * CHUNK + 1, 5, leave_out=leave_out)
    if not softplus:
        inputs["delta"] = inputs["delta"].exp()
    out, last = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True, backend=backend)
    state, outputs = torch.zeros_like(last), []
    for t in range(out.shape[-1]):
        token = {name: x[..., t] if x.ndim == 3 else x for name, x in inputs.items()}
        before, kept = state, state.clone()
        y, state = selective_scan_step(state, **token, delta_softplus=softplus)
        assert torch.equal(before, kept)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=-1), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forms", [("two groups", "one for all"), ("a group a channel", "one group")])
def test_steps_in_groups_give_what_the_scan_gives(forms):
    inputs = {name: x.double() for name, x in inputs_of(forms, (3, 4, 5, 2)).items()}
    out, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    state = torch.zeros_like(last)
    for t in range(out.shape[-1]):
        token = {name: x[..., t] if x.ndim > 2 else x for name, x in inputs.items()}
        y, state = selective_scan_step(state, **token, delta_softplus=True)
        torch.testing.assert_close(y, out[..., t])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"state": torch.zeros(1, 3, 5)}, "state is"),
        ({"B": torch.ones(1, 5)}, "B is"),
        ({"C": torch.ones(2, 2, 5)}, "groups"),
        ({"delta": torch.ones(2, 1)}, "delta is"),
        ({"u": torch.ones(3)}, "u and delta"),
    ],
)
def test_a_step_refuses_what_does_not_fit(wrong, said):
    token = {name: x[..., 0] if x.ndim == 3 else x for name, x in make_inputs(2, 3, 1, 5).items()}
    with pytest.raises(ValueError, match=said):
        selective_scan_step(**{"state": torch.zeros(2, 3, 5)} | token | wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_compute_in_the_precision_of_the_scan(dtype):
    inputs = {name: x.to(dtype) for name, x in make_inputs(2, 3, 1, 5).items()}
    out, last = selective_scan_reference(**inputs, delta_softplus=True, return_last_state=True)
    token = {name: x[..., 0] if x.ndim == 3 else x for name, x in inputs.items()}
    y, state = selective_scan_step(torch.zeros_like(last), **token, delta_softplus=True)
    assert (y.dtype, state.dtype) == (out.dtype, last.dtype)
    torch.testing.assert_close(y, out[..., 0])
    torch.testing.assert_close(state, last)


# ---------------------------------------------------------------------------------- compiled and exported


def operator_arguments(inputs: dict[str, Tensor]) -> tuple:
    """Of torch.ops.pkd.selective_scan, which takes B and C as (batch, length, d_state)."""
    from pkd_lightning.kernels.scan import custom_op  # noqa: F401  # registers the operator

    leaves = {name: x.mT.contiguous() if name in "BC" else x.clone() for name, x in inputs.items()}
    return *(leaves[name].requires_grad_() if name in leaves else None for name in INPUTS), True


@pytest.mark.parametrize("leave_out", [(), OPTIONAL])
def test_operator_is_registered_as_torch_wants_it(leave_out, layout):
    arguments = operator_arguments(make_inputs(*layout, 9, 5, leave_out=leave_out))
    torch.library.opcheck(torch.ops.pkd.selective_scan.default, arguments)
    out, last_state, _ = torch.ops.pkd.selective_scan(*arguments)
    expected = selective_scan_cpu(**make_inputs(*layout, 9, 5, leave_out=leave_out), delta_softplus=True)
    assert torch.equal(out, expected)
    assert last_state.shape == (*layout, 5)


def test_flop_counters_count_the_operator():
    arguments = operator_arguments(make_inputs(2, 3, 9, 5))
    with FlopCounterMode(display=False) as counter:
        torch.ops.pkd.selective_scan(*arguments)
    assert counter.get_total_flops() == 2 * scan_macs(2, 9, 3, 5)


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    torch._dynamo.reset()
    return MambaClassifier((1, 8, 8), 4, seq_len=16, d_model=3, n_blocks=2, d_state=5, d_state_step=2, norm="rms")


def logits_and_gradients(function, model: nn.Module, images: Tensor) -> list[Tensor]:
    logits = function(images)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(images)) % 4)
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_compiles(model: nn.Module, backend: str) -> None:
    images = torch.randn(6, 1, 8, 8)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    actual = logits_and_gradients(compiled, compiled, images)
    for ours, theirs in zip(actual, logits_and_gradients(model, model, images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_compiled_without_code_generation(classifier):
    assert_compiles(classifier, "aot_eager")


@pytest.mark.slow  # half a minute of a C++ compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor(classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert_compiles(classifier, "inductor")


def test_exported_for_any_batch(classifier):
    batch = torch.export.Dim("batch")
    exported = torch.export.export(classifier, (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: batch},)).module()
    for size in (2, 7, 20):  # 20: then the lanes are sequences
        images = torch.randn(size, 1, 8, 8)
        torch.testing.assert_close(exported(images), classifier(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"C": torch.ones(2, 5, 7)}, "expected"), ({"backend": "triton"}, "backend is 'triton'")]
)
def test_compiled_code_refuses_what_other_code_refuses(wrong, said):
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, backend="eager")
    with pytest.raises((ValueError, RuntimeError), match=said):
        compiled(**make_inputs(2, 3, 7, 4) | wrong)


def test_compiled_with_groups():
    torch._dynamo.reset()
    inputs = inputs_of(("two groups", "one for all"), (2, 4, 7, 3))
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), selective_scan(**inputs))


def test_tensors_without_memory_are_not_read():
    """In a process of its own: reading them would end it."""
    code = """
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from pkd_lightning.models.mamba import Mamba
        for fused in (True, False):
            with FakeTensorMode():
                mixer = Mamba(4, 8)
                mixer.fused = fused
                assert mixer(torch.randn(2, 7, 4)).shape == (2, 7, 4)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True, timeout=60)


# ---------------------------------------------------------------------------------- plain PyTorch on other devices


def in_both(function: Callable, reference: Callable, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Output, last state and all gradients of two scans."""
    found = []
    for scan_ in (function, reference):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        out, state = scan_(**leaves, delta_softplus=True, return_last_state=True)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(x) for x in (out, state)]
        grads = torch.autograd.grad((out, state), list(leaves.values()), weights, allow_unused=True)
        found.append({"out": out.detach(), "state": state.detach()} | dict(zip(leaves, grads, strict=True)))
    return found


@pytest.mark.parametrize("length", [1, 2, 3, 255, 256, 257, 600])
@pytest.mark.parametrize("leave_out", [(), OPTIONAL])
def test_associative_agrees_with_the_reference(length, leave_out):
    inputs = {name: x.double() for name, x in make_inputs(2, 3, length, 4, leave_out=leave_out).items()}
    actual, expected = in_both(selective_scan_associative, selective_scan_reference, inputs)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-10, atol=1e-10, msg=name)


def test_associative_of_an_empty_sequence_and_of_half_precision():
    assert selective_scan_associative(**make_inputs(2, 3, 0, 4)).shape == (2, 3, 0)
    inputs = {name: x.bfloat16() for name, x in make_inputs(2, 3, 9, 4).items()}
    out, expected = (
        scan_(**inputs, delta_softplus=True) for scan_ in (selective_scan_associative, selective_scan_reference)
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


# ---------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("leave_out", [(), OPTIONAL])
def test_cuda_agrees_with_the_reference(leave_out):
    if not cuda.available():
        pytest.skip("needs a CUDA device and mamba-ssm")
    inputs = {name: x.cuda() for name, x in make_inputs(2, 4, 130, 16, leave_out=leave_out).items()}

    def gradients(function, dtype):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        out = function(**leaves, delta_softplus=True)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
        return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))

    actual = gradients(selective_scan, torch.float32)
    for name, x in gradients(selective_scan_reference, torch.float64).items():
        assert (actual[name].double() - x).norm() < 1e-4 * x.norm(), name


@pytest.mark.gpu
def test_associative_on_a_gpu_agrees_with_the_reference():
    inputs = {name: x.double().cuda() for name, x in make_inputs(2, 3, 300, 4).items()}
    actual, expected = in_both(selective_scan_associative, selective_scan_reference, inputs)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-8, atol=1e-8, msg=name)


def test_the_operator_checks_what_it_is_given():
    inputs = make_inputs(2, 3, 9, 4)
    u, delta, A, B, C = (inputs[name] for name in ("u", "delta", "A", "B", "C"))
    scan_ = torch.ops.pkd.selective_scan
    with pytest.raises(TypeError, match="float32"):
        scan_(*(x.half() for x in (u, delta, A, B.mT, C.mT)), None, None, None, False)
    with pytest.raises(ValueError, match="expected"):
        scan_(u, delta, A, B.mT[:1, :1, :1], C.mT, None, None, None, False)
    with pytest.raises(ValueError, match=r"batch, length"):
        scan_(u, delta, A, B[0], C.mT, None, None, None, False)


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()])
def test_a_second_derivative_is_refused(loss):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(2, 3, 9, 4).items()}
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(selective_scan_cpu(**inputs)), inputs["u"], create_graph=True)


def test_associative_has_second_derivatives():
    names = ("u", "delta", "A", "B", "C")
    leaves = [make_inputs(1, 2, 5, 3)[name].double().requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(lambda *x: selective_scan_associative(*x, delta_softplus=True), leaves)


def test_a_tensor_without_memory_is_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(TypeError, match="FakeTensor"):
        selective_scan_cpu(**{name: torch.empty_like(x) for name, x in make_inputs(2, 3, 9, 4).items()})


def test_negative_views_keep_their_sign():
    inputs = make_inputs(2, 3, 9, 4)
    u = inputs.pop("u")
    expected, actual = (selective_scan_cpu(x, **inputs, delta_softplus=True) for x in (-u, torch._neg_view(u)))
    torch.testing.assert_close(actual, expected)


def test_export_before_anything_was_called_says_what_to_do():
    code = """
        import torch
        import pkd_lightning
        from pkd_lightning.models.mamba import Mamba
        model, x = Mamba(4, 8).eval(), torch.randn(2, 7, 4)
        try:
            torch.export.export(model, (x,))
        except Exception as error:
            assert "before torch.export" in str(error), error
        model(x)
        model.fused = False
        model(x)
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True, timeout=110)
