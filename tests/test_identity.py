"""Equal configurations have one run directory, different ones have two."""

import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from pkd_lightning.cli import CONF, load_config
from pkd_lightning.kernels.scan import cuda
from pkd_lightning.rundir import RunDirectory, find_finished
from tests.support import TINY, tiny_config, tiny_run


def place(*overrides: str) -> Path:
    return RunDirectory(load_config(*TINY, *overrides)).path


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("boosting.temperature=2", "boosting.temperature=2.0"),
        ("trainer.gradient_clip=1", "trainer.gradient_clip=1.0"),
        ("teacher.trainer.gradient_clip=1", "teacher.trainer.gradient_clip=1.0"),
        ("trainer.optimizer.lr=1", "trainer.optimizer.lr=1.0"),
        ("+data.source.noise=60", "+data.source.noise=60.0"),
        ("+student.common.d_conv=4", "+student.common.d_conv=4.0"),
        ("data.root=some/where", "data.root=there/../some/where"),
        ("teacher.trainer.compile=false", "~teacher.trainer.compile"),
        ("teacher.online=false", "~teacher.online"),
        ("boosting.weak_learner.margin=0", "~boosting.weak_learner.margin"),
        ("boosting.weak_learner={}", "~boosting.weak_learner"),
        ("boosting.objective=anchored", "boosting.objective=pkd_lightning.boosting.objectives.anchored"),
        ("boosting.combine=learned", "boosting.combine=pkd_lightning.boosting.combine.learned"),
        ("logger=none", "logger=wandb"),
        ("trainer.num_workers=0", "trainer.num_workers=2"),
    ],
)
def test_equal_options_have_one_directory(one: str, other: str) -> None:
    assert place(one) == place(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("boosting.temperature=2", "boosting.temperature=2.5"),
        ("trainer.gradient_clip=null", "trainer.gradient_clip=1"),
        ("trainer.patience=5", "trainer.patience=null"),
        ("data.root=some/where", "data.root=some/where/else"),
        ("+data.source.noise=0", "+data.source.noise=false"),  # equal numbers to Python, not to a user's function
        ("+data.source.noise=60", "+data.source.noise='60'"),
        ("boosting.objective=anchored", "boosting.objective=mine.anchored"),
        ("seed=0", "seed=1"),
        ("teacher.online=false", "teacher.online=true"),
        ("threads=1", "threads=2"),  # sums of two threads end in other bits
        ("threads=1", "threads=null"),
    ],
)
def test_different_options_have_two(one: str, other: str) -> None:
    assert place(one) != place(other)


def test_a_place_is_the_same_from_wherever_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = place(f"data.root={tmp_path}/data")
    assert {place(f"data.root={root}") for root in ("data", "./data/", "link", "~/data")} == {wanted}


@pytest.mark.parametrize("there", [False, True])
def test_auto_is_the_device_it_means(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkd_lightning.trainer.find_spec", lambda name: "a spec")
    monkeypatch.setattr(cuda, "available", lambda: there)
    same, other = ("gpu", "cpu") if there else ("cpu", "gpu")
    assert place("trainer.accelerator=auto") == place(f"trainer.accelerator={same}")
    assert place("trainer.accelerator=auto") != place(f"trainer.accelerator={other}")
    assert place("teacher.trainer.accelerator=auto") == place(f"teacher.trainer.accelerator={same}")
    monkeypatch.setattr("pkd_lightning.trainer.find_spec", lambda name: None)
    assert place("trainer.accelerator=auto") == place("trainer.accelerator=cpu")


def test_on_the_cpu_cuda_graphs_are_no_option() -> None:
    asked = "trainer.cuda_graphs=true"
    assert place(asked, "trainer.accelerator=cpu") == place("trainer.accelerator=cpu")
    assert place(asked, "trainer.accelerator=gpu") != place("trainer.accelerator=gpu")


def test_what_is_finished_is_found_however_it_is_written(tmp_path: Path) -> None:
    tiny_run(tmp_path, "boosting.rounds=1", "boosting.temperature=2")
    (done,) = tmp_path.rglob("DONE")
    found = find_finished(tiny_config(tmp_path, "boosting.rounds=1", "boosting.temperature=2.0"))
    assert found is not None
    assert found.path == done.parent
    for other in ("seed=5", "seed=-1", "+max_epochs=3", "teacher.checkpoint=missing", "~teacher.trainer"):
        assert find_finished(tiny_config(tmp_path, "boosting.rounds=1", other)) is None


def test_home_is_understood_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    roots: list[object] = []
    monkeypatch.setattr("tests.support.seen", roots.append, raising=False)
    source = "data.source._target_=tests.test_identity.noted"
    tiny_run(Path("~/runs"), "boosting.rounds=1", "data.root='~/data'", source)
    (teacher,) = (tmp_path / "runs").rglob("teacher.safetensors")
    shutil.copyfile(teacher, tmp_path / "mine.safetensors")
    tiny_run(Path("~/runs"), "boosting.rounds=1", "teacher.checkpoint='~/mine.safetensors'")  # as in a YAML
    assert len(list((tmp_path / "runs").rglob("DONE"))) == 2
    assert not (tmp_path / "~").exists()
    assert set(roots) == {str(tmp_path / "data")}
    with initialize_config_dir(CONF, version_base="1.3"):
        hydra = compose("config", ["run_root='~/runs'"], return_hydra_config=True).hydra
    assert Path(hydra.sweep.dir).parent == tmp_path / "runs" / ".sweeps"


def noted(root: object = None) -> object:
    from tests import support

    support.seen(root)  # type: ignore[attr-defined]
    return support.patterns()
