"""Every scan backend against the reference in float64, and the reference against loops written from the equations."""

import logging
import math
import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pkd_lightning.models import scan
from pkd_lightning.models.scan import cuda, selective_scan
from pkd_lightning.models.scan.cpu import CHUNK, selective_scan_cpu
from pkd_lightning.models.scan.reference import selective_scan_reference

OPTIONAL = ("D", "z", "delta_bias")


def make_inputs(
    batch: int, channels: int, length: int, states: int, seed: int = 0, leave_out: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Float32 inputs; delta is before softplus, which gives about 0.02-0.7, or absolute for use without it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length) - 2,
        "A": -0.1 - 8 * torch.rand(channels, states, generator=generator),
        "B": normal(batch, states, length),
        "C": normal(batch, states, length),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels),
    }
    return {name: x for name, x in inputs.items() if name not in leave_out}


def run(function, inputs: dict[str, Tensor], dtype: torch.dtype, softplus: bool = True) -> dict[str, Tensor]:
    """The output, the last state and all gradients under fixed random cotangents."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    out, state = function(**leaves, delta_softplus=softplus, return_last_state=True)
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_state = (torch.randn(x.shape, generator=generator).to(x) for x in (out, state))
    grads = torch.autograd.grad((out, state), list(leaves.values()), (grad_out, grad_state))
    return {"out": out.detach(), "state": state.detach()} | dict(zip(leaves, grads, strict=True))


def assert_agrees(actual: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 0.0) -> None:
    """Relative L2 error; floor, an absolute size per element, is for sizes so small that everything may cancel."""
    for name, x in expected.items():
        limit = 1e-6 if name in ("out", "state") else 5e-6
        assert actual[name].shape == x.shape
        error = torch.linalg.vector_norm(actual[name].double() - x).item()
        scale = torch.linalg.vector_norm(x).item() + floor * math.sqrt(x.numel())
        assert error <= limit * scale, f"{name}: relative error {error / max(scale, 1e-300):.1e}"


def check_cpu(inputs: dict[str, Tensor], softplus: bool = True, floor: float = 0.0) -> None:
    actual = run(selective_scan_cpu, inputs, torch.float32, softplus)
    assert_agrees(actual, run(selective_scan_reference, inputs, torch.float64, softplus), floor)


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
            last[b, d, n] = math.exp(step * A[d, n]) * last[b, d, n] + step * B[b, n, t] * u[b, d, t]
            y += C[b, n, t] * last[b, d, n]
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


@pytest.mark.parametrize("leave_out", [(), OPTIONAL])
def test_reference_gradients(leave_out):
    inputs = make_inputs(2, 2, 3, 2, leave_out=leave_out)
    leaves = [x.double().requires_grad_() for x in inputs.values()]

    def function(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan_reference(**named, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("batch", "channels", "length", "states"),
    [
        (2, 2, 49, 16),
        (1, 2, 300, 58),
        (1, 2, 200, 155),
        (2, 24, 64, 16),
        (2, 3, 65, 5),
        (3, 4, CHUNK - 1, 1),
        (2, 3, 2 * CHUNK, 33),
        (3, 5, 1, 16),
    ],
)
def test_cpu_agrees_with_the_reference(batch, channels, length, states):
    check_cpu(make_inputs(batch, channels, length, states))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 4),
    length=st.integers(1, 2 * CHUNK + 3),
    states=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    softplus=st.booleans(),
    leave_out=st.sets(st.sampled_from(OPTIONAL)).map(lambda names: tuple(sorted(names))),
)
def test_cpu_agrees_on_any_shape_and_any_optional_arguments(batch, channels, length, states, seed, softplus, leave_out):
    inputs = make_inputs(batch, channels, length, states, seed, leave_out)
    if not softplus:
        inputs["delta"] = inputs["delta"].exp()
        inputs |= {"delta_bias": inputs["delta_bias"].abs()} if "delta_bias" in inputs else {}
    check_cpu(inputs, softplus, floor=1.0)


def test_strided_inputs():
    inputs = make_inputs(3, 4, 70, 16)
    strided = {name: x for name, x in inputs.items() if x.ndim != 3}
    for name in ("u", "delta", "B"):  # as a projection of (batch, length, features) leaves them
        strided[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("z", "C"):
        strided[name] = torch.stack((inputs[name], torch.zeros_like(inputs[name])), dim=-1)[..., 0]
    strided["D"] = inputs["D"].repeat_interleave(2)[::2]
    strided["A"] = inputs["A"].T.contiguous().T
    assert not any(x.is_contiguous() for name, x in strided.items() if name != "delta_bias")
    expected = selective_scan_cpu(**inputs, delta_softplus=True)
    assert torch.equal(selective_scan_cpu(**strided, delta_softplus=True), expected)
    # a cotangent that is an expanded scalar
    u = inputs["u"].requires_grad_()
    out = selective_scan_cpu(**inputs, delta_softplus=True)
    (dense,) = torch.autograd.grad(out, u, torch.ones_like(out), retain_graph=True)
    (expanded,) = torch.autograd.grad(out.sum(), u)
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("delta", [0.0, 1e-4, 50.0])
@pytest.mark.parametrize("softplus", [False, True])
def test_extreme_steps_and_decays(delta, softplus):
    inputs = make_inputs(2, 3, 70, 20, leave_out=("delta_bias",))
    inputs["A"] = -torch.logspace(-3, math.log10(500), 60).reshape(3, 20)
    inputs["delta"] = torch.full_like(inputs["delta"], delta)
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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
@pytest.mark.parametrize("states", [5, 37])
def test_nan_and_inf_come_out_where_the_reference_has_them(name, value, states):
    inputs = make_inputs(2, 3, 9, states)
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


def test_the_backward_pass_keeps_states_only_at_chunk_boundaries():
    batch, channels, chunks, states = 2, 4, 5, 32
    inputs = make_inputs(batch, channels, chunks * CHUNK, states)
    inputs["u"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        selective_scan_cpu(**inputs)
    arguments = sum(x.numel() for x in inputs.values())
    assert sum(saved) <= arguments + inputs["u"].numel() + batch * channels * chunks * states


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


def test_two_python_threads_at_once():
    cases = [make_inputs(4, 3, 150, 37, seed) for seed in range(2)]
    alone = [run(selective_scan_cpu, inputs, torch.float32) for inputs in cases]
    barrier = threading.Barrier(2, timeout=30)

    def repeat(inputs):
        barrier.wait()
        return [run(selective_scan_cpu, inputs, torch.float32) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        for expected, results in zip(alone, pool.map(repeat, cases), strict=True):
            assert all(torch.equal(result[name], expected[name]) for result in results for name in expected)


def _run_in_child(inputs, expected):
    torch.set_num_threads(1)  # as a DataLoader worker does
    result = run(selective_scan_cpu, inputs, torch.float32)
    if not all(torch.equal(result[name], expected[name]) for name in expected):
        sys.exit(3)


def test_fork_after_use():
    inputs = make_inputs(2, 3, 70, 16)
    expected = run(selective_scan_cpu, inputs, torch.float32)
    child = multiprocessing.get_context("fork").Process(target=_run_in_child, args=(inputs, expected))
    child.start()
    child.join(timeout=30)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0


def test_without_a_cache_directory_the_kernels_still_compile(caplog):
    from numba import types

    from pkd_lightning.models.scan.cpu import _kernel, _warn_uncached

    _warn_uncached.cache_clear()
    namespace = {}
    exec("def double(x):\n    x[0] *= 2", namespace)  # no source file, so numba finds no place for its cache
    with caplog.at_level(logging.WARNING):
        double = _kernel(types.float32[::1])(namespace["double"])
    x = np.ones(1, np.float32)
    double(x)
    assert x[0] == 2
    assert "no writable cache" in caplog.text


def test_importing_the_package_imports_neither_numba_nor_mamba_ssm():
    code = "import sys, pkd_lightning.models.scan; print({'numba', 'mamba_ssm'} & set(sys.modules))"
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
    assert chosen(D=torch.ones(1, dtype=torch.float64)) == "reference"
    assert [chosen(backend=name) for name in scan.BACKENDS] == list(scan.BACKENDS)
    monkeypatch.setenv("PKD_SCAN_BACKEND", "reference")
    assert chosen() == "reference"
    assert chosen(backend="cpu") == "cpu"


def test_dispatch_rejects_unknown_names(chosen, monkeypatch):
    with pytest.raises(ValueError, match=r"backend is 'triton', allowed are reference, cpu, cuda"):
        chosen(backend="triton")
    monkeypatch.setenv("PKD_SCAN_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"PKD_SCAN_BACKEND is 'fast', allowed are reference, cpu, cuda"):
        chosen()


def test_dispatch_on_a_gpu_without_mamba_ssm_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("PKD_SCAN_BACKEND", raising=False)
    scan._warn_slow.cache_clear()
    monkeypatch.setattr(cuda, "available", lambda: True)
    assert scan._choose(None, "cuda") == "cuda"
    monkeypatch.setattr(cuda, "available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert [scan._choose(None, "cuda") for _ in range(2)] == ["reference"] * 2
    assert len(caplog.records) == 1
    assert "mamba-ssm is missing" in caplog.text
    scan._warn_slow.cache_clear()


def test_each_name_loads_its_backend():
    inputs = make_inputs(1, 2, 5, 3)
    expected = selective_scan_reference(**inputs)
    assert torch.equal(selective_scan(**inputs, backend="reference"), expected)
    assert torch.equal(selective_scan(**inputs, backend="cpu"), selective_scan_cpu(**inputs))
    if not cuda.available():
        with pytest.raises(RuntimeError, match="mamba-ssm"):
            selective_scan(**inputs, backend="cuda")


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
