"""How well the runs of a report classify, and what may be concluded from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpvg import statistics
from mpvg.analysis.findings import AnalyzedRun, Estimate, RunsByConfig, Scores
from mpvg.analysis.numbers import estimate_text

MIN_SEEDS = 5
"""From fewer seeds nothing is concluded: Student's t interval of two seeds is seven times as wide as that of five."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The scores of runs that differ in the seed only."""

    scores: list[Scores]
    """One per run."""
    accuracy: Estimate
    """Mean over seeds, in [0, 1]."""
    nll: Estimate
    """Mean over seeds, in nats."""
    accuracy_difference: Estimate | None
    """The accuracy minus that of the first config; None: it is the first config."""
    nll_difference: Estimate | None
    """The same for the negative log-likelihood."""


def compare(groups: RunsByConfig) -> Mapping[str, Compared]:
    """Compares every config with the first one.

    The scores are those that the runs recorded on all validation images, if all runs have such a record of the
    checkpoint; otherwise those on the analyzed images.
    """
    recorded = all(one.recorded is not None for members in groups.values() for one in members)
    compared: dict[str, Compared] = {}
    first: list[Scores] | None = None
    for name, members in groups.items():
        scores = [one.recorded if recorded and one.recorded is not None else one.measured for one in members]
        accuracies, nlls = [one.accuracy for one in scores], [one.nll for one in scores]
        compared[name] = Compared(
            scores=scores,
            accuracy=Estimate(*statistics.mean_and_interval(accuracies)),
            nll=Estimate(*statistics.mean_and_interval(nlls)),
            accuracy_difference=None if first is None else _difference(accuracies, [one.accuracy for one in first]),
            nll_difference=None if first is None else _difference(nlls, [one.nll for one in first]),
        )
        first = first or scores
    return compared


def _difference(values: list[float], others: list[float]) -> Estimate:
    return Estimate(*statistics.difference_and_interval(values, others))


def least_accuracy(classes: int) -> float:
    """The accuracy that a network must exceed before anything is concluded from it.

    It is twice chance, or halfway from chance to 1 if that is less, as it is for two classes.
    """
    return min(2 / classes, (1 + 1 / classes) / 2)


def why_inconclusive(members: Sequence[AnalyzedRun]) -> str:
    """Why nothing may be concluded from runs that differ in the seed only; "" if something may."""
    reasons = []
    if len(members) < MIN_SEEDS:
        reasons.append(f"{len(members)} seed{'s' if len(members) > 1 else ''}, and at least {MIN_SEEDS} are needed")
    classes = members[0].run.info.num_classes
    least, lowest = least_accuracy(classes), min(one.trained.accuracy for one in members)
    if not lowest > least:
        needed = "twice chance" if math.isclose(least, 2 / classes) else "halfway from chance to 100 %"
        reasons.append(
            f"the lowest accuracy is {_percent(lowest)}, and more than {_percent(least)} is needed "
            f"({needed} for {classes} classes)"
        )
    return "; ".join(reasons)


def _percent(share: float) -> str:
    return f"{estimate_text(Estimate(share), scale=100, signed=False)} %"
