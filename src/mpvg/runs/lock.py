"""RUN/.lock: one process writes a run at a time.

The process holds a lock of the system's (flock) on the file, which ends with the process however that ends, and has
written its number, its host and the host's boot into it. So a lock that can be taken is free, unless its text names
another host: whether the file system takes the lock to that host cannot be known; one is refused until `break_lock`.
"""

import contextlib
import fcntl
import functools
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpvg.files import cannot_write, check_place, remove
from mpvg.validation import parse_json, printable

LOCK = ".lock"
PATIENCE_SECONDS = 0.5
"""For so long another process may hold the lock: `mpvg runs` tries it, for microseconds."""
_MAX_BYTES = 4096
_OWN_FOLDERS = ("checkpoints", "track")


class RunLockedError(ValueError):
    """Another process writes the run."""


class Holder(NamedTuple):
    """Who wrote a lock."""

    pid: int
    """Number of the process, 0 where it is not known."""
    host: str
    boot: str
    """Names the time since the host, or the machine that it is a container of, was started; "" where unknown."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {printable(self.host)}" if self.pid else "another process"

    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        own = own_holder()
        return not self.pid or self.host == own.host or (self.boot != "" and self.boot == own.boot)

    def is_alive(self) -> bool:
        """Whether this machine has a process of its number, other than this one."""
        with contextlib.suppress(ProcessLookupError):
            with contextlib.suppress(PermissionError):
                os.kill(self.pid, 0)
            return self.pid not in (0, os.getpid())
        return False


def own_holder() -> Holder:
    """This process."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return Holder(os.getpid(), socket.gethostname(), boot)


@contextlib.contextmanager
def run_lock(path: Path, *, break_lock: bool = False) -> Iterator[None]:
    """Makes the run folder, if it is not there, and holds its lock.

    Args:
        path: the run folder.
        break_lock: take a lock whose text names another host; never one that is held on this machine.

    Raises:
        OSError: the file cannot be written.
        RunLockedError: another process holds it; it is named.
        ValueError: a folder of the run is a link to another place, or the run is within a checkpoint of another.
    """
    check_place(path)
    path.mkdir(parents=True, exist_ok=True)
    for name in _OWN_FOLDERS:
        if (path / name).is_symlink():
            raise ValueError(
                f"{path / name} is a symbolic link, and a run is written into its own folder only; "
                "put the folder that it names in its place"
            )
    file = path / LOCK
    number = _acquire(file, break_lock)
    try:
        with closed_in_children(number):  # a worker of the data loader would keep the lock of a process that was killed
            yield
    finally:
        try:
            if _is_at(number, file):  # not one that somebody has put there after breaking this one
                file.unlink()
        finally:
            os.close(number)


@contextlib.contextmanager
def closed_in_children(number: int) -> Iterator[None]:
    """Processes that are forked inside `with` do not keep an open file, and so its lock, when this one ends."""
    _close_in_children()
    _held.add(number)
    try:
        yield
    finally:
        _held.discard(number)


def current_holder(path: Path) -> Holder | None:
    """Who writes a run, as far as can be known; None where nobody does."""
    try:
        number = os.open(path / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            return None
        is_free = _flock(number, fcntl.LOCK_SH)
        holder = _read(number)
        if is_free is False:
            return holder or Holder(0, "", "")
        return holder if holder and _may_be_held(holder, tested=is_free is True) else None
    finally:
        os.close(number)


_held: set[int] = set()
"""The files of this process that hold locks."""


@functools.cache
def _close_in_children() -> None:
    """Registers what `closed_in_children` needs, once."""

    def close() -> None:
        for number in _held:
            os.close(number)
        _held.clear()

    os.register_at_fork(after_in_child=close)


def _acquire(file: Path, break_lock: bool) -> int:
    """Opens and locks the file, and writes this process into it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        number = _open(file)
        try:
            is_free = _flock(number, fcntl.LOCK_EX)
            holder = _read(number)
            if is_free is False:
                away = holder is not None and not holder.is_here()
                if time.monotonic() > deadline and not (away and break_lock):
                    raise _refusal(file, holder or Holder(0, "", ""))
                if away and break_lock:
                    file.unlink(missing_ok=True)
            elif not _is_at(number, file):
                pass  # it was taken away after it was opened
            elif os.fstat(number).st_nlink > 1:
                file.unlink()  # its other name is outside, or in a copy
            elif holder and not break_lock and _may_be_held(holder, tested=is_free is True):
                raise _refusal(file, holder)
            else:
                _write(number, file)
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)
        time.sleep(0.02)
        if time.monotonic() > deadline + PATIENCE_SECONDS:
            raise OSError(f"cannot lock {file}: another process makes it again and again; give the same command again")


def _open(file: Path) -> int:
    """Opens the file or makes it; what is there and is no file is taken away."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
            remove(file)
        return os.open(file, flags, 0o666)
    except OSError as error:
        raise cannot_write(file, error) from error


def _flock(number: int, kind: int) -> bool | None:
    """Tries the lock: True: it is this process's, False: another's, None: the file system has none."""
    try:
        fcntl.flock(number, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _may_be_held(holder: Holder, *, tested: bool) -> bool:
    """Whether a lock may be held although this process could lock the file, or could not test it."""
    return not holder.is_here() or (not tested and holder.is_alive())


def _read(number: int) -> Holder | None:
    """Who is written in the file; None where it is nobody."""
    try:
        values = parse_json(os.pread(number, _MAX_BYTES, 0))
        pid, host, boot = values["pid"], values["host"], values.get("boot", "")
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if type(pid) is not int or not 0 < pid < 2**31 or not isinstance(host, str) or not isinstance(boot, str):
        return None
    return Holder(pid, host, boot)


def _write(number: int, file: Path) -> None:
    try:
        os.ftruncate(number, 0)
        os.pwrite(number, (json.dumps(own_holder()._asdict()) + "\n").encode(), 0)
        os.fsync(number)  # another host must see it
    except OSError as error:
        raise cannot_write(file, error) from error


def _is_at(number: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.lstat(file))
    except FileNotFoundError:
        return False


def _refusal(file: Path, holder: Holder) -> RunLockedError:
    path = file.parent
    if holder.is_here():
        return RunLockedError(f"{path} is being written by {holder}; wait until it ends, or stop it")
    return RunLockedError(
        f"{path} is locked by {holder}, and whether it still runs cannot be tested from {own_holder().host}; "
        f"if it does not, continue with `mpvg train --resume {path} --break_lock`"
    )
