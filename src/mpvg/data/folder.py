"""Folders of image files: train/ and val/, a folder a class in each."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from mpvg.config import RunConfig
from mpvg.data.contract import Data
from mpvg.data.files import LabelledFiles, open_files
from mpvg.data.images import in_class_order


def open_folder(config: RunConfig, *, device: torch.device, rank: int, world_size: int) -> Data:
    """Lists a folder's images and prepares to read them; arguments and errors as `open_data`."""
    root = Path(config.data)
    if not root.is_dir():
        raise FileNotFoundError(
            f"data folder {config.data!r} does not exist; give one with train/ and val/, and a folder a class in each"
        )
    class_names = _class_names(root / "train")
    train = _list_images(root / "train", class_names, class_names)
    val = _list_images(root / "val", _class_names(root / "val"), class_names)
    splits = [LabelledFiles(Paths.of(split), [target for _, target in split]) for split in (train, val)]
    return open_files(config, class_names, *splits, device=device, rank=rank, world_size=world_size)


@dataclass(frozen=True)
class Paths:
    """Image files by their names."""

    paths: "np.ndarray[Any, Any]"
    """File names, encoded. An array: looking at a list's items writes their reference counts, and so each worker would
    copy a million names."""

    @classmethod
    def of(cls, samples: list[tuple[str, int]]) -> "Paths":
        """The files of a list of samples, file and target each."""
        return cls(np.array([os.fsencode(path) for path, _ in samples]))

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
            f"folder {str(folder)!r} is missing; data need train/ and val/, a folder a class in each"
        )
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        raise FileNotFoundError(f"folder {str(folder)!r} has no class folders; put the images of each class into one")
    return in_class_order(names)


def _list_images(folder: Path, present: list[str], class_names: list[str]) -> list[tuple[str, int]]:
    """File and target of each image, sorted; `present` are the classes that the folder has."""
    unknown = [name for name in present if name not in class_names]
    if unknown:
        raise ValueError(
            f"class {unknown[0]!r} is in {str(folder)!r} but not in train; "
            "add its training images, or take it out of val"
        )
    targets = {name: class_names.index(name) for name in present}
    samples: list[tuple[str, int]] = make_dataset(folder, targets, is_valid_file=_is_image, allow_empty=True)
    filled = {target for _, target in samples}
    empty = [name for name, target in targets.items() if target not in filled]
    if empty:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise ValueError(f"class folder {str(folder / empty[0])!r} has no images ({kinds}); fill it or remove it")
    return samples


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
