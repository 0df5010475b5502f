"""Folders of image files: one folder per class, and in it image files at any depth."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpvg.data.listing import Found, in_class_order
from mpvg.data.rules import (
    IMAGE_ENDINGS,
    MAX_BYTES,
    Names,
    ending,
    is_hidden,
    is_image,
    natural_key,
    report_other_endings,
    say_once,
)
from mpvg.files import check_regular


@dataclass(frozen=True)
class Paths:
    """Image files below a folder."""

    root: str
    names: Names
    """Below the root."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def open(self, index: int) -> str:
        path = self.name(index)
        check_regular(path, limit=MAX_BYTES)
        return path

    def select(self, indices: "np.ndarray[Any, Any]") -> "Paths":
        return Paths(self.root, Names(self.names[index] for index in indices.tolist()))


def images_below(folder: Path) -> list[str]:
    """The image files at any depth below a folder, by their paths below it, 2 before 10.

    Raises:
        OSError: a folder in it cannot be read.
        ValueError: something that is named as an image is no file.
    """
    tree = _Tree(str(folder))
    tree.report("the folder")
    paths = [f"{inner}/{name}" if inner else name for inner, images in tree.folders.items() for name, _ in images]
    return sorted(paths, key=natural_key)


def list_folder(folder: Path, split: str) -> Found:
    """The images of a folder with one folder per class: by class, then by folder, then by name.

    Raises:
        FileNotFoundError: it is missing or has no class folders.
        OSError: a folder in it cannot be read.
        ValueError: a class has no images, an image is in no class folder, or something is no file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder {str(folder)!r} is missing; data need train/ and val/, each with one folder per class"
        )
    tree = _Tree(str(folder))
    classes = tuple(in_class_order(name for name in tree.folders if name and "/" not in name))
    if not classes:
        raise FileNotFoundError(f"folder {str(folder)!r} has no class folders; put the images of each class into one")
    tree.report(split)
    if loose := tree.folders[""]:
        raise ValueError(f"image {str(folder / min(loose)[0])!r} is in no class folder; put it into one, or remove it")
    inner_folders: dict[str, list[str]] = {name: [] for name in classes}
    for inner in tree.folders:
        if inner:
            inner_folders[inner.split("/", 1)[0]].append(inner)
    labels: list[int] = []
    paths: list[str] = []
    names: list[str] = []
    sizes: list[int] = []
    for label in sorted(classes):
        for inner in sorted(inner_folders[label]):
            for name, size in sorted(tree.folders[inner]):
                paths.append(path := f"{inner}/{name}")
                names.append(path[len(label) + 1 :])
                sizes.append(size)
        if len(paths) == len(labels):
            kinds = ", ".join(IMAGE_ENDINGS)
            raise ValueError(f"class folder {str(folder / label)!r} has no images ({kinds}); fill it or remove it")
        labels += [classes.index(label)] * (len(paths) - len(labels))
    return Found(
        where=repr(str(folder)),
        classes=classes,
        titles=classes,
        labels=np.array(labels),
        names=names,
        sizes=np.array(sizes),
        files=Paths(str(folder), Names(paths)),
    )


class _Tree:
    """What lies below a folder, each real folder once: a link leads to what is not listed yet, or is left out."""

    def __init__(self, root: str) -> None:
        self.folders: dict[str, list[tuple[str, int]]] = {}
        """Each folder, by its path below the root, and its images with their sizes in bytes; -1: unknown."""
        self._root, self._endings, self._left_out = root, Counter[str](), list[str]()
        real = os.path.realpath(root)
        self._seen = {str(path) for path in Path(real).parents}
        links = self._list_below("", real)
        while links:  # after the folders themselves, so that a folder is listed under its own name
            found = []
            for link in sorted(links):
                found += self._list_below(link, os.path.realpath(os.path.join(root, link)))
            links = found

    def report(self, split: str) -> None:
        """Says what is left out."""
        report_other_endings(split, self._root, self._endings)
        if self._left_out:
            links = f"{len(self._left_out)} links of {split}" if len(self._left_out) > 1 else f"a link of {split}"
            say_once(f"{links} to folders that are listed already: {self._left_out[0]}; left out of {self._root}")

    def _list_below(self, start: str, real_start: str) -> list[str]:
        """Lists a folder and those below it; returns the links to others, which are not followed."""
        links = []
        pending = [(start, real_start)]
        while pending:
            inner, real = pending.pop()
            if real in self._seen:
                self._left_out.append(inner)
                continue
            self._seen.add(real)
            images = self.folders[inner] = []
            with os.scandir(real) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    name = f"{inner}/{entry.name}" if inner else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((name, os.path.join(real, entry.name)))
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        links.append(name)
                    elif is_image(entry.name):
                        images.append((entry.name, _size(entry)))
                    else:
                        self._endings[ending(entry.name)] += 1
        return links


def _size(entry: "os.DirEntry[str]") -> int:
    """Bytes of an image; -1 where a link leads nowhere, which is found out when it is read."""
    try:
        found = entry.stat()
    except OSError:
        return -1
    check_regular(entry.path, found.st_mode)
    return found.st_size
