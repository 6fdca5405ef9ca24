"""What a run is called where it is shown beside others: its name, its group, its tags."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pkd_lightning.checkpoint import read_json
from pkd_lightning.cli import CONF, load_config
from pkd_lightning.rundir import VOLATILE, RunDirectory

UNNAMED = (*VOLATILE, "name", "experiment", "data.root")  # said elsewhere, or of this machine
MOST = 4  # differences that a name is made of, where Hydra does not know what was typed
LENGTH = 128, 64  # characters of a name and of a tag, at most, as W&B has it


class Naming:
    """Names of one run, made from what was set beside the defaults: `digits seed=1 boosting.rounds=3`.

    Under `hydra.main` these are the overrides as they were typed. Elsewhere they are what differs from the experiment's
    defaults, or the seed alone where that is much.

    Args:
        config: the composed configuration.
        dataset: name of the data set.
    """

    def __init__(self, config: DictConfig, dataset: str) -> None:
        self.config, self.dataset = config, dataset
        self.job = _job()

    @cached_property
    def name(self) -> str:
        """The experiment, and what was set beside its defaults."""
        given = self._differences() if self.job is None else list(self.job.overrides.task)
        named = [text for text in given if not _is_unnamed(text.lstrip("+~").partition("=")[0])]
        return " ".join([str(self.config.name), *named])[: LENGTH[0]]

    @property
    def group(self) -> str:
        """The name of a multirun's directory, else the experiment's."""
        return Path(self.job.sweep.dir).name if self.job is not None and self.swept else str(self.config.name)

    @property
    def swept(self) -> bool:
        """Whether its process was started for several runs."""
        return self.job is not None and self.job.mode == RunMode.MULTIRUN

    @property
    def tags(self) -> tuple[str, ...]:
        """Experiment, data set, objective, combination, the ladder where Hydra knows its name, terms of knowledge."""
        boosting = self.config.boosting
        objective = boosting.get("objective", "")
        if isinstance(objective, DictConfig):
            objective = objective.get("_target_", "")
        paths = (str(objective).lower(), str(boosting.get("combine", "")))
        ladder = "" if self.job is None else str(self.job.runtime.choices.get("student", ""))
        found = (str(self.config.name), self.dataset, *(path.rpartition(".")[2] for path in paths), ladder)
        found += tuple(map(str, boosting.get("knowledge") or ()))
        return tuple(dict.fromkeys(tag[: LENGTH[1]] for tag in found if tag))

    def _differences(self) -> list[str]:
        name, groups = str(self.config.name), ("experiment", "data")
        chosen = [f"{group}={name}" for group in groups if (Path(CONF) / group / f"{name}.yaml").is_file()]
        usual, own = (dict(_flat(OmegaConf.to_container(one))) for one in (load_config(*chosen[:1]), self.config))
        differences = [f"{key}={value}" for key, value in own.items() if key not in usual or usual[key] != value]
        few = [text for text in differences if not _is_unnamed(text.partition("=")[0])]
        return few if len(few) <= MOST else [f"seed={self.config.seed}"]


def _job() -> Any:
    """Hydra's own part of the configuration, where the command line of this package runs."""
    if not HydraConfig.initialized():
        return None
    job = HydraConfig.get()
    return job if any(source.path == CONF for source in job.runtime.config_sources) else None


def _is_unnamed(key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in UNNAMED)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def tell_agent(config: DictConfig, directory: RunDirectory) -> None:
    """Log a finished run: the agent of a W&B sweep waits for the figures of its run, whoever has trained it."""
    from pkd_lightning.assembling import open_tracker  # torch, which a finished run needs for this alone

    results = read_json(directory.results)
    with open_tracker(config, directory.path, Naming(config, results["dataset"])) as tracker:
        tracker.summarise(results)
