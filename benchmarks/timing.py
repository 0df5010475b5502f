"""What benchmarks of stretches of work share: two clocks, and ratios with an interval."""

import random
import statistics
import time
from typing import NamedTuple


class Times(NamedTuple):
    """Seconds by two clocks."""

    cpu: float
    wall: float


def now() -> Times:
    return Times(time.process_time(), time.perf_counter())


def since(begun: Times) -> Times:
    ended = now()
    return Times(ended.cpu - begun.cpu, ended.wall - begun.wall)


def ratio(values: list[float]) -> tuple[float, float, float]:
    """Median with a 95 % bootstrap interval: low, median, high."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], statistics.median(values), medians[1949]
