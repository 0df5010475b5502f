"""Findings in words; every sentence is made from the numbers and can say that there is nothing."""

from collections.abc import Callable, Sequence

from mpvg.analysis import statistics
from mpvg.analysis.findings import Analysed, Findings, Value
from mpvg.analysis.probe import LAST


def say(members: Sequence[Analysed]) -> list[str]:
    """What runs that differ in the seed only say together; intervals are over seeds, or over images for a single run.

    Args:
        members: the runs, at least one.
    """
    first = members[0]
    many = f"{len(members)} seeds" if len(members) > 1 else "one run"
    sentences = [f"{many.capitalize()}, {first.trained.images:,} images each, accuracy {_percent(members)}."]
    sentences.append(_slope(members))
    sentences += [_opposed(members), _last(members), _beta(members)]
    return [sentence for sentence in sentences if sentence]


def over(members: Sequence[Analysed], value: Callable[[Findings], Value], trained: bool = True) -> Value:
    """A value over seeds with Student's interval; of a single run with its own, over images."""
    found = [value(member.trained if trained else member.untrained) for member in members]
    if len(found) == 1:
        return found[0]
    return Value(*statistics.over_seeds([one.value for one in found]))


def r_at(place: int) -> Callable[[Findings], Value]:
    """Reads r at a place, counted from 0."""
    return lambda findings: findings.places[place].r


def gained(members: Sequence[Analysed], value: Callable[[Findings], Value]) -> Value:
    """What training changes: trained minus untrained, seed by seed."""
    return Value(*statistics.over_seeds([value(m.trained).value - value(m.untrained).value for m in members]))


def _slope(members: Sequence[Analysed]) -> str:
    findings = members[0].trained
    if findings.slope is None:
        return "A PE reaches fewer than two layers, so there is no slope over depth."
    layers = f"layers {findings.slope_layers[0]} to {findings.slope_layers[-1]}"
    kind = "" if any(place.delivered for place in findings.places) else " with the raw PE, none being delivered"
    now, before, change = over(members, _of_slope), over(members, _of_slope, trained=False), gained(members, _of_slope)
    numbers = (
        f"From layer to layer r changes by {_number(now)} over {layers}{kind}; before training by {_number(before)}"
    )
    if len(members) == 1:
        return f"{numbers}. One run: what training changes has no interval, so nothing is concluded from it."
    verdict = {
        -1: "training makes the correlation fall with depth",
        0: "no effect shown: the interval of what training changes includes 0",
        1: "training makes the correlation rise with depth, against the paper's claim",
    }[_sign(change)]
    return f"{numbers}. Training changes the slope by {_number(change)}: {verdict}."


def _opposed(members: Sequence[Analysed]) -> str:
    layers = [place.name for place in members[0].trained.places if place.name != LAST]
    signs = [_sign(over(members, r_at(at))) for at in range(len(layers))]
    fallen = [_sign(gained(members, r_at(at))) for at in range(len(layers))]
    if not layers:
        return ""
    text = f"Tokens and PE are opposed (r below 0, interval included) in {signs.count(-1)} of {len(layers)} layers"
    if len(members) > 1:
        text += f"; training lowers r in {fallen.count(-1)} of them and raises it in {fallen.count(1)}"
    return text + "."


def _last(members: Sequence[Analysed]) -> str:
    places = members[0].trained.places
    if not places or places[-1].name != LAST:
        return ""
    now, before = (over(members, r_at(-1), trained) for trained in (True, False))
    kind = "its delivered PE" if places[-1].delivered else "the raw PE, none being delivered there"
    return f"At the Last LN, r with {kind} is {_number(now)}, and {_number(before)} before training."


def _beta(members: Sequence[Analysed]) -> str:
    own = over(members, lambda f: Value(f.last.beta_variance))
    effective = over(members, lambda f: Value(f.last.beta_variance_effective))
    text = f"The variance of the Last LN's beta is {own.value:.3g}"
    if members[0].trained.last.shift is not None:
        text += f", and {effective.value:.3g} with what the delivered PE adds to the mean"
    return text + "."


def _of_slope(findings: Findings) -> Value:
    assert findings.slope is not None
    return findings.slope


def _sign(value: Value) -> int:
    """-1 or 1 where the interval leaves 0 out, otherwise 0; also where there is no interval."""
    if value.interval is None:
        return 0
    return -1 if value.interval.high < 0 else int(value.interval.low > 0)


def _number(value: Value) -> str:
    text = f"{value.value:+.3f}" if abs(value.value) >= 0.001 else f"{value.value:+.1e}"
    return text if value.interval is None else f"{text} ({value.interval.low:+.3f} to {value.interval.high:+.3f})"


def _percent(members: Sequence[Analysed]) -> str:
    return f"{100 * sum(member.trained.accuracy for member in members) / len(members):.2f} %"
