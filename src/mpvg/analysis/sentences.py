"""The findings in words. Every sentence follows from the numbers, and says so if they show no effect."""

from collections.abc import Callable, Sequence

from mpvg import statistics
from mpvg.analysis.comparison import why_inconclusive
from mpvg.analysis.findings import AnalyzedRun, Estimate, Findings
from mpvg.analysis.numbers import estimate_text
from mpvg.analysis.probe import LAST


def make_sentences(members: Sequence[AnalyzedRun]) -> list[str]:
    """Summarizes runs that differ in the seed only; intervals are over seeds, or over images for a single run.

    From fewer than `comparison.MIN_SEEDS` runs, or if the accuracy of one is near chance, nothing is concluded: the
    sentences then give numbers only, and the reason.

    Args:
        members: the runs, at least one.
    """
    inconclusive = why_inconclusive(members)
    kind = f"{len(members)} seeds" if len(members) > 1 else "One run"
    sentences = [f"{kind}, {members[0].trained.images:,} images each, accuracy {_percent(members)}."]
    if inconclusive:
        sentences.append(f"These are numbers, and nothing is concluded from them: {inconclusive}.")
    sentences.append(_slope(members, conclude=not inconclusive))
    sentences += _correlations(members, conclude=not inconclusive)
    return [sentence for sentence in (*sentences, _last_norm(members), _beta(members)) if sentence]


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


def _slope(members: Sequence[AnalyzedRun], *, conclude: bool) -> str:
    findings = members[0].trained
    if findings.slope is None:
        return "Fewer than two layers receive a PE, so there is no slope over depth."
    layers = f"layers {findings.slope_layers[0]} to {findings.slope_layers[-1]}"
    delivered = any(layer.delivered for layer in findings.places)
    kind = "r" if delivered else "r with the raw PE, which they do not receive,"
    trained, untrained = (mean_over_seeds(members, _get_slope, trained=when) for when in (True, False))
    text = (
        f"Over {layers}, {kind} changes by {estimate_text(trained)} per layer; before training, by "
        f"{estimate_text(untrained)}."
    )
    if len(members) == 1:
        return text
    change = training_effect(members, _get_slope)
    text += f" Training changes this slope by {estimate_text(change)}"
    if not conclude:
        return f"{text}."
    verdict = {
        -1: "training makes the correlation fall with depth",
        0: "no effect shown, because the interval includes 0",
        1: "training makes the correlation rise with depth",
    }[_sign(change)]
    paper = {-1: ", as the paper says", 0: "", 1: ", against the paper's claim"}[_sign(change)] if delivered else ""
    return f"{text}: {verdict}{paper}."


def _correlations(members: Sequence[AnalyzedRun], *, conclude: bool) -> list[str]:
    """One sentence on the layers that receive a PE, and one on those whose tokens are compared with the raw PE."""
    layers = [(index, layer) for index, layer in enumerate(members[0].trained.places) if layer.name != LAST]
    sentences = []
    for delivered in (True, False):
        chosen = [(index, layer.name) for index, layer in layers if layer.delivered == delivered]
        if not chosen:
            continue
        indices, names = [index for index, _ in chosen], [name for _, name in chosen]
        where = f"layer {names[0]}" if len(names) == 1 else f"layers {names[0]} to {names[-1]}"
        if delivered:
            text = f"r with the PE that is delivered to {where} is {_range(members, indices, names)}"
            counted = "Tokens and delivered PE are opposed"
        else:
            text = (
                f"No PE is delivered to {where}: there, tokens are compared with the raw PE that they do not receive, "
                f"which says nothing about a delivered PE. This r is {_range(members, indices, names)}"
            )
            counted = "It is negative"
        sentences.append(f"{text}. {_count(members, indices, counted)}" if conclude else f"{text}.")
    return sentences


def _range(members: Sequence[AnalyzedRun], indices: Sequence[int], names: Sequence[str]) -> str:
    """The smallest and the largest r of some layers."""
    values = {name: mean_over_seeds(members, r_at(i)) for i, name in zip(indices, names, strict=True)}
    ordered = sorted(values, key=lambda name: values[name].value)
    texts = [f"{estimate_text(values[name])} in layer {name}" for name in dict.fromkeys((ordered[0], ordered[-1]))]
    return f"between {' and '.join(texts)}" if len(texts) > 1 else texts[0]


def _count(members: Sequence[AnalyzedRun], indices: Sequence[int], counted: str) -> str:
    signs = [_sign(mean_over_seeds(members, r_at(index))) for index in indices]
    effects = [_sign(training_effect(members, r_at(index))) for index in indices]
    return (
        f"{counted} (the whole interval of r is below 0) in {signs.count(-1)} of these {len(indices)}; "
        f"training lowers r in {effects.count(-1)} and raises it in {effects.count(1)}."
    )


def _last_norm(members: Sequence[AnalyzedRun]) -> str:
    layers = members[0].trained.places
    if not layers or layers[-1].name != LAST:
        return ""
    trained, untrained = (mean_over_seeds(members, r_at(-1), trained=when) for when in (True, False))
    kind = "the delivered PE" if layers[-1].delivered else "the raw PE (none is delivered)"
    return f"At the Last LN, r with {kind} is {estimate_text(trained)}; before training, {estimate_text(untrained)}."


def _beta(members: Sequence[AnalyzedRun]) -> str:
    own = mean_over_seeds(members, lambda f: Estimate(f.last.beta_variance))
    effective = mean_over_seeds(members, lambda f: Estimate(f.last.beta_variance_effective))
    text = f"The variance of the Last LN's beta is {_plain(own)}"
    if members[0].trained.last.shift is not None:
        text += f", and {_plain(effective)} including what the delivered PE adds to the mean token"
    return text + "."


def _plain(value: Estimate) -> str:
    """The value without its interval."""
    return estimate_text(Estimate(value.value), signed=False)


def _get_slope(findings: Findings) -> Estimate:
    assert findings.slope is not None
    return findings.slope


def _sign(value: Estimate) -> int:
    """-1 or 1 if the interval excludes 0; 0 if it includes 0 or there is none."""
    if value.interval is None:
        return 0
    return -1 if value.interval.high < 0 else int(value.interval.low > 0)


def _percent(members: Sequence[AnalyzedRun]) -> str:
    mean = statistics.mean_and_interval([member.trained.accuracy for member in members])
    return f"{estimate_text(Estimate(*mean), scale=100, signed=False)} %"
