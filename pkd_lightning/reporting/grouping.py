"""Which runs differ only by their seed."""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pkd_lightning.reporting.files import LEVELS
from pkd_lightning.reporting.load import RunRecord
from pkd_lightning.reporting.values import number, prefix_cost, terms
from pkd_lightning.rundir import VOLATILE

# What may differ between runs of one setting: besides the keys that are not in a run's hash, its seed, the place of
# the data, whose name must agree anyway, and the threads, which change the last bits.
IGNORED = (*VOLATILE, "threads", "seed", "data.root")
MOST_KEYS = 6  # in a label, unless it takes more to tell all apart


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
    experiment, objective, combine = (str(run.results[key]) for key in ("experiment", "objective", "combine"))
    return " · ".join((experiment, objective + terms(run.results), combine))


def _settings(run: RunRecord, notes: list[str]) -> dict[str, str]:
    """The configuration as flat keys and values, without what may differ between runs of one setting."""
    if run.config is None:
        return {}
    try:
        return flat_settings(run.config, IGNORED)
    except ValueError as error:
        why = str(error).partition("\n")[0]
        notes.append(f"{run.path / 'config.yaml'} is not readable YAML ({why}): grouped by its results only")
        return {}


def flat_settings(config: str, ignored: Container[str] = VOLATILE) -> dict[str, str]:
    """The text of a configuration as flat keys and values, without some of them.

    Raises:
        ValueError: it is not the configuration of a run.
    """
    try:
        _check_plain(config)
        container = OmegaConf.to_container(OmegaConf.create(config), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from error
    return {key: value for key, value in _flat(container, ()) if not within(key, ignored)}


def within(key: str, names: Container[str]) -> bool:
    """Whether a flat key, or one above it, is among `names`."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in names for n in range(1, len(parts) + 1))


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
    """The leaves; a list of plain values is one, a list of mappings, such as a ladder's rungs, is gone into."""
    deep = isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value)
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if deep else ()
    if items:
        for key, inner in items:
            yield from _flat(inner, (*path, str(key)))
    else:
        yield ".".join(path), repr(value)


def telling_keys(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys that set configurations apart, the most general ones first.

    Of keys that differ in the same way, as a learning rate and that of the teacher taken from it, there is one. Of more
    than `MOST_KEYS` there are as many as it takes to tell all configurations apart.
    """
    keys = dict.fromkeys(key for setting in settings for key in setting)
    found: dict[tuple[int, ...], str] = {}
    for key in sorted(keys, key=lambda key: (key.startswith("teacher."), key.count("."), key)):
        values = [setting.get(key) for setting in settings]
        found.setdefault(tuple(values.index(value) for value in values), key)
    found.pop((0,) * len(settings), None)  # what is the same in all
    telling: list[str] = []
    for key in found.values():
        kinds = {tuple(setting.get(one) for one in telling) for setting in settings}
        if len(telling) >= MOST_KEYS and len(kinds) == len(settings):
            break
        telling.append(key)
    return telling


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """The shortest last part of each dotted key that no other one ends in: `trainer.optimizer.lr` is `lr`."""
    known, found = list(keys), {}
    for key in known:
        parts, others = key.split("."), [f".{other}" for other in known if other != key]
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found[key] = next(
            (end for end in ends if not end.isdecimal() and not any(one.endswith(f".{end}") for one in others)), key
        )
    return found


def _difference(own: dict[str, str], rivals: Sequence[dict[str, str]]) -> str:
    """What sets one configuration apart from others with the same name."""
    short = short_keys(telling_keys(rivals))
    return ", ".join(f"{short[key]}={own.get(key, 'unset').strip(chr(39))}" for key in short)
