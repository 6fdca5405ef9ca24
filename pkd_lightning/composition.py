"""The whole of a composed configuration, what must stand at its top, and what a misspelt option may have meant."""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from pkd_lightning.checks import Faults

PARTS = ("data", "teacher", "student", "boosting", "trainer", "logger")
SETTINGS = ("name", "seed", "run_root", "threads")
PATHS = ("data.root", "teacher.checkpoint")  # null, or a path
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # what an interpolation can name
SHARED = ("lr", "weight_decay")  # what optimisers of any kind have; where the teacher's own are null, it has none
PACKAGE = "the file's first line must be `# @package _global_`"


def complete(config: DictConfig) -> DictConfig:
    """A copy of `config` with the whole of `teacher.trainer`: every option of the students', except the teacher's own.

    Its optimiser and its schedule are merged with the students' where they are the same `_target_`. Another schedule is
    the teacher's alone, another optimiser has the students' learning rate and weight decay. What is inherited is an
    interpolation, `${trainer.batch_size}`. A `teacher.trainer` that is whole, as in a run's config.yaml, stays as it
    is; one that is no mapping does, too, for `assemble` to name.
    """
    whole = copy.deepcopy(config)
    students, own = mapping(whole, "trainer"), mapping(whole, "teacher.trainer")
    if students is None or own is None or OmegaConf.is_interpolation(whole.teacher, "trainer"):
        return whole
    made: Any = OmegaConf.to_container(own)
    if not (students.keys() <= own.keys() and {"_target_", "_partial_"} <= set(mapping(own, "optimizer") or ())):
        made = _inherited("trainer", students, made)
        for key, shared in (("optimizer", SHARED), ("schedule", ())):
            theirs, its = mapping(students, key), mapping(own, key)
            if theirs is not None and its is not None and isinstance(made[key], dict):
                same = _value(its, "_target_", []) in (None, _value(theirs, "_target_", []))
                names = [name for name in theirs if same or name in ("_partial_", *shared)]
                made[key] = _inherited(f"trainer.{key}", names, made[key])
    if isinstance(made.get("optimizer"), dict):
        for name in SHARED:
            if made["optimizer"].get(name, ...) is None:
                del made["optimizer"][name]
    with read_write(whole):
        whole.teacher.trainer = made
    return whole


def _inherited(place: str, names: Iterable[Any], own: Mapping[Any, Any]) -> dict[Any, Any]:
    """`own`, and for each name of `names` that is not in it an interpolation of what stands at `place`."""
    return {name: f"${{{place}.{name}}}" for name in names if NAME.fullmatch(str(name))} | dict(own)


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
    for key in ("trainer", "teacher.trainer"):
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
