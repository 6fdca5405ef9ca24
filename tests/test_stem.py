"""The kernels around the blocks, tokens of two convolutions, local convolutions, and the head's averages: against
float64, and left to the modules where a call of one does more."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.kernels import local, pool, stem
from pkd_lightning.kernels.local import local_cpu
from pkd_lightning.kernels.pool import pool_cpu
from pkd_lightning.kernels.stem import stem_cpu
from pkd_lightning.models.blocks import with_local
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.tokens import ConvolutionTokens
from pkd_lightning.outputs import Taps

EPS = torch.finfo(torch.float32).eps


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agrees(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6 * max(1.0, float(expected.abs().max())))


def compared(call: Callable[..., Tensor], exact: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Results and gradients by kernels, and in float64."""
    own, double = ([x.detach().to(kind).requires_grad_() for x in leaves] for kind in (torch.float32, torch.float64))
    found, expected = call(*own), exact(*double)
    agrees(found.detach(), expected.detach())
    cotangent = normal(*found.shape, seed=9)
    for mine, its in zip(
        torch.autograd.grad(found, own, cotangent),
        torch.autograd.grad(expected, double, cotangent.double()),
        strict=True,
    ):
        agrees(mine, its)
    with torch.no_grad():
        assert torch.equal(call(*own), found)


# ---------------------------------------------------------------------------------- tokens of convolutions


def stem_weights(channels: int, outer: int, model: int, size: int) -> list[Tensor]:
    first, second = normal(outer, channels, size, size, scale=0.3), normal(model, outer, 3, 3, seed=1, scale=0.3)
    return [first, normal(outer, seed=2), second, normal(model, seed=3)]


@pytest.mark.parametrize(
    ("batch", "image", "outer", "model", "size", "strides", "paddings"),
    [
        (16, (1, 28, 28), 8, 4, 5, (2, 2), (2, 1)),
        (19, (3, 9, 12), 7, 5, 4, (2, 2), (0, 0)),
        (33, (2, 13, 8), 9, 18, 3, (1, 2), (1, 1)),
        (1, (4, 6, 5), 1, 1, 2, (1, 1), (0, 1)),
        (17, (3, 11, 20), 5, 3, 1, (3, 2), (0, 1)),
    ],
)
def test_tokens_and_gradients_are_those_of_two_convolutions(
    batch: int, image: tuple[int, int, int], outer: int, model: int, size: int, strides: tuple[int, int],
    paddings: tuple[int, int],
) -> None:  # fmt: skip
    images = normal(batch, *image, seed=5)

    def exact(w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
        between = F.silu(F.conv2d(images.to(w.dtype), w, b, strides[0], paddings[0]))
        return F.conv2d(between, v, c, strides[1], paddings[1]).flatten(2).transpose(1, 2)

    compared(
        lambda w, b, v, c: stem_cpu(images, (w, b), (v, c), strides, paddings), exact,
        stem_weights(image[0], outer, model, size),
    )  # fmt: skip


def test_several_threads_share_out_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images, weights = normal(67, 1, 9, 9, seed=5), [x.requires_grad_() for x in stem_weights(1, 6, 5, 3)]

    def results() -> list[Tensor]:
        out = stem_cpu(images, (weights[0], weights[1]), (weights[2], weights[3]), (1, 2), (1, 1))
        return [out.detach(), *torch.autograd.grad(out, weights, torch.ones_like(out))]

    alone = results()
    monkeypatch.setattr(stem, "threads_for", lambda units, updates: min(units, 3))
    for mine, its in zip(results(), alone, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-4)


def test_no_images_have_no_tokens() -> None:
    weights = [x.requires_grad_() for x in stem_weights(1, 6, 5, 3)]
    out = stem_cpu(torch.zeros(0, 1, 9, 9), (weights[0], weights[1]), (weights[2], weights[3]), (1, 2), (1, 1))
    assert out.shape == (0, 25, 5)
    assert all(not part.any() for part in torch.autograd.grad(out, weights, out.detach()))


@pytest.mark.parametrize(
    ("change", "error", "fault"),
    [
        ({"images": torch.zeros(2, 1, 9, 9, dtype=torch.float64)}, ValueError, "float32"),
        ({"images": torch.zeros(2, 1, 9, 9, requires_grad=True)}, ValueError, "without gradients"),
        ({"images": torch.zeros(2, 2, 9, 9)}, ValueError, "do not go together"),
        ({"images": torch.zeros(2, 1, 2, 2)}, ValueError, "smaller than the kernels"),
        ({"images": torch.zeros(9, 9)}, ValueError, "do not go together"),
        ({"stem": (torch.zeros(6, 1, 3, 2), torch.zeros(6))}, ValueError, "do not go together"),
        ({"stem": (torch.zeros(6, 1, 3, 3), torch.zeros(5))}, ValueError, "do not go together"),
        ({"project": (torch.zeros(5, 7, 3, 3), torch.zeros(5))}, ValueError, "do not go together"),
        (
            {"images": nn.Parameter(torch.zeros(2, 1, 9, 9)).as_subclass(type("Sub", (Tensor,), {}))},
            TypeError,
            "subclass",
        ),
    ],
)
def test_what_the_stem_cannot_read_is_refused(change: dict[str, object], error: type[Exception], fault: str) -> None:
    w, b, v, c = stem_weights(1, 6, 5, 3)
    given = {"images": torch.zeros(2, 1, 9, 9), "stem": (w, b), "project": (v, c), **change}
    with pytest.raises(error, match=fault):
        stem_cpu(**given, strides=(1, 2), paddings=(0, 0))  # type: ignore[arg-type]


def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the kernels were called."""
    names: list[str] = []
    for module, name in ((stem, "stem_cpu"), (local, "local_cpu"), (pool, "pool_cpu")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, n=name, k=kernel: (names.append(n), k(*given))[1])
    return names


def layer() -> ConvolutionTokens:
    torch.manual_seed(0)
    return ConvolutionTokens((1, 9, 12), 6, 7, 3, 2, True)


def plain(made: ConvolutionTokens, images: Tensor) -> Tensor:
    tokens: Tensor = made.project(F.silu(made.stem(images)))
    return tokens.flatten(2).transpose(1, 2)


def test_batches_are_tokens_by_the_kernel_and_few_images_by_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    names, made = called(monkeypatch), layer()
    for batch, by in ((16, ["stem_cpu"]), (8, ["stem_cpu"]), (7, []), (1, [])):
        names.clear()
        images = normal(batch, 1, 9, 12)
        torch.testing.assert_close(made(images), plain(made, images), rtol=1e-5, atol=1e-5)
        assert names == by


def scripted(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)


def chosen(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKD_SCAN_BACKEND", "reference")


def hooked(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    made.stem.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    made.project = nn.Sequential(made.project, nn.Tanh())  # type: ignore[assignment]


def without_bias(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    made.stem.bias = None


def dilated(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    made.stem = nn.Conv2d(1, 7, 2, 2, 1, dilation=2)


def reflecting(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    made.stem = nn.Conv2d(1, 7, 3, 2, 1, padding_mode="reflect")


def oblong(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    made.stem = nn.Conv2d(1, 7, 3, (2, 1), 1)


def named_padding(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    made.stem = nn.Conv2d(1, 7, 3, 1, "same")


def doubled(made: ConvolutionTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    made.double()


@pytest.mark.parametrize(
    "change",
    [scripted, chosen, hooked, replaced, without_bias, dilated, reflecting, oblong, named_padding, doubled],
)
def test_modules_that_do_more_are_called(
    change: Callable[[ConvolutionTokens, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, made = called(monkeypatch), layer()
    change(made, monkeypatch)
    images = normal(16, 1, 9, 12).to(made.stem.weight.dtype)
    assert torch.equal(made(images), plain(made, images))
    assert names == []


def test_images_that_need_a_gradient_and_autocast_are_left_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    names, made = called(monkeypatch), layer()
    images = normal(16, 1, 9, 12).requires_grad_()
    assert torch.autograd.grad(made(images).sum(), images)[0].any()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(images.detach()).dtype == torch.bfloat16
    assert names == []


# ---------------------------------------------------------------------------------- local convolutions


def local_weights(channels: int, side: int) -> list[Tensor]:
    return [normal(channels, side, side, seed=1, scale=0.3), normal(channels, seed=2)]


def exactly(tokens: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    planes = tokens.transpose(1, 2).unflatten(2, grid)
    convolved = F.conv2d(planes, weight[:, None], bias, padding=weight.shape[2] // 2, groups=weight.shape[0])
    return tokens + convolved.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("batch", "grid", "channels", "side"),
    [
        (3, (8, 8), 16, 3),
        (2, (5, 7), 12, 3),
        (2, (3, 9), 33, 5),
        (4, (1, 6), 3, 3),
        (1, (2, 2), 17, 7),
        (2, (4, 5), 1, 1),
    ],
)
def test_local_convolutions_and_gradients_are_those_of_torch(
    batch: int, grid: tuple[int, int], channels: int, side: int
) -> None:
    leaves = [normal(batch, grid[0] * grid[1], channels), *local_weights(channels, side)]
    compared(lambda *given: local_cpu(*given, grid=grid), lambda *given: exactly(*given, grid=grid), leaves)


def test_no_rasters_have_no_local_convolutions() -> None:
    leaves = [x.requires_grad_() for x in (torch.zeros(0, 16, 5), *local_weights(5, 3))]
    out = local_cpu(leaves[0], leaves[1], leaves[2], (4, 4))
    assert out.shape == (0, 16, 5)
    assert all(not part.any() for part in torch.autograd.grad(out, leaves, out.detach()))


def test_several_threads_share_out_the_rasters(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [x.requires_grad_() for x in (normal(7, 12, 5), *local_weights(5, 3))]

    def results() -> list[Tensor]:
        out = local_cpu(leaves[0], leaves[1], leaves[2], (3, 4))
        return [out.detach(), *torch.autograd.grad(out, leaves, normal(7, 12, 5, seed=4))]

    alone = results()
    monkeypatch.setattr(local, "threads_for", lambda units, updates: min(units, 3))
    for mine, its in zip(results(), alone, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "fault"),
    [
        ({"tokens": torch.zeros(2, 9, 4, dtype=torch.float64)}, ValueError, "float32"),
        ({"tokens": torch.zeros(2, 8, 4)}, ValueError, "no tokens of a raster"),
        ({"tokens": torch.zeros(9, 4)}, ValueError, "no tokens of a raster"),
        ({"weight": torch.zeros(5, 3, 3)}, ValueError, "windows"),
        ({"weight": torch.zeros(4, 3, 5)}, ValueError, "windows"),
        ({"weight": torch.zeros(4, 2, 2)}, ValueError, "windows"),
        ({"weight": torch.zeros(())}, ValueError, "windows"),
        ({"bias": torch.zeros(3)}, ValueError, "windows"),
        ({"tokens": torch.zeros(2, 9, 4).as_subclass(type("Sub", (Tensor,), {}))}, TypeError, "subclass"),
    ],
)
def test_what_cannot_be_convolved_is_refused(change: dict[str, Tensor], error: type[Exception], fault: str) -> None:
    given = {"tokens": torch.zeros(2, 9, 4), "weight": torch.zeros(4, 3, 3), "bias": torch.zeros(4)} | change
    with pytest.raises(error, match=fault):
        local_cpu(**given, grid=(3, 3))


def depthwise() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 5, 3, padding=1, groups=5)


def test_a_block_convolves_by_the_kernel_what_is_as_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    names, made, tokens = called(monkeypatch), depthwise(), normal(2, 12, 5)
    expected = exactly(tokens, made.weight[:, 0], made.bias, (3, 4))  # type: ignore[arg-type]
    torch.testing.assert_close(with_local(made, tokens, (3, 4)), expected, rtol=1e-5, atol=1e-6)
    assert names == ["local_cpu"]
    made.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(with_local(made, tokens, (3, 4)), 2 * expected - tokens, rtol=1e-5, atol=1e-6)
    dilated = nn.Conv2d(5, 5, 3, padding=2, dilation=2, groups=5)
    with_local(dilated, tokens, (3, 4))
    with_local(depthwise().double(), tokens.double(), (3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        with_local(depthwise(), tokens, (3, 4))
    monkeypatch.setenv("PKD_SCAN_BACKEND", "reference")
    with_local(depthwise(), tokens, (3, 4))
    assert names == ["local_cpu"]


# ---------------------------------------------------------------------------------- the head's averages


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("batch", "grid", "channels", "cells"),
    [
        (3, (7, 7), 16, 2),
        (5, (4, 6), 33, 2),
        (2, (5, 5), 8, 1),
        (4, (3, 2), 17, 2),
        (1, (2, 2), 1, 2),
        (2, (1, 9), 31, 1),
        (2, (5, 5), 18, 5),
        (2, (7, 6), 3, 4),
    ],
)
def test_averages_and_gradients_are_those_of_a_norm_and_of_pooling(
    batch: int, grid: tuple[int, int], channels: int, cells: int, normed: bool
) -> None:
    def exact(tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        if weight is not None:
            tokens = tokens / (tokens.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        return F.adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(2, grid), cells).flatten(1)

    leaves = [
        normal(batch, grid[0] * grid[1], channels),
        *([1 + normal(channels, seed=1, scale=0.3)] if normed else []),
    ]
    compared(lambda tokens, weight=None: pool_cpu(tokens, weight, grid, cells), exact, leaves)


def test_several_threads_share_out_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, weight = normal(7, 9, 5).requires_grad_(), normal(5, seed=1).requires_grad_()

    def results() -> list[Tensor]:
        out = pool_cpu(tokens, weight, (3, 3), 2)
        return [out.detach(), *torch.autograd.grad(out, [tokens, weight], torch.ones_like(out))]

    alone = results()
    monkeypatch.setattr(pool, "threads_for", lambda units, updates: min(units, 3))
    for mine, its in zip(results(), alone, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "weight", "grid", "cells", "error"),
    [
        (torch.zeros(2, 9, 4, dtype=torch.float64), None, (3, 3), 2, ValueError),
        (torch.zeros(2, 8, 4), None, (3, 3), 2, ValueError),
        (torch.zeros(2, 9, 4), torch.zeros(5), (3, 3), 2, ValueError),
        (torch.zeros(2, 9, 4), None, (3, 3), 4, ValueError),
        (torch.zeros(9, 4), None, (3, 3), 2, ValueError),
        (torch.zeros(2, 9, 4).as_subclass(type("Sub", (Tensor,), {})), None, (3, 3), 2, TypeError),
    ],
)
def test_what_cannot_be_pooled_is_refused(
    tokens: Tensor, weight: Tensor | None, grid: tuple[int, int], cells: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        pool_cpu(tokens, weight, grid, cells)


@pytest.mark.parametrize(
    ("options", "by"),
    [
        ({"head": "grid", "norm": "rms"}, ["pool_cpu"]),
        ({"head": "mean", "norm": "none"}, ["pool_cpu"]),
        ({"head": "flatten", "norm": "rms"}, []),
        ({"head": "grid", "norm": "layer"}, []),
    ],
)
def test_heads_that_average_are_by_the_kernel(
    options: dict[str, object], by: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = called(monkeypatch)
    torch.manual_seed(0)
    model = MambaClassifier((1, 8, 8), 3, tokeniser="patches", patch_size=2, d_model=6, d_state=2, **options)
    images = normal(3, 1, 8, 8)
    logits = model(images)
    assert names == by
    monkeypatch.setenv("PKD_SCAN_BACKEND", "reference")
    names.clear()
    torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
    assert names == []


def test_a_tapped_norm_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    names = called(monkeypatch)
    model = MambaClassifier(
        (1, 8, 8), 3, tokeniser="patches", patch_size=2, d_model=6, d_state=2, head="grid", norm="rms"
    )
    images = normal(3, 1, 8, 8)
    with Taps(model, ["norm"]) as taps:
        found = taps.call(model, images)
    assert found.features["norm"].shape == (3, 16, 6)
    assert names == []
    torch.testing.assert_close(found.logits, model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "by"), [((32, 32), 1), ((32, 24), 0)])
def test_the_norm_between_the_convolutions_is_by_the_kernel_on_squares(
    size: tuple[int, int], by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = called(monkeypatch)
    torch.manual_seed(0)
    model = MambaClassifier(
        (3, *size), 3, tokeniser="convolutions", padding=True, patch_size=3, stem_channels=5, stem_blocks=1,
        direction="cross", norm="rms", d_model=6, d_state=2, head="flatten", n_blocks=1,
    )  # fmt: skip
    with torch.no_grad():
        model.tokens.between.norm.weight.uniform_()  # type: ignore[union-attr]
    images = normal(2, 3, *size)
    logits = model(images)
    assert names == ["pool_cpu"] * by
    monkeypatch.setenv("PKD_SCAN_BACKEND", "reference")
    torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)


def test_weights_replaced_between_the_passes_are_noticed() -> None:
    tokens, weight = normal(2, 9, 4).requires_grad_(), normal(4).requires_grad_()
    window, bias = (x.requires_grad_() for x in local_weights(4, 3))
    out = local_cpu(tokens, window, bias, (3, 3))
    window.data = torch.zeros(4, 5, 5)
    with pytest.raises(RuntimeError, match="replaced"):
        out.sum().backward()
    out = pool_cpu(tokens, weight, (3, 3), 2)
    weight.data = torch.zeros(5)
    with pytest.raises(RuntimeError, match="replaced"):
        out.sum().backward()
    first = [x.requires_grad_() for x in stem_weights(1, 6, 5, 3)]
    out = stem_cpu(torch.zeros(2, 1, 9, 9), (first[0], first[1]), (first[2], first[3]), (1, 2), (1, 1))
    first[1].data = torch.zeros(7)
    with pytest.raises(RuntimeError, match="replaced"):
        out.sum().backward()
