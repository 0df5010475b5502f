"""The order in which samples are read: a function of the seed and the epoch, for any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpvg.seeding import derive_seed


def describe_left_out(size: int, batch_size: int, repeats: int = 1) -> str | None:
    """What an epoch of training leaves out, in a sentence, with the cure; None: nothing.

    Args:
        size: images of the training set, at least a batch.
        batch_size: images of a batch, over all processes.
        repeats: copies of each drawn image per epoch.
    """
    read = -(-(size // batch_size * batch_size) // repeats)
    if read == size:
        return None
    said = f"{size - read} of {size} images are left out of each epoch, others each time"
    if repeats > 1:
        return f"{said}: augment.repeats {repeats} reads each drawn image {repeats} times"
    # Half as small at most: a much smaller batch would train another network. Even, as mixup needs it.
    sizes = range(batch_size, batch_size // 2 - 1, -2 if batch_size % 2 == 0 else -1)
    best = min(sizes, key=lambda b: size % b if b else size)
    cure = (
        f"a batch_size of {best} leaves out {size % best}"
        if best != batch_size
        else "no batch_size near it does better"
    )
    return f"{said}: batch_size {batch_size} leaves an incomplete batch; {cure}"


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
    groups: Tensor | None = None
    """Training: which of two groups, True and False, each sample is of, (size,); a batch is of one group, but for at
    most one batch of an epoch, which what is left of both makes up. None: batches are of all samples."""
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

        assert self.groups is None or self.repeats == 1, "repeated samples are not grouped"

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
            if self.groups is not None:
                drawn = self._grouped(drawn, self.groups, generator)
            slot = torch.arange(len(self) * self.batch_size)
            used = drawn[slot // self.repeats] + self.size * (slot % self.repeats)
            if self.repeats > 1:
                yield from used.view(-1, self._local, self.world_size)[start:, :, self.rank]
            else:
                yield from used.view(-1, self.world_size, self._local)[start:, self.rank]  # (batches, B)
        else:
            yield from torch.arange(self.rank, self.size, self.world_size).split(self._local)[start : len(self)]

    def _grouped(self, drawn: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
        """Sorts what an epoch uses into batches, each of one group but for one, in random order."""
        drawn = drawn[: len(self) * self.batch_size]  # what is left out is of any group
        parts = [drawn[groups[drawn]], drawn[~groups[drawn]]]
        ends = [len(part) // self.batch_size * self.batch_size for part in parts]
        rest = [part[end:] for part, end in zip(parts, ends, strict=True)]  # a batch together, or none
        whole = [part[:end] for part, end in zip(parts, ends, strict=True)]
        batches = torch.cat([*whole, *rest]).view(-1, self.batch_size)
        return batches[torch.randperm(len(batches), generator=generator)].flatten()

    @property
    def _local(self) -> int:
        return self.batch_size // self.world_size
