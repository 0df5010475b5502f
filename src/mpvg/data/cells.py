"""Sets in which the place is the class: one item among others on a grid of cells, made from an embedded set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpvg.data.types import Contents, Split, Tensors

SIDE = 4
"""Cells in a row and in a column."""
SIZES: dict[Split, int] = {"train": 4096, "val": 1024}
"""Images of a split: as many of each class."""
_SEEDS: dict[Split, int] = {"train": 0, "val": 1}


@dataclass(frozen=True)
class Cells:
    """Makes images of SIDE x SIDE cells, each with an image of another set; called, it is the reader of a named set.

    One cell, at random, has an item of the wanted kind, and its number, row by row, is the class. Every other cell has
    an item of any other kind. So the items say nothing about the class: which of them are in an image is independent of
    it, and moving the wanted item to another cell makes an image of another class of the same patches.
    """

    read: Callable[[str | None, Sequence[Split]], Contents]
    """Reads the other set; the images of a split are made from the same split of it."""
    wanted: int
    """The class, there, of the item that is looked for."""
    shrink: int = 1
    """Each item is made smaller by the mean over squares of so many pixels."""

    def __call__(self, root: str | None, splits: Sequence[Split]) -> Contents:
        """Makes some splits, always with the same pixels.

        Raises:
            FileNotFoundError, ModuleNotFoundError: the other set is not there.
            ValueError: it is damaged, or has no item of the wanted kind or none of another.
        """
        source = self.read(root, splits)
        names = tuple(f"row {row + 1}, column {column + 1}" for row in range(SIDE) for column in range(SIDE))
        made = {split: self._make(getattr(source, split), split, source.class_names) for split in splits}
        return Contents(names, **made)

    def _make(self, source: Tensors, split: Split, names: tuple[str, ...]) -> Tensors:
        kinds = source.targets.numpy()
        wanted, others = np.flatnonzero(kinds == self.wanted), np.flatnonzero(kinds != self.wanted)
        if not len(wanted) or not len(others):
            name = names[self.wanted]
            raise ValueError(
                f"{split} has {len(wanted)} images of {name!r} and {len(others)} of other classes, and cells need "
                "both; get the complete set"
            )
        count, cells = SIZES[split], SIDE * SIDE
        # RandomState's numbers never change with NumPy's version, unlike those of its successor.
        random: Any = np.random.RandomState(_SEEDS[split])
        places = random.permutation(np.arange(count, dtype=np.int64) % cells)
        chosen = others[random.randint(len(others), size=(count, cells), dtype=np.int64)]
        chosen[np.arange(count), places] = wanted[random.randint(len(wanted), size=count, dtype=np.int64)]
        items = _shrunk(source.images.numpy(), self.shrink)
        side = items.shape[-1]
        grids = items[chosen, 0].reshape(count, SIDE, SIDE, side, side).transpose(0, 1, 3, 2, 4)
        images = np.ascontiguousarray(grids).reshape(count, 1, SIDE * side, SIDE * side)
        return Tensors(torch.from_numpy(images), torch.from_numpy(places))


def _shrunk(images: Any, factor: int) -> Any:
    """Means over squares, `(N, C, H, W)`, uint8, rounded down: whole numbers, so the same on every machine."""
    count, channels, height, width = images.shape
    squares = images.reshape(count, channels, height // factor, factor, width // factor, factor)
    return (squares.sum(axis=(3, 5), dtype=np.int64) // factor**2).astype(np.uint8)
