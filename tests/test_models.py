"""The Mamba block and the classifier against computations from the equations, the published table, one contract."""

import copy
import math

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from pkd_lightning.cli import load_config
from pkd_lightning.cost import measure
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.blocks import ORDERS, Block
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.config import MambaClassifierConfig
from pkd_lightning.models.mamba import Mamba
from pkd_lightning.models.tokens import PatchTokens, PixelTokens, pooled_grid, possible_lengths

Weights = dict[str, Tensor]

# ---------------------------------------------------------------------------------- the published architectures

MNIST = (1, 28, 28)
PUBLISHED = [  # parameters, FLOPs as published
    (620, 686),
    (1_206, 1_372),
    (2_378, 2_744),
    (3_674, 5_096),
    (3_734, 7_448),
    (5_078, 7_448),
    (11_966, 51_744),
]


@pytest.fixture(scope="module")
def mnist_paper():
    return load_config("experiment=mnist_paper")


def test_the_ladder_has_as_many_rungs_as_the_table(mnist_paper):
    ladder = instantiate(mnist_paper.student)
    assert len(ladder) == len(PUBLISHED) == mnist_paper.boosting.rounds
    assert ladder.faults(rounds=7, input_shape=MNIST) == []


@pytest.mark.parametrize("index", range(7))
def test_published_students(mnist_paper, index):
    cost = measure(instantiate(mnist_paper.student).build(index, MNIST, 10), MNIST)
    assert (cost.params, cost.flops_published) == PUBLISHED[index]
    assert cost.macs_total > cost.flops_published


def test_the_published_teacher_of_cifar10():
    shape = (3, 32, 32)
    cost = measure(
        instantiate(load_config("teacher=paper_cifar10").teacher.model)(image_shape=shape, num_classes=10), shape
    )
    assert (cost.params, cost.flops_published) == (443_530, 2_390_016)


def test_published_teacher_and_totals(mnist_paper):
    cost = measure(instantiate(mnist_paper.teacher.model)(image_shape=MNIST, num_classes=10), MNIST)
    assert (cost.params, cost.flops_published) == (34_674, 95_648)
    assert tuple(map(sum, zip(*PUBLISHED, strict=True))) == (28_656, 76_538)


# ---------------------------------------------------------------------------------- computed from the equations


def scrambled(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` without values that hide a mistake: weights of 1, biases of 0, steps so short that nothing decays."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.6 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("dt_proj.bias"):
                parameter.add_(4)
    return module


def float64_leaves(module: nn.Module) -> Weights:
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def mamba_by_hand(weights: Weights, tokens: Tensor) -> Tensor:
    """One image, one token at a time, as a recurrence with a window of the last inputs: (length, d_model)."""
    d_inner, d_state = weights["A_log"].shape
    rank = weights["dt_proj.weight"].shape[1]
    kernel = weights["conv1d.weight"][:, 0]
    width = kernel.shape[1]
    window = [tokens.new_zeros(d_inner)] * width
    h = tokens.new_zeros(d_inner, d_state)
    outputs = []
    for token in tokens:
        xz = weights["in_proj.weight"] @ token
        window = [*window[1:], xz[:d_inner]]
        x = silu(weights["conv1d.bias"] + sum(kernel[:, k] * window[k] for k in range(width)))
        projected = weights["x_proj.weight"] @ x
        B, C = projected[rank : rank + d_state], projected[rank + d_state :]
        dt = torch.log(1 + torch.exp(weights["dt_proj.weight"] @ projected[:rank] + weights["dt_proj.bias"]))
        decay = torch.exp(-torch.exp(weights["A_log"]) * dt[:, None])
        h = decay * h + (dt * x)[:, None] * B
        y = (h @ C + weights["D"] * x) * silu(xz[d_inner:])
        outputs.append(weights["out_proj.weight"] @ y)
    return torch.stack(outputs)


def norm_by_hand(kind: str, weights: Weights, tokens: Tensor) -> Tensor:
    if kind == "none":
        return tokens
    if kind == "rms":
        return weights["weight"] * tokens / torch.sqrt((tokens**2).mean(-1, keepdim=True) + 2.0**-23)
    centred = tokens - tokens.mean(-1, keepdim=True)
    return weights["weight"] * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) + weights["bias"]


def convolution_by_hand(weights: Weights, image: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Windows of an image (C, H, W) one by one: (channels out, rows, columns)."""
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    rows, columns = ((side - size) // stride + 1 for side in padded.shape[1:])
    windows = [
        [padded[:, r * stride : r * stride + size, c * stride : c * stride + size] for c in range(columns)]
        for r in range(rows)
    ]
    return torch.stack(
        [torch.stack([(weights["weight"] * x).sum((1, 2, 3)) + weights["bias"] for x in row], 1) for row in windows], 1
    )


def classifier_by_hand(weights: Weights, image: Tensor, options: dict, raster: tuple[int, int]) -> Tensor:
    """Logits of one image (C, H, W); `raster` is (rows, columns) of the tokens."""
    rows, columns = raster
    norm, head = options["norm"], options["head"]
    tokens = []
    if options["tokeniser"] == "pixels":
        planes = image if options.get("pixel_channels") == "all" else sum(image)[None] / len(image)
        rows //= len(planes)
        height, width = image.shape[1] // rows, image.shape[2] // columns
        for plane in planes:
            for r in range(rows):
                for c in range(columns):
                    block = plane[r * height : (r + 1) * height, c * width : (c + 1) * width]
                    scalar = block.sum() / (height * width)
                    if options["d_model"] == 1:
                        tokens.append(scalar[None])
                    else:
                        tokens.append(weights["tokens.embed.weight"][:, 0] * scalar + weights["tokens.embed.bias"])
    elif options["tokeniser"] == "patches":
        filtered = convolution_by_hand(
            below(weights, "tokens.project."), image, options["patch_size"], options["patch_stride"], 0
        )
        tokens = [filtered[:, r, c] for r in range(rows) for c in range(columns)]
    else:
        size, pad = options["patch_size"], options.get("padding", False)
        x = convolution_by_hand(
            below(weights, "tokens.stem."), image, size, options["patch_stride"], size // 2 if pad else 0
        )
        x = convolution_by_hand(below(weights, "tokens.project."), silu(x), 3, 2, 1 if pad else 0)
        assert x.shape[1:] == (rows, columns)
        tokens = [x[:, r, c] for r in range(rows) for c in range(columns)]
    x = torch.stack(tokens)
    by_rows = list(range(len(tokens)))
    by_columns = [r * columns + c for c in range(columns) for r in range(rows)]
    for i in range(options["n_blocks"]):
        order = by_columns if options["direction"] == "cross" and i % 4 >= 2 else by_rows
        order = order[::-1] if options["direction"] != "forward" and i % 2 == 1 else order
        block = f"blocks.{0 if options.get('shared') else i}."
        y = norm_by_hand(norm, below(weights, block + "norm."), x)
        mixed = mamba_by_hand(below(weights, block + "mixer."), torch.stack([y[k] for k in order]))
        y = torch.stack([mixed[order.index(k)] for k in range(len(order))])
        x = x + y if options["residual"] else y
    x = norm_by_hand(norm, below(weights, "norm."), x)
    if head == "flatten":
        features = torch.cat(list(x))
    elif head == "mean":
        features = x.sum(0) / len(x)
    else:
        grid = x.view(*raster, -1)
        half_r, half_c = raster[0] // 2, raster[1] // 2  # even rasters only
        cells = [
            [grid[r : r + half_r, c : c + half_c].mean((0, 1)) for c in (0, half_c)] for r in (0, half_r)
        ]  # (row, column) of (d_model,)
        features = torch.cat([torch.stack([cells[r][c][d] for r in (0, 1) for c in (0, 1)]) for d in range(x.shape[1])])
    return weights["head.weight"] @ features + weights["head.bias"]


def assert_same_function(module: nn.Module, inputs: Tensor, by_hand, tolerance: float = 1e-4) -> None:
    """Output and gradients of a random weighting of it, by inputs and every parameter, as relative L2 errors."""
    leaves, x = float64_leaves(module), inputs.double().requires_grad_()
    expected = torch.stack([by_hand(leaves, one) for one in x])
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    expected_grads = torch.autograd.grad(expected, [x, *leaves.values()], cotangent.double())

    inputs = inputs.clone().requires_grad_()
    actual = module(inputs)
    actual_grads = torch.autograd.grad(actual, [inputs, *module.parameters()], cotangent)
    names = ["output", "input", *leaves]
    for name, ours, theirs in zip(names, (actual, *actual_grads), (expected, *expected_grads), strict=True):
        assert theirs.norm() > 1e-5, f"{name}: nothing to compare"
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("d_model", "d_state", "d_conv", "expand", "dt_rank", "length"),
    [(1, 3, 4, 2, 1, 9), (6, 5, 3, 2, None, 7), (3, 17, 2, 1, 2, 5), (2, 4, 4, 3, 3, 2), (2, 4, 1, 1, 1, 1)],
)
def test_mamba_block_follows_the_equations(d_model, d_state, d_conv, expand, dt_rank, length):
    torch.manual_seed(0)
    block = scrambled(Mamba(d_model, d_state, d_conv, expand, dt_rank))
    tokens = torch.randn(2, length, d_model)
    if length == 1:  # A has nothing to decay
        block.A_log.requires_grad_(False)
        leaves = float64_leaves(block)
        expected = torch.stack([mamba_by_hand(leaves, one) for one in tokens.double()])
        torch.testing.assert_close(block(tokens).double(), expected, rtol=1e-5, atol=1e-6)
    else:
        assert_same_function(block, 2 * tokens, mamba_by_hand, tolerance=1e-5)


CLASSIFIERS = {
    "paper": (
        (1, 8, 8),
        (4, 4),
        {"tokeniser": "pixels", "seq_len": 16, "d_model": 1, "norm": "none", "head": "flatten", "direction": "forward"},
    ),
    "every channel's plane": (
        (3, 4, 4),
        (6, 2),
        {
            "tokeniser": "pixels",
            "pixel_channels": "all",
            "seq_len": 12,
            "d_model": 3,
            "norm": "layer",
            "head": "grid",
            "direction": "alternating",
        },
    ),
    "mean of the channels": (
        (3, 6, 4),
        (3, 2),
        {"tokeniser": "pixels", "seq_len": 6, "d_model": 2, "norm": "none", "head": "mean", "direction": "alternating"},
    ),
    "overlapping patches": (
        (2, 5, 9),
        (2, 4),
        {
            "tokeniser": "patches",
            "patch_size": 3,
            "patch_stride": 2,
            "d_model": 4,
            "norm": "rms",
            "head": "grid",
            "direction": "alternating",
        },
    ),
    "convolutions": (
        (2, 12, 11),
        (2, 2),
        {
            "tokeniser": "convolutions",
            "patch_size": 3,
            "patch_stride": 2,
            "stem_channels": 3,
            "d_model": 4,
            "norm": "rms",
            "head": "grid",
            "direction": "alternating",
        },
    ),
    "padded convolutions, shared blocks in every order": (
        (1, 7, 11),
        (2, 3),
        {
            "tokeniser": "convolutions",
            "patch_size": 5,
            "patch_stride": 2,
            "stem_channels": 2,
            "padding": True,
            "d_model": 3,
            "norm": "rms",
            "head": "flatten",
            "direction": "cross",
            "shared": True,
            "n_blocks": 4,
            "d_state_step": 0,
        },
    ),
    "every order": (
        (1, 4, 6),
        (2, 3),
        {
            "tokeniser": "patches",
            "patch_size": 2,
            "patch_stride": 2,
            "d_model": 3,
            "norm": "rms",
            "head": "flatten",
            "direction": "cross",
            "n_blocks": 5,
        },
    ),
    "no residual": (
        (1, 4, 6),
        (2, 3),
        {
            "tokeniser": "patches",
            "patch_size": 2,
            "patch_stride": 2,
            "d_model": 3,
            "norm": "layer",
            "head": "flatten",
            "direction": "forward",
            "residual": False,
        },
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_follows_the_equations(name):
    shape, raster, options = CLASSIFIERS[name]
    options = {"residual": True, "n_blocks": 2, "d_state": 3, "d_state_step": 2, "expand": 2, **options}
    torch.manual_seed(1)
    model = scrambled(MambaClassifier(shape, 4, **options))
    images = torch.randn(2, *shape)
    assert_same_function(model, 2 * images, lambda weights, image: classifier_by_hand(weights, image, options, raster))


# ---------------------------------------------------------------------------------- the block's contract


@pytest.mark.parametrize(("d_model", "dt_rank", "rank"), [(6, None, 1), (17, None, 2), (16, None, 1), (6, 3, 3)])
def test_state_dict_is_that_of_mamba_ssm(d_model, dt_rank, rank):
    inner = 2 * d_model
    expected = {
        "A_log": (inner, 5),
        "D": (inner,),
        "in_proj.weight": (2 * inner, d_model),
        "conv1d.weight": (inner, 1, 4),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 10, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (d_model, inner),
    }
    state = Mamba(d_model, d_state=5, d_conv=4, expand=2, dt_rank=dt_rank).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == expected


def test_initial_values_are_those_of_mamba_ssm():
    torch.manual_seed(0)
    block = Mamba(64, d_state=4, dt_rank=4, expand=4)
    A = -torch.exp(block.A_log)
    torch.testing.assert_close(A, -torch.arange(1.0, 5).expand(256, 4))
    assert torch.equal(block.D, torch.ones(256))
    steps = torch.log1p(torch.exp(block.dt_proj.bias))
    assert 0.999e-3 < steps.min() < 2e-3
    assert 5e-2 < steps.max() < 1.001e-1
    assert 0.007 < steps.log().mean().exp() < 0.014  # log-uniform: the geometric mean is 0.01, not 0.05
    assert block.dt_proj.weight.abs().max() <= 0.5


def test_weights_move_between_blocks_by_name():
    torch.manual_seed(0)
    first, second = scrambled(Mamba(4, 6), 1), scrambled(Mamba(4, 6), 2)
    tokens = torch.randn(2, 8, 4)
    assert not torch.allclose(first(tokens), second(tokens))
    exported = {name: x.clone() for name, x in first.state_dict().items()}
    second.load_state_dict(exported)
    assert torch.equal(first(tokens), second(tokens))


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_blocks_are_causal_and_reversed_blocks_anticausal(changed):
    torch.manual_seed(0)
    layer = scrambled(Block(MambaClassifierConfig(d_model=4, d_state=3, norm="rms"), 0, (2, 4)))
    tokens = torch.randn(2, 8, 4)
    other = tokens.clone()
    other[:, changed] += 1
    for backwards, unchanged, reached in (
        (False, slice(0, changed), slice(changed, None)),
        (True, slice(changed + 1, None), slice(0, changed + 1)),
    ):
        before, after = (layer(x, (2, 4), backwards=backwards) for x in (tokens, other))
        assert torch.equal(before[:, unchanged], after[:, unchanged])
        assert ((before[:, reached] - after[:, reached]).abs().amax((0, 2)) > 1e-6).all()


# ---------------------------------------------------------------------------------- the classifier's contract

CONTRACT = {
    "paper": ((1, 8, 8), {"seq_len": 16, "norm": "none", "d_state_step": 2}),
    "every pixel": ((1, 6, 6), {"seq_len": 36, "norm": "none", "n_blocks": 2, "head": "mean"}),
    "pixels, wide": ((1, 8, 8), {"seq_len": 16, "d_model": 5, "norm": "rms", "head": "grid"}),
    "pixels, RGB mean": ((3, 8, 8), {"seq_len": 16, "d_model": 4, "norm": "layer", "direction": "alternating"}),
    "pixels, RGB planes": ((3, 8, 8), {"seq_len": 48, "pixel_channels": "all", "d_model": 4, "n_blocks": 2}),
    "pixels, not square": ((1, 4, 12), {"seq_len": 12, "d_model": 3, "norm": "layer", "head": "mean"}),
    "patches": ((1, 8, 8), {"tokeniser": "patches", "d_model": 4}),
    "patches, RGB, overlap": (
        (3, 9, 9),
        {"tokeniser": "patches", "patch_size": 3, "patch_stride": 2, "d_model": 4, "n_blocks": 3, "head": "grid",
         "direction": "alternating", "norm": "rms"},
    ),
    "patches, no residual": (
        (1, 6, 10), {"tokeniser": "patches", "patch_size": 2, "d_model": 3, "residual": False, "norm": "layer"}
    ),
    "patches, plain": (
        (1, 6, 6), {"tokeniser": "patches", "patch_size": 3, "patch_stride": 1, "d_model": 3, "norm": "none",
                    "head": "mean", "dt_rank": 2, "expand": 1, "d_conv": 2}
    ),
    "convolutions, RGB": (
        (3, 10, 12), {"tokeniser": "convolutions", "stem_channels": 2, "patch_size": 5, "padding": True, "d_model": 4,
                      "n_blocks": 3, "norm": "rms", "direction": "cross", "head": "grid", "shared": True}
    ),
    "convolutions, blocks between them": (
        (3, 12, 16), {"tokeniser": "convolutions", "stem_channels": 3, "stem_blocks": 5, "patch_size": 3, "d_model": 4,
                      "padding": True, "n_blocks": 2, "norm": "rms", "direction": "cross", "head": "grid",
                      "local_conv": 3}
    ),
    "blocks between that share weights": (
        (1, 10, 10), {"tokeniser": "convolutions", "stem_channels": 2, "stem_blocks": 2, "patch_size": 3, "d_model": 3,
                      "padding": True, "n_blocks": 3, "direction": "alternating", "head": "mean", "shared": True,
                      "norm": "layer"}
    ),
    "pixels, local": ((1, 4, 12), {"seq_len": 12, "n_blocks": 2, "local_conv": 5}),
    "one patch": ((3, 4, 4), {"tokeniser": "patches", "patch_size": 4, "d_model": 6, "head": "mean"}),
}  # fmt: skip


@pytest.fixture(params=CONTRACT)
def contract(request):
    """Image shape, a builder, and the built model."""
    shape, options = CONTRACT[request.param]
    torch.manual_seed(3)
    return shape, lambda: MambaClassifier(shape, 7, **options), MambaClassifier(shape, 7, **options)


def test_logits_and_a_gradient_for_every_parameter(contract):
    shape, _, model = contract
    logits = model(torch.randn(3, *shape))
    assert logits.shape == (3, 7)
    assert logits.dtype == torch.float32
    nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
    one_step = model.tokens.length == 1  # then A has no earlier state to decay
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or (one_step and name.endswith("A_log")), f"{name} does not reach the logits"


def test_the_logits_of_an_image_depend_on_it_and_on_no_other(contract):
    shape, _, model = contract
    images = torch.randn(4, *shape)
    expected = model(images)
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    poisoned = images.clone()
    poisoned[[0, 3]] = math.nan
    torch.testing.assert_close(model(poisoned)[1:3], expected[1:3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(images[2:3])[0], expected[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(images.flip(0)).flip(0), expected, rtol=1e-5, atol=1e-6)


def test_evaluation_repeats_and_state_dicts_restore(contract, tmp_path):
    shape, build, model = contract
    images = torch.randn(2, *shape)
    scrambled(model).eval()
    with torch.no_grad():
        first, second = model(images), model(images)
    assert torch.equal(first, second)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = build().eval()
    assert not torch.allclose(other(images), first)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(images), first)


def test_a_local_convolution_is_added_before_the_norm():
    block = scrambled(Block(MambaClassifierConfig(d_model=3, norm="rms", local_conv=3), 0, (2, 5)))
    tokens = torch.randn(2, 10, 3)
    planes = nn.functional.pad(tokens.transpose(1, 2).reshape(2, 3, 2, 5), (1, 1, 1, 1))
    local = block.local.bias[:, None, None] + sum(
        block.local.weight[:, 0, y, x, None, None] * planes[:, :, y : y + 2, x : x + 5]
        for y in range(3)
        for x in range(3)
    )
    placed = tokens + local.flatten(2).transpose(1, 2)
    plain = copy.deepcopy(block)
    plain.local = None
    for order in ORDERS["cross"]:
        expected = plain(placed, (2, 5), *order)
        torch.testing.assert_close(block(tokens, (2, 5), *order), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_between_the_convolutions_read_their_own_raster(shared):
    """They stand in the place of SiLU, and have its channels; the first block of each raster reads row by row."""
    options = {"tokeniser": "convolutions", "stem_channels": 3, "patch_size": 3, "d_model": 4, "norm": "rms"}
    options |= {"n_blocks": 2, "direction": "cross", "shared": shared, "head": "mean"}
    model = scrambled(MambaClassifier((1, 8, 12), 5, padding=True, stem_blocks=3, local_conv=3, **options)).eval()
    images, stem = torch.randn(2, 1, 8, 12), model.tokens.between
    planes = model.tokens.stem(images)
    tokens = planes.flatten(2).transpose(1, 2)
    assert (stem.grid, model.tokens.grid, tokens.shape) == ((4, 6), (2, 3), (2, 24, 3))
    assert len(stem.blocks) == (1 if shared else 3)
    for i in range(3):
        tokens = stem.blocks[0 if shared else i](tokens.contiguous(), (4, 6), *ORDERS["cross"][i])
    planes = stem.norm(tokens).transpose(1, 2).reshape(2, 3, 4, 6)
    tokens = model.tokens.project(planes).flatten(2).transpose(1, 2)
    for i in range(2):
        tokens = model.blocks[0 if shared else i](tokens.contiguous(), (2, 3), *ORDERS["cross"][i])
    torch.testing.assert_close(model(images), model.head(model.norm(tokens).mean(1)))


def test_the_cost_of_local_convolutions_and_blocks_between():
    shape, options = (3, 8, 8), {"tokeniser": "convolutions", "stem_channels": 2, "patch_size": 3, "padding": True}
    options |= {"d_model": 5, "d_state": 3, "n_blocks": 2, "norm": "rms", "head": "mean"}
    plain, local, both = (
        measure(MambaClassifier(shape, 10, **options, **more), shape)
        for more in ({}, {"local_conv": 3}, {"local_conv": 3, "stem_blocks": 2})
    )
    assert local.params == plain.params + 2 * (9 + 1) * 5
    assert local.macs_total == plain.macs_total + 2 * 9 * 5 * 4
    block = Block(MambaClassifierConfig(d_model=2, d_state=3, norm="rms", local_conv=3), 0, (4, 4))
    assert both.params == local.params + 2 * sum(p.numel() for p in block.parameters()) + 2
    assert both.macs_total == local.macs_total + 2 * (block.mixer.macs(16) + 9 * 2 * 16)


def test_block_i_has_i_steps_more_states():
    model = MambaClassifier((1, 4, 4), 2, seq_len=16, n_blocks=3, d_state=5, d_state_step=2)
    assert [block.mixer.A_log.shape[1] for block in model.blocks] == [5, 7, 9]


@pytest.mark.parametrize(
    "norm",
    ["none", "rms", "layer"],
)
def test_a_model_of_one_channel_sees_how_bright_a_pixel_is_or_is_refused(norm):
    options = {"seq_len": 16, "d_model": 1, "residual": False, "norm": norm}
    try:
        model = MambaClassifier((1, 4, 4), 3, **options)
    except ConfigError:
        return
    images = 0.5 + torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert (logits[0] - logits[1]).abs().max() > 1e-4


# ---------------------------------------------------------------------------------- tokens


def test_pixel_tokens_are_block_means_row_by_row():
    image = torch.arange(24.0).reshape(1, 1, 4, 6)  # rows 0-5, 6-11, 12-17, 18-23
    tokens = PixelTokens((1, 4, 6), 6, 1, "one")(image)
    # 2x2 blocks: the mean is the upper left pixel + (0 + 1 + 6 + 7) / 4
    assert tokens[0, :, 0].tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]


def test_pixel_tokens_of_every_pixel_are_the_pixels():
    image = torch.rand(2, 1, 3, 5)
    assert torch.equal(PixelTokens((1, 3, 5), 15, 1, "one")(image)[..., 0], image.flatten(1))


def test_pixel_tokens_of_colours():
    image = torch.stack([torch.full((2, 2), float(c)) for c in (1, 2, 6)])[None]
    image[0, :, 1, 1] += 10
    assert PixelTokens((3, 2, 2), 4, 1, "one")(image)[0, :, 0].tolist() == [3, 3, 3, 13]
    planes = PixelTokens((3, 2, 2), 12, 1, "all")(image)[0, :, 0].tolist()
    assert planes == [1, 1, 1, 11, 2, 2, 2, 12, 6, 6, 6, 16]
    assert PixelTokens((3, 2, 2), 3, 1, "all")(image)[0, :, 0].tolist() == [3.5, 4.5, 8.5]


@pytest.mark.parametrize(("size", "stride", "raster"), [(2, 2, (2, 3)), (2, 1, (3, 5)), (3, 2, (1, 2)), (4, 4, (1, 1))])
def test_patch_tokens_are_laid_out_row_by_row(size, stride, raster):
    tokeniser = PatchTokens((1, 4, 6), 2, size, stride)
    assert tokeniser.grid == raster
    with torch.no_grad():  # channel 0 reads a patch's upper left pixel, channel 1 its lower right one
        tokeniser.project.weight.zero_()
        tokeniser.project.weight[0, 0, 0, 0] = tokeniser.project.weight[1, 0, -1, -1] = 1
        tokeniser.project.bias.zero_()
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    tokens = tokeniser(image)
    corners = [(r * stride, c * stride) for r in range(raster[0]) for c in range(raster[1])]
    assert tokens.shape == (1, tokeniser.length, 2)
    assert tokens[0, :, 0].tolist() == [6 * r + c for r, c in corners]
    assert tokens[0, :, 1].tolist() == [6 * (r + size - 1) + c + size - 1 for r, c in corners]


def test_sequence_lengths_choose_the_most_nearly_square_raster():
    assert [pooled_grid(MNIST, n, "one") for n in (49, 98, 196, 784)] == [(7, 7), (14, 7), (14, 14), (28, 28)]
    assert pooled_grid(MNIST, 50, "one") is None
    assert possible_lengths((1, 4, 4), "one") == [1, 2, 4, 8, 16]
    assert possible_lengths((3, 2, 2), "all") == [3, 6, 12]


# ---------------------------------------------------------------------------------- faults


def faults_of(options: dict, shape: tuple[int, int, int] = (1, 8, 8)) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        MambaClassifier(shape, 10, **options)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def test_every_impossible_value_is_named_at_once_with_what_is_allowed():
    bad = {
        "n_blocks": 0,
        "d_model": 1.5,
        "d_state": 0,
        "d_conv": True,
        "expand": -1,
        "patch_size": "4",
        "d_state_step": -2,
        "dt_rank": 0,
        "seq_len": 0.5,
        "patch_stride": -1,
        "tokeniser": "words",
        "pixel_channels": "red",
        "norm": "batch",
        "direction": "backward",
        "head": "max",
        "residual": "yes",
        "shared": 1,
        "padding": "same",
        "stem_channels": 0,
        "stem_blocks": -1,
        "local_conv": 0,
        "mixer": [2],
        "mixer_options": "gain",
        "reuse": "add",
    }
    assert bad.keys() == {name for name in MambaClassifierConfig.__dataclass_fields__}
    faults = faults_of(bad)
    assert [fault.split("=")[0] for fault in sorted(faults)] == sorted(bad)
    head = next(fault for fault in faults if fault.startswith("head="))
    assert all(name in head for name in ("'max'", "flatten", "mean", "grid"))


def test_a_misspelt_option_suggests_the_right_one():
    (fault,) = faults_of({"seq_len": 16, "n_block": 3})
    assert "n_block:" in fault
    assert "Did you mean 'n_blocks'?" in fault


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["seq_len=None"]),
        ({"seq_len": 10}, ["seq_len=10", "8x8", "4, 8, 16"]),
        ({"seq_len": 48, "pixel_channels": "all"}, ["seq_len=48"]),  # of RGB only
        ({"tokeniser": "patches", "patch_size": 9}, ["patch_size=9", "8x8"]),
        ({"tokeniser": "patches", "patch_size": 2, "patch_stride": 3}, ["patch_stride=3", "patch_size=2"]),
        ({"tokeniser": "patches", "patch_size": 8, "head": "grid"}, ["head='grid'"]),
        ({"tokeniser": "convolutions", "stem_channels": 2, "patch_size": 5}, ["patch_size=5", "8x8"]),
        ({"tokeniser": "convolutions", "stem_channels": 2, "patch_size": 3, "head": "grid"}, ["1x1"]),
        ({"tokeniser": "convolutions", "patch_size": 3}, ["stem_channels=None"]),
        ({"tokeniser": "convolutions", "patch_size": 1, "stem_channels": 2}, ["patch_stride=2", "patch_size=1"]),
        ({"tokeniser": "convolutions", "patch_size": 3, "stem_channels": 2, "seq_len": 4}, ["seq_len=4"]),
        ({"seq_len": 16, "stem_channels": 2}, ["stem_channels=2"]),
        ({"seq_len": 16, "stem_blocks": 2}, ["stem_blocks=2"]),
        ({"seq_len": 16, "local_conv": 4}, ["local_conv=4", "odd"]),
        (
            {
                "tokeniser": "convolutions",
                "patch_size": 3,
                "stem_channels": 1,
                "stem_blocks": 1,
                "norm": "rms",
                "d_model": 2,
            },
            ["norm='rms'", "stem_channels=1"],
        ),
        ({"tokeniser": "patches", "padding": True}, ["padding=True"]),
        ({"seq_len": 16, "shared": True, "d_state_step": 2}, ["d_state_step=2"]),
    ],
)
def test_what_does_not_fit_the_image(options, parts):
    (fault,) = faults_of(options)
    assert all(part in fault for part in parts)


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((3, 8, 8), {"seq_len": 48, "pixel_channels": "all", "local_conv": 3}, "colours lie below each other"),
        ((2, 24), {"seq_len": 24, "local_conv": 3}, "signals have no raster"),
    ],
)
def test_a_local_convolution_is_refused_where_neighbours_of_the_raster_are_none_of_the_image(shape, options, reason):
    (fault,) = faults_of(options, shape)
    assert fault.startswith("local_conv=3")
    assert reason in fault
    MambaClassifier((1, 8, 8), 10, **{**options, "seq_len": 16})


def test_without_an_image_only_what_does_not_depend_on_it_is_a_fault():
    assert MambaClassifier.faults({"seq_len": 10}) == []
    assert len(MambaClassifier.faults({"seq_len": 10}, (1, 8, 8))) == 1
    assert len(MambaClassifier.faults({"d_state": 0, "seq_len": 10})) == 1


def test_patches_that_do_not_fit_in_either_direction():
    assert "3x8" in faults_of({"tokeniser": "patches"}, (1, 3, 8))[0]
    assert "8x3" in faults_of({"tokeniser": "patches"}, (1, 8, 3))[0]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"d_state": 0, "seq_len": 10}, 2),
        ({"tokeniser": "patches", "patch_size": 9, "head": "max"}, 2),
        ({"n_block": 3, "d_state": 0, "seq_len": 10}, 3),
    ],
)
def test_faults_of_every_kind_are_listed_at_once(options, count):
    assert len(faults_of(options)) == count
