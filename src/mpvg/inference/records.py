"""Predictions as files for programs: JSON, JSON lines and CSV, written image by image.

Each line of CSV and JSON lines is written when its image is done, so the file is valid whenever the writing ends. JSON
is valid once it is closed, which an interruption also does.
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from mpvg.files import check_place, csv_text, open_new
from mpvg.tasks import Prediction, Tabular

STDOUT = "-"
"""The name of a file that stands for standard output."""
_LINES = "line"


def to_record(image: str, found: Prediction | Exception) -> dict[str, Any]:
    """What is said about an image, as JSON: its `columns` for each thing that was found, or why it cannot be read."""
    if isinstance(found, Exception):
        return {"image": image, "error": str(found)}
    return {"image": image, "found": _rows(found)}


def _rows(found: Prediction) -> list[dict[str, Any]]:
    return found.rows() if isinstance(found, Tabular) else [{_LINES: line} for line in found.lines()]


class _Output:
    """A file that is made when the first image is done, or standard output."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._file: TextIO | None = None

    def _write(self, text: str) -> None:
        if self._file is None:
            opened = sys.stdout if self._name == STDOUT else _open(Path(self._name))
            self._file = opened
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._file is not None and self._name != STDOUT:
            self._file.close()


def _open(path: Path) -> TextIO:
    return io.TextIOWrapper(open_new(path), encoding="utf-8", errors="backslashreplace", newline="")


class JsonLines(_Output):
    """One JSON object a line, for each image; see `to_record`."""

    def add(self, image: str, found: Prediction | Exception) -> None:
        """Writes what is said about an image."""
        self._write(json.dumps(to_record(image, found)) + "\n")


class Json(_Output):
    """One list of all images; see `to_record`."""

    def add(self, image: str, found: Prediction | Exception) -> None:
        """Writes what is said about an image."""
        self._write(("[\n" if self._file is None else ",\n") + json.dumps(to_record(image, found)))

    def close(self) -> None:
        """Ends the list and the file."""
        if self._file is not None:
            self._write("\n]\n")
        super().close()


class Csv(_Output):
    """One line for each thing that was found, best first; of an image that cannot be read there is none."""

    def add(self, image: str, found: Prediction | Exception) -> None:
        """Writes what is said about an image."""
        if isinstance(found, Exception):
            return
        columns = ("image", "rank", *(found.columns if isinstance(found, Tabular) else (_LINES,)))
        rows = [{"image": image, "rank": rank, **row} for rank, row in enumerate(_rows(found), 1)]
        self._write(csv_text(columns, rows, header=self._file is None))


Record = JsonLines | Json | Csv
FORMATS: dict[str, type[Record]] = {"json": Json, "jsonl": JsonLines, "csv": Csv}


def open_records(names: dict[str, str | None]) -> list[Record]:
    """The files that are asked for; none is made yet.

    Args:
        names: format -> name of the file, "-" for standard output, or None.

    Raises:
        ValueError: two formats are asked for in one file, its folder is missing, or it is within a checkpoint.
        FileExistsError: there is something already.
    """
    given = {kind: name for kind, name in names.items() if name is not None}
    _check_distinct(list(given.values()))
    for kind, name in given.items():
        path = Path(name)
        if name == STDOUT:
            continue
        check_place(path)
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"--{kind} {name} exists; give another name, or remove it")
        if not path.parent.is_dir():
            raise ValueError(f"--{kind} {name}: there is no folder {path.parent}; make it, or give another name")
    return [FORMATS[kind](name) for kind, name in given.items()]


def _check_distinct(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given for two formats; give each a file of its own")
