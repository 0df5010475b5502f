"""File names that a file of annotations gives: they must stay in the folder of the data."""

import os
import stat
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from mpvg.data.annotations import Ints
from mpvg.files import check_regular
from mpvg.validation import shown


def file_sizes(folder: Path, root: Path, names: Sequence[str], where: str) -> Ints:
    """Bytes of the named files, of which none may be outside of the folder of the data.

    Args:
        folder: to which the names are relative; it may itself be a link, since it is not a file that names it.
        root: of the data, in which links may also lead.
        names: of the files; untrusted.
        where: they are given, for messages.

    Returns:
        (N,); -1: there is no such file.

    Raises:
        ValueError: a name is absolute, has `..`, leads out of the folder through a link, or is not of a regular file.
    """
    allowed = [os.path.realpath(folder), os.path.realpath(root)]

    @cache  # of which there are few
    def is_inside(path: str) -> bool:
        real = os.path.realpath(path)
        return any(real == top or real.startswith(os.path.join(top, "")) for top in allowed)

    sizes, bad = np.full(len(names), -1, np.int64), list[str]()
    for index, name in enumerate(names):
        path = os.path.join(folder, name)
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or not is_inside(os.path.dirname(path)):
            bad.append(name)
            continue
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                if not is_inside(path):
                    bad.append(name)
                    continue
                found = os.stat(path)
        except OSError:
            continue
        check_regular(path, found.st_mode)
        sizes[index] = found.st_size
    if bad:
        raise ValueError(
            f"{where}: {len(bad):,} file names lead out of {folder} (the first: {shown(bad[0])}); "
            "names must be relative, without .. and without links to elsewhere"
        )
    return sizes
