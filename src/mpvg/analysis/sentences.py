"""The findings in words. Every sentence follows from the numbers, and says so if they show no effect."""

import math
from collections.abc import Callable, Sequence

from mpvg import statistics
from mpvg.analysis.comparison import why_inconclusive
from mpvg.analysis.findings import AnalyzedRun, Estimate, Findings, RunsByConfig
from mpvg.analysis.numbers import UNDEFINED, estimate_text
from mpvg.analysis.probe import LAST
from mpvg.analysis.sensitivity import KINDS


def make_sentences(members: Sequence[AnalyzedRun], references: RunsByConfig) -> list[str]:
    """Summarizes runs that differ in the seed only; intervals are over seeds, or over images for a single run.

    From fewer than `comparison.MIN_SEEDS` runs, or if the accuracy of one is near chance, nothing is concluded: the
    sentences then give numbers only, and the reason.

    Args:
        members: the runs, at least one.
        references: see `references_of`.
    """
    inconclusive = why_inconclusive(members)
    kind = f"{len(members)} seeds" if len(members) > 1 else "One run"
    sentences = [f"{kind}, {members[0].trained.images:,} images each, accuracy {_percent(members)}."]
    if inconclusive:
        sentences.append(f"These are numbers, and nothing is concluded from them: {inconclusive}.")
    sentences.append(_slope(members, conclude=not inconclusive))
    sentences += _correlations(members, conclude=not inconclusive)
    sentences += [_last_norm(members), *_references(members, references, conclude=not inconclusive), _beta(members)]
    sentences.append(_replacements(members, conclude=not inconclusive))
    return [sentence for sentence in sentences if sentence]


def references_of(members: Sequence[AnalyzedRun], groups: RunsByConfig) -> RunsByConfig:
    """The runs of a report to which no PE is delivered (GAP), with the same network and data, as a control of r."""
    config = members[0].run.config
    return {
        name: others
        for name, others in groups.items()
        if not _receives(others)
        and (others[0].run.config.model, others[0].run.config.data) == (config.model, config.data)
    }


def mean_over_seeds(
    members: Sequence[AnalyzedRun], value: Callable[[Findings], Estimate], trained: bool = True
) -> Estimate:
    """Mean of a value over seeds with Student's t interval; for a single run, its value and interval over images."""
    estimates = [value(member.trained if trained else member.untrained) for member in members]
    if len(estimates) == 1:
        return estimates[0]
    mean, interval = statistics.mean_and_interval([estimate.value for estimate in estimates])
    return Estimate(mean, interval if math.isfinite(mean) else None)


def value_at(index: int, name: str = "r") -> Callable[[Findings], Estimate]:
    """Returns a function that reads a field of LayerFindings of a layer, given its index in `Findings.places`."""

    def read(findings: Findings) -> Estimate:
        value: Estimate | float = getattr(findings.places[index], name)
        return value if isinstance(value, Estimate) else Estimate(value)

    return read


def change_over_seeds(
    members: Sequence[AnalyzedRun], index: int, kind: str, score: str, less: str | None = None
) -> Estimate | None:
    """Mean over seeds of a change of `Sensitivity.importance`, given its index there; None: it was not measured.

    Args:
        members: runs that differ in the seed only.
        index: place in `Sensitivity.importance`.
        kind: one of `sensitivity.KINDS`.
        score: field of `sensitivity.Change`.
        less: another kind, whose change is subtracted in each seed.
    """
    places = [one.sensitivity.importance[index] for one in members if one.sensitivity is not None]
    changes = [[getattr(place, name) for name in (kind, less) if name is not None] for place in places]
    if not changes or any(change is None for pair in changes for change in pair):
        return None
    values = [[float(getattr(change, score)) for change in pair] for pair in changes]
    return Estimate(*statistics.mean_and_interval([pair[0] - sum(pair[1:]) for pair in values]))


def training_effect(members: Sequence[AnalyzedRun], value: Callable[[Findings], Estimate]) -> Estimate:
    """Mean over seeds of the change during training: the trained value minus the untrained one of the same seed."""
    return Estimate(*statistics.mean_and_interval([value(m.trained).value - value(m.untrained).value for m in members]))


def _slope(members: Sequence[AnalyzedRun], *, conclude: bool) -> str:
    findings = members[0].trained
    if findings.slope is None:
        return "Fewer than two layers receive a PE, so there is no slope over depth."
    layers = f"layers {findings.slope_layers[0]} to {findings.slope_layers[-1]}"
    delivered = _receives(members)
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
    }[change.sign]
    paper = {-1: ", as the paper says", 0: "", 1: ", against the paper's claim"}[change.sign] if delivered else ""
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
        for value, part in (("r_constant", "of the means over patches"), ("r_positional", "of what is left")):
            text = f" {value}, {part}, is {_range(members, indices, names, value)}."
            sentences[-1] += f"{text} {_count(members, indices, 'It is negative', value)}" if conclude else text
    return sentences


def _range(members: Sequence[AnalyzedRun], indices: Sequence[int], names: Sequence[str], value: str = "r") -> str:
    """The smallest and the largest r, or other value, of some layers."""
    values = {name: mean_over_seeds(members, value_at(i, value)) for i, name in zip(indices, names, strict=True)}
    known = {name: estimate for name, estimate in values.items() if math.isfinite(estimate.value)}
    ordered = sorted(known, key=lambda name: known[name].value)
    texts = [f"{estimate_text(known[name])} in layer {name}" for name in dict.fromkeys((*ordered[:1], *ordered[-1:]))]
    undefined = [] if len(known) == len(values) else [f"{UNDEFINED} in {len(values) - len(known)} of {len(values)}"]
    between = f"between {' and '.join(texts)}" if len(texts) > 1 else "".join(texts)
    return ", ".join([*([between] if between else []), *undefined])


def _count(members: Sequence[AnalyzedRun], indices: Sequence[int], counted: str, value: str = "r") -> str:
    signs = [mean_over_seeds(members, value_at(index, value)).sign for index in indices]
    effects = [training_effect(members, value_at(index, value)).sign for index in indices]
    return (
        f"{counted} (the whole interval of {value} is below 0) in {signs.count(-1)} of these {len(indices)}; "
        f"training lowers {value} in {effects.count(-1)} and raises it in {effects.count(1)}."
    )


def _references(members: Sequence[AnalyzedRun], references: RunsByConfig, *, conclude: bool) -> list[str]:
    """r of networks to which no PE is delivered, for the runs of a method that delivers one."""
    if not _receives(members):
        return []
    if not references:
        return [
            "This report has no run of the same network and data to which no PE is delivered (GAP). Its r with the raw "
            "PE can be negative too, so a negative r alone does not show what a delivered PE does."
        ]
    sentences = []
    for name, others in references.items():
        layers = [(index, layer.name) for index, layer in enumerate(others[0].trained.places) if layer.name != LAST]
        indices, names = [index for index, _ in layers], [name for _, name in layers]
        text = f"For comparison, {name} receives no PE: its r with the raw PE is {_range(others, indices, names)}"
        if others[0].trained.slope is not None:
            text += f", and changes by {estimate_text(mean_over_seeds(others, _get_slope))} per layer"
        if conclude and not why_inconclusive(others):
            text += f". {_count(others, indices, 'It is negative')[:-1]}"
        sentences.append(f"{text}.")
    return sentences


def _last_norm(members: Sequence[AnalyzedRun]) -> str:
    layers = members[0].trained.places
    if not layers or layers[-1].name != LAST:
        return ""
    trained, untrained = (mean_over_seeds(members, value_at(-1), trained=when) for when in (True, False))
    kind = "the delivered PE" if layers[-1].delivered else "the raw PE (none is delivered)"
    parts = [
        f"{name} {estimate_text(mean_over_seeds(members, value_at(-1, name)))}"
        for name in ("r_constant", "r_positional")
    ]
    return (
        f"At the Last LN, r with {kind} is {estimate_text(trained)} ({', '.join(parts)}); before training, r is "
        f"{estimate_text(untrained)}."
    )


def _beta(members: Sequence[AnalyzedRun]) -> str:
    own = mean_over_seeds(members, lambda f: Estimate(f.last.beta_variance))
    effective = mean_over_seeds(members, lambda f: Estimate(f.last.beta_variance_effective))
    text = f"The variance of the Last LN's beta is {_plain(own)}"
    if members[0].trained.last.shift is not None:
        text += f", and {_plain(effective)} including what the delivered PE adds to the mean token"
    return text + "."


def _replacements(members: Sequence[AnalyzedRun], *, conclude: bool) -> str:
    """The changes at the place where removal of the PE costs most, and how often it costs more than a replacement."""
    first = members[0].sensitivity
    if first is None or not first.importance:
        return ""
    places = range(len(first.importance))

    def lost(index: int) -> float:
        change = change_over_seeds(members, index, "removed", "nll")
        return -math.inf if change is None else change.value

    worst = max(places, key=lost)
    name, neighbor = first.importance[worst].name, first.importance[worst].neighbor
    texts, counts = [], []
    for kind, words in KINDS.items():
        points, nats = (change_over_seeds(members, worst, kind, score) for score in ("accuracy", "nll"))
        if points is not None and nats is not None:
            named = f"{words} ({neighbor})" if kind == "swapped" else words
            texts.append(f"{named} {estimate_text(points, scale=100)} points and {estimate_text(nats)} nats")
        more = [change_over_seeds(members, index, "removed", "nll", less=kind) for index in places]
        if kind != "removed":
            counts.append(f"{words} in {[one.sign for one in more if one is not None].count(1)}")
    where = name if name == LAST else f"layer {name}"
    text = f"Changes of accuracy and NLL at {where}, where removal of the PE costs most: {'; '.join(texts)}."
    if not conclude:
        return text
    return (
        f"{text} Of {len(places)} places, removal raises the NLL by more (the whole interval of the difference is "
        f"above 0) than {', '.join(counts)}."
    )


def _receives(members: Sequence[AnalyzedRun]) -> bool:
    """Whether a layer or the Last LN receives a PE."""
    return any(layer.delivered for layer in members[0].trained.places)


def _plain(value: Estimate) -> str:
    """The value without its interval."""
    return estimate_text(Estimate(value.value), signed=False)


def _get_slope(findings: Findings) -> Estimate:
    assert findings.slope is not None
    return findings.slope


def _percent(members: Sequence[AnalyzedRun]) -> str:
    mean = statistics.mean_and_interval([member.trained.accuracy for member in members])
    return f"{estimate_text(Estimate(*mean), scale=100, signed=False)} %"
