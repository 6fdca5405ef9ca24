"""The experiment: data -> teacher -> rounds -> ensemble -> evaluation -> report.

python -m pkd_lightning.run experiment=digits [overrides]
"""

import logging
import sys
import time

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.checkpoint import read_json
from pkd_lightning.cli import CONF, explain_overrides, log_to_terminal
from pkd_lightning.data.module import DataModule
from pkd_lightning.errors import PKDError
from pkd_lightning.evaluate import collect_results
from pkd_lightning.experiment import assemble, open_tracker
from pkd_lightning.fitting import Stage
from pkd_lightning.process import stopped_by_signals
from pkd_lightning.report import print_table, write_report
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.teacher import prepare_teacher

logger = logging.getLogger(__name__)
TORCH_THREADS = torch.get_num_threads()  # before any run sets them


def run(config: DictConfig) -> dict[str, object]:
    """Run, resume, or just show the experiment of a composed configuration; returns results.json."""
    experiment = assemble(config)
    torch.set_num_threads(config.threads or TORCH_THREADS)
    directory = RunDirectory(config)
    if directory.finished:
        logger.info("finished before: %s", directory.path)
    else:
        start = time.perf_counter()
        data = DataModule(experiment.data)
        experiment.check(data)
        with directory.open(config):
            tracker = open_tracker(config, directory.path)
            stage = Stage("teacher", config.seed, directory.path / "metrics.jsonl")
            teacher = prepare_teacher(
                experiment.teacher, data, directory.path / "teacher", directory.teacher_logits, stage, tracker
            )
            loop = BoostingLoop(
                experiment.boosting, experiment.student, experiment.trainer, data, teacher,
                directory.path, config.seed, tracker,
            )  # fmt: skip
            ensemble = loop.run()
            seconds = time.perf_counter() - start
            results = collect_results(config, data, teacher, ensemble, loop.state, experiment.trainer.device, seconds)
            directory.save_results(results)
            write_report(directory.path)
            tracker.summarise(results)
            directory.finish()
            loop.state.remove_files()
    results = read_json(directory.results)
    print(f"report: {directory.path / 'report.html'}")
    print_table(results)
    return results  # type: ignore[no-any-return]


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def _job(config: DictConfig) -> float | None:
    log_to_terminal()
    try:
        rounds = run(config)["rounds"]
    except PKDError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # Hydra runs the other jobs, then reports this one
        sys.exit(f"error: {error}")
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same command goes on from the last finished round", file=sys.stderr)
        raise
    return max(0.0, rounds[-1]["prefix_validation_accuracy"]) if rounds else None  # type: ignore[index]


def main() -> None:
    """Console entry point; Hydra reads the command line."""
    with explain_overrides(), stopped_by_signals():
        _job()


if __name__ == "__main__":
    main()
