"""Epochs of a fixed number of steps, for runs whose length is given in steps."""

from collections.abc import Iterator
from typing import TypeVar

from mpvg.data.types import Batch, Batches

B = TypeVar("B", bound=Batch)


class FixedSteps(Batches[B]):
    """Batches of training whose epochs have a given number of steps; passes over the data follow without a break.

    Step n of a run, counted over all epochs, reads the batch that it would read without this.

    Args:
        batches: of the training set.
        steps: of an epoch.
    """

    def __init__(self, batches: Batches[B], steps: int) -> None:
        self._batches, self._steps = batches, steps
        self.unreadable = batches.unreadable

    @property
    def skipped(self) -> int:
        """See `Batches.skipped`."""
        return self._batches.skipped

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[B]:
        """See `Batches.epoch`."""
        first, last = epoch * self._steps + start, (epoch + 1) * self._steps
        while first < last:
            number, offset = divmod(first, len(self._batches))
            for batch in self._batches.epoch(number, offset):
                yield batch
                first += 1
                if first == last:
                    return
