"""A whole epoch as one item for Lightning, its batches fetched a few at a time."""

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import DataLoader

from pkd_lightning.data.module import Batch, BatchDataset, EpochSampler

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
        self.loader, self.sampler = loader, loader.sampler

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        yield self.batches()

    def batches(self) -> Iterator[Batch]:
        """The batches of the sampler's epoch, those of the DataLoader, in its order."""
        if self.loader.num_workers > 0:
            yield from self.loader
            return
        dataset, keys = self.loader.dataset, iter(self.sampler)
        assert isinstance(dataset, BatchDataset)
        batch_bytes = self.sampler.batch_size * dataset.data.images[0].numel() * 4
        size = max(1, min(GROUP, GROUP_BYTES // batch_bytes))
        while group := list(islice(keys, size)):
            yield from dataset.__getitems__(group)
