"""Several teachers, chains of assistants and generations, by configuration: sharing, resuming, faults, reports."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pkd_lightning import distil, teacher
from pkd_lightning.assembling import assemble
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.student import StudentModule
from pkd_lightning.checkpoint import write_json
from pkd_lightning.composition import complete, models_of, without_bars
from pkd_lightning.data.module import DataModule
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.fit_module import FitModule
from pkd_lightning.losses import distillation_loss
from pkd_lightning.report import write_report
from pkd_lightning.reporting.table import print_table
from pkd_lightning.rundir import RunDirectory, plain_config
from pkd_lightning.teachers.combining import UNLABELLED, combined
from pkd_lightning.teachers.options import AssistantConfig, TeachersConfig
from pkd_lightning.teachers.preparing import AssistantModule, Teachers, combined_fingerprint
from pkd_lightning.wandb_tracker import figures_of
from tests.support import ACCEPT, tiny_config, tiny_run
from tests.test_fit_resume import Killed, assert_same, killed_at, run_until_done

ONE = ("boosting.rounds=1", ACCEPT)
PAIR, MEMBERS, MIDDLE = "teacher=pair", "teacher.members", "teacher.assistants.middle"
ASSISTANT = ("+teacher@teacher.assistants.middle=tiny", f"{MIDDLE}.model.d_model=5")
FURTHER = ("+teacher@teacher.assistants.small=tiny", "teacher.assistants.small.model.d_model=3")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained, as the run's metrics call it."""
    stages: list[str] = []
    train = teacher.train

    def counted(model: Any, settings: Any, data: Any, place: Any, stage: Any, *rest: Any) -> Any:
        stages.append(stage.shown)
        return train(model, settings, data, place, stage, *rest)

    monkeypatch.setattr(teacher, "train", counted)
    return stages


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whoever teaches the students, of each run."""
    found: list[Any] = []
    made = distil.taught_by
    monkeypatch.setattr(distil, "taught_by", lambda *given: found.append(made(*given)) or found[-1])
    return found


def directory(root: Path, *flags: str) -> RunDirectory:
    return RunDirectory(tiny_config(root, *flags))


def stages(run: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------- several teachers


def test_members_are_trained_and_shared_as_single_teachers_are(tmp_path: Path, trained: list[str]) -> None:
    single = tiny_run(tmp_path, *ONE)
    results = tiny_run(tmp_path, *ONE, PAIR)
    assert trained == ["teacher", "teacher-second"]  # the first was there
    one = directory(tmp_path, *ONE, "seed=0")
    pair = directory(tmp_path, *ONE, PAIR)
    own, shared = one.shared_teacher("data"), pair.shared_teachers("data")
    assert list(shared) == ["teacher.members.first", "teacher.members.second"]
    assert shared["teacher.members.first"] == own
    assert len(list((tmp_path / "teachers").glob("*/logits.safetensors"))) == 2
    first, second = results["teacher"]["members"]
    for name in ("accuracy", "nll", "macs_total", "params", "config"):
        assert first[name] == single["teacher"][name]
    assert first["seconds"] == single["wall_seconds"]["teacher"]
    assert stages(pair.path)[:2] == ["teacher-first", "teacher-second"]
    for name in ("first", "second"):
        (weights,) = pair.path.glob(f"teacher/members/{name}/teacher.safetensors")
        assert weights.stat().st_nlink > 1
    other = tiny_run(tmp_path, *ONE, PAIR, "boosting.alpha=0.4", "teacher.combine=confidence")
    assert len(trained) == 2
    assert [row["nll"] for row in other["teacher"]["members"]] == [first["nll"], second["nll"]]
    tiny_run(tmp_path, *ONE, "teacher.model.d_model=4")  # the second alone
    assert len(trained) == 2


def test_results_have_each_member_the_sum_of_their_costs_and_what_they_differ_in(
    tmp_path: Path, prepared: list[Any]
) -> None:
    results = tiny_run(tmp_path, *ONE, PAIR)
    row = results["teacher"]
    assert [member["name"] for member in row["members"]] == ["first", "second"]
    for cost in ("params", "flops_published", "macs_total"):
        assert row[cost] == sum(member[cost] for member in row["members"])
    assert results["wall_seconds"]["teacher"] == sum(member["seconds"] for member in row["members"])
    assert row["combine"] == "mean"
    assert row["config"] is None
    assert "chain" not in row
    assert [member["config"]["d_model"] for member in row["members"]] == [6, 4]
    (teachers,) = prepared
    assert isinstance(teachers, Teachers)
    logits = [part.teacher.logits for part in teachers.members]
    assert teachers.logits.equal(combined(torch.stack(logits), "mean"))
    data = DataModule(assemble(tiny_config(tmp_path)).data)
    rows = slice(data.validation.start, data.validation.stop)
    answers = [one[rows].argmax(-1) for one in logits]
    assert row["disagreement"]["rows"] == float((answers[0] != answers[1]).double().mean())
    assert row["disagreement"]["pairs"] == row["disagreement"]["rows"]
    assert row["disagreement"]["kl"] > 0
    for member, answer in zip(row["members"], answers, strict=True):
        assert member["validation_accuracy"] == float((answer == data.labels[rows]).double().mean())


@pytest.mark.parametrize("combine", ["cross_entropy", "confidence", "{first: 3, second: 1}"])
def test_asked_in_the_step_a_combination_is_what_its_cached_logits_are(
    combine: str, tmp_path: Path, prepared: list[Any]
) -> None:
    tiny_run(tmp_path, *ONE, PAIR, f"teacher.combine={combine}", "teacher.online=true")
    (teachers,) = prepared
    data = DataModule(assemble(tiny_config(tmp_path)).data)
    index = torch.arange(data.validation.stop)
    given = teachers.asked().outputs(index, data.task.prepare(data.inputs[index]))
    assert given.logits.allclose(teachers.logits, atol=1e-5)
    assert (teachers.labels is not None) == (combine == "cross_entropy")


def test_no_label_of_the_validation_part_is_used(tmp_path: Path, prepared: list[Any]) -> None:
    """So its accuracy there tells what it is on the test part, where it weighs by the entropy."""
    results = tiny_run(tmp_path, *ONE, PAIR, "teacher.combine=cross_entropy")
    (teachers,) = prepared
    data = DataModule(assemble(tiny_config(tmp_path)).data)
    n = len(data.training)
    assert teachers.labels[:n].equal(data.labels[:n])
    assert (teachers.labels[n:] == UNLABELLED).all()
    members = torch.stack([part.teacher.logits for part in teachers.members])
    assert teachers.logits[n:].equal(combined(members[:, n:], "cross_entropy"))
    assert teachers.logits[:n].equal(combined(members[:, :n], "cross_entropy", data.labels[:n]))
    test = data.test.start, data.test.stop
    with torch.no_grad():
        logits = teachers.model(data.task.prepare(data.inputs[slice(*test)]))
    assert results["teacher"]["accuracy"] == pytest.approx(
        float((logits.argmax(-1) == data.labels[slice(*test)]).float().mean())
    )


def test_members_of_one_model_differ_by_their_seeds(tmp_path: Path, trained: list[str]) -> None:
    same = (*ONE, PAIR, f"{MEMBERS}.second.model.d_model=6")
    with pytest.raises(ConfigError, match=r"teacher\.members\.second: is the same teacher as teacher\.members\.first"):
        tiny_run(tmp_path, *same)
    assert trained == []
    results = tiny_run(tmp_path, *same, f"+{MEMBERS}.second.seed=1")
    nlls = [row["nll"] for row in results["teacher"]["members"]]
    assert nlls[0] != nlls[1]
    other = tiny_run(tmp_path, *ONE, "seed=1")  # whose teacher it is
    assert other["teacher"]["nll"] == nlls[1]
    assert len(trained) == 2


def test_a_member_may_come_from_a_file(tmp_path: Path, trained: list[str]) -> None:
    first = tiny_run(tmp_path, *ONE)
    (weights,) = tmp_path.rglob("teacher.safetensors")
    results = tiny_run(tmp_path, *ONE, PAIR, f"+{MEMBERS}.first.checkpoint={weights}", "seed=3")
    assert trained == ["teacher", "teacher-second"]
    assert results["teacher"]["members"][0]["nll"] == first["teacher"]["nll"]


def test_an_objective_taps_a_member_by_its_name(tmp_path: Path) -> None:
    flags = (*ONE[1:], "boosting.rounds=2", PAIR, "objective=attention")
    with pytest.raises(ConfigError, match=r"second\.blocks\.0"):  # the nearest
        tiny_run(tmp_path, *flags, "boosting.objective.teacher_features=[blocks.0]")
    results = tiny_run(tmp_path, *flags, "boosting.objective.teacher_features=[second.blocks.0]")
    assert len(results["rounds"]) == 2


# ---------------------------------------------------------------------------------- assistants, generations


def test_a_chain_of_assistants_is_distilled_in_its_order(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, prepared: list[Any]
) -> None:
    lessons: list[tuple[int, torch.Tensor, float, float]] = []
    losses = AssistantModule.losses

    def watched(self: AssistantModule, batch: Any) -> Any:
        loss, logits = losses(self, batch)
        asked = self.lesson.teacher
        expected = distillation_loss(logits, asked.logits[batch.index], batch.labels, 0.25, 3.0)
        assert loss.equal(expected)
        lessons.append((self.model.config.d_model, asked.logits, self.config.alpha, self.config.temperature))
        return loss, logits

    monkeypatch.setattr(AssistantModule, "losses", watched)
    options = [
        f"+teacher.assistants.{name}.{key}" for name in ("middle", "small") for key in ("alpha=.25", "temperature=3")
    ]
    results = tiny_run(tmp_path, *ONE, *ASSISTANT, *FURTHER, *options)
    assert trained == ["teacher", "assistant-middle", "assistant-small"]
    (teachers,) = prepared
    first, middle, small = (part.teacher.logits for part in teachers.chain)
    for width, taught, alpha, temperature in lessons:
        assert taught.equal({5: first, 3: middle}[width])
        assert (alpha, temperature) == (0.25, 3.0)
    assert {width for width, *_ in lessons} == {5, 3}
    assert teachers.logits.equal(small)
    row = results["teacher"]
    assert [one["name"] for one in row["chain"]] == ["teacher", "middle", "small"]
    assert [one["config"]["d_model"] for one in row["chain"]] == [6, 5, 3]
    for name in ("accuracy", "nll", "params", "macs_total", "config"):
        assert row[name] == row["chain"][-1][name]
    assert results["wall_seconds"]["teacher"] == pytest.approx(sum(one["seconds"] for one in row["chain"]))
    assert "members" not in row
    run = directory(tmp_path, *ONE, *ASSISTANT, *FURTHER, *options).path
    assert (run / "teacher/assistants/small/teacher.safetensors").exists()
    assert stages(run)[:3] == ["teacher", "assistant-middle", "assistant-small"]


def test_assistants_have_the_loss_of_boosting_unless_they_have_their_own(tmp_path: Path) -> None:
    def loss(*flags: str) -> tuple[float, float]:
        config = assemble(tiny_config(tmp_path, *ASSISTANT, *flags)).teacher
        assert isinstance(config, TeachersConfig)
        return config.assistants["middle"].alpha, config.assistants["middle"].temperature

    assert (
        loss()
        == (BoostingConfig.alpha, BoostingConfig.temperature)
        == (AssistantConfig.alpha, AssistantConfig.temperature)
    )
    assert loss("boosting.alpha=0.3", "boosting.temperature=4") == (0.3, 4)
    assert loss("boosting.alpha=0.3", f"+{MIDDLE}.alpha=0.1") == (0.1, 2.0)


def test_what_determines_an_assistant_names_its_directory(tmp_path: Path) -> None:
    def place(*flags: str) -> Path:
        return directory(tmp_path, *flags).shared_teachers("data")["teacher.assistants.middle"]

    base = place(*ASSISTANT)
    for same in ("name=other", "student.common.d_state=3", "boosting.rounds=2", f"{MIDDLE}.trainer.progress=true",
                 f"+{MIDDLE}.alpha=0.5"):  # fmt: skip
        assert place(*ASSISTANT, same) == base, same
    assert place(*ASSISTANT, *FURTHER) == base
    others = [
        place(*ASSISTANT, flag)
        for flag in ("seed=1", "teacher.model.d_state=3", f"{MIDDLE}.model.d_state=3", "boosting.alpha=0.4",
                     f"{MIDDLE}.trainer.max_epochs=3", "teacher.online=true", "data.limit=100")
    ]  # fmt: skip
    others += [
        place(*FURTHER, *ASSISTANT),
        place(PAIR, *ASSISTANT),
        place(PAIR, *ASSISTANT, "teacher.combine=confidence"),
    ]
    assert len({base, *others}) == len(others) + 1
    alone = directory(tmp_path).shared_teachers("data")["teacher"]
    assert directory(tmp_path, *ASSISTANT).shared_teachers("data")["teacher"] == alone


def test_the_teacher_before_it_is_shared_with_runs_without_an_assistant(tmp_path: Path, trained: list[str]) -> None:
    tiny_run(tmp_path, *ONE)
    tiny_run(tmp_path, *ONE, *ASSISTANT)
    tiny_run(tmp_path, *ONE, *ASSISTANT, *FURTHER)
    assert trained == ["teacher", "assistant-middle", "assistant-small"]


def test_generations_are_assistants_of_the_teachers_own_model(tmp_path: Path, trained: list[str]) -> None:
    born = (*ONE, "teacher.generations=2")
    results = tiny_run(tmp_path, *born)
    assert trained == ["teacher", "assistant-generation_1", "assistant-generation_2"]
    row = results["teacher"]
    assert [one["config"] for one in row["chain"]] == [row["config"]] * 3
    assert len({one["nll"] for one in row["chain"]}) == 3
    spelt = [f"+teacher@teacher.assistants.generation_{number}=tiny" for number in (1, 2)]
    assert directory(tmp_path, *ONE, *spelt).path == directory(tmp_path, *born).path
    assert directory(tmp_path, *ONE, "teacher.generations=0").path == directory(tmp_path, *ONE).path
    tiny_run(tmp_path, *ONE, "teacher.generations=1")
    assert len(trained) == 3


def test_generations_are_trained_as_the_teacher_is_and_come_before_assistants(tmp_path: Path) -> None:
    flags = ("teacher.generations=1", *ASSISTANT, "teacher.trainer.max_epochs=7", "teacher.trainer.optimizer.lr=0.5")
    config = complete(tiny_config(tmp_path, *flags))
    assert models_of(config) == ["teacher", "teacher.assistants.generation_1", "teacher.assistants.middle"]
    assert config.teacher.assistants.generation_1.trainer == config.teacher.trainer
    assert config.teacher.assistants.middle.trainer == config.trainer
    assert complete(config) == config
    own = complete(tiny_config(tmp_path, *flags, "+teacher.assistants.generation_1.alpha=0.1"))
    assert models_of(own) == models_of(config)
    assert own.teacher.assistants.generation_1.alpha == 0.1


def test_the_order_of_assistants_counts(tmp_path: Path) -> None:
    one, other = (
        plain_config(tiny_config(tmp_path, *flags)) for flags in ((*ASSISTANT, *FURTHER), (*FURTHER, *ASSISTANT))
    )
    assert one != other
    assert (
        RunDirectory(tiny_config(tmp_path, *ASSISTANT, *FURTHER)).path
        != RunDirectory(tiny_config(tmp_path, *FURTHER, *ASSISTANT)).path
    )


# ---------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("every", "flags"),
    [
        (8, (PAIR, *ASSISTANT, "teacher.combine=cross_entropy")),
        (7, ("teacher.generations=2", "teacher.online=true")),
    ],
)
def test_killed_anywhere_it_gives_the_same_bits(
    every: int, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run(tmp_path / "whole", *ONE, *flags)
    with killed_at(every, monkeypatch) as kills:
        run_until_done(tmp_path / "parts", *ONE, *flags)
    assert {kill.split()[0].split("-")[0] for kill in kills} == {"teacher", "assistant", "round"}
    assert_same(tmp_path / "whole", tmp_path / "parts")
    one, other = (directory(tmp_path / name, *ONE, *flags).path for name in ("whole", "parts"))
    weights = sorted(path.relative_to(one) for path in one.rglob("teacher.safetensors"))
    assert len(weights) == 3
    for path in weights:
        assert (one / path).read_bytes() == (other / path).read_bytes()
    assert sorted(set(stages(one))) == sorted(set(stages(other)))


@pytest.mark.parametrize("flags", [(PAIR, *ASSISTANT), ("teacher.generations=1",)])
def test_a_run_goes_on_with_its_own_teachers(flags: tuple[str, ...], tmp_path: Path, trained: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoostingLoop, "run", lambda self, *given: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            tiny_run(tmp_path, *ONE, *flags)
    before = list(trained)
    shutil.rmtree(tmp_path / "teachers")
    results = tiny_run(tmp_path, *ONE, *flags)
    assert trained == before
    assert results["rounds"]


def test_without_locks_each_trains_in_the_runs_directory(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    tiny_run(tmp_path, *ONE, PAIR)
    tiny_run(tmp_path, *ONE, PAIR, "boosting.alpha=0.4")
    assert trained == ["teacher-first", "teacher-second"]
    for flags in (ONE, (*ONE, "boosting.alpha=0.4")):
        assert stages(directory(tmp_path, PAIR, *flags).path)[:2] == ["teacher-first", "teacher-second"]
    lines = [path.read_text() for path in (tmp_path / "teachers").glob("*/epochs.jsonl")]
    assert [json.loads(line)["stage"] for line in lines] == ["teacher", "teacher"]


def test_an_assistant_of_another_teacher_is_not_taken(tmp_path: Path, trained: list[str], caplog: Any) -> None:
    """As where the teacher was trained again by other code: the options are the same, its weights are not."""
    tiny_run(tmp_path, *ONE, *ASSISTANT)
    found = list((tmp_path / "teachers").glob("*/teacher.json"))
    assert len(found) == 2
    (assistant,) = (path for path in found if " " in json.loads(path.read_text())["data"])
    content = json.loads(assistant.read_text())
    del content["blake2b"]
    write_json(assistant, {**content, "data": content["data"][:-1] + "x"}, hashed=True)
    tiny_run(tmp_path, *ONE, *ASSISTANT, "boosting.objective=additive")
    assert trained == ["teacher", "assistant-middle", "assistant-middle"]
    assert "the teacher is trained again" in caplog.text


def test_a_run_whose_assistant_had_another_teacher_does_not_go_on(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoostingLoop, "run", lambda self, *given: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            tiny_run(tmp_path, *ONE, *ASSISTANT)
    path = directory(tmp_path, *ONE, *ASSISTANT).path / "teacher/assistants/middle/teacher.json"
    content = json.loads(path.read_text())
    del content["blake2b"]
    write_json(path, {**content, "data": content["data"][:-1] + "x"}, hashed=True)
    with pytest.raises(RunError, match="or by another teacher"):
        tiny_run(tmp_path, *ONE, *ASSISTANT)


def test_a_run_does_not_grow_from_one_with_other_teachers(tmp_path: Path) -> None:
    tiny_run(tmp_path, *ONE, PAIR)
    source = f"boosting.grow_from={directory(tmp_path, *ONE, PAIR).path}"
    for flags, named in (
        ((PAIR, "teacher.combine=confidence"), r"its teacher\.combine"),
        ((PAIR, f"{MEMBERS}.second.model.d_model=5"), r"its teacher\.members\.2\.second\.model\.d_model is 4"),
        ((PAIR, *ASSISTANT), r"its teacher\.assistants"),
        ((), r"its teacher\.members"),
    ):
        with pytest.raises(ConfigError, match=named):
            tiny_run(tmp_path, ACCEPT, "boosting.rounds=2", *flags, source)
    grown = tiny_run(tmp_path, ACCEPT, "boosting.rounds=2", PAIR, source)
    assert grown["rounds"][0]["from"]


def test_the_fingerprint_of_a_combination_is_of_its_members_and_of_how_they_are_combined() -> None:
    found = [
        combined_fingerprint(["a", "b"], "mean"), combined_fingerprint(["b", "a"], "mean"),
        combined_fingerprint(["a", "b"], "confidence"), combined_fingerprint(["a", "b"], {"x": 1, "y": 2}),
        combined_fingerprint(["a", "b"], {"x": 2, "y": 1}),
    ]  # fmt: skip
    assert len(set(found)) == len(found)


# ---------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((PAIR, f"{MEMBERS}.second.model.d_model=0"), f"{MEMBERS}.second.model.d_model=0"),
        ((PAIR, f"{MEMBERS}.first.trainer.max_epochs=0"), f"{MEMBERS}.first.trainer.max_epochs=0: must be"),
        ((PAIR, f"{MEMBERS}.first.trainer.optimizer.lrr=1"), "first.trainer.optimizer.lrr: no such option."),
        ((PAIR, f"+{MEMBERS}.first.modl=1"), "Did you mean 'teacher.members.first.model'"),
        ((PAIR, "+teacher.members.third={trainer: {}}"), f"{MEMBERS}.third.model: is missing"),
        ((PAIR, "+teacher.members.third=3"), "teacher.members.third: must be a mapping"),
        ((PAIR, f"+{MEMBERS}.first.online=true"), f"{MEMBERS}.first.online: is that of all members"),
        ((PAIR, f"+{MEMBERS}.first.seed=-1"), f"{MEMBERS}.first.seed=-1: must be null or a whole number"),
        ((PAIR, f"+{MEMBERS}.first.checkpoint=none.ckpt"), f"{MEMBERS}.first.checkpoint='none.ckpt': no such file"),
        ((PAIR, f"+{MEMBERS}.first.checkpoint=3"), f"{MEMBERS}.first.checkpoint=3: must be a path"),
        ((PAIR, "teacher.combine=median"), "teacher.combine='median': must be one of mean, confidence, cross_entropy"),
        ((PAIR, "teacher.combine={first: 1, secnd: 1}"), "teacher.combine.secnd: no such member."),
        ((PAIR, "teacher.combine={first: 1}"), "teacher.combine: member 'second' has no weight"),
        ((PAIR, "teacher.combine={first: 1, second: 0}"), "teacher.combine.second=0: must be a number above 0"),
        ((PAIR, "teacher.combine={first: 1, second: -inf}"), "teacher.combine.second=-inf: must be a number above 0"),
        ((PAIR, "+teacher.model={_target_: tests.support.patterns}"), "teacher.model: is of a single teacher"),
        ((PAIR, f"teacher.checkpoint={__file__}"), "teacher.checkpoint: is of a single teacher"),
        ((PAIR, "teacher.trainer.max_epochs=3"), "teacher.trainer.max_epochs: is of a single teacher"),
        ((PAIR, "teacher.generations=1"), "teacher.generations=1: are of a teacher's own model"),
        ((PAIR, "+teacher.combin=mean"), "teacher.combin: no such option. Did you mean 'teacher.combine'?"),
        ((PAIR, "teacher.online=3"), "teacher.online=3: must be true or false"),
        (("+teacher.members={}", "~teacher.model"), "teacher.members: is empty"),
        (("+teacher.members=[1]", "~teacher.model"), "teacher.members: must be a mapping"),
        (("+teacher.members.forward=3", "~teacher.model"), "teacher.members: 'forward' cannot be a name"),
        (("+teacher.members._how=3", "~teacher.model"), "teacher.members: '_how' cannot be a name"),
        (("+teacher.combine=mean",), "teacher.combine: is of several teachers"),
        (("teacher.generations=-1",), "teacher.generations=-1: must be a whole number from 0 to 100"),
        (("teacher.generations=101",), "teacher.generations=101: must be a whole number from 0 to 100"),
        (("teacher.generations=null",), "teacher.generations=None: must be a whole number"),
        (("+teacher.assistants=[1]",), "teacher.assistants: must be a mapping"),
        ((*ASSISTANT, f"+{MIDDLE}.alpha=2"), f"{MIDDLE}.alpha=2: must be a number from 0 to 1"),
        ((*ASSISTANT, f"+{MIDDLE}.temperature=0"), f"{MIDDLE}.temperature=0: must be"),
        ((*ASSISTANT, f"+{MIDDLE}.checkpoint=x"), f"{MIDDLE}.checkpoint: an assistant is trained here"),
        ((*ASSISTANT, f"+{MIDDLE}.online=true"), f"{MIDDLE}.online: is that of the whole chain"),
        ((*ASSISTANT, f"{MIDDLE}.trainer.devices=2"), f"{MIDDLE}.trainer.devices=2: is that of the run"),
        ((*ASSISTANT, "teacher.model.d_model=0"), "teacher.model.d_model=0"),
    ],
)  # fmt: skip
def test_a_fault_names_its_option(flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        assemble(tiny_config(tmp_path, *flags))
    assert any(said in fault for fault in error.value.faults)


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    flags = (
        f"{MEMBERS}.first.model.d_model=0",
        f"{MEMBERS}.second.trainer.max_epochs=0",
        "teacher.combine={x: 1}",
    )
    with pytest.raises(ConfigError) as error:
        assemble(tiny_config(tmp_path, PAIR, *flags, *ASSISTANT, f"{MIDDLE}.model.d_model=-1"))
    text = str(error.value)
    for part in (
        "first.model.d_model",
        "second.trainer.max_epochs",
        "combine.x",
        "combine: member",
        "middle.model.d_model",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((PAIR, f"{MEMBERS}.second.model.patch_size=9"), r"teacher\.members\.second\.model"),
        ((*ASSISTANT, f"{MIDDLE}.model.patch_size=9"), r"teacher\.assistants\.middle\.model"),
        ((*ASSISTANT, f"{MIDDLE}.model._target_=tests.test_teacher.Frozen"), "an assistant is trained"),
        (("teacher.generations=1", "teacher.model._target_=tests.test_teacher.Frozen"), "an assistant is trained"),
    ],
)
def test_each_is_tried_before_anything_is_trained(
    flags: tuple[str, ...], named: str, tmp_path: Path, trained: list[str]
) -> None:
    with pytest.raises(ConfigError, match=named):
        tiny_run(tmp_path, *flags)
    assert trained == []


def test_a_fit_that_diverges_names_the_option_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = AssistantModule.losses

    def lost(self: AssistantModule, batch: Any) -> Any:
        loss, logits = losses(self, batch)
        return loss * float("nan"), logits

    monkeypatch.setattr(AssistantModule, "losses", lost)
    with pytest.raises(RunError, match=r"lower teacher\.assistants\.middle\.trainer\.optimizer\.lr"):
        tiny_run(tmp_path, *ONE, *ASSISTANT)
    monkeypatch.setattr(teacher.TeacherModule, "losses", lambda self, batch: lost_of(self, batch))
    with pytest.raises(RunError, match=r"lower teacher\.members\.first\.trainer\.optimizer\.lr"):
        tiny_run(tmp_path / "pair", *ONE, PAIR)


def lost_of(self: FitModule, batch: Any) -> Any:
    logits = self(batch.inputs).logits
    return logits.sum() * float("nan"), logits


# ---------------------------------------------------------------------------------- the command line, what is shown


def test_options_of_each_trainer_are_overrides(tmp_path: Path) -> None:
    flags = (
        f"{MEMBERS}.first.trainer.max_epochs=4",
        "trainer.patience=3",
        "~teacher.members.second.trainer.patience",
    )
    config = complete(tiny_config(tmp_path, PAIR, *flags))
    members = config.teacher.members
    assert (members.first.trainer.max_epochs, members.first.trainer.patience) == (4, 3)
    assert (members.second.trainer.max_epochs, members.second.trainer.patience) == (1, 5)
    assert config.teacher.trainer == {}


def test_of_several_jobs_none_shows_the_progress_of_any_fit(tmp_path: Path) -> None:
    flags = (f"{MEMBERS}.first.trainer.progress=true", "trainer.progress=true")
    config = complete(without_bars(tiny_config(tmp_path, PAIR, *ASSISTANT, *flags)))
    assert not any(
        config.teacher[group][name].trainer.progress
        for group, name in (("members", "first"), ("members", "second"), ("assistants", "middle"))
    )
    assert plain_config(config) == plain_config(tiny_config(tmp_path, PAIR, *ASSISTANT))


@pytest.mark.parametrize("finish_with", [(PAIR, *ASSISTANT), ("teacher.generations=1",)])
def test_a_stopped_run_can_be_ended(
    finish_with: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkd_lightning.finish import finish

    advance: Callable[[BoostingLoop], None] = BoostingLoop.advance

    def stop(self: BoostingLoop) -> None:
        if self.state.round == 1:
            raise Killed
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(BoostingLoop, "advance", stop)
        with pytest.raises(Killed):
            tiny_run(tmp_path, ACCEPT, *finish_with)
    run = directory(tmp_path, ACCEPT, *finish_with).path
    results = json.loads(finish(run).results.read_text())
    assert len(results["rounds"]) == 1
    assert results["teacher"]["chain"]


def test_the_report_and_the_terminal_show_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = tiny_run(tmp_path, *ONE)
    print_table(single)
    assert "member" not in capsys.readouterr().out
    assert "Teachers</h3>" not in write_report(directory(tmp_path, *ONE).path, figures=False).read_text()
    results = tiny_run(tmp_path, *ONE, PAIR, *ASSISTANT, "teacher.combine=cross_entropy")
    run = directory(tmp_path, *ONE, PAIR, *ASSISTANT, "teacher.combine=cross_entropy").path
    page = write_report(run, figures=False).read_text()
    assert "Teachers</h3>" in page
    capsys.readouterr()
    print_table(results)
    terminal = " ".join(capsys.readouterr().out.split())
    for text in (page, terminal):
        for name in ("member first", "member second", "all 2 together", "assistant middle"):
            assert name in text
        assert "weighted by the entropy" in text
        assert "not all members give the same answer" in text
        assert "The last assistant teaches the students" in text
    assert "it was not trained in this run" not in page
    figures = figures_of(results)
    assert figures["teacher/first/accuracy"] == results["teacher"]["members"][0]["accuracy"]
    assert figures["teacher/middle/validation_accuracy"] == results["teacher"]["chain"][1]["validation_accuracy"]
    assert figures["teacher/disagreement/kl"] == results["teacher"]["disagreement"]["kl"]


def test_the_student_module_asks_the_last_of_the_chain(
    tmp_path: Path, prepared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    losses = StudentModule.losses

    def watched(self: StudentModule, batch: Any) -> Any:
        given = self.targets.teacher.outputs(batch.index, batch.inputs).logits
        seen.append(given.equal(prepared[0].chain[-1].teacher.logits[batch.index]))
        return losses(self, batch)

    monkeypatch.setattr(StudentModule, "losses", watched)
    tiny_run(tmp_path, *ONE, *ASSISTANT)
    assert seen
    assert all(seen)
