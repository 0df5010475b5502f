"""Tar files of images, read in place: plain ones with one folder per class, and WebDataset shards.

The position of every member is looked up once, so that order, shards and resumption are those of single files: each
image once, in any order, with any number of processes.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from timm.utils import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from mpvg.config import RunConfig
from mpvg.data.images import ImageFiles
from mpvg.data.listing import Classes, Listing, classes_of, in_class_order
from mpvg.data.types import Split


def archives(root: str | Path, split: str) -> list[Path]:
    """The tar files of a split: <root>/<split>.tar, <root>/<split>-*.tar, or <root>/<split>/*.tar; sorted."""
    root = Path(root)
    found = [*root.glob(f"{split}.tar"), *root.glob(f"{split}-*.tar"), *root.glob(f"{split}/*.tar")]
    return sorted(found, key=lambda path: natural_key(str(path)))


def has_archives(root: str | Path) -> bool:
    """Whether a folder holds tar files rather than image files."""
    if archives(root, "train"):
        return True
    classes = (entry for entry in Path(root).glob("train/*") if entry.is_dir())
    return bool(archives(root, "val")) and next(classes, None) is None


def open_archives(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Lists the images in the tar files of a folder; a `Format`."""
    found = {split: _list(config.data, split) for split in splits}
    if class_names is None or len(set(class_names)) < len(class_names):  # ImageNet has two classes named "crane"
        members = found["train"] if "train" in found else _list(config.data, "train")
        named = _class_names(Path(config.data), {member.label for member in members})
        names, number = tuple(named.values()), {label: target for target, label in enumerate(named)}
    else:
        named = _class_names(Path(config.data), {member.label for split in splits for member in found[split]})
        names = classes_of(named.values(), class_names)
        number = {label: names.index(name) for label, name in named.items()}
    if unknown := sorted({member.label for split in splits for member in found[split]} - number.keys()):
        raise ValueError(f"class {unknown[0]!r} is in val but not in train of {config.data}; add its training images")
    sources = {
        split: ImageFiles(Members.of(members), np.array([number[member.label] for member in members]))
        for split, members in found.items()
    }
    return Listing(class_names=names, train=sources.get("train"), val=sources.get("val"))


@dataclass(frozen=True)
class Member:
    """An image in a tar file."""

    archive: str
    name: str
    label: str
    offset: int
    size: int


@dataclass(frozen=True)
class Members:
    """Image files in tar files, read in place."""

    names: "np.ndarray[Any, Any]"
    """Archive and member, encoded, `(N, 2)`; arrays for the reason given in `folder.Paths`."""
    extents: "np.ndarray[Any, Any]"
    """Offset and size in bytes, `(N, 2)`."""

    @classmethod
    def of(cls, members: list[Member]) -> "Members":
        """The source of a list of members."""
        names = np.array([[os.fsencode(member.archive), os.fsencode(member.name)] for member in members])
        return cls(names, np.array([[member.offset, member.size] for member in members], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.extents)

    def name(self, index: int) -> str:
        archive, member = self.names[index]
        return f"{os.fsdecode(member)} in {os.fsdecode(archive)}"

    def open(self, index: int) -> BinaryIO:
        offset, size = (int(value) for value in self.extents[index])
        with open(os.fsdecode(self.names[index][0]), "rb") as archive:
            archive.seek(offset)
            return io.BytesIO(archive.read(size))


def _list(root: str, split: str) -> list[Member]:
    """All images of a split, in the order in which a folder of the same images is listed."""
    paths = archives(root, split)
    if not paths:
        raise FileNotFoundError(f"no tar file of {split} in {root}; give {split}.tar, {split}-*.tar or {split}/*.tar")
    members = [member for path in paths for member in _members(path)]
    if not members:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise ValueError(f"the tar files of {split} in {root} hold no images ({kinds}); fill or remove them")
    return sorted(members, key=lambda member: (member.label, member.name))


def _members(path: Path) -> list[Member]:
    """The images of one tar file; the class of each is the number in its .cls file, or else its folder."""
    images: list[tarfile.TarInfo] = []
    numbers: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                if name.suffix == ".cls":
                    content = archive.extractfile(member)
                    numbers[str(name.with_suffix(""))] = content.read(32).decode().strip() if content else ""
                elif name.suffix.lower() in IMG_EXTENSIONS:
                    images.append(member)
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not an uncompressed tar file ({error}); make it again") from error
    length = path.stat().st_size
    found = []
    for member in images:
        if member.offset_data + member.size > length:
            raise ValueError(f"{path} ends inside {member.name}; make it again")
        name = PurePosixPath(member.name)
        label = numbers.get(str(name.with_suffix("")), "") if numbers else name.parent.name
        if not label or (numbers and not label.isdecimal()):
            raise ValueError(
                f"{member.name} in {path} has no class: give every image a .cls with a number, or put it into a folder"
            )
        found.append(Member(str(path), member.name, label, member.offset_data, member.size))
    return found


def _class_names(root: Path, labels: set[str]) -> dict[str, str]:
    """Label -> name, in the order of the targets; numbers are named by the lines of classes.txt, if there is one."""
    order = in_class_order(labels)
    file = root / "classes.txt"
    if not file.is_file() or not all(label.isdecimal() for label in order):
        return {label: label for label in order}
    lines = file.read_text().split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    if max(map(int, order)) >= len(lines):
        raise ValueError(f"{file} has {len(lines)} names, but there is a class {max(map(int, order))}; add its line")
    return {label: lines[int(label)] for label in order}
