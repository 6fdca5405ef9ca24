"""Make a run of a study a pretrained example of the package: its students, their scales, and its teacher.

python -m experiments.publish mnist_best anchored-seed0 mnist    # then: pkd_lightning.pretrained.load("mnist")
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from experiments.study import STUDIES
from pkd_lightning import pretrained
from pkd_lightning.checkpoint import read_json, write_json
from pkd_lightning.ensemble import ProgressiveEnsemble, load_student
from pkd_lightning.errors import PKDError, RunError


def publish(study: Path, job: str, target: Path) -> None:
    """Write `target` from the results of `job` and what it kept; where that fails, `target` stays as it was.

    Raises:
        RunError: where the study lacks them, or the teacher's weights do not fit its description.
    """
    kept, model = study / "kept" / job, read_json(study / "results" / f"{job}.json")["teacher"]["config"]
    student = read_json(kept / "students" / "00.json")
    options = {key: value for key, value in model.items() if not key.startswith("_")}
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / target.name
        try:
            shutil.copytree(kept / "students", fresh)
            shutil.copy(kept / "teacher.safetensors", fresh)
        except OSError as error:
            raise RunError(f"{kept}: does not keep a teacher and students ({error})") from error
        write_json(fresh / "teacher.json", {**student, "model": model["_target_"], "options": options})
        ProgressiveEnsemble.load(fresh)
        load_student(fresh / "teacher")  # each raises where weights and description do not fit
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(fresh, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="folder below experiments")
    parser.add_argument("job", help="<run>-seed<S>, which keeps its teacher and its students")
    parser.add_argument("name", help="what it is loaded by")
    options = parser.parse_args()
    try:
        publish(STUDIES / options.study, options.job, pretrained.FOLDER / options.name)
    except PKDError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
