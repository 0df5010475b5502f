"""The rules by which files become samples, the same for folders and tar files: what counts, and what is left out."""

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import numpy as np

from mpvg.files import open_regular
from mpvg.validation import shorten

_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
IMAGE_ENDINGS = (*_LOSSY, ".png", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""Endings of image files, in lower case. A fixed list: a data set must be the same with every build of Pillow."""
MAX_BYTES = 2**29
"""Size of the largest file that is read whole: PIL's limit of 89 million pixels, at three colors of two bytes."""
_HIDDEN = ("__MACOSX", "@eaDir")
_log = logging.getLogger(__name__)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out: what systems and editors leave behind."""
    return name.startswith(".") or name in _HIDDEN


def is_image(name: str) -> bool:
    """Whether a file of this name is listed as an image."""
    return name.lower().endswith(IMAGE_ENDINGS)


def natural_key(name: str) -> list[int | str]:
    """A sort key that puts 2 before 10, in any case of the letters, as timm's does."""
    parts: list[int | str] = list(re.split(r"(\d+)", name.lower()))
    # Not by `isdigit`, which is also true of "²", of which int() makes nothing. Longer numbers are refused by int().
    parts[1::2] = [int(str(number)[:4000]) for number in parts[1::2]]
    return parts


class Names(Sequence[str]):
    """Many names in one piece of memory.

    Reading the items of a list writes their reference counts, so that each worker would copy a million names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


def open_bounded(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file that is then read whole; errors as `open_regular`, or ValueError where it is above `MAX_BYTES`."""
    return open_regular(path, MAX_BYTES)


def read_bounded(file: BinaryIO, name: object) -> bytes:
    """Reads the rest of an open file, up to `MAX_BYTES`.

    Raises:
        ValueError: there is more.
    """
    content = file.read(MAX_BYTES + 1) if not file.seekable() else file.read(_rest(file) + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES:,} bytes; allowed: up to that")
    return content


def _rest(file: BinaryIO) -> int:
    """Bytes from here to the end, at most `MAX_BYTES`: a read allocates what it is asked for."""
    here = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(here)
    return max(0, min(end - here, MAX_BYTES))


def report_other_endings(split: str, where: object, endings: "Counter[str]") -> None:
    """Says how many files are left out because of their endings."""
    if count := endings.total():
        what = "1 file of {} has another ending" if count == 1 else f"{count} files of {{}} have other endings"
        found = shorten(", ".join(ending or "no ending" for ending in sorted(endings)))
        listed = ", ".join(IMAGE_ENDINGS)
        say_once(f"{what.format(split)}: {found}; left out of {where}, whose images end in {listed}")


def ending(name: str) -> str:
    """The ending of a file name as it is reported."""
    return os.path.splitext(name)[1].lower()


@functools.cache
def say_once(line: str) -> None:
    """Logs a warning, once in a process, and only in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        _log.warning("%s", line.encode("unicode_escape").decode() if not line.isprintable() else line)
