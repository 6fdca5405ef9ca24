"""`pkd finish [RUN]`: end the rounds of a run that was stopped with the students there are.

`python -m pkd_lightning.finish` is the same.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from pkd_lightning.checkpoint import read_json
from pkd_lightning.cli import explain_end, log_to_terminal
from pkd_lightning.commands import spare_terminal
from pkd_lightning.composition import models_of
from pkd_lightning.errors import RunError
from pkd_lightning.process import stopped_by_signals
from pkd_lightning.reporting.table import print_table
from pkd_lightning.rundir import RunDirectory

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """End the rounds of a run with the students there are: ensemble, evaluation, report. A finished run is shown."""
    parser = argparse.ArgumentParser(prog="pkd finish", description=main.__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/latest"), help="default: runs/latest")
    options = parser.parse_args(arguments)
    log_to_terminal()
    with explain_end(), stopped_by_signals():
        directory = finish(options.run)
    spare_terminal()
    print(f"report: {directory.path / 'report.html'}")
    print_table(read_json(directory.results))
    return 0


def finish(run: Path) -> RunDirectory:
    """End the rounds of the run in a directory, which keeps its configuration and marks it as ended early.

    Raises:
        RunError: where it is no run's directory, another process runs it, or there is no student yet.
    """
    config = config_of(run.resolve())
    directory = RunDirectory(config)
    if directory.path.resolve() != run.resolve():
        raise RunError(
            f"{run}: its config.yaml is of another run, {directory.path.name}; was it, or its data, changed?"
        )
    if directory.finished:
        directory.revisit()
        return directory
    if not (run / "boosting.ckpt").exists():
        raise RunError(f"{run}: has no student yet; the command that started it goes on with it")
    from pkd_lightning.distil import distil  # torch, lightning and numba take seconds

    distil(config, ended_early="`pkd finish`")
    return directory


def config_of(run: Path) -> DictConfig:
    """The configuration of a run, which may have been moved, for one process.

    Raises:
        RunError: where there is none, or it cannot be read.
    """
    try:
        config = OmegaConf.load(run / "config.yaml")
        assert isinstance(config, DictConfig)
        OmegaConf.update(config, "run_root", str(run.parents[1]))
        for owner in ("trainer", *(f"{place}.trainer" for place in models_of(config))):
            OmegaConf.update(config, f"{owner}.devices", 1, force_add=True)
            OmegaConf.update(config, f"{owner}.num_nodes", 1, force_add=True)
    except (OSError, YAMLError, OmegaConfBaseException, AssertionError) as error:
        raise RunError(f"{run}: is no run's directory ({error or 'its config.yaml is no mapping'})") from error
    return config


if __name__ == "__main__":
    sys.exit(main())
