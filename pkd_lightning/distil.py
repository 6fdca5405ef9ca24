"""The work of a run: data -> teacher -> rounds -> ensemble -> evaluation -> report."""

import logging
import time
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from pkd_lightning import ranks
from pkd_lightning.assembling import assemble, open_tracker
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.boosting.partial import partial_results
from pkd_lightning.boosting.peers import PeersLoop
from pkd_lightning.checkpoint import write_json
from pkd_lightning.data.module import DataModule
from pkd_lightning.evaluate import collect_results
from pkd_lightning.experiment import TORCH_THREADS, Experiment
from pkd_lightning.fitting import Stage
from pkd_lightning.growth import source_of
from pkd_lightning.live import LivePage
from pkd_lightning.loggers import Tracker
from pkd_lightning.naming import Naming
from pkd_lightning.processes import together
from pkd_lightning.report import write_report
from pkd_lightning.results import PROGRESS
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.sweeps.pruning import this_trial
from pkd_lightning.teacher import Teacher, prepare_teacher
from pkd_lightning.teachers.options import TeachersConfig
from pkd_lightning.teachers.preparing import prepare_teachers

logger = logging.getLogger(__name__)


def distil(config: DictConfig, ended_early: str | None = None) -> RunDirectory | None:
    """Run or resume an experiment of one process or several; its directory, or None in all ranks but the first.

    Args:
        config: the whole configuration.
        ended_early: by what no further round is begun: the run ends with the students there are.

    Raises:
        RunError: where there is none.
    """
    experiment = assemble(config)
    directory = RunDirectory(config)
    torch.set_num_threads(config.threads or TORCH_THREADS)
    start = time.perf_counter()
    with together(config, experiment.trainer) as leave:
        data = DataModule(experiment.data)
        ranks.agreed(lambda: experiment.check(data))
        with directory.open(config):
            with open_tracker(config, directory.path, Naming(config, data.name)) as given:
                if ranks.first():
                    begin(config, experiment, data, directory.path)
                tracker = LivePage(given, partial(write_page, directory.path))  # in other ranks it writes nothing
                checkpoint = directory.path / "fits" / "teacher.ckpt"
                stage = Stage("teacher", config.seed, directory.path / "metrics.jsonl", checkpoint=checkpoint)
                teacher = taught_by(experiment, data, directory, stage, tracker)
                source = ranks.agreed(lambda: source_of(config, experiment.boosting, directory))
                make = BoostingLoop if experiment.boosting.peers is None else PeersLoop
                loop = make(
                    experiment.boosting, experiment.student, experiment.trainer, data, teacher,
                    directory.path, config.seed, tracker, source, this_trial(),
                )  # fmt: skip
                ensemble = loop.run(ended_early)
                if not leave():  # the first evaluates alone
                    return None
                results = collect_results(config, data, teacher, ensemble, loop, time.perf_counter() - start)
                directory.save_results(results)
                logger.info("writing the report")
                write_report(directory.path)
                tracker.summarise(results)
            loop.close()
            directory.finish()
    return directory


def taught_by(
    experiment: Experiment, data: DataModule, directory: RunDirectory, stage: Stage, tracker: Tracker
) -> Teacher | None:
    """Load or train the teacher, or each of those that teach; None where there is none."""
    if experiment.teacher is None:
        return None
    own, shared = directory.path / "teacher", directory.shared_teachers(data.fingerprint)
    if isinstance(experiment.teacher, TeachersConfig):
        return prepare_teachers(experiment.teacher, data, own, shared, stage, tracker)
    return prepare_teacher(experiment.teacher, data, own, shared["teacher"], stage, tracker)


def begin(config: DictConfig, experiment: Experiment, data: DataModule, run: Path) -> None:
    """Write what is known of a run before its teacher, for whoever looks at it from then on."""
    if not (run / PROGRESS).exists():
        distils = experiment.teacher is not None
        known = partial_results(str(config.name), config.seed, experiment.boosting, data, distils=distils)
        write_json(run / PROGRESS, known)


def write_page(run: Path, figures: bool) -> None:
    """Write the page of a run that goes on, with figures or without, in the first rank."""
    if ranks.first():
        write_report(run, figures=figures)
