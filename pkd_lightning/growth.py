"""Which run a run grows from: one that is named, or one of fewer rounds and otherwise the same options."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from pkd_lightning.boosting.objectives import objective_of
from pkd_lightning.boosting.options import BoostingConfig
from pkd_lightning.boosting.source import Source
from pkd_lightning.boosting.weak_learner import required
from pkd_lightning.errors import ConfigError
from pkd_lightning.rundir import RunDirectory, plain_config, plain_hash

TOGETHER = ("data", "teacher", "threads")  # options that both runs must have in common


def source_of(config: DictConfig, boosting: BoostingConfig, directory: RunDirectory) -> Source | None:
    """The run that `config`, whose directory is given, grows from, if there is one.

    Raises:
        ConfigError: where the one that is named was run on other data, or with another teacher, naming what differs.
    """
    mine = plain_config(config)
    if boosting.grow_from is not None:
        path = Path(boosting.grow_from).expanduser()
        its = plain_config(_config_of(path))
        faults = [
            f"boosting.grow_from={path}: its {key} is {theirs!r}, and this run's {ours!r}"
            for part in TOGETHER
            for key, theirs, ours in differences(its[part], mine[part], part)
        ]
        if faults:
            raise ConfigError(faults)
        if (boosting.grow_rounds or 1) > boosting.rounds:
            raise ConfigError([f"boosting.grow_rounds={boosting.grow_rounds}: is more than boosting.rounds"])
        return _source(path, its, mine, boosting.grow_rounds or min(_rounds_of(path), boosting.rounds), same=False)
    if not independent(boosting) or (directory.path / "boosting.ckpt").exists():
        return None
    # the number of students first: a configuration takes longer to read, and in a sweep most runs have as many rounds
    shorter = (path for path in _finished_beside(directory.path) if _rounds_of(path) < boosting.rounds)
    found = [path for path in shorter if _is_shorter(path, mine)]
    longest = max(found, key=_rounds_of, default=None)
    return None if longest is None else _source(longest, mine, mine, _rounds_of(longest), same=True)


def independent(boosting: BoostingConfig) -> bool:
    """Whether the first rounds of a run do not depend on how many follow: their number is in eta, which makes K."""
    if boosting.peers is not None:
        return False  # there are none: all students are trained at once
    objective = objective_of(boosting)
    reads = objective.reads_residuals or required(boosting, objective) == "condition" or boosting.weights == "samples"
    return boosting.eta is not None or not reads


def differences(one: Any, other: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two plain options differ: the full key, and both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in sorted({*one, *other}):
            yield from differences(one.get(name), other.get(name), f"{key}.{name}")
    elif one != other:
        yield key, one, other


def _source(path: Path, its: dict[str, Any], mine: dict[str, Any], rounds: int, same: bool) -> Source:
    clipped = its["boosting"].get("bound_quantile", 1) < 1
    return Source(path, rounds, same, clipped, its["student"] == mine["student"])


def _config_of(run: Path) -> DictConfig:
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    return config


def _rounds_of(run: Path) -> int:
    return len(list((run / "students").glob("[0-9][0-9].json")))


def _finished_beside(run: Path) -> Iterator[Path]:
    for path in sorted(run.parent.glob("*")):
        if path != run and (path / "DONE").exists() and (path / "boosting.ckpt").exists():
            yield path


def _is_shorter(run: Path, mine: dict[str, Any]) -> bool:
    """Whether a run has fewer rounds than this one, and otherwise the same options."""
    try:
        its = plain_config(_config_of(run))
    except (OSError, YAMLError, OmegaConfBaseException, AttributeError, KeyError, TypeError):
        return False  # of another version, or of a teacher that is gone
    fewer = its["boosting"].get("rounds", BoostingConfig.rounds) < mine["boosting"].get("rounds", BoostingConfig.rounds)
    return fewer and _without_rounds(its) == _without_rounds(mine)


def _without_rounds(plain: dict[str, Any]) -> str:
    boosting = {key: value for key, value in plain["boosting"].items() if key != "rounds"}
    return plain_hash({**plain, "boosting": boosting})
