"""A ready W&B workspace over the runs of a project: python -m pkd_lightning.dashboard ENTITY/PROJECT."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from pkd_lightning.errors import ConfigError, PKDError
from pkd_lightning.results import SHARE, VALUE

SWEPT = ("seed", "boosting.rounds", "boosting.temperature", "trainer.optimizer.lr")
ENSEMBLE = ("validation_accuracy", "accuracy", "macs_total", "params")


def workspace(entity: str, project: str, rounds: int = 7, swept: Sequence[str] = SWEPT) -> Any:
    """The workspace, whose metrics are those that `WandbTracker` logs; W&B is not asked for anything.

    Args:
        entity: user or team that the project is of.
        project: the project.
        rounds: so many rounds have their curves in it.
        swept: options of the configuration that parallel coordinates begin with.

    Raises:
        ConfigError: where wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError([f"{error}; pip install 'pkd-lightning[dashboard]'"]) from error

    ensemble = {name: panels.SummaryMetric(f"ensemble/{name}") for name in ENSEMBLE}

    def column(metric: Any, log: bool = False) -> Any:
        return panels.ParallelCoordinatesPlotColumn(metric, log=log)

    def by_students(title: str, *metrics: str, **options: str) -> Any:
        return panels.LinePlot(title=title, x="students", y=[f"rounds/{name}" for name in metrics], **options)

    comparison = [
        panels.ScatterPlot(
            title="Accuracy against MACs, on the validation part", x=ensemble["macs_total"],
            y=ensemble["validation_accuracy"], log_x=True,
        ),
        panels.ScatterPlot(
            title="Accuracy against MACs, on the test part", x=ensemble["macs_total"], y=ensemble["accuracy"],
            log_x=True,
        ),
        panels.ParallelCoordinatesPlot(
            title="What was set, and what it gave",
            columns=[
                *(column(panels.Config(key)) for key in swept),
                column(ensemble["params"], log=True),
                column(ensemble["macs_total"], log=True),
                column(ensemble["validation_accuracy"]),
            ],
        ),
    ]  # fmt: skip
    students = [
        by_students("The first students together, on the validation part", "prefix_validation_accuracy"),
        by_students("Each student alone, on the validation part", "validation_accuracy"),
        by_students("The first students together, on the test part", "prefix_accuracy"),
        by_students("Edges of the classes", metric_regex="rounds/edge/class_.*"),
        by_students("Classes with an edge", "edges_satisfied"),
    ]
    stages = ["teacher", "peers", *(f"round-{number + 1}" for number in range(rounds))]
    curves = [
        panels.LinePlot(title=f"{stage}: {name.replace('_', ' ')}", x=f"{stage}/step", y=[f"{stage}/{name}"])
        for stage in stages
        for name in ("validation_loss", "validation_accuracy", "train_loss")
    ]
    several = [
        panels.LinePlot(title=f"{name.replace('_', ' ')} of several teachers and of assistants",
                        metric_regex=rf"(teacher|assistant)-.*/{name}")
        for name in ("validation_loss", "validation_accuracy")
    ]  # fmt: skip
    knowledge = [
        panels.LinePlot(title=f"{stage}: {title}", x=f"{stage}/step", y=[], metric_regex=f"{stage}/{head}.*")
        for stage in stages[2:]
        for title, head in (("shares of the gradient", SHARE), ("losses of the terms of knowledge", VALUE))
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Progressive distillation",
        sections=[
            workspaces.Section(name="Runs side by side", panels=comparison, is_open=True),
            workspaces.Section(name="Students", panels=students, is_open=True),
            workspaces.Section(name="Curves by round", panels=curves),
            workspaces.Section(name="Several teachers", panels=several),
            workspaces.Section(name="Knowledge by round", panels=knowledge),
        ],
        runset_settings=workspaces.RunsetSettings(
            pinned_columns=[f"summary:ensemble/{name}" for name in ("validation_accuracy", "macs_total")]
        ),
    )


def definition(made: Any) -> Any:
    """A workspace as W&B's server is sent it, in JSON's types."""
    return json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Save the workspace as a view of the project, and print its address. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pkd_lightning.dashboard", description=main.__doc__)
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--rounds", type=int, default=7, help="rounds whose curves are shown (default: %(default)s)")
    parser.add_argument("--swept", nargs="+", default=SWEPT, metavar="KEY", help=f"default: {' '.join(SWEPT)}")
    parser.add_argument("--print", action="store_true", dest="shown", help="print its definition, and save nothing")
    options = parser.parse_args(arguments)
    entity, slash, project = options.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        parser.error(f"{options.project!r} is not of the form ENTITY/PROJECT")
    try:
        made = workspace(entity, project, options.rounds, options.swept)
    except PKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.shown:
        print(json.dumps(definition(made), indent=2))
    else:
        print(made.save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
