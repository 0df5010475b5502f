"""What one pass over images says about a network, in numbers that JSON can hold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpvg.analysis import statistics
from mpvg.analysis.beyond import Beyond
from mpvg.analysis.probe import LAST, Collected, Place
from mpvg.analysis.statistics import Interval, MeanCorrelation
from mpvg.runs import Run

FEWEST = 2
"""Images that every group needs for an interval."""


@dataclass(frozen=True)
class Value:
    """A number, and where it lies by a bootstrap over groups of images; None: too few images."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class PlaceFindings:
    """A layer, or the Last LN: its tokens behind the LN against its PE, over all patches and channels."""

    name: str
    """The layer's number, or "Last LN"."""
    delivered: bool
    """Whether the method delivers a PE there; otherwise the tokens are compared with the raw PE."""
    r: Value
    """Pearson's r of the tokens' mean over images (Figs. 2, 4, 8)."""
    r_each: Value
    """Mean over images of every image's own r."""
    spearman: float
    """Spearman's correlation of the mean."""
    cosine: Value
    """Cosine similarity of the mean."""
    r_before: float
    """Pearson's r of the mean before the LN."""
    pe_rank: float
    """Effective rank of the PE."""
    pe_spectrum: list[float]
    """Share of the PE's power at 1, 2, ... cycles over the image."""


@dataclass(frozen=True, kw_only=True)
class LastFindings:
    """The Last LN (Fig. 6)."""

    gamma: list[float]
    beta: list[float]
    shift: list[float] | None
    """What the delivered PE adds to the mean over patches: beta + shift is the beta of an equal network without it."""
    beta_variance: float
    """Over channels, of the population."""
    beta_variance_effective: float
    """The same of beta + shift."""
    mean_token: Value
    """Mean over images of the cosine similarity of the mean over patches before and behind, delivered PE included."""
    mean_token_bare: Value
    """The same without the delivered PE."""
    class_token: Value | None
    """The same for the class token; None: there is none."""
    rows: list[float] | None
    """The same for every token, class token first."""
    auc_before: Value | None
    """How well the norm of a token before the Last LN tells object from background; 0.5: not at all (Fig. 7)."""
    auc_behind: Value | None
    """The same behind it."""

    @property
    def channels(self) -> dict[str, list[float]]:
        """What Fig. 6 draws over the channels, by name."""
        curves = {"gamma": self.gamma, "beta": self.beta}
        if self.shift is not None:
            curves["beta + PE's mean"] = [beta + shift for beta, shift in zip(self.beta, self.shift, strict=True)]
        return curves


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A network on some images."""

    images: int
    accuracy: float
    places: list[PlaceFindings]
    slope: Value | None
    """Change of r from one layer to the next, over the layers that a PE is delivered to, or all if to none."""
    slope_layers: list[int]
    """The layers that it is of."""
    last: LastFindings
    missing: list[str]
    """What could not be found, and why."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values; what is undefined is None."""
        values: dict[str, Any] = without_nan(asdict(self))
        return values


@dataclass(frozen=True, kw_only=True)
class Analysed:
    """A run, and what was found in it."""

    run: Run
    name: str
    """The run folder's name."""
    trained: Findings
    untrained: Findings
    """The control: of the network that its training began with."""
    collected: Collected
    """What the trained network showed."""
    beyond: Beyond | None


Groups = Mapping[str, Sequence[Analysed]]
"""Runs that differ in the seed only, by name."""


def place_names(groups: Groups) -> list[str]:
    """Names of the places, of the run that has most: the places of the others are the first of them."""
    return max(([place.name for place in members[0].trained.places] for members in groups.values()), key=len)


def summarise(model: nn.Module, collected: Collected) -> Findings:
    """Makes numbers of what one pass over images has collected."""
    network: Any = model
    enough = bool((collected.counts >= FEWEST).all())
    weights = statistics.resamples(len(collected.counts)) if enough else None
    missing = []
    if not enough:
        needed = FEWEST * len(collected.counts)
        missing.append(f"{collected.images} images are too few for an interval; allowed: {needed} or more")
    places, drawn = [], {}
    for place in collected.places:
        if place.pe is None:
            missing.append(f"{place.name}: nothing is delivered there, and the raw PE is of another stage")
            continue
        found, drawn[place.name] = _place(place, collected, weights)
        places.append(found)
    if collected.last.rows is None:
        missing.append(f"{LAST}: it normalises the one vector that is read out, which has no patches to compare")
    if not any(place.delivered for place in places):
        missing.append(
            "the method delivers no PE: tokens are compared with the raw PE, which they do not receive there"
        )
    layers = [p for p in places if p.name != LAST and p.delivered] or [p for p in places if p.name != LAST]
    return Findings(
        images=collected.images,
        accuracy=collected.correct / collected.images,
        places=places,
        slope=_slope(layers, drawn),
        slope_layers=[int(place.name) for place in layers],
        last=_last(network, collected, weights),
        missing=missing,
    )


def _place(place: Place, collected: Collected, weights: Tensor | None) -> tuple[PlaceFindings, Tensor | None]:
    """A place's findings, and r in each resample."""
    assert place.pe is not None
    mean = MeanCorrelation(place.normed, collected.counts, place.pe)
    draws = None if weights is None else mean.pearson(weights)
    side = round(len(place.pe) ** 0.5)
    found = PlaceFindings(
        name=place.name,
        delivered=place.delivered,
        r=_value(float(mean.pearson()), draws),
        r_each=_of_each(place.each, weights),
        spearman=statistics.spearman(mean.mean, mean.target),
        cosine=_value(float(mean.cosine()), None if weights is None else mean.cosine(weights)),
        r_before=statistics.pearson(place.tokens, place.pe),
        pe_rank=statistics.effective_rank(place.pe),
        pe_spectrum=statistics.spectrum(place.pe, (side, side)),
    )
    return found, draws


def _slope(layers: list[PlaceFindings], drawn: dict[str, Tensor | None]) -> Value | None:
    if len(layers) < 2:
        return None
    where = torch.tensor([float(place.name) for place in layers])
    value = float(statistics.slope(torch.tensor([place.r.value for place in layers], dtype=torch.float64), where))
    draws = [drawn[place.name] for place in layers]
    together = torch.stack([d for d in draws if d is not None], dim=-1) if None not in draws else None
    return _value(value, None if together is None else statistics.slope(together, where))


def _last(network: Any, collected: Collected, weights: Tensor | None) -> LastFindings:
    last = collected.last
    beta = network.norm.bias.detach().cpu().double()
    delivered = network.deliver(network.position()).last
    averages = delivered is not None and network.global_pool == "avg"
    shift = network.pool(delivered)[0].detach().cpu().double() if averages else None
    auc = None if last.auc is None else [_of_each(last.auc, weights, at) for at in (0, 1)]
    return LastFindings(
        gamma=network.norm.weight.detach().cpu().double().tolist(),
        beta=beta.tolist(),
        shift=None if shift is None else shift.tolist(),
        beta_variance=statistics.variance(beta),
        beta_variance_effective=statistics.variance(beta if shift is None else beta + shift),
        mean_token=_of_each(last.mean_token, weights),
        mean_token_bare=_of_each(last.mean_token_bare, weights),
        class_token=None if last.class_token is None else _of_each(last.class_token, weights),
        rows=None if last.rows is None else last.rows.mean().tolist(),
        auc_before=None if auc is None else auc[0],
        auc_behind=None if auc is None else auc[1],
    )


def _of_each(values: statistics.GroupedMean, weights: Tensor | None, at: int | None = None) -> Value:
    """The mean over images of a value each, or of one of several."""
    mean, draws = values.mean(), None if weights is None else values.mean(weights)
    if at is not None:
        mean, draws = mean[at], None if draws is None else draws[:, at]
    return _value(float(mean), draws)


def _value(value: float, draws: Tensor | None) -> Value:
    if draws is None or not draws.isfinite().all():
        return Value(value)
    return Value(value, statistics.interval(value, draws))


def without_nan(value: Any) -> Any:
    """Dicts and lists with None for every number that is NaN or infinite, which JSON has none of."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
