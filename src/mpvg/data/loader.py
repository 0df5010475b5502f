"""Batches of samples that worker processes read one by one; random numbers by (seed, epoch, sample) only."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from mpvg.config import LoaderConfig
from mpvg.data.order import BatchOrder
from mpvg.data.types import ImageBatch, Pipeline, Sample, Source, Transform
from mpvg.seeding import derive_seed, seeded

PARENT_SECONDS = 0.5
"""How often a worker looks whether its parent is still there."""
NAMED = 20
"""Skipped samples that are named; of the others, the number is given."""


class LoadedBatches:
    """Batches of samples, read by worker processes that live as long as this object.

    Args:
        source: the samples.
        pipeline: what becomes of them.
        order: which samples make up which batch.
        config: workers, of which at most one per core that the process may use is started; and whether samples that
            cannot be read are skipped.
        seed: the run's seed.
        device: where batches are wanted.
    """

    def __init__(
        self,
        source: Source,
        pipeline: Pipeline,
        order: BatchOrder,
        config: LoaderConfig,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.unreadable: set[int] = set()
        self._source = source
        self._order, self._pipeline, self._device = order, pipeline, device
        self._skip_corrupt = config.skip_corrupt
        self._passes = 0
        self._sampler = EpochBatchSampler(order)
        workers = min(config.workers, count_cores())
        replace = config.skip_corrupt and order.shuffle  # a training batch keeps its size, validation counts each once
        self._loader = DataLoader(
            SampleDataset(source, pipeline.transform, seed, replace=replace),
            batch_sampler=self._sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_end_with_parent,
            collate_fn=partial(_collate, pipeline.collate),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or each pass would draw from the caller's global generator
        )

    def __len__(self) -> int:
        return len(self._order)

    @property
    def skipped(self) -> int:
        """See `Batches.skipped`."""
        return len(self.unreadable)

    def name(self, number: int) -> str:
        """See `NamedSamples.name`."""
        return self._source.name(number)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        """See `Batches.epoch`; a validation batch in which no image can be read is not yielded.

        Raises:
            ValueError: an image cannot be read.
            RuntimeError: another pass was started before this one ended.
        """
        self._passes += 1
        this_pass, skipped_before = self._passes, self.skipped
        self._sampler.epoch, self._sampler.start = epoch, start
        on_device = self._pipeline.device_transform(epoch) if self._pipeline.device_transform else None
        for (batch, readable, failures), chosen in zip(self._loader, self._order.batches(epoch, start), strict=True):
            if self._passes != this_pass:
                raise RuntimeError("another pass over the same split was started; the workers serve one at a time")
            all_unreadable = self._order.shuffle and batch is None
            if failures and (all_unreadable or not self._skip_corrupt):
                cure = "replace it, or skip such images with --loader.skip_corrupt true"
                raise ValueError(f"{next(iter(failures.values()))}; {cure}")
            self._skip(failures)
            if batch is not None:
                batch = batch.to(self._device)
                yield on_device(batch, chosen[readable]) if on_device else batch
        if self.skipped > max(NAMED, skipped_before):
            _warn(f"{self.skipped} images cannot be read and are skipped")

    def _skip(self, failures: Mapping[int, str]) -> None:
        """Counts the samples of a batch that cannot be read, and names each once."""
        for number in sorted(failures.keys() - self.unreadable):
            self.unreadable.add(number)
            if self.skipped <= NAMED:
                more = "; further ones are counted, not named" if self.skipped == NAMED else ""
                _warn(f"{failures[number]}; skipped{more}")


def count_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _end_with_parent(worker: int) -> None:
    """Ends this worker soon after its parent was killed; torch's workers notice late, and only while they wait."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.pid,), daemon=True).start()


def _watch(parent: int | None) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _warn(text: str) -> None:
    line = "".join(letter if letter.isprintable() else " " for letter in text)  # names and reasons are untrusted
    print(f"mpvg: warning: {line}", file=sys.stderr)


class SampleDataset(Dataset[tuple[Sample | None, dict[int, str]]]):
    """Samples, each read and transformed with random numbers that depend on (seed, epoch, sample) only.

    Args:
        source: the samples.
        transform: applied to each.
        seed: the run's seed.
        replace: read the next sample in place of one that cannot be read.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, *, replace: bool) -> None:
        self._source, self._transform, self._seed, self._replace = source, transform, seed, replace

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: int) -> tuple[Sample | None, dict[int, str]]:
        """Reads sample `key` % N; `key` // N counts epochs, and the repeats within them.

        Returns:
            The transformed sample, or None if it cannot be read; and the samples that were tried in vain, with what was
            wrong with each.
        """
        epoch, index = divmod(key, len(self))
        failures = {}
        for step in range(len(self) if self._replace else 1):
            position = (index + step) % len(self)
            try:
                sample = self._source.read(position)
            except Exception as error:  # decoders of untrusted files raise all kinds of errors
                name = self._source.name(position)
                failures[position] = f"image {name} cannot be read ({type(error).__name__}: {error})"
                continue
            with seeded(derive_seed("sample", self._seed, epoch, index)):
                return self._transform(sample), failures
        return None, failures


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of keys, each the epoch, the repeat and the sample in one number, so that a worker learns all three."""

    def __init__(self, order: BatchOrder) -> None:
        self.epoch, self.start = 0, 0
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self._order.repeats * self._order.size
        for chosen in self._order.batches(self.epoch, self.start):
            yield (first + chosen).tolist()


def _collate(
    collate: Callable[[list[Sample]], Any], samples: Sequence[tuple[Sample | None, dict[int, str]]]
) -> tuple[Any, list[int], dict[int, str]]:
    """A batch, or None if nothing could be read; which of the samples are in it; and the failures by sample, as text.

    An exception raised in a worker would reach the user below the worker's traceback.
    """
    failures = {number: text for _, failed in samples for number, text in failed.items()}
    found = {number: sample for number, (sample, _) in enumerate(samples) if sample is not None}
    return (collate([*found.values()]) if found else None), [*found], failures


def collate_images(samples: list[Sample]) -> ImageBatch:
    """Stacks images `(C, H, W)` and class numbers."""
    targets = torch.tensor([int(sample.target) for sample in samples], dtype=torch.int64)
    return ImageBatch(default_collate([sample.image for sample in samples]), targets)


@dataclass(frozen=True)
class Subset:
    """Some samples of a source, in the order given."""

    source: Source
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def read(self, index: int) -> Sample:
        return self.source.read(self.indices[index])
