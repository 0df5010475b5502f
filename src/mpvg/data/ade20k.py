"""Data in ADE20K's layout: `ade20k/<folder>`, with an image and a label map of the same name in parallel folders.

    ade20k/images/training/ADE_train_00000001.jpg     ade20k/annotations/training/ADE_train_00000001.png
    ade20k/images/validation/ADE_val_00000001.jpg     ade20k/annotations/validation/ADE_val_00000001.png

Label 0 is no class and is not learned, and label k is class k - 1; with `reduce_zero_label: false` in `task_options`
label k is class k, and 255 is no class. Names of the classes come from classes.txt, a name a line, or else from
ADE20K's own objectInfo150.txt; where there is neither, classes are the labels up to the largest of training.

An image without a label map, a label map without an image, and one with a label beyond the classes are named, counted
and refused; `loader.skip_corrupt` leaves them out instead.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mpvg.config import RunConfig
from mpvg.data.annotations import mismatch
from mpvg.data.canvas import annotated_folder
from mpvg.data.findings import Findings
from mpvg.data.folder import Paths
from mpvg.data.images import AnnotatedFiles, read_label_map
from mpvg.data.inventory import CONTENT, Inventory
from mpvg.data.listing import Classes, Listing, check_spelling
from mpvg.data.rle import Mask
from mpvg.data.rules import Names, is_hidden, is_image, read_bounded
from mpvg.data.types import Split
from mpvg.files import check_regular, open_regular, read_regular
from mpvg.validation import check, shown

NAME = "ade20k"
IMG_SIZE = 512
"""The paper's crop, which a listing gives as the images' side."""
IGNORED = 255
"""Value in a label map of a pixel that is of no class."""
MAX_CLASSES = 255
_FOLDERS: dict[Split, str] = {"train": "training", "val": "validation"}
_MAX_NAMES = 2**20


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The class of each pixel of an image."""

    labels: Mask
    """(H, W), from 0 on; `IGNORED`: of no class."""

    def check_size(self, width: int, height: int) -> None:
        """Raises ValueError unless the image has the label map's size."""
        if self.labels.shape != (height, width):
            raise ValueError(mismatch(width, height, self.labels.shape[1], self.labels.shape[0]))


@dataclass(frozen=True, eq=False)
class LabelFiles(Sequence[LabelMap]):
    """The label maps of a split, read when they are asked for."""

    files: Paths
    num_classes: int
    reduce_zero_label: bool

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LabelMap:  # type: ignore[override]
        file = self.files.open(index)
        try:
            labels = reduced(read_label_map(file)) if self.reduce_zero_label else read_label_map(file)
            if len(bad := beyond(labels, self.num_classes)):
                shift = 1 if self.reduce_zero_label else 0
                raise ValueError(f"it has the labels {(bad + shift).tolist()}; there are {self.num_classes} classes")
        except Exception as error:  # of a damaged file, of many types
            raise ValueError(f"its label map {file}: {type(error).__name__}: {error}") from error
        return LabelMap(labels)


def reduced(labels: Mask) -> Mask:
    """Labels of which 0 was no class: 1 becomes 0, and 0 becomes `IGNORED`, as 255 stays."""
    return np.where(labels == IGNORED, np.uint8(IGNORED), labels - np.uint8(1))


def beyond(labels: Mask, num_classes: int) -> "np.ndarray[Any, Any]":
    """The labels that are of none of the classes."""
    found = np.unique(labels)
    return found[(found >= num_classes) & (found != IGNORED)]


def open_ade20k(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Lists a data set in ADE20K's layout; a `Format`.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: files do not belong together, or names or labels of the classes are damaged.
    """
    root, img_size = annotated_folder(config, NAME, IMG_SIZE)
    reduce = config.task_options.get("reduce_zero_label", True)
    check("task_options.reduce_zero_label", reduce, isinstance(reduce, bool), "true, false")
    strict = not config.loader.skip_corrupt
    found = {split: _find(root, split, strict=strict) for split in splits}
    names = _named(root) or class_names or _counted(found.get("train") or _find(root, "train", strict=strict), reduce)
    if not 1 <= len(names) <= MAX_CLASSES:
        raise ValueError(
            f"{root} has {len(names)} classes; allowed: 1 to {MAX_CLASSES}, which labels of 8 bits tell apart"
        )
    check_spelling(names)
    sources = {
        split: AnnotatedFiles(one.images, LabelFiles(one.labels, len(names), reduce)) for split, one in found.items()
    }
    return Listing(
        class_names=names,
        train=sources.get("train"),
        val=sources.get("val"),
        img_size=img_size,
        inventories={split: one.inventory() for split, one in found.items()},
    )


@dataclass(frozen=True)
class _Found:
    """Images of a split and their label maps."""

    images: Paths
    labels: Paths

    def inventory(self) -> Inventory:
        """Names, sizes of the images, and hashes of the label files."""
        names = [self.images.names[index] for index in range(len(self.images))]
        sizes = [os.stat(self.images.name(index)).st_size for index in range(len(names))]
        return Inventory.of((CONTENT + _hash(self.labels.open(index)) for index in range(len(names))), sizes, names)


def _hash(path: str) -> str:
    with open_regular(path) as file:
        return blake2b(read_bounded(file, path), digest_size=8).hexdigest()


def _find(root: Path, split: Split, *, strict: bool) -> _Found:
    folders = [root / kind / _FOLDERS[split] for kind in ("images", "annotations")]
    images, labels = _stems(folders[0], is_image), _stems(folders[1], lambda name: name.lower().endswith(".png"))
    findings = Findings(str(folders[0]), strict=strict)
    stems = sorted(images.keys() | labels.keys())
    everyone = np.ones(len(stems), bool)
    both = findings.refuse("image", "has no label map", everyone, _lacking(stems, labels), stems)
    both = findings.refuse("label map", "has no image", both, _lacking(stems, images), stems)
    findings.report()
    if not both.any():
        raise FileNotFoundError(f"{folders[0]} has no images with label maps in {folders[1]}")
    chosen = [stem for stem, good in zip(stems, both.tolist(), strict=True) if good]
    paths = [
        Paths(str(folder), Names(names[stem] for stem in chosen))
        for folder, names in zip(folders, (images, labels), strict=True)
    ]
    return _Found(*paths)


def _lacking(stems: Sequence[str], found: dict[str, str]) -> "np.ndarray[Any, Any]":
    return np.array([stem not in found for stem in stems], bool)


def _stems(folder: Path, wanted: Any) -> dict[str, str]:
    """Name without ending -> name, of the files of a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder {str(folder)!r} is missing; data in ADE20K's layout have images/ and annotations/, each with "
            "training/ and validation/"
        )
    found: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name) or not wanted(entry.name):
                continue
            if os.path.exists(entry.path):
                check_regular(entry.path)
            stem = os.path.splitext(entry.name)[0]
            if stem in found:
                raise ValueError(f"{folder} has both {found[stem]!r} and {entry.name!r}; remove one")
            found[stem] = entry.name
    return found


def _named(root: Path) -> Classes | None:
    """The names of the classes in a file of them."""
    for name in ("classes.txt", "objectInfo150.txt"):
        path = root / name
        if not path.exists():
            continue
        try:
            lines = [line.strip() for line in read_regular(path, _MAX_NAMES).decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not in UTF-8 ({error.reason}); save it as UTF-8") from error
        names = [line for line in lines if line]
        if name != "classes.txt":  # the columns of a table with a head: Idx, Ratio, Train, Val, Name
            names = [line.split("\t")[-1].strip() for line in names[1:]]
        if not names or not all(names) or not all(map(str.isprintable, names)):
            raise ValueError(f"{path} must hold the name of a class in each line")
        if twice := next((one for one in names if names.count(one) > 1), None):
            raise ValueError(f"{path} has the class {shown(twice)} twice; give each a name of its own")
        return tuple(names)
    return None


def _counted(train: _Found, reduce: bool) -> Classes:
    """As many classes as the label maps of training have labels, named by their labels."""
    largest = -1
    for index in range(len(train.labels)):
        file = train.labels.open(index)
        try:
            labels = read_label_map(file)
        except Exception as error:  # of a damaged file, of many types
            raise ValueError(f"label map {file} cannot be read ({error}), and no classes.txt names classes") from error
        largest = max(largest, int(np.max(labels, where=labels != IGNORED, initial=0)))
    return tuple(str(label) for label in range(1 if reduce else 0, largest + 1))
