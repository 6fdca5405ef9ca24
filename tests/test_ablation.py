"""The models of the ablation: what is compared is as large as the ladder it is compared with."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from experiments.cifar10_ablation.mixers import Attention, Depthwise
from experiments.plan import load_study
from pkd_lightning.cli import load_config
from pkd_lightning.cost import Cost, measure
from pkd_lightning.models.blocks import Block
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.config import MambaClassifierConfig
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.models.residual import ResidualNetwork

ROOT = Path(__file__).parent.parent


def test_a_convolution_of_the_ablation_sees_the_raster_of_the_image_and_nothing_else():
    torch.manual_seed(0)
    mixer = "experiments.mnist_ablation.convolution.Convolution"
    layer = Block(MambaClassifierConfig(d_model=3, norm="rms", mixer=mixer), 0, (4, 6))
    planes = torch.randn(2, 3, 4, 6)
    tokens = planes.flatten(2).transpose(1, 2)
    mixed = F.conv2d(layer.norm(tokens).transpose(1, 2).reshape(2, 3, 4, 6), layer.mixer.weight, padding=1)
    expected = planes + mixed * mixed.sigmoid()
    for order in ((False, False), (False, True), (True, False), (True, True)):
        torch.testing.assert_close(layer(tokens, (4, 6), *order).transpose(1, 2).reshape(2, 3, 4, 6), expected)


def test_the_ablation_is_of_the_committed_ladder():
    def ladder(overrides: tuple[str, ...]) -> Ladder:
        built: Ladder = instantiate(load_config(*overrides).student)
        return built

    def costs(built: Ladder) -> list[Cost]:
        return [measure(built.build(i, (1, 28, 28), 10), (1, 28, 28)) for i in range(len(built))]

    def params(built: Ladder) -> int:
        return sum(cost.params for cost in costs(built))

    runs = {run.name: ladder(run.overrides) for run in load_study(ROOT / "experiments" / "mnist_ablation").runs}
    whole = ladder(("experiment=mnist_best",))
    assert runs["temperature_4"].rungs == [whole.rungs[3]]
    assert params(runs["single"]) <= params(whole) < params(runs["single"]) * 1.05
    assert params(runs["anchored_convolutions"]) <= params(whole)
    for mamba, convolution in zip(costs(whole), costs(runs["anchored_convolutions"]), strict=True):
        assert convolution.params <= 1.04 * mamba.params
        assert convolution.macs_total <= mamba.macs_total


def test_the_cifar10_ablation_is_of_the_committed_ladder():
    def cost(overrides: tuple[str, ...]) -> tuple[int, int]:
        config = load_config(*overrides)
        built: Ladder = instantiate(config.student)
        found = [measure(built.build(i, (3, 32, 32), 10), (3, 32, 32)) for i in range(config.boosting.rounds)]
        return sum(one.params for one in found), sum(one.macs_total for one in found)

    runs = {run.name: run.overrides for run in load_study(ROOT / "experiments" / "cifar10_ablation").runs}
    params, macs = cost(runs["no_teacher"])
    assert (params, macs) == cost(("experiment=cifar10_best", "boosting.rounds=3"))
    single = cost(runs["single"])
    assert 0.98 * params <= single[0] <= params
    assert 0.98 * macs <= single[1] <= macs
    for name in ("depthwise", "attention"):
        assert 0.95 * macs <= cost(runs[name])[1] <= 1.05 * macs


def test_a_depthwise_mixer_is_mambas_block_without_its_scan():
    torch.manual_seed(0)
    mixer = Depthwise(3, (4, 6), kernel=5)
    tokens = torch.randn(2, 24, 3)
    x, z = (tokens @ mixer.in_proj.weight.T).chunk(2, -1)
    planes = F.pad(x.transpose(1, 2).reshape(2, 6, 4, 6), (2, 2, 2, 2))
    mixed = torch.zeros(2, 6, 4, 6)
    for dy in range(5):
        for dx in range(5):
            mixed += mixer.conv.weight[:, 0, dy, dx, None, None] * planes[:, :, dy : dy + 4, dx : dx + 6]
    mixed = (mixed + mixer.conv.bias[:, None, None]).flatten(2).transpose(1, 2)
    expected = (mixed * mixed.sigmoid() * z * z.sigmoid()) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(tokens), expected)


def test_attention_is_that_of_each_head_after_its_convolution():
    torch.manual_seed(0)
    mixer = Attention(6, (2, 3), width=4)
    assert mixer.heads == 2
    tokens = torch.randn(2, 6, 6)
    placed = tokens + mixer.conv(tokens.transpose(1, 2).reshape(2, 6, 2, 3)).flatten(2).transpose(1, 2)
    q, k, v = (placed @ mixer.qkv.weight.T).chunk(3, -1)
    heads = [torch.softmax(q[..., s : s + 4] @ k[..., s : s + 4].mT / 2, -1) @ v[..., s : s + 4] for s in (0, 4)]
    torch.testing.assert_close(mixer(tokens), torch.cat(heads, -1) @ mixer.out_proj.weight.T)


def test_attention_on_a_larger_raster_stays_within_its_squares():
    torch.manual_seed(0)
    mixer = Attention(6, (4, 6), width=4, window=2)
    mixer.conv.weight.data.zero_()
    tokens = torch.randn(2, 24, 6)
    whole = Attention(6, (2, 2), width=4)
    whole.load_state_dict(mixer.state_dict())
    squares = [[6 * (2 * y + dy) + 2 * x + dx for dy in (0, 1) for dx in (0, 1)] for y in (0, 1) for x in (0, 1, 2)]
    expected = torch.empty_like(tokens)
    for places in squares:
        expected[:, places] = whole(tokens[:, places])
    torch.testing.assert_close(mixer(tokens), expected)
    assert mixer.macs(24) == 6 * whole.macs(4)
    with pytest.raises(ValueError, match="not made of squares"):
        Attention(6, (4, 6), window=3)


def test_the_cost_of_attention_is_that_of_its_products():
    """Two products of the scores and values, and what the counter sees of the rest."""
    model = MambaClassifier(
        (1, 4, 4), 2, tokeniser="patches", patch_size=1, d_model=6, head="mean", norm="rms",
        mixer="experiments.cifar10_ablation.mixers.Attention", mixer_options={"width": 4},
    )  # fmt: skip
    tokens = 16
    inside = tokens * (6 * 24 + 8 * 6 + 9 * 6) + 2 * tokens * tokens * 8
    outside = tokens * 6 + 6 * 2
    assert measure(model, (1, 4, 4)).macs_total == inside + outside


def test_a_residual_network_sees_the_whole_image_and_has_the_teachers_form():
    network = ResidualNetwork((3, 32, 32), 10, width=4).eval()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    logits = network(images)
    assert logits.shape == (2, 10)
    logits[0].sum().backward()
    assert (images.grad[1] == 0).all()
    assert (images.grad[0].abs().sum(0) > 0).float().mean() > 0.5
    assert sum(p.numel() for p in ResidualNetwork((3, 32, 32), 10, width=64).parameters()) == 2_440_266
