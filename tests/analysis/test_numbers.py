"""Numbers as text: the printed interval holds the printed value, with enough digits to say something."""

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpvg.analysis.findings import Estimate
from mpvg.analysis.numbers import estimate_parts, estimate_text
from mpvg.statistics import Interval

ANY = st.floats(-1e307, 1e307)  # rounding the very largest would end beyond what a float can be
NEAR = st.builds(lambda center, power, sign: center * (1 + sign * 10.0**power), ANY, st.integers(-16, 0), ANY)


def read(text: str) -> list[float]:
    """The numbers in a text, in order."""
    return [float(number) for number in re.findall(r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?", text)]


@given(st.lists(st.one_of(ANY, NEAR).filter(math.isfinite), min_size=3, max_size=3), st.booleans())
@example([-0.0009, -6.5e-4, -0.0004], True)
@example([-0.00101, -0.00099, -0.00098], True)
@example([-1e307, 0.0, 1e307], True)
@example([0.0, 0.0, 5e-324], False)
@example([-0.0, -0.0, -0.0], True)
@example([0.5, 0.5, 0.5000000001], False)
def test_a_printed_interval_holds_its_printed_value(numbers: list[float], signed: bool) -> None:
    low, value, high = sorted(numbers)
    text = estimate_text(Estimate(value, Interval(low, high)), signed=signed)
    shown, shown_low, shown_high = read(text)
    assert shown_low <= shown <= shown_high
    assert (shown_low < shown_high) == (low < high)
    half = high / 2 - low / 2
    for number, printed in zip((value, low, high), (shown, shown_low, shown_high), strict=True):
        assert abs(printed - number) <= max(half / 10 or 0.005 * abs(number), 1e-15 * abs(number), 5e-324)


@given(low=st.floats(-1, 1), high=st.floats(-1, 1), value=st.floats(0, 1))
def test_percentages_hold_as_well(low: float, high: float, value: float) -> None:
    low, high = min(low, high), max(low, high)
    inside = min(max(low + value * (high - low), low), high)
    shown, shown_low, shown_high = read(estimate_text(Estimate(inside, Interval(low, high)), scale=100))
    assert shown_low <= shown <= shown_high
    assert shown == pytest.approx(100 * inside, abs=max(0.005, 10 * (high - low)))


@given(ANY)
def test_a_number_alone_has_three_digits(value: float) -> None:
    text, interval = estimate_parts(Estimate(value))
    assert interval is None
    assert read(text) == [pytest.approx(value, rel=0.005, abs=5e-324)]
    assert text[0] == ("-" if value < 0 else "+")


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(-6.5e-4, Interval(-9.1e-4, -3.9e-4)), "-0.00065 (-0.00091 to -0.00039)"),
        (Estimate(-0.214, Interval(-0.284, -0.144)), "-0.214 (-0.284 to -0.144)"),
        (Estimate(0.0, Interval(-0.5, 0.5)), "+0.00 (-0.50 to +0.50)"),
        (Estimate(0.5, Interval(0.5, 0.5)), "+0.500 (+0.500 to +0.500)"),
        (Estimate(6.45e-6), "+6.45e-06"),
        (Estimate(1234567.0), "+1.23e+06"),
        (Estimate(math.nan), "undefined"),
        (Estimate(0.5, Interval(-math.inf, math.inf)), "+0.500 (undefined to undefined)"),
    ],
)
def test_numbers_read_like_this(estimate: Estimate, text: str) -> None:
    assert estimate_text(estimate) == text
