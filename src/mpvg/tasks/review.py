"""What a task tells of a model's mistakes on a validation set: numbers, charts and examples that any page can show."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappush, heapreplace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import nn

from mpvg.data import Batches
from mpvg.tasks.task import Evaluation, Metric

EXAMPLES = 24
"""Mistakes that are shown with their image."""
Cell = str | int | float | None
"""None: the number is undefined, such as the precision of a class that is never predicted."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a heading; all of them are in a CSV file."""

    name: str
    """Of the file, without its ending."""
    title: str
    text: str
    """What it shows, in sentences."""
    columns: tuple[str, ...]
    """The first one names the rows."""
    rows: Sequence[Sequence[Cell]]
    shares: tuple[str, ...] = ()
    """Columns of numbers in [0, 1], which a page shows as percentages."""
    shown: int | None = None
    """Rows that a page shows; None: all."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What all charts have."""

    name: str
    """Of the file, without its ending."""
    title: str
    text: str
    """What it shows, in sentences."""


@dataclass(frozen=True, kw_only=True)
class Matrix(Chart):
    """A confusion matrix."""

    counts: "npt.NDArray[np.int64]"
    """Of class i (row) that is taken for class j (column), `(C, C)`."""
    class_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Reliability(Chart):
    """How often predictions of a probability are right."""

    counts: Sequence[int]
    """Of images in each bin of equal width between 0 and 1."""
    confidence: Sequence[float]
    """Mean probability of each bin; NaN where it is empty."""
    accuracy: Sequence[float]
    """Share of each bin that is right; NaN where it is empty."""


@dataclass(frozen=True, kw_only=True)
class Curves(Chart):
    """Lines in a square from 0 to 1."""

    x: str
    y: str
    x_values: Sequence[float]
    lines: Mapping[str, Sequence[float]]
    """Name of a line -> its values, NaN where it has none."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image on which the model is wrong."""

    index: int
    """Of the image, among those that were evaluated."""
    picture: Image.Image
    lines: tuple[str, ...]
    """What is wrong."""


class WorstExamples:
    """The `EXAMPLES` worst images so far, the worst first; of equally bad ones the first stay."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Example]] = []

    def add(self, index: int, badness: tuple[float, ...], example: Callable[[], Example]) -> None:
        """Takes an image.

        Args:
            index: of the image in the validation set.
            badness: compared one number after the other; more is worse.
            example: makes what is shown of it, which is only done where it is kept.
        """
        key = (*badness, -index)
        if len(self._heap) < EXAMPLES:
            heappush(self._heap, (key, example()))
        elif key > self._heap[0][0]:
            heapreplace(self._heap, (key, example()))

    def __iter__(self) -> Iterator[Example]:
        return (example for _, example in sorted(self._heap, key=lambda one: one[0], reverse=True))


@dataclass(frozen=True, kw_only=True)
class Review:
    """A model on a validation set."""

    evaluation: Evaluation
    facts: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by their abbreviation, such as `ece`, the expected calibration error."""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    examples_title: str = "The worst images"
    examples_text: str = ""
    examples: Sequence[Example] = ()
    """The worst first."""
    predictions: Sequence[Mapping[str, Any]] = ()
    """JSON-safe, for each image that was evaluated, in order."""


@runtime_checkable
class Reviewing(Protocol):
    """What a task has beside the rest of `Task` if it tells of mistakes."""

    metrics: ClassVar[Mapping[str, Metric]]

    def review(self, model: nn.Module, batches: Batches[Any]) -> Review:
        """Evaluates a model in one pass, on one process, and tells of its mistakes; errors as `Task.evaluate`."""


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures beside each other, with a gap."""
    gap = 4
    whole = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    whole.paste(left)
    whole.paste(right, (left.width + gap, 0))
    return whole


def defined(value: float) -> float | None:
    """The value; None for NaN."""
    return None if np.isnan(value) else float(value)
