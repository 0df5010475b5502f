"""Masks as run lengths, against pycocotools."""

import contextlib

import numpy as np
import pytest
from pycocotools import mask as oracle

from mpvg.data.rle import check_counts, decode_counts, decode_mask, encode_counts, encode_mask


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    found = [rng.random(tuple(rng.integers(1, 40, 2))) < rng.random() for _ in range(200)]
    return [*found, np.zeros((5, 7), bool), np.ones((5, 7), bool), np.ones((1, 1), bool), np.zeros((1, 900), bool)]


def test_text_is_pycocotools_own_and_back() -> None:
    for mask in masks():
        expected = oracle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        assert encode_mask(mask) == expected
        assert encode_counts(decode_counts(expected).tolist()) == expected
        assert np.array_equal(decode_mask(expected, *mask.shape), mask)


def test_uncompressed_lengths_of_a_crowd() -> None:
    counts = [3, 70_000, 2, 5, 1_000_000, 1]
    assert decode_counts(encode_counts(counts)).tolist() == counts


@pytest.mark.parametrize("text", [b"", b"\x00", b"o", b"5o", b"ooooooooo0", b"z", "12é".encode()])
def test_damaged_text_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged|more than 32 bits"):
        decode_counts(text)


def test_lengths_of_another_size_are_refused() -> None:
    for counts in ([3, 4], [-1, 13], [2**33, 12 - 2**33]):
        with pytest.raises(ValueError, match="do not add up to 12 pixels"):
            check_counts(np.array(counts), 12)
    huge = encode_counts([2**31 - 1] * 60)  # sums of such lengths must not run over
    with pytest.raises(ValueError, match="do not add up"):
        decode_mask(huge, 3, 4)


@pytest.mark.parametrize("seed", range(20))
def test_any_text_is_a_mask_of_the_size_or_refused(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        text = bytes(rng.integers(40, 120, rng.integers(1, 30)).tolist())
        with contextlib.suppress(ValueError):
            assert decode_mask(text, 6, 5).shape == (6, 5)
