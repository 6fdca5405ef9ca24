"""The LightningModule of one fit, the teacher's or a student's: a model with its loss, optimiser and schedule."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pkd_lightning import ranks
from pkd_lightning.data.module import Batch
from pkd_lightning.earlier import Earlier, call
from pkd_lightning.fit_checkpoint import Saving
from pkd_lightning.graphs import Graphs
from pkd_lightning.outputs import Output, Taps
from pkd_lightning.trainer import TrainerConfig

logger = logging.getLogger(__name__)


class FitModule(L.LightningModule):
    """A model with its loss, optimiser and schedule, fitted in one of two modes (see `TrainerConfig`).

    In the fast mode an epoch is one training step to Lightning (see `EpochLoader`), whose optimiser steps are taken
    here: its hooks around a step, and reading or logging a loss every step, cost more than a tiny model. So a
    callback's `on_train_batch_*` hooks come once an epoch, and those around backward and the optimiser do not come. In
    the step mode a batch is a training step, and Lightning takes the optimiser's. Both give the same weights.
    Subclasses give `losses(batch)` and may add parameters of their own.

    Args:
        model: what is trained.
        trainer: how.
        features: paths of the modules whose outputs `forward` gives beside the logits.

    Attributes:
        total_steps: optimiser steps of the whole fit, over which the learning rate is scheduled; `fit` sets it.
        reuses_graphs: `losses` computes gradients itself, so that a batch's backward pass runs more than once.
    """

    reuses_graphs = False

    def __init__(self, model: nn.Module, trainer: TrainerConfig, features: Sequence[str] = ()) -> None:
        super().__init__()
        self.automatic_optimization = trainer.by_step
        self.model = model
        self.taps = Taps(model, features)
        self.settings = trainer
        self.total_steps = 1
        # a function, not a module: the state dict's names stay those of the model
        self._compiled = compiled(model) if trainer.compile else None
        self._graphs = Graphs(model) if trainer.cuda_graphs and not trainer.by_step else None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._skipped = self._skipped_now = 0  # steps of the whole fit; those of the epoch under way
        self._batch = 0  # batches of the epoch under way that are done
        self._random: dict[str, Any] | None = None  # to be restored before the next step
        # losses whose gradients are not yet used, with what is reported beside them and their samples
        self._waiting: list[tuple[dict[str, Tensor], int]] = []
        self.saving: Saving | None = None  # `fit` sets it

    def forward(self, inputs: Tensor) -> Output:
        """What the model gives, by torch.compile or CUDA graphs where configured; `losses` calls it like this."""
        earlier = self.earlier(inputs)
        graphs = self._graphs if self._can_replay(inputs, earlier) else None
        return self.taps.call(partial(call, graphs or self._compiled or self.model, earlier=earlier), inputs)

    def _can_replay(self, inputs: Tensor, earlier: Earlier | None = None) -> bool:
        """Whether graphs can stand for the model: in a training step whose gradients are used before the next one's."""
        training = self.training and torch.is_grad_enabled() and inputs.is_cuda
        return training and earlier is None and not self.reuses_graphs and not self.taps.modules

    def earlier(self, inputs: Tensor) -> Earlier | None:
        """What earlier students gave for the same inputs, where the model reads them."""
        return None

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss (scalar) and the logits that accuracy is measured on (batch, classes)."""
        raise NotImplementedError

    @property
    def reported(self) -> Sequence[str]:
        """Names of what `beside` gives, the same on all ranks."""
        return ()

    def beside(self) -> dict[str, Tensor]:
        """What is reported of the training batch that `losses` was called with last, beside its loss: scalars."""
        return {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The loss of a batch, or in the fast mode all optimiser steps of an epoch, which is the iterator given."""
        if not self.automatic_optimization:
            self._epoch(batch)
            return None
        self._restore_random()
        loss, _ = self.losses(batch)
        self._waiting.append(({"train_loss": loss.detach(), **self.beside()}, batch.samples))
        return loss * batch.share if ranks.size() > 1 else loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """In the step mode, clip the gradients before the optimiser's step; without any, it changes nothing."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip = self.settings.gradient_clip
        usable = clip is None or bool(nn.utils.clip_grad_norm_(parameters, clip).isfinite())
        if usable:
            for values, samples in self._waiting:
                self._count(values, samples)
        else:
            self._skipped_now += 1
            optimizer.zero_grad()
        self._waiting = []

    def batch_done(self, last: bool) -> None:
        """In the step mode, note that a batch is done, the last of the epoch or not."""
        self._batch += 1
        if last:
            self._trained()

    def _count(self, values: Mapping[str, Tensor], samples: int) -> None:
        """Add a batch's values to the epoch's sums. They stay on the device: they are read once an epoch."""
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), device=self.device)
            self._sums[name].add_(value, alpha=samples)
            self._counts[name] = self._counts.get(name, 0) + samples

    def _trained(self) -> None:
        """Say how many steps of the epoch were skipped; validation follows."""
        self._restore_random()
        self._share_buffers()
        if self._skipped_now:
            logger.warning(
                "epoch %d: skipped %d steps, their gradients were not finite", self.current_epoch, self._skipped_now
            )
            self._skipped, self._skipped_now = self._skipped + self._skipped_now, 0

    def _share_buffers(self) -> None:
        """Give buffers that a rank's own samples have changed, such as a batch norm's statistics, their mean."""
        if ranks.size() == 1:
            return
        for buffer in self.model.buffers():
            shared = ranks.total(buffer.detach().cpu().double()) / ranks.size()
            buffer.copy_(shared.to(buffer.dtype))

    def _epoch(self, batches: Iterable[Batch]) -> None:
        """An optimiser step for each batch of an epoch."""
        trainer, settings, device = self.trainer, self.settings, self.device
        optimizer = trainer.optimizers[0]
        schedule: Any = self.lr_schedulers()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        scaler = getattr(trainer.precision_plugin, "scaler", None) or torch.amp.GradScaler(device.type, enabled=False)
        # Lightning runs all of this under autocast; backward belongs outside of it
        mixed = settings.precision != "32-true"
        full_precision = torch.autocast(device.type, enabled=False) if mixed else nullcontext()
        progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress  # counts trainer.global_step
        for batch in batches:
            self._restore_random()
            optimizer.zero_grad()
            loss, _ = self.losses(Batch(*(part.to(device, non_blocking=True) for part in batch)))
            with full_precision:
                scaler.scale(loss).backward()
            usable = True
            if settings.gradient_clip is not None:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
                # one image that explodes in a model without norms must not take the weights with it
                usable = bool(norm.isfinite())
            if usable:
                scaler.step(optimizer)
                self._count({"train_loss": loss.detach(), **self.beside()}, len(batch.labels))
            else:
                self._skipped_now += 1
            scaler.update()
            schedule.step()
            progress.increment_completed()
            self._batch += 1
            if self.saving is not None:
                self.saving.after_step(trainer, self)
        self._trained()

    def progress(self) -> dict[str, Any]:
        """Where the epoch under way is after a step, and the random state there: what resuming it needs of this module.

        Validation starts anew, so that what it has found so far is left out.
        """
        return {
            "batch": self._batch,
            "loss": self._of_all("train_loss"),
            "count": self._count_of_all("train_loss"),
            "beside": {name: (self._of_all(name), self._count_of_all(name)) for name in self.reported},
            "skipped": [self._skipped, self._skipped_now],
            "random": ranks.gathered({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}),
        }

    def _of_all(self, name: str) -> Tensor | None:
        """A sum of the epoch under way, over all ranks; None before its first step."""
        own = self._sums.get(name)
        return own if own is None or ranks.size() == 1 else ranks.total(own.detach().cpu().double())

    def _count_of_all(self, name: str) -> int:
        return int(ranks.total(torch.tensor(self._counts.get(name, 0))))

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Go on where `progress` was taken."""
        self._batch = progress["batch"]
        saved = {"train_loss": (progress["loss"], progress["count"]), **progress.get("beside", {})}
        for name, (value, count) in saved.items() if ranks.first() else ():
            if value is not None:
                self._sums[name], self._counts[name] = value.to(self.device), count
        self._skipped, self._skipped_now = progress["skipped"]
        states = progress["random"] if isinstance(progress["random"], list) else [progress["random"]]
        if len(states) == ranks.size():  # for another number of ranks there are none: they draw anew
            self._random = states[ranks.rank()]

    def _restore_random(self) -> None:
        """Restore torch's random state, if a fit has just been resumed: what came before the step may have drawn."""
        if self._random is not None:
            torch.set_rng_state(self._random["cpu"])
            if len(self._random["cuda"]) == torch.cuda.device_count():  # with other GPUs, or none, they draw anew
                torch.cuda.set_rng_state_all(self._random["cuda"])
            self._random = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one validation batch to the epoch's sums."""
        loss, logits = self.losses(batch)
        for name, value in (
            ("validation_loss", loss * len(batch.labels)),
            ("validation_accuracy", (logits.argmax(-1) == batch.labels).sum()),
        ):
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + len(batch.labels)
        if self.saving is not None and not self.automatic_optimization:
            self.saving.after_step(self.trainer, self)

    @property
    def validation_loss(self) -> float:
        """Mean over the validation batches so far."""
        return self._means()["validation_loss"]

    def _means(self) -> dict[str, float]:
        """The epoch's means over the batches so far, of all ranks."""
        sums, counts = self._sums, self._counts
        if ranks.size() > 1:
            names = ("train_loss", "validation_loss", "validation_accuracy", *self.reported)
            own = [float(of.get(name, 0)) for of in (sums, counts) for name in names]
            of_all = ranks.total(torch.tensor(own, dtype=torch.float64)).tolist()
            sums, counts = (
                dict(zip(names, part, strict=True)) for part in (of_all[: len(names)], of_all[len(names) :])
            )
        means = {name: float(value) / counts[name] for name, value in sums.items() if counts[name] > 0}
        means.setdefault("train_loss", math.nan)  # where all steps were skipped
        return means

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's means. Lightning validates at the end of each training epoch, so both parts are complete."""
        means = self._means()
        if self._skipped:  # over the whole fit; the losses of these steps are not in train_loss
            means["skipped_steps"] = self._skipped
        self._sums, self._counts, self._batch = {}, {}, 0
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            logger.warning("epoch %d: weights are not finite any more, the fit ends", self.current_epoch)
            self.trainer.should_stop = True
        self.heed(means)
        self.log_dict(means, logger=False)
        for tracker in self.loggers:  # by optimiser step, where Lightning counts its own
            tracker.log_metrics({**means, "epoch": self.current_epoch}, step=self.global_step - 1)
            tracker.save()

    def heed(self, means: Mapping[str, float]) -> None:
        """Warn of what an epoch's means show."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is optimised, in torch's form of parameter groups."""
        return [{"params": list(self.model.parameters())}]

    def configure_optimizers(self) -> Any:
        """The configured optimiser, its learning rate scheduled per step."""
        optimizer = self.settings.build_optimizer(self.parameter_groups())
        schedule = LambdaLR(optimizer, lambda step: self.settings.schedule(min(1.0, step / self.total_steps)))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def compiled(model: nn.Module) -> Callable[..., Any]:
    """Calls `model` by way of torch.compile, as a function."""
    torch.compiler.reset()  # or torch would stop compiling at the eighth model of a class, with no more than a warning
    return torch.compile(lambda inputs, earlier=None: call(model, inputs, earlier))
