"""Pickles of CIFAR: arrays of bytes in every protocol, and nothing that reaches numpy, memory or the C stack."""

import contextlib
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpvg.data.inert_pickle import InertArray, load_inert
from mpvg.data.named_sets import NAMED_SETS

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
BATCH = {"data": PIXELS, "labels": [3, 1, 2], "filenames": ["ä.png", "b.png", "c.png"], "batch_label": "one of 5"}
DTYPE = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"


def in_dict(value: bytes) -> bytes:
    return b"\x80\x02}U\x04data" + value + b"s."


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_python_3_is_read(protocol: int) -> None:
    values = load_inert(pickle.dumps(BATCH, protocol=protocol))
    assert np.array_equal(values.pop("data").to_numpy(), PIXELS)
    assert values == {name: value for name, value in BATCH.items() if name != "data"}


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_python_2_is_read(protocol: int) -> None:
    """Its strings are bytes, of which latin1 makes text."""
    body = bytes(range(256)) * 12
    if protocol == 0:
        text = b"S'" + b"".join(b"\\x%02x" % value for value in body) + b"'\n"
    else:
        text = b"T" + struct.pack("<I", len(body)) + body
    state = (
        b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
        if protocol == 0
        else b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    start = b"\x80\x02" if protocol == 2 else b""
    stream = start + b"(dS'data'\n" + ARRAY + b"(I1\n(I1\nI3072\nt" + DTYPE + state + b"I00\n" + text + b"tbs."
    assert load_inert(stream)["data"].to_numpy().tobytes() == body


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, "a", None], dtype=object),
        np.zeros((2, 3072), np.int8),
        np.zeros((2, 3072), np.float64),
        np.zeros((2, 3072), ">u2"),
        np.zeros(3, [("a", "u1")]),
        np.asfortranarray(PIXELS),
        np.zeros((1, 1, 1, 1, 1), np.uint8),
        np.uint8(3),
        np.array(["text"]),
        np.datetime64("2020-01-01"),
    ],
    ids=str,
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_other_arrays_are_refused(array: Any, protocol: int) -> None:
    with pytest.raises(Exception, match="it (asks for|has an array|sets a state|has the opcode|calls)"):
        load_inert(pickle.dumps({"data": array}, protocol=protocol))


HOSTILE = {
    "a dtype with objects": in_dict(DTYPE + b"(K\x03U\x01|NU\x01a\x85}U\x01aU\x02O8K\x00\x86sK\x08K\x01K?tb"),
    "a dtype of objects": in_dict(b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR"),
    "an address": in_dict(ARRAY + b"(K\x01K\x01\x85cnumpy\ndtype\n(U\x02O8K\x00K\x01tR\x89U\x08AAAAAAAAtb"),
    "a state of the wrong length": in_dict(ARRAY + b"(K\x01K\x01\x85" + DTYPE + b"\x89tb"),
    "more than its bytes": in_dict(ARRAY + b"(K\x01K\x02\x85" + DTYPE + b"\x89U\x01atb"),
    "a side below 0": in_dict(ARRAY + b"(K\x01J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86" + DTYPE + b"\x89U\x01atb"),
    "a state for a name": in_dict(b"cnumpy\ndtype\n}U\x04call}sb"),
    "a slot of a name": in_dict(b"cnumpy\ndtype\nN}U\x04call}s\x86b"),
    "a method": in_dict(b"cnumpy.core.multiarray\n_reconstruct.__init__\n"),
    "dots": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
    "a class that is made": in_dict(b"cnumpy\nndarray\n(K\x03\x85t\x81"),
    "a class of old": in_dict(b"(K\x03inumpy\nndarray\n"),
    "an extension": in_dict(b"\x82\x01"),
    "a persistent name": b"Pname\n.",
    "numpy's scalar": in_dict(b"cnumpy.core.multiarray\nscalar\n(U\x01atR"),
    "a set": in_dict(b"\x8f"),
    "no text as a key": b"\x80\x02}K\x01K\x02s.",
    "a list as a dict": b"\x80\x02]U\x01aU\x01bs.",
    "a dict that ends early": b"(S'a'\nd.",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "a call of a number": in_dict(b"K\x03(tR"),
    "text that is no latin1": in_dict(b"c_codecs\nencode\n(X\x03\x00\x00\x00\xe2\x82\xacX\x05\x00\x00\x00ascii\x74R"),
    "a large number in text": b"I" + b"9" * 100_000 + b"\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_in_a_line(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for file in ("train", "test", "meta"):
        (folder / file).write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"^[^\n]*train is refused: [^\n]*; get it again, or use the binary version$"):
        NAMED_SETS["cifar100"].read(str(tmp_path), ("train",))


def test_what_a_pickle_does_leaves_no_trace() -> None:
    """A state that is set on a name would be there for the next file."""
    for stream in HOSTILE.values():
        with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind; what it leaves is tested
            load_inert(stream)
    assert np.array_equal(load_inert(pickle.dumps(BATCH, 2))["data"].to_numpy(), PIXELS)


MEGABYTE = b"\x80\x02](X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x00c_codecs\nencode\nq\x01"
LARGE = {
    "a memo of two billion": (b"\x80\x02}r\xff\xff\xff\x7f.", False),
    "a claim of bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"few.", True),
    "a claim of a bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"few.", True),
    "a claim of text": (b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"few.", True),
    "a long frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.", False),
    "text encoded over and over": (
        MEGABYTE + b"X\x06\0\0\0latin1q\x02" + b"h\x01h\x00h\x02\x86R" * 1000 + b"e.",
        False,
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_pickle_takes_no_more_memory_than_its_size_allows(name: str) -> None:
    stream, refused = LARGE[name]
    tracemalloc.start()
    with pytest.raises(EOFError) if refused else contextlib.nullcontext():
        load_inert(stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(stream) + 1_000_000


@pytest.mark.parametrize(("start", "end"), [(b"}", b"Ns."), (b"(", b"Nd."), (b"}(", b"Nu.")])
def test_a_key_of_nested_tuples_is_refused_before_it_is_hashed(start: bytes, end: bytes) -> None:
    """Its hash would overflow the stack of C."""
    with pytest.raises(pickle.UnpicklingError, match="keys are not text"):
        load_inert(b"\x80\x02" + start + b")" + b"\x85" * 100_000 + end)


# ---- fuzzing

SMALL = [pickle.dumps({"data": PIXELS[:1, :16], "labels": [3], "names": ["a"]}, protocol) for protocol in range(6)]
SMALL += [in_dict(ARRAY + b"(K\x01K\x01K\x02\x86" + DTYPE + b"\x89U\x02abtb"), *HOSTILE.values()]
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A pickle with some bytes replaced, inserted, removed or taken from another."""
    stream = draw(st.sampled_from(SMALL))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(stream)))
        end = min(len(stream), start + draw(st.integers(0, 4)))
        other = draw(st.sampled_from(SMALL))
        cut = draw(st.integers(0, len(other)))
        piece = draw(st.one_of(st.binary(max_size=4), st.sampled_from(OPCODES), st.just(other[cut : cut + 20])))
        stream = stream[:start] + piece + stream[end:]
    return stream


@settings(max_examples=200)
@given(mutated())
def test_mutated_pickles_give_plain_values_or_an_error(stream: bytes) -> None:
    try:
        value = load_inert(stream)
    except Exception:  # `_load_pickle` makes a line of any
        return
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, InertArray):
            assert value.to_numpy().dtype == np.uint8
        assert type(value).__module__ in ("builtins", "mpvg.data.inert_pickle")
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
