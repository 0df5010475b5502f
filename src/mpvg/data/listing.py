"""What a format finds in a data set's files, and how the files of its splits become classes and targets."""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mpvg.config import RunConfig
from mpvg.data.images import Files, ImageFiles
from mpvg.data.inventory import Inventory
from mpvg.data.rules import natural_key
from mpvg.data.types import Source, Split

Classes = tuple[str, ...]
NO_SHARE = "have a validation split of their own; leave val_share out"
"""Why `val_share` is refused."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A data set's classes and the samples of its splits; the other fields are what a run uses if not told."""

    class_names: Classes
    """In the order of the targets; empty where targets are not classes."""
    train: Source | None = None
    """None: it was not asked for."""
    val: Source | None = None
    """None: it was not asked for."""
    category_ids: tuple[int, ...] = ()
    """Ids of the classes in the data set's own files, in the order of the targets; empty: they have none."""
    in_chans: int = 3
    """Channels of the images: 1 or 3."""
    img_size: int = 224
    """Side of the square input in pixels."""
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    """Channel means, for values in [0, 1]."""
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    """Channel standard deviations."""
    mean_image: tuple[float, ...] | None = None
    """What `subtract_mean` subtracts from every image, `(C, S, S)` flattened, in [0, 255]; None: nothing or unknown."""
    inventories: Mapping[Split, Inventory] = field(default_factory=dict)
    """Names, sizes and targets of the samples; a format that gives none cannot tell whether its data were changed."""

    def source(self, split: Split) -> Source:
        """The samples of a split that was asked for."""
        found = self.train if split == "train" else self.val
        assert found is not None, f"{split} was not opened"
        return found


Format = Callable[[RunConfig, Sequence[Split], Classes | None], Listing]
"""Lists a data set: given the config, the splits that are wanted, and the class names if they are known already, as in
the evaluation of a run, which then need not be looked for in the training set."""


class SelectableFiles(Files, Protocol):
    """Files of which some can be taken."""

    def select(self, indices: "np.ndarray[Any, Any]") -> "SelectableFiles":
        """The files of some numbers, in that order."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The labelled image files of one split, from wherever they are read."""

    where: str
    """What messages call the split."""
    classes: Classes
    """Labels, in the order of the targets: names of the class folders, or numbers."""
    titles: Classes
    """The name of each; two labels may have the same."""
    labels: "np.ndarray[Any, Any]"
    """Of each file, the index of its class in `classes`, `(N,)`."""
    names: Sequence[str]
    """Of each file, its name within the class."""
    sizes: "np.ndarray[Any, Any]"
    """Of each file, its bytes, `(N,)`; -1: it cannot be told."""
    files: SelectableFiles

    def select(self, indices: "np.ndarray[Any, Any]") -> "Found":
        """Some of the files, in that order; the classes stay."""
        return replace(
            self,
            labels=self.labels[indices],
            names=[self.names[index] for index in indices],
            sizes=self.sizes[indices],
            files=self.files.select(indices),
        )


def list_splits(
    config: RunConfig,
    splits: Sequence[Split],
    known: Classes | None,
    list_one: Callable[[Split], Found],
    *,
    has_val: bool,
    by_label: bool = False,
) -> Listing:
    """Lists the splits that are wanted, of which `val` may have to be held out of `train`.

    Args:
        config: `val_share` of it.
        splits: that are wanted.
        known: the names of the classes, if they are known.
        list_one: lists one split.
        has_val: whether there is a validation split.
        by_label: classes are the training set's in any case.

    Raises:
        ValueError: there is no validation split and none is asked for, or both; or what `make_listing` refuses.
    """
    if has_val and config.val_share and "train" in splits:
        raise ValueError(f"val_share is {config.val_share}, but data {config.data!r} {NO_SHARE}")
    if not has_val and not config.val_share and "val" in splits:
        try:
            list_one("val")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; or hold out a share of train: --val_share 0.1") from error
    share = 0.0 if has_val else config.val_share
    wanted: Sequence[Split] = ("train",) if share else splits
    found = {split: list_one(split) for split in wanted}
    train: Found | None = None
    if share:
        train, val = hold_out(found["train"], share)
        both: dict[Split, Found] = {"train": train, "val": val}
        found = {split: both[split] for split in splits}
    train = train or found.get("train")
    return make_listing(config.data, found, lambda: train or list_one("train"), known, by_label=by_label)


def make_listing(
    data: str,
    found: Mapping[Split, Found],
    train: Callable[[], Found],
    known: Classes | None,
    *,
    by_label: bool = False,
) -> Listing:
    """Joins the splits of a data set: targets are numbers of classes, which the training set fixes.

    Args:
        data: what messages call the data set.
        found: the splits that are wanted.
        train: lists the training set, which is called where classes are not known.
        known: the names of the classes, if they are known.
        by_label: classes are the training set's in any case.

    Raises:
        ValueError: a class is not in the training set, or is the only one; or two names look alike.
    """
    numbered = any(split.titles != split.classes for split in found.values())
    twice = known is not None and len(set(known)) < len(known)  # ImageNet has two classes named "crane"
    base = train() if known is None or by_label or (twice and numbered) else None
    everyone = [*found.values(), *([base] if base else [])]
    check_spelling({title for split in everyone for title in split.titles} | set(known or ()))
    names = base.titles if base else classes_of((name for f in found.values() for name in f.titles), known)
    if known is None and base and len(names) == 1:
        raise ValueError(_only_class(data, base))
    targets = {split: _targets(f, base, names)[f.labels] for split, f in found.items()}
    sources = {split: ImageFiles(f.files, targets[split]) for split, f in found.items()}
    return Listing(
        class_names=names,
        train=sources.get("train"),
        val=sources.get("val"),
        inventories={split: _inventory(f, targets[split]) for split, f in found.items()},
    )


def _targets(found: Found, base: Found | None, names: Classes) -> "np.ndarray[Any, Any]":
    """The target of each class of a split `(classes,)`."""
    same_kind = base is not None and (base.titles != base.classes) == (found.titles != found.classes)
    keys, own = (base.classes, found.classes) if base is not None and same_kind else (names, found.titles)
    number = {key: target for target, key in enumerate(keys)}
    if len(number) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(
            f"two classes are named {twice!r}, so the folders of {found.where} do not say which; "
            "give train and val in the same form"
        )
    if unknown := [key for key in own if key not in number]:
        raise ValueError(
            f"class {unknown[0]!r} is in {found.where} but not in train; add its training images, or remove it from val"
        )
    return np.array([number[key] for key in own], dtype=np.int64)


def _inventory(found: Found, targets: "np.ndarray[Any, Any]") -> Inventory:
    names = (f"{found.classes[label]}/{name}" for label, name in zip(found.labels.tolist(), found.names, strict=True))
    return Inventory.of(targets.tolist(), found.sizes.tolist(), names)


def _only_class(data: str, found: Found) -> str:
    inner = sorted({name.split("/", 1)[0] for name in found.names if "/" in name}, key=natural_key)
    if len(inner) > 1:
        some = ", ".join(inner[:3]) + (", ..." if len(inner) > 3 else "")
        cure = (
            f"its folders {some} lie one level too deep to be classes: move them up one level, "
            "or give the folder above them as the data"
        )
    else:
        cure = "classes are the first folders below train: check that they are not one level too high or too deep"
    return f"data {data!r} has one class only, {found.titles[0]!r}, and a classifier needs two; {cure}"


def check_spelling(names: Iterable[str]) -> None:
    """Refuses names that are the same text in two Unicode spellings.

    Raises:
        ValueError: naming both.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            one, two = sorted((name, other), key=len)
            raise ValueError(
                f"the class names {one!r} and {two!r} look the same but are spelled differently in Unicode: {one!a} "
                f"has {len(one)} characters, {two!a} has {len(two)}; rename one, so that all splits spell it {one!a}"
            )


def in_class_order(names: Iterable[str]) -> list[str]:
    """Class names in timm's order (2 before 10)."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def classes_of(found: Iterable[str], known: Classes | None) -> Classes:
    """The known classes where they include all that were found and each has a name of its own; otherwise the found."""
    found = set(found)
    fits = known is not None and found <= set(known) and len(set(known)) == len(known)
    return known if known is not None and fits else tuple(in_class_order(found))


def hold_out(found: Found, share: float) -> tuple[Found, Found]:
    """Splits a set into one for training and one for validation.

    A hash of a file's class and name decides, so files stay where they are when others are added. A class of two files
    or more has at least one on either side, so in very small classes one file may change sides.

    Args:
        found: the whole set.
        share: about how much of each class is for validation, in (0, 1).
    """
    limit = share * 2**64
    hashes: dict[int, list[tuple[int, int]]] = {}
    for index, (label, name) in enumerate(zip(found.labels.tolist(), found.names, strict=True)):
        text = f"{found.classes[label]}/{name}".encode("utf-8", "surrogateescape")
        value = int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
        hashes.setdefault(label, []).append((value, index))
    held_out = np.zeros(len(found.labels), dtype=bool)
    for values in hashes.values():
        values.sort()
        below = sum(value < limit for value, _ in values)
        count = min(max(below, 1), len(values) - 1)
        held_out[[index for _, index in values[:count]]] = True
    return found.select(np.flatnonzero(~held_out)), found.select(np.flatnonzero(held_out))
