"""Progress for people: a live line in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mpvg.validation import printable

PLAIN_SECONDS = 30.0
"""Seconds between plain lines inside an epoch."""


class Reporter:
    """Shows steps and epochs.

    Args:
        total: optimizer steps of the whole run.
        done: steps done before this process started.
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int = 0, *, quiet: bool = False) -> None:
        self.total, self.quiet = total, quiet
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.live: Progress | None = None
        self.started, self.first, self.last_line = time.monotonic(), done, time.monotonic()
        if not quiet and self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
            self.live = Progress(*columns, console=self.console)
            self.task = self.live.add_task("starting", total=total, completed=done)

    def __enter__(self) -> "Reporter":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def step(self, epoch: int, step: int, loss: float, rate: float) -> None:
        """After a step: its epoch, from 1; the steps so far; the epoch's mean loss; images per second."""
        now = time.monotonic()
        if self.live:
            text = f"epoch {epoch}  loss {loss:.3f}  {rate:.0f} images/s"
            self.live.update(self.task, completed=step, description=text)
        elif not self.quiet and now - self.last_line > PLAIN_SECONDS:
            self.last_line = now
            left = (now - self.started) / (step - self.first) * (self.total - step)
            self.say(
                f"epoch {epoch}  step {step}/{self.total}  loss {loss:.3f}  {rate:.0f} images/s  {_clock(left)} left"
            )

    def epoch(self, values: Mapping[str, Any], epochs: int, metrics: Sequence[str]) -> None:
        """After an epoch and its evaluation.

        Args:
            values: the epoch's line of metrics.jsonl.
            epochs: of the whole run.
            metrics: the task's metrics as text.
        """
        now = time.monotonic()
        self.last_line = now
        left = (now - self.started) / max(1, values["step"] - self.first) * (self.total - values["step"])
        skipped = f"  {values['skipped']} unreadable images skipped" if values["skipped"] else ""
        self.say(
            f"epoch {values['epoch']}/{epochs}  loss {values['train_loss']:.3f}  {'  '.join(metrics)}  "
            f"{values['images_per_second']:.0f} images/s  {_clock(left)} left{skipped}"
        )

    def say(self, line: str) -> None:
        """Prints a line."""
        if not self.quiet:
            (self.live.console if self.live else self.console).print(printable(line), markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
