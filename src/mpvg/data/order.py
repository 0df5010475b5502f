"""The order in which samples are read: a function of the seed and the epoch, for any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpvg.seeding import derive_seed


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which samples make up which batch on one process.

    Training shuffles, drops the last incomplete batch and cuts each global batch into one contiguous part per process,
    so that the parts, concatenated by rank, are the same batch for any number of processes. Validation keeps the order;
    process r takes the samples r, r + world_size, ..., each once.

    Raises:
        ValueError: the batch size is not a multiple of the number of processes, or larger than the training set.
    """

    size: int
    """Samples of the split."""
    batch_size: int
    """Samples of a batch, over all processes."""
    shuffle: bool
    """Whether this is training."""
    seed: int
    rank: int
    world_size: int
    repeats: int = 1
    """Training: copies of each drawn sample per epoch, on different processes; the epoch length is unchanged."""

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by the number of processes, {self.world_size}; "
                "it counts the images of all processes, so give a multiple of their number"
            )
        if self.shuffle and self.size < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is larger than the training set, {self.size} images, "
                f"and incomplete batches are dropped; give a batch_size of at most {self.size}"
            )

    def __len__(self) -> int:
        if self.shuffle:
            return self.size // self.batch_size
        return -(-len(range(self.rank, self.size, self.world_size)) // self._local)

    def batches(self, epoch: int, start: int) -> Iterator[Tensor]:
        """The sample numbers (B,) of each batch from `start` on, int64 on the CPU; copy k of sample i is i + k * size.

        Raises:
            ValueError: start is not in [0, len].
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}; an epoch has {len(self)} batches, so allowed: 0 to {len(self)}")
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
            drawn = torch.randperm(self.size, generator=generator)
            slot = torch.arange(len(self) * self.batch_size)
            used = drawn[slot // self.repeats] + self.size * (slot % self.repeats)
            if self.repeats > 1:
                yield from used.view(-1, self._local, self.world_size)[start:, :, self.rank]
            else:
                yield from used.view(-1, self.world_size, self._local)[start:, self.rank]  # (batches, B)
        else:
            yield from torch.arange(self.rank, self.size, self.world_size).split(self._local)[start : len(self)]

    @property
    def _local(self) -> int:
        return self.batch_size // self.world_size
