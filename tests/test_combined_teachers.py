"""Several teachers as one: the mathematics of the combination, and the module that is asked."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.cost import measure
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.outputs import Output, Taps
from pkd_lightning.teacher import OnlineTeacher
from pkd_lightning.teachers.combining import UNLABELLED, CombinedTeacher, combined, cost_of, log_weights
from pkd_lightning.teachers.measuring import accuracy, disagreement

LABELS = torch.tensor([0, 3, 2, 1, 0])
KINDS = ("mean", "confidence", "cross_entropy", [0.7, 0.2, 0.1])


def logits_of(members: int = 3, scale: float = 2.0) -> Tensor:
    """(members, 5, 4) in float64, the members of different scale and level."""
    drawn = torch.randn(members, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = torch.arange(1.0, members + 1, dtype=torch.float64)[:, None, None]
    return scale * sizes * drawn + 3 * sizes


@pytest.mark.parametrize("combine", KINDS)
def test_the_combination_is_the_weighted_mean_of_probabilities(combine: Any) -> None:
    logits = logits_of()
    weights = log_weights(logits.log_softmax(-1), combine, LABELS).exp()
    assert weights.sum(0).allclose(torch.ones(5, dtype=torch.float64))
    expected = (weights[..., None] * logits.softmax(-1)).sum(0)
    assert combined(logits, combine, LABELS).softmax(-1).allclose(expected)


def test_weights_are_what_they_are_said_to_be() -> None:
    p = logits_of().softmax(-1)
    entropy = -(p * p.log()).sum(-1)

    def weights(combine: Any, labels: Tensor | None = None) -> Tensor:
        return log_weights(p.log(), combine, labels).exp()

    assert weights("mean").allclose(torch.full((3, 5), 1 / 3, dtype=torch.float64))
    assert weights([7, 2, 1])[:, 4].allclose(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64))
    largest = p.max(-1).values
    assert weights("confidence").allclose(largest / largest.sum(0))
    assert weights("cross_entropy").allclose((-entropy).softmax(0))
    of_label = p[:, torch.arange(5), LABELS]
    assert weights("cross_entropy", LABELS).allclose(of_label / of_label.sum(0))
    mixed = torch.where(torch.arange(5) < 2, LABELS, UNLABELLED)
    assert weights("cross_entropy", mixed)[:, :2].equal(weights("cross_entropy", LABELS)[:, :2])
    assert weights("cross_entropy", mixed)[:, 2:].equal(weights("cross_entropy")[:, 2:])


def test_of_two_members_cross_entropy_weights_as_ca_mkd_does() -> None:
    log_p = logits_of(2).log_softmax(-1)
    loss = -log_p[:, torch.arange(5), LABELS]
    published = (1 - loss.exp() / loss.exp().sum(0)) / (2 - 1)
    assert log_weights(log_p, "cross_entropy", LABELS).exp().allclose(published)


@pytest.mark.parametrize("combine", KINDS)
@pytest.mark.parametrize("members", [1, 3])
def test_equal_members_together_are_what_they_are(combine: Any, members: int) -> None:
    """Their level, too: residual matrices compare logits."""
    one = logits_of()[1]
    how = combine if isinstance(combine, str) else combine[:members]
    assert combined(one.expand(members, 5, 4), how, LABELS).allclose(one)


@pytest.mark.parametrize("combine", KINDS)
def test_the_level_is_that_of_the_members_and_one_of_large_logits_does_not_overrule_the_others(combine: Any) -> None:
    logits = logits_of()
    shifted = logits + torch.tensor([5.0, 5.0, 5.0])[:, None, None]
    assert combined(shifted, combine, LABELS).allclose(combined(logits, combine, LABELS) + 5)
    extreme = logits_of(scale=1e4).float()
    assert combined(extreme, combine, LABELS).isfinite().all()


def test_where_confident_members_disagree_both_answers_are_kept() -> None:
    members = torch.tensor([[[9.0, 4.0, 0.0]], [[0.0, 4.0, 9.0]]])
    p = combined(members, "mean").softmax(-1)[0]
    assert p[0] == p[2]
    assert p[1] < 0.02
    assert members.mean(0).softmax(-1)[0, 1] > 0.2  # what the mean of logits makes of it


class Scaled(nn.Module):
    """Logits that are so many times the inputs; in an `Output`, as some models give them."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.layer.weight)
        self.factor = factor

    def forward(self, inputs: Tensor) -> Output:
        return Output(self.factor * self.layer(inputs))


def test_the_module_gives_the_combination_and_its_members_are_found_by_their_names() -> None:
    model = CombinedTeacher({"first": Scaled(1), "second": Scaled(3)}, {"second": 3, "first": 1})
    inputs = logits_of()[0].float()
    assert model(inputs).allclose(combined(torch.stack([inputs, 3 * inputs]), [1, 3]))
    taps = Taps(model, ["first.layer", "second.layer"])
    with taps:
        found = taps.call(model, inputs)
    assert found.logits.equal(model(inputs))
    assert found.features["second.layer"].equal(inputs)


def test_asked_in_the_step_it_weighs_by_the_labels_of_the_rows_that_have_one() -> None:
    model = CombinedTeacher({"first": Scaled(1), "second": Scaled(-2)}, "cross_entropy")
    inputs = logits_of()[0].float()
    labels = torch.cat([torch.zeros(10, dtype=torch.int64), LABELS, torch.full((3,), UNLABELLED)])
    asked = OnlineTeacher(model, ["first.layer"], labels)
    index = torch.tensor([10, 11, 12, 15, 16])
    given = asked.outputs(index, inputs)
    assert given.logits.equal(model(inputs, labels[index]))
    assert given.logits[3:].equal(model(inputs)[3:])
    assert not given.logits[:3].allclose(model(inputs)[:3])
    assert given.features["first.layer"].equal(inputs)
    assert not asked.state_dict()


def test_a_combination_costs_what_its_members_cost() -> None:
    options = {"tokeniser": "patches", "patch_size": 4, "n_blocks": 1, "d_state": 2, "head": "mean"}
    members = {str(width): MambaClassifier((1, 8, 8), 3, d_model=width, **options) for width in (3, 5)}
    one, other = (measure(member, (1, 8, 8)) for member in members.values())
    whole = cost_of(CombinedTeacher({f"of_{name}": member for name, member in members.items()}), (1, 8, 8))
    assert whole == one + other
    assert whole.macs_total is not None
    assert cost_of(members["3"], (1, 8, 8)) == one


def test_disagreement_counts_rows_and_pairs_and_measures_the_divergence() -> None:
    answers = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [0, 1, 1, 2]])  # of three members on four rows
    members = list(3.0 * nn.functional.one_hot(answers, 3).double())
    together = combined(torch.stack(members), "mean")
    found = disagreement(members, together)
    assert found["rows"] == 0.5
    assert found["pairs"] == pytest.approx((2 / 3 + 1) / 4)
    p = torch.stack(members).softmax(-1)
    mean = p.mean(0)
    entropy = -(mean * mean.log()).sum(-1) + (p * p.log()).sum(-1).mean(0)  # Jensen-Shannon
    assert found["kl"] == pytest.approx(float(entropy.mean()))
    assert disagreement(members[:1] * 2, members[0]) == {"rows": 0, "pairs": 0, "kl": pytest.approx(0)}
    assert disagreement(members[:1], members[0])["pairs"] == 0


def test_accuracy_is_that_of_the_largest_logit() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75
