"""Paired differences in accuracy: interval, tests, and the word for each; docs/statistics.md says what words mean."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mpvg.analysis.findings import Estimate
from mpvg.statistics import ALPHA, CONFIDENCE_LEVEL, Interval, holm, verdict

MARGIN = 0.01
"""Difference in accuracy that matters."""
RULE_OF_THREE = 3
"""Where no image of n differs, up to a share of 3 / n may differ (95 %)."""


class PairedDifference(NamedTuple):
    """The mean of differences, of which there is one for each image or each fold."""

    difference: float
    interval: Interval
    error: float
    """Standard error."""
    p: float
    """Two-sided, of no difference."""
    p_equivalent: float
    """Of a difference of the margin or more, by two one-sided tests."""

    @property
    def estimate(self) -> Estimate:
        """The difference with its interval."""
        return Estimate(self.difference, self.interval)


def paired_difference(differences: Sequence[float], *, folds: bool = False) -> PairedDifference:
    """Mean of paired differences with Student's t or, over folds, the corrected resampled t.

    The training parts of a cross-validation overlap, so that its folds are not independent: the variance of the mean is
    that of the folds times 1 / folds + 1 / (folds - 1), the share of tested to trained images.

    Args:
        differences: at least two.
        folds: whether they are of the folds of a cross-validation, and not of images.

    Source:
        Nadeau and Bengio, Inference for the Generalization Error, 2003.
    """
    from scipy.stats import t

    sample, count = torch.tensor(differences, dtype=torch.float64), len(differences)
    mean = float(sample.mean())
    error = float(sample.std()) * math.sqrt(1 / count + (1 / (count - 1) if folds else 0))
    half = float(t.ppf((1 + CONFIDENCE_LEVEL) / 2, count - 1)) * error
    room = MARGIN - abs(mean)
    if error == 0:
        p, p_equivalent = float(mean == 0), float(room <= 0)
    else:
        p, p_equivalent = 2 * float(t.sf(abs(mean) / error, count - 1)), float(t.sf(room / error, count - 1))
    return PairedDifference(mean, Interval(mean - half, mean + half), error, p, p_equivalent)


def with_width(found: PairedDifference, images: int) -> PairedDifference:
    """The same; where no image differs from another, the interval is that of the rule of three, not of width 0.

    Args:
        found: an accuracy, or a difference of two; a standard error of 0 must mean that all images are alike.
        images: on which it was measured.
    """
    if found.error:
        return found
    half = RULE_OF_THREE / images
    return found._replace(interval=Interval(found.difference - half, found.difference + half))


def note(words: Sequence[str]) -> list[str]:
    """How to read a table with some words of `judge`, in lines."""
    lines = []
    if any("needs" in word for word in words):
        found = f"a difference of {100 * MARGIN:g} point would be found"
        lines.append(f"needs N images: with N images, {found}; larger ones need fewer")
    if len(words) > 1:
        lines.append("the last column is corrected for the number of comparisons; the intervals are not")
    return lines


def judge(found: Sequence[PairedDifference], images: int) -> list[tuple[float, str]]:
    """Of each difference in accuracy, p with Holm's correction over all of them, and its word.

    Args:
        found: all differences that are looked at together.
        images: on which each was measured.
    """
    judged = []
    for one, p in zip(found, holm([one.p for one in found]), strict=True):
        equivalent = one.p_equivalent < ALPHA and RULE_OF_THREE / images < MARGIN
        needed = max(images_needed(one.error, images, len(found)), round(RULE_OF_THREE / MARGIN) + 1)
        word = verdict(
            one.difference,
            differs=p < ALPHA,
            equivalent=f"equivalent within {100 * MARGIN:g} point" if equivalent else None,
            undecided=f"undecided: needs {needed:,} images" if needed > images else f"undecided with {images:,} images",
        )
        judged.append((p, word))
    return judged


def images_needed(error: float, images: int, pairs: int) -> int:
    """Images with a power of 80 % to find a difference of the margin, and to exclude it, in two digits.

    The standard error is taken to fall with the root of the number of images.

    Args:
        error: standard error of the difference.
        images: with which it was measured.
        pairs: number of comparisons for which the level is corrected.
    """
    from scipy.stats import norm

    to_differ = norm.isf(ALPHA / pairs / 2) + norm.ppf(0.8)
    to_exclude = norm.isf(ALPHA) + norm.ppf(0.9)
    needed = images * (max(to_differ, to_exclude) * error / MARGIN) ** 2
    if needed < 10:
        return math.ceil(needed)
    unit = 10 ** (math.floor(math.log10(needed)) - 1)
    return math.ceil(needed / unit) * unit
