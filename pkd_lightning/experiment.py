"""From a composed configuration to the parts of an experiment, with every fault of it found at once."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pkd_lightning.config import BoostingConfig, TrainerConfig, WeakLearnerConfig, build, collect
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.errors import ConfigError
from pkd_lightning.loggers import Tracker
from pkd_lightning.models.building import check_output
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.teacher import TeacherConfig


@dataclass(frozen=True)
class Experiment:
    """The validated parts of an experiment."""

    data: DataConfig
    teacher: TeacherConfig
    student: Ladder
    boosting: BoostingConfig
    trainer: TrainerConfig

    def check(self, data: DataModule) -> None:
        """Check what depends on the images: that the teacher and every rung can be built for them.

        Raises:
            ConfigError: listing every fault.
        """
        faults = [f"student.{fault}" for fault in self.student.faults(self.boosting.rounds, data.image_shape)]
        images = data.normalise(data.images[[0, 0]])
        for index in range(0 if faults else len(self.student)):
            build = partial(self.student.build, index, data.image_shape, data.num_classes)
            collect(faults, f"student.rungs[{index}]", lambda b=build: check_output(b(), images, data.num_classes))  # type: ignore[misc]
        collect(
            faults,
            "teacher.model",
            lambda: check_output(self.teacher.build(data.image_shape, data.num_classes), images, data.num_classes),
        )
        if faults:
            raise ConfigError(faults)


def assemble(config: DictConfig) -> Experiment:
    """Build and validate every part that does not depend on the images; nothing is loaded or trained.

    Raises:
        ConfigError: listing every fault of every part.
    """
    faults: list[str] = []

    def part(key: str, cls: Any) -> Any:
        return collect(faults, key, lambda: build(cls, options(config[key])))

    data = part("data", DataConfig)
    trainer = part("trainer", TrainerConfig)
    teacher = collect(faults, "teacher", lambda: _teacher(config.teacher))
    student = collect(faults, "student", lambda: _instantiate(config.student))
    boosting = collect(faults, "boosting", lambda: _boosting(config.boosting))
    if student is not None:
        rounds = config.boosting.rounds  # read here, to be checked even where another boosting option is at fault
        faults += [f"student.{fault}" for fault in student.faults(rounds if isinstance(rounds, int) else 1)]
    if not isinstance(config.seed, int) or config.seed < 0:
        faults.append(f"seed={config.seed!r}: must be a whole number of at least 0")
    if config.threads is not None and (not isinstance(config.threads, int) or config.threads < 1):
        faults.append(f"threads={config.threads!r}: must be null or a whole number of at least 1")
    if faults:
        raise ConfigError(faults)
    return Experiment(data, teacher, student, boosting, trainer)  # type: ignore[arg-type]


def _teacher(config: DictConfig) -> TeacherConfig:
    given = options(config)
    faults: list[str] = []
    trainer = collect(faults, "trainer", lambda: build(TrainerConfig, options(config.trainer)))
    check = getattr(getattr(given["model"], "func", None), "faults", None)
    if check is not None:
        faults += [f"model.{fault}" for fault in check(given["model"].keywords, None)]
    if faults:
        raise ConfigError(faults)
    return build(TeacherConfig, {**given, "trainer": trainer})


def _boosting(config: DictConfig) -> BoostingConfig:
    faults: list[str] = []
    given = options(config)
    weak = collect(faults, "weak_learner", lambda: build(WeakLearnerConfig, given.pop("weak_learner", {})))
    try:
        boosting = build(BoostingConfig, {**given, "weak_learner": weak or WeakLearnerConfig()})
    except ConfigError as error:
        raise ConfigError(faults + error.faults) from error
    if faults:
        raise ConfigError(faults)
    return boosting


def options(config: DictConfig) -> dict[str, Any]:
    """The entries of a node as Python values, those with a `_target_` instantiated.

    Raises:
        ConfigError: where an interpolation or a `_target_` fails.
    """
    found: dict[str, Any] = {}
    faults: list[str] = []
    for key in config:
        name = str(key)
        try:
            value = config[name]
            if isinstance(value, DictConfig) and "_target_" in value:
                found[name] = _instantiate(value)
            elif isinstance(value, (DictConfig, ListConfig)):
                found[name] = OmegaConf.to_container(value, resolve=True)
            else:
                found[name] = value
        except OmegaConfBaseException as error:
            faults.append(f"{name}: {str(error).splitlines()[0]}")
        except ConfigError as error:
            faults += [f"{name}: {fault}" for fault in error.faults]
    if faults:
        raise ConfigError(faults)
    return found


def _instantiate(config: DictConfig) -> Any:
    try:
        return instantiate(config)
    except HydraException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise ConfigError([" ".join(str(error).splitlines()[:2])]) from error  # the second line is the cause
    except OmegaConfBaseException as error:
        raise ConfigError([str(error).splitlines()[0]]) from error


def open_tracker(config: DictConfig, directory: Path) -> Tracker:
    """The tracker of a run in `directory`, whose stages are grouped by the directory's name.

    Raises:
        ConfigError: where `config.logger` has options the tracker does not know.
    """
    make = _instantiate(config.logger)
    try:
        tracker: Tracker = make(directory, group=directory.name, config=OmegaConf.to_container(config, resolve=True))
    except TypeError as error:
        raise ConfigError([f"logger: {error}"]) from error
    return tracker
