"""What a run is called where it is shown beside others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pkd_lightning.cli import load_config
from pkd_lightning.naming import Naming
from tests.support import TINY

ROOT = Path(__file__).parent.parent
JOB = """
import json, sys
import pkd_lightning.run as run
from pkd_lightning.naming import Naming

def show(config):
    naming = Naming(config, "patterns")
    print("NAMED", json.dumps([naming.name, naming.group, naming.tags, naming.swept]))
    return {"rounds": []}

run.run = show
run.main()
"""


def named(*arguments: str) -> list[tuple[str, str, list[str], bool]]:
    """Name, group, tags, and whether several were run, of each job of a command line."""
    done = subprocess.run(
        [sys.executable, "-c", JOB, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100, check=False,  # jobs that leave no results have failed
    )  # fmt: skip
    lines = [line.removeprefix("NAMED ") for line in done.stdout.splitlines() if line.startswith("NAMED ")]
    return [tuple(json.loads(line)) for line in lines]


def test_on_the_command_line_it_is_what_was_typed(tmp_path: Path) -> None:
    typed = ("seed=1", "boosting.rounds=3", "+data.source.noise=60", "logger=none", "trainer.progress=false")
    ((name, group, tags, swept),) = named("experiment=digits", f"run_root={tmp_path}", *typed)
    assert name == "digits seed=1 boosting.rounds=3 +data.source.noise=60"
    assert (group, swept) == ("digits", False)
    assert tags == ["digits", "patterns", "anchored", "learned", "patches_small"]


def test_the_jobs_of_a_multirun_are_a_group(tmp_path: Path) -> None:
    root = tmp_path / "lr-sweep"
    jobs = named("-m", "experiment=digits", "seed=0,1", f"run_root={root}", "boosting=additive", "name=mine")
    assert [job[0] for job in jobs] == ["mine seed=0 boosting=additive", "mine seed=1 boosting=additive"]
    (sweep,) = (root / ".sweeps").iterdir()
    assert {(job[1], job[3]) for job in jobs} == {(sweep.name, True)}
    assert jobs[0][2][:4] == ["mine", "patterns", "additive", "sum"]
    ((_, group, _, _),) = named("-m", "experiment=digits", f"hydra.sweep.dir={tmp_path / 'night'}")
    assert group == "night"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (("experiment=digits",), "digits"),
        (("experiment=digits", "seed=1", "trainer.max_epochs=3"), "digits seed=1 trainer.max_epochs=3"),
        (("experiment=digits", "run_root=elsewhere", "logger=none"), "digits"),
        (("experiment=digits", "+data.source.noise=60"), "digits data.source.noise=60"),
        (("experiment=mnist_best", "boosting.rounds=2"), "mnist_best boosting.rounds=2"),
        (("data=mnist",), "mnist"),
        ((*TINY, "seed=4"), "digits seed=4"),  # too much differs
        (("name=mine", "seed=4"), "mine seed=4"),
    ],
)
def test_from_python_it_is_what_differs(overrides: tuple[str, ...], name: str) -> None:
    naming = Naming(load_config(*overrides), "set")
    assert naming.name == name
    assert naming.group == name.split()[0]
    assert not naming.swept


def test_tags_of_an_objective_by_its_path() -> None:
    config = load_config("experiment=digits", "objective=published", "boosting.combine=my_module.combination")
    assert Naming(config, "set").tags == ("digits", "set", "published", "combination")
    assert Naming(load_config("name=digits"), "digits").tags[:2] == ("digits", "anchored")


def test_names_and_tags_are_not_too_long_for_wandb() -> None:
    naming = Naming(load_config(f"name={'n' * 200}"), "s" * 200)
    assert len(naming.name) == 128
    assert max(map(len, naming.tags)) == 64
