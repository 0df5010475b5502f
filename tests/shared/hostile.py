"""Image files that are odd, damaged or made to harm, each with the picture that is right, or none.

Written by hand or with other software than what is tested, wherever a format allows it.
"""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """An image file."""

    data: bytes
    picture: Pixels | None = None
    """(H, W, 3), uint8: what it shows. None: it must be refused."""
    tolerance: int = 0
    """Levels by which a reader may differ: a JPEG loses some."""
    may_fail: bool = False
    """Whether it may also be refused, because it is damaged."""
    suffix: str = ".png"
    size: int | None = None
    """Bytes that the file is extended to, without writing them."""


def smooth(rng: np.random.Generator, height: int = 24, width: int = 32) -> Pixels:
    """A picture without symmetries that JPEG keeps to within a few levels."""
    y, x = np.mgrid[0:height, 0:width]
    scale = rng.uniform(0.3, 1, (3, 2))
    planes = [127 + 60 * np.sin(a * x / 6) + 60 * np.cos(b * y / 5 + x / 9) for a, b in scale]
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def noise(rng: np.random.Generator, height: int = 9, width: int = 13) -> Pixels:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def gray(levels: Pixels) -> Pixels:
    return np.repeat(levels.astype(np.uint8)[..., None], 3, -1)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(picture: Pixels, **options: Any) -> bytes:
    return saved(Image.fromarray(picture), "JPEG", quality=100, subsampling=0, **options)


# ---- writers


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, bits: int, color: int, rows: bytes, *, before: bytes = b"", interlace: int = 0
) -> bytes:
    """`rows`: packed, each after its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlace)
    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows_of(array: Pixels) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in array)


def png_of(picture: Pixels, before: bytes = b"") -> bytes:
    return png(picture.shape[1], picture.shape[0], 8, 2, rows_of(picture), before=before)


Entry = tuple[int, int, Sequence[int]]
_FORMATS = {1: "B", 3: "H", 4: "I", 7: "B", 8: "h", 16: "Q"}


def tiff(
    entries: list[Entry], parts: list[bytes], *, order: str = "<", big: bool = False, tiled: bool = False
) -> bytes:
    """A TIFF of one directory; `parts` are its strips or tiles."""
    start, word = (16, "Q") if big else (8, "I")
    offsets, body = [], b""
    for part in parts:
        offsets.append(start + len(body))
        body += part + b"\0" * (len(part) % 2)
    at, sizes = (324, 325) if tiled else (273, 279)
    entries = sorted([*entries, (at, 4, offsets), (sizes, 4, [len(part) for part in parts])])
    directory, room = b"", struct.calcsize(word)
    for tag, kind, values in entries:
        value = struct.pack(f"{order}{len(values)}{_FORMATS[kind]}", *values)
        if len(value) > room:
            at, body = start + len(body), body + value + b"\0" * (len(value) % 2)
            value = struct.pack(order + word, at)
        directory += struct.pack(f"{order}HH{word}", tag, kind, len(values)) + value.ljust(room, b"\0")
    mark = b"II" if order == "<" else b"MM"
    place = struct.pack(order + word, start + len(body))
    head = struct.pack(order + "HHH", 43, 8, 0) if big else struct.pack(order + "H", 42)
    count = struct.pack(order + ("Q" if big else "H"), len(entries))
    return mark + head + place + body + count + directory + b"\0" * room


def tiff_of(array: Pixels, photometric: int, *, bits: int, rows: int = 0, order: str = "<", **options: Any) -> bytes:
    """Strips of whole values, uncompressed."""
    height, width, bands = array.shape
    rows = rows or height
    parts = [array[top : top + rows].tobytes() for top in range(0, height, rows)]
    entries: list[Entry] = [(256, 3, [width]), (257, 3, [height]), (258, 3, [bits] * bands), (259, 3, [1])]
    entries += [(262, 3, [photometric]), (277, 3, [bands]), (278, 3, [rows]), *options.pop("more", [])]
    return tiff(entries, parts, order=order, **options)


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """EXIF data with an orientation between two other tags."""
    entries: list[Entry] = [(271, 7, b"mpvg"), (274, kind, [orientation]), (305, 7, b"test")]
    return b"Exif\0\0" + tiff(entries, [b""], order=order)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def with_exif(picture: Pixels, kind: str, data: bytes) -> bytes:
    """A file of a picture, and EXIF data."""
    if kind == "png":
        return png_of(picture, chunk(b"eXIf", data.removeprefix(b"Exif\0\0")))
    if kind == "webp":
        return saved(Image.fromarray(picture), "WEBP", lossless=True, exif=data)
    plain = jpeg(picture)
    return plain[:2] + segment(0xE1, data) + plain[2:]


def turned(picture: Pixels, orientation: int) -> Pixels:
    """What a viewer shows, by the table of the EXIF standard: which sides the first row and column are on."""
    first_row, first_column = [
        ("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"),
        ("left", "top"), ("right", "top"), ("right", "bottom"), ("left", "bottom"),
    ][orientation - 1]  # fmt: skip
    if first_row in ("left", "right"):
        picture = picture.transpose(1, 0, 2)
    if "bottom" in (first_row, first_column):
        picture = picture[::-1]
    return picture[:, ::-1] if "right" in (first_row, first_column) else picture


# ---- generators: a seed gives a case


def truncated(seed: int, rng: np.random.Generator) -> Case:
    picture = smooth(rng)
    kinds = [png_of(picture), jpeg(picture), jpeg(picture, progressive=True)]
    kinds += [saved(Image.fromarray(picture), kind) for kind in ("BMP", "PPM", "TIFF")]
    kinds += [saved(Image.fromarray(picture), "WEBP", lossless=True), tiff_of(picture, 2, bits=8, rows=5)]
    data = kinds[seed % len(kinds)]
    return Case(data[: int(rng.integers(1, len(data)))], picture, 5, may_fail=True)


def flipped_bits(seed: int, rng: np.random.Generator) -> Case:
    """In a PNG: its checksums tell."""
    picture = noise(rng)
    data = bytearray(png_of(picture, chunk(b"tEXt", b"Comment\0none")))
    for place in rng.integers(0, len(data), 1 + seed % 3):
        data[place] ^= 1 << int(rng.integers(8))
    return Case(bytes(data), picture, may_fail=True)


def chunk_renamed(seed: int, rng: np.random.Generator) -> Case:
    """One flipped bit makes a critical chunk look like one that may be passed over."""
    levels = rng.integers(0, 4, (8, 8), dtype=np.uint8)
    palette = rng.integers(0, 256, (4, 3), dtype=np.uint8)
    data = png(8, 8, 8, 3, rows_of(levels), before=chunk(b"PLTE", palette.tobytes()))
    name = (b"PLTE", b"IDAT", b"IHDR", b"IEND")[seed % 4]
    return Case(data.replace(name, name[:1].lower() + name[1:]), palette[levels], may_fail=True)


def wrong_extension(seed: int, rng: np.random.Generator) -> Case:
    picture = smooth(rng)
    kind = ("PNG", "BMP", "TIFF", "PPM", "JPEG")[seed % 5]
    data = jpeg(picture) if kind == "JPEG" else saved(Image.fromarray(picture), kind)
    return Case(data, picture, 5 if kind == "JPEG" else 0, suffix=(".jpg", ".gif", ".txt", "", ".tif")[seed // 2])


def no_image(seed: int, rng: np.random.Generator) -> Case:
    texts = [b"not an image", b"<!DOCTYPE html><html><body>404</body></html>", b"PK\x03\x04" + bytes(60)]
    texts += [b"%PDF-1.7\n%\xe2\xe3\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
    texts += [b"\x7fELF" + bytes(60), rng.bytes(500), b"#!/bin/sh\ntouch executed\n", b"version https://git-lfs"]
    return Case(texts[seed], suffix=(".png", ".jpg", ".jpeg", ".bmp", ".tif")[seed % 5])


def only_a_beginning(seed: int, rng: np.random.Generator) -> Case:
    starts = [b"", b"\0", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*\0\0\0\x08"]
    return Case([*starts, b"P5\n", b"RIFF\x10\0\0\0WEBPVP8L"][seed])


def huge_header(seed: int, rng: np.random.Generator) -> Case:
    side = int(rng.integers(20_000, 65_000))
    sides = struct.pack("<HH", side, side)
    scan = segment(0xC0, struct.pack(">BHHB", 8, side, side, 3) + b"\1\x11\0\2\x11\0\3\x11\0")
    size: list[Entry] = [(256, 4, [side]), (257, 4, [side]), (258, 3, [8]), (259, 3, [1]), (262, 3, [1])]
    vp8l = struct.pack("<I", 16383 | 16383 << 14)
    files = [
        png(side, side, 8, 2, bytes(100)),
        b"GIF89a" + sides + b"\0\0\0,\0\0\0\0" + sides + b"\0\2\2D\1\0;",
        b"BM" + struct.pack("<IHHI", 10**6, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, *[0] * 6),
        b"P6 %d %d 255\n" % (side, side) + bytes(100),
        b"P2 %d %d 255\n" % (side, side) + b"1 " * 50,
        tiff([*size, (277, 3, [1]), (278, 4, [side])], [bytes(100)]),
        tiff([*size, (277, 3, [1]), (278, 4, [1])], [b"\0\0"] * 1000),
        b"\xff\xd8" + scan + segment(0xDA, b"\1\1\0\0\x3f\0") + bytes(100) + b"\xff\xd9",
        b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f" + vp8l + bytes(15),
        tiff([*size, (277, 3, [1]), (278, 4, [side])], [bytes(100)], big=True, order=">"),
    ]
    return Case(files[seed])


def bomb(seed: int, rng: np.random.Generator) -> Case:
    """Small files that hold, claim or repeat very much; where the picture itself is small, it is read."""
    picture = noise(rng)
    small: list[Entry] = [(256, 3, [8]), (257, 3, [8]), (258, 3, [8]), (262, 3, [1]), (277, 3, [1])]
    wide: list[Entry] = [(256, 3, [20_000]), (257, 3, [20_000]), (258, 3, [1]), (259, 3, [8]), (262, 3, [1])]
    files: list[Callable[[], bytes]] = [
        lambda: png(20_000, 20_000, 1, 0, bytes(20_000 * 2501)),
        lambda: tiff([*wide, (277, 3, [1]), (278, 3, [20_000])], [zlib.compress(bytes(20_000 * 2500))]),
        lambda: tiff([*small, (259, 3, [8]), (322, 4, [60_000]), (323, 4, [60_000])], [zlib.compress(bytes(10**6))]),
        lambda: tiff([*small, (259, 3, [1]), (322, 3, [1]), (323, 3, [1])], [b"\0"] * 140_000, tiled=True),
        tags_that_share_their_values,
        many_scans,
        lambda: b"P1 20000 20000\n" + b"0" * 1000,
        lambda: png_of(picture, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8)))),
        lambda: png_of(picture, chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(10**8)))),
        lambda: with_comment(gray(picture[..., 0]), 8_000_000),
    ]
    return Case(files[seed](), None if seed < 7 else gray(picture[..., 0]) if seed == 9 else picture)


def tags_that_share_their_values() -> bytes:
    """60 kB that are the value of each of 4000 tags."""
    block = b"x" * 60_000
    tags = b"".join(struct.pack("<HHII", 40_000 + number, 7, len(block), 8) for number in range(4000))
    return b"II*\0" + struct.pack("<I", 8 + len(block)) + block + struct.pack("<H", 4000) + tags + bytes(4)


def many_scans() -> bytes:
    """A progressive JPEG that passes over its 16 million pixels 400 times."""
    frame = segment(0xC2, struct.pack(">BHHB", 8, 4000, 4000, 1) + b"\1\x11\0")
    codes = segment(0xC4, b"\0\1" + bytes(16)) + segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    scans = segment(0xDA, b"\1\1\0\0\0\0") + bytes(4) + (segment(0xDA, b"\1\1\0\1\x3f\0") + bytes(4)) * 400
    return b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64)) + frame + codes + scans + b"\xff\xd9"


def with_comment(picture: Pixels, length: int) -> bytes:
    """A gray GIF with a comment."""
    data = saved(Image.fromarray(picture[..., 0]), "GIF")
    start = 13 + 3 * (2 << (data[10] & 7))
    return data[:start] + b"!\xfe" + (b"\xff" + b"a" * 255) * (length // 255) + b"\0" + data[start:]


def sparse(seed: int, rng: np.random.Generator) -> Case:
    """Files whose end is far beyond what was written."""
    picture = smooth(rng)
    data = [jpeg(picture), png_of(picture), tiff_of(picture, 2, bits=8), saved(Image.fromarray(picture), "BMP")]
    return Case(data[seed % 4], suffix=(".jpg", ".png", ".tif", ".bmp")[seed % 4], size=(1 + seed) * 2**30)


def sixteen_bits(seed: int, rng: np.random.Generator) -> Case:
    """Gray of 9 to 16 bits: the range becomes 0 to 255."""
    values = rng.integers(0, 65_536, (9, 14), dtype=np.uint16)
    values[0, :3] = 0, 255, 65_535
    right = gray(np.rint(values.astype(np.float64) / 257))
    little, large = values.astype("<u2")[..., None], values.astype(">u2")
    image = Image.fromarray(values)
    low = values >> 4
    pairs = low.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1)
    twelve: list[Entry] = [(256, 3, [14]), (257, 3, [9]), (258, 3, [12]), (259, 3, [1]), (262, 3, [1])]
    files = [
        png(14, 9, 16, 0, rows_of(large)),
        tiff_of(little, 1, bits=16),
        tiff_of(large[..., None], 1, bits=16, order=">", rows=2),
        tiff_of(little, 0, bits=16, rows=4),
        saved(image, "TIFF", compression="tiff_lzw"),
        saved(image, "TIFF", compression="tiff_adobe_deflate"),
        b"P5\n14 9\n65535\n" + large.tobytes(),
        b"P2 # plain\n14 9 65535\n" + " ".join(map(str, values.flatten())).encode(),
        tiff([*twelve, (277, 3, [1]), (278, 3, [9])], [packed.astype(np.uint8).tobytes()]),
        png(14, 9, 16, 0, rows_of(large), before=chunk(b"tRNS", b"\0\0") + chunk(b"gAMA", struct.pack(">I", 45_455))),
    ]
    inverted, in_twelve = seed == 3, np.rint(low * 255.0 / 4095)
    return Case(files[seed], 255 - right if inverted else gray(in_twelve) if seed == 8 else right)


def unknown_range(seed: int, rng: np.random.Generator) -> Case:
    """Values that cannot be scaled without being told their range."""
    floats = rng.random((9, 13), np.float32)
    whole = rng.integers(0, 2**31, (9, 13), dtype=np.int32)
    signed: list[Entry] = [(339, 3, [2])]
    files = [
        saved(Image.fromarray(floats), "TIFF"),
        saved(Image.fromarray(floats * 255), "TIFF"),
        saved(Image.fromarray(floats), "TIFF", compression="tiff_lzw"),
        saved(Image.fromarray(whole), "TIFF"),
        saved(Image.fromarray(whole % 256), "TIFF"),
        tiff_of(whole.astype("<i2")[..., None], 1, bits=16, more=signed),
        tiff_of(whole.astype(">i2")[..., None], 1, bits=16, more=signed, order=">"),
        b"Pf\n13 9\n-1.0\n" + floats.tobytes(),
        saved(Image.fromarray(whole % 65_536), "TIFF"),
        tiff_of(floats.astype(">f4")[..., None], 1, bits=32, more=[(339, 3, [3])], order=">"),
    ]
    return Case(files[seed])


HARMFUL = (
    truncated,
    flipped_bits,
    chunk_renamed,
    wrong_extension,
    no_image,
    only_a_beginning,
    huge_header,
    bomb,
    sparse,
)
RANGES = (sixteen_bits, unknown_range)
