"""The models of the ablation: what is compared is as large as the ladder it is compared with."""

from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from experiments.plan import load_study
from pkd_lightning.cli import load_config
from pkd_lightning.cost import Cost, measure
from pkd_lightning.models.classifier import Block, MambaClassifierConfig
from pkd_lightning.models.ladder import Ladder

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
