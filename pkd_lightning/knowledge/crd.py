"""CRD: a contrastive loss of the student's and the teacher's embeddings, against those of other samples.

Tian et al., ICLR 2020, arXiv 1910.10699.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning import ranks
from pkd_lightning.checks import Faults
from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.term import FeatureTerm, Pair
from pkd_lightning.knowledge.tokens import as_tokens


def contrastive_loss(scores: Tensor, counted: Tensor, log_z: Tensor, samples: int) -> Tensor:
    """-mean_i [log h(s_i0) + sum_k log(1 - h(s_ik))], with h(s) = (e^s / Z) / (e^s / Z + K / M).

    The paper's critic h and objective, with the constant Z of the authors' code. By logarithms: no score is too large.

    Args:
        scores: (batch, 1 + negatives) inner products over the temperature, that of the sample itself first.
        counted: (batch, negatives) bool, the negatives that count; K is their number, of each sample.
        log_z: scalar, log Z.
        samples: M, the number of training rows.
    """
    drawn = counted.sum(1, keepdim=True, dtype=scores.dtype).clamp(min=1)
    odds = scores - log_z - (drawn / samples).log()  # h = sigmoid(odds)
    others = F.logsigmoid(-odds[:, 1:]).masked_fill(~counted, 0)
    return -(F.logsigmoid(odds[:, 0]) + others.sum(1)).mean()


class Contrast(nn.Module):
    """Linear embeddings of a pair of features, with what they last were for each training row.

    Args:
        student: channels of the student's feature.
        teacher: of the teacher's.
        samples: number of training rows.
        dim: of the embeddings.

    Attributes:
        student: the student's embedding.
        teacher: the teacher's.
        student_bank: (samples, dim) student's embeddings by sample index, random until a sample was seen.
        teacher_bank: the teacher's.
        labels: (samples,) of the samples seen, -1 of the others.
        log_z: (2,) log Z of the student's scores and of the teacher's, inf before the first batch.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    labels: Tensor
    log_z: Tensor

    def __init__(self, student: int, teacher: int, samples: int, dim: int) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(student, dim), nn.Linear(teacher, dim)
        bound = math.sqrt(3 / dim)  # rows of length 1 in the mean
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(samples, dim).uniform_(-bound, bound))
        self.register_buffer("labels", torch.full((samples,), -1))
        self.register_buffer("log_z", torch.full((2,), math.inf))

    def embedded(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both embeddings (batch, dim), of length 1, of features averaged over their positions."""
        own, its = self.student(as_tokens(student).mean(1)), self.teacher(as_tokens(teacher).mean(1))
        return tuple(F.normalize(one.to(self.log_z.dtype), dim=1) for one in (own, its))  # type: ignore[return-value]

    def normaliser(self, which: int, scores: Tensor) -> Tensor:
        """The log of Z, M times the mean of e^s over the first batch, kept from then on."""
        found = scores.detach().logsumexp((0, 1)) + math.log(len(self.labels) / scores.numel())
        log_z = torch.where(self.log_z[which].isfinite(), self.log_z[which], found)
        self.log_z[which] = log_z
        return log_z

    @torch.no_grad()
    def remember(self, bank: Tensor, index: Tensor, embedded: Tensor, momentum: float) -> None:
        """Move rows of a bank towards these embeddings, where they are finite: a batch that explodes leaves no trace.

        Args:
            bank: `student_bank` or `teacher_bank`.
            index: (batch,) of the rows.
            embedded: (batch, dim).
            momentum: the old rows' part.
        """
        moved = F.normalize(momentum * bank[index] + (1 - momentum) * embedded, dim=1)
        bank[index] = torch.where(moved.isfinite().all(1, keepdim=True), moved, bank[index])


@dataclass(frozen=True)
class CRD(FeatureTerm):
    """Contrastive representation distillation, of features averaged over their positions.

    The student's embedding is to be nearer to the teacher's of the same sample than to the teacher's of other samples,
    and the other way round. Those of other samples are as they last were, in a memory bank by sample index. A fit's
    checkpoint holds the bank: twice `dim` numbers a training row. A step has `batch_size` scores for each of them.

    Args:
        dim: of the embeddings.
        negatives: number of other samples drawn for each of a batch, with repetition; 16,384 in the paper, of 50,000.
        temperature: divides the inner products.
        momentum: part of the old embedding when a sample is seen again.
        other_classes: leave out those drawn of the sample's own class, as the paper does, once their labels were seen.
    """

    dim: int = 128
    negatives: int = 1024
    temperature: float = 0.07
    momentum: float = 0.5
    other_classes: bool = True

    def _faults(self) -> Faults:
        faults = super()._faults()
        faults.whole("dim", 1)
        faults.whole("negatives", 1)
        faults.number("temperature", 0, exclusive=True)
        faults.number("momentum", 0, 1)
        faults.flag("other_classes")
        return faults

    def parts(self, pair: Pair, samples: int) -> nn.Module:
        """Embeddings and banks, for each pair of features.

        Raises:
            ConfigError: where several processes train the run, or there is one training row.
        """
        if ranks.size() > 1:
            raise ConfigError(
                [
                    f"has one memory bank of all training rows, and {ranks.size()} processes train this run; set"
                    " trainer.devices=1 and trainer.num_nodes=1, or leave the term out"
                ]
            )
        if samples < 2:
            raise ConfigError([f"contrasts training rows with each other, and there is {samples}"])
        channels = [(as_tokens(own).shape[2], as_tokens(its).shape[2]) for own, its in self.taken(pair)]
        return nn.ModuleList([Contrast(own, its, samples, self.dim) for own, its in channels])

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        """The mean over the pairs of features of both directions' `contrastive_loss`. The banks move on."""
        assert isinstance(parts, nn.ModuleList)
        losses = [self._contrast(*taken, part, pair) for taken, part in zip(self.taken(pair), parts, strict=True)]
        return sum(losses[1:], losses[0]) / len(losses)

    def _contrast(self, student: Tensor, teacher: Tensor, part: nn.Module, pair: Pair) -> Tensor:
        assert isinstance(part, Contrast)
        index, samples = pair.index, len(part.labels)
        drawn = torch.randint(samples - 1, (len(index), self.negatives), device=index.device)
        drawn += drawn >= index[:, None]  # any row but the sample's own
        part.labels[index] = pair.target
        counted = part.labels[drawn] != pair.target[:, None] if self.other_classes else torch.ones_like(drawn).bool()
        return self.contrasted(part, part.embedded(student, teacher), index, drawn, counted)

    def contrasted(
        self, part: Contrast, embedded: tuple[Tensor, Tensor], index: Tensor, drawn: Tensor, counted: Tensor
    ) -> Tensor:
        """Both directions' losses of embeddings, which are remembered.

        Args:
            part: whose banks are meant.
            embedded: the student's and the teacher's (batch, dim).
            index: (batch,) sample index.
            drawn: (batch, negatives) sample index of the negatives.
            counted: (batch, negatives) bool, those that count.
        """
        chosen, losses = torch.cat([index[:, None], drawn], 1), []
        for which, (one, bank) in enumerate(zip(embedded, (part.teacher_bank, part.student_bank), strict=True)):
            with torch.autocast(index.device.type, enabled=False):
                scores = one @ bank.clone().T / self.temperature  # a copy: the bank changes before the backward pass
            scores = scores.gather(1, chosen)
            losses.append(contrastive_loss(scores, counted, part.normaliser(which, scores), len(part.labels)))
        for one, bank in zip(embedded, (part.student_bank, part.teacher_bank), strict=True):
            part.remember(bank, index, one, self.momentum)
        return losses[0] + losses[1]
