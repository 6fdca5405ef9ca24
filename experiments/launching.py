"""The jobs of a study through one of Hydra's launchers, recorded like those of a multirun."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from experiments.plan import COMPOSITION, Job, Study, shortened
from pkd_lightning.cli import CONF, for_hydra
from pkd_lightning.errors import RunError
from pkd_lightning.sweeps.callback import JobRecords
from pkd_lightning.sweeps.records import Job as Record
from pkd_lightning.sweeps.records import Sweep, one_line


class Launcher:
    """The launcher that overrides of Hydra's choose; RunError where there is none such, or it has no such option."""

    def __init__(self, study: Study, runs: Path, options: Sequence[str]) -> None:
        self.runs, self.records = runs, JobRecords()
        every = [self.overrides(job) for job in study.jobs]
        common = [one for one in every[0] if all(one in overrides for overrides in every)]
        with initialize_config_dir(CONF, version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            try:
                words = [*options, *common, "hydra.mode=MULTIRUN"]
                self.config = hydra.compose_config("config", words, RunMode.MULTIRUN)
            except COMPOSITION as error:
                raise RunError(shortened(error)) from error
        self.context = HydraContext(hydra.config_loader, Callbacks())
        self.context.callbacks.callbacks.append(self.records)
        self.sweep = Sweep(Path(self.config.hydra.sweep.dir), tuple(common), len(study.jobs))

    def overrides(self, job: Job) -> list[str]:
        """A job's, as Hydra takes them."""
        return [for_hydra(argument) for argument in job.arguments(self.runs)]

    def recorded(self, job: Job) -> tuple[str, ...]:
        """Those by which a job's record is found."""
        return tuple(one for one in self.overrides(job) if not one.startswith("hydra"))

    def announce(self, jobs: Sequence[Job], first: int) -> None:
        """Record jobs that are to be launched, numbered from `first`, and be ready for signals."""
        self.sweep.save(self.sweep.common)
        for number, job in enumerate(jobs, first):
            known = self.sweep.find(self.recorded(job))
            if known is None or not self.sweep.alive(known):
                self.sweep.write(Record(number, self.recorded(job)))
        self.records.follow(self.config, self.sweep)

    def launch(self, task: Callable[[Job, DictConfig], None], jobs: Sequence[Job], first: int) -> dict[str, str]:
        """Call `task` for each of some jobs, in whatever process; by name, why those failed that did."""
        trouble, numbered = "another process runs it", partial(call, task, dict(enumerate(jobs, first)))
        try:
            launcher = Plugins.instance().instantiate_launcher(self.context, numbered, self.config)
            launcher.launch([self.overrides(job) for job in jobs], first)
        except Exception as error:  # a process that was killed; each launcher has a kind of its own for it
            trouble = f"the launcher failed: {one_line(error)}"
        found = {job.name: self.sweep.find(self.recorded(job)) for job in jobs}
        failed = {name: record for name, record in found.items() if record is None or record.state != "finished"}
        return {name: f"failed: {(record and record.error) or trouble}" for name, record in failed.items()}


def call(task: Callable[[Job, DictConfig], None], jobs: dict[int, Job], config: DictConfig) -> None:
    """What a launcher calls; it tells the number of the job."""
    task(jobs[HydraConfig.get().job.num], config)
