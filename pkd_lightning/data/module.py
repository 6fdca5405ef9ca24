"""The in-memory data module: split, batches with sample indices, order as a pure function of seed, stage and epoch."""

import functools
import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pkd_lightning import ranks
from pkd_lightning.checks import Faults
from pkd_lightning.data.classes import EmptyClasses, warn_of_unlearned, without_empty
from pkd_lightning.data.sets import LabelledSet
from pkd_lightning.errors import ConfigError, PKDError
from pkd_lightning.models.building import trusted
from pkd_lightning.seeding import derive, generator

logger = logging.getLogger(__name__)
Split = Literal["paper", "official"]
Augmentation = Callable[[Tensor, torch.Generator], Tensor]
COPIES_AT_ONCE = 128  # what augmenting them needs in between stays in the processor's cache; the draws depend on it


class Batch(NamedTuple):
    """One batch: sample index (batch,), prepared inputs (batch, *input_shape), labels (batch,)."""

    index: Tensor  # type: ignore[assignment]  # the contract's name; hides tuple.index
    inputs: Tensor
    labels: Tensor

    @property
    def share(self) -> float:
        """1: all of the batch is here. See `PartOfBatch`."""
        return 1.0

    @property
    def samples(self) -> int:
        """The number of samples that count."""
        return len(self.labels) if self.share > 0 else 0


class PartOfBatch(Batch):
    """The samples of a batch that this rank owns, of several.

    `share` is their part of the whole, times the number of ranks: gradients of losses that are multiplied by it have
    that of the whole batch as their mean. It is 0 where the rank owns none; one sample then stands in their place.
    """

    _share: float

    def __new__(cls, index: Tensor, inputs: Tensor, labels: Tensor, share: float) -> "PartOfBatch":
        """As a batch."""
        made = super().__new__(cls, index, inputs, labels)
        made._share = share
        return made

    @property
    def share(self) -> float:
        """Its part of the whole, times the number of ranks."""
        return self._share

    def __getnewargs__(self) -> tuple[Any, ...]:
        """For copies, and what loader processes send."""
        return (*self, self._share)

    def to(self, device: Any, **options: Any) -> "PartOfBatch":
        """The same on a device; Lightning moves it so."""
        index, inputs, labels = (part.to(device, **options) for part in self)
        return PartOfBatch(index, inputs, labels, self._share)


class BatchKey(NamedTuple):
    """What a sampler asks a dataset for: row numbers (batch,), the seed of their augmentation, if any, the share."""

    rows: Tensor
    augmentation_seed: int | None
    share: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """To a worker as bytes: in shared memory, a key that finds no room would be lost, and the training wait."""
        return _unpickled, (self.rows.numpy(), self.augmentation_seed, self.share)


def _unpickled(rows: Any, augmentation_seed: int | None, share: float | None) -> BatchKey:
    return BatchKey(torch.from_numpy(rows), augmentation_seed, share)


@dataclass(frozen=True)
class DataConfig:
    """Where the data comes from and how it is split.

    Attributes:
        source: root to `LabelledSet` (a Hydra partial).
        root: directory of the files, for sources that read files; None for the source's own search.
        split: `paper`: train and test pooled and split anew, seeded; `official`: the data set's own test part.
        test_fraction: the pool's part kept for the test (`paper` only).
        validation_fraction: part of the training samples carved out for every choice made during a run.
        split_seed: seed of the split. Not the run's seed: over several seeds the test part stays the same, untouched.
        limit: use so many samples, drawn at random from the pool; None for all.
        augment: whole-batch augmentation of training images (images, generator) -> images, or None.
        copies: 0 applies `augment` to each training batch anew, while teacher logits and residuals stay those of the
            images as they are. K > 0 applies it once, to make K further training samples of each training image, and
            not to batches: teacher and student then see the same views (Beyer et al., arXiv 2106.05237), because each
            copy has teacher logits, ensemble logits and residuals of its own. An epoch is 1 + K times as long.
        empty_classes: `renumber`: classes without a sample in the whole set get no output; `keep`: they get one.
    """

    source: Callable[..., LabelledSet]
    root: str | None = None
    split: Split = "paper"
    test_fraction: float = 0.3
    validation_fraction: float = 0.1
    split_seed: int = 0
    limit: int | None = None
    augment: Augmentation | None = None
    copies: int = 0
    empty_classes: EmptyClasses = "renumber"

    def __post_init__(self) -> None:
        faults = Faults(self)
        faults.called("source")
        faults.called("augment", optional=True)
        faults.choice("split", get_args(Split))
        faults.number("test_fraction", 0, 1, exclusive=True)
        faults.number("validation_fraction", 0, 1, exclusive=True)
        faults.whole("split_seed", 0)
        faults.whole("limit", 1, optional=True)
        faults.whole("copies", 0)
        faults.choice("empty_classes", get_args(EmptyClasses))
        if self.augment is None and isinstance(self.copies, int) and self.copies > 0:
            faults.found.append(f"copies={self.copies}: needs data.augment")
        faults.raise_if_any()


class DataModule:
    """A data set in memory, split into training, validation and test rows.

    Samples are renumbered so that a row number is the sample index everywhere: training rows first, then validation,
    then test. Teacher logits and residual matrices are stored by this index. The training rows are the original
    samples and after them their copies, if any: row k * originals + i is the k-th copy of sample i.

    Args:
        config: see `DataConfig`.

    Attributes:
        inputs: (N, *input_shape), as the source has them.
        labels: (N,) int64 in [0, num_classes).
        class_labels: the label of each class in the source, where classes without samples were left out; else None.
        class_names: the name of each class; None where the source does not name them.
        originals: number of training samples without their copies.
        sizes: (training, validation, test) number of rows, copies included. Of several ranks each has those it owns,
            and the first all test rows.
        whole: the same of the whole data set.
        task: what is known of the inputs, with statistics of the original training samples.

    Raises:
        ConfigError: where the source fails or gives no `LabelledSet`, a part of the split would be empty, or
            `config.augment` makes no copies.
        DataError: from the source.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        logger.info("loading the data")
        data, self.class_labels = without_empty(load_source(config), config.empty_classes)
        self.name, self.num_classes = data.name, data.num_classes
        self.class_names = None if data.classes is None else list(data.classes)
        train, validation, test = split_rows(data, config)
        order = torch.cat([train.repeat(1 + config.copies), validation, test])
        # index_select: contiguous rows whatever the layout of the source's tensors, and no copy of them in between
        self.inputs, self.labels = data.inputs.index_select(0, order), data.labels.index_select(0, order)
        self.originals = len(train)
        warn_of_unlearned(self.labels[: self.originals], self.num_classes, self.class_labels)
        self.sizes = (len(order) - len(validation) - len(test), len(validation), len(test))
        self.whole = self.sizes
        self._augment_copies()
        self.task = data.task.fitted(self.inputs[: self.originals], self.num_classes)
        trusted(type(self.task))
        if ranks.size() > 1:
            self._keep_own()

    def _keep_own(self) -> None:
        """Keep the rows that this rank owns, and the test rows where it is the first."""
        of_training, of_validation = self.own_rows
        if not (of_training and of_validation):
            raise ConfigError([f"data: {self.whole[:2]} training and validation samples are too few for the processes"])
        _ = self.fingerprint  # of the whole
        before = sum(self.whole[:2])
        test = range(before, before + self.whole[2] * ranks.first())
        kept = torch.tensor([*of_training, *of_validation, *test])
        self.inputs, self.labels = self.inputs.index_select(0, kept), self.labels.index_select(0, kept)
        self.sizes = (len(of_training), len(of_validation), len(test))

    @property
    def own_rows(self) -> tuple[range, range]:
        """The training and the validation rows that this rank owns, by their numbers in the whole data set."""
        n, m = self.whole[:2]
        of_validation = ranks.own(m)
        return ranks.own(n), range(n + of_validation.start, n + of_validation.stop)

    def _augment_copies(self) -> None:
        """Augment, in place, the copies, which are plain so far. What the k-th are does not depend on their number."""
        for k in range(1, self.config.copies + 1):
            assert self.config.augment is not None
            draws = generator(self.config.split_seed, "copies", k)
            for part in self.inputs[k * self.originals : (k + 1) * self.originals].split(COPIES_AT_ONCE):
                try:
                    copies = self.config.augment(part.clone(), draws)
                except Exception as error:  # whatever the user's function raises is the fault
                    raise ConfigError([f"data.augment: fails ({type(error).__name__}: {error})"]) from error
                if (getattr(copies, "dtype", None), getattr(copies, "shape", None)) != (part.dtype, part.shape):
                    raise ConfigError([f"data.augment: gives no {part.dtype} tensor of shape {tuple(part.shape)}"])
                part.copy_(copies)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the inputs and labels of the training and validation rows, in their order."""
        rows = slice(0, self.validation.stop)
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.inputs[rows], self.labels[rows]):
            digest.update(part.numpy().data)
        digest.update(str(self.sizes).encode())
        return digest.hexdigest()

    @property
    def training(self) -> range:
        """The training rows."""
        return range(self.sizes[0])

    @property
    def validation(self) -> range:
        """The validation rows."""
        return range(self.sizes[0], self.sizes[0] + self.sizes[1])

    @property
    def test(self) -> range:
        """The test rows. Read once, at the end of a run; no choice depends on them."""
        return range(self.sizes[0] + self.sizes[1], sum(self.sizes))

    def training_loader(self, batch_size: int, seed: int, stage: str, num_workers: int = 0) -> DataLoader[Batch]:
        """Shuffled training batches, augmented where no copies are; the order is a function of (seed, stage, epoch)."""
        augment = self.config.augment is not None and self.config.copies == 0
        rows = range(self.whole[0])
        sampler = EpochSampler(rows, batch_size, seed, stage, shuffle=True, augment=augment, own=ranks.own(len(rows)))
        return self._loader(sampler, num_workers)

    def loader(self, rows: range, batch_size: int) -> DataLoader[Batch]:
        """Batches of `rows` in order, without augmentation."""
        return self._loader(EpochSampler(rows, batch_size), 0)

    def _loader(self, sampler: "EpochSampler", num_workers: int) -> DataLoader[Batch]:
        # batch_size=None: the sampler's item is a whole batch, so one tensor operation fetches it
        return DataLoader(
            BatchDataset(self),
            sampler=sampler,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=num_workers,
            generator=torch.Generator(),  # of its workers' seeds; it would draw them from the models' own
            persistent_workers=num_workers > 0,
        )


class BatchDataset(Dataset[Batch]):
    """Delivers whole batches by row numbers, one or several at a time."""

    def __init__(self, data: DataModule) -> None:
        self.data = data

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of `key`."""
        rows, augmentation_seed, share = key
        inputs = self.data.inputs.index_select(0, rows)
        if augmentation_seed is not None:
            assert self.data.config.augment is not None
            inputs = self.data.config.augment(inputs, torch.Generator().manual_seed(augmentation_seed))
        parts = rows, self.data.task.prepare(inputs), self.data.labels.index_select(0, rows)
        return Batch(*parts) if share is None else PartOfBatch(*parts, share)

    def __getitems__(self, keys: Sequence[BatchKey]) -> list[Batch]:
        """The batches of `keys`, equal to those fetched one by one.

        Without augmentation they are gathered and normalised together: for 16 MNIST batches of 32 that takes half the
        time. Each batch is its own part of the group's memory and may be written to. Groups whose images take more than
        a few megabytes leave the processor's cache and gain nothing.
        """
        if any(key.augmentation_seed is not None or key.share is not None for key in keys):
            return [self[key] for key in keys]
        sizes = [len(key.rows) for key in keys]
        group = self[BatchKey(torch.cat([key.rows for key in keys]), None)]
        return [Batch(*parts) for parts in zip(*(field.split(sizes) for field in group), strict=True)]


def _as_is(batch: Any) -> Any:
    """In place of the DataLoader's own conversion, which costs as much as fetching a small batch.

    A worker moves its tensors to shared memory here, where an error reaches the training process. Without it they are
    moved by the thread that sends them. Where /dev/shm is full, that thread loses the batch, and the training waits.
    """
    if get_worker_info() is not None:
        for part in batch:
            part.share_memory_()
    return batch


class EpochSampler(Sampler[BatchKey]):
    """Yields one `BatchKey` per batch. Lightning calls `set_epoch` before each epoch.

    Where the last of the shuffled batches would hold one sample, it joins the batch before it. Batch norm cannot train
    on one value per channel, and to drop the sample would leave another one out in each epoch.

    Several ranks follow the same order; of each batch a rank gets those `rows` that it owns, numbered from its first.
    """

    def __init__(
        self, rows: range, batch_size: int, seed: int = 0, stage: str = "", shuffle: bool = False,
        augment: bool = False, own: range | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.batch_size, self.seed, self.stage = rows, batch_size, seed, stage
        self.shuffle, self.augment, self.own = shuffle, augment, own or rows
        self.epoch = 0
        self.left_out = (0, 0)  # an epoch, and how many of its first batches it leaves out: they were trained on before

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def sizes(self) -> list[int]:
        """The number of rows in each batch."""
        whole, rest = divmod(len(self.rows), self.batch_size)
        if self.shuffle and rest == 1 and whole > 0:
            return [self.batch_size] * (whole - 1) + [self.batch_size + 1]
        return [self.batch_size] * whole + [rest] * (rest > 0)

    def __len__(self) -> int:
        return len(self.sizes())

    def __iter__(self) -> Iterator[BatchKey]:
        rows = torch.arange(self.rows.start, self.rows.stop)
        if self.shuffle:
            rows = rows[torch.randperm(len(rows), generator=generator(self.seed, self.stage, "order", self.epoch))]
        epoch, done = self.left_out
        for step, batch in enumerate(rows.split(self.sizes())):
            if step < done and self.epoch == epoch:
                continue
            seed = derive(self.seed, self.stage, "augment", self.epoch, step, *self._part) if self.augment else None
            yield BatchKey(batch, seed) if self.own == self.rows else self._of_own(batch, seed)

    @property
    def _part(self) -> tuple[int, ...]:
        """What tells the draws of a rank from those of the others."""
        return () if self.own == self.rows else (self.own.start,)

    def _of_own(self, batch: Tensor, seed: int | None) -> BatchKey:
        own = batch[(batch >= self.own.start) & (batch < self.own.stop)] - self.own.start
        share = len(own) * ranks.size() / len(batch)
        return BatchKey(own if len(own) else torch.zeros(1, dtype=torch.int64), seed, share)


def load_source(config: DataConfig) -> LabelledSet:
    """Call the source.

    Raises:
        ConfigError: where it cannot be called, fails or gives no `LabelledSet`.
        DataError: from the source.
    """
    root = None if config.root is None else str(Path(config.root).expanduser())
    try:
        inspect.signature(config.source).bind(root=root)
    except (TypeError, ValueError) as error:
        fault = f"data.source: cannot be called with root={config.root!r} ({error}); define it as load(root=None)"
        raise ConfigError([fault]) from error
    try:
        data: object = config.source(root=root)
    except PKDError:
        raise
    except Exception as error:  # whatever the user's function raises is the fault
        raise ConfigError([f"data.source: fails ({type(error).__name__}: {error})"]) from error
    if not isinstance(data, LabelledSet):
        raise ConfigError([f"data.source: gives a {type(data).__name__}, not an ImageSet or other LabelledSet"])
    return data


def split_rows(data: LabelledSet, config: DataConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of `data` for training, validation and test, a function of `config.split_seed` alone.

    Raises:
        ConfigError: where a part would be empty.
    """
    pool = torch.randperm(len(data.labels), generator=generator(config.split_seed, "split"))[: config.limit]
    if config.split == "paper":
        # floor, with a guard against products like 60000 * (1 - 0.34) = 39599.99...
        n_training = int(len(pool) * (1 - config.test_fraction) + 1e-6)
        training, test = pool[:n_training], pool[n_training:]
    else:
        training, test = pool[pool < data.train_size], pool[pool >= data.train_size]
    n_validation = round(len(training) * config.validation_fraction)
    validation, training = training[:n_validation], training[n_validation:]
    parts = {"training": training, "validation": validation, "test": test}
    empty = [name for name, rows in parts.items() if len(rows) == 0]
    if empty:
        raise ConfigError(
            [
                f"data: {len(pool)} samples (limit={config.limit}), split={config.split!r},"
                f" validation_fraction={config.validation_fraction}: no sample is left for {', '.join(empty)}"
            ]
        )
    return training, validation, test
