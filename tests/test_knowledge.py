"""Terms of knowledge: what they are given, what they add to a fit, and what is said of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn

from pkd_lightning import fit_module
from pkd_lightning.assembling import assemble
from pkd_lightning.boosting import student
from pkd_lightning.cli import load_config
from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.attached import Knowledge, shares, try_losses
from pkd_lightning.knowledge.attention_transfer import AttentionTransfer
from pkd_lightning.knowledge.fitnet import FitNet
from pkd_lightning.knowledge.mixers import Mixers
from pkd_lightning.knowledge.term import Pair, Term
from pkd_lightning.knowledge.tokens import as_planes, as_tokens, grid_of, resized
from pkd_lightning.knowledge.vid import VID
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.outputs import Output, Taps
from pkd_lightning.rundir import RunDirectory, plain_config, plain_hash
from tests.support import ACCEPT, TINY, patterns, tiny_config, tiny_run
from tests.test_fit_resume import assert_same, killed_at, run_until_done, students, timeless
from tests.test_processes import ONE, TWO, assert_alike, command
from tests.test_run import pkd

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
    other = torch.zeros(1, length, 7)
    torch.testing.assert_close(resized(constant, other), torch.full((2, length, 3), 1.5))
    tokens = torch.randn(2, positions, 3)
    if length < positions:  # averages of equal parts keep the mean
        torch.testing.assert_close(resized(tokens, other).mean(1), tokens.mean(1))


def test_rasters_are_interpolated_as_rasters() -> None:
    rows = torch.arange(4.0).repeat_interleave(4)  # of each position its row
    smaller = resized(rows.view(1, 16, 1), torch.zeros(1, 4, 1))
    assert smaller.flatten().tolist() == [0.5, 0.5, 2.5, 2.5]
    larger = resized(torch.tensor([0.0, 0, 1, 1]).view(1, 4, 1), torch.zeros(1, 16, 1)).view(4, 4)
    assert torch.equal(larger, larger[:, :1].expand(4, 4))


@pytest.mark.parametrize(
    ("given", "wanted"), [((4, 16), (2, 8)), ((1, 64), (1, 16)), ((2, 8), (4, 16)), ((2, 9), (4, 3)), ((3, 3), (1, 1))]
)
def test_features_of_known_rasters_are_resized_as_such(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Side by side: averaged where it shrinks, interpolated where it grows."""
    planes, other = torch.randn(2, 3, *given), torch.zeros(2, 5, *wanted)
    expected = planes
    fewer = min(given[0], wanted[0]), min(given[1], wanted[1])
    if fewer != given:
        expected = torch.nn.functional.adaptive_avg_pool2d(expected, fewer)
    if fewer != wanted:
        expected = torch.nn.functional.interpolate(expected, wanted, mode="bilinear")
    torch.testing.assert_close(resized(planes, other), as_tokens(expected))


def test_a_signal_is_no_square() -> None:
    """64 steps of a signal, and 16: each is the mean of four that follow one another."""
    steps = torch.arange(64.0).view(1, 64, 1)
    shorter = resized(as_planes(steps, (1, 64)), as_planes(torch.zeros(1, 16, 1), (1, 16)))
    assert shorter.flatten().tolist() == [1.5 + 4 * i for i in range(16)]
    assert as_planes(steps, (1, 32)) is steps  # of another number
    assert as_planes(steps, None) is steps
    mixed = resized(as_planes(steps, (1, 64)), torch.zeros(1, 16, 1))  # the other does not say that it is a signal
    assert torch.equal(mixed, shorter)


@pytest.mark.parametrize(
    ("path", "grid"), [("blocks.0", (4, 4)), ("blocks.0.mixer", (4, 4)), ("tokens", (4, 4)), ("", (4, 4))]
)
def test_a_model_says_how_its_tokens_lie(path: str, grid: tuple[int, int]) -> None:
    model = MambaClassifier((1, 8, 8), 3, tokeniser="patches", patch_size=2, d_model=4, norm="rms", head="mean")
    assert grid_of(model, path) == grid
    both = torch.nn.ModuleDict({"one": model, "other": torch.nn.Linear(2, 2)})
    assert grid_of(both, f"one.{path}".rstrip(".")) == grid
    assert grid_of(both, "other") is None


@pytest.mark.parametrize("term", [FitNet, VID, AttentionTransfer, Mixers])
def test_terms_compare_features_as_the_models_rasters_lie(term: Any) -> None:
    """A student of 4x16 tokens, and a teacher of 2x8: not the 8x8 and 4x4 that their numbers could be."""
    models = [
        MambaClassifier((1, 8, 32), 3, tokeniser="patches", patch_size=size, d_model=4, norm="rms", head="mean")
        for size in (2, 4)
    ]
    found = term(student="blocks.0", teacher="blocks.-1").for_models(*models)
    assert found.grids == [((4, 16), (2, 8))]
    outputs = []
    for model in models:
        with Taps(model, ["blocks.0", "blocks.-1"]) as taps:
            outputs.append(taps.call(model, torch.randn(2, 1, 8, 32)))
    seen = Pair(*outputs, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    ((own, its),) = found.taken(seen)
    assert own.shape == (2, 4, 4, 16)
    assert its.shape == (2, 4, 2, 8)
    assert torch.equal(as_tokens(own), outputs[0].features["blocks.0"])
    assert found.loss(seen, found.parts(seen, 2)).isfinite()


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
    regressed = resized(parts[0](seen.student.features["at"]), torch.zeros(1, 16, 1))  # type: ignore[index]
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
    (tmp_path / "knowledge").mkdir()
    mine = f"# @package boosting.knowledge\nmine: {{{TARGET}, student: blocks.0, teacher: blocks.0}}\n"
    (tmp_path / "knowledge" / "mine.yaml").write_text(mine)
    config = load_config(f"hydra.searchpath=[file://{tmp_path}]", "knowledge=[fitnet,mine]")
    both = assemble(config).boosting.knowledge
    assert both == {**terms, "mine": FitNet(student="blocks.0", teacher="blocks.0")}


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
        (
            f"+boosting.knowledge.type={{{TARGET}, student: blocks.0, teacher: blocks.0}}",
            "boosting.knowledge.type: cannot be a name",
        ),
        (
            f"+boosting.knowledge.a={{{TARGET}, student: blocks.0, teacher: blocks.0, wieght: 2}}",
            r"boosting.knowledge.a.wieght: no such option. Did you mean 'boosting.knowledge.a.weight'\?",
        ),
        (
            f"+boosting.knowledge.a={{{TARGET}, student: blocks.0, teacher: blocks.0, "
            "schedule: {_target_: pkd_lightning.schedules.linear}}",
            "boosting.knowledge.a.schedule: .*`_partial_: true` missing",
        ),
        ("+boosting.knowledge.a=3", "boosting.knowledge.a: is no term"),
        (FITNET.replace(".fitnet=", ".objective="), "boosting.knowledge.objective: is the name of the objective"),
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


# ---------------------------------------------------------------------------------- with all that a fit can be


@pytest.mark.parametrize("objective", ["published", "additive", "anchored", "independent"])
def test_every_objective_has_terms_beside_it(objective: str, tmp_path: Path) -> None:
    """So has the first round, whose loss is the same in each."""
    combine = {"additive": "sum", "anchored": "learned"}.get(objective, "mean")
    flags = (f"boosting.objective={objective}", f"boosting.combine={combine}", "boosting.rounds=2", ACCEPT)
    plain, with_term = tiny_run(tmp_path / "plain", *flags), tiny_run(tmp_path / "term", FITNET, *flags)
    found = [line for line in lines(tmp_path / "term") if str(line["stage"]).startswith("round")]
    assert [line["stage"] for line in found] == ["round-00", "round-01"]
    assert all(line["knowledge/fitnet"] > 0 and 0 < line["gradient_share/fitnet"] < 1 for line in found)
    assert all(one["nll"] != other["nll"] for one, other in zip(plain["rounds"], with_term["rounds"], strict=True))


@pytest.mark.parametrize(
    ("every", "flags"),
    [(9, ("trainer.mode=fast",)), (8, ("trainer.mode=step", "+trainer.lightning.accumulate_grad_batches=2"))],
)
def test_killed_after_any_step_a_fit_with_a_term_gives_the_same_bits(
    every: int, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The regressor goes on where it was, and so do the epoch's means of what is said of the term."""
    flags = (FITNET, ACCEPT, "boosting.rounds=2", "trainer.max_epochs=2", *flags)
    tiny_run(tmp_path / "whole", *flags)
    with killed_at(every, monkeypatch) as kills:
        run_until_done(tmp_path / "parts", *flags)
    assert {kill.split()[0] for kill in kills} >= {"round-00", "round-01"}
    assert_same(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (timeless(lines(tmp_path / name)) for name in ("whole", "parts"))
    assert whole == parts
    assert sum("knowledge/fitnet" in line for line in whole) == 4


def test_measuring_shares_changes_no_bit_of_the_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fused kernels too, whose backward pass then runs several times for one batch."""
    flags = (FITNET, ACCEPT, "boosting.rounds=3", "+student.common.direction=alternating", "trainer.max_epochs=2")
    tiny_run(tmp_path / "measured", *flags)
    by_epoch = [line["gradient_share/fitnet"] for line in lines(tmp_path / "measured") if line["stage"] != "teacher"]
    assert len(by_epoch) == 6
    assert all(0 < share < 1 for share in by_epoch)
    none = torch.tensor(0.0)
    monkeypatch.setattr(student, "shares", lambda losses, parameters: dict.fromkeys(losses, none))
    tiny_run(tmp_path / "not", *flags)
    assert all(line.get("gradient_share/fitnet", 0) == 0 for line in lines(tmp_path / "not"))
    measured, without = students(tmp_path / "measured"), students(tmp_path / "not")
    assert len(measured) == len(without) == 3
    for one, other in zip(measured, without, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("weight", "students"), [(1e4, 2), (1e-4, 0)])
def test_a_term_that_leaves_nothing_to_the_objective_is_warned_of_once_a_student(
    weight: float, students: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heavy = FITNET.replace("student:", f"weight: {weight}, student:")
    tiny_run(tmp_path, heavy, ACCEPT, "boosting.rounds=2", "trainer.max_epochs=2")
    warned = [record.getMessage() for record in caplog.records if "of the gradient" in record.getMessage()]
    assert len(warned) == students
    assert all("the term fitnet makes 100% of the gradient and the objective 0%" in line for line in warned)
    assert all("lower its weight, boosting.knowledge.fitnet, " in line for line in warned)


REGRESSORS: list[Tensor] = []


@dataclass(frozen=True)
class Watched(FitNet):
    """Notes its regressor's weights."""

    def between(self, student: Tensor, teacher: Tensor, part: nn.Module) -> Tensor:
        REGRESSORS.append(next(part.parameters()).detach().clone())
        return super().between(student, teacher, part)


def test_a_regressor_is_trained_with_its_student(tmp_path: Path) -> None:
    REGRESSORS.clear()
    term = FITNET.replace(TARGET, f"_target_: {__name__}.Watched")
    tiny_run(tmp_path, term, "boosting.rounds=1")
    steps = REGRESSORS[3:]  # after the trial of three rungs
    assert len(steps) == 7
    assert not torch.equal(steps[0], steps[-1])


@dataclass(frozen=True)
class Heads(Term):
    """Notes what it sees: what the heads of both models gave as features are their logits."""

    @property
    def student_features(self) -> Sequence[str]:
        return ("head",)

    @property
    def teacher_features(self) -> Sequence[str]:
        return ("head",)

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        SEEN.append((torch.is_grad_enabled(), pair))
        return pair.student.logits.square().mean()


@pytest.mark.parametrize("online", [True, False])
def test_features_are_of_the_augmented_images_and_logits_only_where_the_teacher_is_online(
    online: bool, tmp_path: Path
) -> None:
    SEEN.clear()
    tiny_run(
        tmp_path, f"+boosting.knowledge.heads._target_={__name__}.Heads", "boosting.rounds=1", "trainer.max_epochs=2",
        "data.augment={_target_: pkd_lightning.data.augment.crop_flip, _partial_: true}", f"teacher.online={online}",
    )  # fmt: skip
    pairs = [pair for _, pair in SEEN[3:]]  # after the trial of three rungs
    index = torch.cat([pair.index for pair in pairs])
    logits, head = (
        torch.cat([of(pair.teacher) for pair in pairs])
        for of in (lambda out: out.logits, lambda out: out.features["head"])
    )
    same = (logits - head).abs().amax(1) < 1e-5
    assert same.all() if online else same.float().mean() < 0.5
    by_epoch = [part[index[half].argsort()] for half in (slice(101), slice(101, None)) for part in (logits[half],)]
    assert torch.equal(*by_epoch) != online  # the plain images' are the same in each epoch
    for pair in pairs:
        torch.testing.assert_close(pair.student.features["head"], pair.student.logits)


def test_a_run_grows_from_one_with_other_knowledge(tmp_path: Path) -> None:
    first = (FITNET, ACCEPT, "boosting.rounds=1", "name=first")
    tiny_run(tmp_path, *first)
    source = RunDirectory(tiny_config(tmp_path, *first)).path
    grown = tiny_run(
        tmp_path, "knowledge=mixers", ACCEPT, "boosting.rounds=2", f"boosting.grow_from={source}", "name=second"
    )
    assert [row.get("from") for row in grown["rounds"]] == [str(source), None]
    found = {line["stage"]: line for line in lines(tmp_path / "second")}
    assert "knowledge/mixers" in found["round-01"]
    assert not any("fitnet" in key for key in found["round-01"])


def test_more_rounds_are_found_only_of_the_same_knowledge(tmp_path: Path) -> None:
    for terms in ((FITNET,), (), (FITNET.replace("student:", "weight: 2, student:"),), (FITNET,)):
        tiny_run(tmp_path, *terms, ACCEPT, "boosting.rounds=1")
        results = tiny_run(tmp_path, *terms, ACCEPT, "boosting.rounds=2")
        source = RunDirectory(tiny_config(tmp_path, *terms, ACCEPT, "boosting.rounds=1")).path
        assert results["rounds"][0].get("from") == str(source)


def test_a_sweep_goes_over_weights_of_terms(tmp_path: Path) -> None:
    flags = ("run_root=here", "boosting.rounds=1", "knowledge=fitnet", "boosting.knowledge.fitnet.weight=0.1,10")
    done = pkd("--multirun", *TINY, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(weight=0.1) finished" in done.stdout
    found = [line["knowledge/fitnet"] for line in lines(tmp_path) if "knowledge/fitnet" in line]
    assert len(found) == 2
    assert max(found) > 20 * min(found)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("data.validation_fraction=0.02", "trainer.batch_size=3")])
def test_two_processes_train_a_term_as_one_does(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Its regressor is one, and what is said of it is the mean over the samples of both."""
    tiny_run(tmp_path / "one", *ONE, FITNET, *flags)
    done = command(tmp_path / "two", *TWO, FITNET, *flags)
    assert done.returncode == 0, done.stderr
    assert_alike(tmp_path / "one", tmp_path / "two")
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        if "knowledge/fitnet" in one:
            assert two["knowledge/fitnet"] == pytest.approx(one["knowledge/fitnet"], rel=1e-3)
            assert two["gradient_share/fitnet"] + two["gradient_share/objective"] == pytest.approx(1, abs=1e-5)
            assert two["gradient_share/fitnet"] == pytest.approx(one["gradient_share/fitnet"], abs=0.2)


@pytest.mark.parametrize("terms", [(FITNET,), ()])
def test_the_graphs_of_compiled_students_can_be_used_again_where_shares_are_measured(
    terms: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else torch.compile refuses it, in an epoch whose first batch is not the first that it sees."""
    donated = set()

    def compiled(model: nn.Module) -> Callable[..., object]:
        def called(inputs: Tensor, earlier: object = None) -> object:
            donated.add(torch._functorch.config.donated_buffer)
            return model(inputs)

        return called

    monkeypatch.setattr(fit_module, "compiled", compiled)
    tiny_run(tmp_path, *terms, "boosting.rounds=1", ACCEPT, "trainer.compile=true", "teacher.trainer.compile=false")
    assert donated == {not terms}
    assert torch._functorch.config.donated_buffer


@pytest.mark.slow
def test_a_compiled_student_has_the_terms_of_one_that_is_not(tmp_path: Path) -> None:
    """The taps are compiled with it, and shares are measured by its backward pass, too."""
    flags = (FITNET, ACCEPT, "boosting.rounds=3", "trainer.max_epochs=2", "teacher.trainer.compile=false")
    tiny_run(tmp_path / "plain", *flags)
    tiny_run(tmp_path / "compiled", *flags, "trainer.compile=true")
    for one, other in zip(lines(tmp_path / "plain"), lines(tmp_path / "compiled"), strict=True):
        for name in ("knowledge/fitnet", "gradient_share/fitnet", "train_loss"):
            assert other.get(name, 0) == pytest.approx(one.get(name, 0), rel=1e-3)
