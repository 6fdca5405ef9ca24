"""The loop of `hydra/sweeper=optuna`: draw trials, give them to the launcher, tell the study how each job ended.

A trial is a job of the sweep, and what the study is told of it is read from the job's record and its run directory. So
a job may run in any process, and whoever goes on with a sweep knows what became of the trials of one that was killed.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, Trial, TrialState

from pkd_lightning.errors import RunError, full_disk
from pkd_lightning.locks import Lock, locked
from pkd_lightning.reporting.load import results_so_far
from pkd_lightning.sweeps.callback import line_of, say, sweep_of
from pkd_lightning.sweeps.options import Goal, Options
from pkd_lightning.sweeps.records import Job, Sweep, one_line, params_of
from pkd_lightning.sweeps.space import Space
from pkd_lightning.sweeps.study import (
    is_present,
    open_study,
    present,
    pruner_of,
    remove_absent,
    sampler_of,
    seed_of,
)

LOCK = "study.lock"  # held while trials are drawn
PLACE, PROCESS = "place", "process"  # of a trial: which of the search's it is, from 0; what runs it, see `present`

Compose = Callable[[Sequence[Sequence[str]]], None]


def search(config: DictConfig, launcher: Launcher, arguments: Sequence[str], compose: Compose) -> None:
    """Search what a command says.

    Args:
        config: the multirun's.
        launcher: of the jobs.
        arguments: the command's overrides.
        compose: raises Hydra's error where the overrides of a job cannot be composed.

    Raises:
        ConfigError: for options or overrides at fault.
        RunError: where the disk is full.
    """
    options = Options.of(config.hydra.sweeper)
    space = Space.of([*params_of(config.hydra.sweeper), *arguments])
    sampler_of(options, 0)  # and the pruner: their errors come before anything is written
    pruner_of(options)
    compose(list(space.examples()))
    sweep = sweep_of(config)
    if space.size < options.n_trials:
        sweep = replace(sweep, total=int(space.size))
        sweep.save(arguments)
    run_trials(sweep, options, space, launcher)


def run_trials(sweep: Sweep, options: Options, space: Space, launcher: Launcher) -> None:
    """Run trials until there are `n_trials`, those of earlier and of other processes counted; print the best.

    Raises:
        ConfigError: where the sweep has a study with other goals or of another space.
        RunError: where the disk is full.
    """
    if options.unpruned:
        say(options.unpruned)
    with full_disk(sweep.path), present(sweep.path) as process:
        trials = Trials(sweep, options, space, process)
        while batch := trials.draw():
            trials.run(launcher, batch)
        if space.size < options.n_trials:
            say(f"there are {space.size:.0f} different trials, and no more are drawn")
        for line in trials.best():
            say(line)


class Trials:
    """The trials of a sweep, shared by the processes that were started by the same command.

    Each has a place from 0 to `n_trials` - 1. A trial that failed, or whose process was killed, is drawn again with the
    same values and at the same place, so that its run goes on. Draws without a place were known, and are not run.

    Args:
        sweep: its directory has the study and the records of the jobs.
        options: of the search.
        space: of the search.
        process: this process's name, see `present`.
    """

    def __init__(self, sweep: Sweep, options: Options, space: Space, process: str) -> None:
        self.sweep, self.options, self.space, self.process = sweep, options, space, process
        self.launched = 0
        with self.alone():
            remove_absent(sweep.path)
            self.study = open_study(sweep.path, options, space.state())
            self.settle(failed=True)

    def alone(self) -> AbstractContextManager[Lock]:
        """Within the block no other process draws trials."""
        return locked(self.sweep.path / LOCK, "another process draws trials")

    @property
    def all(self) -> list[FrozenTrial]:
        """Every trial of the study."""
        return self.study.get_trials(deepcopy=False)

    def draw(self) -> list[FrozenTrial]:
        """The next trials to run, at most `n_jobs`; none where there are enough, or all there can be."""
        batch: list[FrozenTrial] = []
        with self.alone():
            self.settle()
            while len(batch) < self.options.n_jobs and self.more:
                batch.append(self.draw_one())
        return batch

    @property
    def more(self) -> bool:
        """Whether a trial is to be drawn."""
        placed = [trial for trial in self.all if PLACE in trial.user_attrs]
        places = len({trial.user_attrs[PLACE] for trial in placed})
        waiting = any(trial.state == TrialState.WAITING for trial in placed)
        return waiting or places < min(self.options.n_trials, self.space.size)

    def draw_one(self) -> FrozenTrial:
        """A trial that was put back, else a new one; only while this process is `alone`."""
        trials = self.all
        places = {trial.user_attrs[PLACE] for trial in trials if PLACE in trial.user_attrs}
        place, draw = min(set(range(len(places) + 1)) - places), len(trials)
        known = {self.space.overrides(trial.params) for trial in trials if PROCESS in trial.user_attrs}
        trial, repeats = self.ask(draw), 0
        while PLACE not in trial.user_attrs and self.space.overrides(trial.params) in known:
            self.tell(trial.number, TrialState.FAIL)
            draw, repeats = draw + 1, repeats + 1
            another = self.space.another(known, seed_of(self.options, draw))
            if another is not None:
                self.study.enqueue_trial(another, user_attrs={PLACE: place})
            trial = self.ask(draw, repeats)
        if PLACE not in trial.user_attrs:
            trial.set_user_attr(PLACE, place)
        trial.set_user_attr(PROCESS, self.process)
        return self.all[trial.number]

    def ask(self, draw: int, repeats: int = 0) -> Trial:
        """A trial of the study's, the first that waits or a new one."""
        self.study.sampler = sampler_of(self.options, draw, repeats)
        return self.study.ask(self.space.distributions)

    def run(self, launcher: Launcher, batch: Sequence[FrozenTrial]) -> None:
        """Launch the jobs of trials, and tell the study how they ended."""
        start, jobs = time.time(), [self.space.overrides(trial.params) for trial in batch]
        for trial, own in zip(batch, jobs, strict=True):
            if self.sweep.find(own) is None:
                self.sweep.write(Job(trial.user_attrs[PLACE], own))
        watched = self.options.watched is not None
        marks = [[f"++hydra.sweeper.trial={trial.number}"] if watched else [] for trial in batch]
        try:
            launcher.launch(
                [[*own, *mark] for own, mark in zip(jobs, marks, strict=True)], initial_job_idx=self.launched
            )
        except Exception as error:  # as where the system kills a job's process; each launcher has its own
            if not any((job.started or 0) >= start for job in map(self.sweep.find, jobs) if job is not None):
                raise  # no job was started, so no job is to blame
            say(f"the launcher ended early: {one_line(error)}")
        self.launched += len(jobs)
        for trial, own in zip(batch, jobs, strict=True):
            self.close(trial, own)

    def close(self, trial: FrozenTrial, own: tuple[str, ...]) -> None:
        """Tell the study how a trial ended whose job was launched; nothing where another process runs the job."""
        job = self.sweep.find(own)
        if self.end(trial) or job is None or self.sweep.elsewhere(job):
            return
        if job.state != "failed":
            job = replace(job, state="failed", error="its process ended before it did", ended=time.time())
            self.sweep.write(job)
            say(line_of(self.sweep, job))
        self.tell(trial.number, TrialState.FAIL)

    def settle(self, failed: bool = False) -> None:
        """Tell the study of trials whose process is gone how their jobs ended; draw again those that have not ended.

        Args:
            failed: draw again also those that failed.
        """
        latest = {trial.user_attrs[PLACE]: trial.number for trial in self.all if PLACE in trial.user_attrs}
        for trial in self.all:
            again = latest.get(trial.user_attrs.get(PLACE)) == trial.number
            if trial.state == TrialState.FAIL and failed and again:
                self.again(trial)
            if trial.state == TrialState.RUNNING and not self.busy(trial) and not self.end(trial):
                if again:  # before it is FAIL, so that nothing is lost whenever this process is killed
                    self.again(trial)
                self.tell(trial.number, TrialState.FAIL)

    def again(self, trial: FrozenTrial) -> None:
        """Have a trial's values drawn once more, at its place."""
        values = trial.system_attrs.get("fixed_params", {}) | trial.params
        self.study.enqueue_trial(values, user_attrs={PLACE: trial.user_attrs[PLACE]})

    def busy(self, trial: FrozenTrial) -> bool:
        """Whether a running trial's process is there, or that of its job."""
        if PROCESS not in trial.user_attrs:  # it was killed before the trial was drawn whole
            return False
        job = self.sweep.find(self.space.overrides(trial.params))
        return is_present(self.sweep.path, trial.user_attrs[PROCESS]) or (job is not None and self.sweep.elsewhere(job))

    def end(self, trial: FrozenTrial) -> bool:
        """Tell the study how a trial ended, by its job's record; False where it has not come to an end."""
        job = self.sweep.find(self.space.overrides(trial.params)) if PROCESS in trial.user_attrs else None
        state = None if job is None else self.sweep.as_it_stands(job).state
        if job is None or state not in ("finished", "pruned"):
            return False
        if state == "pruned":
            self.tell(trial.number, TrialState.PRUNED)
            return True
        run = self.sweep.run_of(job)
        assert run is not None
        try:
            results = results_so_far(run)
            values = [goal.of(results) for goal in self.options.purposes]
        except RunError as error:
            say(str(error))
            values = [math.nan]
        if any(map(math.isnan, values)):
            say(f"{self.sweep.title(job)}: {', '.join(self.options.goals)} are {values}, so it counts as failed")
            self.tell(trial.number, TrialState.FAIL)
        else:
            self.tell(trial.number, TrialState.COMPLETE, values)
        return True

    def tell(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        """Tell the study how a trial ended."""
        try:
            self.study.tell(number, values, state, skip_if_finished=True)
        except RuntimeError:  # samplers of grids want to stop `Study.optimize`, after the trial is told of
            if self.all[number].state == TrialState.RUNNING:
                raise

    def best(self) -> Iterator[str]:
        """Lines on the best trial, or on the Pareto front of several goals."""
        goals = self.options.purposes
        done = sum(trial.state == TrialState.COMPLETE for trial in self.all)
        if not done:
            return
        best = self.study.best_trials if len(goals) > 1 else [self.study.best_trial]
        what = ", ".join(goal.name.replace("_", " ") for goal in goals)
        yield f"Pareto front of {what}: {len(best)} of {done} finished trials" if len(goals) > 1 else f"best by {what}:"
        for trial in best:
            job = self.sweep.find(self.space.overrides(trial.params))
            title = f"trial {trial.number}" if job is None else self.sweep.title(job)
            yield f"  {title}: {', '.join(map(Goal.words, goals, trial.values))}"
