"""The experiment: data -> teacher -> rounds -> ensemble -> evaluation -> report.

python -m pkd_lightning.run experiment=digits [overrides]
"""

import os
import sys
import time
from importlib import import_module

import hydra
from omegaconf import DictConfig

from pkd_lightning.checkpoint import read_json
from pkd_lightning.cli import CONF, explain_end, explain_overrides, log_to_terminal, spare_terminal
from pkd_lightning.composition import without_bars
from pkd_lightning.naming import Naming, tell_agent
from pkd_lightning.process import in_multirun, stopped_by_signals
from pkd_lightning.reporting.table import print_table
from pkd_lightning.rundir import RunDirectory, find_finished
from pkd_lightning.sweeps.records import this_job

COMMANDS = {"list": "pkd_lightning.sweeps.listing", "report": "pkd_lightning.report"}


def run(config: DictConfig) -> dict[str, object]:
    """Run, resume, or just show the experiment of a composed configuration; returns results.json."""
    directory = find_finished(config)
    if directory is not None:
        directory.revisit()
        if "WANDB_SWEEP_ID" in os.environ:
            tell_agent(config, directory)
    else:
        # here, not above: torch, lightning and numba take seconds, and --help, completion, a finished run need none
        import torch

        from pkd_lightning.boosting.loop import BoostingLoop
        from pkd_lightning.data.module import DataModule
        from pkd_lightning.evaluate import collect_results
        from pkd_lightning.experiment import TORCH_THREADS, assemble, open_tracker
        from pkd_lightning.fitting import Stage
        from pkd_lightning.growth import source_of
        from pkd_lightning.report import write_report
        from pkd_lightning.teacher import prepare_teacher

        experiment = assemble(config)
        directory = RunDirectory(config)
        torch.set_num_threads(config.threads or TORCH_THREADS)
        start = time.perf_counter()
        data = DataModule(experiment.data)
        experiment.check(data)
        with directory.open(config):
            with open_tracker(config, directory.path, Naming(config, data.name)) as tracker:
                checkpoint = directory.path / "fits" / "teacher.ckpt"
                stage = Stage("teacher", config.seed, directory.path / "metrics.jsonl", checkpoint=checkpoint)
                shared = directory.shared_teacher(data.fingerprint)
                teacher = prepare_teacher(experiment.teacher, data, directory.path / "teacher", shared, stage, tracker)
                loop = BoostingLoop(
                    experiment.boosting, experiment.student, experiment.trainer, data, teacher,
                    directory.path, config.seed, tracker, source_of(config, experiment.boosting, directory),
                )  # fmt: skip
                ensemble = loop.run()
                results = collect_results(config, data, teacher, ensemble, loop, time.perf_counter() - start)
                directory.save_results(results)
                write_report(directory.path)
                tracker.summarise(results)
            loop.close()
            directory.finish()
    results = read_json(directory.results)
    if not in_multirun():  # where its end is a line, and the sweep's a table
        spare_terminal()
        print(f"report: {directory.path / 'report.html'}")
        print_table(results)
    return results  # type: ignore[no-any-return]


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def _job(config: DictConfig) -> float | None:
    log_to_terminal(this_job())
    with explain_end(), stopped_by_signals():  # in a launcher's process, too
        rounds = run(without_bars(config) if in_multirun() else config)["rounds"]
    return max(0.0, rounds[-1]["prefix_validation_accuracy"]) if rounds else None  # type: ignore[index]


def main() -> None:
    """Console entry point; Hydra reads the command line, except for the commands of our own."""
    if COMMANDS.keys() & sys.argv[1:2]:
        sys.exit(import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:]))
    with explain_overrides(), stopped_by_signals():
        _job()


if __name__ == "__main__":
    main()
