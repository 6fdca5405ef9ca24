"""Students that read what earlier ones gave, from one file outside the package: trained, evaluated, loaded, asked."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.boosting.student import StudentModule
from pkd_lightning.cost import measure
from pkd_lightning.data.module import Batch
from pkd_lightning.earlier import Following, InTurn, following, outputs_for
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.building import build_classifier
from pkd_lightning.outputs import Output
from pkd_lightning.reporting.values import prefix_cost
from pkd_lightning.tasks import ImageClassification
from tests.outside.reading import Reading
from tests.support import ACCEPT, tiny_run

SHAPE, CLASSES = (1, 8, 8), 3
WIDTHS = (4, 5, 6)


def students(**options: object) -> list[nn.Module]:
    """Three that read, one after another."""
    found: list[nn.Module] = []
    for width in WIDTHS:
        model = build_classifier(Reading, {"width": width, **options}, SHAPE, CLASSES, lambda: found)
        found.append(model.eval())
    return found


def by_hand(members: list[nn.Module], inputs: Tensor) -> list[Tensor]:
    """Their logits, layer by layer."""
    logits: list[Tensor] = []
    read: list[Tensor] = []
    for member in members:
        hidden = member.hidden(inputs)
        logits.append(member.head(torch.cat([hidden, *read], 1)))
        read += [logits[-1], hidden]
    return logits


def ensemble_of(members: list[nn.Module]) -> ProgressiveEnsemble:
    task = ImageClassification(SHAPE, CLASSES, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    return ProgressiveEnsemble(members, [(0.0, 1.0), (0.5, 2.0), (0.9, 0.3)], task)


def test_every_way_of_asking_an_ensemble_gives_what_its_students_give_by_hand() -> None:
    members, inputs = students(), torch.randn(9, *SHAPE)
    one, two, three = by_hand(members, inputs)
    prefixes = [one, 0.5 * one + 2 * two, 0.9 * (0.5 * one + 2 * two) + 0.3 * three]
    ensemble = ensemble_of(members)
    for count, expected in enumerate(prefixes, 1):
        for parallel in (False, True):
            torch.testing.assert_close(ensemble(inputs, count, parallel), expected)
    for found, expected in zip(ensemble.anytime(inputs), prefixes, strict=True):
        torch.testing.assert_close(found, expected)
    sure = sorted(prefixes[0].softmax(-1).amax(-1).tolist())[4]  # half of the inputs are done after one student
    logits, used = ensemble.early_exit(inputs, sure)
    assert set(used.tolist()) > {1}
    torch.testing.assert_close(logits, torch.stack([prefixes[t - 1][row] for row, t in enumerate(used.tolist())]))
    alone = following(members[2], members[:2])
    torch.testing.assert_close(alone(inputs).logits, three)


def test_a_student_reads_the_modules_it_names_and_no_others() -> None:
    members, inputs = students(reads=()), torch.randn(2, *SHAPE)
    assert [member.head.in_features for member in members] == [4, 5 + 3, 6 + 2 * 3]  # the logits of each
    assert [dict(output.features) for output in outputs_for(members[2], members[:2], inputs) or ()] == [{}, {}]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    assert outputs_for(plain, members, inputs) is None
    assert following(plain, members) is plain
    turn = InTurn([plain, nn.Linear(8, 8)])  # nobody reads: nothing is kept
    turn.ask(inputs)
    assert turn.outputs == []
    with pytest.raises(
        ConfigError, match="student 1, which a later one reads: 'hiden': no module of the model; nearest"
    ):
        outputs_for(Reading(CLASSES, 3, ["hiden"]), members[:1], inputs)


def test_a_student_with_those_it_reads_stays_one_model() -> None:
    members = students()
    before = [{name: value.clone() for name, value in member.state_dict().items()} for member in members]
    whole = Following(members[2].train(), members[:2])
    assert (whole.training, members[2].training, members[0].training) == (True, True, False)
    whole.eval()
    assert not members[2].training
    whole.train()
    assert (members[2].training, members[1].training) == (True, False)
    logits = whole(torch.randn(4, *SHAPE)).logits
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in members[2].parameters())
    assert all(parameter.grad is None for member in members[:2] for parameter in member.parameters())
    for member, state in zip(members, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in member.state_dict().items())


def test_what_one_costs_is_all_that_must_run() -> None:
    members = students()
    layers = [64 * w + inputs * CLASSES for w, inputs in zip(WIDTHS, (4, 5 + 4 + 3, 6 + 4 + 3 + 5 + 3), strict=True)]
    for t, member in enumerate(members):
        cost = measure(following(member, members[:t]), SHAPE)
        assert cost.macs_total == cost.flops_published == sum(layers[: t + 1])
        assert cost.params == sum(p.numel() for one in members[: t + 1] for p in one.parameters())


def test_a_run_trains_saves_evaluates_and_loads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, int, bool]] = []
    losses = StudentModule.losses

    def watched(self: StudentModule, batch: Batch) -> tuple[Tensor, Tensor]:
        asked: list[Tensor] = []
        hooks = [student.hidden.register_forward_hook(lambda _, given, __: asked.append(given[0]))
                 for student in self.targets.students]  # fmt: skip
        result = losses(self, batch)
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(given, batch.inputs) for given in asked)  # augmented, as the student sees them
        frozen = not any(student.training for student in self.targets.students)
        calls.append((frozen, len(asked), self.targets.round == len(asked)))
        return result

    monkeypatch.setattr(StudentModule, "losses", watched)
    augment = "data.augment={_target_: pkd_lightning.data.augment.shift, _partial_: true, pixels: 1}"
    results = tiny_run(tmp_path, "student=reading", augment, ACCEPT)
    assert {(frozen, right) for frozen, _, right in calls} == {(True, True)}
    assert {asked for _, asked, _ in calls} == {0, 1, 2}
    rounds = results["rounds"]
    own = [64 * w + w + CLASSES * inputs + CLASSES for w, inputs in zip(WIDTHS, (4, 12, 21), strict=True)]
    assert [row["params"] for row in rounds] == [sum(own[: t + 1]) for t in range(3)]  # of what must run
    assert results["ensemble"]["params"] == sum(own)
    for key in ("params", "flops_published", "macs_total"):
        assert prefix_cost(results, key) == [row[key] for row in rounds]  # each contains all before it
    assert [row.get("reads") for row in rounds] == [None, [0], [0, 1]]
    (run,) = (path.parent for path in tmp_path.rglob("results.json"))
    for t, count in enumerate(own):
        saved = load_file(run / "students" / f"{t:02d}.safetensors")
        assert sum(value.numel() for value in saved.values()) == count
    ensemble = ProgressiveEnsemble.load(run)
    inputs = torch.randn(5, *SHAPE)
    expected = ensemble.members[0](inputs)
    torch.testing.assert_close(next(iter(ensemble.anytime(inputs))), expected)
    torch.testing.assert_close(
        ensemble.members[1](inputs, (Output(expected, {"hidden": ensemble.members[0].hidden(inputs)}),)),
        by_hand(list(ensemble.members), inputs)[1],
    )


PUBLISHED = ("boosting=paper", "boosting.weak_learner.check_every=1", "trainer.max_epochs=2")


@pytest.mark.parametrize("options", [("student.repeat=false",), ("student.repeat=true",), PUBLISHED])
def test_a_run_is_resumed_with_the_students_it_reads(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("student=reading", ACCEPT, "boosting.rounds=3", *options)
    whole = tiny_run(tmp_path / "whole", *flags)
    advance = BoostingLoop.advance

    def killed(self: BoostingLoop) -> None:
        if self.state.round == 2:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(BoostingLoop, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "parts", *flags)
    monkeypatch.undo()
    parts = tiny_run(tmp_path / "parts", *flags)
    assert [row["nll"] for row in parts["rounds"]] == [row["nll"] for row in whole["rounds"]]
    assert [row["edges"] for row in parts["rounds"]] == [row["edges"] for row in whole["rounds"]]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+student.common.reads=[hiden]", "student 1, which a later one reads: 'hiden': no module of the model"),
        ("+student.common.reads=3", "student.rungs"),
    ],
)
def test_what_cannot_be_read_is_found_before_anything_is_trained(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_run(tmp_path, "student=reading", override)
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_student_in_training_reads_what_earlier_ones_give_for_the_same_inputs() -> None:
    *before, last = students()
    module = SimpleNamespace(model=last, targets=SimpleNamespace(students=before))
    inputs = torch.rand(4, *SHAPE)
    earlier = StudentModule.earlier(module, inputs)  # type: ignore[arg-type]
    expected = outputs_for(last, before, inputs)
    assert earlier is not None
    assert expected is not None
    assert [one.logits.tolist() for one in earlier] == [one.logits.tolist() for one in expected]
    assert len(earlier) == 2
