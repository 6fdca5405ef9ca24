"""The command line around Hydra: where the configuration lies, and what a misspelt override may have meant."""

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import IO

from hydra import compose, initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from pkd_lightning.commands import spare_terminal
from pkd_lightning.composition import PACKAGE, SHARED, complete, did_you_mean, option_names
from pkd_lightning.errors import ConfigError, PKDError
from pkd_lightning.process import in_multirun
from pkd_lightning.trainer import TrainerConfig

_PACKAGE = Path(__file__).parent
# in an installed wheel conf/ lies inside the package, in a checkout beside it
CONF = str(next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir()))

TRAINER = {option.name: option.default for option in fields(TrainerConfig)}
OF_STUDENTS = re.compile(r"student\.(common|rungs\.\d+)\.reuse=")  # it is in no ladder's file
OF_TEACHER = re.compile(r"(~?)teacher\.(?:(?:members|assistants)\.\w+\.)?trainer(?:\.(\w+))?((?:\.\w+)*)(=?)")

OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)  # for Hydra's own folder of a sweep


def load_config(*overrides: str, conf: str = CONF) -> DictConfig:
    """Compose the configuration as the command line would, for use from Python and notebooks.

    A program that has initialised Hydra for itself, or runs under it, finds it afterwards as it was.

    Raises:
        ConfigError: a group is overridden by null, or an experiment lacks its package line. For whatever else is wrong
            in an override Hydra has its own errors.
    """
    overrides = tuple(map(for_hydra, overrides))
    faults = null_groups(overrides)
    if faults:
        raise ConfigError(faults)
    running, base = GlobalHydra.instance().hydra, version.VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf, version_base="1.3"):
            return compose("config", overrides=list(overrides))
    except ConfigCompositionException as error:
        if "@experiment." in str(error):  # its defaults are looked for below itself
            raise ConfigError([f"experiment: {str(error).splitlines()[0][:-1]}; {PACKAGE}"]) from error
        raise
    finally:
        GlobalHydra.instance().hydra = running
        version.VersionBase.instance().version_base = base


class Terminal(logging.StreamHandler[IO[str]]):
    """Messages on a stream. Where nobody reads it any more they are lost, without a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Report any other error of writing a record."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def log_to_terminal(job: str | None = None) -> None:
    """Messages from INFO on as bare lines on stdout; DEBUG of this package only reaches a run's run.log.

    Args:
        job: title of a job of a multirun, whose terminal shows its warnings only, under this title.
    """
    spare_terminal()
    terminal = Terminal(sys.stdout)
    terminal.setLevel(logging.WARNING if job else logging.INFO)
    form = "%(message)s" if job is None else f"{job.replace('%', '%%')}: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, handlers=[terminal], force=True)
    logging.getLogger("pkd_lightning").setLevel(logging.DEBUG)


@contextmanager
def explain_overrides() -> Iterator[None]:
    """After Hydra has rejected an override, name the key it may have meant; reject those it has no message for."""
    sys.path.insert(0, "")  # `pkd` finds modules in the current directory, as `python -m` does
    sys.argv[1:] = map(for_hydra, sys.argv[1:])
    if "COMP_LINE" in os.environ:
        os.environ["COMP_LINE"] = to_complete(os.environ["COMP_LINE"])
    faults = null_groups(sys.argv[1:])
    if faults:
        sys.exit(f"error: {ConfigError(faults)}")
    try:
        yield
    except SystemExit as stop:
        if stop.code == 1:
            for line in suggestions(sys.argv[1:]):
                print(line, file=sys.stderr)
        raise


@contextmanager
def explain_end() -> Iterator[None]:
    """End a job that fails or is stopped with one message and an exit code, in place of a traceback."""
    try:
        yield
    except PKDError as error:
        if in_multirun():
            raise  # the other jobs run, then it is listed
        sys.exit(f"error: {error}")
    except (SystemExit, KeyboardInterrupt) as stop:
        print("stopped; the same command goes on from what is saved", file=sys.stderr)
        if not in_multirun():
            print("`pkd finish RUN` ends the run with the students there are", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT)


def suggestions(arguments: list[str]) -> list[str]:
    """A line for each `key=value` whose key is neither an option nor a group of the configuration."""
    arguments = [for_hydra(argument) for argument in arguments]
    given = [argument.split("=", 1)[0] for argument in arguments if "=" in argument and argument[0] not in "+~-"]
    groups = tuple(f"{path.name}=" for path in Path(CONF).iterdir() if path.is_dir())
    chosen = [argument for argument in arguments if argument.startswith(groups) and "," not in argument]
    own = [after for argument, after in pairwise(arguments) if argument in ("--config-dir", "-cd")]
    try:
        config = load_config(*(f"hydra.searchpath=[file://{Path(path).absolute()}]" for path in own), *chosen)
    except ConfigError as error:
        return error.faults
    except Exception:  # a group choice is at fault, and Hydra has already listed what there is
        return []
    known = option_names(OmegaConf.to_container(complete(config))) | {"experiment"}
    unknown = [key for key in given if key not in known and "/" not in key and not key.startswith("hydra")]
    return [f"{key!r} is not an option.{did_you_mean(key, known)}" for key in unknown]


def for_hydra(argument: str) -> str:
    """An argument of the command line as Hydra takes it."""
    return set_or_add(expand_home(argument))


def set_or_add(argument: str) -> str:
    """An override of the trainer of a teacher's model, of which the composed configuration has only its own options.

    `teacher.trainer.KEY=VALUE` sets the option or adds it. `~teacher.trainer.KEY` leaves it out: it has its default,
    not the students' value. Misspelt ones stay as they are, for Hydra to refuse. `student.common.reuse=VALUE` and
    `student.rungs.0.reuse=VALUE` are set or added, too.
    """
    if OF_STUDENTS.match(argument):
        return f"++{argument}"
    found = OF_TEACHER.match(argument)
    if found is None:
        return argument
    sign, name, below, given = found.groups()
    if given and not sign and (name is None or name in TRAINER):
        return f"++{argument}"
    if sign and found[0] == argument and not given:
        if not below and TRAINER.get(name, MISSING) is not MISSING:
            return f"++{argument[1:]}={json.dumps(TRAINER[name])}"
        if name == "optimizer" and below[1:] in SHARED:
            return f"++{argument[1:]}=null"
    return argument


def to_complete(line: str) -> str:
    """A line that the shell asks to complete, so that Hydra offers the whole of the teacher's trainer."""
    *before, word = line.split(" ")
    if not before:
        return line
    return " ".join([*(one for one in before if not OF_TEACHER.match(one)), "++teacher.trainer=${trainer}", word])


def expand_home(argument: str) -> str:
    """`key=~/a,~/b` with the home for each `~`: the shell leaves them alone there, Hydra's grammar refuses them."""
    key, equals, value = argument.partition("=")
    return key + equals + ",".join(os.path.expanduser(one) if one[:1] == "~" else one for one in value.split(","))


def null_groups(arguments: Iterable[str]) -> list[str]:
    """A fault for each group that is overridden by null, for which Hydra has only a traceback."""
    pairs = [argument.lstrip("+").partition("=") for argument in arguments]
    folders = {path.name: path for path in Path(CONF).iterdir() if path.is_dir()}
    return [
        f"{key}={value}: must be one of {', '.join(sorted(path.stem for path in folders[key].glob('*.yaml')))}"
        for key, equals, value in pairs
        if equals and key in folders and {"null", ""} & set(value.split(","))
    ]
