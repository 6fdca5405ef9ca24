"""Terms of knowledge: what they are given, what they add to a fit, and what is said of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.errors import ConfigError
from pkd_lightning.experiment import assemble
from pkd_lightning.knowledge.attached import Knowledge, shares, try_losses
from pkd_lightning.knowledge.fitnet import FitNet
from pkd_lightning.knowledge.term import Pair, Term
from pkd_lightning.knowledge.tokens import as_tokens, resized
from pkd_lightning.outputs import Output, Taps
from pkd_lightning.rundir import plain_config, plain_hash
from tests.support import ACCEPT, patterns, tiny_config, tiny_run

__all__ = ["patterns"]
TARGET = "_target_: pkd_lightning.knowledge.fitnet.FitNet"
FITNET = f"+boosting.knowledge.fitnet={{{TARGET}, student: blocks.-1, teacher: blocks.0}}"
SEEN: list[tuple[bool, Pair]] = []


def pair(student: Tensor, teacher: Tensor) -> Pair:
    """Of one feature each, called `at`, with logits of 0."""
    logits = torch.zeros(len(student), 3)
    index = torch.arange(len(student))
    return Pair(Output(logits, {"at": student}), Output(logits, {"at": teacher}), index % 3, index)


@dataclass(frozen=True)
class Spy(Term):
    """Notes what it sees, and has the loss of the student's logits squared."""

    @property
    def teacher_features(self) -> Sequence[str]:
        return ("blocks.0",)

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        SEEN.append((torch.is_grad_enabled(), pair))
        return pair.student.logits.square().mean()


# ---------------------------------------------------------------------------------- paths and shapes


@pytest.mark.parametrize(("path", "index"), [("1", 1), ("-1", 2), ("-3", 0)])
def test_modules_are_counted_from_the_last_too(path: str, index: int) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    assert Taps(model, [path]).modules == {path: model[index]}


@pytest.mark.parametrize("path", ["-4", "-0", "1.-1", "-x", "-"])
def test_what_is_counted_too_far_is_no_module(path: str) -> None:
    with pytest.raises(ConfigError, match="no module of the model; nearest"):
        Taps(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), [path])


def test_planes_vectors_and_tokens_are_tokens() -> None:
    planes = torch.randn(2, 5, 3, 4)
    assert torch.equal(as_tokens(planes)[1, 6], planes[1, :, 1, 2])
    assert as_tokens(torch.zeros(2, 5)).shape == (2, 1, 5)
    tokens = torch.zeros(2, 7, 5)
    assert as_tokens(tokens) is tokens
    with pytest.raises(ValueError, match="none of vectors, tokens or planes"):
        as_tokens(torch.zeros(2, 3, 4, 5, 6))


@pytest.mark.parametrize(("positions", "length"), [(16, 4), (4, 16), (6, 3), (3, 6), (16, 8), (5, 5)])
def test_tokens_are_interpolated(positions: int, length: int) -> None:
    constant = torch.full((2, positions, 3), 1.5)
    torch.testing.assert_close(resized(constant, length), torch.full((2, length, 3), 1.5))
    tokens = torch.randn(2, positions, 3)
    if length < positions:  # averages of equal parts keep the mean
        torch.testing.assert_close(resized(tokens, length).mean(1), tokens.mean(1))


def test_rasters_are_interpolated_as_rasters() -> None:
    rows = torch.arange(4.0).repeat_interleave(4)  # of each position its row
    smaller = resized(rows.view(1, 16, 1), 4)
    assert smaller.flatten().tolist() == [0.5, 0.5, 2.5, 2.5]
    larger = resized(torch.tensor([0.0, 0, 1, 1]).view(1, 4, 1), 16).view(4, 4)
    assert torch.equal(larger, larger[:, :1].expand(4, 4))


# ---------------------------------------------------------------------------------- a term


def test_the_weight_follows_its_schedule() -> None:
    term = FitNet(weight=2.0, schedule=lambda progress: 1 - progress, student="at", teacher="at")
    assert [term.weight_at(progress) for progress in (0.0, 0.5, 1.0)] == [2.0, 1.0, 0.0]
    assert FitNet(weight=2.0, student="at", teacher="at").weight_at(0.3) == 2.0


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"weight": -1}, "weight=-1: must be"),
        ({"weight": float("nan")}, "weight=nan: must be"),
        ({"schedule": 3}, "schedule=3: must be"),
        ({"schedule": lambda progress: 1 / progress}, "schedule: fails"),
        ({"student": ()}, "student: is missing"),
        ({"student": 3}, "student=3: must be the path"),
        ({"student": ["a", ""]}, r"student=\['a', ''\]: must be the path"),
        ({"student": ["a", "b"]}, "1 modules for 2 of the student"),
    ],
)
def test_wrong_options_of_a_term_are_named(options: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        FitNet(**{"student": "a", "teacher": "b", **options})  # type: ignore[arg-type]


def test_hints_are_zero_where_the_regressor_gives_the_teachers_features() -> None:
    term, seen = FitNet(student="at", teacher="at"), pair(torch.randn(4, 9, 3), torch.randn(4, 16, 5))
    parts = term.parts(seen, 4)
    assert term.loss(seen, parts) > 0
    regressed = resized(parts[0](seen.student.features["at"]), 16)  # type: ignore[index]
    torch.testing.assert_close(term.loss(pair(seen.student.features["at"], regressed), parts), torch.tensor(0.0))
    torch.testing.assert_close(
        term.loss(seen, parts), (regressed - seen.teacher.features["at"]).square().mean(), rtol=1e-6, atol=0
    )


def test_a_term_of_several_pairs_is_their_mean() -> None:
    student, teacher = torch.randn(4, 9, 3), torch.randn(4, 9, 3)
    one, two = FitNet(student="at", teacher="at"), FitNet(student=["at", "at"], teacher=["at", "at"])
    seen = pair(student, teacher)
    parts = two.parts(seen, 4)
    assert isinstance(parts, nn.ModuleList)
    alone = [one.loss(seen, nn.ModuleList([part])) for part in parts]
    torch.testing.assert_close(two.loss(seen, parts), (alone[0] + alone[1]) / 2)


def test_shares_are_of_the_norms_of_the_gradients() -> None:
    weights = [torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)]
    losses = {"a": weights[0].square().sum() / 2, "b": 15 * weights[1].sum(), "none": torch.tensor(2.0)}
    found = shares(losses, weights)
    assert {name: float(share) for name, share in found.items()} == {"a": 0.25, "b": 0.75, "none": 0.0}
    (losses["a"] + losses["b"]).backward()  # the graph is still there
    assert all(weight.grad is not None for weight in weights)


# ---------------------------------------------------------------------------------- in a fit


def lines(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for path in root.rglob("metrics.jsonl") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["fast", "step"])
def test_each_epoch_says_what_a_term_was_and_how_it_pulled(mode: str, tmp_path: Path) -> None:
    tiny_run(tmp_path, FITNET, f"trainer.mode={mode}", "boosting.rounds=2")
    students = [line for line in lines(tmp_path) if str(line["stage"]).startswith("round")]
    assert students
    for line in students:
        assert line["knowledge/fitnet"] > 0
        assert line["gradient_share/fitnet"] + line["gradient_share/objective"] == pytest.approx(1, abs=1e-5)
        assert 0 < line["gradient_share/fitnet"] < 1
    assert not any("knowledge" in key for line in lines(tmp_path) if line["stage"] == "teacher" for key in line)


def test_both_modes_give_the_same_students(tmp_path: Path) -> None:
    fast, step = (tiny_run(tmp_path / mode, FITNET, f"trainer.mode={mode}", ACCEPT) for mode in ("fast", "step"))
    assert [row["nll"] for row in fast["rounds"]] == [row["nll"] for row in step["rounds"]]


def test_a_term_changes_the_students_and_its_parts_are_none_of_them(tmp_path: Path) -> None:
    plain, with_term = tiny_run(tmp_path / "plain", ACCEPT), tiny_run(tmp_path / "term", FITNET, ACCEPT)
    assert [row["params"] for row in plain["rounds"]] == [row["params"] for row in with_term["rounds"]]
    assert plain["rounds"][0]["nll"] != with_term["rounds"][0]["nll"]
    assert plain["teacher"]["nll"] == with_term["teacher"]["nll"]


def test_a_term_of_weight_0_changes_nothing(tmp_path: Path) -> None:
    plain = tiny_run(tmp_path / "plain")
    idle = tiny_run(tmp_path / "idle", FITNET.replace("student:", "weight: 0, student:"), "trainer.gradient_clip=null")
    free = tiny_run(tmp_path / "free", "trainer.gradient_clip=null")
    assert [row["nll"] for row in free["rounds"]] == [row["nll"] for row in idle["rounds"]]
    assert plain["teacher"]["nll"] == free["teacher"]["nll"]


def test_terms_see_training_rows_alone_and_features_of_the_very_images(tmp_path: Path) -> None:
    SEEN.clear()
    spy = f"+boosting.knowledge.spy._target_={__name__}.Spy"
    results = tiny_run(tmp_path, spy, "boosting.rounds=1", "trainer.max_epochs=2")
    trained = SEEN[3:]  # after the trial of three rungs
    assert all(gradients for gradients, _ in trained)
    indices = torch.cat([pair.index for _, pair in trained])
    samples = len(indices) // 2
    assert torch.equal(indices.unique(), torch.arange(samples))  # training rows: each in both epochs
    assert all(not pair.teacher.features["blocks.0"].requires_grad for _, pair in trained)
    assert all(len(pair.teacher.features["blocks.0"]) == len(pair.index) for _, pair in trained)
    assert results["rounds"]


# ---------------------------------------------------------------------------------- configuration


def test_a_file_of_the_group_is_a_term_and_several_are_several(tmp_path: Path) -> None:
    terms = assemble(tiny_config(tmp_path, "knowledge=fitnet")).boosting.knowledge
    assert terms["fitnet"] == FitNet(weight=1.0, student="blocks.-1", teacher="blocks.-1")


def test_no_terms_leave_the_run_where_it_is(tmp_path: Path) -> None:
    plain, empty = tiny_config(tmp_path), tiny_config(tmp_path, "boosting.knowledge={}")
    other = tiny_config(tmp_path, FITNET)
    hashes = [plain_hash(plain_config(config)) for config in (plain, empty, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert "knowledge" not in plain_config(plain)["boosting"]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("boosting.knowledge=3", "boosting.knowledge: must be terms by name, not 3"),
        ("+boosting.knowledge.a=3", "boosting.knowledge.a: is no term"),
        ("+boosting.knowledge.a._target_=torch.nn.ReLU", "boosting.knowledge.a: is no term"),
        (FITNET.replace("student", "studnt"), "boosting.knowledge.fitnet"),
        (FITNET.replace("student:", "weight: -1, student:"), r"boosting\.knowledge\.fitnet\.weight=-1: must be"),
    ],
)
def test_what_is_no_term_is_named(given: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=fault):
        assemble(tiny_config(tmp_path, given))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (
            FITNET.replace("blocks.-1", "bloks.0"),
            r"boosting\.knowledge\.fitnet\.student: 'bloks\.0': no module .*blocks",
        ),
        (FITNET.replace("teacher: blocks.0", "teacher: blocks.9"), r"fitnet\.teacher: 'blocks\.9': no module"),
    ],
)
def test_paths_that_are_no_modules_are_found_before_anything_is_trained(given: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=fault):
        tiny_run(tmp_path, given)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_loss_that_is_no_finite_scalar_is_found(tmp_path: Path) -> None:
    for value, said in ((torch.zeros(2), "no finite scalar"), (torch.tensor(float("nan")), "no finite scalar")):
        term = Fixed(value=value)
        knowledge = Knowledge({"fixed": term}, pair(torch.zeros(2, 1), torch.zeros(2, 1)), 2)
        with pytest.raises(ConfigError, match=f"fixed: gives {said}"):
            try_losses(knowledge, pair(torch.zeros(2, 1), torch.zeros(2, 1)))


@dataclass(frozen=True)
class Fixed(Term):
    """Of a value that is given."""

    value: Tensor | None = None

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        assert self.value is not None
        return self.value


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (("teacher=none", "boosting.objective=independent", "boosting.alpha=1"), "boosting.knowledge: fitnet compare"),
        (("boosting.peers=mutual",), "boosting.knowledge: fitnet are of rounds"),
    ],
)
def test_terms_need_a_teacher_and_rounds(given: tuple[str, ...], fault: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=fault):
        assemble(tiny_config(tmp_path, FITNET, *given))
