"""What the values of a study's runs say about its contrasts: differences, intervals, tests, and the words that follow.

Each setting of a study is an experiment of its own: Holm's correction is over its contrasts. A contrast between an arm
and the same arm on other seeds is a control, which no correction concerns. docs/statistics.md has the reasons.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpvg.statistics import ALPHA, Interval, holm, verdict, weighted_means
from mpvg.study.plan import Contrast, Study

CONTROL_ALPHA = 0.01
"""Level at which a control fails: many controls are looked at, and one in twenty would fail at 5 % by chance."""
POWER = 0.8
RESAMPLES = 20_000
"""Permutations that are drawn where there are more; 8 against 8 seeds have 12,870, which are all done."""
PILOT_SEEDS = 8
_MOST_SEEDS = 100_000
Samples = Mapping[str, Sequence[float]]
"""Arm -> one value for each seed."""


@dataclass(frozen=True)
class Result:
    """What one metric says about a contrast."""

    contrast: Contrast
    metric: str
    seeds: int
    """Of the arm that has the fewest."""
    difference: float
    """The weighted sum of the arms' means."""
    interval: Interval
    p: float
    """Two-sided, of no difference."""
    p_holm: float
    """Corrected for the other contrasts of the setting; of a control, `p`."""
    margin: float
    p_equivalent: float
    """Of a difference of the margin or more."""
    needed: int
    """Seeds of each arm for a power of 80 % to find a difference of the margin, and to exclude it; at least so many
    that the permutation test can pass Holm's correction."""
    smallest_p: float
    """The smallest `p_holm` that so many seeds can have."""
    is_control: bool

    @property
    def level(self) -> float:
        """Below which `p_holm` shows a difference."""
        return CONTROL_ALPHA if self.is_control else ALPHA

    @property
    def differs(self) -> bool:
        """Whether there is a difference."""
        return self.p_holm < self.level

    @property
    def can_differ(self) -> bool:
        """Whether so many seeds can show a difference, however large it is."""
        return self.smallest_p < self.level

    @property
    def is_equivalent(self) -> bool:
        """Whether the difference is smaller than the margin."""
        return self.p_equivalent < ALPHA

    @property
    def word(self) -> str:
        """The verdict: higher, lower, equivalent within the margin, or undecided."""
        if not self.can_differ:
            undecided = f"undecided: needs {self.needed} seeds ({self.seeds} cannot show a difference)"
        elif self.needed <= self.seeds:
            undecided = f"undecided with {self.seeds} seeds"
        else:
            undecided = f"undecided: needs {self.needed} seeds"
        equivalent = f"equivalent within {self.margin:g}" if self.is_equivalent else None
        return verdict(self.difference, differs=self.differs, equivalent=equivalent, undecided=undecided)


def evaluate(study: Study, samples: Samples, metric: str) -> list[Result]:
    """Tests the contrasts of a study on one metric in one setting.

    Args:
        study: whose contrasts and margins count.
        samples: the values; arms that a network cannot run are missing, and contrasts with them are left out.
        metric: its name, one of the study's margins.

    Raises:
        ValueError: an arm has fewer than two values.
    """
    chosen = [contrast for contrast in study.contrasts if contrast.weights.keys() <= samples.keys()]
    tested = [(contrast, _two_sided(contrast.weights, samples)) for contrast in chosen]
    controls = {contrast.name for contrast in chosen if is_control(study, contrast)}
    family = [p for contrast, p in tested if contrast.name not in controls]
    corrected = iter(holm(family))
    pairs = sum(_is_pair(contrast.weights) for contrast in chosen if contrast.name not in controls)
    margin = study.margins[metric]
    results = []
    for contrast, p in tested:
        control, weights = contrast.name in controls, contrast.weights
        level = CONTROL_ALPHA if control else ALPHA / len(family)
        needed = seeds_needed(_sd(weights, samples), margin, weights, alpha=level)
        fewest_p = 0.0  # a t test has no smallest p
        if _is_pair(weights):
            # Contrasts that are tested by t may come first in Holm's order, so that those by permutation remain.
            tests = 1 if control else pairs
            needed = max(needed, least_seeds(CONTROL_ALPHA if control else ALPHA, tests))
            fewest_p = min(1.0, tests * smallest_p(*(len(samples[arm]) for arm in weights)))
        means = weighted_means(weights, samples)
        results.append(
            Result(
                contrast=contrast,
                metric=metric,
                seeds=min(len(samples[arm]) for arm in weights),
                difference=means.value,
                interval=means.interval,
                p=p,
                p_holm=p if control else next(corrected),
                margin=margin,
                p_equivalent=means.equivalence_p(margin),
                needed=needed,
                smallest_p=fewest_p,
                is_control=control,
            )
        )
    return results


def is_control(study: Study, contrast: Contrast) -> bool:
    """Whether the arms of a contrast are the same one on different seeds."""
    return len(contrast.weights) == 2 and len({str(sorted(study.arm(a).set.items())) for a in contrast.weights}) == 1


def pooled_sd(samples: Samples) -> float:
    """Standard deviation over seeds, pooled over the arms: it does not depend on the arms' means.

    Raises:
        ValueError: no arm has two values.
    """
    squares = sum(float(np.var(values, ddof=1)) * (len(values) - 1) for values in samples.values() if len(values) > 1)
    degrees = sum(len(values) - 1 for values in samples.values() if len(values) > 1)
    if degrees == 0:
        raise ValueError("no arm has two seeds, so the spread over seeds is unknown; give at least --seeds 2")
    return math.sqrt(squares / degrees)


def seeds_needed(sd: float, margin: float, weights: Mapping[str, float] | None = None, *, alpha: float = ALPHA) -> int:
    """Seeds of each arm with which a difference of the margin is found, and its absence shown, with a power of 80 %.

    Args:
        sd: standard deviation over seeds.
        margin: the difference.
        weights: of the contrast; None: one arm against another.
        alpha: level of the test of a difference; equivalence is tested at 5 %.
    """
    return max(seeds_to_differ(sd, margin, weights, alpha=alpha), seeds_to_exclude(sd, margin, weights))


def seeds_to_differ(
    sd: float, margin: float, weights: Mapping[str, float] | None = None, *, alpha: float = ALPHA
) -> int:
    """Seeds of each arm for a power of 80 % to find a difference of the margin; arguments as `seeds_needed`."""
    from statsmodels.stats.power import TTestIndPower

    effect = margin / max(sd * _spread(weights) / math.sqrt(2), 1e-300)
    return _fewest(lambda seeds: float(TTestIndPower().power(min(effect, 100.0), seeds, alpha)))


def seeds_to_exclude(sd: float, margin: float, weights: Mapping[str, float] | None = None) -> int:
    """Seeds of each arm for a power of 80 % to show that there is no difference of the margin, where there is none."""
    from scipy import stats

    def power(seeds: int) -> float:
        degrees, error = 2 * (seeds - 1), max(sd * _spread(weights) / math.sqrt(seeds), 1e-300)
        reach = margin / error - stats.t.ppf(1 - ALPHA, degrees)
        return float(2 * stats.t.cdf(reach, degrees) - 1)

    return _fewest(power)


def _fewest(power: Callable[[int], float]) -> int:
    """The smallest number of seeds, from 2 on, with a power of 80 %."""
    low, high = 2, 2
    while high < _MOST_SEEDS and power(high) < POWER:
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return min(low, _MOST_SEEDS)


def smallest_p(seeds: int, others: int | None = None) -> float:
    """The smallest two-sided p that a permutation test can have.

    Args:
        seeds: of one arm.
        others: of the other arm; None: as many.
    """
    return min(1.0, 2 / math.comb(seeds + (seeds if others is None else others), seeds))


def least_seeds(alpha: float, tests: int) -> int:
    """Seeds of each arm with which permutation tests can pass Holm's correction for so many of them."""
    return next(seeds for seeds in range(2, 100) if tests * smallest_p(seeds) < alpha)


def decidable(study: Study, sd: float, seeds: int, metric: str) -> str:
    """What so many seeds can decide, in one sentence.

    Args:
        study: whose margins and contrasts count.
        sd: standard deviation over seeds.
        seeds: of each arm.
        metric: one of the study's margins.
    """
    tested = [contrast for contrast in study.contrasts if not is_control(study, contrast)]
    margin, level = study.margins[metric], ALPHA / max(1, len(tested))
    least = least_seeds(ALPHA, max(1, sum(_is_pair(contrast.weights) for contrast in tested)))
    questions: list[dict[str, float] | None] = [contrast.weights for contrast in tested] or [None]
    found_by = max(least, *(seeds_to_differ(sd, margin, weights, alpha=level) for weights in questions))
    excluded_by = max(seeds_to_exclude(sd, margin, weights) for weights in questions)
    enough = "enough" if seeds >= max(found_by, excluded_by) else "too few"
    return (
        f"{metric}: the standard deviation over seeds is {sd:.3g}; a difference of {margin:g} in any contrast is found "
        f"with a power of 80 % by {found_by} seeds of each arm, and excluded by {excluded_by}: {seeds} are {enough}"
    )


def _sd(weights: Mapping[str, float], samples: Samples) -> float:
    """Standard deviation over seeds of a contrast's arms, weighted as they enter it: arms may spread differently."""
    squares = {arm: weight**2 for arm, weight in weights.items()}
    total = sum(square * float(np.var(samples[arm], ddof=1)) for arm, square in squares.items())
    return math.sqrt(total / sum(squares.values()))


def _is_pair(weights: Mapping[str, float]) -> bool:
    return sorted(weights.values()) == [-1, 1]


def _spread(weights: Mapping[str, float] | None) -> float:
    """Standard error of a contrast whose arms have one seed each, in units of their standard deviation."""
    return math.sqrt(2.0 if weights is None else sum(weight**2 for weight in weights.values()))


def _two_sided(weights: Mapping[str, float], samples: Samples) -> float:
    """p of no difference: by permutation for one arm against another, else by Welch's t."""
    from scipy.stats import permutation_test

    short = [arm for arm in weights if len(samples[arm]) < 2]
    if short:
        raise ValueError(f"arm {short[0]} has {len(samples[short[0]])} seeds; a test needs at least 2 of each arm")
    if not _is_pair(weights):
        return weighted_means(weights, samples).p
    first, second = sorted(weights, key=lambda arm: -weights[arm])

    def difference(a: Any, b: Any, axis: int) -> Any:
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    found = permutation_test(
        (np.asarray(samples[first]), np.asarray(samples[second])),
        difference,
        permutation_type="independent",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
