"""Signals and a closed output while a run trains: the step in progress is finished and saved first."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import ClassVar

from rich.console import Console

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED_BY = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "SIGHUP",
    signal.SIGPIPE: "the output is no longer read",
}
"""What can stop a run -> how it is called. SIGPIPE stands for the error that a closed pipe gives."""
DEBOUNCE_SECONDS = 1.0
"""A second Ctrl-C within this time is taken for a copy of the first: torchrun sends one besides the terminal's."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, and a checkpoint is saved.

    Args:
        message: where it stopped, and how to continue.
        exit_code: exit code for the process, 128 plus the signal's number.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class GracefulShutdown:
    """Records a signal instead of dying of it, inside `with` and in the main thread; other threads cannot set handlers.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self, *, quiet: bool = True) -> None:
        self.requested = 0
        """Number of the signal that was received, 0 for none."""
        self.quiet = quiet
        self._handlers_before: dict[signal.Signals, signal._HANDLER] = {}
        self._requested_at = 0.0
        self._console: Console | None = None

    def watch(self, console: Console) -> None:
        """Takes a pipe that is closed (`mpvg train ... | head -1`) for a request to stop; rich would exit at once."""
        self._console = console
        console.on_broken_pipe = partial(self._record, signal.SIGPIPE, None)  # type: ignore[method-assign]

    def __enter__(self) -> "GracefulShutdown":
        self.requested = 0
        if threading.current_thread() is threading.main_thread():
            _LoaderWorkers.install_hooks()
            # nohup ignores SIGHUP for its command, which is to go on without its terminal.
            ours = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._handlers_before = {number: signal.signal(number, self._record) for number in ours}
            _LoaderWorkers.owner = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}
        if _LoaderWorkers.owner is self:
            _LoaderWorkers.owner = None
            children = multiprocessing.active_children()
            _LoaderWorkers.signal_blocked |= {child for child in children if child.daemon}

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._requested_at > DEBOUNCE_SECONDS:
            raise KeyboardInterrupt
        if self.requested:
            return
        self.requested, self._requested_at = number, now
        if self._console and (number == signal.SIGPIPE or (number == signal.SIGHUP and self._console.is_terminal)):
            self._console.quiet = True
            with contextlib.suppress(OSError, ValueError):  # it is no file of the system's
                _discard(self._console.file.fileno())
        if not self.quiet:  # print() is not reentrant, and a handler may interrupt one
            try:
                os.write(2, b"\nstopping: finishing the step and saving a checkpoint; press Ctrl-C to stop at once\n")
            except OSError:  # the terminal or the reader is gone
                _discard(2)


def _discard(descriptor: int) -> None:
    """Sends to nowhere what is written to a file descriptor from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class _LoaderWorkers:
    """Blocks the signals in the data loader's workers: they are sent to whole process groups.

    A worker that died of one would make the step in progress fail.
    """

    owner: ClassVar[GracefulShutdown | None] = None
    signal_blocked: ClassVar[set[BaseProcess]] = set()
    _installed: ClassVar[bool] = False

    @classmethod
    def install_hooks(cls) -> None:
        """Registers the hooks below, once per process."""
        if not cls._installed:
            cls._installed = True
            os.register_at_fork(after_in_child=cls._block_signals)
            atexit.register(cls._kill_leftovers)

    @classmethod
    def _block_signals(cls) -> None:
        """In a forked process: blocked rather than ignored, because torch sets handlers of its own later."""
        if cls.owner is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    @classmethod
    def _kill_leftovers(cls) -> None:
        """Ends workers that an error left running; multiprocessing would send SIGTERM and wait for ever."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise at the death of each
        for child in cls.signal_blocked:
            if child.is_alive():
                child.kill()
