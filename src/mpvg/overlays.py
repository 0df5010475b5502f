"""Drawing over images with Pillow alone: maps of labels in colors that differ, with the names of the classes."""

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mpvg.data.ade20k import IGNORED

"""Label of a pixel that is of no class, which is left as it is."""
_GOLDEN = 0.6180339887
"""Turns of the hue between one class and the next: neighbours in the list of classes are far apart in color."""
_LINE, _MARGIN = 16, 4


def palette(count: int) -> NDArray[np.uint8]:
    """Colors of classes, (count, 3): the same for the same class, however many there are."""
    colors = [
        colorsys.hsv_to_rgb(number * _GOLDEN % 1, (0.9, 0.55, 0.75)[number % 3], (0.95, 0.75, 1.0)[number // 3 % 3])
        for number in range(count)
    ]
    return np.round(255 * np.array(colors, np.float64).reshape(count, 3)).astype(np.uint8)


def colored_png(labels: NDArray[np.uint8]) -> Image.Image:
    """A map of labels (H, W) as an image whose pixels are the labels and whose palette gives them colors."""
    image = Image.fromarray(labels)
    colors = np.zeros((256, 3), np.uint8)
    colors[:IGNORED] = palette(IGNORED)
    image.putpalette(colors.tobytes())  # from gray to palette mode; the numbers stay
    return image


def draw_labels(
    image: Image.Image, labels: NDArray[np.uint8], class_names: Sequence[str], *, strength: float = 0.55
) -> Image.Image:
    """Draws a map of labels over an image, with a list of the classes that occur in it below, largest first.

    Args:
        image: of any mode and size.
        labels: (H, W), from 0 on; `IGNORED` pixels are left as they are. It is resized to the image, nearest.
        class_names: in the order of the labels.
        strength: weight of the colors, in [0, 1].

    Returns:
        An RGB image as wide as the given one, and higher by the list.

    Raises:
        ValueError: a label is of none of the classes, or the strength is out of range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; allowed: a number in [0, 1]")
    present, counts = np.unique(labels[labels != IGNORED], return_counts=True)
    if len(present) and present[-1] >= len(class_names):
        raise ValueError(f"label {present[-1]} is of none of the {len(class_names)} classes; give their names")
    below = np.asarray(image.convert("RGB"), np.float32)
    resized = np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
    colors = palette(IGNORED + 1)
    mixed = (1 - strength) * below + strength * colors[resized]
    mixed = np.where((resized == IGNORED)[..., None], below, mixed)
    drawn = Image.fromarray(np.round(mixed).astype(np.uint8))
    order = present[np.argsort(-counts, kind="stable")].tolist()
    return _with_names(drawn, [(class_names[label], tuple(colors[label].tolist())) for label in order])


def _with_names(image: Image.Image, names: Sequence[tuple[str, tuple[int, ...]]]) -> Image.Image:
    """Adds a list of names, each beside its color, below an image."""
    font = ImageFont.load_default()
    places, left, row = [], _MARGIN, 0
    for name, _ in names:
        width = _LINE + round(font.getlength(name)) + 2 * _MARGIN
        if left > _MARGIN and left + width > image.width:
            left, row = _MARGIN, row + 1
        places.append((left, image.height + _MARGIN + row * _LINE))
        left += width
    height = image.height + ((row + 1) * _LINE + 2 * _MARGIN if names else 0)
    whole = Image.new("RGB", (image.width, height), "white")
    whole.paste(image)
    draw = ImageDraw.Draw(whole)
    for (name, color), (x, y) in zip(names, places, strict=True):
        draw.rectangle((x, y + 2, x + _LINE - 6, y + _LINE - 4), fill=color, outline="black")
        draw.text((x + _LINE - 2, y), name, fill="black", font=font)
    return whole
