"""Maps of labels over images."""

import numpy as np
import pytest
from PIL import Image

from mpvg.overlays import colored_png, draw_labels, palette

NAMES = ("road", "a house with a long name", "sky", "tree")


def test_labels_are_drawn_and_named_and_pixels_of_none_are_left() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    labels = np.full((40, 60), 255, np.uint8)
    labels[:10], labels[20:25] = 1, 3
    drawn = draw_labels(Image.fromarray(pixels), labels, NAMES, strength=0.5)
    assert (drawn.mode, drawn.width) == ("RGB", 60)
    assert drawn.height > 40
    found = np.asarray(drawn)[:40]
    assert np.array_equal(found[labels == 255], pixels[labels == 255])
    for label in (1, 3):
        inside = labels == label
        expected = (pixels[inside] + palette(4)[label].astype(float)) / 2
        assert np.abs(found[inside] - expected).max() <= 0.5
    legend = {tuple(color) for color in np.asarray(drawn)[40:].reshape(-1, 3).tolist()}
    assert {tuple(palette(4)[label].tolist()) for label in (1, 3)} <= legend
    assert tuple(palette(4)[0].tolist()) not in legend


def test_a_map_is_resized_to_its_image() -> None:
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    drawn = np.asarray(draw_labels(Image.new("L", (80, 60), 100), labels, NAMES, strength=1))
    colors = palette(4)
    for (y, x), color in {(5, 5): colors[0], (5, 75): colors[1], (55, 5): colors[2], (55, 75): (100,) * 3}.items():
        assert tuple(drawn[y, x]) == tuple(color)


def test_nothing_labelled_leaves_the_image_alone() -> None:
    image = Image.new("RGB", (8, 6), "red")
    drawn = draw_labels(image, np.full((6, 8), 255, np.uint8), NAMES)
    assert np.array_equal(np.asarray(drawn), np.asarray(image))


def test_classes_have_colors_of_their_own_whatever_their_number() -> None:
    colors = palette(150)
    assert len(np.unique(colors, axis=0)) == 150
    assert np.array_equal(palette(7), colors[:7])
    distance = np.abs(colors[:-1].astype(int) - colors[1:]).sum(1)
    assert distance.min() > 100


def test_the_png_s_numbers_are_the_labels() -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = colored_png(labels)
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), labels)
    assert np.array_equal(np.asarray(image.convert("RGB")).reshape(-1, 3)[:255], palette(255))


def test_what_cannot_be_drawn_is_refused() -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="label 4 is of none of the 4 classes; give their names"):
        draw_labels(image, np.full((4, 4), 4, np.uint8), NAMES)
    with pytest.raises(ValueError, match=r"strength is 2; allowed: a number in \[0, 1\]"):
        draw_labels(image, np.zeros((4, 4), np.uint8), NAMES, strength=2)
