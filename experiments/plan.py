"""The plan of a study: its study.yaml, read and checked, with every fault found at once."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pkd_lightning.checks import suggest, unknown_keys
from pkd_lightning.cli import load_config, suggestions
from pkd_lightning.composition import models_of
from pkd_lightning.errors import ConfigError
from pkd_lightning.rundir import RunDirectory

# one thread: several runs share the cores, and a result has the same bits on every machine
DEFAULTS = ("logger=none", "threads=1", "trainer.progress=false")
KEEP = {
    "teacher": ("teacher/teacher.safetensors", "teacher/teacher.json"),
    "students": ("students/ensemble.json", "students/*.json", "students/*.safetensors"),
    "metrics": ("metrics.jsonl",),
    "figures": ("figures/*.png",),
}
COMPOSITION = (HydraException, OmegaConfBaseException)
DIRECTORY = re.compile(r"\{run:([\w.-]+)\}")  # in an override: the run directory of another run, of the same seed


def quoted(path: Path) -> str:
    """A path as the value of an override."""
    return "'" + str(path).replace("'", "\\'") + "'"


@dataclass(frozen=True)
class Run:
    """A run of a study, once for each of its seeds; `overrides` are the common ones, then its own."""

    name: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    keep: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One run with one seed, of the study in `folder`."""

    folder: Path
    run: Run
    seed: int

    @property
    def name(self) -> str:
        """`<run>-seed<S>`."""
        return f"{self.run.name}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """Those of study.yaml, with the seed filled in."""
        return [override.replace("{seed}", str(self.seed)) for override in self.run.overrides]

    @property
    def origins(self) -> dict[str, list[str]]:
        """The overrides of each run whose directory its own name, and of those that these go on from."""
        found: dict[str, list[str]] = {}
        for name in DIRECTORY.findall(" ".join(self.overrides)):
            other = self.beside(name)
            found |= {name: other.overrides, **other.origins}
        return found

    @property
    def results(self) -> Path:
        """Where its results are collected."""
        return self.folder / "results" / f"{self.name}.json"

    @property
    def kept(self) -> Path:
        """Where the files it keeps are collected."""
        return self.folder / "kept" / self.name

    def arguments(self, runs: Path) -> list[str]:
        """What `pkd_lightning.run` is called with; the study's overrides come last and so win."""
        root = runs / self.folder.name
        own = [
            DIRECTORY.sub(lambda found: quoted(self.beside(found[1]).directory(runs).path), o) for o in self.overrides
        ]
        return [f"seed={self.seed}", f"run_root={quoted(root)}", *DEFAULTS, *own]

    def beside(self, name: str) -> "Job":
        """The job of another run with the same seed.

        Raises:
            ConfigError: where there is none.
        """
        for job in read_study(self.folder)[0].jobs:
            if (job.run.name, job.seed) == (name, self.seed):
                return job
        raise ConfigError([f"{{run:{name}}}: that run has no seed {self.seed}"])

    def directory(self, runs: Path) -> RunDirectory:
        """Its run directory; OSError where the teacher's checkpoint, whose content counts, is not there yet."""
        return RunDirectory(load_config(*self.arguments(runs)))


@dataclass(frozen=True)
class Study:
    """The folder of a study.yaml, and its runs in their order."""

    folder: Path
    runs: tuple[Run, ...] = ()

    @property
    def jobs(self) -> list[Job]:
        """Every run with every seed."""
        return [Job(self.folder, run, seed) for run in self.runs for seed in run.seeds]

    def before(self, job: Job) -> list[Job]:
        """What must be collected before `job` starts: all seeds of those it comes after; of `{run:OTHER}` its own."""
        beside = {name for override in job.run.overrides for name in DIRECTORY.findall(override)}
        others = [other for other in self.jobs if other.run.name in job.run.after]
        return [other for other in others if other.run.name not in beside or other.seed == job.seed]


def load_study(folder: Path) -> Study:
    """Read `folder`/study.yaml.

    Raises:
        ConfigError: listing every fault, except of the overrides, into which only `option_faults` looks.
    """
    study, faults = read_study(folder)
    if faults:
        raise ConfigError(faults)
    return study


def read_study(folder: Path) -> tuple[Study, list[str]]:
    """What is sound in `folder`/study.yaml, and every fault."""
    try:
        raw = OmegaConf.to_container(OmegaConf.load(folder / "study.yaml"))
    except Exception as error:  # YAML, OmegaConf and the file system have their own kinds
        return Study(folder), [f"cannot be read ({error})"]
    if not isinstance(raw, dict):
        return Study(folder), ["must hold seeds, common and runs"]
    faults = unknown_keys(map(str, raw), ("seeds", "common", "runs"))
    common = Run("", _strings(raw, "common", faults), _seeds(raw, (), faults) if "seeds" in raw else ())
    entries = raw.get("runs")
    if not isinstance(entries, dict) or not entries:
        return Study(folder), [*faults, f"runs={entries!r}: must name at least one run"]
    runs: list[Run] = []
    for name, entry in entries.items():
        found: list[str] = []
        runs.append(_read_run(str(name), entry, common, [str(key) for key in entries], found))
        faults += [f"runs.{name}.{fault}" for fault in found]
    return Study(folder, tuple(runs)), faults


def _read_run(name: str, raw: Any, common: Run, names: list[str], faults: list[str]) -> Run:
    if not re.fullmatch(r"\w[\w.-]*", name):
        faults.append(f"name={name!r}: must be a file's name of letters, digits, '_', '-' and '.'")
    if not isinstance(raw, dict):
        faults.append(f"value={raw!r}: must be a mapping; {{}} is a run of the common overrides")
        raw = {}
    faults += unknown_keys(map(str, raw), ("overrides", "seeds", "keep", "after"))
    overrides, keep, after = (_strings(raw, key, faults) for key in ("overrides", "keep", "after"))
    for part in keep:
        if part not in KEEP:
            faults.append(f"keep={part!r}: must be one of {', '.join(KEEP)}.{suggest(part, KEEP)}")
    others = dict.fromkeys(other for override in overrides for other in DIRECTORY.findall(override))
    faults += [f"overrides: {{run:{other}}} must be in after" for other in others if other not in after]
    earlier = names[: names.index(name)]
    for other in after:
        if other not in names:
            faults.append(f"after={other!r}: no such run.{suggest(other, earlier)}")
        elif other not in earlier:
            faults.append(f"after={other!r}: only runs above {name!r} can be named")
    return Run(name, common.overrides + overrides, _seeds(raw, common.seeds, faults), keep, after)


def _strings(raw: dict[Any, Any], key: str, faults: list[str]) -> tuple[str, ...]:
    value = raw.get(key, [])
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    faults.append(f"{key}={value!r}: must be a list of strings")
    return ()


def _seeds(raw: dict[Any, Any], default: tuple[int, ...], faults: list[str]) -> tuple[int, ...]:
    value = raw.get("seeds", [*default])
    if isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value):
        return tuple(dict.fromkeys(value))
    faults.append(f"seeds={value!r}: must be a list of whole numbers of at least 0, here or for the whole study")
    return (0,)  # stands in, so that the faults of the overrides are found as well


def option_faults(study: Study, runs: Path, todo: Sequence[Job]) -> list[str]:
    """Faults of the overrides: every job is composed, and the parts of those in `todo` are built."""
    found: dict[str, dict[str, None]] = {}  # a fault, and the runs that have it: that of a common override is said once
    seen: dict[Path, Job] = {}
    for job in study.jobs:
        keeping = [other for other in study.before(job) if other in todo and "teacher" in other.run.keep]
        coming = [other.kept.resolve() / "teacher.safetensors" for other in keeping]
        path, faults = _job_faults(job, runs, coming, job in todo)
        if path is not None and seen.setdefault(path, job) != job:  # would be shown the results of the other
            faults.append(f"the same configuration as {seen[path].run.name}")
        for fault in faults:
            found.setdefault(fault, {})[job.run.name] = None
    return [f"{', '.join(names)}: {fault}" for fault, names in found.items()]


def _job_faults(job: Job, runs: Path, coming: list[Path], build: bool) -> tuple[Path | None, list[str]]:
    """Its run directory, None where it cannot be told yet, and the faults of its overrides."""
    path, faults = None, []
    try:
        config = load_config(*job.arguments(runs))
        if config.seed != job.seed:
            faults.append(f"seed={config.seed}: seeds are set by `seeds`, not by an override")
        models = [OmegaConf.select(config, key) for key in models_of(config)]
        loaded = [(one, Path(one.checkpoint).expanduser()) for one in models if one and one.get("checkpoint")]
        if config.teacher.checkpoint is not None and "teacher" in job.run.keep:
            faults.append("keep='teacher': a run with a teacher.checkpoint trains none; keep it in the run that does")
        if all(file.is_file() for _, file in loaded):
            path = RunDirectory(config).path
        for one, file in loaded:
            if file.resolve() in coming:
                one.checkpoint = None
        grown = config.boosting.grow_from
        if DIRECTORY.search(" ".join(job.run.overrides)) and grown and not Path(grown).exists():
            config.boosting.update({"grow_from": None, "grow_rounds": None, "grow_scales": "kept"})  # it will be
        if build:
            from pkd_lightning.assembling import assemble  # here: its import takes seconds that nothing else needs

            assemble(config)
    except ConfigError as error:
        faults += error.faults
    except COMPOSITION as error:
        faults.append(" ".join([shortened(error), *suggestions(job.overrides)]))
    return path, faults


def shortened(error: Exception) -> str:
    """What is wrong with an override, of all that Hydra says."""
    return " ".join(re.split("To append|Config search path|See https", str(error))[0].split())
