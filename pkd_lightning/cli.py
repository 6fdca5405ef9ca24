"""The command line around Hydra: where the configuration lies, and what a misspelt override may have meant."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from pkd_lightning.config import suggest

_PACKAGE = Path(__file__).parent
# in an installed wheel conf/ lies inside the package, in a checkout beside it
CONF = str(next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir()))


def load_config(*overrides: str, conf: str = CONF) -> DictConfig:
    """Compose the configuration as the command line would, for use from Python and notebooks.

    A program that has initialised Hydra for itself, or runs under it, finds it afterwards as it was.
    """
    running, base = GlobalHydra.instance().hydra, version.getbase()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf, version_base="1.3"):
            return compose("config", overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = running
        version.VersionBase.instance().setbase(base)  # type: ignore[arg-type]


def log_to_terminal() -> None:
    """Messages from INFO on as bare lines on stdout; DEBUG of this package only reaches a run's run.log."""
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setLevel(logging.INFO)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[terminal], force=True)
    logging.getLogger("pkd_lightning").setLevel(logging.DEBUG)


@contextmanager
def explain_overrides() -> Iterator[None]:
    """After Hydra has rejected an override, name the key it may have meant."""
    sys.path.insert(0, "")  # `pkd` finds modules in the current directory, as `python -m` does
    try:
        yield
    except SystemExit as stop:
        if stop.code == 1:
            for line in suggestions(sys.argv[1:]):
                print(line, file=sys.stderr)
        raise


def suggestions(arguments: list[str]) -> list[str]:
    """A line for each `key=value` whose key is neither an option nor a group of the configuration."""
    given = [argument.split("=", 1)[0] for argument in arguments if "=" in argument and argument[0] not in "+~-"]
    chosen = [
        argument for argument in arguments if argument.startswith(("experiment=", "data=", "student=", "teacher="))
    ]
    try:
        config = load_config(*(argument for argument in chosen if "," not in argument))
    except Exception:  # a group choice is at fault, and Hydra has already listed what there is
        return []
    known = _keys(OmegaConf.to_container(config)) | {"experiment"}
    unknown = [key for key in given if key not in known and "/" not in key and not key.startswith("hydra")]
    return [f"{key!r} is not an option.{_nearest(key, known)}" for key in unknown]


def _nearest(key: str, known: set[str]) -> str:
    """Suggest by the whole key, else by its last part."""
    whole = suggest(key, known)
    if whole:
        return whole
    leaves = {name.split(".")[-1]: name for name in sorted(known, reverse=True)}
    return suggest(key.split(".")[-1], leaves)


def _keys(node: Any, prefix: str = "") -> set[str]:
    if not isinstance(node, dict):
        return set()
    found = set()
    for key, value in node.items():
        found |= {f"{prefix}{key}"} | _keys(value, f"{prefix}{key}.")
    return found
