"""A strict reader of the headers of tar files.

Python's `tarfile` takes a damaged header for the end of the file, and needs four times as long: a million members must
be listed in seconds. Here every block is accounted for, from the first header to the two zero blocks at the end.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpvg.files import open_regular
from mpvg.validation import named

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTENSION = 2**16  # bytes of a long name or of the records before a header
_MAX_PADDING = 2**24  # bytes of zeros at the end; record sizes are up to 1 MiB in practice
_FILE_TYPES = b"0\0" + b"7"
_KINDS = {b"1": "hard link", b"2": "symbolic link", b"5": "folder", b"D": "folder"}


class TarEntry(NamedTuple):
    """A member of a tar file."""

    name: str
    """As it is written, in UTF-8."""
    kind: str
    """"file", "hard link", "symbolic link", "folder" or "special"."""
    offset: int
    """Of its bytes in the tar file."""
    size: int
    """In bytes."""
    target: str
    """What a link leads to."""


class _Damaged(Exception):
    """What is wrong with a tar file."""


def read_tar(path: str | Path) -> Iterator[TarEntry]:
    """The members of an uncompressed tar file in their order (ustar, GNU or pax format).

    Raises:
        ValueError: it is damaged, cut off or in another format, or no regular file.
    """
    with open_regular(str(path)) as file:
        try:
            yield from _entries(file.fileno(), os.fstat(file.fileno()).st_size)
        except _Damaged as error:
            raise ValueError(f"{path} is damaged or not an uncompressed tar file ({error}); make it again") from error


def _entries(file: int, length: int) -> Iterator[TarEntry]:
    position = 0
    everywhere: dict[str, str] = {}
    extension: dict[str, str] = {}
    while (block := os.pread(file, BLOCK, position)) != _ZEROS:
        kind, size = _check_header(block, position)
        start = position + BLOCK
        if kind in b"LKxXg":
            content = _read_extension(file, start, size, position)
            if kind in b"LK":
                extension["path" if kind == b"L" else "linkpath"] = _text(content)
            else:
                (everywhere if kind == b"g" else extension).update(_records(content, position))
        else:
            entry = _entry(block, kind, start, size, everywhere | extension, position)
            extension = {}
            size = entry.size
            yield entry
        has_data = kind not in b"123456"
        position = start + (-(-size // BLOCK) * BLOCK if has_data else 0)
        if position > length:
            raise _Damaged(f"it ends within {named(_name(block))}")
    if extension:
        raise _Damaged(f"there is no header after the records before byte {position}")
    _check_end(file, position, length)


def _check_header(block: bytes, position: int) -> tuple[bytes, int]:
    """Type and size in a header whose checksum is right."""
    if len(block) < BLOCK:
        raise _Damaged(f"it ends at byte {position + len(block)}, without the two blocks of zeros")
    written, total = _number(block[148:156], position), sum(block) - sum(block[148:156]) + 256
    # Some writers of old summed signed bytes.
    if written != total and written != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise _Damaged(f"the header at byte {position} is not what was written")
    return block[156:157], _number(block[124:136], position)


def _number(field: bytes, position: int) -> int:
    """A number of a header: octal digits, or in base 256 where it is large."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        try:
            value = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
        except ValueError:
            value = -1
    if not 0 <= value < 2**62:
        raise _Damaged(f"the header at byte {position} has a number that cannot be")
    return value


def _entry(block: bytes, kind: bytes, start: int, size: int, records: dict[str, str], position: int) -> TarEntry:
    """The member of a header, of which pax records and long names override parts."""
    name = records.get("path", _name(block))
    if "size" in records:
        text = records["size"]
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise _Damaged(f"{named(name)} has the size {text[:20]!r}")
        size = int(text)
    if kind == b"S" or any(key.startswith("GNU.sparse.") for key in records):
        raise _Damaged(f"{named(name)} is stored with holes, as by `tar --sparse`")
    # In the oldest format folders have no type of their own.
    stored = "folder" if name.endswith("/") else "file"
    return TarEntry(
        name,
        stored if kind in _FILE_TYPES else _KINDS.get(kind, "special"),
        start,
        size,
        records.get("linkpath", _text(block[157:257])),
    )


def _name(block: bytes) -> str:
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(block[:100])}" if prefix else _text(block[:100])


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _read_extension(file: int, start: int, size: int, position: int) -> bytes:
    if size > _MAX_EXTENSION:
        raise _Damaged(f"the header at byte {position} claims a name of {size} bytes")
    return os.pread(file, size, start)


def _records(content: bytes, position: int) -> dict[str, str]:
    """The pax records, lines of `<length> <key>=<value>`."""
    records = {}
    while content:
        number, _, _ = content.partition(b" ")
        length = int(number) if number.isdigit() and len(number) < 6 else 0
        record, content = content[:length], content[length:]
        key, equals, value = record[len(number) + 1 :].partition(b"=")
        if len(record) != length or not equals or not value.endswith(b"\n"):
            raise _Damaged(f"the records at byte {position} are not what was written")
        records[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
    return records


def _check_end(file: int, position: int, length: int) -> None:
    """The two blocks of zeros are the end of the file; zeros that fill up its last record may follow."""
    left = length - position
    if left < 2 * BLOCK:
        raise _Damaged("it ends without the two blocks of zeros")
    if left > _MAX_PADDING or os.pread(file, left, position).strip(b"\0"):
        raise _Damaged(f"something follows its end at byte {position}")
