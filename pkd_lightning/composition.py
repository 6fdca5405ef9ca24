"""What a composed configuration must hold at its top, and which option a misspelt one may have meant."""

import difflib
import re
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pkd_lightning.checks import Faults

PARTS = ("data", "teacher", "student", "boosting", "trainer", "logger")
SETTINGS = ("name", "seed", "run_root", "threads")
PATHS = ("data.root", "teacher.checkpoint")  # null, or a path
PACKAGE = "the file's first line must be `# @package _global_`"


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
