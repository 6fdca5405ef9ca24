"""Norm, reading order and residual sum as parts of the fused block: against float64, and left to their modules where a
call of one does more."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.kernels.scan import block as kernels
from pkd_lightning.models.blocks import ORDERS, Block
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.config import MambaClassifierConfig
from pkd_lightning.models.mamba import Mamba
from tests.test_block import (
    assert_agrees,
    assert_close,
    cotangents,
    expected_of,
    float64_block,
    make_block,
    make_tokens,
)

CROSS = ORDERS["cross"]
EPS = torch.finfo(torch.float32).eps


def make_residual(
    d_model: int, norm: str = "rms", residual: bool = True, grid: tuple[int, int] = (3, 5), **sizes: int
) -> Block:
    """A block whose every weight shows."""
    config = MambaClassifierConfig(d_model=d_model, norm=norm, residual=residual)
    made = Block(config, 0, grid)
    made.mixer = make_block(d_model, **sizes)
    for weight in made.norm.parameters():
        with torch.no_grad():
            weight.copy_(1 + 0.3 * make_tokens(*weight.shape, seed=7))
    return made


def results(made: Block, tokens: Tensor, grid: tuple[int, int], order: tuple[bool, bool]) -> dict[str, Tensor]:
    tokens = tokens.detach().requires_grad_()
    out = made(tokens, grid, *order)
    names = ["tokens", *(name for name, _ in made.named_parameters())]
    grads = torch.autograd.grad(out, [tokens, *made.parameters()], cotangents(out)[0])
    return {"out": out.detach()} | dict(zip(names, grads, strict=True))


def in_float64(
    made: Block, tokens: Tensor, grid: tuple[int, int], order: tuple[bool, bool]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`results` by an index of the reading order and operations in float64."""
    leaves = {"tokens": tokens} | dict(made.named_parameters())
    leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    x = leaves["tokens"]
    if "norm.weight" in leaves:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * leaves["norm.weight"]
    columns, backwards = order
    index = torch.arange(tokens.shape[1])
    index = index.view(grid).T.flatten() if columns else index
    index = index.flip(0) if backwards else index
    weights = {name.removeprefix("mixer."): x for name, x in leaves.items()}
    mixed = float64_block(made.mixer, weights, x[:, index])[:, index.argsort()]
    return expected_of(leaves["tokens"] + mixed if made.residual else mixed, leaves)


def passes(made: Block, tokens: Tensor, grid: tuple[int, int] = (3, 5), order: tuple[bool, bool] = (True, True)) -> int:
    """How many calls of the fused kernels did the whole of the block: 1, or 0 where its parts were called."""
    whole = []
    original = kernels.mamba_block_cpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels, "mamba_block_cpu", lambda *tensors, **around: whole.append(around) or original(*tensors, **around)
        )
        made(tokens, grid, *order)
    return sum(bool(around) for around in whole)


# ---------------------------------------------------------------------------------- accuracy

GRIDS = ((1, 33), (33, 1), (7, 7), (3, 5), (4, 12), (1, 1))


@pytest.mark.parametrize("order", CROSS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_order_of_every_raster_agrees_with_float64(grid, order):
    for batch, d_model, norm, residual in ((17, 3, "rms", True), (2, 1, "none", True), (16, 17, "rms", False)):
        made = make_residual(d_model, norm, residual, grid)
        tokens = make_tokens(batch, grid[0] * grid[1], d_model)
        assert passes(made, tokens, grid, order) == 1
        assert_agrees(results(made, tokens, grid, order), *in_float64(made, tokens, grid, order))


@pytest.mark.parametrize("batch", [1, 15, 16, 33])
@pytest.mark.parametrize(
    "sizes",
    [
        {"d_state": 1, "d_conv": 1, "expand": 1},
        {"d_state": 7, "d_conv": 2, "expand": 3, "dt_rank": 2},
        {"d_state": 9, "d_conv": 3, "expand": 4},
        {"d_state": 40, "d_conv": 5, "expand": 1},  # an odd number of channels, and sums of sums over the states
    ],
)
def test_sizes_of_all_kinds_agree_with_float64(sizes, batch):
    for norm, residual in (("rms", True), ("rms", False), ("none", True), ("none", False)):
        made = make_residual(5, norm, residual, (4, 9), **sizes)
        tokens = make_tokens(batch, 36, 5)
        assert passes(made, tokens, (4, 9)) == 1
        assert_agrees(results(made, tokens, (4, 9), (True, True)), *in_float64(made, tokens, (4, 9), (True, True)))


def test_large_blocks_which_keep_what_in_proj_gives_agree_with_float64():
    made, tokens = make_residual(kernels.KEPT, d_conv=3, grid=(5, 7)), make_tokens(18, 35, kernels.KEPT)
    for order in CROSS:
        assert passes(made, tokens, (5, 7), order) == 1
        assert_agrees(results(made, tokens, (5, 7), order), *in_float64(made, tokens, (5, 7), order))


@pytest.mark.parametrize("direction", ["forward", "alternating", "cross"])
def test_a_classifier_computes_what_its_parts_do(direction):
    torch.manual_seed(0)
    options = {"tokeniser": "patches", "patch_size": 2, "d_model": 6, "d_state": 3, "norm": "rms", "head": "grid"}
    model = MambaClassifier((1, 8, 12), 4, n_blocks=5, direction=direction, shared=direction == "cross", **options)
    twin = copy.deepcopy(model)
    for made in twin.blocks:
        made.mixer.fused = False
    images = torch.randn(19, 1, 8, 12)
    computed = []
    for each in (model, twin):
        out = each(images)
        grads = torch.autograd.grad(out, list(each.parameters()), cotangents(out)[0])
        names = [name for name, _ in each.named_parameters()]
        computed.append({"out": out.detach()} | dict(zip(names, grads, strict=True)))
    assert_close(*computed)
    with torch.no_grad():
        assert torch.equal(model(images), computed[0]["out"])


@pytest.mark.parametrize("order", CROSS)
def test_a_nan_stays_in_its_image(order):
    made, tokens = make_residual(3), make_tokens(19, 15, 3)
    clean = results(made, tokens, (3, 5), order)
    tokens[16, 4, 1] = math.nan
    dirty = results(made, tokens, (3, 5), order)
    others = torch.arange(19) != 16
    for name in ("out", "tokens"):
        assert torch.equal(dirty[name][others], clean[name][others])
        assert dirty[name][16].isnan().any()
    assert dirty["norm.weight"].isnan().any()


def test_a_nan_in_a_decay_is_seen():
    """Of other bits than the usual NaN: `exp2_falling` takes no others."""
    made, tokens = make_residual(3), make_tokens(2, 15, 3)
    with torch.no_grad():
        made.mixer.A_log.view(torch.int32)[0, 0] = 0x7FC00001
        assert made(tokens, (3, 5)).isnan().all(-1).all()


# ---------------------------------------------------------------------------------- tensors of all kinds


def test_tokens_of_any_strides_with_and_without_gradients():
    made, tokens = make_residual(3), make_tokens(17, 15, 3)
    expected = results(made, tokens, (3, 5), (True, False))
    view = tokens.mT.contiguous().mT
    assert not view.is_contiguous()
    actual = results(made, view, (3, 5), (True, False))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    out = made(tokens, (3, 5), True, False)
    out.backward(cotangents(out)[0])
    assert torch.equal(out, expected["out"])
    assert torch.equal(made.norm.weight.grad, expected["norm.weight"])
    made.requires_grad_(False)
    assert not made(tokens, (3, 5), True, False).requires_grad
    assert torch.equal(made(tokens, (3, 5), True, False), expected["out"])


@pytest.mark.parametrize("shape", [(0, 15, 3), (2, 0, 3)])
def test_nothing_in_nothing_out(shape):
    made, grid = make_residual(3), (3, 5) if shape[1] else (0, 5)
    actual = results(made, torch.empty(shape), grid, (True, True))
    assert actual["out"].shape == actual["tokens"].shape == shape
    assert torch.equal(actual["norm.weight"], torch.zeros(3))


def test_a_raster_of_another_length_is_refused():
    made = make_residual(3)
    with pytest.raises(RuntimeError):
        made(make_tokens(2, 14, 3), (3, 5), True)
    weights = made.mixer.plain_weights()
    with pytest.raises(ValueError, match="14 tokens are no raster of 3x5"):
        kernels.mamba_block_cpu(make_tokens(2, 14, 3), *weights, order=kernels.Order(3, 5))
    with pytest.raises(ValueError, match=r"norm is \(4,\), expected \(3,\)"):
        kernels.mamba_block_cpu(make_tokens(2, 14, 3), *weights, norm=torch.ones(4))


def test_two_threads_compute_what_one_computes():
    made, tokens = make_residual(8, d_state=16, grid=(7, 7)), make_tokens(64, 49, 8)
    one = results(made, tokens, (7, 7), (True, True))
    torch.set_num_threads(2)
    try:
        two = results(made, tokens, (7, 7), (True, True))
    finally:
        torch.set_num_threads(1)
    for name in ("out", "tokens"):
        assert torch.equal(two[name], one[name])
    assert_close(two, one)
    assert not torch.equal(two["norm.weight"], one["norm.weight"])  # summed in two parts


# ---------------------------------------------------------------------------------- what is called instead


def hooked(name):
    def touch(made):
        module = made.get_submodule(name)
        module.register_forward_hook(lambda module, inputs, output: output + 1)

    return touch


def own_forward(name):
    def touch(made):
        module = made.get_submodule(name)
        original = module.forward
        module.forward = lambda x: original(x) + 1

    return touch


def every_module(made):
    change = lambda module, inputs, output: output + 1 if module is made.mixer else None  # noqa: E731
    return torch.nn.modules.module.register_module_forward_hook(change)


def other_norm(norm):
    return lambda made: setattr(made, "norm", norm)


def parametrised(made):
    torch.nn.utils.parametrize.register_parametrization(made.norm, "weight", nn.Softplus())


class Louder(Mamba):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


def subclass(made):
    louder = Louder(3)
    louder.load_state_dict(Mamba(3).state_dict())
    made.mixer = louder


TOUCHED = {
    "a hook on the mixer": hooked("mixer"),
    "a hook on the norm": hooked("norm"),
    "a hook on a projection": hooked("mixer.x_proj"),
    "a hook on every module": every_module,
    "a forward of the mixer's own": own_forward("mixer"),
    "a forward of the norm's own": own_forward("norm"),
    "another norm": other_norm(nn.LayerNorm(3)),
    "another eps": other_norm(nn.RMSNorm(3, eps=0.5)),
    "no weight": other_norm(nn.RMSNorm(3, elementwise_affine=False)),
    "a parametrised weight": parametrised,
    "a subclass": subclass,
    "a compiled norm": lambda made: made.norm.compile(backend="eager"),
    "a compiled mixer": lambda made: made.mixer.compile(backend="eager"),
    "not fused": lambda made: setattr(made.mixer, "fused", False),
    "an own mix": lambda made: setattr(made.mixer, "mix", lambda xz: xz[..., :3]),
    "a mixer of the whole raster": lambda made: setattr(made.mixer, "reads_in_order", False),
}


@pytest.mark.parametrize("touch", TOUCHED.values(), ids=TOUCHED)
def test_modules_that_do_more_are_called(touch):
    made, tokens = make_residual(3), make_tokens(2, 15, 3)
    assert passes(made, tokens) == 1
    handle = touch(made)
    try:
        assert passes(made, tokens) == 0
        x = made.norm(tokens)
        whole = not getattr(made.mixer, "reads_in_order", True)
        index = torch.arange(15) if whole else torch.arange(15).view(3, 5).T.flatten().flip(0)
        expected = tokens + made.mixer(x[:, index])[:, index.argsort()]
        torch.testing.assert_close(made(tokens, (3, 5), True, True), expected)
    finally:
        if handle is not None:
            handle.remove()


def test_hooks_of_the_backward_pass_see_mixer_and_norm():
    for name in ("mixer", "norm"):
        made, seen = make_residual(3), []
        made.get_submodule(name).register_full_backward_hook(lambda module, *grads, seen=seen: seen.append(grads))
        made(make_tokens(2, 15, 3).requires_grad_(), (3, 5)).sum().backward()
        assert len(seen) == 1


def test_hooks_of_the_block_itself_leave_it_fused():
    made, tokens, seen = make_residual(3), make_tokens(2, 15, 3), []
    made.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert passes(made, tokens) == 1
    assert len(seen) == 1


def test_other_dtypes_devices_and_traces_are_left_to_the_parts(monkeypatch):
    made, tokens = make_residual(3), make_tokens(2, 15, 3)
    expected = made(tokens, (3, 5), True, True)
    assert passes(made, tokens.bfloat16()) == 0
    assert passes(copy.deepcopy(made).double(), tokens.double()) == 0
    assert made.to("meta")(tokens.to("meta"), (3, 5), True, True).is_meta
    made = make_residual(3)
    for asked in ("torch.compiler.is_compiling", "pkd_lightning.kernels.scan.is_tracing"):
        with monkeypatch.context() as patch:
            patch.setattr(asked, lambda: True)
            assert passes(made, tokens) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(tokens, (3, 5), True, True), expected)
    monkeypatch.setenv("PKD_SCAN_BACKEND", "reference")
    assert passes(made, tokens) == 0
    torch.testing.assert_close(made(tokens, (3, 5), True, True), expected, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused():
    made, tokens = make_residual(2), make_tokens(2, 15, 2).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(made(tokens, (3, 5)).sum(), tokens, create_graph=True)


def test_weights_replaced_before_the_backward_pass_are_noticed():
    made, tokens = make_residual(2), make_tokens(2, 15, 2)
    y = made(tokens, (3, 5))
    made.norm.weight.data = made.norm.weight.data[:1]
    with pytest.raises(RuntimeError, match="replaced"):
        y.sum().backward()
