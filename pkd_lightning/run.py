"""The experiment: data -> teacher -> rounds -> ensemble -> evaluation -> report.

python -m pkd_lightning.run experiment=digits [overrides]
"""

import os

import hydra
from omegaconf import DictConfig

from pkd_lightning.checkpoint import read_json
from pkd_lightning.cli import CONF, explain_end, explain_overrides, log_to_terminal
from pkd_lightning.commands import end_with_reader, run_command, spare_terminal
from pkd_lightning.composition import without_bars
from pkd_lightning.naming import tell_agent
from pkd_lightning.process import in_multirun, stopped_by_signals
from pkd_lightning.reporting.table import print_table
from pkd_lightning.rundir import find_finished
from pkd_lightning.sweeps.records import this_job


def run(config: DictConfig) -> dict[str, object]:
    """Run, resume, or just show the experiment of a composed configuration; returns results.json.

    Of several ranks only the first has results; in the others there are no rounds.
    """
    directory = find_finished(config)
    if directory is None:
        from pkd_lightning.distil import distil  # torch, lightning and numba take seconds, and --help needs none

        directory = distil(config)
        if directory is None:
            return {"rounds": []}
    else:
        directory.revisit()
        if "WANDB_SWEEP_ID" in os.environ:
            tell_agent(config, directory)
    results = read_json(directory.results)
    if not in_multirun():  # where its end is a line, and the sweep's a table
        spare_terminal()
        print(f"report: {directory.path / 'report.html'}")
        print_table(results)
    return results  # type: ignore[no-any-return]


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def _job(config: DictConfig) -> float | None:
    log_to_terminal(this_job())
    with end_with_reader(), explain_end(), stopped_by_signals():  # in a launcher's process, too
        rounds = run(without_bars(config) if in_multirun() else config)["rounds"]
    return max(0.0, rounds[-1]["prefix_validation_accuracy"]) if rounds else None  # type: ignore[index]


def main() -> None:
    """The command line; Hydra reads the command line, except for the commands of our own."""
    with end_with_reader():
        run_command()
        with explain_overrides(), stopped_by_signals():
            _job()


if __name__ == "__main__":
    main()
