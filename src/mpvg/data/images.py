"""Image files and the two ways to decode them: by PIL, or to a tensor for the fast pipeline.

This is the one place where a file becomes 8-bit pixels: for training, evaluation and predictions alike.
"""

import io
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional

from mpvg.data.metadata import find_orientation, without_metadata
from mpvg.data.rules import open_bounded, read_bounded
from mpvg.data.types import Decoder, Sample

# By content, not by name: PIL would pass a PostScript file that is called .jpg to Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_ASPECT = 1000
_WEBP_SHARE = 0.75  # of PIL's limit of pixels: its decoder of WebP holds four copies of the picture
_ROWS = 1024  # of a picture, copied at a time
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH, _PNG_GRAY, _PNG_PALETTE = 24, 0, 3  # the place of the bit depth in a file, and color types
_COLORS = ("YCbCr", "Gray", "RGB")
_BITS, _COMPRESSION, _PHOTOMETRIC = 258, 259, 262  # TIFF tags
_RAW, _WHITE_IS_ZERO, _YCBCR = 1, 0, 6  # and their values
# Orientation -> what makes a picture upright: PIL's method; and of a tensor, whether its sides are exchanged, and then
# along which dimensions it is flipped.
_TURNS: dict[int, tuple[Image.Transpose, bool, tuple[int, ...]]] = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, (2,)),
    3: (Image.Transpose.ROTATE_180, False, (1, 2)),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, (1,)),
    5: (Image.Transpose.TRANSPOSE, True, ()),
    6: (Image.Transpose.ROTATE_270, True, (2,)),
    7: (Image.Transpose.TRANSVERSE, True, (1, 2)),
    8: (Image.Transpose.ROTATE_90, True, (1,)),
}

File = str | os.PathLike[str] | BinaryIO
Orientation = Literal["exif", "stored"]


class Files(Protocol):
    """The image files of a split: in a folder, in tar files, in a table."""

    def __len__(self) -> int:
        """Number of files."""

    def name(self, index: int) -> str:
        """What messages call a file."""

    def open(self, index: int) -> str | BinaryIO:
        """An image file, by name or opened at its beginning."""


def read_image(file: File, orientation: Orientation = "exif") -> Image.Image:
    """Reads an image file whole, by name or opened, as 8-bit RGB.

    The first image of an animation counts; transparency is left out.

    Args:
        file: a regular file of at most `mpvg.data.rules.MAX_BYTES`.
        orientation: "exif" turns the picture upright, as its EXIF data say; "stored" leaves it as torchvision and timm
            do. PIL turns TIFF by itself.

    Raises:
        OSError: it is missing, truncated or not an image.
        ValueError: it is not a regular file, it is too large or made to exhaust its reader, its values have no known
            range, or its aspect ratio is too large for a resize.
        Image.DecompressionBombWarning: it has too many pixels.
    """
    data, exif = _read(file)
    return _decode(data, exif, orientation)


def read_label_map(file: File) -> "npt.NDArray[np.uint8]":
    """Reads a PNG whose gray levels or palette numbers are labels, (H, W).

    Raises:
        OSError: it is missing, truncated or not a PNG.
        ValueError: it is not a regular file, too large or made to exhaust its reader, or is not of 8 bits a pixel.
        Image.DecompressionBombWarning: it has too many pixels.
    """
    data, _ = _read(file)
    if not data.startswith(_PNG):
        raise UnidentifiedImageError("a label map must be a PNG")
    bits, color = data[_PNG_DEPTH : _PNG_DEPTH + 2].ljust(2, b"\0")
    if color not in (_PNG_GRAY, _PNG_PALETTE) or (color == _PNG_GRAY and bits != 8):  # PIL stretches fewer bits
        raise ValueError(f"it has {bits} bits of PNG color type {color}; a label map has 8 bits of gray, or a palette")
    with _warnings.strict(), _open(data) as image:
        _check_shape(image)
        return np.array(image)


def read_pixels(file: File, orientation: Orientation = "exif") -> Tensor:
    """Reads an image file whole, by name or opened at its beginning, as RGB (3, H, W), uint8.

    The values, refusals and errors are those of `read_image`.
    """
    data, exif = _read(file)
    pixels = _decode_jpeg(data)
    if pixels is None:
        return _to_tensor(_decode(data, exif, orientation))
    found = find_orientation(exif)
    if orientation == "exif" and found in _TURNS:
        _, exchange, flips = _TURNS[found]
        pixels = (pixels.transpose(1, 2) if exchange else pixels).flip(flips)
    return pixels


def to_8bit(image: Image.Image) -> Image.Image:
    """The image in a mode of 8 bits a channel, from which PIL converts to any other without loss of range.

    16-bit gray is divided by 257. Where the range of the values is not known, they cannot be scaled.

    Raises:
        ValueError: the values are signed, of 32 bits or floating-point, or PIL cannot tell what they mean.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        maximum = 4095 if tags.get(_BITS) == (12,) else 65535
        return image.convert("I").point(_levels(maximum, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO), "L")
    if image.mode == "I" and image.format == "PPM":  # PIL has stretched its range to 65535
        return image.point(_levels(65535, False), "L")
    if tags.get(_PHOTOMETRIC) == _YCBCR and tags.get(_COMPRESSION) == _RAW:
        raise ValueError("it is an uncompressed TIFF of YCbCr, which PIL takes for four colors; save it as RGB")
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise ValueError(
            f"it holds {kind} values, of which the range is not known; save it with 8 or 16 bits, without a sign"
        )
    if image.mode == "P" and "transparency" in image.info:  # PIL warns where there are several transparent colors
        return image.convert("RGBA")
    return image


@cache
def _levels(maximum: int, inverted: bool) -> list[int]:
    """The 8-bit level of each 16-bit value."""
    levels = [min(255, round(value * 255 / maximum)) for value in range(65536)]
    return [255 - level for level in levels] if inverted else levels


def _read(file: File) -> tuple[bytes, bytes]:
    """An image file without metadata, and the EXIF data of a JPEG."""
    with open_bounded(file) if isinstance(file, str | os.PathLike) else nullcontext(file) as opened:
        data = read_bounded(opened, file if isinstance(file, str | os.PathLike) else "it")
    return without_metadata(data)


def _decode(data: bytes, exif: bytes, orientation: Orientation) -> Image.Image:
    with _warnings.strict(), _open(data) as image:
        picture = as_read(image, orientation, exif)
    picture.info.pop("exif", None)  # or a reader of this picture would turn it once more
    return picture


def as_read(image: Image.Image, orientation: Orientation = "exif", exif: bytes = b"") -> Image.Image:
    """A picture that PIL has opened or made, as `read_image` reads the file of it: 8-bit RGB, turned as asked for.

    Args:
        image: of any mode whose values have a known range.
        orientation: see `read_image`.
        exif: its EXIF data; empty: those that PIL knows of.

    Raises:
        OSError: its file is damaged.
        ValueError: as `read_image`.
    """
    _check_shape(image)
    image.load()
    rgb = to_8bit(image)
    if rgb.mode != "RGB":  # it would be copied
        rgb = rgb.convert("RGB")
    found = find_orientation(exif or image.info.get("exif", b""))
    if orientation == "stored" or found not in _TURNS:
        return rgb
    turned = rgb.transpose(_TURNS[found][0])
    turned.info.pop("exif", None)
    return turned


class _Warnings:
    """The warning filters of decoding, which Python has once for all threads.

    Each thread setting and restoring them by itself would take them from the others in the middle of a picture, and in
    the end leave them set. So the first thread that decodes sets them, and the last one restores what was before.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._before = warnings.catch_warnings()

    @contextmanager
    def strict(self) -> Iterator[None]:
        """A picture with too many pixels is an error, and damaged TIFF tags are not spoken of, once for each."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore", UserWarning)
                warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._before.__exit__(None, None, None)


_warnings = _Warnings()


def _to_tensor(image: Image.Image) -> Tensor:
    """As `pil_to_tensor`, some rows at a time: it holds three more copies of the picture."""
    pixels = torch.empty((image.height, image.width, 3), dtype=torch.uint8)
    for top in range(0, image.height, _ROWS):
        rows = image.crop((0, top, image.width, min(top + _ROWS, image.height)))
        pixels[top : top + _ROWS] = functional.pil_to_tensor(rows).permute(1, 2, 0)
    return pixels.permute(2, 0, 1)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise UnidentifiedImageError(f"cannot identify image file; allowed: {', '.join(_FORMATS)}") from error


def _check_shape(image: Image.Image) -> None:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width}x{image.height} is too elongated to resize; allowed: aspect up to {MAX_ASPECT}")
    limit = int(_WEBP_SHARE * (Image.MAX_IMAGE_PIXELS or math.inf)) if image.format == "WEBP" else math.inf
    if image.width * image.height > limit:
        raise ValueError(f"a WebP image of {image.width}x{image.height} is too large; allowed: {limit} pixels")


@cache  # a failing import would search the whole path again for every image
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _decode_jpeg(data: bytes) -> Tensor | None:
    """Decodes a color or gray JPEG with simplejpeg; None: it is not installed, or the file is left to PIL."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None or not data.startswith(_JPEG):
        return None
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


class Sized(Protocol):
    """A target that is of places in an image."""

    def check_size(self, width: int, height: int) -> None:
        """Raises ValueError unless the image has the size that the target is for."""


@dataclass(frozen=True)
class AnnotatedFiles(ImageFiles):
    """Image files and targets that are of places in them: boxes, label maps."""

    targets: Sequence[Sized]

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        image = sample.image
        width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
        sample.target.check_size(width, height)
        return sample
