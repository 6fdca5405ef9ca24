"""Errors reach the user whole, from whatever process they come."""

import copy
import pickle

import pytest

from pkd_lightning import errors
from pkd_lightning.commands import run_command
from pkd_lightning.errors import ConfigError, PKDError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PKDError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_copy_and_pickle(kind: type[PKDError]) -> None:
    error = kind(["seed=-1: bad", "name: worse"]) if kind is ConfigError else kind("DIR: damaged")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), pickle.loads(pickle.dumps(copy.copy(error)))):
        assert type(again) is kind
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_no_error_of_the_package_is_defined_elsewhere() -> None:
    """So that the test above is of all of them."""
    import pkgutil
    from importlib import import_module

    import pkd_lightning

    for module in pkgutil.walk_packages(pkd_lightning.__path__, "pkd_lightning."):
        found = vars(import_module(module.name)).values()
        assert all(kind in KINDS for kind in found if isinstance(kind, type) and issubclass(kind, Exception)
                   and kind.__module__.startswith("pkd_lightning") and not kind.__name__.startswith("_"))  # fmt: skip


@pytest.mark.parametrize(("word", "guess"), [("serve", ""), ("lists", "Did you mean 'list'"), ("finnish", "'finish'")])
def test_a_command_that_there_is_not_is_named(word: str, guess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pkd", word])
    with pytest.raises(SystemExit) as end:
        run_command()
    assert str(end.value.code).startswith(f"error: {word}: no such command; there are export, finish, list, predict, ")
    assert guess in str(end.value.code)


@pytest.mark.parametrize("word", ["seed=1", "data=digits", "--multirun", "-c", "+name=x", "~knowledge"])
def test_what_is_hydras_is_left_to_it(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pkd", word])
    run_command()
