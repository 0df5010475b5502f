"""`last` and `best` in a run's folder `checkpoints`: each names one of the folders step-<n> beside it.

A pointer is a symbolic link or, where the file system has no links, a small text file with the same content, which is
also what git makes of a link there. A copy that followed the links has folders instead.
"""

import contextlib
import os
import re
from pathlib import Path

from mpvg.files import CHECKSUMS, read_regular, remove, temp_path, write_new

_STEP = re.compile(r"step-(\d{8,18})", re.ASCII)
_MAX_BYTES = 64
_MAX_CHECKSUMS = 2**16


def step_name(step: int) -> str:
    """The name of the folder of a step."""
    return f"step-{step:08d}"


def step_number(name: str) -> int | None:
    """The step in the name of a folder; None for another name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def step_names(root: Path) -> list[str]:
    """The names of the folders of steps, the newest first; nothing that a link names is one."""
    if not root.is_dir():
        return []
    numbers = {entry.name: step_number(entry.name) for entry in root.iterdir()}
    steps = {name: number for name, number in numbers.items() if number is not None}
    newest_first = sorted(steps, key=lambda name: steps[name], reverse=True)
    return [name for name in newest_first if not (root / name).is_symlink()]


def read_pointer(root: Path, name: str) -> str | None:
    """What a pointer names, whether it is there or not; its own name where it is a folder itself.

    None where there is no pointer, or one that does not name a step.
    """
    pointer = root / name
    try:
        if pointer.is_symlink():
            target = os.readlink(pointer)
        elif pointer.is_dir():
            return name
        else:
            target = read_regular(pointer, _MAX_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return target if step_number(target) is not None else None


def own_name(folder: Path) -> str:
    """The name that a checkpoint has by its step; in a copy that followed the links, of the same hashes."""
    folder = folder.resolve()
    if step_number(folder.name) is not None:
        return folder.name
    for name in step_names(folder.parent):
        with contextlib.suppress(OSError):
            files = (one / CHECKSUMS for one in (folder, folder.parent / name))
            if len({read_regular(file, _MAX_CHECKSUMS) for file in files}) == 1:
                return name
    return folder.name


def write_pointer(root: Path, name: str, target: str) -> None:
    """Points to a step, atomically; the links of a file system that has none become small files.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    pointer = root / name
    temporary = temp_path(pointer)
    try:
        try:
            os.symlink(target, temporary)
        except OSError:  # which one says "no links here" differs between file systems
            write_new(temporary, target.encode())
        if pointer.is_dir() and not pointer.is_symlink():  # of a copy that followed the links
            remove(pointer)
        temporary.replace(pointer)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def pointed_folder(root: Path, name: str) -> Path | None:
    """The folder that a pointer names, under the pointer's name where it is a link; None where there is none."""
    target = read_pointer(root, name)
    if target is None or (root / target).is_symlink():
        return None
    return root / name if (root / name).is_dir() else root / target
