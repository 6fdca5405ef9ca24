"""Every prefix and every single student on the test part, and what each costs: the content of results.json."""

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from pkd_lightning import __version__
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.boosting.objectives import objective_name
from pkd_lightning.composition import complete
from pkd_lightning.cost import Cost, latency, measure
from pkd_lightning.data.module import DataModule
from pkd_lightning.earlier import following, reads
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import RunError
from pkd_lightning.exits.curves import CALIBRATED_ROWS, LEARNED_ROWS, Observed, exit_results
from pkd_lightning.fitting import predict
from pkd_lightning.matrix import chunks, scratch
from pkd_lightning.prefixes import Scales, mix
from pkd_lightning.results import SCHEMA
from pkd_lightning.teacher import Teacher
from pkd_lightning.teachers.combining import cost_of
from pkd_lightning.teachers.preparing import Part, Teachers

logger = logging.getLogger(__name__)
PACKAGES = ("torch", "lightning", "torchmetrics", "torchvision", "hydra-core", "numba", "wandb")


def evaluate(
    teacher: Teacher | None,
    ensemble: ProgressiveEnsemble,
    data: DataModule,
    records: Sequence[Mapping[str, Any]],
    device: torch.device,
    directory: Path,
    seed: int = 0,
) -> dict[str, Any]:
    """Read the test part once and report the teacher, every round, the ensemble, and its early exits.

    Three matrices of logits (test rows, L) are held, and two of validation rows, on which exits are calibrated; large
    ones are in unnamed files (see `matrix.scratch`).

    Args:
        teacher: the teacher; None: the part `teacher` is None, and nothing is compared with it.
        ensemble: the students.
        data: its test rows are read here and nowhere else in a run.
        records: what the loop recorded of each round.
        device: where the models are asked; latency is measured on the CPU.
        directory: where large matrices of logits are kept for the time being.
        seed: of a learned exit.

    Returns:
        The parts `teacher`, `rounds`, `ensemble` and, where every multiply-accumulate can be counted, `exits` of
        results.json.

    Raises:
        RunError: where logits of the test rows are not finite, naming the model and the rows.
    """
    who = "" if teacher is None else "the teacher and "
    logger.info("evaluating %s%d students on %s test samples", who, len(ensemble), f"{len(data.test):,}")
    labels = data.labels[data.test.start : data.test.stop]
    sample = data.task.prepare(data.inputs[data.test.start : data.test.start + 1])
    teacher_row, teacher_logits = (None, None) if teacher is None else _evaluated(teacher, data, device, directory)
    prefix_logits, logits = (scratch(len(labels), data.num_classes, directory) for _ in range(2))

    rounds: list[dict[str, Any]] = []
    prefix_cost = Cost(0, 0, 0)
    prefix_logits.zero_()
    prefix: dict[str, Any] = {}
    exits = ExitCurves(data, device, directory)
    for t, (member, scales, record) in enumerate(zip(ensemble.members, ensemble.scales, records, strict=True)):
        asked = following(member, list(ensemble.members)[:t])
        predict(asked, data, data.test, device, out=logits)
        check_finite(logits, f"student {t + 1}")
        exits.ask(asked, scales)
        asked.cpu()
        for rows in chunks(logits.shape):
            prefix_logits[rows] = mix(prefix_logits[rows], logits[rows], scales)
        check_finite(prefix_logits, f"the ensemble of the first {t + 1} students")
        prefix = {
            **data.task.quality(prefix_logits, labels, teacher_logits),
            **vars(latency(partial(ensemble, members=t + 1), sample)),
        }
        cost = measure(asked, data.task.input_shape)
        together = t > 0 and reads(member)  # of one that reads, the whole prefix must run
        prefix_cost = cost if together else prefix_cost + cost
        exits.add(prefix_logits, prefix_cost.macs_total)
        rounds.append(
            {
                **record,
                **data.task.quality(logits, labels, teacher_logits),
                **vars(cost),
                **vars(latency(asked, sample)),
                **{f"prefix_{name}": value for name, value in prefix.items()},
                **({f"prefix_{name}": value for name, value in vars(prefix_cost).items()} if together else {}),
            }
        )
    ensemble_row = {"members": len(ensemble), **prefix, **vars(prefix_cost)}
    if teacher_row is not None:
        costs = vars(prefix_cost).items()
        ensemble_row["fraction_of_teacher"] = {name: _fraction(value, teacher_row[name]) for name, value in costs}
    return {"teacher": teacher_row, "rounds": rounds, "ensemble": ensemble_row, **exits.results(seed)}


def each_of(teachers: Teachers, data: DataModule, device: torch.device, directory: Path) -> dict[str, Any]:
    """Members, what they differ in, and the chain of assistants, on the test part: of the teacher's part of results."""
    labels = data.labels[data.test.start : data.test.stop]
    logits = scratch(len(labels), data.num_classes, directory)

    def row(part: Part) -> dict[str, Any]:
        model = part.teacher.model
        predict(model, data, data.test, device, out=logits)
        check_finite(logits, f"the teacher {part.name!r}")
        model.cpu()
        return {
            "name": part.name,
            "option": part.option,
            **data.task.quality(logits, labels),
            "validation_accuracy": part.validation_accuracy,
            **vars(cost_of(model, data.task.input_shape)),
            "seconds": part.teacher.seconds,
        }

    found: dict[str, Any] = {"validation_accuracy": teachers.validation_accuracy}
    if teachers.members:
        found["combine"] = teachers.combine if isinstance(teachers.combine, str) else dict(teachers.combine)
        found["disagreement"] = dict(teachers.disagreement or {})
    for name, parts in (("members", teachers.members), ("chain", teachers.chain)):
        if parts:
            found[name] = [row(part) for part in parts]
    return found


def _evaluated(
    teacher: Teacher, data: DataModule, device: torch.device, directory: Path
) -> tuple[dict[str, Any], Tensor]:
    """The teacher's quality and cost, and its logits of the test rows."""
    labels = data.labels[data.test.start : data.test.stop]
    sample = data.task.prepare(data.inputs[data.test.start : data.test.start + 1])
    logits = scratch(len(labels), data.num_classes, directory)
    predict(teacher.model, data, data.test, device, out=logits)
    check_finite(logits, "the teacher")
    teacher.model.cpu()
    cost = vars(cost_of(teacher.model, data.task.input_shape))
    row = {**data.task.quality(logits, labels), **cost, **vars(latency(teacher.model, sample))}
    if isinstance(teacher, Teachers):
        row |= each_of(teacher, data, device, directory)
    return row, logits


class ExitCurves:
    """What early exits need of the prefixes, taken as these are evaluated."""

    def __init__(self, data: DataModule, device: torch.device, directory: Path) -> None:
        self.data, self.device, self.rows = data, device, data.validation[:CALIBRATED_ROWS]
        self.logits, self.prefix = (scratch(len(self.rows), data.num_classes, directory) for _ in range(2))
        self.prefix.zero_()
        features = len(data.test) <= LEARNED_ROWS
        self.validation, self.test = (
            Observed(data.labels[rows.start : rows.stop], features) for rows in (self.rows, data.test)
        )
        self.macs: list[int | None] = []

    def ask(self, student: nn.Module, scales: Scales) -> None:
        """Take the next student's answers on the validation rows."""
        predict(student, self.data, self.rows, self.device, out=self.logits)
        for rows in chunks(self.logits.shape):
            self.prefix[rows] = mix(self.prefix[rows], self.logits[rows], scales)
        self.validation.add(self.prefix)

    def add(self, test_logits: Tensor, macs: int | None) -> None:
        """Take the prefix's logits on the test rows, and its cost for an image."""
        self.test.add(test_logits)
        self.macs.append(macs)

    def results(self, seed: int) -> dict[str, Any]:
        """The part `exits` of results.json, or nothing where a cost is unknown."""
        macs = [cost for cost in self.macs if cost is not None]
        if not macs or len(macs) < len(self.macs):
            logger.info("early exits are not evaluated: not every multiply-accumulate can be counted")
            return {}
        return {"exits": exit_results(self.validation, self.test, macs, self.data.num_classes, seed)}


def _fraction(part: int | None, whole: int | None) -> float | None:
    return None if part is None or whole is None else part / max(1, whole)


def check_finite(logits: Tensor, whose: str) -> None:
    """Check the logits (test rows, L) of a model.

    Raises:
        RunError: where some are not finite, naming `whose` and the first rows.
    """
    found = [rows.start + (~logits[rows].isfinite().all(1)).nonzero()[:, 0] for rows in chunks(logits.shape)]
    bad = torch.cat(found).tolist()
    if bad:
        first = f"{', '.join(map(str, bad[:5]))}{', ...' if len(bad) > 5 else ''}"
        raise RunError(
            f"the logits of {whose} are not finite on {len(bad)} of {len(logits)} test rows ({first}, from 0 in the"
            " order of the test part): nothing it is evaluated by would be true, so no results are written. The"
            " students are kept; correct or leave out these images, or use another teacher"
        )


def collect_results(
    config: DictConfig,
    data: DataModule,
    teacher: Teacher | None,
    ensemble: ProgressiveEnsemble,
    loop: BoostingLoop,
    seconds: float,
) -> dict[str, Any]:
    """The whole of results.json, whose version is `schema`. `seconds`: wall time of this process's part."""
    state = loop.state
    measured = evaluate(teacher, ensemble, data, state.records, loop.trainer.device, loop.directory, config.seed)
    if teacher is not None:
        measured["teacher"]["config"] = _models(config, measured["teacher"])
    before = 0.0 if teacher is None else teacher.seconds
    rounds = [record["seconds"] for record in state.records]
    own = [record["seconds"] for record in state.records if "from" not in record]  # not those of another run
    return {
        "schema": SCHEMA,
        "experiment": config.name,
        "dataset": data.name,
        "split": data.config.split,
        "seed": config.seed,
        "objective": objective_name(loop.config),
        **({"knowledge": list(loop.config.knowledge)} if loop.config.knowledge else {}),  # names of the terms
        "combine": config.boosting.combine,
        "versions": versions(),
        "hardware": hardware(),
        "labels": data.class_labels,  # in the data set, of each output; null where they are 0, 1, ...
        "sizes": {**dict(zip(("train", "validation", "test"), data.whole, strict=True)), "originals": data.originals},
        # a resumed run did part of its work in another process, so the parts can exceed this process's time
        "wall_seconds": {
            "teacher": teacher and teacher.seconds,
            "rounds": rounds,
            "total": max(seconds, before + sum(own)),
        },
        **measured,
        "stop_reason": state.stop_reason,
    }


def _models(config: DictConfig, row: dict[str, Any]) -> Any:
    """The options of the teacher's model, None where it is several; those of each of several are put into its row."""
    whole = complete(config)

    def options(place: str) -> Any:
        found = OmegaConf.select(whole, f"{place}.model")
        return None if found is None else OmegaConf.to_container(found, resolve=True)

    for each in (*row.get("members", ()), *row.get("chain", ())):
        each["config"] = options(each["option"])
    return row["chain"][-1]["config"] if "chain" in row else options("teacher")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, of those that are installed."""
    found = {"python": platform.python_version(), "pkd-lightning": __version__}  # also where only its source is there
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, threads and GPU of this machine."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the platform's word must do
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
