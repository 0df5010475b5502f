"""Large JSON, record by record: as json reads it, or refused before much of it is read."""

import io
import json
from typing import Any, BinaryIO

import pytest

from mpvg.data import records
from mpvg.data.records import MAX_RECORD, read_records

VALUES: dict[str, Any] = {
    "info": {"text": 'a "quoted" {[ , ]} é 猫 \\', "numbers": [1, -2.5e3, True, None]},
    "images": [{"id": number, "name": "x" * number, "deep": [[{}]]} for number in range(30)],
    "year": 2017,
    "annotations": [{"values": [0.25] * 40}, {}],
    "empty": [],
}


def read(content: bytes | BinaryIO, *lists: str) -> list[tuple[str, Any]]:
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    return list(read_records(file, lists or ("images", "annotations")))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 100_000])
@pytest.mark.parametrize("indent", [None, 1])
def test_records_are_those_of_json(monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    for ascii in (True, False):
        content = json.dumps(VALUES, indent=indent, ensure_ascii=ascii).encode()
        expected = [(key, record) for key in ("images", "annotations") for record in VALUES[key]]
        assert read(content) == expected
        assert read(b"\xef\xbb\xbf" + content + b"\r\n ") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"does not begin with \{; it ends there"),
        (b"[1, 2]", r"does not begin with \{"),
        (b"\x89PNG", "not in UTF-8"),
        (b"\0" * 100, r"does not begin with \{"),
        (b'{"a": 1}', "has no annotations and no images"),
        (b'{"images": {}}', "'images' is no list"),
        (b'{"images": [1]}', "number 1 of 'images' is a int, not an object"),
        (b'{"images": [{} {}]}', "no comma follows number 1 of 'images'"),
        (b'{"images": [{},]}', "number 2 of 'images' is no valid JSON"),
        (b'{"images": [{"a": NaN}]}', "NaN is no number"),
        (b'{"images": [{"a": 1}', "no comma follows number 1 of 'images'; it ends there"),
        (b'{"images": [{"a": ', "number 1 of 'images' is no valid JSON"),
        (b'{"images": [], "annotations": []} {}', "text follows its end"),
        (b'{"images": [], "annotations": []', "no comma follows the value of 'annotations'; it ends there"),
        (b'{"images" []}', "no colon"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"images": [{"a": ' + b"9" * 5000 + b"}]}", "is not valid"),
    ],
)
def test_anything_else_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(content)


class Endless(io.RawIOBase):
    """A file of two gigabytes that repeats its text."""

    def __init__(self, start: bytes, repeated: bytes) -> None:
        self.taken, self._start, self._repeated = 0, start, repeated

    def read(self, size: int = -1) -> bytes:
        piece = self._start if not self.taken else self._repeated * (size // len(self._repeated))
        self.taken += len(piece)
        assert self.taken < 2**31, "it was read to its end"
        return piece


@pytest.mark.parametrize(
    ("start", "repeated"),
    [
        (b'{"data": [', b"1, "),
        (b'{"data": "', b"x"),
        (b'{"images": [{"id": 1, "name": "', b"x"),
        (b'{"images": [{"id": [', b"[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], "),
    ],
)
def test_two_gigabytes_of_something_else_are_refused_early(start: bytes, repeated: bytes) -> None:
    file = Endless(start, repeated)
    with pytest.raises(ValueError, match=f"longer than {MAX_RECORD:,} characters"):
        read(file)
    assert file.taken < 3 * MAX_RECORD
