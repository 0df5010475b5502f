"""The records of a large untrusted JSON file, one after another: only a piece of its text is in memory."""

import codecs
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, NoReturn

CHUNK = 2**20
"""Bytes that are read at a time; of a record that goes on, as many as there are already."""
MAX_RECORD = 2**22
"""Characters of a record; a longer one is refused. COCO's have up to some ten thousand."""
_SPACE = re.compile(r"[ \t\n\r]*")


def read_records(file: BinaryIO, lists: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads the records, which are objects, of some lists in the object that a file holds.

    Args:
        file: opened at its beginning, in UTF-8.
        lists: keys of the lists; the values of other keys are passed over.

    Yields:
        The key of the list and a record, in the order of the file. Its values are untrusted.

    Raises:
        ValueError: with the reason: it is not valid JSON or UTF-8, is no such object, lacks a list, or a record or
            another value is longer than `MAX_RECORD`. What comes before that has been yielded.
    """
    text, missing = _Text(file), set(lists)
    text.expect("{", "it does not begin with {")
    while text.skip() != "}":
        key = text.value("a key")
        text.expect(":", f"no colon follows the key {str(key)[:40]!r}")
        if key in lists:
            missing.discard(key)
            for record in _elements(text, key):
                yield key, record
        else:
            text.value(f"the value of {str(key)[:40]!r}")
        if text.skip() != "}":
            text.expect(",", f"no comma follows the value of {str(key)[:40]!r}")
    text.expect("}", "")
    if text.skip():
        raise ValueError("text follows its end")
    if missing:
        raise ValueError(f"it has no {' and no '.join(sorted(missing))}")


def _elements(text: "_Text", key: str) -> Iterator[dict[str, Any]]:
    text.expect("[", f"{key!r} is no list")
    number = 0
    while text.skip() != "]":
        if number:
            text.expect(",", f"no comma follows number {number} of {key!r}")
        record = text.value(f"number {number + 1} of {key!r}")
        if not isinstance(record, dict):
            raise ValueError(f"number {number + 1} of {key!r} is a {type(record).__name__}, not an object")
        yield record
        number += 1
    text.expect("]", "")


class _Text:
    """The text of a file, from the place that is reached on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._text, self._position, self._ended = file, "", 0, False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder(parse_constant=_no_number).raw_decode

    def skip(self) -> str:
        """Passes over white space; the next character, or nothing at the end."""
        while True:
            match = _SPACE.match(self._text, self._position)
            assert match
            self._position = match.end()
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._more()

    def expect(self, character: str, otherwise: str) -> None:
        """Passes over a character.

        Raises:
            ValueError: another one follows.
        """
        if (found := self.skip()) != character:
            raise ValueError(f"{otherwise}{'' if found else '; it ends there'}")
        self._position += 1

    def value(self, what: str) -> Any:
        """Reads a value.

        Raises:
            ValueError: there is none, or it is too long.
        """
        self.skip()
        while True:
            try:
                found, end = self._parse(self._text, self._position)
                if end < len(self._text) or self._ended:  # a number could go on
                    self._position = end
                    return found
            except json.JSONDecodeError as error:
                if self._ended:
                    raise ValueError(f"{what} is no valid JSON ({error.msg})") from error
            except RecursionError as error:
                raise ValueError(f"{what} is nested too deeply") from error
            except ValueError as error:
                raise ValueError(f"{what} is not valid ({error})") from error
            if len(self._text) - self._position > MAX_RECORD:
                raise ValueError(f"{what} is no valid JSON, or is longer than {MAX_RECORD:,} characters")
            self._more()

    def _more(self) -> None:
        pending = len(self._text) - self._position
        piece = self._file.read(max(CHUNK, pending))
        self._ended = not piece
        try:
            self._text = self._text[self._position :] + self._decode(piece, self._ended)
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not in UTF-8 ({error.reason})") from error
        self._position = 0


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
