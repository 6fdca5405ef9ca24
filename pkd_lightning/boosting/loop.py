"""The boosting loop: a weak learner a round, the residual matrices, the growing ensemble, resumable between rounds."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkd_lightning import ranks
from pkd_lightning.boosting.combine import combination_of
from pkd_lightning.boosting.objectives import objective_of
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.partial import params_together, partial_results
from pkd_lightning.boosting.parts import PARTS, own_matrices, remove_parts, write_parts
from pkd_lightning.boosting.residuals import theoretical_eta
from pkd_lightning.boosting.round import Round
from pkd_lightning.boosting.source import Source
from pkd_lightning.boosting.state import BoostingState
from pkd_lightning.boosting.weak_learner import Candidate, describe, find_weak_learner
from pkd_lightning.checkpoint import HASH, atomic_write, check_hash, content_hash, write_json
from pkd_lightning.data.module import DataModule
from pkd_lightning.earlier import following, reads
from pkd_lightning.ensemble import ProgressiveEnsemble, load_students, save_description, save_student
from pkd_lightning.errors import RunError
from pkd_lightning.fit_checkpoint import remove_all
from pkd_lightning.fitting import FitResult, Stage, fit, predict
from pkd_lightning.loggers import Tracker
from pkd_lightning.matrix import Difference, largest, scratch
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.results import PROGRESS, Observer
from pkd_lightning.seeding import seeded
from pkd_lightning.teacher import Teacher
from pkd_lightning.trainer import TrainerConfig

logger = logging.getLogger(__name__)


class BoostingLoop:
    """Distils a teacher into an ensemble of students (Mamba-PKD, arXiv 2503.01727).

    The vocabulary is that of Lightning's loops. Each candidate is one LightningModule fitted by one fresh Trainer.

    Args:
        config: see `BoostingConfig`.
        ladder: the rungs that students are built from.
        trainer: how each candidate is fitted.
        data: the data module.
        teacher: the teacher; its logits are read, and on resume its fingerprint. None: students learn from labels.
        directory: the run directory; `boosting.ckpt` and `students/` are kept there, and a loop restored from them.
        seed: the run's seed.
        tracker: where the fits' curves go.
        source: a run whose first rounds are taken over, where this one has none yet.
        observer: is given what progress.json holds, before the first round and after each. What it raises ends the run
            between two rounds.
    """

    def __init__(
        self,
        config: BoostingConfig,
        ladder: Ladder,
        trainer: TrainerConfig,
        data: DataModule,
        teacher: Teacher | None,
        directory: Path,
        seed: int,
        tracker: Tracker,
        source: Source | None = None,
        observer: Observer | None = None,
    ) -> None:
        if teacher is None:
            config = replace(config, alpha=1.0)
        self.config, self.ladder, self.trainer, self.data = config, ladder, trainer, data
        self.teacher, self.directory = teacher, directory
        self.seed, self.tracker, self.source, self.observer = seed, tracker, source, observer
        self.objective, self.combination = objective_of(config), combination_of(config)
        self.earlier = 0.0  # seconds that the fits of the round under way have taken in processes that were stopped
        self.state = BoostingState.fresh(
            len(data.training), len(data.validation), data.num_classes,
            f"none, {data.fingerprint}" if teacher is None else teacher.fingerprint,
            directory if ranks.size() == 1 else None, teacher is not None,
        )  # fmt: skip

    def run(self, ended_early: str | None = None) -> ProgressiveEnsemble:
        """Add students until done; continues where a run before stopped.

        Args:
            ended_early: by what no more are added.

        Raises:
            RunError: where there is no student at all.
        """
        self.restore()
        if ended_early is not None and not self.done:
            self.state.stop_reason = f"ended early, by {ended_early}"
            self.save()
        if self.state.round == 0 and self.source is not None:
            self.grow(self.source)
        self.describe()
        while not self.done:
            self.advance()
        logger.info("%d students: %s", self.state.round, self.state.stop_reason)
        if self.state.round == 0:
            raise RunError(f"no student at all: {self.state.stop_reason}; the log says why each attempt failed")
        return self.ensemble()

    @property
    def done(self) -> bool:
        """Whether no further round follows; `state.stop_reason` says why."""
        return self.state.stop_reason is not None

    def advance(self) -> None:
        """One round: find a weak learner, a rung higher where there is none, and add it to the ensemble."""
        start, self.earlier = time.perf_counter(), 0.0
        candidate, attempts = self.find()
        if candidate is None:
            self.state.stop_reason = (
                f"no weak learner for round {self.state.round + 1} on the last of {len(self.ladder)} rungs"
            )
        else:
            self.accept(candidate, attempts, ranks.agreed(lambda: self.earlier + time.perf_counter() - start))
        self.keep()

    def keep(self) -> None:
        """Save the students there are, and remove what only going on with their fits would need."""
        self.save()
        if ranks.first():
            remove_all(self.directory / "fits")
        self.describe()

    def find(self) -> tuple[Candidate | None, int]:
        """The next student and the attempts it took over all rungs tried, or None past the last rung."""
        state, total = self.state, 0
        while state.rung < len(self.ladder):
            candidate, attempts = find_weak_learner(state.round, partial(self.train, total), self.config.weak_learner)
            total += attempts
            if candidate is not None:
                return candidate, total
            state.rung += 1
            if state.rung < len(self.ladder):
                logger.info(
                    "round %d: no weak learner on rung %d, trying rung %d of %d",
                    state.round + 1, state.rung, state.rung + 1, len(self.ladder),
                )  # fmt: skip
        return None, total

    def train(self, before: int, attempt: int) -> Candidate:
        """Train and judge one candidate of the current rung, after `before` attempts on lower ones."""
        state, data = self.state, self.data
        attempt += before
        name = f"round-{state.round:02d}"
        description = f"round {state.round + 1}/{self.config.rounds}, rung {state.rung + 1}"
        if attempt:
            description += f", attempt {attempt + 1}"
        stage = Stage(
            name, self.seed, self.directory / "metrics.jsonl", attempt, description,
            self.directory / "fits" / f"{name}-{attempt}.ckpt",
            f"{state.rung} {state.teacher} {state.bound} {state.scales}",
        )  # fmt: skip
        logger.info("training a student: %s", description)
        with seeded(self.seed, stage.key, state.rung, "init"):
            model = self.ladder.build(state.rung, data.task.input_shape, data.num_classes, self.students)
        with seeded(self.seed, stage.key, state.rung, "knowledge"):
            training = self.round().attempt(model, self.trainer)
        with (
            seeded(self.seed, stage.key, state.rung, "fit", *ranks.purpose()),
            self.tracker.stage(name, attempt) as loggers,
        ):
            start = time.perf_counter()
            result = fit(training.module, data, stage, loggers, training.callbacks)
            self.earlier += max(0.0, result.seconds - (time.perf_counter() - start))
        return replace(training.judged(result, description), attempt=attempt)

    def round(self) -> Round:
        """The round that follows, or is under way."""
        return Round(
            self.config, self.objective, self.combination, self.data, self.teacher, self.state, self.directory,
            self.students,
        )  # fmt: skip

    def students(self) -> list[nn.Module]:
        """The students so far, loaded anew."""
        return load_students(self.directory / "students", self.state.round)

    def grow(self, source: Source) -> None:
        """Take over the first rounds of another run: its students are asked, and nothing is trained.

        Raises:
            RunError: where its students were distilled from another teacher, or on other data.
        """
        state, before, data = self.state, source.state(), self.data
        if before["teacher"] != state.teacher:
            raise RunError(
                f"boosting.grow_from={source.directory}: its students were distilled from another teacher, or on other"
                " data"
            )
        logger.info("the first %d rounds are those of %s", source.rounds, source.directory)
        students = source.students()
        for round_, (model, record) in enumerate(zip(students, before["records"], strict=False)):
            logits = scratch(data.validation.stop, data.num_classes, self.directory)
            asked = following(model, students[:round_])
            predict(asked, data, range(data.validation.stop), self.trainer.device, out=logits)
            n, now = len(data.training), self.round()
            edges, whole = (now.edges(logits[:n], clipped) for clipped in (True, False))
            a_c, loss = (float(record["scales"][0]), float(record["scales"][1])), record["validation_loss"]
            if self.config.grow_scales == "solved":
                initial = torch.tensor(self.combination.initial(round_) if round_ > 0 else a_c)  # float32, as learned
                a_c = now.scales(logits, (float(initial[0]), float(initial[1])))
            if not source.same:  # its scales, or its loss, may be others
                loss = now.validation_loss(logits, a_c)
            fit_ = FitResult(record["epochs"], 0, 0.0)
            candidate = Candidate(model, a_c, logits, edges, whole, loss, fit_, record["accepted_by"])
            if ranks.first():
                source.copy(round_, self.directory / "students")
            self.join(candidate, record["attempts"], record["seconds"], None if source.same else record)
            kept = {name: record[name] for name in ("class_index", "config", "attempt", "trained") if name in record}
            origin = {name: record[name] for name in ("from", "from_round") if name in record}
            origin = origin or {"from": str(source.directory), "from_round": round_}
            state.records[-1] = {**state.records[-1], **kept, **origin}
        state.rung = state.records[-1]["class_index"] + (not self.ladder.repeat) if source.climbs else 0
        state.stop_reason = None
        self.end()
        self.save()

    def accept(self, candidate: Candidate, attempts: int, seconds: float) -> None:
        """Add a student that was trained here."""
        state = self.state
        if ranks.first():
            save_student(
                candidate.model, self.directory / "students" / f"{state.round:02d}",
                self.ladder.path, self.ladder.rungs[state.rung], self.data.task.input_shape, self.data.num_classes,
            )  # fmt: skip
        self.join(candidate, attempts, seconds)
        logger.info("%s", self.line(state.records[-1]))
        if not self.ladder.repeat:
            state.rung += 1
        self.end()

    def join(
        self, candidate: Candidate, attempts: int, seconds: float, before: Mapping[str, Any] | None = None
    ) -> None:
        """Update the residual matrices, the ensemble's logits and the records by a student; `before` has eta and B."""
        state = self.state
        measures = {} if self.teacher is None else self.update(candidate, self.teacher, before)
        state.add_logits(candidate.logits, candidate.scales)
        state.scales.append(candidate.scales)
        state.records.append(self.record(candidate, attempts, seconds, **measures))
        state.round += 1

    def update(self, candidate: Candidate, teacher: Teacher, before: Mapping[str, Any] | None) -> dict[str, float]:
        """Update the residual matrices by a student: eta, and the largest abs(f - g)."""
        state, n = self.state, len(self.data.training)
        assert state.residuals is not None
        assert state.validation_residuals is not None
        residual, on_validation = (
            Difference(candidate.logits[rows], teacher.logits[rows]) for rows in (slice(n), slice(n, None))
        )
        largest_residual = largest(residual)
        if before is not None:
            state.bound = float(before["bound"])
            if self.source is not None and self.source.clipped:
                residual, on_validation = (replace(part, bound=state.bound) for part in (residual, on_validation))
        elif self.config.bound_quantile == 1:
            state.bound = max(state.bound, largest_residual)
        else:  # as in `edges`
            state.bound = self.round().bound_with(residual)
            residual, on_validation = (replace(part, bound=state.bound) for part in (residual, on_validation))
        eta = self.config.eta if before is None else float(before["eta"])
        if eta is None:
            eta = theoretical_eta(self.data.whole[0], self.config.rounds, max(state.bound, 1e-3))
        state.residuals.update(residual, eta)
        state.validation_residuals.update(on_validation, eta)
        return {"eta": eta, "largest_residual": largest_residual}

    def end(self) -> None:
        """Note where no further round follows, and why."""
        state, limit = self.state, self.config.max_time
        named = self.config.grow_from is not None  # or a shorter run of the same options, whose time counts
        seconds = sum(record["seconds"] for record in state.records if not (named and "from" in record))
        if state.round == self.config.rounds:
            state.stop_reason = f"reached boosting.rounds={self.config.rounds}"
        elif state.rung == len(self.ladder):
            state.stop_reason = f"all {len(self.ladder)} rungs of the ladder are used"
        elif limit is not None and seconds >= 60 * limit:
            state.stop_reason = f"ended early, after boosting.max_time={limit:g} minutes"

    def record(
        self,
        candidate: Candidate,
        attempts: int,
        seconds: float,
        eta: float | None = None,
        largest_residual: float | None = None,
    ) -> dict[str, Any]:
        """What a round reports, all of it from training and validation rows; what needs a teacher is None without."""
        state, rows = self.state, slice(self.data.validation.start, self.data.validation.stop)
        labels = self.data.labels[rows]

        def accuracy(logits: torch.Tensor) -> float:
            return ranks.mean(float((logits[rows].argmax(-1) == labels).float().mean()), len(labels))

        params = sum(p.numel() for p in candidate.model.parameters())
        together = state.round > 0 and reads(candidate.model)
        if together:  # all that must run
            params += params_together(state.records)
        return {
            "round": state.round,
            "class_index": state.rung,  # the name it has had in results.json from the first version on
            "attempts": attempts,
            "attempt": candidate.attempt,
            "epochs": candidate.fit.epochs,
            "config": self.ladder.rungs[state.rung],
            "params": params,
            "validation_accuracy": accuracy(candidate.logits),
            "prefix_validation_accuracy": accuracy(state.ensemble_logits),
            "validation_loss": candidate.validation_loss,
            "scales": list(candidate.scales),
            "bound": None if self.teacher is None else state.bound,
            "largest_residual": largest_residual,
            "eta": eta,
            "edges": describe(candidate.edges, candidate.unclipped_edges),
            "accepted_by": candidate.accepted_by,
            "seconds": seconds,
            **({"reads": list(range(state.round)), "prefix_params": params} if together else {}),
        }

    def line(self, record: dict[str, Any]) -> str:
        """One line for the terminal."""
        edges = record["edges"]
        of_classes = (
            "" if edges is None
            else f" edges {edges['satisfied']}/{edges['classes']} [{edges['min']:.2g}, {edges['max']:.2g}];"
        )  # fmt: skip
        took = f", {record['epochs']} epochs, attempt {record['attempts']}, {record['seconds']:.1f} s"
        if "trained" in record:  # together with others, whose time it is as well
            took = ""
        return (
            f"round {record['round'] + 1}/{self.config.rounds}: rung {record['class_index'] + 1},"
            f" {record['params']:,} parameters{took}; validation {record['validation_accuracy']:.1%} alone,"
            f" {record['prefix_validation_accuracy']:.1%} ensemble;{of_classes}"
            f" accepted: {str(record['accepted_by']).replace('_', ' ')}"
        )

    def ensemble(self) -> ProgressiveEnsemble:
        """The students so far, with their scales and the task."""
        data = self.data
        return ProgressiveEnsemble.from_students(
            self.directory / "students", self.state.scales, data.task, data.class_labels, classes=data.class_names
        )

    def describe(self) -> None:
        """Write what loads and reports the students so far; after `boosting.ckpt`, so that it is never ahead of it."""
        experiment = self.directory.parent.name
        results = partial_results(
            experiment, self.seed, self.config, self.data, self.teacher, self.state, self.teacher is not None
        )
        if ranks.first():
            self._write_description(results)
            self.tracker.progress(results)
        ranks.agreed(lambda: None if self.observer is None else self.observer(results))

    def _write_description(self, results: dict[str, Any]) -> None:
        students = self.directory / "students"
        if self.state.round > 0:
            data = self.data
            save_description(students, self.state.scales, data.task, data.class_labels, self.done, data.class_names)
        else:
            (students / "ensemble.json").unlink(missing_ok=True)  # of rounds that are started anew
        write_json(self.directory / PROGRESS, results)

    def state_dict(self, matrices: bool = True) -> dict[str, Any]:
        """The loop's state: primitives and tensors."""
        return self.state.state_dict(matrices)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.state.load_state_dict(state)

    def close(self) -> None:
        """Leave in `boosting.ckpt` what evaluating a finished run again needs, without the matrices."""
        if ranks.first():
            self._write(self.state_dict(matrices=False))
            remove_parts(self.directory, [])

    def save(self) -> None:
        """Write `boosting.ckpt`, whole or not at all; of several ranks each writes its rows before."""
        if ranks.size() == 1:
            self._write(self.state_dict())
            remove_parts(self.directory, [])
            return
        parts = write_parts(self.state, self.data.whole[:2], self.directory)
        if ranks.first():
            self._write({**self.state_dict(matrices=False), PARTS: parts})
            remove_parts(self.directory, parts)
        ranks.wait()

    def _write(self, state: dict[str, Any]) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:  # torch's own writing hides why it fails
                torch.save({**state, HASH: content_hash(state)}, file)

        atomic_write(self.directory / "boosting.ckpt", write)

    def restore(self) -> None:
        """Load `boosting.ckpt` where there is one.

        Raises:
            RunError: where the file is damaged or belongs to other data.
        """
        path = self.directory / "boosting.ckpt"
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
            check_hash(path, state, state.pop(HASH, None))
            if PARTS in state or (ranks.size() > 1 and "ensemble_logits" in state):
                sizes, residuals = self.data.whole[:2], self.teacher is not None
                own = own_matrices(state, sizes, self.data.num_classes, self.directory, residuals)
                state = {**state, **own}
            self.load_state_dict(state)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise RunError(f"{path}: cannot be resumed from ({error}); delete it to start the rounds anew") from error
        logger.info("resumed after %d of %d rounds", self.state.round, self.config.rounds)
