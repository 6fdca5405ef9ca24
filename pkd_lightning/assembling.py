"""From a composed configuration to the parts of an experiment, with every fault of it found at once."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from pkd_lightning import ranks
from pkd_lightning.boosting.combine import combination_of
from pkd_lightning.boosting.objectives import objective_of
from pkd_lightning.boosting.options import BoostingConfig, WeakLearnerConfig
from pkd_lightning.boosting.peers import peer_loss_of
from pkd_lightning.boosting.weak_learner import faults_without_teacher
from pkd_lightning.checkpoint import not_finite
from pkd_lightning.checks import build, collect, under, unknown_keys
from pkd_lightning.composition import NAME, complete, mapping, no_teacher, top_level_faults
from pkd_lightning.data.module import DataConfig
from pkd_lightning.errors import ConfigError, Pruned
from pkd_lightning.experiment import Experiment
from pkd_lightning.knowledge.fitnet import FitNet
from pkd_lightning.knowledge.term import Term
from pkd_lightning.loggers import About, NoTracker, SilentTracker, Tracker
from pkd_lightning.models.building import path_of
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.results import OBJECTIVE
from pkd_lightning.teacher import TeacherConfig
from pkd_lightning.teachers.options import SEVERAL, C, TeachersConfig, is_several, teachers_of
from pkd_lightning.trainer import TrainerConfig

T = TypeVar("T")


def assemble(config: DictConfig) -> Experiment:
    """Build and validate every part that does not depend on the inputs; nothing is loaded or trained.

    Raises:
        ConfigError: listing every fault of every part.
    """
    config = complete(config)
    faults = top_level_faults(config)

    def part(key: str, make: Callable[[DictConfig], T]) -> T | None:
        node = mapping(config, key)  # what is missing is among the faults already
        return None if node is None else collect(faults, key, lambda: make(node))

    data = part("data", lambda node: build(DataConfig, options(node)))
    trainer = part("trainer", lambda node: build(TrainerConfig, options(node)))
    teacher = part("teacher", _teacher)
    student = part("student", _ladder)
    boosting = part("boosting", _boosting)
    part("logger", _tracker)
    if trainer is not None and teacher is not None:
        each = teacher.first | teacher.chain if isinstance(teacher, TeachersConfig) else {"teacher": teacher}
        for option, key in product(each, ("devices", "num_nodes", "strategy")):
            given = getattr(each[option].trainer, key)
            if given != getattr(trainer, key):
                faults.append(f"{option}.trainer.{key}={given}: is that of the run; set trainer.{key}")
    if boosting is not None and no_teacher(mapping(config, "teacher") or {}):
        faults += under("boosting", faults_without_teacher(boosting))
    if student is not None:
        rounds = OmegaConf.select(config, "boosting.rounds")  # checked even where another boosting option is at fault
        if OmegaConf.select(config, "boosting.grow_from") is not None:
            rounds = 1
        faults += under("student", student.faults(rounds if isinstance(rounds, int) else 1))
    if faults:
        raise ConfigError(faults)
    return Experiment(data, teacher, student, boosting, trainer)  # type: ignore[arg-type]


def _ladder(config: DictConfig) -> Ladder:
    faults = unknown_keys([str(key) for key in config if str(key)[0] != "_"], inspect.signature(Ladder).parameters)
    ladder = None if faults else _instantiate(config)
    if faults:
        raise ConfigError(faults)
    if not isinstance(ladder, Ladder):
        raise ConfigError(["_target_: must be pkd_lightning.models.ladder.Ladder, without `_partial_`"])
    return ladder


def _tracker(config: DictConfig) -> Callable[..., Tracker]:
    make = _callable(config)
    target, given = getattr(make, "func", make), getattr(make, "keywords", {})
    known = [name for name in inspect.signature(target).parameters if name not in ("directory", "about", "config")]
    faults = unknown_keys(given, known)
    if faults:
        raise ConfigError(faults)
    return make


def _check_no_teacher(config: DictConfig) -> None:
    """Check the options of a teacher that is none."""
    given = {key: value for key, value in options(config).items() if key not in ("model", "trainer")}
    if given.get("generations"):  # which the assistants are made of
        given.pop("assistants", None)
    options_ = ("checkpoint", "online", *SEVERAL)
    faults = unknown_keys(given, [field.name for field in fields(TeacherConfig)] + [*SEVERAL])
    cure = "there is no teacher, its model is null; choose one, teacher=NAME"
    faults += [f"{key}={given[key]!r}: {cure}" for key in options_ if given.get(key)]
    if faults:
        raise ConfigError(faults)


def _teacher(config: DictConfig) -> TeacherConfig | TeachersConfig | None:
    if no_teacher(config) and not config.get("members"):
        _check_no_teacher(config)
        return None
    return teachers_of(config, _classifier) if is_several(config) else _classifier(TeacherConfig, config, SEVERAL)


def _classifier(cls: type[C], config: DictConfig, without: Sequence[str] = ()) -> C:
    given = options(config, without)
    faults: list[str] = []
    trainer = collect(faults, "trainer", lambda: build(TrainerConfig, options(config.get("trainer"))))
    check = getattr(getattr(given.get("model"), "func", None), "faults", None)
    if check is not None:
        faults += under("model", check(given["model"].keywords, None))
    if isinstance(config.get("model"), DictConfig):  # results.json holds its options, and JSON has no infinity
        for fault in not_finite(OmegaConf.to_container(config.model, resolve=True), "model"):
            place, value = fault.replace("[", ".").replace("]", "").split(" is ")
            faults.append(f"{place}={value}: must be finite")
    if faults:
        raise ConfigError(faults)
    return build(cls, {**given, "trainer": trainer})


def _boosting(config: DictConfig) -> BoostingConfig:
    faults: list[str] = []
    given = options(config)
    objective = config.get("objective")
    if "knowledge" in given:
        given["knowledge"] = collect(faults, "knowledge", lambda: _terms(config.knowledge))
    if isinstance(objective, DictConfig):
        given["objective"] = collect(faults, "objective", lambda: _instantiate(objective, _partial_=True))
    weak = collect(faults, "weak_learner", lambda: build(WeakLearnerConfig, given.pop("weak_learner", {})))
    named = {key: given[key] for key in ("objective", "combine") if given.get(key) is not None}
    boosting = BoostingConfig(**named)  # whose names are looked at, whatever else is wrong
    try:
        boosting = build(BoostingConfig, {**given, "weak_learner": weak or WeakLearnerConfig()})
    except ConfigError as error:
        faults += error.faults
    for part in (objective_of, combination_of, peer_loss_of):
        try:
            part(boosting)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return boosting


def _terms(config: Any) -> dict[str, Term]:
    """The terms of a mapping by name."""
    if not isinstance(config, Mapping):
        raise ConfigError([f"must be terms by name, not {config!r}"])
    faults: list[str] = []
    if OBJECTIVE in config:  # its share of the gradient would be taken for the objective's
        faults.append(f"{OBJECTIVE}: is the name of the objective in metrics.jsonl; give the term another name")
    faults += [
        f"{name}: cannot be a name; take a word that is no attribute of torch modules"
        for name in map(str, config)
        if not NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name)
    ]
    found = {str(name): collect(faults, str(name), partial(_term, one)) for name, one in config.items()}
    if faults:
        raise ConfigError(faults)
    return found  # type: ignore[return-value]


def _term(config: Any) -> Term:
    given = isinstance(config, DictConfig) and "_target_" in config
    if given and isinstance(config.get("schedule"), DictConfig) and "_target_" in config.schedule:
        faults: list[str] = []
        if collect(faults, "schedule", lambda: _callable(config.schedule)) is None:
            raise ConfigError(faults)
    made = _instantiate(config, _partial_=True) if given else None
    kind = getattr(made, "func", None)
    if not (isinstance(kind, type) and issubclass(kind, Term)):
        raise ConfigError([f"is no term; `_target_` must be one, such as {path_of(FitNet)}"])
    return build(kind, made.keywords)  # type: ignore[union-attr]


def options(config: DictConfig, without: Sequence[str] = ()) -> dict[str, Any]:
    """The entries of a node as Python values, those with a `_target_` instantiated: to something that can be called.

    Keys of `without` are left out.

    Raises:
        ConfigError: where an interpolation or a `_target_` fails.
    """
    if not isinstance(config, DictConfig):
        raise ConfigError([f"must be a mapping of options, not {config!r}"])
    found: dict[str, Any] = {}
    faults: list[str] = []
    for key in config:
        name = str(key)
        if name in without:
            continue
        try:
            value = config[name]
            if isinstance(value, DictConfig) and "_target_" in value:
                found[name] = _callable(value) if name != "objective" else value
            elif isinstance(value, ListConfig) and any(
                "_target_" in one for one in value if isinstance(one, DictConfig)
            ):
                found[name] = [_instantiate(one, _partial_=True) for one in value]
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


def _callable(config: DictConfig) -> Callable[..., Any]:
    hint = "" if config.get("_partial_") else "; it is called later, with more arguments: is `_partial_: true` missing?"
    try:
        made = _instantiate(config)
    except ConfigError as error:
        raise ConfigError([fault + hint * ("argument" in fault) for fault in error.faults]) from error
    if not callable(made):
        raise ConfigError([f"gives a {type(made).__name__}, which cannot be called{hint}"])
    return made  # type: ignore[no-any-return]


def _instantiate(config: DictConfig, **settings: bool) -> Any:
    try:
        return instantiate(config, **settings)
    except HydraException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        said = " ".join(str(error).splitlines()[:2])  # the second line is the cause, but of what is not found
        if error.__cause__ is not None and "HYDRA_FULL_ERROR" in said:
            said = f"{said.split(', set env var')[0]} ({' '.join(str(error.__cause__).split())})"
        raise ConfigError([said]) from error
    except OmegaConfBaseException as error:
        raise ConfigError([str(error).splitlines()[0]]) from error


@contextmanager
def open_tracker(config: DictConfig, directory: Path, about: About) -> Iterator[Tracker]:
    """The tracker of a run in `directory`, closed at the end of the block, however that ends.

    Raises:
        ConfigError: where the tracker refuses the options of `config.logger`.
    """
    make: Callable[..., Tracker] = _tracker(config.logger)
    if not ranks.first() and getattr(make, "func", make) is not NoTracker:
        make = SilentTracker
    tracker = make(directory, about=about, config=OmegaConf.to_container(complete(config), resolve=True))
    failed = True
    try:
        yield tracker
        failed = False
    except Pruned:
        failed = False
        raise
    finally:
        tracker.close(failed)
