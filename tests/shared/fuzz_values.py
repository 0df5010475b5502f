"""What all fuzzing shares: valid values with edits, other values, bytes; and what must hold whatever was in a file."""

import copy
import json
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from hypothesis import strategies as st

MAX_SECONDS = 10.0
"""CPU time of one example."""
MAX_WAIT = 120
"""Time of one example on the clock, in seconds; other processes may have the CPU."""
MAX_MEMORY = 300 * 2**20
"""Bytes by which one example may raise the largest size that the process had."""
MAX_MESSAGE = 2000


@dataclass(frozen=True)
class Target:
    """What is fuzzed."""

    examples: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    """Raises AssertionError, or whatever should not have been raised, where an example is not handled."""


NUMBERS = st.one_of(
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "\0", "\ud800", "\x1b[2J", "a\nb", "../..", "/dev/zero", "x" * 3000, "nan", "2001-99-99"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def edited(draw: st.DrawFn, valid: Any) -> Any:
    """A copy of a value in which one to three places were replaced, removed or added."""
    whole = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = whole
        key: Any = 0
        while isinstance(parent[key], (dict, list)) and parent[key] and draw(st.integers(0, 3)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "remove" and parent is not whole:
            del parent[key]
        elif what == "add" and isinstance(parent[key], dict):
            parent[key][draw(TEXTS)] = draw(VALUES)
        elif what == "add" and isinstance(parent[key], list):
            parent[key].append(draw(VALUES))
        else:
            parent[key] = draw(VALUES)
    return whole[0]


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes of which some were replaced, cut out, repeated or put in."""
    content = valid
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 40)))
        new = draw(st.one_of(st.just(b""), st.just(content[start:end] * 2), st.binary(max_size=6), st.just(b"\0" * 9)))
        content = content[:start] + new + content[end:]
    return content


def nested(deepest: int, *more: tuple[bytes, bytes]) -> st.SearchStrategy[bytes]:
    """An opening bracket, thousands of times, and perhaps the closing ones; `more`: other pairs of brackets."""
    return st.builds(
        lambda part, depth, closed: part[0] * depth + b"1" + part[1] * depth * closed,
        st.sampled_from([(b"[", b"]"), (b'{"a":', b"}"), *more]),
        st.sampled_from([deepest, 3, 60, 70, 300, deepest]),
        st.booleans(),
    )


def json_files(valid: Any) -> st.SearchStrategy[bytes]:
    """JSON files like a valid one, and others."""
    content = to_json(valid)
    values = st.one_of(edited(valid), edited(valid), VALUES).map(to_json)
    return st.one_of(values, values, damaged(content), nested(100_000), st.binary(max_size=50))


def json_lines(valid: list[Any]) -> st.SearchStrategy[bytes]:
    """Files of JSON lines like a valid one, and others."""

    def write(lines: Any) -> bytes:
        return b"".join(to_json(line) + b"\n" for line in (lines if isinstance(lines, list) else [lines]))

    return st.one_of(edited(valid).map(write), edited(valid).map(write), damaged(write(valid)), nested(100_000))


def yaml_files(valid: Any) -> st.SearchStrategy[bytes]:
    """YAML files like a valid one, and others: aliases, tags, dates, several documents."""
    content = yaml.safe_dump(valid).encode()
    values = st.one_of(edited(valid), edited(valid), VALUES).map(to_json)  # JSON is YAML
    tags = [
        "!!python/name:os.system",
        "!!timestamp",
        "!!bool",
        "!!int",
        "!!float",
        "!!binary",
        "!!omap",
        "&a",
        "*a",
        "<<:",
    ]
    pieces = st.sampled_from(
        [*tags, "---", "...", ": ", "- ", "? ", "\n", "{", "}", "[", "]", "|", ">", "'", '"', "#", "\t"]
    )
    words = st.lists(st.one_of(pieces, SCALARS.map(str)), max_size=12).map(lambda parts: " ".join(parts))
    tagged = st.tuples(st.sampled_from(tags), SCALARS.map(str)).map(lambda pair: f"lr: {pair[0]} {pair[1]}")
    texts = st.one_of(words, tagged).map(lambda text: text.encode("utf-8", "replace"))
    return st.one_of(
        values,
        damaged(content),
        texts,
        nested(2000, (b"{a: ", b"}"), (b"- ", b""), (b"? ", b""), (b"!!set {", b"}")),
        st.binary(max_size=50),
    )


def to_json(value: Any) -> bytes:
    """JSON, in which NaN and single surrogates are possible."""
    return json.dumps(value).encode()


# ---- what must hold


def refuses_or_returns(function: Callable[[], Any]) -> Any:
    """What a function returns; an error must be one of those that become one line, and have one line."""
    try:
        return function()
    except (ValueError, OSError) as error:
        message = str(error)
    assert message.strip()
    assert "\n" not in message, message
    assert len(message) < MAX_MESSAGE, message
    return None


class _Stopped(BaseException):
    """No `except Exception` may take it for an answer."""


@contextmanager
def bounded() -> Iterator[None]:
    """An example that takes long, or much memory, may be one that takes all of it where it is a little larger."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    most, started = _most_memory(), time.process_time()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    room = _address_space() + 4 * MAX_MEMORY  # what is asked for and never touched is found as well
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_WAIT)
    resource.setrlimit(resource.RLIMIT_AS, (room, limits[1]))
    try:
        yield
    except _Stopped as error:
        raise AssertionError(f"no answer after {MAX_WAIT} s") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert time.process_time() - started < MAX_SECONDS
    assert _most_memory() - most < MAX_MEMORY


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
