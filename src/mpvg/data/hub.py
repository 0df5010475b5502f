"""Hugging Face data sets, as timm names them (`hfds/<name or folder>`): rows of tables that lie on disk.

The tables are mapped into memory, not streamed, so that order, shards and resumption are those of single files. Only
data are loaded: `datasets` itself refuses data sets that come with a script.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from mpvg.config import RunConfig
from mpvg.data.listing import Classes, Found, Listing, list_splits
from mpvg.data.rules import MAX_BYTES
from mpvg.data.types import Split
from mpvg.files import check_regular

NAME = "hfds"
"""Before the first slash of `--data`, as in timm."""
_VAL = ("validation", "val", "test")


def open_hub(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Loads a Hugging Face data set; a `Format`.

    It is downloaded and unpacked once, into `loader.root`, or else to where `datasets` keeps its sets.
    """
    tables = _load(config)
    held_out = next((split for split in _VAL if split in tables), None)
    if "train" not in tables or (held_out is None and not config.val_share):
        raise ValueError(
            f"data {config.data!r} has the splits {', '.join(tables)}; needed: train, and one of {', '.join(_VAL)}; "
            "rename its own, or add what is missing; --val_share 0.1 holds out a share of train"
        )
    names, numbers = _classes(config.data, tables["train"])

    def list_one(split: Split) -> Found:
        own = "train" if split == "train" or held_out is None else held_out
        return _labelled(config.data, own, tables[own], tuple(names), numbers)

    return list_splits(config, splits, class_names, list_one, has_val=held_out is not None, by_label=True)


@dataclass(frozen=True)
class Rows:
    """Image files in the rows of a table, undecoded."""

    table: Any
    """`datasets.Dataset` of the one column `image`. Its bytes lie in mapped files, which all workers share."""
    where: str
    """What messages call the table."""
    rows: "np.ndarray[Any, Any] | None" = None
    """Numbers of the rows that are read, in that order; None: all."""

    def __len__(self) -> int:
        return len(self.table) if self.rows is None else len(self.rows)

    def name(self, index: int) -> str:
        return f"in row {self._row(index)} of {self.where}"

    def open(self, index: int) -> str | BinaryIO:
        image = self.table[self._row(index)]["image"] or {"bytes": None, "path": None}
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        if image["path"] is None:
            raise ValueError("it has neither bytes nor a path")
        path: str = image["path"]
        check_regular(path, limit=MAX_BYTES)
        return path

    def select(self, indices: "np.ndarray[Any, Any]") -> "Rows":
        return replace(self, rows=indices if self.rows is None else self.rows[indices])

    def _row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])


def _load(config: RunConfig) -> Any:
    """The data set's splits by name, `datasets.DatasetDict`."""
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(f"data {config.data!r} needs datasets ({error}); pip install 'mpvg[data]'") from error
    name = config.data.removeprefix(f"{NAME}/")
    for folder, _, files in os.walk(name):
        for file in files:  # its readers would wait for a pipe
            if os.path.exists(path := os.path.join(folder, file)):
                check_regular(path)
    try:
        return datasets.load_dataset(name, cache_dir=config.loader.root)
    except Exception as error:  # it reads files of many formats, and raises whatever their readers raise
        missing = isinstance(error, FileNotFoundError | ConnectionError)
        raise (FileNotFoundError if missing else ValueError)(
            f"data {config.data!r} cannot be loaded ({type(error).__name__}: {error}); allowed: {NAME}/<name> of a "
            f"set on the Hugging Face hub (offline: one that was loaded before), or {NAME}/<folder> that holds one"
        ) from error


def _classes(data: str, table: Any) -> "tuple[list[str], np.ndarray[Any, Any]]":
    """Names of the classes and the labels that stand for them, both in the order of the targets."""
    from datasets import ClassLabel, Image

    features = table.features
    for column in ("image", "label"):
        if column not in features:
            raise ValueError(
                f"data {data!r} has no column {column!r}, but {', '.join(features)}; "
                f"rename the right one to {column!r} (`rename_column` of datasets) and write it again"
            )
    if not isinstance(features["image"], Image):
        raise ValueError(
            f"column 'image' of data {data!r} holds {features['image']}, not images; "
            "cast it (`cast_column('image', datasets.Image())`) and write it again"
        )
    if isinstance(features["label"], ClassLabel):
        names = list(features["label"].names)
        return names, np.arange(len(names))
    numbers = np.unique(_labels(data, "train", table))
    return [str(number) for number in numbers], numbers


def _labels(data: str, split: str, table: Any) -> "np.ndarray[Any, Any]":
    """The labels of a split `(N,)`, as they are stored."""
    column = table.data.column("label")
    labels: np.ndarray[Any, Any] = column.to_numpy()
    if column.null_count or labels.dtype.kind not in "iu":
        raise ValueError(
            f"column 'label' of split {split!r} of data {data!r} holds {table.features['label']}, "
            f"{column.null_count} of {len(column)} empty; allowed: a ClassLabel or whole numbers, in every row"
        )
    return labels


def _labelled(data: str, split: str, table: Any, titles: tuple[str, ...], numbers: "np.ndarray[Any, Any]") -> Found:
    from datasets import Image

    labels = _labels(data, split, table)
    unknown = np.setdiff1d(labels, numbers)
    if len(unknown):
        raise ValueError(
            f"label {unknown[0]} is in split {split!r} of data {data!r}, but is not among the {len(numbers)} classes; "
            "give every row one of them, or leave the row out"
        )
    names, sizes = _names_and_sizes(table.data.column("image"), os.path.abspath(data.removeprefix(f"{NAME}/")))
    images = table.select_columns("image").cast_column("image", Image(decode=False))
    return Found(
        where=f"split {split!r} of data {data!r}",
        classes=tuple(map(str, numbers)),
        titles=titles,
        labels=np.searchsorted(numbers, labels),
        names=names,
        sizes=sizes,
        files=Rows(images, f"{split} of {data}"),
    )


def _names_and_sizes(column: Any, root: str) -> "tuple[list[str], np.ndarray[Any, Any]]":
    """The names of the files in a column of images, or their rows where names are missing or not unique; and bytes."""
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    paths = pc.struct_field(column, "path").to_pylist()
    below = root + os.sep
    names = [p.removeprefix(below) if p.startswith(below) else os.path.basename(p) for p in paths if p]
    if len(set(names)) < len(column):
        names = [f"row {row}" for row in range(len(column))]
    sizes = pc.binary_length(pc.struct_field(column, "bytes")).fill_null(-1).to_numpy()
    return names, np.array(
        [_size(path) if size < 0 and path else size for size, path in zip(sizes.tolist(), paths, strict=True)],
        dtype=np.int64,
    )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
