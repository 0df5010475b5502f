"""Numbers as text: an estimate and its interval have the same digits, and enough of them."""

import math

from mpvg.analysis.findings import Estimate

UNDEFINED = "undefined"
MAX_DECIMALS, MAX_EXPONENT = 7, 6
"""Beyond these, numbers are written with an exponent."""


def estimate_text(estimate: Estimate, *, scale: float = 1, signed: bool = True) -> str:
    """An estimate as text, such as "-0.21 (-0.28 to -0.14)"; see `estimate_parts`."""
    value, interval = estimate_parts(estimate, scale=scale, signed=signed)
    return value if interval is None else f"{value} ({interval})"


def estimate_parts(estimate: Estimate, *, scale: float = 1, signed: bool = True) -> tuple[str, str | None]:
    """The value and the interval of an estimate as text.

    All three numbers are rounded in the same way, with at least two digits of half the interval's width, three of the
    value if there is no interval, and two decimals. So the printed interval holds the printed value if the interval
    holds the value, and a printed sign is that of the number.

    Args:
        estimate: the value and its interval.
        scale: factor of all numbers; 100 for percent.
        signed: whether a positive number has a "+".

    Returns:
        The value, and "low to high"; None: there is no interval. Numbers that are not finite are "undefined".
    """
    value = scale * estimate.value
    ends = None if estimate.interval is None else [scale * end for end in estimate.interval]
    spec = ("+" if signed else "") + _digits(value, ends)
    return _text(value, spec), None if ends is None else " to ".join(_text(end, spec) for end in ends)


def _digits(value: float, ends: list[float] | None) -> str:
    """The format of a value and the ends of its interval."""
    numbers = [abs(number) for number in (value, *(ends or ())) if math.isfinite(number)]
    largest = max(numbers, default=0.0)
    if largest == 0:
        return ".2f"
    half = 0.0 if ends is None else abs(ends[1] / 2 - ends[0] / 2)  # halves first: their difference cannot overflow
    decimals = 1 - _exponent(half) if half > 0 and math.isfinite(half) else 2 - _exponent(largest)
    if decimals <= MAX_DECIMALS and _exponent(largest) < MAX_EXPONENT:
        return f".{max(2, decimals)}f"
    return f".{min(16, max(2, _exponent(largest) + decimals))}e"  # 17 digits tell all numbers apart


def _exponent(number: float) -> int:
    return math.floor(math.log10(number))


def _text(number: float, spec: str) -> str:
    return format(number + 0.0, spec) if math.isfinite(number) else UNDEFINED  # + 0.0: there is no "-0.00" for 0
