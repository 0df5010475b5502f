"""What a format finds in a data set's files, and the order of the classes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import natural_key

from mpvg.config import RunConfig
from mpvg.data.types import Source, Split

Classes = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A data set's classes and the samples of its splits; the last four fields are what a run uses if not told."""

    class_names: Classes
    """In the order of the targets; empty where targets are not classes."""
    train: Source | None = None
    """None: it was not asked for."""
    val: Source | None = None
    """None: it was not asked for."""
    in_chans: int = 3
    """Channels of the images: 1 or 3."""
    img_size: int = 224
    """Side of the square input in pixels."""
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    """Channel means, for values in [0, 1]."""
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    """Channel standard deviations."""

    def source(self, split: Split) -> Source:
        """The samples of a split that was asked for."""
        found = self.train if split == "train" else self.val
        assert found is not None, f"{split} was not opened"
        return found


Format = Callable[[RunConfig, Sequence[Split], Classes | None], Listing]
"""Lists a data set: given the config, the splits that are wanted, and the class names if they are known already, as in
the evaluation of a run, which then need not be looked for in the training set."""


def in_class_order(names: Iterable[str]) -> list[str]:
    """Class names in timm's order (2 before 10)."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def classes_of(found: Iterable[str], known: Classes | None) -> Classes:
    """The known classes where they include all that were found and each has a name of its own; otherwise the found."""
    found = set(found)
    fits = known is not None and found <= set(known) and len(set(known)) == len(known)
    return known if known is not None and fits else tuple(in_class_order(found))
