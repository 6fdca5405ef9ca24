"""Every YAML under conf/ composes and runs; impossible values fail before any training, all faults at once."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from pkd_lightning.assembling import assemble
from pkd_lightning.boosting import combine, objectives
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.cli import CONF, load_config, null_groups, suggestions
from pkd_lightning.composition import PARTS, SETTINGS, complete
from pkd_lightning.errors import ConfigError
from pkd_lightning.run import run
from pkd_lightning.rundir import plain_config, plain_hash
from tests.support import ACCEPT, QUICK, TINY, tiny_config, tiny_run

OPTIONS = sorted(str(path.relative_to(CONF).with_suffix("")) for path in Path(CONF).glob("*/*.yaml"))
# images of the right shape in place of a download; and where an option needs other images than the digits
FAKE = {
    "mnist": ("data.source._target_=tests.support.patterns", "+data.source.side=28", "+data.source.classes=10"),
    "cifar10": (
        "data.source._target_=tests.support.patterns", "+data.source.side=32", "+data.source.classes=10",
        "+data.source.channels=3",
    ),
    "idx": ("data.source._target_=tests.support.patterns", "data.root=."),
    "digits": (),
    "signals": (
        "data.source._target_=tests.support.waves", "data.root=.", "teacher.model.tokeniser=pixels",
        "teacher.model.patch_stride=null", "+teacher.model.seq_len=16", "teacher.model.head=mean",
        "student.common.tokeniser=pixels", "student.common.patch_stride=null", "+student.common.seq_len=16",
        "student.common.head=mean",
    ),
}  # fmt: skip
NEEDS = {
    "student/paper_mnist": "mnist",
    "student/patches_medium": "cifar10",
    "teacher/paper_mnist": "mnist",
    "teacher/paper_mnist_cosine": "mnist",
    "student/mnist_best": "mnist",
    "teacher/mnist_best": "mnist",
    "student/cifar10_best": "cifar10",
    "teacher/cifar10_best": "cifar10",
    "student/paper_cifar10": "cifar10",
    "teacher/paper_cifar10": "cifar10",
    "teacher/resnet18": "cifar10",
    "teacher/resnet9": "cifar10",
    "teacher/mamba_medium": "cifar10",
}
# what an option needs beside it that no file of the package has
BESIDE = {
    "teacher/none": ("boosting.alpha=1",),
    "teacher/paper_cifar10": ("teacher.model.n_blocks=2",),  # of 96: a minute
    "student/paper_cifar10": ("student.rungs=[{n_blocks:2,d_state:8,seq_len:192},{n_blocks:2,d_state:16,seq_len:48}]",),
    "knowledge/attention_bridge": (TINY[0], "teacher=attention", "boosting.knowledge.attention_bridge.skip=1"),
}


def overrides_of(option: str) -> list[str]:
    group, name = option.split("/")
    if group == "experiment":
        data = name.split("_")[0]
        return [f"experiment={name}", *FAKE[data]]
    data = name if group == "data" else NEEDS.get(option, "digits")
    choices = [f"data={data}"] if group == "data" else [f"{group}={name}", f"data={data}"]
    return [*choices, *FAKE[data], *BESIDE.get(option, ())]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_yaml_runs(option: str, tmp_path: Path) -> None:
    quick = [flag for flag in QUICK if not (option.startswith("logger/") and flag == "logger=none")]
    # 24 samples: 16 for training, which is one batch
    sizes = ["data.limit=26", "data.test_fraction=0.2", "data.validation_fraction=0.2", "boosting.rounds=2"]
    sizes.append("boosting.weak_learner.on_failure=accept")  # one batch improves little
    results = run(load_config(*quick, *sizes, f"run_root={tmp_path}", *overrides_of(option)))
    assert results["sizes"]["originals"] <= 16
    assert len(results["rounds"]) == 2
    assert 0 <= results["ensemble"]["accuracy"] <= 1


@pytest.mark.parametrize("objective", ["published", "additive", "anchored", "independent"])
@pytest.mark.parametrize("combine", ["mean", "sum", "learned"])
def test_every_objective_with_every_combination(objective: str, combine: str, tmp_path: Path) -> None:
    results = tiny_run(tmp_path, f"boosting.objective={objective}", f"boosting.combine={combine}", ACCEPT)
    assert len(results["rounds"]) == 3
    a, c = results["rounds"][2]["scales"]
    expected = {"mean": (2 / 3, 1 / 3), "sum": (1.0, 1.0)}.get(combine)
    if expected is not None:
        assert (a, c) == pytest.approx(expected)
    else:
        assert (a, c) != pytest.approx((2 / 3, 1 / 3), abs=1e-6)
        assert a > 0
        assert c > 0


def faults_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        assemble(load_config(*overrides))
    return error.value.faults


def test_all_faults_are_listed_at_once() -> None:
    faults = faults_of(
        "student=paper_mnist", "student.rungs.0.d_state=0", "boosting.rounds=8", "data.validation_fraction=1.0",
        "data.split=half", "trainer.max_epochs=0", "boosting.objective=anchord", "boosting.weak_learner.fraction=2",
        "teacher.model.head=flat", "seed=-1",
    )  # fmt: skip
    text = "\n".join(faults)
    for part in (
        "student.rungs.0.d_state=0", "8 rounds (boosting.rounds) on a ladder of 7", "data.validation_fraction=1.0",
        "data.split='half'", "trainer.max_epochs=0", "Did you mean 'anchored'?", "boosting.weak_learner.fraction=2",
        "teacher.model.head='flat'", "seed=-1", "teacher.trainer.max_epochs=0",
    ):  # fmt: skip
        assert part in text


def test_eight_rounds_on_seven_rungs_are_fine_with_repetition() -> None:
    assert assemble(load_config("boosting.rounds=8", "student.repeat=true")).boosting.rounds == 8


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "+student.rungs.0.d_stat=4",
            "student.rungs.0.d_stat: no such option. Did you mean 'student.rungs.0.d_state'?",
        ),
        ("+boosting.round=3", "Did you mean 'boosting.rounds'?"),
        ("+data.validation=0.1", "Did you mean 'data.validation_fraction'?"),
        ("boosting.combine=average", "mean"),
        ("student.model=pkd_lightning.models.Nothing", "cannot be imported"),
        ("data.source._target_=pkd_lightning.data.nothing", "data"),
        ("trainer.optimizer._target_=torch.optim.Nothing", "trainer"),
        ("student.rungs=[]", "at least one rung"),
    ],
)
def test_a_single_fault_names_its_key(override: str, said: str) -> None:
    faults = faults_of(override)
    assert any(said in fault for fault in faults), faults


def test_a_length_that_does_not_divide_the_image_fails_before_training(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, "student.common.tokeniser=pixels", "student.common.seq_len=50", "+student.rungs.2.seq_len=16"
    )
    with pytest.raises(ConfigError, match="nearest lengths") as error:
        run(config)
    assert len(error.value.faults) == 2  # both rungs, not only the first
    assert not list(tmp_path.rglob("teacher.safetensors"))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("boosting.rouns=3", "boosting.rounds"),
        ("trainer.max_epoch=3", "trainer.max_epochs"),
        ("data.limt=3", "data.limit"),
        ("rounds=3", "boosting.rounds"),
        ("lr=0.1", "trainer.optimizer.lr"),
        ("trainer.lr=0.1", "trainer.optimizer.lr"),
        ("teacher.max_epochs=3", "teacher.trainer.max_epochs"),
        ("boosting.fraction=1", "boosting.weak_learner.fraction"),
        ("student.rungs.0.d_stat=1", "student.rungs.0.d_state"),
    ],
)
def test_a_misspelt_override_suggests_the_right_one(argument: str, said: str) -> None:
    (line,) = suggestions(["experiment=digits", argument])
    assert f"Did you mean {said!r}?" in line


def test_suggestions_are_also_of_the_users_own_files(tmp_path: Path) -> None:
    write_group(tmp_path, "student", "# @package _global_\nstudent: {mine: 1}")
    given = ["--config-dir", str(tmp_path), "student=mine", "student.minne=2"]
    assert suggestions(given) == ["'student.minne' is not an option. Did you mean 'student.mine'?"]


def write_group(folder: Path, group: str, text: str) -> str:
    """A file `mine` of the user's in a group; the override that makes it found."""
    (folder / group).mkdir()
    (folder / group / "mine.yaml").write_text(text)
    return f"hydra.searchpath=[file://{folder}]"


def test_settings_that_nothing_reads_are_faults(tmp_path: Path) -> None:
    text = "# @package _global_\nname: mine\ntrianer: {max_epochs: 3}\nmax_epochs: 2"
    faults = faults_of(write_group(tmp_path, "experiment", text), "experiment=mine", "+lr=0.1")
    assert faults == [
        "trianer: no such option. Did you mean 'trainer'?",
        "max_epochs: no such option. Did you mean 'trainer.max_epochs'?",
        "lr: no such option. Did you mean 'trainer.optimizer.lr'?",
    ]


def test_a_variable_of_the_users_that_options_read_is_no_fault(tmp_path: Path) -> None:
    text = "# @package _global_\nwidth: 6\nstudent: {common: {d_model: '${width}'}}\nunread: 6"
    (fault,) = faults_of(write_group(tmp_path, "experiment", text), "experiment=mine")
    assert fault.startswith("unread: ")


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ("experiment", "seed: 7\ntrainer: {max_epochs: 3}"),
        ("experiment", "defaults: [override /boosting: additive]\nseed: 7"),
        ("data", "name: mine\ndata: {limit: 3}"),
        ("boosting", "boosting: {rounds: 3}"),
    ],
)
def test_a_missing_package_line_is_named(group: str, text: str, tmp_path: Path) -> None:
    faults = faults_of(write_group(tmp_path, group, text), f"{group}=mine")
    assert any("the file's first line must be `# @package _global_`" in fault for fault in faults)


def test_the_known_keys_are_those_of_the_configuration() -> None:
    assert load_config().keys() == {*PARTS, *SETTINGS}


@pytest.mark.parametrize(
    "key",
    ["name", "seed", "run_root", "threads", "data", "teacher", "student", "boosting", "trainer", "logger",
     "data.source", "teacher.model", "teacher.trainer", "trainer.optimizer", "trainer.schedule"],
)  # fmt: skip
def test_a_missing_key_is_a_fault(key: str) -> None:
    config = load_config()
    OmegaConf.set_struct(config, False)
    parent, _, leaf = key.rpartition(".")
    del (OmegaConf.select(config, parent) if parent else config)[leaf]
    with pytest.raises(ConfigError) as error:
        assemble(config)
    assert any(fault.startswith(f"{key}: ") for fault in error.value.faults)


@pytest.mark.parametrize("key", ["seed", "name", "run_root", "teacher.model", "teacher.trainer", "trainer.optimizer",
                                 "data.source", "logger", "boosting.weak_learner", "student"])  # fmt: skip
@pytest.mark.parametrize("value", [None, "???", True])
def test_what_is_no_value_of_a_key_is_a_fault(key: str, value: object) -> None:
    config = load_config()
    OmegaConf.update(config, key, value, force_add=True)
    with pytest.raises(ConfigError) as error:
        assemble(config)
    if key == "teacher.model" and value is None:  # there is no teacher: what needs one is at fault
        key = "boosting.alpha=0.5: must be 1 without a teacher"
    assert any(fault.startswith(key) for fault in error.value.faults)


@pytest.mark.parametrize("group", ["data", "teacher", "student", "boosting", "trainer", "logger", "experiment"])
def test_no_choice_of_a_group_is_a_fault(group: str) -> None:
    with pytest.raises(ConfigError, match=f"{group}=null: must be one of "):
        load_config(f"{group}=null")


def test_no_terms_of_knowledge_are_chosen_by_name() -> None:
    assert plain_hash(plain_config(load_config("knowledge=none"))) == plain_hash(plain_config(load_config()))
    assert null_groups(["knowledge=null,fitnet"])[0].startswith("knowledge=null,fitnet: must be one of attention")
    assert not null_groups(["knowledge=none,fitnet,[fitnet,rkd]", "data.limit=null"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import notthere", "ModuleNotFoundError(\"No module named 'notthere'\")"),
        ("def (", "SyntaxError("),
        ("", "Are you sure that 'load' is importable from module"),
    ],
)
def test_why_a_module_of_a_users_cannot_be_imported_is_said(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"broken_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for key in ("data.source", "trainer.optimizer"):
        faults = faults_of(f"{key}={{_target_: {name}.load, _partial_: true}}")
        (fault,) = [one for one in faults if one.startswith(f"{key}: Error locating target '{name}.load'")]
        assert said in fault
        assert "HYDRA_FULL_ERROR" not in fault


@pytest.mark.parametrize(
    "key", ["trainer.optimizer", "trainer.schedule", "teacher.model", "data.source", "data.augment", "logger"]
)
def test_a_forgotten_partial_is_named(key: str) -> None:
    faults = faults_of("data=cifar10", "data.source._target_=tests.support.patterns", f"{key}._partial_=false")
    assert any(fault.startswith(key) and "`_partial_: true`" in fault for fault in faults)


def test_a_model_that_is_built_already_is_a_fault() -> None:
    faults = faults_of("teacher=resnet18", "teacher.model._partial_=false")
    assert any(fault.startswith("teacher.model: is built already") for fault in faults)


def test_an_option_of_the_tracker_fails_before_training(tmp_path: Path) -> None:
    faults = faults_of("logger=wandb", "+logger.projct=mine", f"run_root={tmp_path}")
    assert faults == ["logger.projct: no such option. Did you mean 'logger.project'? Options: project, mode"]


def test_known_overrides_get_no_suggestion() -> None:
    assert (
        suggestions(["boosting.rounds=3", "seed=1,2", "data=digits", "+new.key=1", "~data.limit", "hydra.verbose=1"])
        == []
    )


def test_trainer_overrides_reach_the_teacher_unless_it_has_its_own() -> None:
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    both = assemble(load_config("experiment=mnist_paper", "trainer.optimizer.lr=0.5", "trainer.max_epochs=3"))
    assert both.teacher.trainer.optimizer(parameter).defaults["lr"] == 0.5
    assert both.teacher.trainer.max_epochs == 3
    own = assemble(load_config("trainer.optimizer.lr=0.5", "teacher.trainer.optimizer.lr=0.1"))
    assert own.teacher.trainer.optimizer(parameter).defaults["lr"] == 0.1
    assert own.trainer.optimizer(parameter).defaults["lr"] == 0.5


def test_every_trainer_option_reaches_the_teacher() -> None:
    config = complete(load_config("trainer.matmul_precision=medium", "trainer.compile=true"))
    assert config.teacher.trainer.keys() == config.trainer.keys()
    assert (config.teacher.trainer.matmul_precision, config.teacher.trainer.compile) == ("medium", True)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.optimizer.lr=-1"], "trainer.optimizer: fails"),
        (["+trainer.optimizer.lrr=1"], "trainer.optimizer.lrr: no such option. Did you mean 'trainer.optimizer.lr'?"),
        (["+trainer.schedule.params=1"], "trainer.schedule.params: no such option. Options: warmup, final"),
        (["trainer.schedule.warmup=1.0"], "trainer.schedule: fails"),
        (["trainer.precision=bf16-tru"], "trainer.precision='bf16-tru'"),
        (["trainer.matmul_precision=hihg"], "trainer.matmul_precision='hihg': must be one of highest, high, medium"),
        (["teacher.trainer.compile=maybe"], "teacher.trainer.compile='maybe'"),
        (["trainer.optimizer._target_=torch.optim.LBFGS", "~trainer.optimizer.weight_decay"], "closure"),
        (["trainer.accelerator=tpu"], "trainer.accelerator='tpu'"),
        (["+student.repat=true"], "repat"),
        (["student.rungs=3"], "student"),
        (["threads=0"], "threads=0"),
    ],
)
def test_faults_that_only_the_parts_know(overrides: list[str], said: str) -> None:
    faults = faults_of(*overrides)
    assert any(said in fault for fault in faults), faults


def eased(progress: float, **options: float) -> float:
    """A user's schedule that takes any options."""
    return progress ** options["power"]


def test_a_schedule_that_takes_any_options_is_given_them() -> None:
    config = load_config("trainer.schedule._target_=tests.test_configs.eased", "+trainer.schedule.power=2")
    assert assemble(config).trainer.schedule(0.5) == 0.25


class NoLogits(torch.nn.Module):
    """A student of the user's with a fault: the wrong number of outputs."""

    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, hidden)
        del num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(images.flatten(1))
        return out


@pytest.mark.parametrize(
    ("rung", "said"), [("{hidden: 5}", "gives shape (2, 5)"), ("{hiden: 3}", "cannot be built"), ("{hidden: 3}", None)]
)
def test_a_students_class_is_tried_before_the_teacher_is_trained(rung: str, said: str | None, tmp_path: Path) -> None:
    own = ["student.model=tests.test_configs.NoLogits", "student.common=null", f"student.rungs=[{rung}]"]
    config = tiny_config(tmp_path, *own, "boosting.rounds=1")
    if said is None:
        assert len(run(config)["rounds"]) == 1  # `image_shape` is not named, so it is not passed
        return
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(config)
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class NotAScalar(objectives.Objective):
    """A user's objective that gives a loss for each sample."""

    def loss(self, batch: objectives.RoundBatch) -> torch.Tensor:
        return batch.student.sum(1)


negative = combine.Combination(lambda round_: (-1.0, 1.0))


def cropped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return images[..., 1:]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["boosting.objective=tests.test_configs.NotAScalar"], "not a scalar"),
        (["boosting.combine=tests.test_configs.negative"], "not two positive numbers"),
        (["+data.augment={_target_: tests.test_configs.cropped, _partial_: true}"], "the inputs' shape"),
        (["+data.augment={_target_: pkd_lightning.data.augment.shift, _partial_: true, pixel: 1}"], "pixel"),
    ],
)
def test_the_users_functions_are_tried_before_the_teacher_is_trained(
    overrides: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        run(tiny_config(tmp_path, *(flag.lstrip("+") for flag in overrides)))
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../escape", "''", "a/b", ".hidden"])
def test_a_name_is_a_folders_name(name: str) -> None:
    assert any("name=" in fault for fault in faults_of(f"name={name}"))


def test_a_configuration_is_composed_in_a_program_that_uses_hydra_itself() -> None:
    with initialize_config_dir(CONF, version_base="1.2"):
        before = GlobalHydra.instance().hydra
        assert load_config("seed=3").seed == 3
        assert suggestions(["boosting.rouns=3"])
        assert GlobalHydra.instance().hydra is before
        assert str(version.getbase()) == "1.2"
        assert compose("config", ["seed=4"]).seed == 4
    assert not GlobalHydra.instance().is_initialized()


def test_a_number_beyond_float64_is_a_fault() -> None:
    (fault,) = faults_of(f"boosting.gamma={10**400}")
    assert fault.startswith("boosting.gamma=1000")
    assert fault.endswith("must be a number above 0")


def test_an_option_of_the_teacher_that_results_cannot_hold_is_a_fault() -> None:
    assert "teacher.model.limits.1=inf: must be finite" in faults_of(
        "teacher=resnet18", "+teacher.model.limits=[0.0,inf]"
    )


# ---------------------------------------------------------------------------------- objectives


def objective(*overrides: str) -> objectives.Objective:
    return objectives.objective_of(assemble(load_config(*overrides)).boosting)


def test_an_objective_has_what_it_leaves_open_from_the_boosting_options() -> None:
    shared = ("boosting.alpha=0.2", "boosting.temperature=3", "boosting.gamma=5", "boosting.first_term=labels")
    assert objective("boosting.objective=published", *shared) == objectives.Published(0.2, 3, "labels", 5)
    path = "boosting.objective=pkd_lightning.boosting.objectives.Published"
    assert objective(path, *shared) == objectives.Published(0.2, 3, "labels", 5)
    assert objective("objective=published", *shared) == objectives.Published(0.2, 3, "soft", 1.0)
    chosen = ("objective=published", "boosting.objective.gamma=7", "+boosting.objective.alpha=0.9")
    assert objective(*chosen, *shared) == objectives.Published(0.9, 3, "soft", 7)


def test_defaults_that_the_yaml_shows_are_those_of_the_options() -> None:
    assert assemble(load_config()).boosting == BoostingConfig()
    assert objective("objective=published") == objectives.Published()
    assert objective("objective=anchored") == objectives.Anchored()


class Bare(objectives.Objective):
    """An objective without options, and without `@dataclass`."""

    def loss(self, batch: objectives.RoundBatch) -> torch.Tensor:
        return batch.student.square().mean()


def test_an_objective_without_options_need_not_be_a_dataclass() -> None:
    assert objective("boosting.objective=tests.test_configs.Bare").name == "bare"
    assert objective("boosting.objective={_target_: tests.test_configs.Bare}").name == "bare"
    with pytest.raises(ConfigError, match=r"boosting\.objective\.beta: no such option"):
        objective("boosting.objective={_target_: tests.test_configs.Bare, beta: 2}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["boosting.objective=publishd"], "boosting.objective: 'publishd': must be one of additive, anchored"),
        (["boosting.objective=math.pi"], "boosting.objective: 'math.pi' gives a float, not of type Objective"),
        (["boosting.objective={_target_: math.sqrt}"], "boosting.objective: gives no Objective"),
        (["objective=published", "boosting.objective.gamma=0"], "boosting.objective.gamma=0: must be a number above 0"),
        (["objective=anchored", "+boosting.objective.gama=2"], "boosting.objective.gama: no such option."),
        (["boosting.objective=published", "boosting.weights=samples"], "boosting.weights='samples': must be none"),
        (
            ["boosting.combine=avg"],
            "boosting.combine: 'avg': must be one of held_out, learned, mean, sum, or an import path.",
        ),
        (["boosting.rounds=0", "boosting.objective=publishd"], "boosting.objective: 'publishd'"),
    ],
)
def test_what_is_no_objective_is_a_fault(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        assemble(load_config(*overrides))
    assert said in str(error.value)


def test_an_objective_given_in_any_way_is_the_same_run() -> None:
    def hash_of(*overrides: str) -> str:
        return plain_hash(plain_config(load_config(*overrides)))

    expected = hash_of("boosting.objective=published", "boosting.gamma=3")
    assert hash_of("objective=published", "boosting.objective.gamma=3") == expected
    assert hash_of("boosting.objective=pkd_lightning.boosting.objectives.Published", "boosting.gamma=3") == expected
    assert hash_of("objective=published", "boosting.objective.gamma=2") != expected
    assert hash_of("objective=anchored") == hash_of()
    for key in ("alpha", "temperature"):  # the first round, judging and scales read those of `boosting`
        own = ("objective=anchored", f"+boosting.objective.{key}=0.9")
        assert len({hash_of(*own), hash_of(f"boosting.{key}=0.9"), hash_of()}) == 3
        assert hash_of(*own, f"boosting.{key}=0.9") == hash_of(f"boosting.{key}=0.9")


def test_a_data_sets_file_needs_no_more_than_its_source(tmp_path: Path) -> None:
    (tmp_path / "conf" / "data").mkdir(parents=True)
    text = "source: {_target_: tests.support.patterns, _partial_: true}\n"
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(text)
    found = [f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "data=mine", "+name=mine"]
    parts = assemble(load_config(*found, "data.split=official", "data.limit=50", "data.validation_fraction=0.2"))
    assert (parts.data.split, parts.data.limit, parts.data.validation_fraction) == ("official", 50, 0.2)
    assert (parts.data.root, parts.data.augment, parts.data.copies) == (None, None, 0)


def test_the_published_trainer_is_as_published() -> None:
    assert load_config("trainer=paper").trainer == {
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 1e-4, "weight_decay": 0.0},
        "schedule": {"_target_": "pkd_lightning.schedules.decay", "_partial_": True, "final": 0.1},
        "max_epochs": 50, "patience": 5, "batch_size": 32, "gradient_clip": None, "accelerator": "auto",
        "precision": "32-true", "matmul_precision": "highest", "compile": False, "cuda_graphs": False,
        "num_workers": 0, "progress": True,
        "mode": "auto", "callbacks": [], "lightning": {}, "checkpoint_every": "auto", "devices": 1, "num_nodes": 1,
        "strategy": "auto", "weights": "best",
    }  # fmt: skip


def test_a_trainers_file_needs_no_more_than_an_optimiser_and_a_schedule(tmp_path: Path) -> None:
    targets = {"optimizer": "torch.optim.SGD", "schedule": "pkd_lightning.schedules.constant"}
    text = "".join(f"{name}: {{_target_: {target}, _partial_: true}}\n" for name, target in targets.items())
    found = write_group(tmp_path, "trainer", text)
    parts = assemble(load_config(found, "trainer=mine", "trainer.precision=bf16-mixed"))
    assert (parts.trainer.precision, parts.trainer.max_epochs) == ("bf16-mixed", 50)
