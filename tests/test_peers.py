"""Peers: what they learn from each other, one fit of all, and the same ensemble and results as of any students."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.assembling import assemble
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.peers import Mutual, One, PeerLoss, PeersModule, peer_loss_of, peer_rungs
from pkd_lightning.boosting.student import RoundTargets
from pkd_lightning.data.module import Batch
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.losses import mutual_losses
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.teacher import CachedTeacher
from tests.support import ACCEPT, TINY, stopped_by, tiny_config, tiny_run
from tests.test_fit_resume import DROPOUT, assert_same, killed_at, run_until_done
from tests.test_processes import ONE, TWO, command
from tests.test_wiring import trainer_config

KINDS = ("mutual", "one")
NONE = "teacher=none"
LABELS = torch.tensor([0, 1, 2, 0])


def logits_of(peers: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(peers, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of rows of probabilities, mean over the rows."""
    return float((p * (p / q).log()).sum(-1).mean().detach())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mutual_is_the_mean_divergence_from_each_other_peer(temperature: float) -> None:
    logits = logits_of()
    p = (logits / temperature).softmax(-1)
    first = temperature**2 * (divergence(p[1], p[0]) + divergence(p[2], p[0])) / 2
    last = temperature**2 * (divergence(p[0], p[2]) + divergence(p[1], p[2])) / 2
    found = mutual_losses(logits, temperature)
    assert found[[0, 2]].tolist() == pytest.approx([first, last])
    assert mutual_losses(logits[:1].expand(3, 4, 3), temperature).tolist() == pytest.approx([0.0] * 3, abs=1e-12)


def test_no_gradient_of_a_peers_mutual_loss_reaches_the_others() -> None:
    logits = logits_of().requires_grad_()
    (gradient,) = torch.autograd.grad(mutual_losses(logits, 1.0)[1], logits)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2]].abs().max() == 0
    p = logits.softmax(-1)
    expected = (p[1] - (p[0] + p[2]) / 2) / 4  # of the mean over 4 rows
    assert torch.allclose(gradient[1], expected)


def test_one_learns_the_labels_by_its_ensemble_and_teaches_each_peer() -> None:
    logits, loss = logits_of(), One(3, 3, 2.0).double()
    torch.manual_seed(0)
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    weights = (torch.cat(list(logits), dim=1) @ loss.gate.weight.T + loss.gate.bias).softmax(-1)
    ensemble = sum(weights[:, k, None] * logits[k] for k in range(3))
    q, p = (ensemble / 2).softmax(-1), (logits / 2).softmax(-1)
    found, shared = loss(logits, LABELS)
    assert found.tolist() == pytest.approx([4 * divergence(q, own) for own in p])
    assert float(shared) == pytest.approx(float(F.cross_entropy(ensemble, LABELS)))


def test_what_the_peers_learn_from_the_ensemble_sends_no_gradient_to_it() -> None:
    logits, loss = logits_of().requires_grad_(), One(3, 3, 2.0).double()
    nn.init.normal_(loss.gate.weight)
    found, shared = loss(logits, LABELS)
    alone = torch.autograd.grad(found[0], [logits, *loss.parameters()], allow_unused=True, retain_graph=True)
    assert alone[0][0].abs().max() > 0
    assert alone[0][1:].abs().max() == 0
    assert alone[1:] == (None, None)
    of_labels = torch.autograd.grad(shared, [logits, *loss.parameters()], retain_graph=True)
    assert all(part.abs().max() > 0 for part in of_labels)
    weights = loss.gate(logits.detach().transpose(0, 1).flatten(1)).softmax(-1)
    ensemble = loss.ensemble(logits).detach()
    towards = (ensemble.softmax(-1) - F.one_hot(LABELS, 3)) / 4
    assert torch.allclose(of_labels[0], weights.T[..., None] * towards)  # the gate reads the logits as constants


def test_the_gate_starts_as_the_mean() -> None:
    assert torch.allclose(One(3, 3, 1.0).double().ensemble(logits_of()), logits_of().mean(0))


class Constant(nn.Module):
    """Logits that are its parameters."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits


def module_of(kind: type[PeerLoss], **options: Any) -> tuple[PeersModule, Batch, Tensor]:
    """Peers of constant logits with their batch and the teacher's logits."""
    config = BoostingConfig(**{"peers": "mutual", "temperature": 2.0, "alpha": 1.0, **options})
    teacher = logits_of(1, seed=1)[0]
    targets = RoundTargets(CachedTeacher(teacher), torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bool), 1.0, 0)
    students = [Constant(logits) for logits in logits_of()]
    module = PeersModule(students, trainer_config(), config, kind(3, 3, 2.0).double(), targets)
    return module, Batch(torch.arange(4), torch.zeros(4, 1), LABELS), teacher


@pytest.mark.parametrize("kind", [Mutual, One])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_loss_shown_is_the_mean_and_the_gradient_that_of_the_sum(kind: type[PeerLoss], alpha: float) -> None:
    module, batch, teacher = module_of(kind, alpha=alpha)
    logits = torch.stack([student.logits for student in module.students])
    soft = torch.stack(
        [4 * F.kl_div((own / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean") for own in logits]
    )
    hard = torch.stack([F.cross_entropy(own, LABELS) for own in logits])
    from_others, shared = module.peer_loss(logits, LABELS)
    each = alpha * hard + (1 - alpha) * soft + from_others
    loss, mean = module.losses(batch)
    assert float(loss) == pytest.approx(float(each.mean()))
    assert torch.equal(mean, logits.mean(0))
    parameters = [*module.model.parameters(), *module.peer_loss.parameters()]
    for found, expected in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(each.sum() + shared, parameters), strict=True
    ):
        assert torch.allclose(found, expected)


def test_with_labels_alone_a_teacher_is_not_asked() -> None:
    module, batch, _ = module_of(Mutual)
    module._targets[0].teacher = None  # type: ignore[assignment]
    assert module.losses(batch)[0].isfinite()


def test_all_peers_and_the_gate_are_optimised() -> None:
    module, _, _ = module_of(One)
    (group,) = module.parameter_groups()
    assert len(group["params"]) == 3 + 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rungs", "rounds", "expected"),
    [(3, 3, [0, 1, 2]), (3, 2, [0, 1]), (1, 3, [0, 0, 0]), (2, 4, [0, 0, 1, 1]), (2, 3, [0, 0, 1])],
)
def test_peers_are_one_of_each_rung(rungs: int, rounds: int, expected: list[int]) -> None:
    ladder = Ladder("tests.outside.averaging.Averaging", [{}] * rungs, repeat=True)
    assert peer_rungs(ladder, rounds) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("combine", ["mean", "learned"])
def test_a_run_of_peers_gives_what_any_run_gives(kind: str, combine: str, tmp_path: Path) -> None:
    flags = (NONE, f"boosting.peers={kind}", f"boosting.combine={combine}", "trainer.max_epochs=3")
    results = tiny_run(tmp_path, *flags)
    (run,) = tmp_path.glob("digits/*")
    rows = results["rounds"]
    assert results["objective"] == kind
    assert results["teacher"] is None
    assert [row["class_index"] for row in rows] == [0, 1, 2]
    assert [row["config"]["d_model"] for row in rows] == [3, 4, 3]
    assert {row["accepted_by"] for row in rows} == {"peers"}
    assert {row["trained"] for row in rows} == {"together"}
    assert {row["epochs"] for row in rows} == {3}
    assert rows[0]["seconds"] > 0
    assert [row["seconds"] for row in rows[1:]] == [0.0, 0.0]
    assert results["wall_seconds"]["rounds"] == [row["seconds"] for row in rows]
    assert results["stop_reason"] == "reached boosting.rounds=3"
    scales = [tuple(row["scales"]) for row in rows]
    assert scales[0] == (0.0, 1.0)
    if combine == "mean":
        assert scales[1:] == [pytest.approx((1 / 2, 1 / 2)), pytest.approx((2 / 3, 1 / 3))]
    else:
        assert scales[1] != pytest.approx((1 / 2, 1 / 2), abs=1e-6)
    assert [len(list(run.glob(f"students/0{t}.safetensors"))) for t in range(3)] == [1, 1, 1]
    ensemble = ProgressiveEnsemble.load(run)
    assert not [name for name in ensemble.state_dict() if "gate" in name]
    assert {json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()} == {"peers"}
    assert not list(run.rglob("fits/*"))


def test_the_boosting_files_are_the_published_settings(tmp_path: Path) -> None:
    mutual, one = (assemble(tiny_config(tmp_path, NONE, f"boosting={kind}")).boosting for kind in KINDS)
    assert (mutual.peers, mutual.temperature, mutual.alpha) == ("mutual", 1.0, 1.0)
    assert (one.peers, one.temperature, one.alpha) == ("one", 3.0, 1.0)


def test_peers_are_not_independent_of_each_other(tmp_path: Path) -> None:
    """Each kind moves the weights of the students to a place of its own."""
    found = {
        kind: tiny_run(tmp_path / kind, NONE, *flags)["rounds"][0]["validation_loss"]
        for kind, flags in {
            "mutual": ("boosting.peers=mutual",), "one": ("boosting.peers=one",),
            "alone": ("boosting.alpha=1", ACCEPT),
        }.items()
    }  # fmt: skip
    assert len(set(found.values())) == 3


def test_with_a_teacher_they_learn_from_it_too_and_have_edges(tmp_path: Path) -> None:
    taught = tiny_run(tmp_path / "taught", "boosting.peers=mutual", "boosting.alpha=0.5")
    labels = tiny_run(tmp_path / "labels", "boosting.peers=mutual", "boosting.alpha=1")
    none = tiny_run(tmp_path / "none", "boosting.peers=mutual", NONE)
    assert taught["teacher"]["accuracy"] > 0
    assert taught["rounds"][2]["edges"]["classes"] == 3
    assert taught["rounds"][0]["accuracy"] is not None
    same = ("accuracy", "scales", "validation_loss", "prefix_nll")
    for mine, its in zip(labels["rounds"], none["rounds"], strict=True):
        assert {name: mine[name] for name in same} == {name: its[name] for name in same}
    assert taught["rounds"][0]["nll"] != labels["rounds"][0]["nll"]


@pytest.mark.parametrize(
    ("every", "options"),
    [
        (3, ("boosting.peers=mutual", "trainer.max_epochs=3", DROPOUT)),
        (3, ("boosting.peers=one", "trainer.max_epochs=3")),
        (3, ("boosting.peers=one", "trainer.max_epochs=3", "trainer.mode=step", DROPOUT)),
    ],
)
def test_killed_after_any_step_it_gives_the_same_bits(
    every: int, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (NONE, *options)
    tiny_run(tmp_path / "whole", *flags)
    with killed_at(every, monkeypatch) as kills:
        run_until_done(tmp_path / "parts", *flags)
    assert len(kills) > 5
    assert {kill.split()[0] for kill in kills} == {"peers"}
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_both_modes_give_the_same_weights(tmp_path: Path) -> None:
    flags = (NONE, "boosting.peers=one", "trainer.max_epochs=2")
    for mode in ("fast", "step"):
        tiny_run(tmp_path / mode, *flags, f"trainer.mode={mode}")
    from tests.test_fit_resume import students

    for mine, its in zip(students(tmp_path / "fast"), students(tmp_path / "step"), strict=True):
        assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_killed_between_students_it_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (NONE, "boosting.peers=mutual")
    tiny_run(tmp_path / "whole", *flags)
    accept = BoostingLoop.accept

    def killed(self: BoostingLoop, *given: Any) -> None:
        if self.state.round == 1:
            raise RunError("killed")
        accept(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(BoostingLoop, "accept", killed)
        with pytest.raises(RunError, match="killed"):
            tiny_run(tmp_path / "parts", *flags)
    tiny_run(tmp_path / "parts", *flags)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_kill_9_and_a_sigterm_lose_nothing(tmp_path: Path) -> None:
    flags = [*TINY, NONE, "boosting.peers=one", "trainer.max_epochs=3000", "trainer.patience=null"]
    each = "trainer.checkpoint_every='1 epochs'"
    code, _, _ = stopped_by(signal.SIGKILL, tmp_path, [*flags, each], lambda lines: len(lines) > 3)
    assert code == -signal.SIGKILL
    (path,) = tmp_path.rglob("metrics.jsonl")
    before = len(path.read_text().splitlines())
    code, out, said = stopped_by(signal.SIGTERM, tmp_path, flags, lambda lines: len(lines) > before + 2)
    assert code == 143
    assert "peers: goes on in epoch" in out
    assert "peers: stopped by SIGTERM; saved in epoch" in out
    assert "the same command goes on" in said


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(NONE, "boosting.peers=one"), ("boosting.peers=mutual",)])
def test_two_processes_give_the_ensemble_of_one(flags: tuple[str, ...], tmp_path: Path) -> None:
    one = tiny_run(tmp_path / "one", *ONE, *flags)
    done = command(tmp_path / "two", *TWO, *flags)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "two").rglob("results.json")
    for mine, its in zip(json.loads(path.read_text())["rounds"], one["rounds"], strict=True):
        assert mine["nll"] == pytest.approx(its["nll"], rel=1e-4)
        assert mine["scales"] == pytest.approx(its["scales"], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["boosting.peers=mutal"], "boosting.peers: 'mutal': must be one of mutual, one, or an import path. Did you"),
        (["boosting.peers=3"], "boosting.peers=3: must be null, mutual, one, or an import path"),
        (["boosting.peers=torch.nn.Linear"], "boosting.peers: 'torch.nn.Linear' gives a type, not of type PeerLoss"),
        (["boosting.peers=one", "boosting.rounds=1"], "boosting.rounds=1: peers are at least 2 students"),
        (["boosting.peers=one", "boosting.objective=additive"], "boosting.objective='additive': peers have a loss of"),
        (["boosting.peers=one", "objective=additive"], "boosting.objective='Additive': peers have a loss of"),
        (["boosting.peers=one", "boosting.max_time=3"], "boosting.max_time=3: must be null with peers"),
        (["boosting.peers=one", "boosting.weak_learner.require=condition"],
         "boosting.weak_learner.require='condition': peers are not judged"),
        (["boosting.peers=one", "boosting.weights=samples"], "boosting.weights='samples': must be none with peers"),
        (["boosting.peers=one", "boosting.rounds=4"], "student.rungs: 4 rounds (boosting.rounds) on a ladder of 3"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(flags: list[str], fault: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        assemble(tiny_config(tmp_path, NONE, "boosting.alpha=1", *flags))
    assert len(error.value.faults) == 1
    assert error.value.faults[0].startswith(fault)


def test_students_that_read_earlier_ones_are_no_peers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"boosting\.peers='one': the students of student\.rungs\.\d read earlier"):
        tiny_run(tmp_path, NONE, "student=reading", "boosting.peers=one")


class Failing(PeerLoss):
    """Gives one loss where there are as many as peers."""

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sum(), logits.sum()


class Towards(PeerLoss):
    """A user's own: the square of each peer's logits."""

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return logits.square().mean((1, 2)), logits.new_zeros(())


def test_a_users_own_is_tried_before_anything_is_trained(tmp_path: Path) -> None:
    results = tiny_run(tmp_path, NONE, f"boosting.peers={__name__}.Towards")
    assert results["objective"] == "towards"
    with pytest.raises(ConfigError, match=r"boosting\.peers: gives no loss of each peer"):
        tiny_run(tmp_path, NONE, f"boosting.peers={__name__}.Failing")


def test_names_and_import_paths_of_peers_are_the_same_run(tmp_path: Path) -> None:
    paths = {
        RunDirectory(tiny_config(tmp_path, f"boosting.peers={prefix}{name}")).path
        for prefix, name in (("", "one"), ("pkd_lightning.boosting.peers.", "One"))
    }
    assert len(paths) == 1
    assert peer_loss_of(BoostingConfig(peers="one")) is One
    assert RunDirectory(tiny_config(tmp_path)).path not in paths


def test_peers_that_diverge_end_the_run_with_one_error(tmp_path: Path) -> None:
    flags = ("trainer.optimizer.lr=1e30", "trainer.gradient_clip=null")
    with pytest.raises(RunError, match="peers: the loss was not finite in any epoch; lower trainer"):
        tiny_run(tmp_path, NONE, "boosting.peers=mutual", *flags)


def test_a_boosting_run_goes_on_from_peers(tmp_path: Path) -> None:
    tiny_run(tmp_path, NONE, "boosting.peers=mutual", "boosting.rounds=2")
    source = RunDirectory(tiny_config(tmp_path, NONE, "boosting.peers=mutual", "boosting.rounds=2")).path
    grown = tiny_run(tmp_path, NONE, "boosting.alpha=1", f"boosting.grow_from={source}", ACCEPT)
    assert [row["accepted_by"] for row in grown["rounds"]][:2] == ["peers", "peers"]
    assert [row.get("trained") for row in grown["rounds"]] == ["together", "together", None]
    more = tiny_run(tmp_path, NONE, "boosting.peers=mutual")  # of all three at once: it takes nothing over
    assert "from" not in more["rounds"][0]


@pytest.mark.report
def test_the_report_says_that_they_were_trained_together(tmp_path: Path) -> None:
    results = tiny_run(tmp_path, NONE, "boosting.peers=one", "trainer.max_epochs=2")
    (run,) = tmp_path.glob("digits/*")
    page = (run / "report.html").read_text()
    assert "The students were trained together and learned from each other, in one fit: 2 epochs" in page
    assert "trained together, not judged" in page
    assert "time, all students together" in page
    assert "metrics.jsonl has no losses" not in page
    from rich.console import Console

    from pkd_lightning.reporting.table import print_table, student_rows

    assert [row["seconds"] == "–" for row in student_rows(results)] == [False, True, True]  # noqa: RUF001
    console = Console(width=160, record=True)
    print_table(results, console)
    assert "All students were trained together" in console.export_text()
