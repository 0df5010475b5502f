"""Files on the disk: what may be read of those that others made, and what appears completely or not at all.

What is read is a regular file of bounded size: a pipe or a device would be waited for, or would never end. What is
written is made new under a temporary name, never through a link that waits there, then synced and renamed.
"""

import contextlib
import csv
import errno
import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

CHECKSUMS, STATE = "checksums.json", "state.json"
"""In the folder of each checkpoint: the hashes of its files, and where training is."""
_CURES = {errno.ENAMETOOLONG: "choose a shorter name"} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable"
)
"""What helps against an error in writing; room against all others."""
SUFFIX = ".writing"
"""How temporary names end; they begin with a dot."""
_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def check_regular(path: str | os.PathLike[str], mode: int | None = None, *, limit: int | None = None) -> None:
    """Refuses what is not a regular file, before it is opened: a pipe or a device would be waited for.

    Args:
        path: of the file.
        mode: the file's `st_mode`, if it is known.
        limit: allowed bytes; None: any number.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a regular file, or is larger.
    """
    if mode is None or limit is not None:
        found = os.stat(path)
        mode = found.st_mode
        if limit is not None and stat.S_ISREG(mode) and found.st_size > limit:
            raise ValueError(f"{path} has {found.st_size:,} bytes; allowed: at most {limit:,}")
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ValueError(f"{path} is {kind}, not a regular file; remove it, or put a file in its place")


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> BinaryIO:
    """Opens a regular file for reading; errors as `check_regular`."""
    check_regular(path, limit=limit)  # before it is opened: to open a device may do something
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        check_regular(path, os.fstat(number).st_mode)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_regular(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is not a regular file, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""  # one more, to see that it has grown
    if max(size, len(content)) > limit:
        raise ValueError(f"{path} has {max(size, len(content)):,} bytes; allowed: at most {limit:,}")
    return content


def read_given(path: str | Path, limit: int) -> bytes:
    """The content of a file that the user names on the command line, which may be a pipe, such as <(...) or /dev/stdin.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it has more than `limit` bytes.
    """
    with Path(path).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes, which are allowed at most")
    return content


def memory_bytes() -> int:
    """Size of this machine's memory: no file that is larger is read as a whole."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write_json(path: Path, values: Any) -> None:
    """Writes one JSON value atomically."""
    atomic_write(path, (json.dumps(values) + "\n").encode())


def atomic_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8 wherever it is written."""
    atomic_write(path, text.encode("utf-8", "backslashreplace"))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, header: bool = True) -> str:
    """A table as CSV. Text that a spreadsheet would take for a formula is preceded by an apostrophe."""
    lines = io.StringIO(newline="")
    table = csv.DictWriter(lines, columns)
    if header:
        csv.writer(lines).writerow(map(_as_text, columns))
    for row in rows:
        table.writerow({name: _as_text(value) if isinstance(value, str) else value for name, value in row.items()})
    return lines.getvalue()


def _as_text(value: str) -> str:
    return f"'{value}" if value.lstrip()[:1] in tuple("=+-@") or value[:1] in tuple("\t\r\n") else value


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file atomically.

    Raises:
        OSError: it cannot be written, for example because the disk is full; it then holds what it held before.
    """
    temporary = temp_path(path)
    try:
        write_new(temporary, content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def check_place(out: Path) -> None:
    """Refuses output within a checkpoint of a run, which holds exactly the files in its checksums.json.

    Raises:
        ValueError: `out` is one, or within one.
    """
    place = Path(os.path.realpath(out))  # which takes links that lead in a circle
    for folder in (place, *place.parents):
        if all((folder / name).is_file() for name in (CHECKSUMS, STATE)):
            raise ValueError(f"{out} is within the checkpoint {folder}, which another file damages; give another name")


def check_output(out: Path) -> None:
    """Refuses a folder for output that holds something already, or is within a checkpoint.

    Raises:
        FileExistsError: it does, or it is a file.
        FileNotFoundError: the folder that it would be in is missing.
        ValueError: it is within a checkpoint.
    """
    check_place(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise FileExistsError(f"--out {out} exists and is not an empty folder; give another name")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own when all went well, and is removed otherwise.

    It takes the place of an empty folder.
    """
    temporary, done = temp_path(path), False
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
        done = True
    finally:
        if not done:
            with contextlib.suppress(OSError):
                remove(temporary)


def temp_path(path: Path) -> Path:
    """A temporary name beside a file, which nobody can have guessed."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")


def is_temporary(name: str) -> bool:
    """Whether a name is one under which a file is written."""
    return name.startswith(".") and name.endswith(SUFFIX)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that died left under temporary names; nobody else may be writing."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(entry.name):
            remove(entry)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there; what a link names stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_new(path: Path, content: bytes) -> None:
    """Makes a file and waits until it is on the disk.

    Raises:
        FileExistsError: something has this name, be it a link.
        OSError: it cannot be written.
    """
    with open_new(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def open_new(path: Path) -> BinaryIO:
    """Makes a file and opens it for writing; errors as `write_new`."""
    return os.fdopen(os.open(path, _NEW, 0o666), "wb")


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, never through a link, and waits until it is on the disk.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> OSError:
    """The error with the file and the next step, which the system's own message lacks."""
    begun = (path.parent / "config.yaml").is_file()
    cure = _CURES.get(error.errno or 0, "make room")
    next_step = f"continue with `mpvg train --resume {path.parent}`" if begun else "give the same command again"
    return OSError(error.errno, f"cannot write {path} ({error.strerror or error}); {cure}, then {next_step}")
