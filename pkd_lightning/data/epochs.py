"""A whole epoch as one item for Lightning, its batches fetched a few at a time."""

import logging
from collections.abc import Iterator
from itertools import islice

from torch.utils.data import DataLoader

from pkd_lightning.data.module import Batch, BatchDataset, EpochSampler

logger = logging.getLogger(__name__)
GROUP = 16  # most batches fetched at once
GROUP_BYTES = 2**21  # most memory their images take: what stays in a processor's cache


class EpochLoader:
    """Hands Lightning each epoch as its only item: an iterator over the epoch's batches.

    What Lightning does around an item takes longer than a whole step of a tiny model.

    Args:
        loader: of `DataModule.training_loader`.

    Attributes:
        sampler: gives the order of the batches; Lightning calls its `set_epoch`.
    """

    def __init__(self, loader: DataLoader[Batch]) -> None:
        assert isinstance(loader.sampler, EpochSampler)
        assert isinstance(loader.dataset, BatchDataset)
        self.loader: DataLoader[Batch] | None = loader if loader.num_workers > 0 else None
        self.dataset, self.sampler = loader.dataset, loader.sampler

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        yield self.batches()

    def batches(self) -> Iterator[Batch]:
        """The batches of the sampler's epoch, those of the DataLoader, in its order.

        Where its workers cannot deliver, the rest and all later epochs are loaded in this process: the same batches.
        """
        delivered = 0
        if self.loader is not None:
            try:
                for batch in self.loader:
                    yield batch
                    delivered += 1
                return
            except (OSError, RuntimeError) as error:
                cause = (str(error) or type(error).__name__).splitlines()[-1]
                if not isinstance(error, OSError) and "shared memory" not in cause:
                    raise
            logger.warning(
                "num_workers=%d: the loader processes fail (%s), this process loads the data from here on; give them"
                " room in /dev/shm (docker run --shm-size=...), or set trainer.num_workers=0",
                self.loader.num_workers, cause,
            )  # fmt: skip
            self.loader = None  # ends the processes
        keys = islice(self.sampler, delivered, None)
        batch_bytes = self.sampler.batch_size * self.dataset.data.inputs[0].numel() * 4
        size = max(1, min(GROUP, GROUP_BYTES // batch_bytes))
        while group := list(islice(keys, size)):
            yield from self.dataset.__getitems__(group)
