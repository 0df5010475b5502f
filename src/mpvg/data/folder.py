"""Folders of image files: train/ and val/, each with one folder per class."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from mpvg.config import RunConfig
from mpvg.data.images import ImageFiles
from mpvg.data.listing import Classes, Listing, classes_of, in_class_order
from mpvg.data.types import Split


def open_folder(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Lists the images of a folder; a `Format`."""
    root = Path(config.data)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data folder {config.data!r} does not exist; give one with train/ and val/, each with one folder per class"
        )
    present = {split: _class_names(root / split) for split in splits}
    if class_names is None:
        names = tuple(present["train"] if "train" in present else _class_names(root / "train"))
    else:
        names = classes_of((name for found in present.values() for name in found), class_names)
    sources = {split: _list_images(root / split, present[split], names) for split in splits}
    return Listing(class_names=names, train=sources.get("train"), val=sources.get("val"))


@dataclass(frozen=True)
class Paths:
    """Image files by their paths."""

    paths: "np.ndarray[Any, Any]"
    """Encoded file names. In an array: reading a list's items writes their reference counts, so that each worker would
    copy a million names."""

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def open(self, index: int) -> str:
        return self.name(index)


def _class_names(folder: Path) -> list[str]:
    """Names of the class folders, in the order of the targets."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder {str(folder)!r} is missing; data need train/ and val/, each with one folder per class"
        )
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        raise FileNotFoundError(f"folder {str(folder)!r} has no class folders; put the images of each class into one")
    return in_class_order(names)


def _list_images(folder: Path, present: list[str], class_names: Classes) -> ImageFiles:
    """The images, sorted by path; `present` are the classes that the folder has."""
    unknown = [name for name in present if name not in class_names]
    if unknown:
        raise ValueError(
            f"class {unknown[0]!r} is in {str(folder)!r} but not in train; "
            "add its training images, or remove it from val"
        )
    targets = {name: class_names.index(name) for name in present}
    samples: list[tuple[str, int]] = make_dataset(folder, targets, is_valid_file=_is_image, allow_empty=True)
    filled = {target for _, target in samples}
    empty = [name for name, target in targets.items() if target not in filled]
    if empty:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise ValueError(f"class folder {str(folder / empty[0])!r} has no images ({kinds}); fill it or remove it")
    paths = np.array([os.fsencode(path) for path, _ in samples])
    return ImageFiles(Paths(paths), np.array([target for _, target in samples]))


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
