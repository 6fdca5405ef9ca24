"""The fused Mamba block against the same block in float64, and the block as a recurrence against its forward pass."""

import math

import pytest
import torch
import torch.ao.nn.quantized.dynamic
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pkd_lightning.kernels import scan, threads
from pkd_lightning.kernels.scan import FUSED_INNER, block, fused_block
from pkd_lightning.kernels.scan.reference import selective_scan_reference
from pkd_lightning.kernels.scan.states import CHUNK
from pkd_lightning.models.mamba import Mamba

COTANGENTS = 3


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    monkeypatch.delenv("PKD_SCAN_BACKEND", raising=False)


def make_block(
    d_model: int, d_state: int = 5, d_conv: int = 4, expand: int = 2, dt_rank: int = 1, seed: int = 0
) -> Mamba:
    """A block without initial values that hide a mistake: every weight random, and the states decay in a few steps.

    The projections are small enough that a step size is not the difference of large numbers: softplus turns the
    rounding of its argument into a relative error of the step, which no float32 computation avoids.
    """
    mixer = Mamba(d_model, d_state, d_conv, expand, dt_rank)
    generator = torch.Generator().manual_seed(seed)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    with torch.no_grad():
        for name, weight in mixer.named_parameters():
            weight.copy_(0.5 * normal(weight) / math.sqrt(weight.shape[-1]))
            if name == "A_log":
                weight.copy_((0.1 + 8 * torch.rand(weight.shape, generator=generator)).log())
            elif name == "dt_proj.bias":
                weight.copy_(normal(weight) - 2)
            elif name == "D":
                weight.copy_(normal(weight))
    return mixer


def make_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cotangents(x: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator).to(x) for _ in range(COTANGENTS)]


def results(mixer: Mamba, tokens: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the tokens and all weights under the first of the cotangents."""
    tokens = tokens.detach().requires_grad_()
    out = mixer(tokens)
    names = ["tokens", *(name for name, _ in mixer.named_parameters())]
    grads = torch.autograd.grad(out, [tokens, *mixer.parameters()], cotangents(out)[0])
    return {"out": out.detach()} | dict(zip(names, grads, strict=True))


def float64_block(mixer: Mamba, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The block by unfused operations, in the dtype of weights and tokens."""
    x, z = F.linear(tokens, weights["in_proj.weight"]).transpose(1, 2).chunk(2, dim=1)
    inner, width = mixer.d_inner, mixer.d_conv
    x = F.conv1d(F.pad(x, (width - 1, 0)), weights["conv1d.weight"], weights["conv1d.bias"], groups=inner)
    x = F.silu(x)
    dt, B, C = (
        F.linear(x.transpose(1, 2), weights["x_proj.weight"])
        .transpose(1, 2)
        .split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=1)
    )
    delta = weights["dt_proj.weight"] @ dt
    A = -torch.exp(weights["A_log"])
    y = selective_scan_reference(x, delta, A, B, C, weights["D"], z, weights["dt_proj.bias"], delta_softplus=True)
    assert isinstance(y, Tensor)
    return F.linear(y.transpose(1, 2), weights["out_proj.weight"])


def in_float64(mixer: Mamba, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`results` computed from the float32 weights by unfused float64 operations, and how large each typically is."""
    weights = {name: x.detach().double().requires_grad_() for name, x in mixer.named_parameters()}
    tokens = tokens.detach().double().requires_grad_()
    return expected_of(float64_block(mixer, weights, tokens), {"tokens": tokens} | weights)


def expected_of(out: Tensor, leaves: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`results` from a float64 output, and how large each typically is.

    Typically: the root mean square over the cotangents, for a sum over batch and steps may cancel under one of them.
    """
    grads = [torch.autograd.grad(out, list(leaves.values()), each, retain_graph=True) for each in cotangents(out)]
    expected = {"out": out.detach()} | dict(zip(leaves, grads[0], strict=True))
    norms = torch.tensor([[x.norm() for x in each] for each in grads]).square().mean(0).sqrt()
    return expected, {"out": out.norm().item()} | dict(zip(leaves, norms.tolist(), strict=True))


def assert_agrees(actual: dict[str, Tensor], expected: dict[str, Tensor], sizes: dict[str, float]) -> None:
    assert actual.keys() == expected.keys() == sizes.keys()
    for name, x in expected.items():
        assert actual[name].shape == x.shape, name
        error = (actual[name].double() - x).norm().item()
        limit = 5e-7 if name == "out" else 5e-6
        assert error <= limit * sizes[name], f"{name}: relative error {error / max(sizes[name], 1e-300):.1e}"


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """For two float32 computations of inputs that are not chosen to be hard."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-4, atol=1e-4 * x.abs().max().item(), msg=name)


def is_fused(mixer: Mamba, tokens: Tensor) -> bool:
    """Whether a call of `mixer` reaches the fused kernels."""
    reached = []
    original = block.mamba_block_cpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "mamba_block_cpu", lambda *tensors: reached.append(1) or original(*tensors))
        mixer(tokens)
    return bool(reached)


def unfused(mixer: Mamba) -> Mamba:
    """`mixer` with the same weights, not a copy, that keeps `in_proj` and `mix` apart."""
    other = Mamba(mixer.d_model, mixer.d_state, mixer.d_conv, mixer.d_inner // mixer.d_model, mixer.dt_rank)
    for module, twin in zip(mixer.modules(), other.modules(), strict=True):
        twin._parameters = module._parameters
    other.fused = False
    return other


# ---------------------------------------------------------------------------------- accuracy


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 40),
    length=st.integers(1, 2 * CHUNK + 5),
    d_model=st.integers(1, 20),
    expand=st.integers(1, 3),
    d_state=st.integers(1, 40),
    d_conv=st.integers(1, 20),
    dt_rank=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@example(batch=3, length=784, d_model=1, expand=2, d_state=58, d_conv=4, dt_rank=1, seed=0)  # the paper's
@example(batch=17, length=49, d_model=1, expand=2, d_state=446, d_conv=4, dt_rank=1, seed=0)
@example(batch=33, length=5, d_model=1, expand=1, d_state=3, d_conv=20, dt_rank=1, seed=0)  # beyond the sequence
@example(
    batch=2, length=70, d_model=1, expand=3, d_state=2, d_conv=CHUNK + 40, dt_rank=2, seed=0
)  # and than two chunks
@example(batch=17, length=37, d_model=52, expand=2, d_state=11, d_conv=6, dt_rank=3, seed=0)  # in_proj's output kept
@example(batch=16, length=5, d_model=128, expand=2, d_state=16, d_conv=4, dt_rank=8, seed=0)
@example(batch=9, length=50, d_model=6, expand=1, d_state=9, d_conv=4, dt_rank=1, seed=0)  # states in two turns
@example(batch=16, length=3 * CHUNK, d_model=20, expand=3, d_state=33, d_conv=CHUNK + 1, dt_rank=3, seed=0)
def test_agrees_with_float64(batch, length, d_model, expand, d_state, d_conv, dt_rank, seed):
    if expand * d_model > FUSED_INNER and batch < 8:
        expand = 1
    mixer = make_block(d_model, d_state, d_conv, expand, dt_rank, seed)
    tokens = make_tokens(batch, length, d_model, seed=seed)
    assert is_fused(mixer, tokens)
    assert_agrees(results(mixer, tokens), *in_float64(mixer, tokens))


@pytest.mark.parametrize("seed", range(5))
def test_fused_and_unfused_agree(seed):
    mixer = make_block(3, 17, 4, 2, 2, seed)
    tokens = make_tokens(18, 45, 3, seed=seed)
    other = unfused(mixer)
    assert is_fused(mixer, tokens)
    assert not is_fused(other, tokens)
    assert_close(results(mixer, tokens), results(other, tokens))


def test_initial_weights_over_a_long_sequence():
    torch.manual_seed(0)
    mixer = Mamba(1, 58)
    tokens = torch.rand(2, 1000, 1)
    assert_agrees(results(mixer, tokens), *in_float64(mixer, tokens))


@pytest.mark.parametrize("d_model", [1, 5])
@pytest.mark.parametrize("poisoned", [0, 15, 16, 18])
def test_a_nan_stays_in_its_sequence_and_after_its_step(d_model, poisoned):
    mixer = make_block(d_model)
    tokens = make_tokens(19, 40, d_model)
    clean = results(mixer, tokens)
    tokens[poisoned, 20, 0] = math.nan
    dirty = results(mixer, tokens)
    others = torch.arange(19) != poisoned
    for name in ("out", "tokens"):
        assert torch.equal(dirty[name][others], clean[name][others])
    assert torch.equal(dirty["out"][poisoned, :20], clean["out"][poisoned, :20])
    assert dirty["out"][poisoned, 20:].isnan().all()
    assert dirty["in_proj.weight"].isnan().any()


# ---------------------------------------------------------------------------------- which blocks are fused


def test_blocks_of_few_channels_are_fused_and_of_more_where_the_batch_fills_the_lanes(monkeypatch):
    monkeypatch.setattr(scan, "FUSED_INNER", 4)  # as the small blocks of this test are the large ones
    for batch, most in ((1, 2), (7, 2), (8, 8), (15, 8), (16, 16)):  # d_inner is twice d_model
        assert is_fused(make_block(most), make_tokens(batch, 3, most))
        assert not is_fused(make_block(most + 1), make_tokens(batch, 3, most + 1))


def test_what_the_kernels_cannot_compute_is_not_fused(monkeypatch):
    mixer, tokens = make_block(2), make_tokens(2, 3, 2)
    assert is_fused(mixer, tokens)
    assert not is_fused(make_block(2).double(), tokens.double())
    with monkeypatch.context() as patch:
        patch.setattr(mixer, "fused", False)
        assert not is_fused(mixer, tokens)
    with monkeypatch.context() as patch:
        patch.setenv("PKD_SCAN_BACKEND", "reference")
        assert not is_fused(mixer, tokens)
        patch.setenv("PKD_SCAN_BACKEND", "fast")
        with pytest.raises(ValueError, match="PKD_SCAN_BACKEND is 'fast'"):
            mixer(tokens)


def test_graphs_hold_operators_and_not_the_fused_block(monkeypatch):
    mixer, tokens = make_block(2), make_tokens(2, 7, 2)
    weights = (mixer.in_proj.weight, mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight)
    weights += (mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D, mixer.out_proj.weight)
    assert fused_block(tokens, *weights) is not None
    for asked in ("torch.compiler.is_compiling", "pkd_lightning.kernels.scan.is_tracing"):
        with monkeypatch.context() as patch:
            patch.setattr(asked, lambda: True)
            assert fused_block(tokens, *weights) is None
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(compiled(tokens), mixer(tokens))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1
    assert any("conv1d" in name for name in called)
    assert any("selective_scan" in name for name in called)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_computed_in_float32(dtype):
    mixer = make_block(3)
    half = make_tokens(4, 20, 3).to(dtype)
    assert is_fused(mixer, half)
    out = mixer(half)
    assert out.dtype == dtype
    assert torch.equal(out, mixer(half.float()).to(dtype))
    assert results(mixer, half)["tokens"].dtype == dtype


def test_half_precision_weights_are_computed_in_float32():
    half = make_block(3).bfloat16()
    single = make_block(3).float()
    single.load_state_dict(half.state_dict())
    tokens = make_tokens(4, 20, 3).bfloat16()
    assert is_fused(half, tokens)
    actual, expected = results(half, tokens), results(single, tokens)
    assert torch.equal(actual["out"], expected["out"])
    for name, _ in half.named_parameters():
        assert torch.equal(actual[name], expected[name].bfloat16()), name


# ---------------------------------------------------------------------------------- autograd


def test_no_grad_gives_the_same_output_and_repeats_are_identical():
    mixer, tokens = make_block(3), make_tokens(18, 50, 3)
    first, second = results(mixer, tokens), results(mixer, tokens)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(mixer(tokens), first["out"])
    with torch.inference_mode():
        assert torch.equal(mixer(tokens), first["out"])
    mixer.requires_grad_(False)
    assert not mixer(tokens).requires_grad
    assert torch.equal(mixer(tokens), first["out"])


@pytest.mark.parametrize(
    "trained", [("A_log", "out_proj.weight"), ("conv1d.bias",), ("in_proj.weight", "dt_proj.bias")]
)
def test_frozen_weights_leave_the_gradients_of_the_others(trained):
    mixer, tokens = make_block(3), make_tokens(5, 20, 3)
    expected = results(mixer, tokens)
    for name, weight in mixer.named_parameters():
        weight.requires_grad_(name in trained)
    out = mixer(tokens)
    out.backward(cotangents(out)[0])
    for name, weight in mixer.named_parameters():
        assert (weight.grad is not None) == (name in trained), name
        assert weight.grad is None or torch.equal(weight.grad, expected[name]), name


@pytest.mark.parametrize("d_model", [1, 3])
def test_two_threads_compute_what_one_computes(d_model):
    mixer, tokens = make_block(d_model, 40), make_tokens(70, 420 // d_model, d_model)
    assert tokens.numel() * 2 * 40 >= threads.WORTHWHILE
    one = results(mixer, tokens)
    torch.set_num_threads(2)
    try:
        two = results(mixer, tokens)
    finally:
        torch.set_num_threads(1)
    assert_agrees(two, *in_float64(mixer, tokens))
    for name in ("out", "tokens"):
        assert torch.equal(two[name], one[name]), name
    # the sums over two parts of the batch are rounded otherwise: else only one thread was at work
    assert any(not torch.equal(two[name], one[name]) for name in one)


@pytest.mark.parametrize("loss", [Tensor.sum, lambda y: y.square().sum()])  # constant gradients are no exception
def test_a_second_derivative_is_refused(loss):
    mixer, tokens = make_block(2), make_tokens(2, 5, 2).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(mixer(tokens)), tokens, create_graph=True)


LAYERS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


class Adapter(torch.nn.Linear):
    """A layer that does more than its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Wrapped(torch.nn.Module):
    """A low-rank adapter, reduced to what matters: an own parameter beside the layer, random in training."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base, self.shift = base, torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift * torch.rand(()) if self.training else self.shift
        return self.base(x) + shift


def hook(mixer, name):
    getattr(mixer, name).register_forward_hook(lambda module, inputs, output: output + 1)


def pre_hook(mixer, name):
    getattr(mixer, name).register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def own_forward(mixer, name):
    layer = getattr(mixer, name)
    original = layer.forward
    layer.forward = lambda x: original(x) + 1


def wrap(mixer, name):
    setattr(mixer, name, Wrapped(getattr(mixer, name)))


def prune_and_train(mixer, name):
    """A training step changes what the mask is applied to, and the weight only follows in a call of the layer."""
    layer = getattr(mixer, name)
    torch.nn.utils.prune.random_unstructured(layer, "weight", amount=0.4)
    with torch.no_grad():
        layer.weight_orig.mul_(3)


def parametrise(mixer, name):
    layer = torch.nn.utils.parametrizations.weight_norm(getattr(mixer, name))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


def quantise(mixer, name):
    layer = getattr(mixer, name)
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    kinds = torch.ao.nn.quantized.dynamic
    setattr(mixer, name, (kinds.Conv1d if name == "conv1d" else kinds.Linear).from_float(layer))


def all_layers(mixer, name):
    """A hook on every module of the process sees the layer, too."""
    layer = getattr(mixer, name)
    change = lambda module, inputs, output: output + 1 if module is layer else None  # noqa: E731
    return torch.nn.modules.module.register_module_forward_hook(change)


TOUCHED = (hook, pre_hook, own_forward, wrap, prune_and_train, parametrise, quantise, all_layers)


def loud_block() -> Mamba:
    """A block in whose output every layer shows."""
    mixer = make_block(3, dt_rank=2)
    with torch.no_grad():
        for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj):
            linear.weight.mul_(4)
    return mixer


def in_steps(mixer: Mamba, tokens: Tensor) -> Tensor:
    state, outputs = None, []
    for token in tokens.unbind(1):
        out, state = mixer.step(token, state)
        outputs.append(out)
    return torch.stack(outputs, 1)


def by_calls(mixer: Mamba, tokens: Tensor) -> Tensor:
    """The block with every layer called on the whole sequence, and the oracle's scan without its bias."""
    x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
    x = F.silu(mixer.conv1d(x)[..., : tokens.shape[1]])
    dt, B, C = mixer.x_proj(x.mT).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    delta = F.softplus(mixer.dt_proj(dt)).mT
    y = selective_scan_reference(x, delta, -torch.exp(mixer.A_log), B.mT, C.mT, mixer.D, z)
    return mixer.out_proj(y.mT)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("touch", TOUCHED)
def test_a_layer_that_does_more_than_apply_its_weights_is_called(touch, name):
    mixer, tokens = loud_block().eval(), 4 * make_tokens(2, 7, 3)
    before, before_by_steps = mixer(tokens).detach(), in_steps(mixer, tokens).detach()
    handle = touch(mixer, name)
    mixer.eval()
    try:
        with torch.no_grad():
            expected = by_calls(mixer, tokens)
            assert not is_fused(mixer, tokens)
            after, stepped = mixer(tokens), in_steps(mixer, tokens)
    finally:
        if handle is not None:
            handle.remove()
    effect = (expected - before).abs().max().item()
    assert effect > 1e-4
    torch.testing.assert_close(after, expected, rtol=0, atol=effect / 20)
    if touch is quantise:  # its scale is that of what is computed at once: not the same in steps
        assert (stepped - before_by_steps).abs().max() > effect / 100
    else:
        first = mixer.d_conv - 1 if (touch, name) == (pre_hook, "conv1d") else 0  # inputs before the first are zeros
        torch.testing.assert_close(stepped[:, first:], expected[:, first:], rtol=0, atol=effect / 20)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("fused", [True, False])
def test_what_wraps_a_layer_is_trained(name, fused):
    torch.manual_seed(0)
    mixer, tokens = loud_block(), 4 * make_tokens(2, 7, 3)
    mixer.fused = fused
    wrap(mixer, name)
    first, second = mixer(tokens), mixer(tokens)
    assert not torch.equal(first, second)  # in training mode
    wrapper = getattr(mixer, name)
    for out in (first, in_steps(mixer, tokens)):
        wrapper.shift.grad = None
        out.square().sum().backward()
        assert wrapper.shift.grad.abs() > 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_of_the_backward_pass_are_called(name):
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        mixer, seen = make_block(3), []
        getattr(getattr(mixer, name), register)(lambda module, *grads, seen=seen: seen.append(grads))
        mixer(make_tokens(2, 7, 3).requires_grad_()).sum().backward()
        assert len(seen) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda mixer: setattr(mixer, "in_proj", Adapter(3, 12, bias=False)),
        lambda mixer: setattr(mixer, "in_proj", torch.nn.Linear(3, 12)),
        lambda mixer: setattr(mixer, "out_proj", torch.nn.Linear(6, 3)),
        lambda mixer: setattr(mixer, "dt_proj", torch.nn.Linear(1, 6, bias=False)),
        lambda mixer: setattr(mixer, "conv1d", torch.nn.Conv1d(6, 6, 4, groups=6, padding=3, bias=False)),
        lambda mixer: setattr(mixer, "conv1d", torch.nn.Conv1d(6, 6, 4, padding=3)),
        lambda mixer: setattr(mixer, "conv1d", torch.nn.Conv1d(6, 6, 2, groups=6, padding=3, dilation=3)),
    ],
)
def test_layers_of_the_same_class_that_are_built_otherwise_are_called(change):
    torch.manual_seed(0)
    mixer, tokens = make_block(3), make_tokens(2, 7, 3)
    change(mixer)
    with torch.no_grad():
        expected = by_calls(mixer, tokens)
        assert not is_fused(mixer, tokens)
        torch.testing.assert_close(mixer(tokens), expected, rtol=1e-4, atol=1e-5)
    if mixer.conv1d.dilation == (1,):
        torch.testing.assert_close(in_steps(mixer, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conv1d", "dt_proj"])
def test_a_weight_of_another_class_is_left_to_its_layer(name):
    """As quantisation libraries have: the layer stays, its weight knows a few functions and computes in its own way."""

    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert function is not Tensor.__getitem__, "not one of the functions"
            if function not in (F.linear, F.conv1d):
                return super().__torch_function__(function, types, args, kwargs or {})
            return function(args[0], 2 * args[1].as_subclass(Tensor), *args[2:], **(kwargs or {}))

    mixer, twin, tokens = make_block(3), make_block(3), make_tokens(2, 7, 3)
    layer = getattr(mixer, name)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Doubled))
    assert type(layer.weight) is Doubled
    with torch.no_grad():
        getattr(twin, name).weight.mul_(2)
    for function in (mixer, lambda tokens: in_steps(mixer, tokens)):
        torch.testing.assert_close(function(tokens), twin(tokens), rtol=1e-4, atol=1e-5)


def test_a_mix_of_ones_own_is_called(monkeypatch):
    class Own(Mamba):
        def mix(self, xz: Tensor) -> Tensor:
            return xz[..., : self.d_model]

    mixer, tokens = Own(3), make_tokens(2, 7, 3)
    assert torch.equal(mixer(tokens), mixer.in_proj(tokens)[..., :3])
    mixer = make_block(3)
    monkeypatch.setattr(mixer, "mix", lambda xz: xz[..., :3])
    assert torch.equal(mixer(tokens), mixer.in_proj(tokens)[..., :3])


def test_untouched_blocks_stay_fused_after_hooks_and_pruning_are_removed():
    mixer, tokens = make_block(3), make_tokens(2, 7, 3)
    handle = mixer.dt_proj.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not is_fused(mixer, tokens)
    handle.remove()
    torch.nn.utils.prune.random_unstructured(mixer.x_proj, "weight", amount=0.4)
    assert not is_fused(mixer, tokens)
    torch.nn.utils.prune.remove(mixer.x_proj, "weight")
    assert is_fused(mixer, tokens)


def test_a_block_in_float64_computes_in_float64():
    mixer, tokens = make_block(3, 6).double(), make_tokens(2, 7, 3).double()
    torch.testing.assert_close(mixer(tokens), by_calls(mixer, tokens), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_steps(mixer, tokens), by_calls(mixer, tokens), rtol=1e-12, atol=1e-12)


def test_a_negative_view_keeps_its_sign():
    mixer, tokens = make_block(2), make_tokens(2, 5, 2)
    torch.testing.assert_close(mixer(torch._neg_view(tokens)), mixer(-tokens))
    leaf = tokens.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mixer(leaf), leaf, torch._neg_view(tokens))
    (expected,) = torch.autograd.grad(mixer(leaf), leaf, -tokens)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("change", [lambda x: x.half(), lambda x: x[:1], lambda x: torch.empty(0)])
def test_weights_replaced_before_the_backward_pass_are_noticed(change):
    mixer, tokens = make_block(2), make_tokens(2, 5, 2)
    y = mixer(tokens)
    mixer.x_proj.weight.data = change(mixer.x_proj.weight.data)
    with pytest.raises(RuntimeError, match="replaced"):
        y.sum().backward()


def test_other_default_dtype_and_device():
    mixer, tokens = make_block(8), make_tokens(17, 20, 8)
    expected = results(mixer, tokens)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            y = mixer(tokens)
            y.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(y.detach(), expected["out"])


def test_fewer_inner_channels_than_tokens_have():
    """No `Mamba` is built so; the kernel allows it."""
    mixer = make_block(3)  # 6 inner channels
    weights = [mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight, mixer.dt_proj.weight]
    weights += [mixer.dt_proj.bias, mixer.A_log, mixer.D]
    in_proj, out_proj = make_tokens(12, 16, seed=3) / 4, make_tokens(16, 6, seed=4)
    tokens = make_tokens(2, 9, 16).requires_grad_()
    narrow = block.mamba_block_cpu(tokens, in_proj, *weights, out_proj)
    mixer.out_proj = torch.nn.Linear(6, 16, bias=False)
    mixer.out_proj.weight.data = out_proj
    expected = mixer.mix(F.linear(tokens, in_proj))
    torch.testing.assert_close(narrow, expected, rtol=1e-4, atol=1e-5)
    grads = (torch.autograd.grad(y.square().sum(), tokens)[0] for y in (narrow, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_non_contiguous_tokens_weights_and_cotangents():
    mixer, tokens = make_block(3), make_tokens(17, 20, 3)
    expected = results(mixer, tokens)
    wide = torch.full((17, 20, 6), math.nan)
    wide[..., ::2] = tokens
    views = (tokens.transpose(0, 1).contiguous().transpose(0, 1), wide[..., ::2], tokens.mT.contiguous().mT)
    with torch.no_grad():
        mixer.x_proj.weight.data = mixer.x_proj.weight.T.contiguous().T
        mixer.out_proj.weight.data = torch.stack((mixer.out_proj.weight, mixer.out_proj.weight), -1)[..., 0]
    for view in views:
        assert not view.is_contiguous()
        actual = results(mixer, view)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    out = mixer(tokens.requires_grad_())
    (dense,) = torch.autograd.grad(out, tokens, torch.ones_like(out), retain_graph=True)
    (expanded,) = torch.autograd.grad(out.sum(), tokens)
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("shape", [(0, 7, 3), (2, 0, 3)])
def test_nothing_in_nothing_out(shape):
    mixer = make_block(3)
    actual = results(mixer, torch.empty(shape))
    assert actual["out"].shape == actual["tokens"].shape == shape
    for name, weight in mixer.named_parameters():
        assert torch.equal(actual[name], torch.zeros_like(weight)), name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 7, 2), (7, 3), (2, 2, 7, 3)])
def test_tokens_of_another_shape_are_refused(shape, fused):
    mixer = make_block(3)
    mixer.fused = fused
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        mixer(make_tokens(*shape))


@pytest.mark.parametrize("fused", [True, False])
def test_weights_without_memory_are_refused(fused):
    with torch.device("meta"):
        mixer = Mamba(3)
    mixer.fused = fused
    with pytest.raises((ValueError, RuntimeError)):
        mixer(make_tokens(2, 7, 3))


@pytest.mark.parametrize("fused", [True, False])
def test_integer_tokens_are_refused(fused):
    mixer = make_block(3)
    mixer.fused = fused
    with pytest.raises((TypeError, RuntimeError)):
        mixer(torch.ones(2, 7, 3, dtype=torch.long))


# ---------------------------------------------------------------------------------- token by token


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("d_conv", [1, 4])
@pytest.mark.parametrize(("d_model", "d_state", "dt_rank"), [(1, 3, 1), (6, 17, 2)])
def test_steps_give_what_the_whole_sequence_gives(d_model, d_state, dt_rank, d_conv, fused):
    mixer = make_block(d_model, d_state, d_conv, 2, dt_rank)
    mixer.fused = fused
    tokens = make_tokens(3, 2 * CHUNK + 3, d_model)
    assert is_fused(mixer, tokens) == fused
    state, outputs = None, []
    with torch.no_grad():
        for token in tokens.unbind(1):
            before = state
            kept = None if before is None else [x.clone() for x in before]
            out, state = mixer.step(token, state)
            outputs.append(out)
            if kept is not None:  # a state is left as it was
                assert all(torch.equal(x, y) for x, y in zip(before, kept, strict=True))
        expected = mixer(tokens)
        x, _ = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=1e-5, atol=1e-6)
    assert state.h.shape == (3, mixer.d_inner, d_state)
    torch.testing.assert_close(state.window, x[..., tokens.shape[1] - d_conv + 1 :])


@pytest.mark.gpu
@pytest.mark.parametrize("d_conv", [1, 4])  # mamba_ssm fuses blocks whose convolution is 2 to 4 wide
def test_a_block_on_a_gpu_agrees_with_the_cpu(d_conv):
    mixer, tokens = make_block(8, 16, d_conv), make_tokens(3, 130, 8)
    expected, sizes = in_float64(mixer, tokens)
    actual = results(mixer.cuda(), tokens.cuda())
    for name, x in expected.items():
        assert (actual[name].cpu().double() - x).norm() <= 1e-3 * sizes[name], name
