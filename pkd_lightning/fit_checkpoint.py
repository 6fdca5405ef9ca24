"""Checkpoints of a fit: where it is, so that it resumes there, and what it gave once it has ended."""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from pkd_lightning import ranks
from pkd_lightning.checkpoint import HASH, atomic_write, check_hash, content_hash
from pkd_lightning.process import stop
from pkd_lightning.trainer import Interval

logger = logging.getLogger(__name__)
SHARE = 50  # an automatic checkpoint is made when training took so many times what writing it takes: 2%
LEAST, MOST = 30.0, 300.0  # seconds between two automatic checkpoints
FIRST_COST = 0.01  # seconds, until one is measured


class FitCheckpoint:
    """The newest checkpoint of one fit, and the one before it, each whole or absent.

    Args:
        path: the file; the one before it ends in `.previous`.
        every: when one is due.
        identity: of the fit and all it depends on; a checkpoint of another one is not used.
        clock: gives seconds.
    """

    def __init__(self, path: Path, every: Interval, identity: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.every, self.identity, self.clock = path, every, identity, clock
        self.previous = path.with_name(f"{path.name}.previous")
        self.last, self.cost = clock(), FIRST_COST

    def due(self) -> bool:
        """Whether a checkpoint is due by time; asked after every step."""
        if self.every.seconds is not None:
            return self.clock() - self.last >= self.every.seconds
        return self.every.automatic and self.clock() - self.last >= min(MOST, max(LEAST, SHARE * self.cost))

    def due_after(self, epochs: int) -> bool:
        """Whether one is due now that so many epochs are complete."""
        return self.due() or (self.every.epochs is not None and epochs % self.every.epochs == 0)

    def worth_keeping(self) -> bool:
        """Whether what a fit gave is to be kept until it is used: to train it again would take longer by far."""
        return self.every.any and self.clock() - self.last >= SHARE * self.cost

    def write(self, state: Mapping[str, Any]) -> None:
        """Write a state of tensors and JSON values, in dicts and lists; what was the newest is now the previous one."""
        start = self.clock()
        content = {**state, "identity": self.identity}

        def fill(path: Path) -> None:
            with path.open("wb") as file:  # torch's own writing hides why it fails
                torch.save({**content, HASH: content_hash(dict(flat(content)))}, file)

        def keep(path: Path) -> None:
            fill(path)
            if self.path.exists():
                self.path.replace(self.previous)

        atomic_write(self.path, keep)
        self.last = self.clock()
        self.cost = self.last - start

    def read(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint that is whole and of this fit; None where there is none."""
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                stored = state.pop(HASH)
                check_hash(path, dict(flat(state)), stored)
            except Exception as error:  # torch raises many kinds for a damaged file
                instead = (
                    "the one before it is used" if path == self.path and self.previous.exists() else "none is used"
                )
                logger.warning("%s: this checkpoint is damaged (%s); %s", path, str(error).split("\n")[0], instead)
                continue
            if state.pop("identity") == self.identity:
                return state
            logger.warning("%s: this checkpoint is of another fit, and is not used", path)
        return None


def flat(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and JSON values of a state, each with a name made of the keys that lead to it.

    Raises:
        TypeError: where it holds anything else, which loading would refuse.
    """
    if isinstance(state, Mapping):
        yield f"{name}{{}}", [str(key) for key in state]
        for key, value in state.items():
            yield from flat(value, f"{name}.{key}")
    elif isinstance(state, (list, tuple)):
        yield f"{name}[]", len(state)
        for index, value in enumerate(state):
            yield from flat(value, f"{name}.{index}")
    elif isinstance(state, (Tensor, str, int, float, type(None))):
        yield name, state
    else:
        raise TypeError(f"{name.lstrip('.')} is a {type(state).__name__}, no tensor and no number")


def remove_all(directory: Path) -> None:
    """Remove the checkpoints in a directory, of fits that are used."""
    for path in directory.glob("*.ckpt*"):
        path.unlink(missing_ok=True)


class Saving(Checkpoint):
    """Saves a fit under way and resumes it; stops it, once it is saved, where a signal asks for that.

    What is kept: weights, optimiser, schedule, gradient scaler, random state, the sums of the epoch under way, and the
    state of other callbacks, such as the best weights. Lightning calls a `Checkpoint` last, so that those are up to
    date: at an epoch's end also after the callbacks that stop early.

    Args:
        name: of the fit, for the log.
        checkpoint: where it is saved; None: nowhere.
        callbacks: whose state is kept.
    """

    def __init__(self, name: str, checkpoint: FitCheckpoint | None, callbacks: Sequence[L.Callback]) -> None:
        self.name, self.checkpoint, self.callbacks = name, checkpoint, list(callbacks)
        self.resumed: dict[str, Any] | None = None
        self.start, self.before = time.perf_counter(), 0.0
        self.left_out = 0  # batches that the first epoch leaves out

    @property
    def seconds(self) -> float:
        """Wall time of the fit, with that of the processes that were stopped."""
        return self.before + time.perf_counter() - self.start

    def resume(self, trainer: L.Trainer, module: L.LightningModule, loader: Any, state: dict[str, Any]) -> None:
        """Have a trainer that has not begun start where `state` was saved.

        Lightning's own way, `ckpt_path`, knows no place inside of an item of its loader, which may be a whole epoch.
        """
        self.resumed, self.before = state, float(state["seconds"])
        epoch, steps = int(state["epoch"]), int(state["steps"])
        loop: Any = trainer.fit_loop
        for counts in (loop.epoch_progress.total, loop.epoch_progress.current):
            counts.ready = counts.started = counts.processed = counts.completed = epoch
        loops = loop.epoch_loop
        taken = (
            loops.automatic_optimization.optim_progress.optimizer.step
            if module.automatic_optimization
            else loops.manual_optimization.optim_step_progress
        )
        taken.total.ready = taken.total.completed = steps
        batch = int(state["progress"]["batch"])
        loader.sampler.left_out = (epoch, batch)
        self.left_out = batch if module.automatic_optimization else 0
        logger.info("%s: goes on in epoch %d, after %d of its batches", self.name, epoch + 1, batch)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In the step mode, count the batches left out as Lightning would have, for it to know the epoch's last one."""
        done, self.left_out = self.left_out, 0
        if done:
            loop: Any = trainer.fit_loop
            counts, fetcher = loop.epoch_loop.batch_progress, loop._data_fetcher
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts.current, name, getattr(counts.current, name) + done)
            fetcher.fetched += done
            fetcher.done = counts.is_last_batch = fetcher.fetched >= fetcher.length

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In the step mode, save where it is time: not between batches whose gradients are used together."""
        if not pl_module.automatic_optimization:
            return
        pl_module.batch_done(trainer.is_last_batch)  # type: ignore[operator]
        together = trainer.accumulate_grad_batches
        if not trainer.is_last_batch and (batch_idx + 1) % together == 0:
            self.after_step(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore what was saved."""
        state, self.resumed = self.resumed, None
        if state is None:
            return
        pl_module.load_state_dict(state["module"]["state_dict"])
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for config, saved in zip(trainer.lr_scheduler_configs, state["schedules"], strict=True):
            config.scheduler.load_state_dict(saved)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and state["scaler"] is not None:  # on a CPU there is none
            scaler.load_state_dict(state["scaler"])
        self.restore_callbacks(state)
        for callback in self.callbacks:
            callback.on_load_checkpoint(trainer, pl_module, state["module"])
        pl_module.restore_progress(state["progress"])  # type: ignore[operator]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, where it is time; not after the last epoch, whose result is kept by `ended`."""
        complete = trainer.current_epoch + 1
        if trainer.should_stop or complete == trainer.max_epochs:
            return
        self._look(trainer, pl_module, complete, self.checkpoint is not None and self.checkpoint.due_after(complete))

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, where it is time, after a step inside of an epoch, or a batch of its validation."""
        due = self.checkpoint is not None and self.checkpoint.due()
        self._look(trainer, pl_module, trainer.current_epoch, due)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int, due: bool) -> None:
        """Save and stop where that is due in any rank."""
        number = stop.signal or (signal.SIGTERM if trainer.received_sigterm else 0)
        due, number = ranks.either(due, number)
        if due:
            self.save(trainer, pl_module, epoch)
        if number:
            self._stop(trainer, pl_module, epoch, number)

    def _stop(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int, number: int) -> None:
        name = signal.Signals(number).name
        if self.checkpoint is None:
            logger.info("%s: stopped by %s; it is not saved, and starts anew", self.name, name)
        else:
            self.save(trainer, pl_module, epoch)
            logger.info(
                "%s: stopped by %s; saved in epoch %d, step %d", self.name, name, epoch + 1, trainer.global_step
            )
        raise SystemExit(128 + number)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        """Write where the fit is, in an epoch (from 0)."""
        assert self.checkpoint is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        module = {"state_dict": pl_module.state_dict()}
        for callback in self.callbacks:  # one that averages weights has the averages there
            callback.on_save_checkpoint(trainer, pl_module, module)
        progress = pl_module.progress()  # type: ignore[operator]  # of all ranks
        if not ranks.first():
            return
        self.checkpoint.write(
            {
                "epoch": epoch,
                "steps": trainer.global_step,
                "seconds": self.seconds,
                "module": module,
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "scaler": None if scaler is None else scaler.state_dict(),
                "progress": progress,
                **self._of_callbacks(),
            }
        )

    def ended(self, module: L.LightningModule, result: dict[str, Any]) -> None:
        """Keep what a fit gave until that is used, where it took long enough, or is not used in this process."""
        if (
            ranks.first()
            and self.checkpoint is not None
            and (stop.signal is not None or self.checkpoint.worth_keeping())
        ):
            self.checkpoint.write({"ended": result, "module": module.state_dict(), **self._of_callbacks()})

    def _of_callbacks(self) -> dict[str, Any]:
        return {"callbacks": {callback.state_key: callback.state_dict() for callback in self.callbacks}}

    def restore_callbacks(self, state: dict[str, Any]) -> None:
        """Give the callbacks their states; one whose key names a place has none after a move."""
        for callback in self.callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
