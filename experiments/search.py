"""Search a ladder with Optuna: for each rung the model of lowest validation loss within a budget.

    python -m experiments.search experiments/mnist_best              # or: make sweep
    python -m experiments.search experiments/mnist_best --trials 20  # go on to 20 trials a rung

The folder's `search.yaml` says what is searched. Trials go to `search.journal` beside it, an Optuna journal: whenever
the search stops, the same command goes on, and several may run side by side. At its end the best trial of each rung is
in `search.json`, and the models are written as `conf/student/<folder>.yaml` and `conf/teacher/<folder>.yaml`.

The two budgets, parameters and multiply-accumulates of one image, are met by construction: a trial draws everything
but the width d_model, which is the largest that keeps within both. A draw for which no width does is pruned untrained.
The test part is not read.
"""

import argparse
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from pkd_lightning.checkpoint import atomic_write, write_json
from pkd_lightning.cli import load_config, log_to_terminal
from pkd_lightning.config import TrainerConfig
from pkd_lightning.cost import Cost, measure
from pkd_lightning.data.module import DataModule
from pkd_lightning.errors import ConfigError, PKDError, RunError
from pkd_lightning.experiment import assemble
from pkd_lightning.fitting import Stage, fit
from pkd_lightning.models.building import ImageShape
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.seeding import seeded
from pkd_lightning.teacher import TeacherModule

CONF = Path(__file__).parent.parent / "conf"
MODEL = "pkd_lightning.models.classifier.MambaClassifier"
Options = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """What `search.yaml` says.

    Attributes:
        experiment: overrides that choose the data.
        trainer: of every trial.
        trials: finished trials of each rung.
        seed: of the sampler, the models and the order of the batches.
        budgets: of each rung, (parameters, multiply-accumulates).
        d_model: largest width tried.
        common: options of all models.
        space: options drawn, and the values each can take.
        first: draws made first.
    """

    experiment: list[str]
    trainer: TrainerConfig
    trials: dict[str, int]
    seed: int
    budgets: dict[str, Cost]
    d_model: int
    common: Options
    space: dict[str, list[Any]]
    first: list[Options]


def read(path: Path, trials: int | None = None) -> Search:
    """Read a `search.yaml`; `trials` overrides its number of trials.

    Raises:
        ConfigError: where it is missing, or an entry is missing or unknown.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read ({error})"]) from error
    keys = {"experiment", "epochs", "trainer", "trials", "seed", "rungs", "d_model", "common", "space", "first"}
    wrong = sorted(keys ^ set(given))
    if wrong:
        raise ConfigError([f"{path}: {key} is {'missing' if key in keys else 'not an option'}" for key in wrong])
    settings = given["trainer"]
    overrides = [
        *given["experiment"], "trainer=default", "trainer.progress=false", "trainer.patience=null",
        f"trainer.max_epochs={given['epochs']}", f"trainer.optimizer.lr={settings['lr']}",
        f"trainer.optimizer.weight_decay={settings['weight_decay']}",
        f"trainer.batch_size={settings['batch_size']}", f"trainer.gradient_clip={settings['gradient_clip']}",
    ]  # fmt: skip
    return Search(
        overrides,
        assemble(load_config(*overrides)).trainer,
        {name: trials or rung.get("trials", given["trials"]) for name, rung in given["rungs"].items()},
        given["seed"],
        {name: Cost(rung["params"], 0, rung["macs"]) for name, rung in given["rungs"].items()},
        given["d_model"],
        given["common"],
        given["space"],
        given["first"],
    )


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


def run_trial(trial: optuna.Trial, search: Search, budget: Cost, data: DataModule) -> float:
    """Draw a model, train it with cross-entropy, and give its validation loss."""
    drawn = {name: trial.suggest_categorical(name, values) for name, values in search.space.items()}
    if drawn.get("n_blocks") == 1 and drawn.get("shared"):
        raise optuna.TrialPruned("the same model as with shared=false")
    shape, classes = data.image_shape, data.num_classes
    options = widest(
        {**search.common, **drawn}, budget, search.d_model, lambda o: model_cost(o, shape, classes, budget.params)
    )
    if options is None:
        raise optuna.TrialPruned("over budget at any width")
    if any(options == other.user_attrs["options"] for other in finished(trial.study)):
        raise optuna.TrialPruned("drawn before")
    with seeded(search.seed, "search", "init"):
        model = MambaClassifier(shape, classes, **options)
    cost = measure(model, shape)
    for name, value in (("options", options), ("params", cost.params), ("macs_total", cost.macs_total)):
        trial.set_user_attr(name, value)
    with tempfile.TemporaryDirectory() as folder, seeded(search.seed, "search", "fit"):
        lines = Path(folder) / "metrics.jsonl"
        try:
            module = TeacherModule(model, search.trainer)
            result = fit(module, data, Stage("search", search.seed, lines))
        except RunError as error:
            raise optuna.TrialPruned(str(error)) from error
        loss, accuracy = best_epoch(lines)
    trial.set_user_attr("validation_accuracy", accuracy)
    trial.set_user_attr("seconds", round(result.seconds, 1))
    return loss


def best_epoch(lines: Path) -> tuple[float, float]:
    """The lowest validation loss of a fit's metrics.jsonl, and the accuracy of that epoch."""
    epochs = [yaml.safe_load(line) for line in lines.read_text().splitlines()]
    best = min(epochs, key=lambda epoch: float(epoch["validation_loss"]))
    return float(best["validation_loss"]), float(best["validation_accuracy"])


def open_study(storage: JournalStorage, name: str, search: Search) -> optuna.Study:
    """The Optuna study of a rung, new or as it was left."""
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    # by the number of trials: a search that goes on must not draw again what it drew first
    seed = search.seed + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=6)
    if not study.trials:
        for draw in search.first:
            study.enqueue_trial(draw)
    return study


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Its trained trials."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def advance(study: optuna.Study, search: Search, name: str, data: DataModule) -> None:
    """Run trials of a rung until it has as many as it should."""
    attempts = 0
    while len(finished(study)) < search.trials[name] and attempts < 40 * search.trials[name]:
        attempts += 1
        trial = study.ask()
        try:
            value = run_trial(trial, search, search.budgets[name], data)
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
            continue
        study.tell(trial, value)
        best = study.best_trial
        print(
            f"{name}: trial {len(finished(study))}/{search.trials[name]}, loss {value:.4f},"
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
        "trials": len(finished(study)),
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


def main() -> None:
    """Search every rung, then write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, help="finished trials of each rung, instead of search.yaml's")
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
        if any(len(finished(studies[name])) < search.trials[name] for name in names):
            data = DataModule(assemble(load_config(*search.experiment)).data)
            for name in names:
                advance(studies[name], search, name, data)
    except PKDError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    if all(finished(study) for study in studies.values()):
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
