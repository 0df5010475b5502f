"""metrics.jsonl of a run folder: one line per epoch."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpvg.runs.files import atomic_write, cannot_write


def append_metrics(path: Path, values: dict[str, Any]) -> None:
    """Adds a line to a run's metrics.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    file = path / "metrics.jsonl"
    try:
        with file.open("a") as lines:
            lines.write(json.dumps(values) + "\n")
            lines.flush()
            os.fsync(lines.fileno())  # it must not be lost while the checkpoint that follows it is kept
    except OSError as error:
        raise cannot_write(file, error) from error


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after a step, which a resumed run writes again, and an incomplete last line.

    Raises:
        ValueError: a line is not valid JSON.
    """
    kept = [values for values in read_metrics(path) if values["step"] <= step]
    atomic_write(path / "metrics.jsonl", "".join(json.dumps(values) + "\n" for values in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """A run's epochs, oldest first, without an incomplete last line.

    Raises:
        ValueError: a line is not valid JSON.
    """
    file = path / "metrics.jsonl"
    found = []
    for number, line in enumerate(_complete_lines(file), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged (line {number}: {error}); restore it from a copy of the run"
            ) from error
    return found


def _complete_lines(file: Path) -> Iterator[str]:
    if file.is_file():
        text = file.read_text()
        yield from text[: text.rfind("\n") + 1].splitlines()
