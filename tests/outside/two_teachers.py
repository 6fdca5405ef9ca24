"""Two trained teachers as one: the mean of their logits."""

from pathlib import Path

from torch import Tensor, nn

from pkd_lightning.checkpoint import load_tensors
from pkd_lightning.models.classifier import MambaClassifier


class TwoTeachers(nn.Module):
    """Models of one architecture, each with the weights of a run's teacher; none of them is trained any more."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, weights: list[str], **options: object) -> None:
        super().__init__()
        self.members = nn.ModuleList(MambaClassifier(input_shape, num_classes, **options) for _ in weights)
        for member, path in zip(self.members, weights, strict=True):
            member.load_state_dict(load_tensors(Path(path)))
        self.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        return sum(member(inputs) for member in self.members) / len(self.members)
