"""A folder given as the data: train and val in it, each as a folder or as tar files; or one set to be split."""

import os
from collections.abc import Sequence
from pathlib import Path

from mpvg.config import RunConfig
from mpvg.data.archives import archives, list_archives
from mpvg.data.folder import list_folder
from mpvg.data.listing import Classes, Found, Listing, list_splits
from mpvg.data.rules import is_hidden, is_image
from mpvg.data.types import Split


def open_files(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Lists the images of a folder; a `Format`."""
    root = Path(config.data)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data folder {config.data!r} does not exist; give one with train/ and val/, each with one folder per class"
        )
    return list_splits(config, splits, class_names, lambda split: _list(root, split), has_val=_is_there(root, "val"))


def _list(root: Path, split: Split) -> Found:
    """Lists a split in the form that it has."""
    folder, tars = root / split, archives(root, split)
    if tars and _has_images(folder):
        raise ValueError(
            f"{root} has {split} twice, as the folder {folder} and as the tar file {tars[0]}; remove or rename one"
        )
    if tars:
        return list_archives(tars, root, split)
    other: Split = "val" if split == "train" else "train"
    if folder.is_dir() and (_has_images(folder) or not archives(root, other)):
        return list_folder(folder, split)
    if split == "train" and not _is_there(root, "val") and _has_images(root):
        return list_folder(root, split)
    if archives(root, other):
        raise FileNotFoundError(f"no tar file of {split} in {root}; give {split}.tar, {split}-*.tar or {split}/*.tar")
    return list_folder(folder, split)  # which says that it is missing


def _is_there(root: Path, split: Split) -> bool:
    return (root / split).is_dir() or bool(archives(root, split))


def _has_images(folder: Path) -> bool:
    """Whether a folder holds folders or images, other than tar files."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(not is_hidden(entry.name) and (entry.is_dir() or is_image(entry.name)) for entry in entries)
