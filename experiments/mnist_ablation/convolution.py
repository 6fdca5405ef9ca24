"""The classifier of mnist_best with a convolution in place of each Mamba mixer, to tell what Mamba gives."""

import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.models.building import ImageShape
from pkd_lightning.models.classifier import MambaClassifier, MambaClassifierConfig, make_norm


class ConvolutionLayer(nn.Module):
    """A `MambaLayer` with a 3x3 convolution over the tokens' raster and SiLU in place of Mamba."""

    def __init__(self, config: MambaClassifierConfig) -> None:
        super().__init__()
        self.norm = make_norm(config.norm, config.d_model)
        self.mixer = nn.Conv2d(config.d_model, config.d_model, 3, padding=1, bias=False)
        self.residual = config.residual

    def forward(self, tokens: Tensor, grid: tuple[int, int], columns: bool = False, backwards: bool = False) -> Tensor:
        """Map tokens (batch, length, d_model) of a raster `grid` (rows, columns) to the same shape.

        A convolution reads the raster in no order, so that `columns` and `backwards` have no effect.
        """
        planes = self.norm(tokens).transpose(1, 2).unflatten(2, grid)
        x = F.silu(self.mixer(planes)).flatten(2).transpose(1, 2)
        return tokens + x if self.residual else x


class ConvolutionClassifier(MambaClassifier):
    """A `MambaClassifier` whose blocks are `ConvolutionLayer`s.

    A convolution has 9 * d_model^2 parameters, where a mixer of expand 2 has 6 * d_model^2 and those of its own
    convolution and its scan: about as many at the sizes of mnist_best. Options of the mixer and the direction in which
    it reads have no effect.
    """

    def __init__(self, image_shape: ImageShape, num_classes: int, **options: object) -> None:
        super().__init__(image_shape, num_classes, **options)
        self.blocks = nn.ModuleList(ConvolutionLayer(self.config) for _ in self.blocks)
