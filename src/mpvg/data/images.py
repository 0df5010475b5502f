"""Image files and the two ways to decode them: by PIL, or to a tensor for the fast pipeline."""

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from mpvg.data.types import Decoder, Sample

# By content, not by name: PIL would pass a PostScript file that is called .jpg to Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_ASPECT = 1000
_JPEG = b"\xff\xd8\xff"
_COLORS = ("YCbCr", "Gray", "RGB")


class Files(Protocol):
    """The image files of a split: in a folder, in tar files, in a table."""

    def __len__(self) -> int:
        """Number of files."""

    def name(self, index: int) -> str:
        """What messages call a file."""

    def open(self, index: int) -> str | BinaryIO:
        """An image file, by name or opened at its beginning."""


def read_image(file: str | BinaryIO) -> Image.Image:
    """Reads an image file whole, by name or opened, as RGB.

    Raises:
        OSError: it is missing, truncated or not an image.
        ValueError: its aspect ratio is too large for a resize.
        Image.DecompressionBombWarning: it has too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_FORMATS) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(
                    f"{image.width}x{image.height} is too elongated to resize; allowed: aspect up to {MAX_ASPECT}"
                )
            return image.convert("RGB")


def read_pixels(file: str | BinaryIO) -> Tensor:
    """Reads an image file whole, by name or opened at its beginning, as RGB (3, H, W), uint8.

    The values, refusals and errors are those of `read_image`.
    """
    pixels = _decode_jpeg(file)
    return functional.pil_to_tensor(read_image(file)) if pixels is None else pixels


@cache  # a failing import would search the whole path again for every image
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _decode_jpeg(file: str | BinaryIO) -> Tensor | None:
    """Decodes a color or gray JPEG with simplejpeg; None: it is not installed, or the file is left to PIL."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        return None
    with open(file, "rb") if isinstance(file, str) else nullcontext(file) as opened:
        # PIL reads the other kinds itself, so only the beginning of such a file is read twice.
        if opened.read(len(_JPEG)) != _JPEG:
            return None
        opened.seek(0)  # `_JPEG + read()` would copy the data
        data = opened.read()
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        small = height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
        if not small or max(height, width) > MAX_ASPECT * min(height, width) or colors not in _COLORS:
            return None
        return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    except ValueError:  # it also refuses harmless oddities, such as bytes between the segments
        return None


@dataclass(frozen=True)
class ImageFiles:
    """Image files and their targets, as a `Source`."""

    files: Files
    targets: "Sequence[Any] | np.ndarray[Any, Any]"
    """One per file; an array of numbers where there are many, which worker processes share."""
    decode: Decoder = read_image

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files.name(index)

    def read(self, index: int) -> Sample:
        return Sample(self.decode(self.files.open(index)), self.targets[index])
