"""What is known of a run between two rounds, in the form of results.json, for the report of an unfinished run."""

from collections.abc import Mapping, Sequence
from typing import Any

from pkd_lightning import ranks
from pkd_lightning.boosting.objectives import objective_name
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.state import BoostingState
from pkd_lightning.data.module import DataModule
from pkd_lightning.results import SCHEMA
from pkd_lightning.teacher import Teacher

UNKNOWN = {"flops_published": None, "macs_total": None}  # counted at the end


def partial_results(
    experiment: str,
    seed: int,
    config: BoostingConfig,
    data: DataModule,
    teacher: Teacher | None = None,
    state: BoostingState | None = None,
    distils: bool = True,
) -> dict[str, Any]:
    """The rounds so far. Accuracies are of the validation part, as `part` says: the test part is read once, at the end.

    Args:
        experiment: its name.
        seed: of the run.
        config: the boosting options.
        data: its validation labels and sizes are read.
        teacher: its logits of the validation rows are read; None: it is not there yet.
        state: of the loop; None: it has not begun.
        distils: whether there is a teacher, or will be.
    """
    rounds = [
        {
            **record,
            "accuracy": record["validation_accuracy"],
            "prefix_accuracy": record["prefix_validation_accuracy"],
            **UNKNOWN,
        }
        for record in ([] if state is None else state.records)
    ]
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "part": "validation",
        "experiment": experiment,
        "dataset": data.name,
        "split": data.config.split,
        "seed": seed,
        "objective": objective_name(config),
        **({"knowledge": list(config.knowledge)} if config.knowledge else {}),
        "combine": config.combine,
        "sizes": dict(zip(("train", "validation", "test"), data.whole, strict=True)),
        "wall_seconds": {"teacher": teacher and teacher.seconds, "rounds": [row["seconds"] for row in rounds]},
        "planned_rounds": config.rounds,
        "teacher": {**_teacher(teacher, data), **UNKNOWN} if distils else None,
        "rounds": rounds,
        "stop_reason": state and state.stop_reason,
    }
    if rounds:
        accuracy, params = rounds[-1]["prefix_accuracy"], params_together(rounds)
        results["ensemble"] = {"members": len(rounds), "accuracy": accuracy, "params": params, **UNKNOWN}
    return results


def params_together(records: Sequence[Mapping[str, Any]]) -> int:
    """Parameters of the students of all these rounds. Those of one that reads earlier ones contain theirs."""
    total = 0
    for record in records:
        total = record.get("prefix_params", total + record["params"])
    return total


def _teacher(teacher: Teacher | None, data: DataModule) -> dict[str, Any]:
    if teacher is None:
        return {"accuracy": None, "params": None}
    rows = slice(data.validation.start, data.validation.stop)
    right = (teacher.logits[rows].argmax(-1) == data.labels[rows]).float()
    params = sum(parameter.numel() for parameter in teacher.model.parameters())
    return {"accuracy": ranks.mean(float(right.mean()), len(right)), "params": params}
