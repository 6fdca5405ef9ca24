"""The whole of a composed configuration, what must stand at its top, and what a misspelt option may have meant."""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from pkd_lightning.checks import Faults

PARTS = ("data", "teacher", "student", "boosting", "trainer", "logger")
SETTINGS = ("name", "seed", "run_root", "threads")
PATHS = ("data.root", "teacher.checkpoint")  # null, or a path
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # what an interpolation can name
GENERATIONS = 100  # of a teacher, at most
SHARED = ("lr", "weight_decay")  # what optimisers of any kind have; where the teacher's own are null, it has none
PACKAGE = "the file's first line must be `# @package _global_`"


def complete(config: DictConfig) -> DictConfig:
    """A copy of `config` with the whole of `teacher.trainer`: every option of the students', except the teacher's own.

    Its optimiser and its schedule are merged with the students' where they are the same `_target_`. Another schedule is
    the teacher's alone, another optimiser has the students' learning rate and weight decay. What is inherited is an
    interpolation, `${trainer.batch_size}`. A `teacher.trainer` that is whole, as in a run's config.yaml, stays as it
    is; one that is no mapping does, too, for `assemble` to name. The trainers of `models_of` a teacher are completed in
    the same way. Assistants have `alpha` and `temperature` of `boosting`, generations are assistants.
    """
    whole = copy.deepcopy(config)
    generations = _with_generations(whole)
    for place in models_of(whole):
        model = mapping(whole, place)
        if model is not None:
            own_generation = place in generations
            with read_write(whole), open_dict(whole):
                if place != "teacher" and "trainer" not in model:
                    model.trainer = {}
                if place.startswith("teacher.assistants."):
                    for name in ("alpha", "temperature"):
                        if name not in model and name in (mapping(whole, "boosting") or ()):
                            model[name] = f"${{boosting.{name}}}"
                _complete_trainer(whole, model, "teacher.trainer" if own_generation else "trainer")
    return whole


def models_of(config: DictConfig) -> list[str]:
    """Where `config` has the teacher's models: `teacher`, or its members, then its assistants in their order."""
    teacher = mapping(config, "teacher")
    several = teacher is not None and "members" in teacher
    members, assistants = (
        [f"teacher.{group}.{name!s}" for name in mapping(config, f"teacher.{group}") or ()]
        for group in ("members", "assistants")
    )
    return [*(members if several else ["teacher"]), *assistants]


def _with_generations(whole: DictConfig) -> set[str]:
    """Put `teacher.generations` before the assistants, as the assistants they are; returns where they stand."""
    teacher, count = mapping(whole, "teacher"), _value(whole, "teacher.generations", [])
    if teacher is None or "members" in teacher or type(count) is not int or not 0 < count <= GENERATIONS:
        return set()
    given = mapping(teacher, "assistants")
    others: Any = {} if given is None else OmegaConf.to_container(given)
    if not all(isinstance(other, dict) for other in others.values()):
        return set()  # for `assemble` to name
    names = [f"generation_{number}" for number in range(1, count + 1)]
    generations = {name: {"model": "${teacher.model}", "trainer": {}} | others.pop(name, {}) for name in names}
    with read_write(whole), open_dict(whole):
        teacher.assistants = {**generations, **others}
    return {f"teacher.assistants.{name}" for name in names}


def _complete_trainer(whole: DictConfig, model: DictConfig, source: str) -> None:
    """Complete `model.trainer` by the options that `whole` has at `source`."""
    students, own = mapping(whole, source), mapping(model, "trainer")
    if students is None or own is None or OmegaConf.is_interpolation(model, "trainer"):
        return
    made: Any = OmegaConf.to_container(own)
    if not (students.keys() <= own.keys() and {"_target_", "_partial_"} <= set(mapping(own, "optimizer") or ())):
        made = _inherited(source, students, made)
        for key, shared in (("optimizer", SHARED), ("schedule", ())):
            theirs, its = mapping(students, key), mapping(own, key)
            if theirs is not None and its is not None and isinstance(made[key], dict):
                same = _value(its, "_target_", []) in (None, _value(theirs, "_target_", []))
                names = [name for name in theirs if same or name in ("_partial_", *shared)]
                made[key] = _inherited(f"{source}.{key}", names, made[key])
    if isinstance(made.get("optimizer"), dict):
        for name in SHARED:
            if made["optimizer"].get(name, ...) is None:
                del made["optimizer"][name]
    model.trainer = made


def _inherited(place: str, names: Iterable[Any], own: Mapping[Any, Any]) -> dict[Any, Any]:
    """`own`, and for each name of `names` that is not in it an interpolation of what stands at `place`."""
    return {name: f"${{{place}.{name}}}" for name in names if NAME.fullmatch(str(name))} | dict(own)


def no_teacher(teacher: Mapping[Any, Any]) -> bool:
    """Whether the options of a teacher say that there is none, as those of `teacher=none` do: its model is null."""
    return "model" in teacher and teacher["model"] is None


def mapping(config: DictConfig, key: str) -> DictConfig | None:
    """The options that `config` holds at `key`; None where there are none, or where that cannot be told."""
    found = _value(config, key, [])
    return found if isinstance(found, DictConfig) else None


def top_level_faults(config: DictConfig) -> list[str]:
    """Faults of what stands at the top of `config`: unknown, missing, impossible. Into its parts is not looked."""
    raw: Any = OmegaConf.to_container(config)
    faults = [fault for key in raw if key not in (*PARTS, *SETTINGS) for fault in _unknown(str(key), raw)]
    for key in PARTS:
        if not isinstance(_value(config, key, faults), DictConfig):
            faults.append(f"{key}: is missing; choose one of its group, {key}=NAME (--help lists them)")
        elif key in raw and key in raw[key]:
            faults.append(f"{key}.{key}: a file of this group that names `{key}:` is not read as meant; {PACKAGE}")
    missing = [key for key in SETTINGS if raw.get(key, "???") == "???"]
    faults += [f"{key}: is missing; a file that is chosen sets it, or {key}=VALUE" for key in missing]
    given = {key: _value(config, key, faults) for key in (*SETTINGS, *PATHS) if key not in missing}
    found = Faults(SimpleNamespace(**given))
    if "seed" in given:
        found.whole("seed", 0)
    if "threads" in given:
        found.whole("threads", 1, optional=True)
    name = given.get("name", "missing")
    if type(name) not in (str, int) or not re.fullmatch(r"\w[\w.-]*", str(name)):
        found.found.append(f"name={name!r}: must be a folder's name of letters, digits, '_', '-' and '.'")
    elif name in ("latest", "teachers"):
        found.found.append(f"name={name!r}: is kept for what lies beside experiments; choose another name")
    for key in {"run_root", *PATHS} & given.keys():
        if not isinstance(given[key], str) and not (given[key] is None and key in PATHS):
            found.found.append(f"{key}={given[key]!r}: must be a path")
    return faults + found.found


def _value(config: DictConfig, key: str, faults: list[str]) -> Any:
    """What `config` holds at `key`, None where that is missing or cannot be told."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        faults.append(f"{key}: {str(error).splitlines()[0]}")
        return None


def _unknown(key: str, raw: dict[Any, Any]) -> list[str]:
    """The fault of a key that is no option."""
    if key == "experiment":
        return [f"experiment: the settings of the chosen file would be ignored; {PACKAGE}"]
    if f"${{{key}}}" in str(raw) or f"${{{key}." in str(raw):
        return []  # the user's own variable, which other options read
    return [f"{key}: no such option.{did_you_mean(key, option_names(raw) - {key})}"]


def without_bars(config: DictConfig) -> DictConfig:
    """`config` for a job of several that share the terminal: no fit shows its progress."""
    for key in ("trainer", *(f"{place}.trainer" for place in models_of(config))):
        if isinstance(OmegaConf.select(config, key), DictConfig):
            OmegaConf.update(config, f"{key}.progress", False, force_add=True)
    return config


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the full name of the option most like `key`: by its last part, then by its first."""

    def alike(name: str) -> tuple[float, bool, float]:
        mine, its = key.split("."), name.split(".")
        end, whole = difflib.SequenceMatcher(None, mine[-1], its[-1]), difflib.SequenceMatcher(None, key, name)
        return end.ratio(), mine[0] == its[0], whole.ratio()

    best = max(sorted(known), key=alike, default="")
    return f" Did you mean {best!r}?" if best and alike(best)[0] >= 0.6 else ""


def option_names(node: Any, prefix: str = "") -> set[str]:
    """The full name of everything in a container, as it is typed: `student.rungs.0.d_state`."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = set()
    for key, value in items:
        found |= {f"{prefix}{key}"} | option_names(value, f"{prefix}{key}.")
    return found
