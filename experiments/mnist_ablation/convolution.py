"""The classifier of mnist_best with a convolution in place of each Mamba mixer, to tell what Mamba gives."""

from torch import Tensor, nn

from pkd_lightning.models.building import ImageShape
from pkd_lightning.models.classifier import MambaClassifier, make_norm
from pkd_lightning.models.options import Norm


class ConvolutionLayer(nn.Module):
    """A block without Mamba: pre-norm, a 3x3 convolution over the raster of the tokens, SiLU, residual connection."""

    def __init__(self, d_model: int, norm: Norm) -> None:
        super().__init__()
        self.norm = make_norm(norm, d_model)
        self.mixer = nn.Conv2d(d_model, d_model, 3, padding=1, bias=False)

    def forward(self, tokens: Tensor, grid: tuple[int, int], *_order: bool) -> Tensor:
        """Map tokens (batch, length, d_model) of a raster `grid` (rows, columns) to the same shape."""
        planes = self.norm(tokens).transpose(1, 2).unflatten(2, grid)
        return tokens + nn.functional.silu(self.mixer(planes)).flatten(2).transpose(1, 2)


class ConvolutionClassifier(MambaClassifier):
    """A `MambaClassifier` whose blocks are `ConvolutionLayer`s.

    A convolution has 9 * d_model^2 parameters, where a mixer of expand 2 has 6 * d_model^2 and those of its own
    convolution and its scan: about as many at the sizes of mnist_best. Options of the mixer and the direction in which
    it reads have no effect.
    """

    def __init__(self, image_shape: ImageShape, num_classes: int, **options: object) -> None:
        super().__init__(image_shape, num_classes, **options)
        self.blocks = nn.ModuleList(ConvolutionLayer(self.config.d_model, self.config.norm) for _ in self.blocks)
