"""Valid images of uncommon kinds, with the pictures that they show; the writers are in `hostile`."""

import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from hostile import (
    Case,
    Entry,
    chunk,
    exif,
    gray,
    jpeg,
    noise,
    png,
    png_of,
    rows_of,
    saved,
    segment,
    smooth,
    tiff,
    tiff_of,
    turned,
    with_exif,
)


def transparent(seed: int, rng: np.random.Generator) -> Case:
    """The color below the transparency counts, as for torchvision."""
    picture, alpha = noise(rng), rng.integers(0, 256, (9, 13, 1), dtype=np.uint8)
    levels, palette = rng.integers(0, 16, (9, 13), dtype=np.uint8), noise(rng, 1, 16)[0]
    indexed = Image.fromarray(levels, "P") if seed == 9 else Image.fromarray(levels)
    colors = chunk(b"PLTE", palette.tobytes())
    if seed == 9:
        indexed.putpalette(palette.tobytes())
    wide = np.concatenate([picture, alpha], -1).astype(">u2") * 257
    files = [
        (png(13, 9, 8, 6, rows_of(np.concatenate([picture, alpha], -1))), picture),
        (png(13, 9, 8, 4, rows_of(np.concatenate([picture[..., :1], alpha], -1))), gray(picture[..., 0])),
        (png(13, 9, 8, 3, rows_of(levels), before=colors + chunk(b"tRNS", bytes(range(16)))), palette[levels]),
        (png(13, 9, 8, 3, rows_of(levels), before=colors + chunk(b"tRNS", b"\xff\0")), palette[levels]),
        (png(13, 9, 8, 2, rows_of(picture), before=chunk(b"tRNS", bytes(6))), picture),
        (png(13, 9, 8, 0, rows_of(levels), before=chunk(b"tRNS", bytes(2))), gray(levels)),
        (png(13, 9, 16, 6, rows_of(wide)), picture),
        (png(13, 9, 16, 4, rows_of(wide[..., 2:])), gray(picture[..., 2])),
        (tiff_of(np.concatenate([picture, alpha], -1), 2, bits=8, more=[(338, 3, [2])]), picture),
        (saved(indexed, "GIF", transparency=3) if seed == 9 else b"", palette[levels]),
    ]
    return Case(*files[seed])


def print_colors(seed: int, rng: np.random.Generator) -> Case:
    """CMYK: a JPEG of Adobe's holds it inverted; as light is taken away from white."""
    ink = np.concatenate([smooth(rng), smooth(rng)[..., :1] // 2], -1)
    share = 1 - ink.astype(float) / 255
    right = np.rint(255 * share[..., :3] * share[..., 3:]).astype(np.uint8)
    image = Image.fromarray(ink, "CMYK")
    if seed % 2:
        return Case(tiff_of(ink, 5, bits=8, rows=seed, order="<>"[seed % 4 // 2]), right, 1)
    return Case(saved(image, "JPEG", quality=100, subsampling=0, progressive=seed > 4), right, 5)


def other_colors(seed: int, rng: np.random.Generator) -> Case:
    """Bits, few levels, YCbCr and L*a*b*."""
    bits = rng.integers(0, 2, (8, 16), dtype=np.uint8)
    few = rng.integers(0, 1 << (2 << seed % 2), (8, 16), dtype=np.uint8)
    depth = 2 << seed % 2
    packed = np.packbits(np.unpackbits(few[..., None], axis=-1)[..., -depth:].reshape(8, -1), axis=-1)
    stretched = gray(few * (255 // (2**depth - 1)))
    lightness = rng.integers(0, 256, (9, 13, 1), dtype=np.uint8)
    neutral = np.concatenate([lightness, np.zeros((9, 13, 2), np.uint8)], -1)
    star = lightness[..., 0] * (100 / 255)
    linear = np.where(star > 8, ((star + 16) / 116) ** 3, star / 903.3)
    gamma = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    luma = np.concatenate([lightness, np.full((9, 13, 2), 128, np.uint8)], -1)
    rows = np.packbits(bits, axis=-1)
    form: list[Entry] = [(256, 3, [16]), (257, 3, [8]), (259, 3, [1]), (277, 3, [1]), (278, 3, [8])]
    files = [
        (png(16, 8, 1, 0, rows_of(rows)), gray(bits * 255)),
        (png(16, 8, depth, 0, rows_of(packed)), stretched),
        (tiff([*form, (258, 3, [depth]), (262, 3, [1])], [packed.tobytes()]), stretched),
        (tiff([*form, (258, 3, [depth]), (262, 3, [0])], [packed.tobytes()]), 255 - stretched),
        (tiff([*form, (258, 3, [1]), (262, 3, [1])], [rows.tobytes()]), gray(bits * 255)),
        (tiff([*form, (258, 3, [1]), (262, 3, [0])], [rows.tobytes()]), gray(255 - bits * 255)),
        (b"P4 16 8\n" + rows.tobytes(), gray(255 - bits * 255)),
        (b"P1 16 8\n" + " ".join(map(str, bits.flatten())).encode(), gray(255 - bits * 255)),
        (tiff_of(luma, 6, bits=8, more=[(530, 3, [1, 1])]), None),  # PIL takes it for four colors
        (tiff_of(neutral, 8, bits=8), gray(np.rint(255 * gamma))),
    ]
    return Case(*files[seed], tolerance=2 if seed == 9 else 0)


def large_metadata(seed: int, rng: np.random.Generator) -> Case:
    """Profiles and texts of 3 MB in good pictures."""
    picture, body = smooth(rng), rng.bytes(3_000_000)
    parts = [body[start : start + 65_000] for start in range(0, len(body), 65_000)]
    marker = [b"ICC_PROFILE\0" + bytes([number + 1, len(parts)]) + part for number, part in enumerate(parts)]
    profile = b"".join(segment(0xE2, part) for part in marker)
    plain, image = jpeg(picture), Image.fromarray(picture)
    files = [
        png_of(picture, chunk(b"iCCP", b"profile\0\0" + zlib.compress(body, 0))),
        plain[:2] + profile + plain[2:],
        saved(image, "WEBP", lossless=True, icc_profile=body),
        saved(image, "TIFF", icc_profile=body),
        png_of(picture, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(body, 0))),
        png_of(picture, chunk(b"tEXt", b"Comment\0" + body)),
        png_of(picture, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(body, 0)) * 30),
        plain[:2] + b"".join(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + part) for part in parts) + plain[2:],
        plain[:2] + b"".join(segment(0xFE, part) for part in parts) + plain[2:],
        png_of(picture, chunk(b"iCCP", b"profile\0\0" + body)),
    ]
    return Case(files[seed], picture, 5 if seed in (1, 7, 8) else 0)


def orientation(seed: int, rng: np.random.Generator) -> Case:
    """All eight, in three formats, of either byte order and of two types of numbers."""
    turn, kind = 1 + seed % 8, ("jpeg", "png", "webp")[int(rng.integers(3))]
    data = exif(turn, "<>"[seed % 2], (3, 4)[seed // 2 % 2])
    picture = smooth(rng)
    return Case(with_exif(picture, kind, data), turned(picture, turn), 5 if kind == "jpeg" else 0)


def damaged_exif(seed: int, rng: np.random.Generator) -> Case:
    """The picture is good and stays as it is stored."""
    good = exif(6)
    broken = [
        good[: int(rng.integers(6, 20))],
        b"Exif\0\0" + rng.bytes(80),
        exif(0),
        exif(9),
        exif(60_000),
        good.replace(b"II*\0", b"II\0*"),
        good[:10] + struct.pack("<I", 2**31) + good[14:],
        b"Exif\0\0II*\0" + struct.pack("<IH", 8, 65_535) + b"\xff" * 2000,
        b"Exif\0\0",
        good.replace(struct.pack("<HHI", 274, 3, 1), struct.pack("<HHI", 274, 3, 2**32 - 1)),
    ]
    picture, kind = smooth(rng), ("jpeg", "png", "webp")[seed % 3]
    return Case(with_exif(picture, kind, broken[seed]), picture, 5 if kind == "jpeg" else 0)


def extreme_shape(seed: int, rng: np.random.Generator) -> Case:
    """Up to a thousand times as long as wide."""
    shapes = [
        (1, 1),
        (1, 1000),
        (1000, 1),
        (2, 2000),
        (3000, 3),
        (1, 1001),
        (1001, 1),
        (2, 3000),
        (60_000, 1),
        (1, 9999),
    ]
    picture = noise(rng, *shapes[seed])
    return Case(png_of(picture), picture if seed < 5 else None)


def any_maximum(seed: int, rng: np.random.Generator) -> Case:
    """PGM and PPM name the value that is white."""
    maximum = (1, 15, 100, 254, 255, 256, 1023, 4095, 40_000, 65_535)[seed]
    bands = int(rng.integers(2)) * 2 + 1
    values = rng.integers(0, maximum + 1, (7, 5, bands))
    right = np.rint(values * 255.0 / maximum)
    head = b"%s\n# made by hand\n5 7\n%d\n"
    if rng.integers(2):
        data = head % (b"P2" if bands == 1 else b"P3", maximum) + " ".join(map(str, values.flatten())).encode()
    else:
        stored = values.astype(">u2" if maximum > 255 else "u1")
        data = head % (b"P5" if bands == 1 else b"P6", maximum) + stored.tobytes()
    # A half that PIL rounds on the way is rounded twice.
    return Case(data, gray(right[..., 0]) if bands == 1 else right.astype(np.uint8), 1 if maximum < 255 else 0)


def animated(seed: int, rng: np.random.Generator) -> Case:
    """The first image counts."""
    frames = [noise(rng) for _ in range(3)]
    images = [Image.fromarray(frame) for frame in frames]
    kind = ("GIF", "PNG", "WEBP", "TIFF", "MPO")[seed % 5]
    if kind == "GIF":
        frames = [gray(frame[..., 0]) for frame in frames]
        images = [Image.fromarray(frame[..., 0]) for frame in frames]
    if kind == "MPO":
        frames = [smooth(rng) for _ in range(2)]
        images = [Image.fromarray(frame) for frame in frames]
    known: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "MPO": {"quality": 100, "subsampling": 0},
        "TIFF": {},
    }
    options = known.get(kind, {"loop": 0})
    data = saved(images[0], kind, save_all=True, append_images=images[1:], **options)
    return Case(data, frames[0], 5 if kind == "MPO" else 0)


def interlaced(seed: int, rng: np.random.Generator) -> Case:
    """Adam7, interlaced GIF and progressive JPEG."""
    picture = smooth(rng, 11 + seed, 17)
    if seed % 3 == 0:
        passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
        rows = b"".join(rows_of(picture[top::down, left::right]) for top, left, down, right in passes)
        return Case(png(17, 11 + seed, 8, 2, rows, interlace=1), picture)
    if seed % 3 == 1:
        levels = gray(picture[..., 0])
        return Case(saved(Image.fromarray(levels[..., 0]), "GIF", interlace=1), levels)
    return Case(jpeg(picture, progressive=True), picture, 5)


def bitmap(seed: int, rng: np.random.Generator) -> Case:
    """BMP of all depths, from the bottom or the top, plain and packed in runs."""
    depth = (1, 4, 8, 16, 24, 32, 8, 4, 24, 32)[seed]
    height, width, down = 6, 8, seed % 2 == 1 and seed != 7
    picture = noise(rng, height, width)
    palette = noise(rng, 1, 2 ** min(depth, 8))[0]
    levels = rng.integers(0, len(palette), (height, width), dtype=np.uint8)
    if depth <= 8:
        picture = palette[levels]
        rows = np.packbits(np.unpackbits(levels[..., None], axis=-1)[..., -depth:].reshape(height, -1), axis=-1)
        if seed in (6, 7):  # runs of one pixel, each with its value in both halves, and the end of each line
            twice = 1 if depth == 8 else 17
            body = b"".join(b"".join(bytes([1, int(level) * twice]) for level in row) + b"\0\0" for row in levels[::-1])
        else:
            body = b"".join(row.tobytes().ljust(-(-len(row) // 4) * 4, b"\0") for row in rows[:: 1 if down else -1])
    elif depth == 16:
        five = picture >> 3
        picture = np.rint(five * (255 / 31)).astype(np.uint8)
        words = (five[..., 0].astype("<u2") << 10) | (five[..., 1].astype("<u2") << 5) | five[..., 2]
        body = words[:: 1 if down else -1].tobytes()
    else:
        stored = picture[..., ::-1]
        if depth == 32:
            stored = np.concatenate([stored, np.zeros((height, width, 1), np.uint8)], -1)
        body = stored[:: 1 if down else -1].tobytes()
    packed = {6: 1, 7: 2}.get(seed, 0)
    colors = b"".join(bytes([*color[::-1], 0]) for color in palette) if depth <= 8 else b""
    info = struct.pack("<IiiHHIIiiII", 40, width, -height if down else height, 1, depth, packed, len(body), 0, 0, 0, 0)
    start = 54 + len(colors)
    return Case(b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + colors + body, picture, 1)


def layouts(seed: int, rng: np.random.Generator) -> Case:
    """TIFF in tiles, strips, planes, with either byte order, large offsets, and compressed."""
    picture = noise(rng, 32, 48)
    size: list[Entry] = [(256, 3, [48]), (257, 3, [32]), (258, 3, [8, 8, 8]), (262, 3, [2]), (277, 3, [3])]
    tiles = [picture[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16, 32)]
    planes = [np.ascontiguousarray(picture[..., band]).tobytes() for band in range(3)]
    tiled: list[Entry] = [*size, (322, 3, [16]), (323, 3, [16])]
    image = Image.fromarray(picture)
    files = [
        tiff([*tiled, (259, 3, [1])], tiles, tiled=True),
        tiff([*tiled, (259, 3, [8])], [zlib.compress(tile) for tile in tiles], tiled=True, order=">"),
        tiff([*size, (259, 3, [1]), (278, 3, [32]), (284, 3, [2])], planes),
        tiff_of(picture, 2, bits=8, rows=1),
        tiff_of(picture, 2, bits=8, rows=7, order=">"),
        tiff_of(picture, 2, bits=8, rows=32, big=True),
        tiff_of(picture, 2, bits=8, rows=31, big=True),
        saved(image, "TIFF", compression="tiff_lzw"),
        saved(image, "TIFF", compression="packbits"),
        tiff_of(picture.astype("<u2") * 257, 2, bits=16, rows=3),
    ]
    return Case(files[seed], picture)


ODD = (
    transparent,
    print_colors,
    other_colors,
    large_metadata,
    orientation,
    damaged_exif,
    extreme_shape,
    any_maximum,
    animated,
    interlaced,
    bitmap,
    layouts,
)
