"""Classifiers that read the tokens of earlier ones: `reuse`."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.assembling import assemble
from pkd_lightning.cli import load_config
from pkd_lightning.cost import measure, total_macs
from pkd_lightning.earlier import following, outputs_for
from pkd_lightning.ensemble import ProgressiveEnsemble, load_student, load_students
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.export import FORMATS, export
from pkd_lightning.export.facts import Job
from pkd_lightning.fit_module import compiled
from pkd_lightning.models.building import build_classifier
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.reuse import Resize, ReusedTokens
from pkd_lightning.outputs import Output
from pkd_lightning.report import write_report
from pkd_lightning.reporting.values import prefix_cost
from pkd_lightning.tasks import ImageClassification
from tests.outside.reading import Reading
from tests.support import ACCEPT, tiny_run
from tests.test_earlier import ensemble_of
from tests.test_fit_resume import assert_same, killed_at, run_until_done
from tests.test_growth import place
from tests.test_models import scrambled

SHAPE, CLASSES = (1, 12, 12), 3
# rasters of 4x4, 10x10 and 3x3 tokens: the second is finer, the third coarser than what is before it
RUNGS: list[dict[str, Any]] = [
    {"tokeniser": "patches", "patch_size": 3, "d_model": 3, "norm": "rms", "head": "mean"},
    {"tokeniser": "patches", "patch_size": 3, "patch_stride": 1, "d_model": 5, "norm": "layer", "head": "grid"},
    {"tokeniser": "patches", "patch_size": 4, "d_model": 4, "norm": "rms", "n_blocks": 2, "direction": "cross"},
]
PATCHES = {"tokeniser": "patches", "patch_size": 4, "d_model": 4, "norm": "rms", "head": "mean"}


def students(reuse: str, rungs: list[dict[str, Any]] = RUNGS, scramble: bool = True) -> list[nn.Module]:
    """One of each rung, each after those before it."""
    found: list[nn.Module] = []
    for seed, rung in enumerate(rungs):
        torch.manual_seed(seed)
        model = build_classifier(MambaClassifier, {**rung, "reuse": reuse}, SHAPE, CLASSES, lambda: found)
        found.append((scrambled(model, seed) if scramble else model).eval())
    return found


def by_hand(members: list[Any], images: Tensor) -> list[Tensor]:
    """Their logits, the tokens of each put together by torch's own functions."""
    logits: list[Tensor] = []
    read: list[tuple[Tensor, tuple[int, int]]] = []
    for member in members:
        tokens, grid = member.tokens(images), member.tokens.grid
        if read:
            given = [resized(z, before, grid) for z, before in read]
            layer = member.reuse.project
            if member.config.reuse == "concat":
                tokens = torch.cat([tokens, *given], -1) @ layer.weight.T + layer.bias
            else:
                tokens = tokens + torch.sigmoid(member.reuse.gate) * (
                    torch.cat(given, -1) @ layer.weight.T + layer.bias
                )
        plain = MambaClassifier(SHAPE, CLASSES, **{**vars(member.config), "reuse": "none"}).eval()
        plain.load_state_dict({name: value for name, value in member.state_dict().items() if "reuse" not in name})
        plain.tokens.forward = lambda _, tokens=tokens: tokens  # type: ignore[method-assign]
        taken: list[Tensor] = []
        hook = plain.norm.register_forward_hook(lambda _, __, output, taken=taken: taken.append(output))
        logits.append(plain(images))
        hook.remove()
        read.append((taken[0], grid))
    return logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def resized(tokens: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    planes = tokens.transpose(1, 2).unflatten(2, before)
    planes = F.adaptive_avg_pool2d(planes, (min(before[0], after[0]), min(before[1], after[1])))
    return F.interpolate(planes, after, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [((6, 6), (3, 3)), ((7, 5), (3, 4)), ((3, 3), (6, 6)), ((2, 3), (7, 4)), ((7, 3), (4, 8)), ((5, 4), (5, 2)),
     ((4, 5), (2, 5)), ((1, 16), (1, 5)), ((1, 5), (1, 16)), ((1, 1), (2, 3)), ((6, 6), (6, 6))],
)  # fmt: skip
def test_a_raster_is_averaged_where_it_is_finer_and_interpolated_where_it_is_coarser(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    tokens = torch.randn(2, before[0] * before[1], 3)
    resize = Resize(before, after)
    torch.testing.assert_close(resize(tokens), resized(tokens, before, after))
    assert not resize.state_dict()
    if before == after:
        assert resize(tokens) is tokens


@pytest.mark.parametrize("reuse", ["concat", "gate"])
@torch.inference_mode()
def test_every_way_of_asking_gives_what_the_students_give_by_hand(reuse: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    members, images = students(reuse), torch.randn(9, *SHAPE)
    assert [(member.tokens.grid, member.reads) for member in members] == [
        ((4, 4), None), ((10, 10), ("norm",)), ((3, 3), ("norm",)),
    ]  # fmt: skip
    one, two, three = by_hand(members, images)
    prefixes = [one, 0.5 * one + 2 * two, 0.9 * (0.5 * one + 2 * two) + 0.3 * three]
    close(members[0](images), one)  # the first one is an ordinary classifier
    whole = ensemble_of(members)
    for ensemble in (whole, whole.compiled()):
        for count, expected in enumerate(prefixes, 1):
            for parallel in (False, True, "auto"):
                close(ensemble(images, count, parallel), expected)
        for found, expected in zip(ensemble.anytime(images), prefixes, strict=True):
            close(found, expected)
        for t in (0, 1):  # half of the images are done after one, of the others after two
            sure = sorted(prefixes[t].softmax(-1).amax(-1).tolist())[4]
            logits, used = ensemble.early_exit(images, sure)
            assert len(set(used.tolist())) > 1
            expected = torch.stack([prefixes[t - 1][row] for row, t in enumerate(used.tolist())])
            close(logits, expected)
    said = "students 1 to 2 are not compiled: student 3 reads what their modules give"
    assert said in caplog.text
    assert "student 3 is not compiled: a MambaClassifier that reads earlier students" in caplog.text


@pytest.mark.parametrize("reuse", ["concat", "gate"])
def test_budgets_and_answers_count_what_must_run_once(reuse: str) -> None:
    members = students(reuse)
    task = ImageClassification(SHAPE, CLASSES, torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.3))
    ensemble = ProgressiveEnsemble(members, [(0.0, 1.0), (0.5, 2.0), (0.9, 0.3)], task).eval()
    macs = ensemble.macs
    assert macs is not None
    images = torch.randint(0, 256, (9, *SHAPE), dtype=torch.uint8)
    prefixes = list(ensemble.anytime(ensemble.preprocess(images)))
    for count, answer in enumerate(ensemble.stream(images), 1):
        close(answer.logits, prefixes[count - 1])
        assert answer.macs is not None
        assert set(answer.macs.tolist()) == {sum(macs[:count])}
        close(ensemble.predict(images, members=count).logits, prefixes[count - 1])
    for budget, count in ((macs[0], 1), (sum(macs[:2]) - 1, 1), (sum(macs[:2]), 2), (sum(macs), 3)):
        assert ensemble.predict(images, budget_macs=budget).students.tolist() == [count] * 9
    sure = sorted(prefixes[0].softmax(-1).amax(-1).tolist())[4]
    answer = ensemble.predict(images, confidence=sure)
    assert set(answer.students.tolist()) > {1}
    for row, used in enumerate(answer.students.tolist()):
        close(answer.logits[row], prefixes[used - 1][row])


def test_costs_by_hand() -> None:
    members = students("concat")
    alone = [total_macs(MambaClassifier(SHAPE, CLASSES, **rung), SHAPE) for rung in RUNGS]
    second = (10 * 4 * 4 + 10 * 10 * 4) * 3 + 100 * (5 + 3) * 5  # 4x4 to 10x10 tokens of 3 channels; a linear layer
    third = (3 * 4 * 4 + 3 * 3 * 4) * 3 + (3 * 10 * 10 + 3 * 3 * 10) * 5 + 9 * (4 + 3 + 5) * 4
    own = [alone[0], alone[1] + second, alone[2] + third]
    assert ensemble_of_images(members).macs == own
    for t, member in enumerate(members):
        cost = measure(following(member, members[:t]), SHAPE)
        assert cost.macs_total == sum(own[: t + 1])  # of one alone, all that must run
        assert cost.flops_published is not None
        assert cost.params == sum(p.numel() for one in members[: t + 1] for p in one.parameters())
    layers = [sum(p.numel() for name, p in member.named_parameters() if "reuse" in name) for member in members]
    assert layers == [0, 5 * (5 + 3) + 5, 4 * (4 + 3 + 5) + 4]
    gated = students("gate")
    second = (10 * 4 * 4 + 10 * 10 * 4) * 3 + 100 * 3 * 5
    assert total_macs(following(gated[1], gated[:1]), SHAPE) == alone[0] + alone[1] + second


def ensemble_of_images(members: list[nn.Module]) -> ProgressiveEnsemble:
    task = ImageClassification(SHAPE, CLASSES, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    return ProgressiveEnsemble(members, [(1.0, 1.0)] * len(members), task)


@torch.no_grad()
def test_a_student_begins_as_it_is_without_earlier_ones() -> None:
    images = torch.randn(5, *SHAPE)
    plain = students("none", scramble=False)
    for reuse, tolerance in (("concat", 0.0), ("gate", 0.05)):
        members = students(reuse, scramble=False)
        for t, (member, other) in enumerate(zip(members, plain, strict=True)):
            state, expected = member.state_dict(), other.state_dict()
            own = {name for name in state if not name.startswith("reuse.")}
            assert own == set(expected)
            assert (own == set(state)) == (t == 0)
            assert all(torch.equal(state[name], expected[name]) for name in own)
            logits, without = following(member, members[:t])(images), other(images)
            logits = logits.logits if isinstance(logits, Output) else logits
            assert float((logits - without).abs().max()) <= tolerance * float(without.abs().max())
            if reuse == "gate" and t > 0:
                assert not torch.equal(logits, without)


@pytest.mark.parametrize("reuse", ["concat", "gate"])
def test_what_is_read_is_learned_and_earlier_students_are_not_touched(reuse: str) -> None:
    *before, last = students(reuse, scramble=False)
    images = torch.randn(6, *SHAPE)
    earlier = outputs_for(last, before, images)
    assert earlier is not None
    assert not any(output.features["norm"].requires_grad for output in earlier)
    F.cross_entropy(last.train()(images, earlier=earlier), torch.arange(6) % CLASSES).backward()
    for name, parameter in last.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name
    width = 0 if reuse == "gate" else 4  # what follows reads the earlier students
    assert last.reuse.project.weight.grad[:, width:].abs().amin() > 0  # type: ignore[union-attr]
    assert all(parameter.grad is None for member in before for parameter in member.parameters())


def test_signals_and_pixels_have_rasters_of_one_row() -> None:
    found: list[nn.Module] = []
    for length in (16, 8, 24):
        options = {"seq_len": length, "d_model": 3, "reuse": "concat"}
        found.append(build_classifier(MambaClassifier, options, (1, 48), CLASSES, lambda: found).eval())
    signals = torch.randn(2, 1, 48)
    assert following(found[2], found[:2])(signals).logits.shape == (2, CLASSES)
    given = [(resize.given, resize.columns.shape) for resize in found[2].reuse.resize]  # type: ignore[union-attr]
    assert given == [((1, 16), (24, 16)), ((1, 8), (24, 8))]


def test_bad_options_and_calls_are_named() -> None:
    with pytest.raises(ConfigError, match="reuse='cat': must be one of none, concat, gate"):
        MambaClassifier(SHAPE, CLASSES, **PATCHES, reuse="cat")
    first, second = students("gate", RUNGS[:2])
    with pytest.raises(ConfigError, match="a student that reads 1 earlier ones is called with what 0 gave; call"):
        second(torch.zeros(1, *SHAPE))
    untold = MambaClassifier(SHAPE, CLASSES, **PATCHES, reuse="concat")
    with pytest.raises(ConfigError, match="has not been told which ones it follows: call its `follow` first"):
        following(untold, [first])(torch.zeros(1, *SHAPE))
    with pytest.raises(ConfigError, match=r"reuse='gate': reads MambaClassifiers, and student 2 is a tests\.outside"):
        build_classifier(
            MambaClassifier, {**PATCHES, "reuse": "gate"}, SHAPE, CLASSES, lambda: [first, Reading(CLASSES, 3)]
        )
    with pytest.raises(ConfigError) as error:
        assemble(load_config("experiment=digits", "student.common.reuse=cat"))
    assert error.value.faults[0].startswith("student.rungs.0.reuse='cat': must be one of none, concat, gate")


def test_a_reader_among_others_leaves_what_it_does_not_read_compiled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    *before, last = students("concat")
    plain = scrambled(MambaClassifier(SHAPE, CLASSES, **PATCHES)).eval()
    ensemble = ensemble_of_images([*before, plain, last.eval(), plain])
    ensemble.members[3] = build_classifier(
        MambaClassifier, {**PATCHES, "reuse": "gate"}, SHAPE, CLASSES, lambda: list(ensemble.members)[:3]
    ).eval()
    fast, images = ensemble.compiled(), torch.randn(4, *SHAPE)
    kinds = [type(member).__name__ for member in fast.members]
    assert kinds == ["MambaClassifier"] * 4 + ["CompiledStudent"]
    with torch.inference_mode():
        close(fast(images), ensemble(images))
    first = ensemble_of_images([*students("gate")[:1]]).compiled()  # it reads none
    assert type(first.members[0]).__name__ == "CompiledStudent"


REUSE = ("student.common.reuse=concat", ACCEPT)


@pytest.mark.report
def test_a_run_reports_and_loads_them(tmp_path: Path) -> None:
    results = tiny_run(tmp_path, *REUSE)
    rounds = results["rounds"]
    assert [row.get("reads") for row in rounds] == [None, [0], [0, 1]]
    for key in ("params", "macs_total", "flops_published"):
        assert prefix_cost(results, key) == [row[key] for row in rounds]  # each contains all before it
        assert results["ensemble"][key] == rounds[-1][key]
    assert results["exits"]["prefix_macs"] == [row["macs_total"] for row in rounds]
    run = place(tmp_path, *REUSE)
    ensemble = ProgressiveEnsemble.load(run)
    assert sum(ensemble.macs or ()) == results["ensemble"]["macs_total"]
    assert sum(p.numel() for p in ensemble.parameters()) == results["ensemble"]["params"]
    assert [member.reads for member in ensemble.members] == [None, ("norm",), ("norm",)]
    write_report(run)
    page = (run / "report.html").read_text()
    assert "Students 2 to 3 each read all students before them; their costs contain theirs." in page
    assert f"{results['ensemble']['params']:,}" in page
    with pytest.raises(RunError, match=r"does not fit the student that 01\.json describes"):
        load_student(run / "students" / "01")
    for mine, its in zip(load_students(run / "students", 3), ensemble.members, strict=True):
        assert all(torch.equal(value, its.state_dict()[name]) for name, value in mine.state_dict().items())


def test_an_unfinished_run_counts_parameters_as_a_finished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[list[int], int]] = []
    monkeypatch.setattr(
        "pkd_lightning.loggers.NoTracker.progress",
        lambda _, results: shown.append(([row["params"] for row in results["rounds"]],
                                         results.get("ensemble", {}).get("params"))),
    )  # fmt: skip
    results = tiny_run(tmp_path, *REUSE)
    params = [row["params"] for row in results["rounds"]]
    assert shown[-1] == (params, params[-1])


@pytest.mark.parametrize(
    "options",
    [("student.common.reuse=gate", "trainer.max_epochs=2"),
     ("student.common.reuse=concat", "student.repeat=true", "boosting=paper", "trainer.max_epochs=2")],
)  # fmt: skip
def test_killed_in_the_middle_of_fits_it_gives_the_same_bits(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (ACCEPT, *options)
    tiny_run(tmp_path / "whole", *flags)
    with killed_at(7, monkeypatch) as kills:
        run_until_done(tmp_path / "parts", *flags)
    assert "round-02" in {kill.split()[0] for kill in kills}
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_single_rung_that_repeats_is_tried_after_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ReusedTokens, tokens: Tensor, earlier: Any) -> Tensor:
        raise RuntimeError("it reads in vain")

    monkeypatch.setattr(ReusedTokens, "forward", broken)
    with pytest.raises(ConfigError, match=r"student\.rungs\.0: .*it reads in vain"):
        tiny_run(tmp_path, *REUSE, "student.repeat=true", "student.rungs=[{d_model: 3}]")
    assert not list(tmp_path.iterdir())


def test_a_run_grows_with_students_that_read_those_it_has(tmp_path: Path) -> None:
    tiny_run(tmp_path, ACCEPT, "boosting.rounds=2", "name=first")
    source = place(tmp_path, ACCEPT, "boosting.rounds=2", "name=first")
    flags = (ACCEPT, "boosting.rounds=4", f"boosting.grow_from={source}", "student.common.reuse=gate")
    results = tiny_run(tmp_path, *flags)
    assert [row.get("reads") for row in results["rounds"]] == [None, None, [0, 1], [0, 1, 2]]
    assert prefix_cost(results, "params")[1] == results["rounds"][0]["params"] + results["rounds"][1]["params"]
    assert prefix_cost(results, "params")[2:] == [row["params"] for row in results["rounds"][2:]]
    ensemble = ProgressiveEnsemble.load(place(tmp_path, *flags))
    assert [member.reuse is not None for member in ensemble.members] == [False, False, True, True]
    assert sum(ensemble.macs or ()) == results["ensemble"]["macs_total"]
    again = (*flags[:1], "boosting.rounds=3", "name=again", "boosting.grow_rounds=3",
             f"boosting.grow_from={place(tmp_path, *flags)}")  # fmt: skip
    grown = tiny_run(tmp_path, *again)  # and it is gone on from
    assert [row.get("reads") for row in grown["rounds"]] == [None, None, [0, 1]]
    assert grown["rounds"][2]["nll"] == results["rounds"][2]["nll"]


@pytest.mark.parametrize("reuse", ["concat", "gate"])
@pytest.mark.parametrize("format", ["safetensors", "pt2", "onnx"])
def test_exported_files_give_what_the_ensemble_gives(format: str, reuse: str, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    ensemble = ensemble_of_images(students(reuse)).eval()
    done = export(ensemble, format, tmp_path)
    assert done.facts.macs == [sum((ensemble.macs or [])[: t + 1]) for t in range(3)]
    images = torch.randint(0, 256, (5, *SHAPE), dtype=torch.uint8)
    with FORMATS[format].opened(done.path, Job(ensemble, done.facts, done.path)) as call, torch.inference_mode():
        for members, expected in enumerate(ensemble.anytime(ensemble.preprocess(images)), 1):
            close(call(images, members), expected)


def test_c_says_which_student_it_cannot_write(tmp_path: Path) -> None:
    ensemble = ensemble_of_images(students("gate")).eval()
    with pytest.raises(ConfigError, match=r"member 2: it reads earlier students \(reuse=gate\), which --format c"):
        export(ensemble, "c", tmp_path)
    assert not list(tmp_path.iterdir())
    assert export(ensemble, "c", tmp_path, members=1).path.exists()


def test_a_member_that_cannot_be_traced_is_named_among_those_that_read(tmp_path: Path) -> None:
    ensemble = ensemble_of_images(students("gate")).eval()
    last: Any = ensemble.members[2]
    last.head = Undecided(last.head)
    with pytest.raises(ConfigError, match=r"member 3: torch\.export cannot trace"):
        export(ensemble, "pt2", tmp_path)


class Undecided(nn.Module):
    """What it computes depends on its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features) if float(features.sum()) > 0 else -self.layer(features)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("reuse", ["concat", "gate"])
def test_torch_compile_computes_the_same(reuse: str) -> None:
    *before, last = students(reuse)
    images = torch.randn(4, *SHAPE)
    earlier = outputs_for(last, before, images)
    with torch.no_grad():
        found = compiled(last)(images, earlier=earlier).logits
        close(found, last(images, earlier=earlier))


def test_models_without_it_are_as_they_were() -> None:
    plain = build_classifier(MambaClassifier, PATCHES, SHAPE, CLASSES, lambda: pytest.fail("nobody reads them"))
    assert plain.reads is None
    assert not any("reuse" in name for name, _ in plain.named_modules())
