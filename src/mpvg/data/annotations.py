"""The objects in the images of a split: boxes, classes and outlines as a few arrays, which worker processes share.

A list of dictionaries would be copied by every worker, since reading it writes its reference counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mpvg.data.rle import Mask, decode_mask

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Outline = bytes | list[Floats]
"""Run lengths as text (see `rle`), or polygons, each the coordinates x, y, x, y, ... in pixels."""


@dataclass(frozen=True, eq=False)
class ImageAnnotations:
    """The objects in one image, as its data set gives them."""

    image_id: int
    height: int
    """Of the image, in pixels."""
    width: int
    boxes: Floats
    """Left, top, right, bottom in pixels, (N, 4); as annotated, so they may reach beyond the image a little."""
    labels: Ints
    """Classes, (N,), from 0 on."""
    areas: Floats
    """Of the objects, in pixels, (N,)."""
    crowd: "npt.NDArray[np.bool_]"
    """Whether it is a group of objects, of which no single ones are annotated, (N,)."""
    outlines: tuple[Outline, ...]
    """Of each object."""

    def run_lengths(self) -> list[bytes]:
        """The mask of each object as run lengths (see `rle`), which pycocotools and faster-coco-eval take.

        Raises:
            ModuleNotFoundError: there are polygons, and faster-coco-eval, which draws them, is not installed.
        """
        return [
            outline if isinstance(outline, bytes) else _draw(outline, self.height, self.width)
            for outline in self.outlines
        ]

    def masks(self) -> Mask:
        """The masks of the objects, (N, H, W), 0 or 1, at the image's size; errors as `run_lengths`."""
        found = [decode_mask(text, self.height, self.width) for text in self.run_lengths()]
        return np.stack(found) if found else np.zeros((0, self.height, self.width), np.uint8)

    def check_size(self, width: int, height: int) -> None:
        """Raises ValueError unless the image has the annotated size."""
        if (width, height) != (self.width, self.height):
            raise ValueError(mismatch(width, height, self.width, self.height))


def mismatch(width: int, height: int, annotated_width: int, annotated_height: int) -> str:
    """What is wrong with an image of another size than its annotation, in words."""
    turned = (height, width) == (annotated_width, annotated_height)
    cure = "; with another --orientation it fits" if turned else ""
    return f"it has {width}x{height} pixels, and its annotation is for {annotated_width}x{annotated_height}{cure}"


def drawing() -> Any:
    """The functions that draw polygons.

    Raises:
        ModuleNotFoundError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"annotations with polygons need faster-coco-eval ({error}); pip install 'mpvg[det]'"
        ) from error
    return mask


def _draw(polygons: list[Floats], height: int, width: int) -> bytes:
    mask = drawing()
    counts: bytes = mask.merge(mask.frPyObjects([polygon.tolist() for polygon in polygons], height, width))["counts"]
    return counts


@dataclass(frozen=True, eq=False, kw_only=True)
class Columns:
    """The annotations of a file, of which number `a` is item `a` of each array."""

    boxes: Floats
    """As `ImageAnnotations.boxes`, (A, 4)."""
    labels: Ints
    areas: Floats
    crowd: "npt.NDArray[np.bool_]"
    first_polygons: Ints
    """Number of the first polygon of each annotation and, at the end, of polygons, (A + 1,)."""
    polygon_starts: Ints
    """Where each polygon begins in `coordinates` and, at the end, their number, (P + 1,)."""
    coordinates: Floats
    """Of all polygons, one after another: x, y, x, y, ..."""
    text_starts: Ints
    """Where the run lengths of each annotation begin in `text` and, at the end, its size, (A + 1,)."""
    text: "npt.NDArray[np.uint8]"
    """Run lengths of all annotations that have no polygons, one after another."""

    def outline(self, number: int) -> Outline:
        """The outline of an annotation."""
        start, end = self.text_starts[number : number + 2]
        if end > start:
            return self.text[start:end].tobytes()
        first, last = self.first_polygons[number : number + 2]
        starts = self.polygon_starts[first : last + 1].tolist()
        return [self.coordinates[start:end] for start, end in pairwise(starts)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Annotations(Sequence[ImageAnnotations]):
    """The annotations of a split by image, as the targets of its images."""

    image_ids: Ints
    """(N,)"""
    sizes: Ints
    """Width and height in pixels, (N, 2)."""
    starts: Ints
    """Where the annotations of each image begin in `numbers` and, at the end, its size, (N + 1,)."""
    numbers: Ints
    """Annotations of all images, one image after another."""
    columns: Columns

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> ImageAnnotations:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        numbers, columns = self.numbers[self.starts[index] : self.starts[index + 1]], self.columns
        width, height = self.sizes[index].tolist()
        return ImageAnnotations(
            image_id=int(self.image_ids[index]),
            height=height,
            width=width,
            boxes=columns.boxes[numbers],
            labels=columns.labels[numbers],
            areas=columns.areas[numbers],
            crowd=columns.crowd[numbers],
            outlines=tuple(columns.outline(number) for number in numbers.tolist()),
        )

    def hashes(self) -> list[str]:
        """A hash of the annotations of each image."""
        found = []
        for one in self:
            hash = blake2b(f"{one.width}x{one.height}".encode(), digest_size=8)
            for part in (one.boxes, one.labels, one.areas, one.crowd):
                hash.update(part.tobytes())
            for outline in one.outlines:
                for piece in [outline] if isinstance(outline, bytes) else map(np.ndarray.tobytes, outline):
                    hash.update(b"|" + piece)
            found.append(hash.hexdigest())
        return found
