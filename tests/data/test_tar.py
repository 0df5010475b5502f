"""The reader of tar headers: the members that `tarfile` finds, and no damage that is taken for an end."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpvg.data.archives import list_archives
from mpvg.data.tar import read_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.DIRTYPE: "folder",
    tarfile.FIFOTYPE: "special",
}


def write(path: Path, members: list[tuple[str, bytes, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    """Writes members of names, types and contents; contents of links are their targets."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, kind, content in members:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            if kind == tarfile.REGTYPE:
                entry.size = len(content)
            elif kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                entry.linkname = content.decode()
            archive.addfile(entry, io.BytesIO(content))
    return path.read_bytes()


PART = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60)
MEMBER = st.tuples(st.lists(PART, min_size=1, max_size=4).map("/".join), st.sampled_from([*KINDS]), st.binary())


@settings(max_examples=50)
@given(st.lists(MEMBER, max_size=5), st.sampled_from(["gnu", "pax"]))
def test_the_members_are_those_of_tarfile(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes, bytes]], format: str
) -> None:
    members = [(name, kind, b"a/b.png" if kind in b"12" else content) for name, kind, content in members]
    path = tmp_path_factory.mktemp("tar") / "some.tar"
    whole = write(path, members, FORMATS[format])
    with tarfile.open(path) as archive:
        expected = archive.getmembers()
    found = list(read_tar(path))
    assert [entry.name.rstrip("/") for entry in found] == [member.name for member in expected]
    assert [entry.kind for entry in found] == [KINDS[member.type] for member in expected]
    for entry, member, (_, _, content) in zip(found, expected, members, strict=True):
        if entry.kind == "file":
            assert whole[entry.offset : entry.offset + entry.size] == content
        assert entry.target == member.linkname


@given(st.data())
def test_whatever_is_in_the_file_it_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("tar") / "some.tar"
    members = [
        ("cat/0.png", tarfile.REGTYPE, b"x"),
        ("a" * 120, tarfile.REGTYPE, b"y"),
        ("l", tarfile.LNKTYPE, b"k" * 120),
    ]
    content = bytearray(write(path, members, data.draw(st.sampled_from([*FORMATS.values()][1:]))))
    for position, byte in data.draw(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=4)):
        content[position] = byte
    for start in range(0, 4096, 512) if data.draw(st.booleans()) else ():  # with checksums that are right
        block = content[start : start + 512]
        total = sum(block) - sum(block[148:156]) + 256
        content[start + 148 : start + 156] = b"%06o\0 " % total
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message, found = "", []
    try:
        found = list(read_tar(path))
    except ValueError as error:
        message = str(error)
    assert not message or "some.tar is damaged or not an uncompressed tar file" in message
    assert all(0 <= entry.offset + entry.size <= len(content) for entry in found if entry.kind == "file")


def test_names_that_are_split_in_two_are_joined(tmp_path: Path) -> None:
    name = "/".join(["folder" * 5] * 5) + "/0.png"
    write(tmp_path / "some.tar", [(name, tarfile.REGTYPE, b"x")], tarfile.USTAR_FORMAT)
    assert [entry.name for entry in read_tar(tmp_path / "some.tar")] == [name]


@pytest.mark.parametrize("format", FORMATS)
def test_every_cut_is_refused_until_the_two_blocks_of_zeros_are_there(format: str, tmp_path: Path) -> None:
    long = "long" * (20 if format == "ustar" else 40)
    members = [(f"cat/{long if n == 1 else ''}{n}.png", tarfile.REGTYPE, b"x" * 700) for n in range(3)]
    path = tmp_path / "some.tar"
    whole = write(path, members, FORMATS[format])
    *_, last = read_tar(path)
    end = last.offset + -(-last.size // 512) * 512 + 1024
    assert len(whole) > end
    for length in {*range(0, end, 97), *range(0, end, 512), *range(end - 600, end, 31), end - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"some\.tar is damaged or not an uncompressed tar file \(.*; make it again"
        ):
            list(read_tar(path))
    for length in (end, end + 1, end + 512, len(whole)):
        path.write_bytes(whole[:length])
        assert len(list(read_tar(path))) == 3


def test_every_damaged_byte_of_a_header_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "some.tar"
    whole = write(path, [(f"cat/{n}.png", tarfile.REGTYPE, b"x" * 100) for n in range(3)])
    for start in (0, 1024, 2048):
        for byte in {*range(0, 512, 7)} - {155}:  # which only fills up the field of the checksum
            damaged = bytearray(whole)
            damaged[start + byte] ^= 0x15
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="is damaged"):
                list(read_tar(path))
        damaged = bytearray(whole)
        damaged[start : start + 512] = bytes(512)  # a hole
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"something follows its end at byte {start}\)"):
            list(read_tar(path))


def test_a_second_archive_behind_the_first_is_not_overlooked(tmp_path: Path) -> None:
    path = tmp_path / "some.tar"
    path.write_bytes(2 * write(path, [("cat/0.png", tarfile.REGTYPE, b"x")]))
    with pytest.raises(ValueError, match="something follows its end"):
        list(read_tar(path))


def header(name: bytes, kind: bytes, size: int) -> bytes:
    entry = tarfile.TarInfo(name.decode())
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"x", b"L", 2**40), "claims a name of 1099511627776 bytes"),
        (header(b"x", b"0", 2**40), "it ends within x"),
        (header(b"x", b"x", 512) + b"9999999 path=a\n".ljust(512), "the records at byte 0 are not what was written"),
        (header(b"x", b"x", 12) + b"12 path=abc\n".ljust(512, b"\0"), "there is no header after the records"),
        (header(b"cat/0.png", b"S", 0), r"cat/0\.png is stored with holes"),
        (b"\x1f\x8b" + b"x" * 600, "number that cannot be"),
        (b"", "it ends at byte 0"),
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_read(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "some.tar").write_bytes(content + (bytes(1024) if content else b""))
    with pytest.raises(ValueError, match=message):
        list(read_tar(tmp_path / "some.tar"))


@pytest.mark.parametrize("name", ["cat/a\nb/../0.png", "cat/" + "a" * 4000 + "/../0.png"])
def test_a_name_is_one_short_line_in_a_message(name: str, tmp_path: Path) -> None:
    write(tmp_path / "train.tar", [(name, tarfile.REGTYPE, b"x")])
    with pytest.raises(ValueError, match=r"leads out of its folder") as refused:
        list_archives([tmp_path / "train.tar"], tmp_path, "train")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
