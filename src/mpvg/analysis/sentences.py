"""The findings in words. Every sentence follows from the numbers, and says so if they show no effect."""

from collections.abc import Callable, Sequence

from mpvg import statistics
from mpvg.analysis.findings import AnalyzedRun, Estimate, Findings
from mpvg.analysis.probe import LAST


def make_sentences(members: Sequence[AnalyzedRun]) -> list[str]:
    """Summarizes runs that differ in the seed only; intervals are over seeds, or over images for a single run.

    Args:
        members: the runs, at least one.
    """
    kind = f"{len(members)} seeds" if len(members) > 1 else "One run"
    summary = f"{kind}, {members[0].trained.images:,} images each, accuracy {_percent(members)}."
    sentences = [summary, _slope(members), _opposed(members), _last_norm(members), _beta(members)]
    return [sentence for sentence in sentences if sentence]


def mean_over_seeds(
    members: Sequence[AnalyzedRun], value: Callable[[Findings], Estimate], trained: bool = True
) -> Estimate:
    """Mean of a value over seeds with Student's t interval; for a single run, its value and interval over images."""
    estimates = [value(member.trained if trained else member.untrained) for member in members]
    if len(estimates) == 1:
        return estimates[0]
    return Estimate(*statistics.mean_and_interval([estimate.value for estimate in estimates]))


def r_at(index: int) -> Callable[[Findings], Estimate]:
    """Returns a function that reads r of a layer, given its index in `Findings.places`."""
    return lambda findings: findings.places[index].r


def training_effect(members: Sequence[AnalyzedRun], value: Callable[[Findings], Estimate]) -> Estimate:
    """Mean over seeds of the change during training: the trained value minus the untrained one of the same seed."""
    return Estimate(*statistics.mean_and_interval([value(m.trained).value - value(m.untrained).value for m in members]))


def _slope(members: Sequence[AnalyzedRun]) -> str:
    findings = members[0].trained
    if findings.slope is None:
        return "Fewer than two layers receive a PE, so there is no slope over depth."
    layers = f"layers {findings.slope_layers[0]} to {findings.slope_layers[-1]}"
    kind = "" if any(layer.delivered for layer in findings.places) else " (with the raw PE, because none is delivered)"
    trained, untrained = (mean_over_seeds(members, _get_slope, trained=when) for when in (True, False))
    change = training_effect(members, _get_slope)
    numbers = (
        f"Over {layers}, r changes by {_number(trained)} per layer{kind}; before training, by {_number(untrained)}"
    )
    if len(members) == 1:
        return f"{numbers}. A single run gives no interval for the effect of training, so nothing is concluded from it."
    verdict = {
        -1: "training makes the correlation fall with depth",
        0: "no effect shown, because the interval includes 0",
        1: "training makes the correlation rise with depth, against the paper's claim",
    }[_sign(change)]
    return f"{numbers}. Training changes this slope by {_number(change)}: {verdict}."


def _opposed(members: Sequence[AnalyzedRun]) -> str:
    layers = [layer.name for layer in members[0].trained.places if layer.name != LAST]
    if not layers:
        return ""
    signs = [_sign(mean_over_seeds(members, r_at(index))) for index in range(len(layers))]
    effects = [_sign(training_effect(members, r_at(index))) for index in range(len(layers))]
    text = (
        f"Tokens and PE are opposed (the whole interval of r is below 0) in {signs.count(-1)} of {len(layers)} layers"
    )
    if len(members) > 1:
        text += f"; training lowers r in {effects.count(-1)} layers and raises it in {effects.count(1)}"
    return text + "."


def _last_norm(members: Sequence[AnalyzedRun]) -> str:
    layers = members[0].trained.places
    if not layers or layers[-1].name != LAST:
        return ""
    trained, untrained = (mean_over_seeds(members, r_at(-1), trained=when) for when in (True, False))
    kind = "the delivered PE" if layers[-1].delivered else "the raw PE (none is delivered)"
    return f"At the Last LN, r with {kind} is {_number(trained)}; before training, {_number(untrained)}."


def _beta(members: Sequence[AnalyzedRun]) -> str:
    own = mean_over_seeds(members, lambda f: Estimate(f.last.beta_variance))
    effective = mean_over_seeds(members, lambda f: Estimate(f.last.beta_variance_effective))
    text = f"The variance of the Last LN's beta is {own.value:.3g}"
    if members[0].trained.last.shift is not None:
        text += f", and {effective.value:.3g} including what the delivered PE adds to the mean token"
    return text + "."


def _get_slope(findings: Findings) -> Estimate:
    assert findings.slope is not None
    return findings.slope


def _sign(value: Estimate) -> int:
    """-1 or 1 if the interval excludes 0; 0 if it includes 0 or there is none."""
    if value.interval is None:
        return 0
    return -1 if value.interval.high < 0 else int(value.interval.low > 0)


def _number(value: Estimate) -> str:
    text = f"{value.value:+.3f}" if abs(value.value) >= 0.001 else f"{value.value:+.1e}"
    return text if value.interval is None else f"{text} ({value.interval.low:+.3f} to {value.interval.high:+.3f})"


def _percent(members: Sequence[AnalyzedRun]) -> str:
    return f"{100 * sum(member.trained.accuracy for member in members) / len(members):.2f} %"
