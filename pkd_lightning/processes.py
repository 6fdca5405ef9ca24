"""Starts the processes of a run that wants several, or joins those that torchrun or srun has started."""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf
from torch import distributed as dist

from pkd_lightning import ranks
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.trainer import TrainerConfig

PATIENCE = timedelta(days=30)  # one process may wait for a teacher that another run trains; a dead one is noticed
MEETING = timedelta(minutes=10)  # until all processes have started
GRACE = 30.0  # seconds for the others to end once the first has

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Which process this is, and where they meet.

    Attributes:
        rank: number, from 0.
        size: how many there are.
        local: number on its machine.
        address: of the first.
        port: of the first.
    """

    rank: int
    size: int
    local: int
    address: str
    port: int

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> "Place | None":
        """What torchrun, or srun, has told this process; None where it was started alone."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if all(name in variables for name in names) and variables["WORLD_SIZE"] != "1":
            rank, size, local, address, port = (variables[name] for name in names)
            return cls(int(rank), int(size), int(local), address, int(port))
        if int(variables.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in variables:
            rank, size, local = (variables[f"SLURM_{name}"] for name in ("PROCID", "NTASKS", "LOCALID"))
            nodes = variables.get("SLURM_NODELIST", "127.0.0.1")
            address = variables.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
            port = variables.get("MASTER_PORT") or str(15000 + int(variables.get("SLURM_JOB_ID", "0")[-4:]))
            return cls(int(rank), int(size), int(local), address, int(port))
        return None


class Joined(LightningEnvironment):
    """What Lightning is told of processes that work together already."""

    @property
    def creates_processes_externally(self) -> bool:
        """They are there."""
        return True

    def world_size(self) -> int:
        """How many there are."""
        return ranks.size()

    def global_rank(self) -> int:
        """The number of this one."""
        return ranks.rank()

    def local_rank(self) -> int:
        """Its number on its machine."""
        return int(os.environ.get("LOCAL_RANK", 0))

    def node_rank(self) -> int:
        """The number of its machine."""
        return self.global_rank() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size())))

    def set_world_size(self, size: int) -> None:
        """Nothing: it is known."""

    def set_global_rank(self, rank: int) -> None:
        """Nothing: it is known."""


@contextmanager
def together(config: DictConfig, trainer: TrainerConfig) -> Iterator[Callable[[], bool]]:
    """Within the block, as many processes work on the run as `trainer` asks for.

    What it gives ends that when it is called: True in the first process, which goes on alone, False in the others.

    Raises:
        ConfigError: where a launcher has started another number.
        RunError: where one of them has ended early.
    """
    count = trainer.processes
    if count == 1:
        yield lambda: True
        return
    place = Place.of(os.environ)
    with ExitStack() as stack:
        if place is None and trainer.num_nodes > 1:
            raise ConfigError(
                [f"trainer.num_nodes={trainer.num_nodes}: start the command by srun or torchrun on each node"]
            )
        if place is None:
            place = Place(0, count, 0, "127.0.0.1", free_port())
            children = stack.enter_context(started(config, place))
        else:
            children = []
        if place.size != count:
            raise ConfigError(
                [
                    f"trainer.devices={trainer.devices}, trainer.num_nodes={trainer.num_nodes}: ask for {count}"
                    f" processes, and the launcher has started {place.size}"
                ]
            )
        try:
            group = stack.enter_context(ExitStack())
            group.enter_context(joined(place, trainer))
            logger.info("%d processes work on the run together", count)

            def leave() -> bool:
                group.close()
                return place.rank == 0

            yield leave
        except RuntimeError as error:  # what torch says where another process is gone
            gone = ended_early(children)
            if gone is not None:
                raise RunError(f"{gone}; the same command goes on from what is saved") from error
            raise


@contextmanager
def joined(place: Place, trainer: TrainerConfig) -> Iterator[None]:
    """Meet the other processes; all but the first are silent from here on."""
    os.environ.update(LOCAL_RANK=str(place.local), MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(place.local)
    meeting = f"tcp://{place.address}:{place.port}"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=meeting, rank=place.rank, world_size=place.size, timeout=MEETING
    )
    ranks.join(dist.new_group(backend="gloo", timeout=PATIENCE), place.rank, place.size)
    package = logging.getLogger("pkd_lightning")
    before = package.level
    try:
        with warnings.catch_warnings():
            if not ranks.first():
                package.setLevel(logging.ERROR)
                warnings.simplefilter("ignore")
            yield
    finally:
        package.setLevel(before)
        ranks.join(None)
        dist.destroy_process_group()


@contextmanager
def started(config: DictConfig, place: Place) -> Iterator[list["Child"]]:
    """Start the other processes on this machine; at the end of the block they are waited for, or ended."""
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="pkd-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
        try:
            for rank in range(1, place.size):
                children.append(Child(rank, place, path))
            yield children
            end = time.monotonic() + GRACE
            for child in children:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, end - time.monotonic()))
        finally:
            for child in children:
                child.process.kill()  # by no other signal: they leave those to the first process
                child.process.wait()
                child.output.close()


class Child:
    """Another process of the run, on this machine."""

    def __init__(self, rank: int, place: Place, config: Path) -> None:
        self.rank = rank
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        own = {"RANK": rank, "WORLD_SIZE": place.size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": place.size,
               "MASTER_ADDR": place.address, "MASTER_PORT": place.port}  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pkd_lightning.child", str(config)],
            env={**os.environ, **{name: str(value) for name, value in own.items()}, "PYTHONPATH": search_path()},
            stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def last(self) -> str:
        """The last line that it printed."""
        self.output.seek(0)
        lines = [line for line in self.output.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def search_path() -> str:
    """Where this process finds modules."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def ended_early(children: list[Child]) -> str | None:
    """In words, which of the other processes has ended, if one has."""
    end = time.monotonic() + 2.0  # the connection is lost an instant before the process is gone
    while children and time.monotonic() < end:
        for child in children:
            code = child.process.poll()
            if code:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
                said = f" ({child.last})" if code > 0 and child.last else ""
                return f"process {child.process.pid}, rank {child.rank} of the run, {how}{said}"
        time.sleep(0.05)
    return None


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def leave_signals_to_the_first() -> None:
    """Ignore the signals that stop a run: the first process saves it, and the others end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
