"""The teacher is fitted as the students are, except for its own options, however those are given."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf

from pkd_lightning.assembling import assemble, open_tracker
from pkd_lightning.cli import load_config, suggestions
from pkd_lightning.composition import complete
from pkd_lightning.errors import ConfigError
from pkd_lightning.loggers import About, Tracker
from pkd_lightning.naming import Naming
from pkd_lightning.rundir import RunDirectory, plain_config, plain_hash
from tests.support import TINY, tiny_config

ROOT = Path(__file__).parent.parent
CONSTANT = "pkd_lightning.schedules.constant"


def plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def trainer_of(config: DictConfig) -> dict[str, Any]:
    """The whole of the teacher's trainer."""
    return plain(complete(config))["teacher"]["trainer"]  # type: ignore[no-any-return]


def made(students: str, own: str) -> dict[str, Any]:
    """The whole of a teacher's trainer, from both in YAML."""
    config = {"seed": 7, "trainer": yaml.safe_load(students), "teacher": {"trainer": yaml.safe_load(own)}}
    return trainer_of(OmegaConf.create(config))


# of the tree in which each option of the teacher was an interpolation in conf/config.yaml
HASHES = {
    "digits": "81530c8a75b4",
    "digits teacher.trainer.max_epochs=3": "b309e476b1a7",
    "digits teacher.trainer={max_epochs: 3}": "b309e476b1a7",
    "digits teacher.trainer.optimizer.lr=0.1": "e0ddb0d30fb6",
    "digits ~teacher.trainer.compile": "81530c8a75b4",
    "digits ~teacher.trainer.patience": "742174172a6c",
    "digits ~teacher.trainer.optimizer.weight_decay": "76fdc7867bbe",
    "digits +teacher.trainer.optimizer.betas=[0.9,0.95]": "1f0dc1a2a675",
    "digits teacher.trainer.optimizer._target_=torch.optim.SGD": "1cf228a0c0bd",
    "digits trainer.optimizer._target_=torch.optim.SGD": "0ca29063479e",
    "digits trainer.optimizer.lr=0.5 trainer.max_epochs=3 trainer.gradient_clip=null": "354da27b8149",
    "digits trainer=paper": "74482815bb8c",
    "digits teacher=paper_mnist_cosine": "cf3057cc5dde",
    "digits teacher=paper_mnist_cosine trainer=paper": "40f53d63273b",
    "digits teacher.trainer.schedule=${trainer.schedule}": "81530c8a75b4",
    "digits trainer.num_workers=2 teacher.trainer.progress=false": "81530c8a75b4",
    f"digits teacher.trainer.schedule={{_target_:{CONSTANT},_partial_:true}}": "b2bb22009274",
    "mnist_paper": "3a92e8947920",
    "mnist_paper teacher=paper_mnist_cosine": "ea0214704548",
    "mnist_paper teacher.trainer.max_epochs=3 trainer.schedule.final=0.871": "7d8e88a5acb4",
    "mnist_paper trainer=default": "e40abc4eacc9",
    "mnist_best": "951c104bc6f8",
    "mnist_best teacher.trainer.optimizer.lr=0.1": "1164aef367da",
    "mnist_best trainer=paper": "40f38c740afd",
}


@pytest.mark.parametrize("given", HASHES)
def test_run_directories_keep_their_names(given: str) -> None:
    experiment, *overrides = given.replace("{max_epochs: 3}", "{max_epochs:3}").split(" ")
    config = load_config(f"experiment={experiment}", "trainer.accelerator=cpu", *overrides)
    assert plain_hash(plain_config(config)) == HASHES[given]


# ---------------------------------------------------------------------------------- what it inherits


def test_an_optimiser_of_its_own_options_is_merged_with_the_students() -> None:
    students = "{optimizer: {_target_: a.B, _partial_: true, lr: 1, betas: [0.8, 0.9]}, patience: 3}"
    expected = {"_target_": "a.B", "_partial_": True, "lr": 1, "betas": [0.8, 0.9]}
    assert made(students, "{}") == {"optimizer": expected, "patience": 3}
    assert made(students, "{optimizer: {lr: 2, eps: 4}}")["optimizer"] == {**expected, "lr": 2, "eps": 4}
    assert made(students, "{optimizer: {_target_: a.B, lr: 2}}")["optimizer"] == {**expected, "lr": 2}
    assert made(students, "{optimizer: {_target_: '${trainer.optimizer._target_}'}}")["optimizer"] == expected


def test_another_optimiser_has_the_learning_rate_and_the_weight_decay_of_the_students() -> None:
    students = "{optimizer: {_target_: a.B, _partial_: true, lr: 1, weight_decay: 5, betas: [0.8, 0.9]}}"
    other = made(students, "{optimizer: {_target_: a.C, weight_decay: 6}}")["optimizer"]
    assert other == {"_target_": "a.C", "_partial_": True, "lr": 1, "weight_decay": 6}
    without = made(students, "{optimizer: {_target_: a.C, lr: null, weight_decay: null, eps: null}}")["optimizer"]
    assert without == {"_target_": "a.C", "_partial_": True, "eps": None}
    bare = made("{optimizer: {_target_: a.B, lr: 1}}", "{optimizer: {_target_: a.C}}")["optimizer"]
    assert bare == {"_target_": "a.C", "lr": 1}


def test_another_schedule_is_its_own_alone() -> None:
    students = "{schedule: {_target_: a.b, _partial_: true, lr: 4, final: 0.1, warmup: 0.2}}"
    other = made(students, "{schedule: {_target_: a.c, final: 3}}")["schedule"]
    assert other == {"_target_": "a.c", "_partial_": True, "final": 3}
    same = made(students, "{schedule: {final: 3}}")["schedule"]
    assert same == {"_target_": "a.b", "_partial_": True, "lr": 4, "final": 3, "warmup": 0.2}


def test_interpolations_mean_what_they_meant() -> None:
    students = "{optimizer: {_target_: a.B, lr: '${.decay}', decay: '${...seed}'}, patience: '${.epochs}', epochs: 5}"
    assert made(students, "{epochs: 6}") == {
        "optimizer": {"_target_": "a.B", "lr": 7, "decay": 7}, "patience": 5, "epochs": 6,
    }  # fmt: skip
    own = made(students, "{optimizer: {lr: '${trainer.epochs}', eps: '${..epochs}'}, epochs: 6}")
    assert own["optimizer"] == {"_target_": "a.B", "lr": 5, "decay": 7, "eps": 6}
    assert made(students, "'${trainer}'") == made(students, "{}")
    assert made(students, "{optimizer: '${trainer.optimizer}'}") == made(students, "{}")


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"optimizer": {"lr": 3}},
        {"optimizer": {"_target_": "torch.optim.SGD", "weight_decay": None}},
        {"optimizer": {"weight_decay": None}},
        {"schedule": {"_target_": CONSTANT}},
    ],
)
def test_what_is_whole_stays_as_it_is_and_what_is_given_too(own: dict[str, Any]) -> None:
    config = load_config("experiment=digits", "+trainer.optimizer.betas=[0.9,0.95]")
    config.teacher.trainer = own
    OmegaConf.set_readonly(config, True)
    before = OmegaConf.to_container(config)
    whole = complete(config)
    assert OmegaConf.to_container(config) == before
    assert plain(complete(whole)) == plain(whole)
    reloaded = OmegaConf.create(OmegaConf.to_yaml(whole, resolve=True))
    assert plain(complete(reloaded)) == plain(whole)
    assert plain_config(reloaded) == plain_config(config)


def test_the_teacher_of_an_old_run_has_no_option_that_it_had_not() -> None:
    config = complete(load_config("experiment=digits"))
    config = OmegaConf.create(OmegaConf.to_yaml(config, resolve=True))
    config.trainer.optimizer.betas = [0.9, 0.95]
    assert "betas" not in trainer_of(config)["optimizer"]


@pytest.mark.parametrize("key", ["trainer", "teacher", "teacher.trainer", "trainer.optimizer", "trainer.schedule",
                                 "teacher.trainer.optimizer", "teacher.trainer.schedule"])  # fmt: skip
@pytest.mark.parametrize(
    "value", [None, 3, "???", "${nothing}", [1], {"max epochs": 3}, {1: 2}, {"_target_": "${nothing}"}]
)
def test_what_cannot_be_completed_is_a_fault(key: str, value: Any) -> None:
    config = plain(load_config("experiment=digits"))
    node = config
    for part in key.split(".")[:-1]:
        node = node[part]
    node[key.split(".")[-1]] = value
    with pytest.raises(ConfigError):
        assemble(OmegaConf.create(config))


# ---------------------------------------------------------------------------------- where it shows


def test_a_run_shows_the_whole_of_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "teacher.trainer.max_epochs=2", "+trainer.optimizer.betas=[0.9,0.95]")
    expected = {**plain(config.trainer), "max_epochs": 2}
    with RunDirectory(config).open(config) as directory:
        written = yaml.safe_load((directory.path / "config.yaml").read_text())
    assert written["teacher"]["trainer"] == expected
    config.logger = {"_target_": "tests.test_teachers_trainer.Shown", "_partial_": True}
    with open_tracker(config, tmp_path, Naming(config, "patterns")) as tracker:
        assert tracker.config["teacher"]["trainer"] == expected  # type: ignore[attr-defined]
    optimizer: Any = assemble(config).teacher.trainer.optimizer
    assert optimizer.keywords["betas"] == [0.9, 0.95]


class Shown(Tracker):
    """A tracker that keeps the configuration."""

    def __init__(self, directory: Path, about: About, config: dict[str, Any]) -> None:
        del directory, about
        self.config = config


# ---------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["teacher.trainer.max_epochs=3"], "max_epochs", 3),
        (["+teacher.trainer.max_epochs=3"], "max_epochs", 3),
        (["teacher.trainer={max_epochs: 3}"], "max_epochs", 3),
        (["teacher.trainer.optimizer.lr=0.1"], "optimizer.lr", 0.1),
        (["teacher.trainer.optimizer.betas=[0.5,0.6]"], "optimizer.betas", [0.5, 0.6]),
        (["teacher.trainer.schedule.final=0.5"], "schedule.final", 0.5),
        (["trainer.patience=3", "~teacher.trainer.patience"], "patience", 5),
        (["trainer.precision=bf16-mixed", "~teacher.trainer.precision"], "precision", "32-true"),
        (["~teacher.trainer.optimizer.lr"], "optimizer.lr", None),
        (["~teacher.trainer.optimizer"], "optimizer.lr", 0.01),
        (["teacher=mnist_best", "~teacher.trainer.optimizer.weight_decay"], "optimizer.weight_decay", None),
        (["trainer.patience=3", "teacher.trainer.patience=null"], "patience", None),
    ],
)
def test_its_options_are_overrides(overrides: list[str], key: str, value: object) -> None:
    config = complete(load_config("experiment=digits", *overrides))
    assert OmegaConf.select(config, f"teacher.trainer.{key}") == value
    assert suggestions(overrides) == []


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("teacher.trainer.max_epoch=3", "teacher.trainer.max_epochs"),
        ("teacher.max_epochs=3", "teacher.trainer.max_epochs"),
        ("teacher.trainer.lr=3", "teacher.trainer.optimizer.lr"),
        ("teacher.traner.batch_size=3", "teacher.trainer.batch_size"),
        ("teachr.trainer.batch_size=3", "teacher.trainer.batch_size"),
    ],
)
def test_a_misspelt_one_is_refused(argument: str, said: str) -> None:
    with pytest.raises(Exception, match="Could not override"):
        load_config("experiment=digits", argument)
    assert suggestions(["experiment=digits", argument]) == [
        f"{argument[:-2]!r} is not an option. Did you mean {said!r}?"
    ]


@pytest.mark.parametrize("argument", ["~teacher.trainer.max_epoch", "~teacher.trainer.optimizer.weight_dekay"])
def test_what_is_misspelt_cannot_be_left_out(argument: str) -> None:
    with pytest.raises(Exception, match="Could not delete from config"):
        load_config("experiment=digits", argument)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("teacher.trainer.optimizer.lrr=1", "no such option. Did you mean 'teacher.trainer.optimizer.lr'?"),
        ("teacher.trainer.schedule.warmp=1", "no such option. Did you mean 'teacher.trainer.schedule.warmup'?"),
        ("teacher.trainer.max_epochs=0", "must be a whole number of at least 1"),
        ("teacher.trainer.precision=half", "must be one of 32-true"),
        ("+teacher.trainer.max_epoch=3", "no such option. Did you mean 'teacher.trainer.max_epochs'?"),
    ],
)
def test_faults_name_the_teachers_option(argument: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        assemble(load_config("experiment=digits", argument))
    (fault,) = error.value.faults
    assert fault.startswith(argument.lstrip("+").split("=")[0])
    assert said in fault


def pkd(*arguments: str, cwd: Path, line: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({} if line is None else {"COMP_LINE": line})}
    command = [sys.executable, "-m", "pkd_lightning.run", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_a_sweep_over_its_options(tmp_path: Path) -> None:
    rates = "teacher.trainer.optimizer.lr=0.1,0.2"
    done = pkd("--multirun", *TINY, "boosting.rounds=1", rates, "teacher.trainer.max_epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = [yaml.safe_load(path.read_text())["teacher"]["trainer"] for path in tmp_path.rglob("config.yaml")]
    assert sorted(run["optimizer"]["lr"] for run in runs) == [0.1, 0.2]
    assert {run["max_epochs"] for run in runs} == {2}
    assert len(list(tmp_path.rglob("DONE"))) == 2


def test_a_configuration_is_printed_and_a_misspelt_option_ends_in_one_message(tmp_path: Path) -> None:
    given = ("teacher.trainer.max_epochs=3", "~teacher.trainer.compile")
    done = pkd("experiment=digits", *given, "--cfg", "job", "--resolve", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["teacher"]["trainer"]["max_epochs"] == 3
    wrong = pkd("experiment=digits", "teacher.trainer.max_epoch=3", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "Did you mean 'teacher.trainer.max_epochs'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pkd teacher.trainer.max", {"teacher.trainer.max_epochs="}),
        ("pkd experiment=digits teacher.trainer.max_epochs=3 teacher.trainer.pa", {"teacher.trainer.patience="}),
        ("pkd teacher.trainer.max_epochs=3 see", {"seed="}),
        ("pkd experiment=mnist_b", {"experiment=mnist_best"}),
    ],
)
def test_the_shell_completes_its_options(line: str, offered: set[str], tmp_path: Path) -> None:
    done = pkd("-sc", "query=bash", cwd=tmp_path, line=line)
    assert set(done.stdout.split()) == offered, done.stderr
