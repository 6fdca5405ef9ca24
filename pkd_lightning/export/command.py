"""`pkd export RUN --format FORMAT [--members K] [--out DIR]`: an ensemble as one file, for use elsewhere."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pkd_lightning.cli import log_to_terminal
from pkd_lightning.errors import PKDError
from pkd_lightning.export import FORMATS, export
from pkd_lightning.rounding import WEIGHTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the ensemble of a run, or a prefix of it, as one file that prepares inputs itself, and is checked."""
    parser = argparse.ArgumentParser(prog="pkd export", description=main.__doc__)
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run directory, its students folder, an exported safetensors file, or a pretrained name such as mnist",
    )
    parser.add_argument("--format", required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument(
        "--weights",
        default="float32",
        metavar="WEIGHTS",
        help=f"one of {', '.join(WEIGHTS)}: round those of layers to it, for c and safetensors; default: float32",
    )
    parser.add_argument("--members", type=int, metavar="K", help="the first K students; default: all")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of the file; default: here")
    parser.add_argument("--name", help="of the file, without its ending; default: the run's")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FILE.npy",
        help="inputs to check it on; default: the run's, or random ones",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PATH", help="import path of a model, or package, of yours"
    )
    options = parser.parse_args(arguments)
    log_to_terminal()
    sys.path.insert(0, "")  # models of yours are found in the current directory
    try:
        done = export(
            options.run,
            options.format,
            options.out,
            options.members,
            name=options.name,
            images=options.images,
            force=options.force,
            trust=options.trust,
            weights=options.weights,
        )
    except PKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    students, macs = f"{done.facts.members} students", done.facts.macs[-1]
    cost = "" if macs is None else f", {macs:,} multiply-accumulates"
    print(f"{done.path}: {done.path.stat().st_size:,} bytes, {students}{cost}")
    if done.difference is not None:
        like = "the ensemble's" if done.effect is None else "those of the ensemble with such weights"
        print(f"logits are {like} within {done.difference:.1e} of the largest")
    if done.effect is not None:
        print(done.effect)
    return 0


if __name__ == "__main__":
    sys.exit(main())
