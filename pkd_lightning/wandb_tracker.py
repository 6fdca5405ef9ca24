"""Weights & Biases: one run an experiment, which another process continues, and whose trouble never stops a run."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from pkd_lightning.errors import ConfigError
from pkd_lightning.loggers import About, summary_of

logger = logging.getLogger(__name__)
logging.getLogger("wandb").setLevel(logging.ERROR)
MODES = ("offline", "online")
KNOWN = ("validation_accuracy", "prefix_validation_accuracy", "params", "attempts", "seconds")  # when a round is done
# Seconds that a server may take to answer at the start, and to take the rest at the end; W&B's own 90 and no limit hold
# up a run that needs neither. What is not uploaded then is still on the disk.
START, END = 15.0, 60.0
FLUSH = 0.2  # seconds between writes of W&B's process to its file, which are what a `kill -9` leaves; its own are 15
# settings of a W&B session that name one run, as an agent's variables WANDB_RUN_ID and WANDB_SWEEP_ID do
ONE_RUN = ("run_id", "sweep_id", "sweep_param_path")
RESUME = ("resume_from", "fork_from")  # what may not stand beside our own way of resuming
COLUMNS = {  # of the table, by where they are in a round of results.json
    "round": "round", "rung": "class_index", "parameters": "params", "MACs": "macs_total",
    "FLOPs as published": "flops_published", "validation accuracy": "validation_accuracy", "accuracy": "accuracy",
    "ensemble's validation accuracy": "prefix_validation_accuracy", "ensemble's accuracy": "prefix_accuracy",
    "accepted by": "accepted_by", "attempts": "attempts", "epochs": "epochs", "seconds": "seconds",
}  # fmt: skip
FROM_ZERO = ("round", "class_index")  # counted from 1 where they are shown


@dataclass
class Continued:
    """Which W&B run continues in a run directory, and what it holds: kept in a file beside W&B's own.

    W&B cannot be asked for it: offline it knows only what this process wrote, and counts its steps from 0.

    Attributes:
        project: of the run.
        id: of the run. It is drawn once, so that copies of a configuration on other machines are other runs.
        step: W&B's own count of what was logged, the next one.
        ends: where on its axis each curve ends.
    """

    project: str
    id: str
    step: int = 0
    ends: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, project: str, new: str) -> "Continued":
        """What `path` holds, where it is of this project; else a run with the id `new`."""
        try:
            found = cls(**json.loads(path.read_text()))
            valid = isinstance(found.step, int) and all(isinstance(end, int) for end in found.ends.values())
        except FileNotFoundError:
            return cls(project, new)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("%s: cannot be read (%s); a new W&B run is begun", path, error)
            return cls(project, new)
        return found if valid and found.project == project else cls(project, new)

    def write(self, path: Path) -> None:
        """Keep it; whole or not at all, and not worth waiting for the disk, once an epoch."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(path)


class StageLogger(WandbLogger):
    """Lightning's logger of one stage; what it logs has the stage's name in front, and the stage's steps as axis."""

    LOGGER_JOIN_CHAR = "/"

    def __init__(self, tracker: "WandbTracker", prefix: str) -> None:
        super().__init__(experiment=tracker.run, prefix=prefix)
        self.tracker = tracker

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values of an optimiser step."""
        values = {f"{self._prefix}/{name}": value for name, value in metrics.items()}
        self.tracker.log(values, f"{self._prefix}/step", step)

    def log_hyperparams(self, params: Any) -> None:
        """Nothing: the run has the whole configuration."""


class WandbTracker:
    """Weights & Biases: one W&B run for the whole experiment.

    The curves of a stage are `teacher/...`, `round-1/...`, those of a second attempt `round-1/attempt-2/...`, each by
    its stage's `step`. The summary's are `rounds/...`, by `students`.

    An agent's WANDB_RUN_ID and WANDB_SWEEP_ID name the run, unless its process does several. WANDB_MODE is not read.

    Args:
        directory: the run directory; W&B's files go below its `wandb/`.
        about: name, group and tags.
        config: the resolved configuration.
        project: W&B project; a sweep has its own.
        mode: `offline` (upload later with `wandb sync`) or `online`.

    Raises:
        ConfigError: where `mode` is neither, or is online, and there is no wandb or no key.
    """

    def __init__(
        self,
        directory: Path,
        about: About,
        config: Mapping[str, Any],
        project: str = "pkd-lightning",
        mode: str = "offline",
    ) -> None:
        if mode not in MODES:
            raise ConfigError([f"logger.mode={mode!r}: must be one of {', '.join(MODES)}"])
        self.directory, self.about, self.config, self.project = directory, about, config, project
        self.path = directory / "wandb" / "continued.json"
        self.cure = f"`wandb sync --include-online {self.path.parent}` uploads later what was logged"
        self.run: Any = None
        self.defined: set[str] = set()
        try:
            import wandb
        except ImportError as error:
            if mode == "online":
                raise ConfigError([f"logger.mode=online: {error}; pip install wandb, or logger=none"]) from error
            logger.info("logger=wandb: %s; nothing is tracked. pip install wandb, or logger=none", error)
            return
        if mode == "online":
            check_key(wandb)
        with self._harmless("not tracked"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.run = self._open(wandb, mode)

    @contextmanager
    def stage(self, name: str, attempt: int = 0) -> Iterator[Sequence[Logger]]:
        """A logger whose curves carry the stage's name."""
        yield () if self.run is None else (StageLogger(self, stage_name(name, attempt)),)

    def progress(self, results: Mapping[str, Any]) -> None:
        """A step a round, as they come: what is known before the test part is read."""
        for row in results["rounds"]:
            known = {name: row[name] for name in KNOWN}
            if row["edges"] is not None:  # there are none without a teacher
                known["edges_satisfied"] = row["edges"]["satisfied"]
            self.log({f"rounds/{name}": value for name, value in known.items()}, "students", row["round"] + 1)

    def summarise(self, results: Mapping[str, Any]) -> None:
        """A step a round, the table and the figures; the final figures in the run's summary; online the students."""
        if self.run is None:
            return
        with self._harmless("not summarised"):
            import wandb

            rows, students = results["rounds"], len(results["rounds"])
            for row in rows:
                values = {name: row[name] for name in ("validation_accuracy", "prefix_validation_accuracy")}
                values = {f"rounds/{name}": value for name, value in {**values, **summary_of(row)}.items()}
                self.log(values, "students", row["round"] + 1)
            self.run.summary.update(figures_of(results))  # first: a table and an artifact need the server, when online
            figures = sorted((self.directory / "figures").glob("*.png"))
            self.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}, "students", students)
            cells = [[row[key] + 1 if key in FROM_ZERO else row[key] for key in COLUMNS.values()] for row in rows]
            self.log({"results": wandb.Table(list(COLUMNS), cells)}, "students", students)
            if self.run is not None and not self.run.offline:
                self.run.log_artifact(self._model(wandb, results))

    def close(self, failed: bool) -> None:
        """Finish the W&B run, as one that failed where the experiment is not complete."""
        if self.run is None:
            return
        run, self.run = self.run, None
        try:
            run.finish(exit_code=int(failed))
        except TimeoutError:
            logger.warning("W&B: the server did not take everything in %.0f s. %s", END, self.cure)
        except Exception as error:  # as in `_harmless`
            logger.warning("W&B: the run was not finished (%s). %s", line_of(error), self.cure)
            reset()

    def log(self, values: Mapping[str, Any], axis: str, position: int | None) -> None:
        """Log values of curves by an axis of their own; what a resumed run repeats is there already, and left out."""
        if self.run is None:
            return
        with self._harmless("not tracked any further"):
            ends = self.continued.ends
            new = {name: value for name, value in values.items() if position is None or ends.get(name, -1) < position}
            if not new:
                return
            if position is not None:
                for name in sorted(new.keys() - self.defined):  # exact names: overlapping globs resolve at random
                    self.run.define_metric(name, step_metric=axis)
                ends.update(dict.fromkeys(new, position))
                new[axis] = position
            self.defined |= new.keys()
            # a step of our own: offline, those of each process would start at 0, and W&B keeps one row a step
            self.run.log(new, step=self.continued.step, commit=True)
            self.continued.step += 1
            self.continued.write(self.path)

    @contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        """Trouble with W&B in the block ends the tracking with one line, and nothing else."""
        try:
            yield
        except Exception as error:  # of W&B, of its process, of the connection to it, of the disk
            logger.warning("W&B: %s (%s); the run goes on. %s", what, line_of(error), self.cure)
            run, self.run = self.run, None
            try:
                if run is not None:
                    run.finish(exit_code=1)
            except Exception:  # the same trouble again
                reset()

    def _open(self, wandb: Any, mode: str) -> Any:
        """The W&B run, offline where the server cannot be reached."""
        if mode == "online":
            try:
                run = self._init(wandb, "online")
                logger.info("W&B: %s", run.url)
                return run
            except Exception as error:  # of many kinds: no network, no answer, a key that is not valid
                logger.warning(
                    "W&B: the server cannot be used (%s); it is tracked offline. %s", line_of(error), self.cure
                )
                reset()  # or the id would count as in use
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        forgotten = (*RESUME, *ONE_RUN) if self.about.swept else RESUME
        with unset(session := wandb.setup().settings, forgotten) as ignored:
            if set(ignored) & {*ONE_RUN}:
                names = ", ".join(f"WANDB_{name.upper()}" for name in ignored)
                logger.info("%s: not used, because this process does several runs", names)
            given = session.run_id
            new = given or f"{self.directory.name}-{uuid4().hex[:8]}"
            self.continued = Continued.of(self.path, self.project, new)
            if given is not None and self.continued.id != given:
                self.continued = Continued(self.project, given)
            self.continued.write(self.path)  # its id is that of whatever W&B writes from here on
            run = wandb.init(
                # in a sweep, W&B takes id and project from the agent, and none from here
                id=self.continued.id, project=self.project, mode=mode, resume="allow", dir=str(self.directory),
                config=dict(self.config),
                name=self.about.name, group=self.about.group, tags=self.about.tags,
                reinit="finish_previous" if wandb.run is None else "create_new",  # a run of the caller's goes on
                settings=wandb.Settings(
                    silent=True, console="off", x_disable_stats=True, sagemaker_disable=True,
                    init_timeout=START if mode == "online" else 90.0, finish_timeout=END, finish_timeout_raises=True,
                    x_transaction_log_flush_interval=FLUSH,
                ),
            )  # fmt: skip
        self.continued.step = max(self.continued.step, run.step)  # of a server that knows more
        return run

    def _model(self, wandb: Any, results: Mapping[str, Any]) -> Any:
        """The students and how they are combined: a folder that `ProgressiveEnsemble.load` reads."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{results['experiment']}-{self.directory.name}")
        artifact = wandb.Artifact(name, type="model", metadata=figures_of(results))
        artifact.add_dir(str(self.directory / "students"), name="students")
        return artifact


def stage_name(name: str, attempt: int) -> str:
    """`round-1/attempt-2` of the fit `round-00` with the attempt 1: both are counted from 1 where they are shown."""
    kind, _, number = name.partition("-")
    shown = f"{kind}-{int(number) + 1}" if number.isdecimal() else name
    return shown if attempt == 0 else f"{shown}/attempt-{attempt + 1}"


def figures_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The final figures: of the ensemble, of the teacher where there is one, and the time."""
    found = {
        f"{part}/{name}": value
        for part in ("ensemble", "teacher")
        for name, value in (results[part] or {}).items()
        if isinstance(value, (int, float))
    }
    teacher = results["teacher"] or {}
    each = [*teacher.get("members", ()), *teacher.get("chain", ())]
    found |= {f"teacher/{row['name']}/{key}": row[key] for row in each for key in ("accuracy", "validation_accuracy")}
    found |= {f"teacher/disagreement/{key}": value for key, value in teacher.get("disagreement", {}).items()}
    if results["rounds"]:
        found["ensemble/validation_accuracy"] = results["rounds"][-1]["prefix_validation_accuracy"]
    return {**found, "seconds": results["wall_seconds"]["total"]}


def check_key(wandb: Any) -> None:
    """Check that there is a key, before anything is trained; nobody is asked for it, and no server.

    Raises:
        ConfigError: where there is none, or it has not the form of one.
    """
    fault = "logger.mode=online: there is no valid key of W&B"
    cure = "set WANDB_API_KEY, run `wandb login`, or leave logger.mode=offline"
    try:  # of a key that is too short, one session of W&B raises and the next says False
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise ConfigError([f"{fault} ({line_of(error)}); {cure}"]) from error
    if not known:
        raise ConfigError([f"{fault}; {cure}"])


def reset() -> None:
    """Have W&B start a new process when it is used again: this one is gone, or holds a run that could not be begun."""
    import wandb

    with suppress(Exception):  # what is gone cannot say goodbye
        wandb.teardown()


@contextmanager
def unset(settings: Any, names: Sequence[str]) -> Iterator[list[str]]:
    """Within the block these settings of a session are not set; yields those that were.

    `wandb.init` cannot do it: what is None there does not count.
    """
    before = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, None)
    try:
        yield [name for name, value in before.items() if value is not None]
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def line_of(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
