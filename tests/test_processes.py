"""Several processes that train one run: what each owns, what they agree on, and that the ensemble is that of one."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from safetensors.torch import load_file

from pkd_lightning import ranks
from pkd_lightning.boosting.parts import PARTS, own_matrices, remove_parts, write_parts
from pkd_lightning.boosting.state import BoostingState
from pkd_lightning.data.module import DataConfig, DataModule, EpochSampler, PartOfBatch
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.processes import Place, together
from tests.support import TINY, patterns, stopped_by, tiny_config, tiny_run

ROOT = Path(__file__).parent.parent
TWO = ("trainer.devices=2", "trainer.accelerator=cpu", "boosting.rounds=2", "trainer.max_epochs=3")
ONE = (*TWO[1:], "trainer.mode=step")
TOLERANCE = 1e-5  # of weights after some tens of steps: sums in another order


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Play the rank of a number of processes, without any: what is gathered is what this one gives."""

    def play(rank: int, size: int) -> None:
        monkeypatch.setattr(ranks._Group, "rank", rank)
        monkeypatch.setattr(ranks._Group, "size", size)
        monkeypatch.setattr(ranks, "gathered", lambda value: [value] * size)

    return play


@pytest.mark.parametrize(("rows", "size"), [(10, 1), (10, 3), (7, 7), (1_000_003, 64)])
def test_every_row_has_one_owner_and_all_own_as_many(rows: int, size: int, of: Any) -> None:
    owned = []
    for rank in range(size):
        of(rank, size)
        owned.append(ranks.own(rows))
    assert [owned[0].start, *(part.stop for part in owned)] == [part.start for part in owned] + [rows]
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_the_parts_of_a_batch_are_the_batch_and_weigh_as_much_as_their_samples(of: Any) -> None:
    whole = [key.rows for key in EpochSampler(range(50), 8, seed=3, stage="s", shuffle=True)]
    parts = []
    for rank in range(3):
        of(rank, 3)
        sampler = EpochSampler(range(50), 8, seed=3, stage="s", shuffle=True, own=ranks.own(50))
        parts.append([(key.rows + ranks.own(50).start, key.share) for key in sampler])
    for number, rows in enumerate(whole):
        found = [part[number] for part in parts]
        samples = torch.cat([own for own, share in found if share > 0])
        assert sorted(samples.tolist()) == sorted(rows.tolist())
        assert [share * len(rows) / 3 for _, share in found] == [len(own) if share else 0 for own, share in found]
    assert sum(share for part in parts for _, share in part) == pytest.approx(3 * len(whole))


def test_a_rank_that_owns_no_sample_of_a_batch_has_one_that_does_not_count(of: Any) -> None:
    of(1, 2)
    sampler = EpochSampler(range(4), 1, shuffle=True, own=ranks.own(4))  # batches of one: half of them are another's
    shares = [key.share for key in sampler]
    assert sorted(shares) == [0, 0, 2, 2]
    assert all(len(key.rows) for key in sampler)


def test_a_part_of_a_batch_keeps_its_share_wherever_it_goes() -> None:
    part = PartOfBatch(torch.tensor([1, 2]), torch.zeros(2, 3), torch.tensor([0, 1]), 0.5)
    moved = move_data_to_device(part, torch.device("cpu"))
    for copy in (part, part.to("cpu"), moved, pickle.loads(pickle.dumps(part))):
        assert (copy.share, copy.samples, copy.index.tolist()) == (0.5, 2, [1, 2])
    assert PartOfBatch(*part, 0.0).samples == 0
    index, _, labels = part
    assert (len(index), len(labels)) == (2, 2)


def test_a_rank_keeps_its_rows_and_the_first_the_test_rows(of: Any) -> None:
    whole = DataModule(DataConfig(patterns))
    found = []
    for rank in range(2):
        of(rank, 2)
        found.append(DataModule(DataConfig(patterns)))
    first, second = found
    assert first.whole == second.whole == whole.sizes
    assert first.fingerprint == second.fingerprint == whole.fingerprint
    for rows in ("training", "validation"):
        joined = torch.cat([data.inputs[list(getattr(data, rows))] for data in found])
        assert joined.equal(whole.inputs[list(getattr(whole, rows))])
    assert first.inputs[list(first.test)].equal(whole.inputs[list(whole.test)])
    assert len(second.test) == 0
    assert first.task.prepare(first.inputs[:1]).equal(whole.task.prepare(whole.inputs[:1]))


def test_too_few_rows_for_the_processes_are_a_fault(of: Any) -> None:
    of(0, 64)
    with pytest.raises(ConfigError, match=r"\(101, 11\) training and validation samples are too few"):
        DataModule(DataConfig(patterns))


def state_of(n: int, m: int, values: torch.Tensor) -> BoostingState:
    """A state of so many rows whose three matrices have these values."""
    state = BoostingState.fresh(n, m, 4, "teacher", None)
    state.residuals.load(values[:n])
    state.validation_residuals.load(values[n:])
    state.ensemble.replace(values + 1)
    return state


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_matrices_are_read_by_another_number_of_ranks(writers: int, readers: int, of: Any, tmp_path: Path) -> None:
    n, m = 13, 7
    values = torch.arange(4.0 * (n + m)).view(-1, 4)
    checkpoint: dict[str, Any] = {}
    if writers == 1:
        checkpoint = {**state_of(n, m, values).state_dict()}
    for rank in range(writers if writers > 1 else 0):
        of(rank, writers)
        own, of_validation = ranks.own(n), ranks.own(m)
        rows = [*own, *(n + row for row in of_validation)]
        (part, *_) = write_parts(state_of(len(own), len(of_validation), values[rows]), (n, m), tmp_path)
        checkpoint.setdefault(PARTS, []).append(part)
    read = []
    for rank in range(readers):
        of(rank, readers)
        read.append((own_matrices(checkpoint, (n, m), 4, tmp_path), len(ranks.own(n))))
    assert torch.cat([found["S"] for found, _ in read]).equal(values[:n])
    assert torch.cat([found["validation_S"] for found, _ in read]).equal(values[n:])
    ensembles = [found["ensemble_logits"] for found, _ in read]
    assert torch.cat([e[:k] for e, (_, k) in zip(ensembles, read, strict=True)]).equal(values[:n] + 1)
    assert torch.cat([e[k:] for e, (_, k) in zip(ensembles, read, strict=True)]).equal(values[n:] + 1)


def test_a_part_that_is_damaged_or_gone_is_noticed(of: Any, tmp_path: Path) -> None:
    of(0, 2)
    parts = write_parts(state_of(5, 3, torch.ones(8, 4)), (5, 3), tmp_path)
    path = tmp_path / PARTS / parts[0]["file"]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match=r"0of2.safetensors: is damaged"):
        own_matrices({PARTS: parts}, (5, 3), 4, tmp_path)
    path.unlink()
    with pytest.raises(RunError, match=r"0of2.safetensors: is missing"):
        own_matrices({PARTS: parts}, (5, 3), 4, tmp_path)


def test_parts_of_earlier_checkpoints_are_removed(of: Any, tmp_path: Path) -> None:
    of(0, 2)
    state = state_of(5, 3, torch.ones(8, 4))
    write_parts(state, (5, 3), tmp_path)
    state.round = 1
    parts = write_parts(state, (5, 3), tmp_path)
    remove_parts(tmp_path, parts)
    assert [path.name for path in (tmp_path / PARTS).iterdir()] == ["round-01-0of2.safetensors"]
    remove_parts(tmp_path, [])
    assert not (tmp_path / PARTS).exists()


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODELIST": "node[3-4]", "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "distil",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        (TORCHRUN, Place(3, 4, 1, "node0", 29500)),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, None),
        (SRUN, Place(2, 4, 0, "node3", 17345)),
        ({**SRUN, "SLURM_NTASKS": "1"}, None),
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}, None),  # in sbatch, without srun
    ],
)
def test_the_place_among_processes_is_what_the_launcher_says(
    variables: dict[str, str], place: Place | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Place.of(os.environ) == place


def test_another_number_of_processes_than_asked_for_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="ask for 2 processes, and the launcher has started 4"):
        tiny_run(tmp_path, *TWO)


def test_several_machines_need_a_launcher(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.num_nodes=2: start the command by srun or torchrun on each node"):
        tiny_run(tmp_path, "trainer.num_nodes=2")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["trainer.devices=0"], "trainer.devices=0: must be a whole number"),
        (["trainer.devices=2", "trainer.mode=fast"], "mode='fast': must be auto or step where several processes"),
        (["trainer.strategy=fsdp"], "trainer.strategy='fsdp': must be one of"),
        (["trainer.devices=2", "teacher.trainer.devices=1"], "teacher.trainer.devices=1: is that of the run"),
        (["+trainer.lightning.devices=2"], "trainer.lightning.devices: is set by `trainer.devices`"),
    ],
)
def test_options_of_processes_are_checked(flags: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_run(tmp_path, *flags)


def test_the_number_of_processes_does_not_change_the_run_directory(tmp_path: Path) -> None:
    from pkd_lightning.rundir import RunDirectory

    one, two = (RunDirectory(tiny_config(tmp_path, *flags)) for flags in ((), TWO[:1]))
    assert one.path == two.path
    assert one.teachers == two.teachers


def test_of_one_process_nothing_is_started_or_joined(tmp_path: Path) -> None:
    from pkd_lightning.assembling import assemble

    config = tiny_config(tmp_path)
    with together(config, assemble(config).trainer) as leave:
        assert (ranks.rank(), ranks.size(), ranks.first()) == (0, 1, True)
        assert leave()


def arguments(root: Path, *flags: str) -> list[str]:
    """Of the command line, for a tiny run."""
    return [*TINY, f"run_root={root}", *flags]


def command(root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A tiny run by the command line."""
    return subprocess.run(
        [sys.executable, "-m", "pkd_lightning.run", *arguments(root, *flags)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def students(root: Path) -> list[dict[str, torch.Tensor]]:
    """Weights of the teacher and the students of the only run in a folder."""
    (run,) = root.glob("*/*/DONE")
    return [
        load_file(path)
        for path in sorted([*run.parent.glob("teacher/t*.safetensors"), *run.parent.glob("students/*.safetensors")])
    ]


def assert_alike(one: Path, other: Path) -> None:
    """The runs in two folders have the same ensemble, within the tolerance."""
    mine, its = students(one), students(other)
    assert len(mine) == len(its) > 1
    for a, b in zip(mine, its, strict=True):
        assert all(torch.allclose(a[name], b[name], atol=TOLERANCE) for name in a)
    figures = [json.loads(next(root.glob("*/*/results.json")).read_text())["rounds"] for root in (one, other)]
    for a, b in zip(*figures, strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-4)
        assert a["edges"]["per_class"] == pytest.approx(b["edges"]["per_class"], abs=1e-4)
        assert a["bound"] == pytest.approx(b["bound"], rel=1e-4)
        assert a["scales"] == pytest.approx(b["scales"], rel=1e-3)
        assert a["accuracy"] == b["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["trainer.callbacks=[{_target_: lightning.pytorch.callbacks.LearningRateMonitor}]", "logger=tensorboard"],
        ["boosting=paper", "boosting.weak_learner.on_failure=accept", "boosting.bound_quantile=0.9"],
        ["boosting.weights=samples", "boosting.objective=additive", "boosting.combine=sum"],
        ["teacher.online=true", "+trainer.lightning.accumulate_grad_batches=2"],
        ["student.common.reuse=gate"],
        ["boosting.combine=held_out"],
        ["data.validation_fraction=0.02", "trainer.batch_size=3"],  # ranks without samples of a batch
    ],
)
def test_two_processes_give_the_ensemble_of_one(flags: list[str], tmp_path: Path) -> None:
    tiny_run(tmp_path / "one", *ONE, *flags)
    done = command(tmp_path / "two", *TWO, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes work on the run together") == 1
    assert done.stdout.count("training the teacher on") == 1
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("after", ["trainer.devices=1", "trainer.devices=2", "trainer.devices=3"])
def test_a_run_of_two_processes_goes_on_with_any_number(after: str, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    flags = (*TWO, "trainer.checkpoint_every='1 epochs'")
    tiny_run(tmp_path / "one", *ONE, "trainer.checkpoint_every='1 epochs'")
    code, _, said = stopped_by(
        signal.SIGTERM, tmp_path / "two", arguments(tmp_path / "two", *flags),
        lambda lines: any('"round-01"' in line for line in lines),
    )  # fmt: skip
    assert code == 143, said
    done = command(tmp_path / "two", *flags[1:], after, "trainer.mode=auto")
    assert done.returncode == 0, done.stderr
    assert "resumed after 1 of 2 rounds" in done.stdout
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    flags = (*TWO[1:], "trainer.checkpoint_every='1 epochs'")
    tiny_run(tmp_path / "one", *ONE)
    code, _, said = stopped_by(
        signal.SIGTERM, tmp_path / "two", arguments(tmp_path / "two", *flags),
        lambda lines: any('"round-01"' in line for line in lines),
    )  # fmt: skip
    assert code == 143, said
    done = command(tmp_path / "two", *flags, "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_which_goes_on(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    flags = arguments(tmp_path / "two", *TWO, "trainer.checkpoint_every='1 epochs'", "trainer.max_epochs=200")
    run = subprocess.Popen(
        [sys.executable, "-m", "pkd_lightning.run", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        while run.poll() is None and not list((tmp_path / "two").rglob("metrics.jsonl")):
            time.sleep(0.1)
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(run.pid)], capture_output=True, text=True, check=True
        )
        (child,) = (int(line.split()[0]) for line in listed.stdout.splitlines() if "pkd_lightning.child" in line)
        os.kill(child, signal.SIGKILL)
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 1
    assert f"process {child}, rank 1 of the run, was ended by SIGKILL; the same command goes on" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_torchrun_starts_the_processes(tmp_path: Path) -> None:
    tiny_run(tmp_path / "one", *ONE)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pkd_lightning.run",
         *arguments(tmp_path / "two", *TWO)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    assert_alike(tmp_path / "one", tmp_path / "two")
