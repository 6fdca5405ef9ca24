"""`pkd predict RUN FILE...`: what an ensemble sees in images, and what each answer has cost.

`python -m pkd_lightning.predict` is the same.
"""

import argparse
import glob
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pkd_lightning.commands import end_with_reader, spare_terminal
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import InputError, PKDError
from pkd_lightning.predicting import Limits
from pkd_lightning.tasks import ImageClassification

STDIN = "-"
# of files in folders; a file that is named itself may have any name
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
WARM_UP = 3  # calls before the first file: one that loads the kernels, and two that say how long students take


def main(arguments: Sequence[str] | None = None) -> int:
    """What a run's ensemble sees in images: a line for each. Returns the exit code, 1 where a file could not be read.

    What is resized, and what cannot be read, is said on stderr.
    """
    options = _options(arguments)
    spare_terminal()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    limits = {name: getattr(options, name) for name in ("members", "confidence", "budget_macs", "budget_ms")}
    try:
        ensemble = load(options.run, options.trust, Limits(**limits))
    except PKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    paths = [found for given in options.files for found in files_of(given)]
    failed = 0
    if not options.json:
        width = max([len("file"), *(len(path) for path in paths if isinstance(path, str))])
        print(line(width, "file", "class", "probability", "students", "MACs", "ms"), flush=True)
    for path in paths:
        try:
            if isinstance(path, InputError):
                raise path
            row = answer(ensemble, path, limits)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        print(json.dumps(row) if options.json else as_line(width, row), flush=True)
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pkd predict", description=main.__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's directory, its students folder, or `mnist`, which is here")
    given = "images; folders, for all images below them; patterns, in quotes; `-` for one image on standard input"
    parser.add_argument("files", nargs="+", metavar="FILE", help=given)
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--members", type=int, metavar="K", help="ask the first K students; default: all")
    limits.add_argument("--confidence", type=float, metavar="P", help="ask further ones until an answer is as likely")
    limits.add_argument("--budget-macs", type=float, metavar="M", help="as many as cost at most M multiply-accumulates")
    limits.add_argument("--budget-ms", type=float, metavar="T", help="as many as end within T milliseconds")
    parser.add_argument("--json", action="store_true", help="print an object a line")
    trust = "import path of a model, or of a package, of the run's that is not of this package: its code is run"
    parser.add_argument("--trust", action="append", default=[], metavar="PATH", help=trust)
    return parser.parse_args(arguments)


def load(run: str, trust: Sequence[str], limits: Limits) -> ProgressiveEnsemble:
    """The ensemble, once it has been asked, so that the first file's time is its own.

    Raises:
        PKDError: where it cannot be loaded, reads no images, or the limits are not possible for it.
    """
    if trust:
        sys.path.insert(0, "")  # `pkd` finds modules in the current directory, as `python -m` does
    torch.set_num_threads(1)  # one image through small students is faster so
    ensemble = ProgressiveEnsemble.load(run, trust)
    shape = ensemble.task.input_shape
    if not isinstance(ensemble.task, ImageClassification):
        raise InputError(f"{run}: its ensemble reads no images, but numbers of shape {shape}: use predict from Python")
    limits.most(ensemble.macs, len(ensemble))
    Image.preinit()  # of what Pillow reads, the common
    for _ in range(WARM_UP):
        ensemble.predict(torch.zeros(shape, dtype=torch.uint8))
    return ensemble


def files_of(given: str) -> Iterator[str | InputError]:
    """The files that an argument means, or what is wrong with it."""
    if given == STDIN or Path(given).is_file():
        yield given
        return
    matches = [given] if Path(given).exists() else sorted(glob.glob(given, recursive=True))
    found = False
    for match in map(Path, matches):
        files = sorted(match.rglob("*")) if match.is_dir() else [match]
        for file in files:
            if file.is_file() and (file == match or file.suffix.lower() in ENDINGS):
                found = True
                yield str(file)
    if not found:
        what = f"no images ({', '.join(ENDINGS)}) below it" if matches else "there is no such file, and no match"
        yield InputError(f"{given}: {what}")


def answer(ensemble: ProgressiveEnsemble, path: str, limits: dict[str, Any]) -> dict[str, Any]:
    """What is printed of a file.

    Raises:
        InputError: where it cannot be read.
    """
    prediction = ensemble.predict(sys.stdin.buffer.read() if path == STDIN else path, **limits)
    (row,) = prediction.rows()
    return {"file": path, **row, "ms": round(1000 * prediction.seconds, 3)}


def as_line(width: int, row: dict[str, Any]) -> str:
    """A line of the table."""
    macs = "-" if row["macs"] is None else f"{row['macs']:,}"
    return line(
        width, row["file"], row["class"], f"{row['probability']:.1%}", str(row["students"]), macs, f"{row['ms']:.2f}"
    )


def line(width: int, file: str, name: str, probability: str, students: str, macs: str, ms: str) -> str:
    """The cells of a line, in their columns."""
    return f"{file:<{width}}  {name:<12}  {probability:>11}  {students:>8}  {macs:>11}  {ms:>8}"


if __name__ == "__main__":
    with end_with_reader():
        sys.exit(main())
