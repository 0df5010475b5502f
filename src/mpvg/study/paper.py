"""The values that the paper prints in its tables and figures."""

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from mpvg.validation import unknown_name


@dataclass(frozen=True)
class PrintedTable:
    """A table of the paper."""

    title: str
    metric: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]
    """Label -> one value for each column; None where the paper prints none."""
    notes: tuple[str, ...]
    """Where its caption, its text or its repositories say something else."""
    repeats: dict[str, tuple[float, ...]]
    """Column -> what Default reached in public runs with one recipe."""

    def column(self, label: str) -> int:
        """The column of a network; the first one for a network that the paper does not have."""
        return self.columns.index(label) if label in self.columns else 0


@functools.cache
def printed_tables() -> dict[str, PrintedTable]:
    """Name -> table, such as "table1" and "fig5"."""
    text = (resources.files("mpvg.study") / "paper.json").read_text("utf-8")
    return {name: _table(given) for name, given in json.loads(text)["tables"].items()}


def printed_table(name: str) -> PrintedTable:
    """A table by its name.

    Raises:
        ValueError: there is no such table.
    """
    if name not in printed_tables():
        raise ValueError(unknown_name("table of the paper", name, printed_tables()))
    return printed_tables()[name]


def _table(given: dict[str, Any]) -> PrintedTable:
    repeats = {name: tuple(values) for name, values in given.get("repeats", {}).items()}
    rows = {label: tuple(values) for label, values in given["rows"].items()}
    return PrintedTable(given["title"], given["metric"], tuple(given["columns"]), rows, tuple(given["notes"]), repeats)
