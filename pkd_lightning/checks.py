"""Checks of options: every fault is found at once and named with its key, as it can be typed."""

import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from pkd_lightning.errors import ConfigError

T = TypeVar("T")
KEY = re.compile(r"[\w.]+[=:]")
MEANT = re.compile(r"(no such option\. Did you mean ')")  # what follows is a key


def suggest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the known name nearest to `name`, or '' where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_keys(given: Iterable[str], known: Iterable[str]) -> list[str]:
    """One fault for each given key that is not known, with the nearest known one."""
    known = list(known)
    return [
        f"{key}: no such option.{suggest(key, known)} Options: {', '.join(known)}" for key in given if key not in known
    ]


def build(cls: type[T], options: Mapping[str, Any]) -> T:
    """Construct the dataclass `cls` from `options`.

    Raises:
        ConfigError: for unknown keys, with suggestions, for missing ones, and for whatever `cls` itself finds.
    """
    if not isinstance(options, Mapping):
        raise ConfigError([f"must be a mapping of options, not {options!r}"])
    known = fields(cls)  # type: ignore[arg-type]
    faults = unknown_keys(options, [f.name for f in known])
    required = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    faults += [f"{name}: is missing" for name in required if name not in options]
    if faults:
        raise ConfigError(faults)
    return cls(**options)


def collect(faults: list[str], prefix: str, make: Callable[[], T]) -> T | None:
    """Call `make`; on a `ConfigError` add its faults, each under `prefix`, to `faults` and return None."""
    try:
        return make()
    except ConfigError as error:
        faults.extend(under(prefix, error.faults))
        return None


def under(prefix: str, faults: Iterable[str]) -> list[str]:
    """Faults found in the part `prefix`, with every key as it can be typed, the suggested ones too."""
    found = []
    for fault in faults:
        if KEY.match(fault):
            found.append(f"{prefix}." + MEANT.sub(lambda said: f"{said[0]}{prefix}.", fault))
        else:  # it is about `prefix` itself
            found.append(f"{prefix}: {fault}")
    return found


class Faults:
    """Collects the faults of one dataclass; each check states what is allowed."""

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.found: list[str] = []

    def whole(self, name: str, least: int, optional: bool = False) -> None:
        """`name` must be an int of at least `least` (or None where `optional`)."""
        value = getattr(self.owner, name)
        if (value is None and optional) or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            return
        null = "null or " if optional else ""
        self.found.append(f"{name}={value!r}: must be {null}a whole number of at least {least}")

    def number(
        self,
        name: str,
        low: float = -math.inf,
        high: float = math.inf,
        optional: bool = False,
        exclusive: bool = False,
    ) -> None:
        """`name` must be a finite number in [low, high], or in (low, high) where `exclusive`."""
        value = getattr(self.owner, name)
        if value is None and optional:
            return
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            inside = low < value < high if exclusive else low <= value <= high
            if inside:
                return
        null = "null or " if optional else ""
        if exclusive:
            limits = f"above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        elif high < math.inf:
            limits = f"from {low:g} to {high:g}"
        else:
            limits = f"at least {low:g}" if low > -math.inf else "finite"
        self.found.append(f"{name}={value!r}: must be {null}a number {limits}")

    def choice(self, name: str, allowed: Iterable[str]) -> None:
        """`name` must be one of `allowed`."""
        allowed = list(allowed)
        value = getattr(self.owner, name)
        if value not in allowed:
            self.found.append(f"{name}={value!r}: must be one of {', '.join(allowed)}.{suggest(str(value), allowed)}")

    def called(self, name: str, optional: bool = False) -> None:
        """`name` must be something to call (or None where `optional`)."""
        value = getattr(self.owner, name)
        if not callable(value) and not (value is None and optional):
            self.found.append(f"{name}={value!r}: must be a `_target_` with `_partial_: true`")

    def flag(self, name: str) -> None:
        """`name` must be a bool."""
        if not isinstance(getattr(self.owner, name), bool):
            self.found.append(f"{name}={getattr(self.owner, name)!r}: must be true or false")

    def misspelt(self, name: str) -> bool:
        """Whether the function of `name`, a partial, has no such keywords as it is given: each is a fault."""
        part = getattr(self.owner, name)
        try:
            _, *known = inspect.signature(part.func).parameters.values()  # the first is no option
        except (AttributeError, TypeError, ValueError):  # no partial, or of a function that does not tell
            return False
        if any(one.kind is one.VAR_KEYWORD for one in known):
            return False
        found = under(name, unknown_keys(map(str, part.keywords), [one.name for one in known]))
        self.found += found
        return bool(found)

    def works(self, name: str, call: Callable[[], object]) -> None:
        """`call`, which uses `name`, must not raise."""
        try:
            call()
        except Exception as error:  # whatever the user's function raises is the fault
            self.found.append(f"{name}: fails ({type(error).__name__}: {error})")

    def raise_if_any(self) -> None:
        """Raise one `ConfigError` with everything found."""
        if self.found:
            raise ConfigError(self.found)


def located(path: str) -> Any:
    """What lies at an import path: an attribute of a module, or of a class in it; modules are imported on the way.

    Raises:
        ValueError: where it is no import path.
        ImportError: where there is nothing, or the import of a module on the way fails, saying of which and why.
    """
    first, *rest = path.split(".")
    if not all((first, *rest)):
        raise ValueError(f"{path!r} is no import path; relative ones are not supported")
    found, at = _imported(first, path), first
    for part in rest:
        inner = f"{at}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError as error:
            if not isinstance(found, ModuleType):
                raise ImportError(f"Error loading {path!r}: {error!r}; is {part!r} an attribute of {at!r}?") from error
            found = _imported(inner, path)
        at = inner
    return found


def _imported(module: str, path: str) -> ModuleType:
    """The module of a name on the way to an import path."""
    try:
        return import_module(module)
    except Exception as error:  # whatever the code of the module raises
        above, _, last = module.rpartition(".")
        advice = f"is {last!r} to be imported from {above!r}" if above else f"is {module!r} installed"
        advice = f"; {advice}?" if isinstance(error, ModuleNotFoundError) else ""
        raise ImportError(f"Error loading {path!r}: {error!r}{advice}") from error


def resolve(name: str, module: ModuleType, fits: Callable[[object], bool], kind: str) -> Any:
    """What is called `name` in `module`, or at the import path `name`, where it fits.

    Args:
        name: a lower-case name, or an import path.
        module: offers all of its lower-case names that fit.
        fits: whether something is of the kind that is wanted.
        kind: what that is called.

    Raises:
        ConfigError: where there is none, listing what `module` offers.
    """
    offered = sorted(key for key, value in vars(module).items() if key.islower() and fits(value))
    if name in offered:
        return getattr(module, name)
    if "." not in str(name):
        options = ", ".join(offered)
        raise ConfigError([f"{name!r}: must be one of {options}, or an import path.{suggest(str(name), offered)}"])
    try:
        found = located(name)
    except Exception as error:
        raise ConfigError([f"{name!r}: cannot be imported ({error})"]) from error
    if not fits(found):
        raise ConfigError([f"{name!r} gives a {type(found).__name__}, not of type {kind}"])
    return found
