"""Several teachers as one: the mean of their probabilities, weighted, as logits."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pkd_lightning.cost import Cost, measure
from pkd_lightning.models.building import InputShape
from pkd_lightning.outputs import output_of

UNLABELLED = -1  # in place of the label of a row that has none, or whose label may not be used


def log_weights(log_p: Tensor, combine: str | Sequence[float], labels: Tensor | None = None) -> Tensor:
    """Logarithms of the members' weights on each sample, which sum to 1 over the members.

    - `mean`: all the same.
    - numbers: in proportion to them, on every sample.
    - `confidence`: in proportion to the largest probability.
    - `cross_entropy`: softmax of minus the cross-entropy of the label, so in proportion to the label's probability. For
      two members these are the weights of CA-MKD (Zhang et al., arXiv 2201.00007), (1 - softmax of the
      cross-entropy) / (M - 1). Without a label, softmax of minus the entropy.

    Args:
        log_p: (members, batch, L) logarithms of probabilities.
        combine: one of the above.
        labels: (batch,), `UNLABELLED` where there is none; None: there are none at all.

    Returns:
        (members, batch).
    """
    if combine == "mean":
        score = torch.zeros_like(log_p[..., 0])
    elif combine == "confidence":
        score = log_p.max(-1).values
    elif combine == "cross_entropy":
        score = (log_p.exp() * log_p).sum(-1)
        if labels is not None:
            chosen = labels.clamp(min=0).expand(log_p.shape[:-1])[..., None]
            score = torch.where(labels == UNLABELLED, score, log_p.gather(-1, chosen)[..., 0])
    else:
        given = torch.tensor(combine, dtype=log_p.dtype, device=log_p.device).log()
        score = given[:, None].expand(log_p.shape[:-1])
    return score.log_softmax(0)


def combined(logits: Tensor, combine: str | Sequence[float], labels: Tensor | None = None) -> Tensor:
    """Log sum_m w_m softmax(g_m), the members' probabilities averaged, shifted to the mean of their logits.

    Probabilities, not logits, are averaged. You et al. (KDD 2017) and CA-MKD (arXiv 2201.00007) average outputs that
    are softened already; here they are combined once, at temperature 1, and the loss softens what comes of it. A member
    counts by its weight, not by the scale of its logits. Where confident members disagree, the mean keeps both answers:
    that of logits is a third one, which none of them gave.

    Softmax does not see the shift, but residual matrices do, which compare logits. With it, the mean over the classes
    is the weighted mean of the members', so that students start as near to the combination as to a single teacher, and
    the combination of equal members is what they are.

    Args:
        logits: (members, batch, L).
        combine: see `log_weights`.
        labels: (batch,), or None.

    Returns:
        Logits (batch, L).
    """
    log_p = logits.log_softmax(-1)
    weights = log_weights(log_p, combine, labels)[..., None]
    mixed = (log_p + weights).logsumexp(0)
    level = (weights.exp() * logits).sum(0).mean(-1, keepdim=True)
    return mixed - mixed.mean(-1, keepdim=True) + level


class CombinedTeacher(nn.Module):
    """Several classifiers as one, whose modules are found by the members' names: `first.blocks.2`.

    Args:
        members: by name.
        combine: see `log_weights`; numbers by the members' names.
    """

    def __init__(self, members: Mapping[str, nn.Module], combine: str | Mapping[str, float] = "mean") -> None:
        super().__init__()
        for name, member in members.items():
            self.add_module(name, member)
        self._how = combine if isinstance(combine, str) else [combine[name] for name in members]

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (batch, L) of the members together; `cross_entropy` weighs by the entropy where there are no labels.

        So it is wherever the model is asked outside of training: on the test part no label may be used.
        """
        return self.together([output_of(member(inputs)).logits.float() for member in self.children()], labels)

    def together(self, logits: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """Logits (batch, L) of the combination, from those of the members."""
        return combined(torch.stack(list(logits)), self._how, labels)


def cost_of(model: nn.Module, input_shape: InputShape) -> Cost:
    """What a teacher costs: a combined one the sum of its members."""
    if not isinstance(model, CombinedTeacher):
        return measure(model, input_shape)
    first, *others = (measure(member, input_shape) for member in model.children())
    return sum(others, first)
