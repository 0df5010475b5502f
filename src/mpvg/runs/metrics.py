"""metrics.jsonl of a run folder: one line per epoch."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpvg.files import append_line, atomic_write, read_regular
from mpvg.runs.reading import RESTORE, check_numbers
from mpvg.validation import parse_json, shown

MAX_METRICS_BYTES = 2**26
"""Size of metrics.jsonl, about 300 bytes an epoch."""
LINE = ("step", "train_loss", "lr", "images_per_second", "skipped", "seconds")
"""Numbers that every line of metrics.jsonl has, beside the epoch and the task's metrics."""


def append_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Adds a line to a run's metrics.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    append_line(path / "metrics.jsonl", json.dumps(values))  # it must not be lost while the next checkpoint is kept


def write_metrics(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a run's metrics by these lines, atomically.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    atomic_write(path / "metrics.jsonl", "".join(json.dumps(values) + "\n" for values in lines).encode())


def read_metrics(path: Path, names: Iterable[str] = ()) -> list[dict[str, Any]]:
    """A run's epochs, oldest first, without an incomplete last line; none where there is no file.

    Args:
        path: the run folder.
        names: of the numbers that every line must hold beside epoch and step.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is damaged, or they are not those of the epochs 1, 2, ... in this order.
    """
    file = path / "metrics.jsonl"
    try:
        content = read_regular(file, MAX_METRICS_BYTES)
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            values = parse_json(line, finite=False)
            _check_line(values, number, found[-1]["step"] if found else 0, names)
        except ValueError as error:
            raise ValueError(f"{file} is damaged (line {number}: {error}); {RESTORE}") from error
        found.append(values)
    return found


def _check_line(values: Any, number: int, step_before: int, names: Iterable[str]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{shown(values)} is no epoch")
    epoch, step = values.get("epoch"), values.get("step")
    if type(epoch) is not int or epoch != number:
        raise ValueError(f"epoch is {shown(epoch)}; expected: {number}")
    if type(step) is not int or step <= step_before:
        raise ValueError(f"step is {shown(step)}; expected: a whole number > {step_before}")
    check_numbers(values, [*names, *values], finite=("train_loss", "lr", "images_per_second", "seconds"))
