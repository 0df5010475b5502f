"""Draws the scenes of `canvas`: real digits or garments on a textured ground, with the mask of each known.

Objects are bright on a darker ground and are wholly inside the picture; later ones may cover earlier ones, but at least
half of each object's pixels stay visible. Bars, ellipses and quarters of digits lie below them.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
MIN_VISIBLE = 0.5
"""Share of an object's pixels that is visible at least."""
_MAX_IOU = 0.3
_MIN_PIXELS = 12
_ATTEMPTS = 100
_NOISE = 0.03
_SOLID_GAIN = 4.0  # garments have dark parts, which are inside


@dataclass(frozen=True, kw_only=True)
class Level:
    """What makes scenes easy or hard."""

    side: int = 128
    """Of a scene, in pixels."""
    objects: tuple[int, int] = (3, 8)
    """Fewest and most in a scene."""
    tile: tuple[int, int] = (16, 56)
    """Smallest and largest side of the square that an object's source image becomes; a digit is 0.6 as wide."""
    clutter: tuple[float, float] = (0.8, 1.0)
    """Brightness of the clutter; that of objects is 0.8 to 1, and of the ground 0.1 to 0.4."""
    colored: bool = False
    """Whether colors, and whether objects are brighter or darker than the ground, are random."""


LEVELS = {
    "easy": Level(clutter=(0.45, 0.65)),
    "": Level(),
    "hard": Level(side=160, objects=(1, 6), tile=(12, 56), colored=True),
}
TILE = replace(LEVELS[""], side=64, objects=(1, 1))
"""A single object, for the pre-training of classifiers."""


@dataclass(frozen=True, eq=False)
class Sources:
    """The images that objects are made from."""

    images: Bytes
    """(N, h, w): the object is bright, what is around it is 0."""
    labels: "npt.NDArray[np.int64]"
    """(N,)"""
    solid: bool
    """Whether all that is not 0 is inside the object."""

    def tile(self, number: int, side: int) -> Floats:
        """An image at another size, (side, side), with 1 where it is brightest."""
        image = Image.fromarray(self.images[number]).resize((side, side), Image.Resampling.BICUBIC)
        tile = np.asarray(image, np.float32)
        return tile / max(float(tile.max()), 1.0)


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and the objects in it."""

    image: Bytes
    """(H, W), or (H, W, 3) where it has colors."""
    objects: Bytes
    """Number of the object that is visible at each pixel, from 1 on; 0: none. (H, W)"""
    labels: list[int]
    """Class of each object."""
    sources: list[int]
    """Number of the source image of each object."""
    totals: list[int]
    """Pixels of each object, visible or not."""


def draw_scene(rng: np.random.Generator, sources: Sources, level: Level) -> Scene:
    """Draws a scene from a generator's random numbers."""
    canvas = _Canvas(rng, level)
    for _ in range(int(rng.integers(2, 3 + level.side // 24))):
        canvas.add_clutter(sources)
    for _ in range(int(rng.integers(level.objects[0], level.objects[1] + 1))):
        for _ in range(_ATTEMPTS):
            if canvas.add_object(sources):
                break
    if len(canvas.labels) < level.objects[0]:  # the first ones left no room
        return draw_scene(rng, sources, level)
    return Scene(canvas.finish(), canvas.objects, canvas.labels, canvas.sources, canvas.totals)


class _Canvas:
    """A scene that is being drawn."""

    def __init__(self, rng: np.random.Generator, level: Level) -> None:
        self._rng, self._level = rng, level
        self.objects = np.zeros((level.side, level.side), np.uint8)
        self.labels, self.sources, self.totals, self._boxes = list[int](), list[int](), list[int](), list[Any]()
        texture = rng.uniform(-0.08, 0.08, (8, 8)).astype(np.float32)
        wide = Image.fromarray(texture).resize((level.side, level.side), Image.Resampling.BICUBIC)
        ground = np.asarray(wide)[:, :, None] + np.float32(rng.uniform(0.18, 0.32))
        self._pixels = np.repeat(ground, 3 if level.colored else 1, axis=2) + self._tint()

    def add_clutter(self, sources: Sources) -> None:
        """Draws a bar, an ellipse or a quarter of a source image."""
        rng, side = self._rng, self._level.side
        kind, size = rng.integers(3), int(rng.integers(8, 29))
        left, top = (int(value) for value in rng.integers(0, side - size, 2))
        if kind == 2:
            half = sources.tile(int(rng.integers(len(sources.labels))), 2 * size)
            row, column = (int(value) * size for value in rng.integers(0, 2, 2))
            shape = half[row : row + size, column : column + size]
        else:
            picture = Image.new("L", (size, size))
            draw, width = ImageDraw.Draw(picture), int(rng.integers(2, 5))
            ends = rng.integers(0, size, 4).tolist()
            if kind == 0:
                draw.line(ends, fill=255, width=width)
            else:
                x, y = (int(value) for value in rng.integers(size // 2, size, 2))
                draw.ellipse((0, 0, x, y), outline=255, width=width)
            shape = np.asarray(picture, np.float32) / np.float32(255)
        self._paint(shape, left, top, rng.uniform(*self._level.clutter) * np.ones_like(shape))

    def add_object(self, sources: Sources) -> bool:
        """Draws an object at a random place, or says that it would cover too much there."""
        rng, level = self._rng, self._level
        number, side = int(rng.integers(len(sources.labels))), int(rng.integers(level.tile[0], level.tile[1] + 1))
        left, top = (int(value) for value in rng.integers(0, level.side - side + 1, 2))
        tile = sources.tile(number, side)
        shape = np.minimum(1, _SOLID_GAIN * tile) if sources.solid else tile
        mask = shape > 0.5
        total = int(mask.sum())
        if total < _MIN_PIXELS:
            return False
        box = _box(mask) + np.array([left, top, left, top])
        covered = self.objects[top : top + side, left : left + side]
        lost = np.bincount(covered[mask], minlength=len(self.labels) + 1)[1:]
        visible = np.bincount(self.objects.ravel(), minlength=len(self.labels) + 1)[1:] - lost
        hides = (visible < MIN_VISIBLE * np.array(self.totals)).any()
        if hides or any(_iou(box, other) > _MAX_IOU for other in self._boxes):
            return False
        shade = 0.35 + 0.65 * tile if sources.solid else np.ones_like(tile)
        self._paint(shape, left, top, rng.uniform(0.8, 1.0) * shade)
        self.labels.append(int(sources.labels[number]))
        self.sources.append(number)
        self.totals.append(total)
        self._boxes.append(box)
        covered[mask] = len(self.labels)
        return True

    def finish(self) -> Bytes:
        """The picture with its noise."""
        pixels = self._pixels
        if self._level.colored and self._rng.random() < 0.5:
            pixels = 1 - pixels
        pixels = pixels + self._rng.normal(0, _NOISE, pixels.shape)
        found = np.round(255 * pixels.clip(0, 1)).astype(np.uint8)
        return found if self._level.colored else found[:, :, 0]

    def _paint(self, shape: Floats, left: int, top: int, values: "npt.NDArray[Any]") -> None:
        """Mixes values (h, w) into the picture, by how much of each pixel the shape (h, w) covers."""
        height, width = shape.shape
        place = self._pixels[top : top + height, left : left + width]
        place += shape[:, :, None] * (values[:, :, None] + self._tint() - place)

    def _tint(self) -> Floats:
        """What is added to the colors of a thing."""
        amount = 0.25 if self._level.colored else 0.0
        return self._rng.uniform(-amount, amount, 3 if self._level.colored else 1).astype(np.float32)


def _box(mask: "npt.NDArray[np.bool_]") -> "npt.NDArray[np.int64]":
    """Left, top, right and bottom of what is inside, the last two one beyond it."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _iou(a: "npt.NDArray[np.int64]", b: "npt.NDArray[np.int64]") -> float:
    """Intersection of two boxes over their union."""
    inner = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(inner.clip(min=0).prod())
    return shared / float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared)
