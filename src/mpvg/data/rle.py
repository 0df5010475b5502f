"""Masks as run lengths in COCO's form: down the columns, of zeros and ones in turn, beginning with zeros.

As text, each length from the fourth on is the difference to the one before the last, in groups of five bits with the
lowest first, each group one character from 48 on; bit 5 says that more follow, bit 4 of the last group is the sign.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.uint8]
_BITS, _SIGN, _MORE, _FIRST = 5, 0x10, 0x20, 48
_MAX_GROUPS = 7  # of a length below 2^32, with its sign


def encode_mask(mask: "npt.NDArray[Any]") -> bytes:
    """The run lengths of a mask (H, W) as text; anything but zero is inside."""
    flat = np.asarray(mask).astype(bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return encode_counts([0, *counts] if flat.size and flat[0] else counts)


def encode_counts(counts: Sequence[int]) -> bytes:
    """Run lengths as text."""
    text = bytearray()
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            group = value & (_MORE - 1)
            value >>= _BITS
            more = value != (-1 if group & _SIGN else 0)
            text.append(_FIRST + (group | _MORE if more else group))
    return bytes(text)


def decode_counts(text: "bytes | npt.NDArray[np.uint8]") -> "npt.NDArray[np.int64]":
    """Run lengths from untrusted text.

    Raises:
        ValueError: it is damaged.
    """
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - _FIRST
    if groups.size == 0 or groups.min() < 0 or groups.max() >= 2 * _MORE or groups[-1] & _MORE:
        raise ValueError("its run lengths are damaged")
    last = np.flatnonzero(groups & _MORE == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _MAX_GROUPS:
        raise ValueError("a run length has more than 32 bits")
    shifts = _BITS * (np.arange(groups.size) - np.repeat(first, lengths))
    values = np.add.reduceat((groups & (_MORE - 1)) << shifts, first)
    values -= np.where(groups[last] & _SIGN, np.int64(1) << (_BITS * lengths), 0)
    # The third length is not a difference: the sums of the even places begin with it.
    values[1::2], values[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return values


def check_counts(counts: "npt.NDArray[np.int64]", pixels: int) -> None:
    """Raises ValueError unless run lengths are those of a mask of so many pixels."""
    if counts.min() < 0 or counts.max() > pixels or counts.sum() != pixels:
        raise ValueError(f"its run lengths do not add up to {pixels} pixels")


def decode_mask(text: "bytes | npt.NDArray[np.uint8]", height: int, width: int) -> Mask:
    """The mask (H, W) of run lengths as text: 0 outside, 1 inside.

    Raises:
        ValueError: they are damaged, or of another size.
    """
    counts = decode_counts(text)
    check_counts(counts, height * width)
    values = np.arange(len(counts), dtype=np.uint8) & 1
    return np.repeat(values, counts).reshape((height, width), order="F")
