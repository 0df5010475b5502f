"""Odd, damaged and harmful images, through both readers: the right picture or a clear error, soon, in little memory."""

import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from hostile import HARMFUL, RANGES, Case, Pixels
from mpvg.data.images import read_image, read_pixels
from odd_images import ODD

GENERATORS = {generate.__name__: generate for generate in (*HARMFUL, *RANGES, *ODD)}
SEEDS = range(10)
MAX_SECONDS, MAX_BYTES = 10.0, 1.5e9
REFUSALS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def read(reader: Callable[[str], Image.Image | Tensor], file: Path) -> Pixels | Exception:
    """The picture (H, W, 3), or why there is none."""
    try:
        found = reader(str(file))
    except REFUSALS as error:
        return error
    return np.asarray(found) if isinstance(found, Image.Image) else found.permute(1, 2, 0).numpy()


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def assert_right(case: Case, found: Pixels | Exception) -> None:
    if isinstance(found, Exception):
        assert case.picture is None or case.may_fail, f"a good picture is refused: {found!r}"
        assert str(found).strip(), "it does not say why"
        assert " at 0x" not in str(found)
        return
    assert case.picture is not None, "it must be refused"
    assert found.dtype == np.uint8
    assert found.shape == case.picture.shape
    difference = np.abs(found.astype(int) - case.picture.astype(int)).max()
    assert difference <= case.tolerance, f"wrong by {difference} levels"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", GENERATORS)
def test_the_picture_is_right_or_refused(tmp_path: Path, kind: str, seed: int) -> None:
    case = GENERATORS[kind](seed, np.random.default_rng([seed, len(kind)]))
    file = tmp_path / f"image{case.suffix}"
    file.write_bytes(case.data)
    if case.size is not None:
        with file.open("r+b") as opened:
            opened.truncate(case.size)
    memory, started = peak(), time.monotonic()
    by_pil, by_tensor = read(read_image, file), read(read_pixels, file)
    assert time.monotonic() - started < MAX_SECONDS
    assert peak() - memory < MAX_BYTES
    assert_right(case, by_pil)
    assert_right(case, by_tensor)
    assert isinstance(by_pil, Exception) == isinstance(by_tensor, Exception)
    if not isinstance(by_pil, Exception):
        assert np.abs(by_pil.astype(int) - by_tensor.astype(int)).max() <= 1


def test_there_are_two_hundred() -> None:
    assert len(GENERATORS) * len(SEEDS) >= 200
