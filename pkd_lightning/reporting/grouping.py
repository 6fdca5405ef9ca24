"""Which runs differ only by their seed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pkd_lightning.reporting.files import LEVELS
from pkd_lightning.reporting.load import RunRecord
from pkd_lightning.reporting.values import number, prefix_cost
from pkd_lightning.rundir import VOLATILE

# What may differ between runs of one setting: besides the keys that are not in a run's hash, its seed, the place of
# the data, whose name must agree anyway, and the threads, which change the last bits.
IGNORED = (*VOLATILE, "threads", "seed", "data.root")


@dataclass(frozen=True)
class Group:
    """Runs with the same settings; `label` names what sets them apart from the other groups."""

    label: str
    runs: list[RunRecord]

    @property
    def seeds(self) -> list[str]:
        """Seeds, in the order of the runs."""
        return [str(run.results.get("seed")) for run in self.runs]


@dataclass(frozen=True)
class Curve:
    """Mean and sample standard deviation over seeds of the prefix accuracy, after 1, 2, ... students.

    Attributes:
        macs: geometric mean of the prefix's total MACs (the axis is logarithmic).
        center: mean accuracy in %.
        spread: sample standard deviation in %; 0 for one seed.
    """

    macs: list[float]
    center: list[float]
    spread: list[float]


def grouped(runs: Sequence[RunRecord]) -> tuple[list[Group], list[str]]:
    """Groups of runs that differ only by seed, and notes on runs set aside.

    Two runs belong together when experiment, objective and combination agree and their configurations agree in every
    key but seeds, places of files and loggers. A seed that comes twice counts once: a copy is no new sample.
    """
    notes: list[str] = []
    settings = [_settings(run, notes) for run in runs]
    members: dict[tuple[Any, ...], list[int]] = {}
    for index, run in enumerate(runs):
        key = (_base_label(run), tuple(sorted(settings[index].items())))
        members.setdefault(key, []).append(index)
    bases = [base for base, _ in members]
    groups = []
    for (base, _), indices in members.items():
        rivals = [settings[other[0]] for (name, _), other in members.items() if name == base]
        label = base if bases.count(base) == 1 else f"{base} [{_difference(settings[indices[0]], rivals)}]"
        kept: dict[str, RunRecord] = {}
        for index in indices:
            seed = str(runs[index].results.get("seed"))
            if seed in kept:
                notes.append(f"{runs[index].path} repeats the settings and seed {seed} of {kept[seed].path}: left out")
            else:
                kept[seed] = runs[index]
        groups.append(Group(label, [kept[seed] for seed in sorted(kept, key=lambda seed: (len(seed), seed))]))
    return groups, notes


def curve(group: Group) -> Curve:
    """Mean and spread of a group after each number of students that every one of its runs reached."""
    length = min(len(run.results["rounds"]) for run in group.runs)
    macs, center, spread = [], [], []
    costs = [prefix_cost(run.results, "macs_total") for run in group.runs]
    for index in range(length):
        values = [100 * number(run.results["rounds"][index], "prefix_accuracy") for run in group.runs]
        cost = [one[index] for one in costs]
        known = all(value > 0 for value in cost)
        macs.append(math.exp(mean(math.log(value) for value in cost)) if known else math.nan)
        missing = any(math.isnan(value) for value in values)
        center.append(math.nan if missing else mean(values))
        spread.append(math.nan if missing else stdev(values) if len(values) > 1 else 0.0)
    return Curve(macs, center, spread)


def _base_label(run: RunRecord) -> str:
    return " · ".join(str(run.results[key]) for key in ("experiment", "objective", "combine"))


def _settings(run: RunRecord, notes: list[str]) -> dict[str, str]:
    """The configuration as flat keys and values, without what may differ between runs of one setting."""
    if run.config is None:
        return {}
    try:
        _check_plain(run.config)
        container = OmegaConf.to_container(OmegaConf.create(run.config), resolve=False)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        why = str(error).partition("\n")[0]
        notes.append(f"{run.path / 'config.yaml'} is not readable YAML ({why}): grouped by its results only")
        return {}
    return dict(_flat(container, ()))


def _check_plain(text: str) -> None:
    """Raise ValueError where YAML has aliases or is nested deeply, which the configuration of a run is not.

    Nine lines of aliases to lists of aliases stand for 9^9 entries, which building the lists would go through.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > LEVELS:
            raise ValueError(f"it is nested more than {LEVELS} levels deep")


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if ".".join((*path, str(key))) not in IGNORED:
                yield from _flat(inner, (*path, str(key)))
    else:
        yield ".".join(path), repr(value)


def _difference(own: dict[str, str], rivals: Sequence[dict[str, str]]) -> str:
    """The keys that set one configuration apart from others with the same name, at most three of them."""
    keys = sorted({key for rival in rivals for key in {*own, *rival} if own.get(key) != rival.get(key)})
    words = [f"{key}={own.get(key, 'unset')}" for key in keys]
    return ", ".join(words[:3]) + (f", {len(words) - 3} more" if len(words) > 3 else "")
