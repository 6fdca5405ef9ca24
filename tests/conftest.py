"""Fixtures of all tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pkd_lightning  # noqa: F401  # before any test imports lightning, which needs its torchvision repaired


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no report, which takes longer than the rest of a tiny run, except in tests marked `report`."""
    if "report" not in request.keywords:
        monkeypatch.setattr("pkd_lightning.distil.write_report", lambda run, **_: Path(run) / "report.html")


@pytest.fixture(autouse=True)
def no_terminal() -> Iterator[None]:
    """What a command line called here logs by ends with the test, and with the stream that pytest gave it."""
    root, package = logging.getLogger(), logging.getLogger("pkd_lightning")
    before = (root.handlers[:], root.level, package.level)
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    package.setLevel(before[2])


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two test processes on two cores: a second torch thread in each would only wait for a core."""
    torch.set_num_threads(1)
