"""From a composed configuration to the parts of an experiment, with every fault of it found at once."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from pkd_lightning import ranks
from pkd_lightning.boosting.combine import combination_of
from pkd_lightning.boosting.objectives import Objective, RoundBatch, objective_of
from pkd_lightning.boosting.options import BoostingConfig, WeakLearnerConfig
from pkd_lightning.boosting.peers import peer_loss_of, peer_rungs
from pkd_lightning.boosting.weak_learner import faults_without_teacher
from pkd_lightning.checkpoint import not_finite
from pkd_lightning.checks import build, collect, under, unknown_keys
from pkd_lightning.composition import complete, mapping, no_teacher, top_level_faults
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.earlier import Following, following, reads
from pkd_lightning.errors import ConfigError, Pruned
from pkd_lightning.knowledge.attached import Knowledge, example, for_models, try_losses
from pkd_lightning.knowledge.fitnet import FitNet
from pkd_lightning.knowledge.term import Term
from pkd_lightning.loggers import About, NoTracker, SilentTracker, Tracker
from pkd_lightning.models.building import path_of
from pkd_lightning.models.ladder import Ladder
from pkd_lightning.outputs import NONE, Taps
from pkd_lightning.results import OBJECTIVE
from pkd_lightning.teacher import TeacherConfig
from pkd_lightning.teachers.options import SEVERAL, C, TeachersConfig, is_several, teachers_of
from pkd_lightning.teachers.trying import try_teacher, try_teachers
from pkd_lightning.trainer import TrainerConfig
from pkd_lightning.trial import try_model

T = TypeVar("T")
TORCH_THREADS = torch.get_num_threads()  # before any run sets them

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """The validated parts of an experiment; without a teacher, that part is None."""

    data: DataConfig
    teacher: TeacherConfig | TeachersConfig | None
    student: Ladder
    boosting: BoostingConfig
    trainer: TrainerConfig

    def check(self, data: DataModule) -> None:
        """Try what depends on the inputs: the teacher, every rung, augmentation, the round loss and the combination.

        Of a model everything is tried that will be done to it, see `try_model`.

        Raises:
            ConfigError: listing every fault.
        """
        logger.info("trying the models on two samples")
        rounds = (
            1 if self.boosting.grow_from else self.boosting.rounds
        )  # a source's rounds need no rungs of this ladder
        faults = under("student", self.student.faults(rounds, data.task.input_shape))
        inputs = data.task.prepare(data.inputs[[0, 0]])
        attempt = partial(try_model, inputs=inputs, num_classes=data.num_classes, samples=len(data.training))
        for index in range(0 if faults else len(self.student)):
            name, rungs = f"student.rungs.{index}", range(index + 1)
            collect(faults, name, partial(attempt, name, partial(self._student, data, rungs), trainer=self.trainer))
            build = partial(self._student, data, [*rungs, index])  # after one of its own rung
            if self.student.repeat and not faults and isinstance(build(), Following):
                collect(faults, name, partial(attempt, name, build, trainer=self.trainer))
        teacher: nn.Module | None = None
        if isinstance(self.teacher, TeachersConfig):
            teacher = try_teachers(self.teacher, data, attempt, faults)
        elif self.teacher is not None:
            teacher = try_teacher(self.teacher, data, attempt, faults)
        if self.data.augment is not None:
            collect(faults, "data", lambda: self._try_augmentation(data))
        if self.boosting.peers is None:
            self._try_round(data, inputs, teacher, faults)
        elif not faults:
            collect(faults, "boosting", lambda: self._try_peers(data, inputs))
        collect(faults, "boosting", self._try_combination)
        if faults:
            raise ConfigError(faults)

    def _student(self, data: DataModule, rungs: Sequence[int]) -> nn.Module:
        """A new student of the last of `rungs`; where it reads earlier ones, together with one of each rung before."""

        @cache
        def earlier() -> list[nn.Module]:
            students: list[nn.Module] = []
            for rung in rungs[:-1]:
                students.append(self.student.build(rung, data.task.input_shape, data.num_classes, lambda: students))
            return students

        model = self.student.build(rungs[-1], data.task.input_shape, data.num_classes, earlier)
        return following(model, earlier() if reads(model) else ())

    def _try_augmentation(self, data: DataModule) -> None:
        raw = data.inputs[[0, 0]]
        found: Any = None
        with reported("augment"):
            assert self.data.augment is not None
            found = self.data.augment(raw.clone(), torch.Generator().manual_seed(0))
        if getattr(found, "shape", None) != raw.shape:
            raise ConfigError([f"augment: gives no tensor of the inputs' shape {tuple(raw.shape)}"])

    def _try_round(self, data: DataModule, inputs: torch.Tensor, teacher: nn.Module | None, faults: list[str]) -> None:
        """The round loss, once, or for each rung where it needs features, and the combination."""
        objective, classes = objective_of(self.boosting), data.num_classes
        with_features = bool(objective.student_features or objective.teacher_features)
        for index in range(len(self.student) if with_features else 1):
            if with_features and faults:  # models that cannot be built have no features
                break

            def attempt(rung: int = index) -> None:
                of_student, of_teacher = NONE, NONE
                if with_features:
                    assert teacher is not None  # or there are faults
                    student = self._student(data, range(rung + 1))
                    of_student = features(student, objective, "student_features", inputs)
                    with torch.no_grad():
                        of_teacher = features(teacher, objective, "teacher_features", inputs)
                self._try_loss(objective, classes, of_student, of_teacher)

            collect(faults, "boosting", attempt)
        for index in range(len(self.student) if self.boosting.knowledge and not faults else 0):
            collect(faults, "boosting.knowledge", partial(self._try_knowledge, data, inputs, teacher, index))

    def _try_knowledge(self, data: DataModule, inputs: torch.Tensor, teacher: nn.Module | None, rung: int) -> None:
        """The terms of knowledge, once, with a student of a rung."""
        asked = self._student(data, range(rung + 1))
        own = asked.model if isinstance(asked, Following) else asked
        terms = for_models(self.boosting.knowledge, own, teacher)
        pair = example(terms, own, asked, teacher, inputs, data.num_classes)
        try_losses(Knowledge(terms, pair, len(data.training)), pair)

    def _try_peers(self, data: DataModule, inputs: torch.Tensor) -> None:
        """What peers learn from each other, and that none reads earlier students."""
        rungs = sorted(set(peer_rungs(self.student, self.boosting.rounds)))
        reading = [rung for rung in rungs if isinstance(self._student(data, range(rung + 1)), Following)]
        if reading:
            raise ConfigError(
                [f"peers={self.boosting.peers!r}: the students of student.rungs.{reading[0]} read earlier ones, and"
                 " peers have none; choose another ladder, or peers=null"]
            )  # fmt: skip
        make = peer_loss_of(self.boosting)
        assert make is not None
        logits = torch.zeros(2, len(inputs), data.num_classes, requires_grad=True)
        shapes: list[Any] = []
        with reported("peers"):
            peer_loss = make(2, data.num_classes, self.boosting.temperature)
            shapes = [part.shape for part in peer_loss(logits, torch.zeros(len(inputs), dtype=torch.int64))]
        if shapes != [(2,), ()]:
            raise ConfigError(["peers: gives no loss of each peer, and one that they share"])

    def _try_loss(
        self,
        objective: Objective,
        classes: int,
        of_student: Mapping[str, torch.Tensor],
        of_teacher: Mapping[str, torch.Tensor],
    ) -> None:
        logits = torch.zeros(3, 2, classes, requires_grad=True)
        batch = RoundBatch(
            logits[0], logits[1], logits[2].detach(), torch.zeros(2, dtype=torch.int64),
            torch.ones(2, classes, dtype=torch.bool), 1.0,
            torch.ones(2) if self.boosting.weights == "samples" else None, of_student, of_teacher,
        )  # fmt: skip
        loss: Any = None
        with reported("objective"):
            loss = objective.loss(batch)
        if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
            raise ConfigError(["objective: its loss is not a scalar tensor"])

    def _try_combination(self) -> None:
        with reported("combine"):
            a, c = combination_of(self.boosting).initial(1)
            if not (a > 0 and c > 0 and math.isfinite(a + c)):
                raise ValueError(f"initial(1) gives ({a}, {c}), not two positive numbers")


def features(model: nn.Module, objective: Objective, key: str, inputs: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """What the modules of a model, of one that follows others its own, at the objective's `key` give for inputs.

    Raises:
        ConfigError: where it has no such modules.
    """
    own = model.model if isinstance(model, Following) else model
    try:
        with Taps(own, getattr(objective, key)) as taps:
            return taps.call(model, inputs).features
    except ConfigError as error:
        raise ConfigError(under(f"objective.{key}", error.faults)) from error


@contextmanager
def reported(key: str) -> Iterator[None]:
    """Turn whatever the user's code at `key` raises into a fault."""
    try:
        yield
    except Exception as error:
        raise ConfigError([f"{key}: fails ({type(error).__name__}: {error})"]) from error


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
    options_ = ("checkpoint", "online", *SEVERAL)
    faults = unknown_keys(given, [field.name for field in fields(TeacherConfig)] + [*SEVERAL])
    cure = "there is no teacher, its model is null; choose one, teacher=NAME"
    faults += [f"{key}={given[key]!r}: {cure}" for key in options_ if given.get(key)]
    if faults:
        raise ConfigError(faults)


def _teacher(config: DictConfig) -> TeacherConfig | TeachersConfig | None:
    if not is_several(config) and no_teacher(config):
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
    found = {str(name): collect(faults, str(name), partial(_term, one)) for name, one in config.items()}
    if faults:
        raise ConfigError(faults)
    return found  # type: ignore[return-value]


def _term(config: Any) -> Term:
    made = _instantiate(config) if isinstance(config, DictConfig) and "_target_" in config else None
    if not isinstance(made, Term):
        raise ConfigError([f"is no term; `_target_` must be one, such as {path_of(FitNet)}"])
    return made


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
        raise ConfigError([" ".join(str(error).splitlines()[:2])]) from error  # the second line is the cause
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
