"""What a search varies: overrides in Hydra's grammar as Optuna's distributions, and draws as overrides."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from random import Random
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, ValueType
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from pkd_lightning.errors import ConfigError
from pkd_lightning.sweeps.records import parsed, values_of

LOG = "log"
MOST_VALUES = 1000  # of a key, that are looked through for values not drawn yet


@dataclass(frozen=True)
class Axis:
    """What one key is drawn from.

    Attributes:
        distribution: Optuna's.
        listed: each value as an override has it, where they can be counted: of a choice, and of a range in steps.
    """

    distribution: CategoricalDistribution | FloatDistribution | IntDistribution
    listed: tuple[str, ...] = ()

    @property
    def values(self) -> Sequence[Any]:
        """What can be drawn; nothing where that is not counted."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.listed
        if isinstance(self.distribution, IntDistribution):
            return range(self.distribution.low, self.distribution.high + 1, self.distribution.step)
        low, step = self.distribution.low, self.distribution.step or 0.0
        return [low + index * step for index in range(len(self.listed) or self.distribution.single())]

    @property
    def examples(self) -> list[Any]:
        """Each choice, both ends of what has an order."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.listed)
        return [self.distribution.low, self.distribution.high]

    def text(self, value: Any) -> str:
        """A drawn value as the override has it; of a range one of its own numbers, without what rounding adds."""
        distribution = self.distribution
        if self.listed and not isinstance(distribution, CategoricalDistribution):
            return self.listed[round(float(value - distribution.low) / (distribution.step or 1))]
        return str(value)


@dataclass(frozen=True)
class Space:
    """All overrides of a search.

    Attributes:
        fixed: whole overrides that every trial has, by key.
        axes: what is drawn, by key.
        keys: of both, in the order of the command.
    """

    fixed: dict[str, str]
    axes: dict[str, Axis]
    keys: tuple[str, ...]

    @classmethod
    def of(cls, overrides: Sequence[str]) -> "Space":
        """The space of a command's overrides, of several for a key the last.

        Raises:
            ConfigError: for every override that cannot be searched, and where there is nothing to search.
        """
        try:
            given = {override.get_key_element(): override for override in parsed(overrides)}
        except HydraException as error:
            raise ConfigError([" ".join(str(error).split())]) from error
        fixed, axes, faults = dict[str, str](), dict[str, Axis](), list[str]()
        for key, override in given.items():
            if not override.is_sweep_override():
                (fixed[key],) = values_of(override)
                continue
            try:
                axes[key] = axis_of(override)
            except ValueError as error:
                faults.append(f"{override.input_line}: {error}")
        if not given.keys() - fixed.keys():
            faults.append("nothing to search: give a key an interval(a,b), a range(a,b) or a choice(a,b)")
        if faults:
            raise ConfigError(faults)
        return cls(fixed, axes, tuple(given))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's, by key."""
        return {key: axis.distribution for key, axis in self.axes.items()}

    @property
    def size(self) -> float:
        """How many different trials there are."""
        return math.prod(len(axis.values) or math.inf for axis in self.axes.values())

    def overrides(self, drawn: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of a trial."""
        return tuple(self.fixed.get(key) or f"{key}={self.axes[key].text(drawn[key])}" for key in self.keys)

    def another(self, known: Collection[tuple[str, ...]], seed: int | None) -> dict[str, Any] | None:
        """Values of a trial that is not `known`, where they can be counted; None where none is found."""
        rng = Random(seed)
        values = [rng.sample(axis.values, min(len(axis.values), MOST_VALUES)) for axis in self.axes.values()]
        draws = (dict(zip(self.axes, combination, strict=True)) for combination in product(*values))
        return next((drawn for drawn in draws if self.overrides(drawn) not in known), None)

    def examples(self) -> Iterable[tuple[str, ...]]:
        """Overrides of a few trials that have, together, every choice and both ends of every interval."""
        examples = {key: axis.examples for key, axis in self.axes.items()}
        for index in range(max(map(len, examples.values()))):
            yield self.overrides({key: values[index % len(values)] for key, values in examples.items()})

    def state(self) -> dict[str, str]:
        """What must stay the same for a study to go on."""
        return {key: distribution_to_json(axis.distribution) for key, axis in self.axes.items()}


def axis_of(override: Override) -> Axis:
    """What an override is drawn from.

    Raises:
        ValueError: where it cannot be searched.
    """
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        raise ValueError("glob cannot be searched; name the choices, as in choice(a,b)")
    sweep: Any = override.value()
    log = LOG in sweep.tags
    if sweep.tags - {LOG}:
        raise ValueError(f"unknown tag {', '.join(sorted(sweep.tags - {LOG}))}; there is {LOG}")
    if isinstance(sweep, IntervalSweep):
        return _interval(sweep, log)
    listed = tuple(dict.fromkeys(value.partition("=")[2] for value in values_of(override)))
    if not listed:
        raise ValueError("has no value")
    if isinstance(sweep, RangeSweep):
        return _range(sweep, listed, log)
    if log:
        raise ValueError("a choice has no logarithm; tag an interval")
    return Axis(CategoricalDistribution(listed), listed)


def _interval(sweep: IntervalSweep, log: bool) -> Axis:
    low, high = sweep.start, sweep.end
    assert low is not None
    assert high is not None
    _check(low, high, log)
    if isinstance(low, int) and isinstance(high, int):
        return Axis(IntDistribution(low, high, log=log))
    return Axis(FloatDistribution(low, high, log=log))


def _range(sweep: RangeSweep, listed: tuple[str, ...], log: bool) -> Axis:
    """Of the numbers that Hydra's range has; its stop is none of them."""
    listed = tuple(sorted(listed, key=float))  # which may be downward, or shuffled
    low, step = float(listed[0]), abs(sweep.step)
    if all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step)):
        _check(low, float(listed[-1]), log)
        if log and step != 1:
            raise ValueError(f"a logarithmic range has steps of 1, not {step}; take tag(log, int(interval(a,b)))")
        return Axis(IntDistribution(int(listed[0]), int(listed[-1]), log=log, step=int(step)), listed)
    if log:
        raise ValueError("a range in steps that are not whole has no logarithm; take tag(log, interval(a,b))")
    high = float(Decimal(str(low)) + (len(listed) - 1) * Decimal(str(step)))  # as Optuna counts the steps
    return Axis(FloatDistribution(low, high, step=step), listed)


def _check(low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("must have finite ends")
    if low > high:
        raise ValueError(f"ends at {high:g}, below its start {low:g}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic interval starts above 0, not at {low:g}")
