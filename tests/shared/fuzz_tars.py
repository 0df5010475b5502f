"""What is tried on tar files of images: headers of all kinds, links, records, long names, holes, and damaged bytes."""

import contextlib
import io
import tarfile
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from fuzz_values import TEXTS, Target, bounded, damaged, refuses_or_returns
from mpvg.data.archives import list_archives

BLOCK = 512


def _picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).save(file, "PNG")
    return file.getvalue()


PICTURE = _picture()
USUAL = st.sampled_from(
    ["cat/0.png", "dog/0.png", "./cat/1.png", "cat/a/b/3.jpg", "dog/x", "cat//4.png", "cat/.hid/5.png"]
)
ODD = st.sampled_from(
    [
        *("0.png", "0.cls", "cat/0.cls", "cat/", "cat", ".", "cat/../0.png", "/cat/0.png", "train/", "train/cat/0.png"),
        *("10²/0.png", "", "c" * 99 + "/6.png", "a/" * 500 + "0.png"),
    ]
)
MADE = st.tuples(
    st.sampled_from(["cat/", "dog/", "", "train/"]), TEXTS, st.sampled_from([".png", ".png", ".cls", "", "/"])
).map("".join)
NAMES = st.one_of(USUAL, USUAL, USUAL, USUAL, ODD, MADE)
CONTENTS = st.one_of(st.just(PICTURE), st.just(PICTURE), damaged(PICTURE), st.binary(max_size=20), st.just(b"7"))
FILE = st.sampled_from([b"0", b"0", b"0", b"\0", b"7"])
TYPES = st.integers(0, 7).flatmap(
    lambda n: (
        FILE
        if n > 1
        else st.sampled_from([b"1", b"2", b"3", b"5", b"S", b"D"])
        if n
        else st.binary(min_size=1, max_size=1)
    )
)
ODD_NUMBERS = st.sampled_from(
    [
        b"",
        b"-1",
        b"7" * 11,
        b"8",
        b" 12 \0",
        b"\x80" + bytes(10) + b"\x09",
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"1_0",
        b"0x1",
    ]
)
SIZES = st.integers(0, 15).flatmap(lambda n: st.none() if n else ODD_NUMBERS)


@dataclass(frozen=True)
class Member:
    """A header and what follows it."""

    name: str
    kind: bytes
    content: bytes
    target: str = ""
    size: bytes | None = None
    """What the header says of it; None: what it is."""
    magic: bytes = b"ustar\x0000"
    prefix: bytes = b""
    right_sum: bool = True

    def encoded(self) -> bytes:
        """As in a tar file."""
        size = b"%011o\0" % len(self.content) if self.size is None else self.size
        header = bytearray(BLOCK)
        name, target = (text.encode("utf-8", "surrogatepass") for text in (self.name, self.target))
        parts = (0, name[:100]), (100, b"0000644\0"), (124, size[:12]), (136, b"00000000000\0"), (157, target[:100])
        for start, part in (*parts, (156, self.kind), (257, self.magic), (345, self.prefix)):
            header[start : start + len(part)] = part
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % (sum(header) + (not self.right_sum))
        return bytes(header) + self.content + bytes(-len(self.content) % BLOCK)


MEMBERS = st.builds(
    Member,
    name=NAMES,
    kind=TYPES,
    content=CONTENTS,
    target=NAMES,
    size=SIZES,
    magic=st.sampled_from([b"ustar\x0000", b"ustar  \0", bytes(8), b"ustar\x0000"]),
    prefix=st.sampled_from([b""] * 6 + [b"train", b"a/" * 77]),
    right_sum=st.sampled_from([True] * 19 + [False]),
)


def _record(pair: tuple[str, str]) -> bytes:
    """A pax record, whose length counts its own digits."""
    body = f" {pair[0]}={pair[1]}\n".encode("utf-8", "surrogatepass")
    length = len(body) + 1
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


PAIRS = st.tuples(
    st.sampled_from(
        [
            "path",
            "path",
            "linkpath",
            "size",
            "mtime",
            "GNU.sparse.major",
            "GNU.sparse.name",
            "hdrcharset",
            "SCHILY.xattr.a",
        ]
    ),
    st.one_of(NAMES, st.sampled_from(["0", "-1", "70", "9" * 30, "0" * 18, "1e3", "²", ""])),
)
RECORDS = st.lists(PAIRS.map(_record), max_size=3).map(b"".join)
EXTENSIONS = st.builds(
    Member,
    name=st.just("././@LongLink"),
    kind=st.sampled_from([b"x", b"x", b"x", b"g", b"X", b"L"]),
    content=st.one_of(
        *(RECORDS, RECORDS, RECORDS, RECORDS.flatmap(damaged)),
        st.sampled_from([b"a/" * 40_000, b"9" * 6 + b" a=b\n"]),
    ),
    size=SIZES,
)
LONG = st.builds(
    Member,
    name=st.just("././@LongLink"),
    kind=st.sampled_from([b"L", b"K"]),
    content=NAMES.map(lambda name: name.encode("utf-8", "surrogatepass") + b"\0"),
    size=SIZES,
)
ENDS = st.sampled_from(
    [bytes(2 * BLOCK)] * 12 + [b"", bytes(BLOCK), bytes(20 * BLOCK), bytes(2 * BLOCK) + b"x", bytes(700)]
)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """A tar file of a few members, sometimes with holes, cut off or damaged."""
    members = draw(st.lists(st.one_of(MEMBERS, MEMBERS, MEMBERS, LONG, EXTENSIONS), max_size=5))
    content = b"".join(member.encoded() for member in members) + draw(ENDS)
    change = draw(st.sampled_from(["none"] * 12 + ["cut", "damage", "compress"]))
    if change == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if change == "compress":
        return b"\x1f\x8b" + content
    return draw(damaged(content)) if change == "damage" else content


@st.composite
def written_by_tarfile(draw: st.DrawFn) -> bytes:
    """A tar file as Python writes it, in one of three formats."""
    file = io.BytesIO()
    format = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with contextlib.suppress(ValueError), tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name in draw(st.lists(NAMES.filter(bool), max_size=4)):
            entry = tarfile.TarInfo(name.replace("\ud800", "?"))
            entry.type, entry.linkname = draw(TYPES), draw(NAMES).replace("\ud800", "?")
            content = draw(CONTENTS)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def read(example: tuple[bytes, bytes | None]) -> None:
    """Lists a tar file, and reads the images in it: each has the bytes that its header says."""
    content, numbers = example
    with tempfile.TemporaryDirectory(prefix="mpvg-fuzz-") as folder, bounded():
        path = Path(folder) / "train.tar"
        path.write_bytes(content)
        if numbers is not None:
            (Path(folder) / "classes.txt").write_bytes(numbers)
        with contextlib.redirect_stderr(io.StringIO()):
            found: Any = refuses_or_returns(partial(list_archives, [path], Path(folder), "train"))
        for index in range(len(found.files) if found is not None else 0):
            assert found.titles[found.labels[index]]
            opened = refuses_or_returns(partial(found.files.open, index))
            if opened is not None:
                assert len(opened.read()) == found.sizes[index]


def tar_files() -> dict[str, Target]:
    """A training set in one tar file, which may have a classes.txt beside it."""
    names = st.one_of(st.none(), st.none(), damaged(b"cat\ndog\n" * 4), st.binary(max_size=9))
    return {"train.tar": Target(st.tuples(st.one_of(archives(), archives(), written_by_tarfile()), names), read)}
