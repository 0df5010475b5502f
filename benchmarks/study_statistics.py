"""Do the intervals of a study cover, and do its tests keep their size?

    python benchmarks/study_statistics.py --json benchmarks/records/study_statistics.json   # one core, 20 minutes

Draws runs of three arms from normal distributions with one mean and counts how often the 95 % interval holds the true
difference, a permutation test rejects at 5 %, any of three contrasts does after Holm's correction, and two arms that
differ by the margin are called equivalent. Once with equal spreads, and once with one arm that spreads twice as much.
Exit status: 0 if each rate of equal spreads is within three standard errors of what it should be, else 2.
"""

import argparse
import gc
import math
from pathlib import Path

import numpy as np
from timing import write_record

from mpvg.runs.environment import environment
from mpvg.statistics import ALPHA
from mpvg.study import contrasts
from mpvg.study.contrasts import evaluate
from mpvg.study.plan import Arm, Contrast, Setting, Study

STUDY = Study(
    name="simulation",
    question="Do tests keep their size?",
    reference="a",
    margins={"nll": 1.0},
    arms=tuple(Arm(name=name, label=name, set={"method": name}) for name in "abc"),
    contrasts=tuple(Contrast(name=x + y, weights={x: 1.0, y: -1.0}) for x, y in ("ab", "ac", "bc")),
    scales={"tiny": (Setting(name="x", recipe="digits", seeds=2),)},
)


def simulate(seeds: int, repetitions: int, spread: float) -> dict[str, float]:
    """The rates for so many seeds of each arm, where arm a spreads so many times as much as the others."""
    draw = np.random.default_rng(0)
    counts = dict.fromkeys(("coverage", "size", "family", "equivalent at the margin"), 0)
    for _ in range(repetitions):
        given = {name: list(draw.normal(0, spread if name == "a" else 1, seeds)) for name in "abc"}
        results = evaluate(STUDY, given, "nll")
        counts["coverage"] += results[0].interval.low <= 0 <= results[0].interval.high
        counts["size"] += results[0].p < 0.05
        counts["family"] += any(result.differs for result in results)
        apart = {"a": [value + 1.0 for value in given["a"]], "b": given["b"]}
        p = contrasts._equivalence_p({"a": 1.0, "b": -1.0}, apart, STUDY.margins["nll"])
        counts["equivalent at the margin"] += p < ALPHA
    return {name: count / repetitions for name, count in counts.items()}


def main() -> int:
    """Simulates, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    gc.freeze()  # statsmodels collects garbage at each correction, which looks through all that torch has loaded
    bound = 3 * math.sqrt(0.05 * 0.95 / given.repetitions)
    found: dict[str, dict[str, float]] = {}
    holds = True
    for seeds in given.seeds:
        for spread in (1, 2):
            name = f"{seeds} seeds, " + ("equal spreads" if spread == 1 else "one arm spreads twice as much")
            found[name] = rates = simulate(seeds, given.repetitions, spread)
            print(f"{name}: " + ", ".join(f"{what} {100 * rate:.1f} %" for what, rate in rates.items()), flush=True)
            errors = max(rate for what, rate in rates.items() if what != "coverage")
            write_record(given.json, {"repetitions": given.repetitions, "rates": found, **environment()})
            holds &= spread > 1 or (abs(rates["coverage"] - 0.95) <= bound and errors <= 0.05 + bound)
    return 0 if holds else 2


if __name__ == "__main__":
    raise SystemExit(main())
