"""An ensemble and its students as files: where they lie, `ensemble.json`, and two files a student."""

import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pkd_lightning.checkpoint import load_tensors, read_json, save_weights, write_json
from pkd_lightning.checks import suggest
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.models.building import InputShape, Trust, build_classifier, import_model, path_of, trusting
from pkd_lightning.prefixes import Scales
from pkd_lightning.rounding import restored
from pkd_lightning.tasks import ImageClassification, Task

PRETRAINED = Path(__file__).parent / "pretrained"  # a folder an ensemble


def pretrained_names() -> list[str]:
    """The ensembles that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/ensemble.json"))


def folder_of(place: Path | str) -> Path:
    """The folder of an ensemble's students: of a run, by its path or theirs; of a name among the pretrained ones.

    The file of an export is such a folder itself, see `checkpoint`.

    Raises:
        RunError: where there is neither.
    """
    path = Path(place).expanduser()
    names = pretrained_names()
    if path.is_file():
        return path
    if path.exists():
        for folder in (path, path / "students"):
            if (folder / "ensemble.json").exists():
                return folder
        advice = f"; the pretrained ensemble is {str(PRETRAINED / str(place))!r}" if str(place) in names else ""
        raise RunError(f"{path}: holds neither ensemble.json nor students/ensemble.json{advice}")
    if str(place) in names:
        return PRETRAINED / str(place)
    raise RunError(
        f"{place}: there is no such path, of a run or of its students folder, and no pretrained ensemble of this name;"
        f" those are: {', '.join(names)}.{suggest(str(place), names)}"
    )


def save_description(
    directory: Path,
    scales: Sequence[Scales],
    task: Task,
    labels: Sequence[int] | None = None,
    finished: bool = True,
    classes: Sequence[str] | None = None,
) -> None:
    """Write `ensemble.json` beside the students: what `ProgressiveEnsemble.load` needs besides them.

    Args:
        directory: of the students.
        scales: (a_t, c_t) of each student so far.
        task: see `ProgressiveEnsemble`.
        labels: see `ProgressiveEnsemble`.
        finished: whether no further students follow.
        classes: see `ProgressiveEnsemble`.
    """
    write_json(directory / "ensemble.json", describe(scales, task, labels, finished, classes), hashed=True)


def describe(
    scales: Sequence[Scales],
    task: Task,
    labels: Sequence[int] | None = None,
    finished: bool = True,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The content of `ensemble.json`; for the arguments see `save_description`."""
    return {
        "scales": [list(pair) for pair in scales],
        "task": path_of(type(task)),
        "input_shape": list(task.input_shape),
        "num_classes": task.num_classes,
        **task.state(),
        "finished": finished,
        "labels": labels,
        "classes": None if classes is None else list(classes),
    }


def load_task(description: Mapping[str, Any], directory: Path, trust: Trust) -> Task:
    """The task of an ensemble; a file of an earlier version has only the statistics of images."""
    kind: Any = import_model(description.get("task", path_of(ImageClassification)), trust, "task", Task)
    sizes = description if "input_shape" in description else read_json(_student_files(directory / "00")[1])
    task: Task = kind.from_state(description, _input_shape(sizes), int(sizes["num_classes"]))
    return task


def _input_shape(description: Mapping[str, Any]) -> InputShape:
    """Of a student or an ensemble; earlier versions call it `image_shape`."""
    given = description["input_shape"] if "input_shape" in description else description["image_shape"]
    return tuple(operator.index(size) for size in given)


def save_student(
    model: nn.Module, stem: Path, path: str, options: Mapping[str, Any], input_shape: InputShape, num_classes: int
) -> None:
    """Write `stem`.safetensors and `stem`.json: weights, and all that is needed to build the model they fit.

    Args:
        model: the student.
        stem: file name without ending.
        path: import path of its class.
        options: the keyword arguments it was built with.
        input_shape: of the inputs it was built for.
        num_classes: number of classes it was built for.
    """
    description = {
        "model": path,
        "input_shape": list(input_shape),
        "num_classes": num_classes,
        "options": dict(options),
    }
    weights, text = _student_files(stem)
    save_weights(model, weights)
    write_json(text, description, hashed=True)


def load_students(directory: Path, count: int, trust: Trust = ()) -> list[nn.Module]:
    """The first `count` students of a folder; for `trust` and errors see `load_student`."""
    students: list[nn.Module] = []
    for t in range(count):
        students.append(load_student(directory / f"{t:02d}", trust, lambda: students))
    return students


def load_student(stem: Path, trust: Trust = (), earlier: Callable[[], Sequence[nn.Module]] = tuple) -> nn.Module:
    """Build the student described by `stem`.json and load its weights, in evaluation mode.

    Args:
        stem: file name without ending.
        trust: as in `ProgressiveEnsemble.load`.
        earlier: gives the students before it, which one with lazy layers may need to be built.

    Raises:
        RunError: where a file is missing or damaged, the model is not trusted, or the weights do not fit.
    """
    weights, path = _student_files(stem)
    description = read_json(path)
    try:
        make, shape = import_model(description["model"], trust), _input_shape(description)
        with trusting(trust):
            model = build_classifier(make, description["options"], shape, description["num_classes"], earlier)
    except ConfigError as error:
        raise RunError(f"{path}: its student cannot be built: {'; '.join(error.faults)}") from error
    except Exception as error:  # whatever the model's constructor raises
        raise RunError(f"{path}: does not describe a student ({error!r})") from error
    state = load_tensors(weights)
    try:
        model.load_state_dict(restored(state))
    except RuntimeError as error:
        raise RunError(f"{weights}: does not fit the student that {path.name} describes ({error})") from error
    return model.eval()


def _student_files(stem: Path) -> tuple[Path, Path]:
    """Weights and description; not by `with_suffix`, which would cut a stem at its last point."""
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")
