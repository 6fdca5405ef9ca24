"""Options of several teachers, and of the assistants between a teacher and the students."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

from omegaconf import DictConfig, OmegaConf

from pkd_lightning.checks import Faults, collect, suggest, unknown_keys
from pkd_lightning.composition import GENERATIONS, NAME, mapping
from pkd_lightning.errors import ConfigError
from pkd_lightning.teacher import TeacherConfig
from pkd_lightning.teachers.combining import CombinedTeacher

COMBINE = ("mean", "confidence", "cross_entropy")
SEVERAL = ("members", "combine", "assistants", "generations")  # options that a teacher of one model has not
T = TypeVar("T")
C = TypeVar("C", bound=TeacherConfig)


@dataclass(frozen=True)
class MemberConfig(TeacherConfig):
    """One of several teachers, with what a single one has, but for `online`, which is that of all.

    Attributes:
        seed: of its training; None: that of the run. Members of one model and trainer differ by their seeds.
    """

    seed: int | None = None

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.whole("seed", 0, optional=True)
        if self.online is not False:
            faults.found.append("online: is that of all members; set teacher.online")
        if self.checkpoint is not None and not isinstance(self.checkpoint, str):
            faults.found.append(f"checkpoint={self.checkpoint!r}: must be a path")
        else:
            _gather(faults.found, super().__post_init__)
        faults.raise_if_any()


@dataclass(frozen=True)
class AssistantConfig(TeacherConfig):
    """A model between the teacher and the students, trained by `distillation_loss` of what stands before it.

    Teacher assistants (Mirzadeh et al., arXiv 1902.03393). One of the teacher's own model is a born-again generation
    (Furlanello et al., arXiv 1805.04770).

    Attributes:
        alpha: weight of the hard loss.
        temperature: of the soft loss. Both are those of `boosting` unless they are given.
    """

    alpha: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.number("alpha", 0, 1)
        faults.number("temperature", 0, exclusive=True)
        if self.online is not False:
            faults.found.append("online: is that of the whole chain; set teacher.online")
        if self.checkpoint is not None:
            faults.found.append("checkpoint: an assistant is trained here; one that is trained is a teacher")
        else:
            _gather(faults.found, super().__post_init__)
        faults.raise_if_any()


def _gather(faults: list[str], make: Callable[[], T]) -> T | None:
    """Call `make`; on a `ConfigError` add its faults to `faults` and return None."""
    try:
        return make()
    except ConfigError as error:
        faults += error.faults
        return None


@dataclass(frozen=True)
class TeachersConfig:
    """Whoever teaches the students, where that is not one model alone.

    Attributes:
        teacher: the only teacher, where there are no members.
        members: several teachers by name, in their order.
        combine: how they are one: `mean`, `confidence`, `cross_entropy`, or a weight for each name (see `log_weights`).
            Weights are relative: 7 and 3 are 0.7 and 0.3.
        assistants: by name, in the order of the chain. The last one teaches the students.
        online: see `TeacherConfig`; of the assistants' teachers, too.
    """

    teacher: TeacherConfig | None = None
    members: Mapping[str, MemberConfig] = field(default_factory=dict)
    combine: str | Mapping[str, float] = "mean"
    assistants: Mapping[str, AssistantConfig] = field(default_factory=dict)
    online: bool = False

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.flag("online")
        if (self.teacher is None) != bool(self.members):
            faults.found.append("members: there is one teacher, or there are members")
        faults.found += _combine_faults(self.combine, list(self.members))
        faults.raise_if_any()

    @property
    def first(self) -> dict[str, TeacherConfig]:
        """The only teacher or the members, each by its option's name."""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {f"teacher.members.{name}": member for name, member in self.members.items()}

    @property
    def chain(self) -> dict[str, AssistantConfig]:
        """The assistants, each by its option's name."""
        return {f"teacher.assistants.{name}": assistant for name, assistant in self.assistants.items()}


def _combine_faults(combine: Any, names: Sequence[str]) -> list[str]:
    if not isinstance(combine, Mapping):
        found = Faults(SimpleNamespace(combine=combine))
        found.choice("combine", COMBINE)
        return [f"{fault} Or a mapping of members to weights" for fault in found.found]
    faults = [f"combine.{name}: no such member.{suggest(str(name), names)}" for name in combine if name not in names]
    faults += [f"combine: member {name!r} has no weight" for name in names if name not in combine]
    for name, weight in combine.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if name in names and not (number and 0 < weight < math.inf):
            faults.append(f"combine.{name}={weight!r}: must be a number above 0; weights are relative")
    return faults


class ModelOf(Protocol):
    """Builds the options of one model from its node, without some keys."""

    def __call__(self, cls: type[C], config: DictConfig, without: Sequence[str] = ()) -> C:
        """See the class.

        Raises:
            ConfigError: for every fault of the node.
        """


def is_several(node: DictConfig) -> bool:
    """Whether a teacher's node has options that only several models have."""
    raw: Any = OmegaConf.to_container(node)
    return "members" in raw or "combine" in raw or bool(raw.get("assistants")) or raw.get("generations", 0) != 0


def teachers_of(node: DictConfig, model_of: ModelOf) -> TeachersConfig:
    """The options of a teacher's node that `is_several`.

    Raises:
        ConfigError: for every fault.
    """
    combine: Any = node.get("combine", "mean")
    combine = OmegaConf.to_container(combine, resolve=True) if OmegaConf.is_config(combine) else combine
    members: dict[str, MemberConfig] = {}
    teacher = None
    faults = _generations_faults(node)
    if "members" in node:
        faults += _alone_faults(node)
        members = _named(node, "members", MemberConfig, model_of, faults)
        names = list(mapping(node, "members") or ())
        faults += _combine_faults(combine, list(map(str, names))) if names else ["members: is empty; name one or more"]
    else:
        if "combine" in node:
            faults.append("combine: is of several teachers, and there are no members")
        teacher = _gather(faults, lambda: model_of(TeacherConfig, node, SEVERAL))
    assistants = _named(node, "assistants", AssistantConfig, model_of, faults) if node.get("assistants") else {}
    if faults:
        raise ConfigError(faults)
    return TeachersConfig(teacher, members, combine, assistants, node.get("online", False))


def _generations_faults(node: DictConfig) -> list[str]:
    count = node.get("generations", 0)
    if type(count) is not int or not 0 <= count <= GENERATIONS:
        return [f"generations={count!r}: must be a whole number from 0 to {GENERATIONS}"]
    if count and "members" in node:
        return [f"generations={count}: are of a teacher's own model, and several have none; name assistants"]
    return []


def _alone_faults(node: DictConfig) -> list[str]:
    """Faults of what a single teacher has beside members."""
    advice = "is of a single teacher; where there are members, each has its own"
    given = [key for key in ("model", "checkpoint", "seed") if node.get(key) is not None]
    faults = [f"{key}: {advice}, teacher.members.NAME.{key}" for key in given]
    trainer: Any = node.get("trainer") or {}
    faults += [f"trainer.{key}: {advice}, teacher.members.NAME.trainer.{key}" for key in trainer]
    known = (*SEVERAL, "model", "checkpoint", "seed", "trainer", "online")
    return faults + unknown_keys([str(key) for key in node if str(key) not in known], [*SEVERAL, "online"])


def _named(node: DictConfig, key: str, cls: type[C], model_of: ModelOf, faults: list[str]) -> dict[str, C]:
    """The models below `key`, each with a name that can be a module's."""
    nodes = mapping(node, key)
    if nodes is None:
        faults.append(f"{key}: must be a mapping of names to models")
        return {}
    found = {}
    for name in map(str, nodes):
        if not NAME.fullmatch(name) or name.startswith("_") or hasattr(CombinedTeacher({}), name):
            faults.append(f"{key}: {name!r} cannot be a name; take a word that is no attribute of torch modules")
            continue
        model = collect(faults, f"{key}.{name}", partial(_model, nodes, name, cls, model_of))
        if model is not None:
            found[name] = model
    return found


def _model(nodes: DictConfig, name: str, cls: type[C], model_of: ModelOf) -> C:
    node = mapping(nodes, name)
    if node is None:
        raise ConfigError(["must be a mapping of a model's options"])
    return model_of(cls, node)
