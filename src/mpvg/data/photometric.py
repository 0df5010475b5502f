"""Photometric distortion of a training image, with the numbers of mmsegmentation's `PhotoMetricDistortion`."""

import random

import torch
from torch import Tensor

BRIGHTNESS = 32.0
"""Largest change, of values in [0, 255]."""
FACTORS = (0.5, 1.5)
"""Range of the factors of contrast and saturation."""
HUE = 18 / 180
"""Largest change, as a share of the circle."""


def distort(pixels: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2; contrast first or last.

    Args:
        pixels: (3, H, W), float32, in [0, 255].
    """
    if random.random() < 0.5:
        pixels = (pixels + random.uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 255)
    contrast_first = random.random() < 0.5
    if contrast_first:
        pixels = _change_contrast(pixels)
    saturation = random.uniform(*FACTORS) if random.random() < 0.5 else 1.0
    hue = random.uniform(-HUE, HUE) if random.random() < 0.5 else 0.0
    if (saturation, hue) != (1.0, 0.0):
        pixels = change_color(pixels, saturation, hue)
    return pixels if contrast_first else _change_contrast(pixels)


def _change_contrast(pixels: Tensor) -> Tensor:
    return (pixels * random.uniform(*FACTORS)).clamp(0, 255) if random.random() < 0.5 else pixels


def change_color(pixels: Tensor, saturation: float, hue: float) -> Tensor:
    """Multiplies the saturation, up to 1, and turns the hue by a share of the circle, in HSV.

    Args:
        pixels: (3, H, W), in [0, 255].
        saturation: factor.
        hue: in [-1, 1].
    """
    value, minimum = pixels.amax(0), pixels.amin(0)
    spread = value - minimum
    red, green, blue = pixels
    sixths = torch.where(
        value == red,
        (green - blue) / spread,
        torch.where(value == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    sixths = torch.where(spread > 0, sixths, 0) + 6 * hue
    chroma = torch.minimum(spread * saturation, value)
    # A color's distance from its hue, in sixths of the circle, says how much of the chroma it lacks.
    places = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + sixths) % 6
    return value - chroma * torch.minimum(places, 4 - places).clamp(0, 1)
