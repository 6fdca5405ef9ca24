"""Make a run of a study a pretrained example of the package: its students, their scales, and its teacher.

    python -m experiments.publish mnist_best anchored-seed0 mnist [--teacher KEPT/teacher.safetensors]
        [--teacher-weights bf16]

Then `pkd_lightning.pretrained.load("mnist")` loads them.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from experiments.study import STUDIES
from pkd_lightning import pretrained
from pkd_lightning.checkpoint import read_json, save_tensors, write_json
from pkd_lightning.ensemble import ProgressiveEnsemble, load_student
from pkd_lightning.errors import PKDError, RunError
from pkd_lightning.models.building import import_model, path_of
from pkd_lightning.rounding import WEIGHTS, Weights, rounded_names, stored


def publish(
    study: Path, job: str, target: Path, teacher: Path | None = None, teacher_weights: Weights = "float32"
) -> None:
    """Write `target` from the results of `job` and what it kept; where that fails, `target` stays as it was.

    Args:
        study: its folder.
        job: `<run>-seed<S>`.
        target: folder to write, or to replace.
        teacher: weights of its teacher, where `job` did not train but load it.
        teacher_weights: what those of the teacher's linear layers and convolutions are stored as.

    Raises:
        RunError: where the study lacks them, or the teacher's weights do not fit its description.
    """
    kept, teachers = study / "kept" / job, read_json(study / "results" / f"{job}.json")["teacher"]
    model = teachers and teachers.get("config")
    if not model:
        raise RunError(f"{study.name} {job}: has no teacher, or several, of which none is published")
    student = read_json(kept / "students" / "00.json")
    options = {key: value for key, value in model.items() if not key.startswith("_")}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        fresh = Path(folder) / target.name
        try:
            shutil.copytree(kept / "students", fresh)
            shutil.copy(teacher or kept / "teacher.safetensors", fresh / "teacher.safetensors")
        except OSError as error:
            raise RunError(f"{kept}: does not keep students, or there is no teacher ({error})") from error
        write_json(fresh / "teacher.json", {**student, "model": _defined(model["_target_"]), "options": options})
        ProgressiveEnsemble.load(fresh)
        loaded = load_student(fresh / "teacher")  # each raises where weights and description do not fit
        if teacher_weights != "float32":
            rounded = stored(loaded.state_dict(), rounded_names(loaded), teacher_weights)
            save_tensors(rounded, fresh / "teacher.safetensors")
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)


def _defined(path: str) -> str:
    """Where the class at `path` is defined: a study may name one of the package by a path of its own."""
    made = import_model(path, trust=True)
    return path_of(made) if isinstance(made, type) else path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="folder below experiments")
    parser.add_argument("job", help="<run>-seed<S>, which keeps its students, and its teacher where it trained one")
    parser.add_argument("name", help="what it is loaded by")
    parser.add_argument("--teacher", type=Path, help="weights of its teacher, where the run loaded it")
    parser.add_argument("--teacher-weights", choices=WEIGHTS, default="float32", help="what they are stored as")
    options = parser.parse_args()
    if not re.fullmatch(r"\w[\w-]*", options.name):
        parser.error(f"{options.name!r}: a name is of letters, digits, '_' and '-'")
    try:
        target = pretrained.FOLDER / options.name
        publish(STUDIES / options.study, options.job, target, options.teacher, options.teacher_weights)
    except PKDError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
