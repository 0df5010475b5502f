"""Reads an annotation file in COCO's JSON into arrays; the file is untrusted, and only a piece of it is in memory."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mpvg.data.annotations import Floats, Ints
from mpvg.data.records import read_records
from mpvg.data.rle import encode_counts
from mpvg.files import memory_bytes, open_regular
from mpvg.validation import MAX_INT, shown

MAX_BYTES = 2**32
"""Size of the largest file that is read, unless a quarter of the memory is less: `0,` becomes a number of 8 bytes."""
_MAX_SIDE = 2**16
_MAX_CATEGORIES = 100_000


@dataclass(frozen=True, eq=False, kw_only=True)
class CocoFile:
    """What a file says, of the right types but otherwise unchecked; `annotations.Columns` has more about the arrays."""

    path: Path
    categories: dict[int, str]
    image_ids: Ints
    """(N,)"""
    sizes: Ints
    """Width and height of each image, (N, 2)."""
    file_names: list[str]
    ids: Ints
    """Of the annotations, (A,)."""
    images: Ints
    """Id of the image of each annotation, (A,)."""
    classes: Ints
    """Id of the category of each annotation, (A,)."""
    boxes: Floats
    """Left, top, width, height, (A, 4)."""
    areas: Floats
    crowd: "npt.NDArray[np.bool_]"
    first_polygons: Ints
    polygon_starts: Ints
    coordinates: Floats
    text_sizes: Ints
    """Height and width that the run lengths of each annotation are for, (A, 2); zeros where it has none."""
    text_starts: Ints
    text: "npt.NDArray[np.uint8]"


def read_coco_file(path: Path) -> CocoFile:
    """Reads a file, or fails as soon as it is seen to be none of COCO's.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is not a regular file, is too large, is not valid JSON, or a record lacks a key or has one of
            another type.
    """
    limit = min(MAX_BYTES, memory_bytes() // 4)
    try:
        with open_regular(path, limit) as file:
            reader = _Reader()
            for key, record in read_records(file, reader.add):
                reader.add[key](record)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} is no annotation file of COCO: {error}; it must hold images, annotations and categories"
        ) from error
    return reader.result(path)


class _Reader:
    """Appends records to arrays, which take eight bytes a number where a list takes thirty."""

    def __init__(self) -> None:
        self.add: dict[str, Callable[[dict[str, Any]], None]] = {
            "images": self._add_image,
            "annotations": self._add_annotation,
            "categories": self._add_category,
        }
        self._categories: dict[int, str] = {}
        self._image_ids, self._sizes, self._file_names = array("q"), array("q"), list[str]()
        self._ids, self._images, self._classes = array("q"), array("q"), array("q")
        self._boxes, self._areas, self._crowd = array("d"), array("d"), array("b")
        self._first_polygons, self._polygon_starts, self._coordinates = array("q", [0]), array("q", [0]), array("d")
        self._text_sizes, self._text_starts, self._text = array("q"), array("q", [0]), array("B")

    def result(self, path: Path) -> CocoFile:
        """What was read."""
        return CocoFile(
            path=path,
            categories=self._categories,
            image_ids=_numpy(self._image_ids),
            sizes=_numpy(self._sizes).reshape(-1, 2),
            file_names=self._file_names,
            ids=_numpy(self._ids),
            images=_numpy(self._images),
            classes=_numpy(self._classes),
            boxes=_numpy(self._boxes).reshape(-1, 4),
            areas=_numpy(self._areas),
            crowd=_numpy(self._crowd).astype(bool),
            first_polygons=_numpy(self._first_polygons),
            polygon_starts=_numpy(self._polygon_starts),
            coordinates=_numpy(self._coordinates),
            text_sizes=_numpy(self._text_sizes).reshape(-1, 2),
            text_starts=_numpy(self._text_starts),
            text=_numpy(self._text),
        )

    def _add_category(self, record: dict[str, Any]) -> None:
        what = f"category number {len(self._categories) + 1}"
        number, name = _whole(record, "id", what), _text(record, "name", what)
        if number in self._categories or name in self._categories.values():
            raise ValueError(f"{what} has the id or the name of another, {number} {shown(name)}")
        if len(self._categories) == _MAX_CATEGORIES:
            raise ValueError(f"it has more than {_MAX_CATEGORIES:,} categories")
        self._categories[number] = name

    def _add_image(self, record: dict[str, Any]) -> None:
        what = f"image number {len(self._image_ids) + 1}"
        number, name = _whole(record, "id", what), _text(record, "file_name", what)
        width, height = _whole(record, "width", what), _whole(record, "height", what)
        pixels = Image.MAX_IMAGE_PIXELS or _MAX_SIDE**2
        if not (1 <= width < _MAX_SIDE and 1 <= height < _MAX_SIDE and width * height <= pixels):
            raise ValueError(f"{what} has {width}x{height} pixels; allowed: up to {pixels:,}, {_MAX_SIDE - 1} a side")
        self._image_ids.append(number)
        self._sizes.extend((width, height))
        self._file_names.append(name)

    def _add_annotation(self, record: dict[str, Any]) -> None:
        what = f"annotation number {len(self._ids) + 1}"
        box = record.get("bbox")
        try:
            if not isinstance(box, list) or len(box) != 4:
                raise TypeError("a box is four numbers")
            self._boxes.extend(box)
            self._areas.append(record.get("area", box[2] * box[3]))
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{what}: its bbox or area is no box or number ({error}): {shown(box)}") from error
        crowd = record.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise ValueError(f"{what}: iscrowd is {shown(crowd)}; allowed: 0, 1")
        self._ids.append(_whole(record, "id", what))
        self._images.append(_whole(record, "image_id", what))
        self._classes.append(_whole(record, "category_id", what))
        self._crowd.append(int(crowd))
        try:
            self._add_outline(record.get("segmentation"))
        except (TypeError, OverflowError, UnicodeEncodeError) as error:
            raise ValueError(f"{what}: its segmentation is neither polygons nor run lengths ({error})") from error

    def _add_outline(self, outline: Any) -> None:
        size = (0, 0)
        if isinstance(outline, dict):
            given, counts = outline.get("size"), outline.get("counts")
            if not isinstance(given, list) or len(given) != 2 or not all(type(side) is int for side in given):
                raise TypeError(f"size is {shown(given)}")
            size = given[0], given[1]
            self._text.frombytes(counts.encode("ascii") if isinstance(counts, str) else _packed(counts))
        elif outline:
            for polygon in outline:
                if not isinstance(polygon, list):
                    raise TypeError(f"a polygon is {shown(polygon)}")
                self._coordinates.extend(polygon)
                self._polygon_starts.append(len(self._coordinates))
        self._text_sizes.extend(size)
        self._text_starts.append(len(self._text))
        self._first_polygons.append(len(self._polygon_starts) - 1)


def _packed(counts: Any) -> bytes:
    """Run lengths as text, which in a file may also be a list of numbers, as those of crowds are."""
    if not isinstance(counts, list) or not all(type(count) is int and 0 <= count < MAX_INT for count in counts):
        raise TypeError(f"counts are {shown(counts)}")
    return encode_counts(counts)


def _whole(record: dict[str, Any], key: str, what: str) -> int:
    value = record.get(key)
    if type(value) is not int or abs(value) >= MAX_INT:
        raise ValueError(f"{what}: {key} is {shown(value)}; allowed: a whole number")
    return value


def _text(record: dict[str, Any], key: str, what: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{what}: {key} is {shown(value)}; allowed: text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: {key} is {shown(value)}, which is no Unicode text") from error
    return value


def _numpy(values: "array[Any]") -> "npt.NDArray[Any]":
    """The array as NumPy's, in the same memory."""
    return np.frombuffer(values, values.typecode) if values else np.empty(0, values.typecode)
