"""Hugging Face data sets, as timm names them (`hfds/<name or folder>`): rows of tables that lie on disk.

The tables are mapped into memory, not streamed, so that order, shards and resumption are those of single files. Only
data are loaded: `datasets` itself refuses data sets that come with a script.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from mpvg.config import RunConfig
from mpvg.data.images import ImageFiles
from mpvg.data.listing import Classes, Listing
from mpvg.data.types import Split

NAME = "hfds"
"""Before the first slash of `--data`, as in timm."""
_VAL = ("validation", "val", "test")


def open_hub(config: RunConfig, splits: Sequence[Split], class_names: Classes | None) -> Listing:
    """Loads a Hugging Face data set; a `Format`.

    It is downloaded and unpacked once, into `loader.root`, or else to where `datasets` keeps its sets.
    """
    tables = _load(config)
    held_out = next((split for split in _VAL if split in tables), None)
    if "train" not in tables or held_out is None:
        raise ValueError(
            f"data {config.data!r} has the splits {', '.join(tables)}; "
            f"needed: train, and one of {', '.join(_VAL)}; rename its own, or add what is missing"
        )
    names, numbers = _classes(config.data, tables["train"])
    where: dict[Split, str] = {"train": "train", "val": held_out}
    sources = {split: _labelled(config.data, where[split], tables[where[split]], numbers) for split in splits}
    return Listing(class_names=tuple(names), train=sources.get("train"), val=sources.get("val"))


@dataclass(frozen=True)
class Rows:
    """Image files in the rows of a table, undecoded."""

    table: Any
    """`datasets.Dataset` of the one column `image`. Its bytes lie in mapped files, which all workers share."""
    where: str
    """What messages call the table."""

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"in row {index} of {self.where}"

    def open(self, index: int) -> str | BinaryIO:
        image = self.table[index]["image"] or {"bytes": None, "path": None}
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        if image["path"] is None:
            raise ValueError("it has neither bytes nor a path")
        path: str = image["path"]
        return path


def _load(config: RunConfig) -> Any:
    """The data set's splits by name, `datasets.DatasetDict`."""
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(f"data {config.data!r} needs datasets ({error}); pip install 'mpvg[data]'") from error
    try:
        return datasets.load_dataset(config.data.removeprefix(f"{NAME}/"), cache_dir=config.loader.root)
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


def _labelled(data: str, split: str, table: Any, numbers: "np.ndarray[Any, Any]") -> ImageFiles:
    from datasets import Image

    labels = _labels(data, split, table)
    unknown = np.setdiff1d(labels, numbers)
    if len(unknown):
        raise ValueError(
            f"label {unknown[0]} is in split {split!r} of data {data!r}, but is not among the {len(numbers)} classes; "
            "give every row one of them, or leave the row out"
        )
    images = table.select_columns("image").cast_column("image", Image(decode=False))
    return ImageFiles(Rows(images, f"{split} of {data}"), np.searchsorted(numbers, labels))
