"""Search a ladder with Optuna: for each rung the model of lowest validation loss within a budget.

    python -m experiments.search experiments/mnist_best              # or: make sweep
    python -m experiments.search experiments/mnist_best --trials 20  # go on to 20 trials a rung

The folder's `search.yaml` says what is searched. Trials go to `search.journal` beside it, an Optuna journal: whenever
the search stops, the same command goes on, and several may run side by side. At its end the best trial of each rung is
in `search.json`, and the models are written as `conf/student/<folder>.yaml` and `conf/teacher/<folder>.yaml`.

The two budgets, parameters and multiply-accumulates of one image, are met by construction: a trial draws everything
but the width d_model, which is the largest that keeps within both. A draw for which no width does is pruned untrained.
The first draws are those of `search.yaml`, found by hand; then TPE draws. The test part is not read.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from hydra.errors import HydraException
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from pkd_lightning.assembling import assemble
from pkd_lightning.checkpoint import atomic_write, write_json
from pkd_lightning.checks import unknown_keys
from pkd_lightning.cli import load_config, log_to_terminal
from pkd_lightning.cost import Cost, measure
from pkd_lightning.data.module import DataModule
from pkd_lightning.errors import ConfigError, PKDError, RunError
from pkd_lightning.fitting import Stage, fit
from pkd_lightning.models.building import ImageShape
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.models.config import MambaClassifierConfig
from pkd_lightning.seeding import derive, seeded
from pkd_lightning.teacher import TeacherModule
from pkd_lightning.trainer import TrainerConfig

CONF = Path(__file__).parent.parent / "conf"
MODEL = "pkd_lightning.models.classifier.MambaClassifier"
Options = dict[str, Any]
STARTUP = 6  # trials before TPE has a say: until then draws are random
MACHINE = derive(0, platform.node())  # tells machines apart in a journal that is published
IDLE = 200  # draws in a row that are over budget or were made before, after which a rung's space counts as exhausted


@dataclass(frozen=True)
class Search:
    """What `search.yaml` says.

    Attributes:
        settings: its content, as it is; all but the numbers of trials must stay the same for a journal to go on.
        data: overrides that choose the data.
        trainer: of every trial.
        trials: finished trials of each rung.
        budgets: of each rung, parameters and multiply-accumulates.
        seed: of the sampler, the models and the order of the batches.
        d_model: largest width tried.
        common: options of all models.
        space: options drawn, and the values each can take.
        first: draws made first.
    """

    settings: Options
    data: list[str]
    trainer: TrainerConfig
    trials: dict[str, int]
    budgets: dict[str, Cost]
    seed: int
    d_model: int
    common: Options
    space: dict[str, list[Any]]
    first: list[Options]


NUMBER, OPTIONAL = (int, float), (int, float, type(None))
KEYS: dict[str, Any] = {"experiment": list, "epochs": int, "trainer": dict, "trials": int, "seed": int, "rungs": dict}
KEYS |= {"d_model": int, "common": dict, "space": dict, "first": list}
TRAINER: dict[str, Any] = {"lr": NUMBER, "batch_size": int, "weight_decay": NUMBER, "gradient_clip": OPTIONAL}
RUNG: dict[str, Any] = {"params": int, "macs": int, "trials": int}


def read(path: Path, trials: int | None = None) -> Search:
    """Read a `search.yaml`; `trials` overrides its numbers of trials.

    Raises:
        ConfigError: where it is missing; for every entry that is missing, unknown or of another kind; for draws that
            are not in the space.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read ({error})"]) from error
    faults = entry_faults("", given, KEYS)
    if not faults:
        faults += entry_faults("trainer.", given["trainer"], TRAINER)
        for name, rung in given["rungs"].items():
            faults += entry_faults(f"rungs.{name}.", rung, RUNG, optional={"trials"})
        options = [field.name for field in fields(MambaClassifierConfig)]
        faults += [f"space.{fault}" for fault in unknown_keys(given["space"], options)]
        for name, values in given["space"].items():
            if not isinstance(values, list) or not values:
                faults.append(f"space.{name}={values!r}: must be a list of values")
            if name in given["common"] or name == "d_model":
                faults.append(f"space.{name}: is {'in common' if name in given['common'] else 'found by the budget'}")
        for index, draw in enumerate(given["first"] if not faults else []):
            if (
                not isinstance(draw, dict)
                or draw.keys() != given["space"].keys()
                or any(draw[name] not in given["space"][name] for name in draw)
            ):
                faults.append(f"first[{index}]={draw}: must have a value of the space for each of its options")
    if faults:
        raise ConfigError([f"{path}: {fault}" for fault in faults])
    settings = given["trainer"]
    clip = "null" if settings["gradient_clip"] is None else settings["gradient_clip"]
    overrides = [
        *given["experiment"], "trainer=default", "trainer.progress=false", "trainer.patience=null",
        f"trainer.max_epochs={given['epochs']}", f"trainer.optimizer.lr={settings['lr']}",
        f"trainer.optimizer.weight_decay={settings['weight_decay']}",
        f"trainer.batch_size={settings['batch_size']}", f"trainer.gradient_clip={clip}",
    ]  # fmt: skip
    try:
        trainer = assemble(load_config(*overrides)).trainer
    except HydraException as error:
        raise ConfigError([f"{path}: experiment={given['experiment']}: {str(error).splitlines()[0]}"]) from error
    return Search(
        given,
        given["experiment"],
        trainer,
        {name: trials or rung.get("trials", given["trials"]) for name, rung in given["rungs"].items()},
        {name: Cost(rung["params"], 0, rung["macs"]) for name, rung in given["rungs"].items()},
        **{key: given[key] for key in ("seed", "d_model", "common", "space", "first")},
    )


def entry_faults(prefix: str, given: Any, kinds: Mapping[str, Any], optional: Collection[str] = ()) -> list[str]:
    """What of `given` is missing, unknown, or not of its kind."""
    if not isinstance(given, dict):
        return [f"{prefix.rstrip('.') or 'content'}={given!r}: must be a mapping"]
    faults = [f"{prefix}{fault}" for fault in unknown_keys(map(str, given), kinds)]
    faults += [f"{prefix}{key}: is missing" for key in kinds if key not in given and key not in optional]
    for key, kind in kinds.items():
        if key in given and (not isinstance(given[key], kind) or isinstance(given[key], bool)):
            words = [one.__name__.replace("NoneType", "null") for one in (kind if isinstance(kind, tuple) else (kind,))]
            faults.append(f"{prefix}{key}={given[key]!r}: must be of type {' or '.join(words)}")
    return faults


def widest(options: Mapping[str, Any], budget: Cost, most: int, cost: Callable[[Options], Cost]) -> Options | None:
    """`options` with the largest d_model from 2 to `most` whose `cost` is within `budget`, or None where none is.

    Costs grow with the width, so it is found by bisection.
    """

    def fits(width: int) -> bool:
        found = cost({**options, "d_model": width})
        return found.params <= budget.params and found.macs_total <= budget.macs_total

    low, high = 1, most + 1  # `low` fits, or is 1; `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {**options, "d_model": low} if low > 1 else None


def model_cost(options: Options, image_shape: ImageShape, num_classes: int, params: int) -> Cost:
    """The cost of a model; multiply-accumulates are not counted where there are more than `params` parameters."""
    model = MambaClassifier(image_shape, num_classes, **options)
    count = sum(p.numel() for p in model.parameters())
    return Cost(count, 0, 0) if count > params else measure(model, image_shape)


def run_trial(trial: optuna.Trial, search: Search, budget: Cost, data: DataModule) -> float | TrialState:
    """Draw a model, train it with cross-entropy, and give its validation loss, or why there is none.

    A draw over budget at any width is PRUNED; one that was trained before, or failed, is FAIL, of which the sampler
    learns nothing.
    """
    trial.set_user_attr("process", [MACHINE, os.getpid()])
    drawn = {name: trial.suggest_categorical(name, values) for name, values in search.space.items()}
    if drawn.get("n_blocks") == 1 and drawn.get("shared") and drawn.get("stem_blocks", 0) <= 1:
        return TrialState.FAIL  # the same model as with shared=false
    shape, classes = data.task.input_shape, data.num_classes
    options = widest(
        {**search.common, **drawn}, budget, search.d_model, lambda o: model_cost(o, shape, classes, budget.params)
    )
    if options is None:
        return TrialState.PRUNED
    others = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
    if any(other.user_attrs.get("options") == options for other in others):
        return TrialState.FAIL
    with seeded(search.seed, "search", "init"):
        model = MambaClassifier(shape, classes, **options)
    cost = measure(model, shape)
    for name, value in (("options", options), ("params", cost.params), ("macs_total", cost.macs_total)):
        trial.set_user_attr(name, value)
    with tempfile.TemporaryDirectory() as folder, seeded(search.seed, "search", "fit"):
        lines = Path(folder) / "metrics.jsonl"
        try:
            result = fit(TeacherModule(model, search.trainer), data, Stage("search", search.seed, lines))
        except RunError as error:
            print(f"{trial.study.study_name}: trial {trial.number} failed: {error}", flush=True)
            return TrialState.FAIL
        best = json.loads(lines.read_text().splitlines()[result.best_epoch])
    trial.set_user_attr("validation_accuracy", best["validation_accuracy"])
    trial.set_user_attr("seconds", round(result.seconds, 1))
    return float(best["validation_loss"])


def open_study(storage: JournalStorage, name: str, search: Search) -> optuna.Study:
    """The Optuna study of a rung, new or as it was left.

    Trials that a process of this machine was killed in are marked as failed, and their draws made again if they were
    among the first.

    Raises:
        ConfigError: where the journal's trials were made with other settings.
    """
    settings = {key: value for key, value in search.settings.items() if key not in ("trials", "rungs", "first")}
    settings["budget"] = [search.budgets[name].params, search.budgets[name].macs_total]
    study = None
    if name in optuna.get_all_study_names(storage):  # creating it once more would add a line to the journal
        study = optuna.load_study(study_name=name, storage=storage)
        known = study.user_attrs.get("settings", settings)
        different = [key for key in settings if known.get(key) != settings[key]]
        if different and finished(study):
            key = different[0]
            raise ConfigError([f"{name}: search.journal was made with {key}={known.get(key)}, not {settings[key]}"])
        if different:  # a mistake in search.yaml, seen before anything was trained
            optuna.delete_study(study_name=name, storage=storage)
            study = None
    if study is None:
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        study.set_user_attr("settings", settings)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        machine, process = trial.user_attrs.get("process", (None, 0))
        if machine == MACHINE and not runs(process):
            study.tell(trial.number, state=TrialState.FAIL)
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING, TrialState.RUNNING)
    made = [first_draw(trial) or trial.params for trial in study.get_trials(deepcopy=False, states=states)]
    for draw in search.first:
        if draw not in made:
            study.enqueue_trial(draw)
    return study


def runs(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)  # signal 0 is not delivered
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # someone else's
    return True


def first_draw(trial: FrozenTrial) -> Options | None:
    """What a trial was told to draw, or None where the sampler drew."""
    draw: Options | None = trial.system_attrs.get("fixed_params")
    return draw


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Its trained trials."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def complete(study: optuna.Study, search: Search, name: str) -> bool:
    """Whether a rung has its trials, or no more can be had."""
    return len(finished(study)) >= search.trials[name] or "exhausted" in study.user_attrs


def advance(study: optuna.Study, search: Search, name: str, data: DataModule) -> None:
    """Run trials of a rung until it has as many as it should, or too many draws in a row gave nothing new."""
    idle = 0
    while not complete(study, search, name):
        if idle == IDLE:
            print(f"{name}: {IDLE} draws in a row were over budget or known: no more are made", flush=True)
            study.set_user_attr("exhausted", True)
            return
        # each draw has a seed of its own: a search that goes on, or one beside it, must not draw the same again
        seed = derive(search.seed, name, len(study.trials)) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP)
        trial = study.ask()
        try:
            outcome = run_trial(trial, search, search.budgets[name], data)
        except BaseException:  # whatever ends the process: the draw is free again
            study.tell(trial, state=TrialState.FAIL)
            raise
        if isinstance(outcome, TrialState):
            study.tell(trial, state=outcome)
            idle += 1
            continue
        idle = 0
        study.tell(trial, outcome)
        best = study.best_trial
        print(
            f"{name}: trial {len(finished(study))}/{search.trials[name]}, loss {outcome:.4f},"
            f" {100 * trial.user_attrs['validation_accuracy']:.2f}%, {trial.user_attrs['seconds']:.0f} s;"
            f" best {best.value:.4f}, {100 * best.user_attrs['validation_accuracy']:.2f}%,"
            f" {best.user_attrs['params']:,} parameters",
            flush=True,
        )


def chosen(study: optuna.Study) -> dict[str, Any]:
    """The best trial of a rung, as it is written to `search.json`."""
    best = study.best_trial
    return {
        "trial": best.number,
        "drawn": "by the sampler" if first_draw(best) is None else "by hand",
        "trials": len(finished(study)),
        "trials_by_hand": sum(first_draw(trial) is not None for trial in finished(study)),
        "pruned": len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))),
        "validation_loss": best.value,
        **{
            name: best.user_attrs[name]
            for name in ("validation_accuracy", "params", "macs_total", "seconds", "options")
        },
        "seconds_of_all": round(sum(trial.user_attrs["seconds"] for trial in finished(study)), 1),
    }


def configurations(found: Mapping[str, Mapping[str, Any]], common: Options, folder: str) -> dict[str, str]:
    """The texts of `conf/student/<folder>.yaml` and `conf/teacher/<folder>.yaml`, by those paths below conf."""
    head = f"# Written by python -m experiments.search experiments/{folder}: the best trial of each rung.\n"
    own = {
        name: {key: value for key, value in row["options"].items() if key not in common} for name, row in found.items()
    }
    rungs = [f"  - {flow(options)}\n" for name, options in own.items() if name != "teacher"]
    ladder = f"_target_: pkd_lightning.models.ladder.Ladder\nmodel: {MODEL}\nrepeat: false\ncommon: {flow(common)}\n"
    texts = {f"student/{folder}.yaml": f"{head}{ladder}rungs:\n{''.join(rungs)}"}
    if "teacher" in own:
        options = yaml.safe_dump({"_target_": MODEL, "_partial_": True, **common, **own["teacher"]}, sort_keys=False)
        texts[f"teacher/{folder}.yaml"] = f"{head}model:\n{textwrap.indent(options, '  ')}"
    return texts


def flow(options: Options) -> str:
    """`options` as YAML on one line."""
    return yaml.safe_dump(options, default_flow_style=True, sort_keys=True, width=1000).strip()


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main() -> None:
    """Search every rung, then write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=positive, help="finished trials of each rung, instead of search.yaml's")
    parser.add_argument("--only", nargs="+", metavar="RUNG", help="search these rungs")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    log_to_terminal()
    torch.set_num_threads(1)
    folder = options.folder
    try:
        search = read(folder / "search.yaml", options.trials)
        storage = JournalStorage(JournalFileBackend(str(folder / "search.journal")))
        studies = {name: open_study(storage, name, search) for name in search.budgets}
        names = options.only or list(studies)
        unknown = unknown_keys(names, studies)
        if unknown:
            raise ConfigError([f"--only {fault}" for fault in unknown])
        if not all(complete(studies[name], search, name) for name in names):
            data = DataModule(assemble(load_config(*search.data)).data)
            for name in names:
                advance(studies[name], search, name, data)
    except PKDError as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, SystemExit) as stop:  # in a fit it is the latter
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT)
    missing = {
        name: f"{len(finished(study))} of {search.trials[name]}"
        for name, study in studies.items()
        if not complete(study, search, name)
    }
    if missing:
        print("not complete, so nothing is written: " + ", ".join(f"{name} {text}" for name, text in missing.items()))
        if options.only and not missing.keys() & set(options.only):
            return
        sys.exit(1)
    empty = [name for name, study in studies.items() if not finished(study)]
    if empty:
        sys.exit(f"error: no model of the space is within the budget of {', '.join(empty)}; nothing is written")
    found = {name: chosen(study) for name, study in studies.items()}
    write_json(folder / "search.json", found)
    for name, text in configurations(found, search.common, folder.name).items():
        atomic_write(CONF / name, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    for name, row in found.items():
        print(
            f"{name}: {row['params']:,} parameters, {row['macs_total']:,} multiply-accumulates,"
            f" validation {100 * row['validation_accuracy']:.2f}%, best of {row['trials']} trials: {row['options']}"
        )


if __name__ == "__main__":
    main()
