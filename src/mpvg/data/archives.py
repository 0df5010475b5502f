"""Tar files of images, read in place: plain ones with one folder per class, and WebDataset shards.

The position of every member is looked up once, so that order, shards and resumption are those of single files: each
image once, in any order, with any number of processes.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
)
from mpvg.data.tar import TarEntry, read_tar
from mpvg.files import check_regular, open_regular
from mpvg.validation import named, shown

_NUMBERS = "classes.txt"
_MAX_TEXT = 2**24


def archives(root: str | Path, split: str) -> list[Path]:
    """The tar files of a split: <root>/<split>.tar, <root>/<split>-*.tar, or <root>/<split>/*.tar; sorted."""
    root = Path(root)
    found = [*root.glob(f"{split}.tar"), *root.glob(f"{split}-*.tar"), *root.glob(f"{split}/*.tar")]
    return sorted((path for path in found if not is_hidden(path.name)), key=lambda path: natural_key(str(path)))


@dataclass(frozen=True)
class Members:
    """Image files in tar files, read in place."""

    archives: tuple[str, ...]
    names: Names
    """As the tar files have them."""
    extents: "np.ndarray[Any, Any]"
    """Number of the tar file, and offset and size in bytes, `(N, 3)`."""

    def __len__(self) -> int:
        return len(self.extents)

    def name(self, index: int) -> str:
        return f"{self.names[index]} in {self.archives[self.extents[index, 0]]}"

    def open(self, index: int) -> BinaryIO:
        number, offset, size = self.extents[index].tolist()
        if size > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes; allowed: at most {MAX_BYTES:,}")
        with open_regular(self.archives[number]) as archive:
            archive.seek(offset)
            return io.BytesIO(archive.read(size))

    def select(self, indices: "np.ndarray[Any, Any]") -> "Members":
        names = Names(self.names[index] for index in indices.tolist())
        return Members(self.archives, names, self.extents[indices])


def list_archives(paths: Sequence[Path], root: Path, split: str) -> Found:
    """All images of a split, in the order in which a folder of the same images is listed.

    Args:
        paths: the tar files.
        root: the data set's folder, where classes.txt may name numbers.
        split: whose files they are.

    Raises:
        ValueError: a tar file is damaged, a member is no file or has no class, or a class has no images.
    """
    contents = [_Contents.read(path) for path in paths]
    endings: Counter[str] = sum((content.endings for content in contents), Counter())
    where = f"the tar files of {split} in {root}"
    report_other_endings(split, where, endings)
    prefix = f"{split}/" if _is_prefix(split, contents) else ""
    found = (image for number, content in enumerate(contents) for image in content.images(number, prefix))
    images = sorted(found, key=lambda image: image[:3])
    if not images:
        raise ValueError(f"{where} hold no images ({', '.join(IMAGE_ENDINGS)}); fill or remove them")
    labels = {image.label for image in images}
    for empty in {name for content in contents for name in content.class_folders(prefix)} - labels:
        raise ValueError(f"class folder {shown(empty)} in {where} has no images; fill it or remove it")
    classes = tuple(in_class_order(labels))
    number = {label: index for index, label in enumerate(classes)}
    return Found(
        where=split,
        classes=classes,
        titles=_titles(root, classes),
        labels=np.array([number[image.label] for image in images]),
        names=[f"{image.folder}/{image.file}" if image.folder else image.file for image in images],
        sizes=np.array([image.entry.size for image in images]),
        files=Members(
            tuple(map(str, paths)),
            Names(image.entry.name for image in images),
            np.array([[image.archive, image.entry.offset, image.entry.size] for image in images], dtype=np.int64),
        ),
    )


class _Image(NamedTuple):
    label: str
    folder: str
    """Within the class, as far as it decides about the order."""
    file: str
    """Within that folder."""
    archive: int
    entry: TarEntry


@dataclass
class _Contents:
    """The members of one tar file that count, by their paths."""

    path: Path
    files: dict[str, TarEntry] = field(default_factory=dict)
    """Of equal names the last; hard links stand for the bytes that they lead to."""
    folders: list[str] = field(default_factory=list)
    numbers: dict[str, str] = field(default_factory=dict)
    """Contents of the .cls files, by their paths without ending."""
    endings: "Counter[str]" = field(default_factory=Counter)
    """Of the files that are no images."""

    @classmethod
    def read(cls, path: Path) -> "_Contents":
        """Reads the headers of a tar file."""
        contents = cls(path)
        everything: dict[str, TarEntry] = {}
        for entry in read_tar(path):
            name, hidden = _normalize(entry.name, path)
            if entry.kind == "hard link" and not hidden:
                target = everything.get(_normalize(entry.target, path)[0])
                if target is None:
                    raise ValueError(
                        f"{named(entry.name)} in {path} is a hard link to {named(entry.target)}, which is not before "
                        "it; make the tar file again with both, or with --hard-dereference"
                    )
                entry = target._replace(name=entry.name)
            if entry.kind == "folder":
                contents.folders += [name] if name and not hidden else []
            else:
                everything[name] = entry
                (contents.files if not hidden else {})[name] = entry
        contents._sort_out()
        return contents

    def _sort_out(self) -> None:
        """Keeps the images, reads the numbers and counts the rest."""
        numbers = {}
        for name, entry in list(self.files.items()):
            if entry.kind == "symbolic link":
                raise ValueError(
                    f"{named(entry.name)} in {self.path} is a symbolic link to {named(entry.target)}, which is not "
                    "followed; make the tar file again with --dereference (-h)"
                )
            image = is_image(name)
            if image and entry.kind != "file":
                raise ValueError(f"{named(entry.name)} in {self.path} is a pipe or a device, not a file; leave it out")
            if not image:
                if ending(name) == ".cls":
                    numbers[name.rpartition(".")[0]] = entry
                else:
                    self.endings[ending(name)] += 1
                    self.folders.append(name.rpartition("/")[0])
                del self.files[name]
        if numbers:
            with open_regular(str(self.path)) as file:
                self.numbers = {name: _number(os.pread(file.fileno(), 32, e.offset), e) for name, e in numbers.items()}

    def images(self, archive: int, prefix: str) -> Iterator[_Image]:
        """The images with their labels: the number in the .cls file, or else the first folder after the prefix."""
        for name, entry in self.files.items():
            label, _, inner = name.removeprefix(prefix).partition("/")
            folder, _, file = inner.rpartition("/")
            if self.numbers:
                label, folder, file = self.numbers.get(name.rpartition(".")[0], ""), "", name
            if not file or (self.numbers and not label.isdecimal()):
                raise ValueError(
                    f"{named(entry.name)} in {self.path} has no class: "
                    "give every image a .cls with a number, or put it into a folder"
                )
            yield _Image(label, folder, file, archive, entry)

    def class_folders(self, prefix: str) -> Iterator[str]:
        """The class folders that files of any kind, or nothing, lie in."""
        for name in self.folders if not self.numbers else ():
            label = f"{name}/".removeprefix(prefix).partition("/")[0]
            if label:
                yield label


def _normalize(name: str, path: Path) -> tuple[str, bool]:
    """A member's path without `.` and empty parts, and whether it is left out."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(
            f"{named(name)} in {path} leads out of its folder; make the tar file again with `tar -C FOLDER`"
        )
    return "/".join(parts), any(map(is_hidden, parts))


def _is_prefix(split: str, contents: Sequence[_Contents]) -> bool:
    """Whether a first folder of the split's name is no class: all lies in it, or no image lies in it directly."""
    names = [name for content in contents for name in content.files]
    inside = [name for name in names if name.startswith(f"{split}/")]
    return len(inside) == len(names) or not any(name.count("/") == 1 for name in inside)


def _number(content: bytes, entry: TarEntry) -> str:
    """What a .cls file says; "": no text."""
    return content[: entry.size].decode("utf-8", "replace").strip()


def _titles(root: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the classes; numbers are named by the lines of classes.txt, if there is one."""
    file = root / _NUMBERS
    if not file.exists() or not all(label.isdecimal() for label in classes):
        return classes
    check_regular(str(file), limit=_MAX_TEXT)
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); save it in that encoding") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    last = max(map(int, classes))
    if last >= len(lines):
        raise ValueError(f"{file} has {len(lines)} names, but there is a class {shown(last)}; add its line")
    return tuple(lines[int(label)] for label in classes)
