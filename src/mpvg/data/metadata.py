"""What an image file says besides its pixels: its orientation is found, the rest is kept from PIL.

PIL reads profiles, comments and EXIF tags before the pixels. It refuses good pictures for large ones, warns of damaged
ones, a hostile tag directory makes it hold the same bytes once for each of 65,535 tags, and a long comment in a GIF
keeps it busy for minutes. No pixel depends on them.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_JPEG, _PNG, _EXIF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"Exif\0\0"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT = 274, 322, 323
_NUMBERS = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i", 16: "Q"}  # types of tags
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_RAW = (1, 2, 6, 7)  # types whose values PIL keeps as bytes
_MAX_TAGS, _MAX_VALUES, _MAX_TAG_BYTES = 4096, 2**17, 64 * 2**20
_FEW_SCANS, _MAX_SCANS = 20, 500  # of a JPEG, which passes over the whole picture in each
_MAX_SCANNED = 2**31  # pixels, in all scans together


class Tag(NamedTuple):
    """An entry of a TIFF directory."""

    number: int
    kind: int
    length: int
    value: int
    """The first value, where it is a whole number that stands in the entry itself."""


def without_metadata(data: bytes) -> tuple[bytes, bytes]:
    """An image file without what its pixels do not depend on, and the EXIF data of a JPEG.

    Args:
        data: the whole file; of an unknown format, or damaged, it stays as it is.

    Raises:
        ValueError: it is made to exhaust its reader.
    """
    if data.startswith(_TIFF):
        _check_tiff(data)
    walk = next((walk for start, walk in _WALKS.items() if data.startswith(start)), None)
    if walk is None:
        return data, b""
    found = Found()
    walk(data, found)
    return found.cut(data), found.exif


def find_orientation(exif: bytes) -> int:
    """The orientation in EXIF data, 1 to 8; 1, which is upright, where there is none or it is damaged."""
    for tag in _tags(exif.removeprefix(_EXIF)):
        if tag.number == _ORIENTATION:
            return tag.value if tag.kind in _NUMBERS and tag.length == 1 and 1 <= tag.value <= 8 else 1
    return 1


class Found:
    """What is found in the parts of a file before its pixels."""

    def __init__(self) -> None:
        self.exif = b""
        self._spans: list[tuple[int, int]] = []

    def drop(self, start: int, end: int) -> None:
        """Leaves a part out."""
        self._spans.append((start, end))

    def cut(self, data: bytes) -> bytes:
        """The file without the parts that are left out."""
        view, kept, position = memoryview(data), [], 0
        for start, end in self._spans:
            kept.append(view[position:start])
            position = end
        return b"".join([*kept, view[position:]]) if kept else data


def _walk_jpeg(data: bytes, found: Found) -> None:
    """Drops APP1 to APP13 and APP15; the first one of EXIF data is kept apart."""
    position, pixels = 2, 0
    while (position := data.find(b"\xff", position)) >= 0 and position + 4 <= len(data):
        marker = data[position + 1]
        if marker in (0xD9, 0xDA):  # the end, or pixels
            break
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # padding, and markers without content
            position += 1 if marker == 0xFF else 2
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if end > len(data):
            break
        if 0xE1 <= marker <= 0xED or marker == 0xEF:  # APP14 tells how colors are stored
            if marker == 0xE1 and not found.exif and data.startswith(_EXIF, position + 4):
                found.exif = data[position + 4 : end]
            found.drop(position, end)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and position + 9 <= len(data):
            height, width = struct.unpack_from(">HH", data, position + 5)
            pixels = max(pixels, height * width)
        position = end
    scans = data.count(b"\xff\xda", max(0, position))  # between pixels, 0xFF is always followed by something else
    if scans > max(_FEW_SCANS, min(_MAX_SCANS, _MAX_SCANNED // max(1, pixels))):
        raise ValueError(
            f"the JPEG has {scans} scans of {pixels} pixels; allowed: {_FEW_SCANS}, or up to {_MAX_SCANS} of "
            f"{_MAX_SCANNED} pixels in all"
        )


def _walk_png(data: bytes, found: Found) -> None:
    """Drops all but the critical chunks, transparency and EXIF data: an animated PNG becomes its first image."""
    position, view = len(_PNG), memoryview(data)
    while position + 12 <= len(data):
        kind = data[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        wanted = kind[:1].isupper() or kind in (b"tRNS", b"eXIf")
        # One whose checksum is wrong may be one of those, damaged: it is left for PIL to refuse.
        if not wanted and zlib.crc32(view[position + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big"):
            found.drop(position, end)
        position = end


def _walk_gif(data: bytes, found: Found) -> None:
    """Drops comments and other extensions before the first image, except for its own, 0xF9."""
    colors = 2 << (data[10] & 7) if len(data) > 10 and data[10] & 0x80 else 0
    position = 13 + 3 * colors
    while data[position : position + 1] == b"!":
        end = position + 2
        while end < len(data) and data[end]:
            end += 1 + data[end]
        if end >= len(data):
            break
        end += 1
        if data[position + 1] != 0xF9:
            found.drop(position, end)
        position = end


_WALKS = {_JPEG: _walk_jpeg, _PNG: _walk_png, b"GIF8": _walk_gif}


def _check_tiff(data: bytes) -> None:
    """Refuses a TIFF whose first directory would fill the memory or take for ever."""
    from PIL import Image

    total, tile = 0, {}
    for number, tag in enumerate(_tags(data)):
        size = tag.length * _SIZES.get(tag.kind, 0)
        total += size
        if (
            number >= _MAX_TAGS
            or total > _MAX_TAG_BYTES
            or (tag.kind not in _RAW and size and tag.length > _MAX_VALUES)
        ):
            raise ValueError(
                f"its TIFF tag number {number + 1} has {tag.length} values; allowed: {_MAX_TAGS} tags, "
                f"{_MAX_VALUES} values in each and {_MAX_TAG_BYTES} bytes in all"
            )
        if tag.number in (_TILE_WIDTH, _TILE_HEIGHT):
            tile[tag.number] = tag.value
    width, height = tile.get(_TILE_WIDTH, 0), tile.get(_TILE_HEIGHT, 0)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"the TIFF has tiles of {width}x{height}; allowed: up to {Image.MAX_IMAGE_PIXELS} pixels")


def _tags(data: bytes) -> Iterator[Tag]:
    """The entries of the first directory of TIFF data, until the data end; none if it is not TIFF."""
    if not data.startswith(_TIFF):
        return
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    first, counter, entry, size = ("Q", "Q", "HHQ", 20) if big else ("I", "H", "HHI", 12)
    try:
        (offset,) = struct.unpack_from(order + first, data, 8 if big else 4)
        (count,) = struct.unpack_from(order + counter, data, offset)
        offset += struct.calcsize(order + counter)
        for start in range(offset, offset + count * size, size):
            number, kind, values = struct.unpack_from(order + entry, data, start)
            format = _NUMBERS.get(kind, "B")
            (value,) = struct.unpack_from(order + format, data, start + struct.calcsize(order + entry))
            yield Tag(number, kind, values, value)
    except (struct.error, OverflowError):  # damaged
        return
