"""SIGTERM and Ctrl-C while a run trains: the step in progress is finished and saved first."""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import ClassVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0
"""Seconds within which Ctrl-C again is the same one: a terminal's, say, and its copy from torchrun."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, and a checkpoint is saved.

    Args:
        message: says where, and how to go on.
        exit_code: what the process should exit with, 128 and the signal's number.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class Stop:
    """Notes a signal, inside `with` and in the main thread; elsewhere signals do what they did before.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self, *, quiet: bool = True) -> None:
        self.asked = 0
        """The number of the signal that came, 0 for none."""
        self.quiet = quiet
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._at = 0.0

    def __enter__(self) -> "Stop":
        self.asked = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            _Workers.stopping = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if _Workers.stopping is self:
            _Workers.stopping = None
            _Workers.deaf |= {child for child in multiprocessing.active_children() if child.daemon}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self._at > SAME:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked, self._at = number, now
        if not self.quiet:  # not print(), which must not be entered while it is at work
            os.write(2, b"\nstopping: finishes the step and saves a checkpoint; Ctrl-C stops at once\n")


class _Workers:
    """What the loader's workers do with the signals: nothing, for they are sent to whole process groups.

    A worker that died of one would take the step in progress with it.
    """

    stopping: ClassVar[Stop | None] = None
    deaf: ClassVar[set[BaseProcess]] = set()

    @classmethod
    def in_child(cls) -> None:
        """In a process that was forked off: blocked rather than ignored, as torch sets handlers of its own later."""
        if cls.stopping is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    @classmethod
    def at_exit(cls) -> None:
        """Ends what an error left behind; multiprocessing would send SIGTERM and wait for ever."""
        for child in cls.deaf:
            if child.is_alive():
                child.kill()


os.register_at_fork(after_in_child=_Workers.in_child)
atexit.register(_Workers.at_exit)
