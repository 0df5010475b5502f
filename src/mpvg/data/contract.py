"""What every data set offers, and the order in which its samples come."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """JSON-safe facts of a data set."""

    name: str
    """The set's name or the folder, as it was given."""
    class_names: tuple[str, ...]
    """Names in the order of the targets."""
    in_chans: int
    """Channels of an image: 1 or 3."""
    img_size: int
    """Side in pixels of the square image that reaches the network."""
    mean: tuple[float, ...]
    """Mean of each channel, for values in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for values in [0, 1]."""
    train_size: int
    """Training images, over all processes."""
    val_size: int
    """Validation images, over all processes."""
    crop_pct: float = 0.875
    """timm's pipeline: side of the centre crop at evaluation, as a share of the resized image's shorter side."""
    pipeline: str = "auto"
    """How images become inputs, as `augment.pipeline` asks for it."""

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) != self.in_chans:
                raise ValueError(
                    f"network.{name} is {value}, but {self.name} has {self.in_chans} channel(s); give one each"
                )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


class Batches(Protocol):
    """One split of a data set, read in passes."""

    skipped: int
    """Corrupt images left out so far, one for each time that one was met."""

    def __len__(self) -> int:
        """Batches in an epoch on this process."""

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Reads one pass; a split serves one pass at a time.

        Args:
            epoch: which pass, from 0; with the run's seed it fixes order and augmentation.
            start: batches to leave out at the beginning, in [0, len]; the others are the same bits as without it.

        Yields:
            Normalised images (B, C, H, W), float32, and targets (B,), int64, both on the device.
        """


@dataclass(frozen=True)
class Data:
    """A data set that is ready to be read."""

    info: DataInfo
    train: Batches
    val: Batches
    preprocess: Callable[[Image.Image], Tensor]
    """Turns any image into the network's input (C, H, W), float32 on the CPU, exactly as validation does."""


def derive_seed(*parts: int | str) -> int:
    """Hashes the parts to a seed in [0, 2^32), so that neighbouring parts give unrelated random numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Which samples make up which batch of one process.

    Training shuffles, drops the last incomplete batch and cuts each global batch into one stretch a process, so that
    the stretches, put together by rank, are the same batch for any number of processes. Validation keeps the order;
    process r takes the samples r, r + world_size, ..., each once.

    Raises:
        ValueError: the batch does not divide among the processes, or is larger than the training set.
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
    """Training: times that a drawn sample stands in the epoch, which is no longer for it; copies are shared out."""

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide among {self.world_size} processes; "
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
        """The sample numbers (B,) of each batch from `start` on, int64 on the CPU; plus `size` for each repeat before.

        Raises:
            ValueError: start is not in [0, len].
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}; an epoch has {len(self)} batches, so allowed: 0 to {len(self)}")
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
            drawn, place = torch.randperm(self.size, generator=generator), torch.arange(len(self) * self.batch_size)
            used = drawn[place // self.repeats] + self.size * (place % self.repeats)
            if self.repeats > 1:
                yield from used.view(-1, self._local, self.world_size)[start:, :, self.rank]
            else:
                yield from used.view(-1, self.world_size, self._local)[start:, self.rank]  # (batches, B)
        else:
            yield from torch.arange(self.rank, self.size, self.world_size).split(self._local)[start : len(self)]

    @property
    def _local(self) -> int:
        return self.batch_size // self.world_size
