"""The numbers that follow from one pass over images, as values that JSON can store."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpvg import statistics
from mpvg.analysis.probe import LAST, LastNormStats, LayerStats, ProbeResult
from mpvg.analysis.sensitivity import Sensitivity
from mpvg.models.network import DeliveredNetwork, delivered_network
from mpvg.runs import Run
from mpvg.statistics import Interval, MeanCorrelation

MIN_IMAGES_PER_GROUP = 2
"""Every bootstrap group needs at least this many images for an interval."""
ROUNDING = 1e-12
"""A part with less than this share of a variance is rounding of float32 numbers, and correlates with nothing."""


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval; None: there are too few images or runs for an interval."""

    value: float
    interval: Interval | None = None

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval excludes 0; 0 if it includes 0 or there is none."""
        if self.interval is None:
            return 0
        return -1 if self.interval.high < 0 else int(self.interval.low > 0)


@dataclass(frozen=True, kw_only=True)
class LayerFindings:
    """A layer, or the Last LN: its tokens after the LN compared with its PE, over all patches and channels.

    The field names are keys of results.json.
    """

    name: str
    """The layer's number, or "Last LN"."""
    delivered: bool
    """Whether the method delivers a PE to this layer; otherwise the tokens are compared with the raw PE."""
    r: Estimate
    """Pearson's r of the tokens' mean over images (Figs. 2, 4, 8)."""
    r_constant: Estimate
    """Pearson's r of the constant parts: the means over patches, `statistics.split_positions`."""
    r_positional: Estimate
    """Pearson's r of the positional parts, which is what is left of the tokens' mean and of the PE."""
    covariance_constant: Estimate
    """The constant parts' share of the covariance; below 0 or above 1 if the two parts' r have opposite signs. No
    interval if that of r includes 0: a share of a covariance that may be 0 can be any number."""
    covariance_positional: Estimate
    """The positional parts' share of the covariance; the two shares add up to 1."""
    variance_constant: Estimate
    """The constant part's share of the variance of the tokens' mean, in [0, 1]; the rest is positional."""
    pe_variance_constant: float
    """The same of the PE."""
    r_each: Estimate
    """Pearson's r of every single image, averaged over images."""
    spearman: float
    """Spearman's correlation of the tokens' mean over images."""
    cosine: Estimate
    """Cosine similarity of the tokens' mean over images."""
    r_before: float
    """Pearson's r of the tokens' mean before the LN."""
    pe_rank: float
    """Effective rank of the PE."""
    pe_spectrum: list[float]
    """Share of the PE's power at 1, 2, ... cycles per image."""


@dataclass(frozen=True, kw_only=True)
class LastNormFindings:
    """The Last LN (Fig. 6). The field names are keys of results.json."""

    gamma: list[float]
    """Its weight."""
    beta: list[float]
    """Its bias."""
    shift: list[float] | None
    """What the delivered PE adds to the mean over patches; a PE of 0 and beta + shift would give the same outputs."""
    beta_variance: float
    """Population variance of beta over channels."""
    beta_variance_effective: float
    """Population variance of beta + shift."""
    mean_token: Estimate
    """Cosine similarity of the mean over patches before and after, including the delivered PE; mean over images."""
    mean_token_bare: Estimate
    """The same without the delivered PE."""
    class_token: Estimate | None
    """The same for the class token; None: there is no class token."""
    rows: list[float] | None
    """The same for every token, class token first; None if one vector per image is normalized."""
    auc_before: Estimate | None
    """How well a token's norm before the Last LN separates object from background; 0.5: not at all (Fig. 7)."""
    auc_behind: Estimate | None
    """The same after the Last LN."""

    @property
    def channels(self) -> dict[str, list[float]]:
        """The curves of Fig. 6: name -> a value per channel."""
        curves = {"gamma": self.gamma, "beta": self.beta}
        if self.shift is not None:
            curves["beta + PE's mean"] = [beta + shift for beta, shift in zip(self.beta, self.shift, strict=True)]
        return curves


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was measured in one network. The field names are keys of results.json."""

    images: int
    """Number of images."""
    accuracy: float
    """On these images."""
    places: list[LayerFindings]
    """All layers in order, then the Last LN."""
    slope: Estimate | None
    """Change of r per layer, over the layers that receive a PE, or over all layers if none does."""
    slope_layers: list[int]
    """The numbers of these layers."""
    last: LastNormFindings
    missing: list[str]
    """What could not be measured, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; undefined numbers become None."""
        values: dict[str, Any] = without_nan(asdict(self))
        return values


@dataclass(frozen=True)
class Scores:
    """How well a network classifies."""

    accuracy: float
    """In [0, 1]."""
    nll: float
    """Mean negative log-likelihood of the targets, in nats."""
    images: int
    """Number of images."""


@dataclass(frozen=True, kw_only=True)
class AnalyzedRun:
    """A run and its findings."""

    run: Run
    name: str
    """The run folder's name."""
    trained: Findings
    """Of the trained network."""
    untrained: Findings
    """Of the network at initialization, as a control."""
    result: ProbeResult
    """The sums from which `trained` was computed."""
    recorded: Scores | None
    """Of this checkpoint on all validation images, as recorded in training; None: there is no such record."""
    sensitivity: Sensitivity | None
    """None: not measured."""

    @property
    def measured(self) -> Scores:
        """The scores on the analyzed images."""
        return Scores(self.trained.accuracy, self.result.nll / self.result.images, self.result.images)


RunsByConfig = Mapping[str, Sequence[AnalyzedRun]]
"""Name of a config -> its runs, which differ in the seed only."""


def layer_names(groups: RunsByConfig) -> list[str]:
    """Names of the layers of the deepest network; the others have the first of them."""
    return max(([layer.name for layer in members[0].trained.places] for members in groups.values()), key=len)


def summarize(model: nn.Module, result: ProbeResult) -> Findings:
    """Computes the findings from what one pass over images has collected.

    Args:
        model: the network that `result` was collected from.
        result: see `mpvg.analysis.probe.collect`.
    """
    network = delivered_network(model)
    enough = bool((result.counts >= MIN_IMAGES_PER_GROUP).all())
    weights = statistics.resamples(len(result.counts)) if enough else None
    missing = []
    if not enough:
        needed = MIN_IMAGES_PER_GROUP * len(result.counts)
        missing.append(f"{result.images} images are too few for confidence intervals; at least {needed} are needed")
    places, draws = [], {}
    for stats in result.layers:
        if stats.pe is None:
            missing.append(f"{stats.name}: no PE is delivered to it, and the raw PE belongs to another stage")
            continue
        found, draws[stats.name] = _layer(stats, result.counts, weights)
        places.append(found)
    if result.last.rows is None:
        missing.append(f"{LAST}: it normalizes a single vector per image, so there are no patches to compare")
    if not any(place.delivered for place in places):
        missing.append(
            "the method delivers no PE: tokens are compared with the raw PE, which the layers do not receive"
        )
    layers = [p for p in places if p.name != LAST and p.delivered] or [p for p in places if p.name != LAST]
    return Findings(
        images=result.images,
        accuracy=result.correct / result.images,
        places=places,
        slope=_slope(layers, draws),
        slope_layers=[int(layer.name) for layer in layers],
        last=_last_norm(network, result.last, weights),
        missing=missing,
    )


def _layer(stats: LayerStats, counts: Tensor, weights: Tensor | None) -> tuple[LayerFindings, Tensor | None]:
    """The findings of a layer, and its r in each resample."""
    assert stats.pe is not None
    mean = MeanCorrelation(stats.after, counts, stats.pe)
    draws = None if weights is None else mean.pearson(weights)
    r = _estimate(float(mean.pearson()), draws)
    constant, positional = parts(stats.after, counts, stats.pe, mean, r, weights)
    side = round(len(stats.pe) ** 0.5)
    found = LayerFindings(
        name=stats.name,
        delivered=stats.delivered,
        r=r,
        r_constant=constant.r,
        r_positional=positional.r,
        covariance_constant=constant.covariance,
        covariance_positional=positional.covariance,
        variance_constant=constant.variance,
        pe_variance_constant=constant.pe_variance,
        r_each=_mean(stats.image_r, weights),
        spearman=statistics.spearman(mean.mean, mean.target),
        cosine=_estimate(float(mean.cosine()), None if weights is None else mean.cosine(weights)),
        r_before=statistics.pearson(stats.before, stats.pe),
        pe_rank=statistics.effective_rank(stats.pe),
        pe_spectrum=statistics.spectrum(stats.pe, (side, side)),
    )
    return found, draws


class Part(NamedTuple):
    """What the constant or the positional part has of a layer's r, covariance and variances."""

    r: Estimate
    covariance: Estimate
    variance: Estimate
    pe_variance: float


def parts(
    sums: Tensor, counts: Tensor, pe: Tensor, whole: MeanCorrelation, r: Estimate, weights: Tensor | None = None
) -> tuple[Part, Part]:
    """The constant and the positional part of a layer, given the whole and its r; other arguments as its."""
    split = zip(statistics.split_positions(sums), statistics.split_positions(pe), strict=True)
    constant, positional = (_part(MeanCorrelation(maps, counts, one), whole, r, weights) for maps, one in split)
    return constant, positional


def _part(part: MeanCorrelation, whole: MeanCorrelation, r: Estimate, weights: Tensor | None) -> Part:
    """A part of a layer, given the whole and its r."""

    def estimate(value: Callable[[Tensor | None], Tensor], *, interval: bool = True) -> Estimate:
        return _estimate(float(value(None)), value(weights) if interval and weights is not None else None)

    variance = estimate(lambda drawn: part.variance(drawn) / whole.variance(drawn))
    pe_variance = part.pe_variance / whole.pe_variance if whole.pe_variance > 0 else math.nan
    known = variance.value > ROUNDING and pe_variance > ROUNDING
    return Part(
        r=estimate(part.pearson) if known else Estimate(math.nan),
        covariance=estimate(lambda drawn: part.covariance(drawn) / whole.covariance(drawn), interval=r.sign != 0),
        variance=variance,
        pe_variance=pe_variance,
    )


def _slope(layers: list[LayerFindings], draws: dict[str, Tensor | None]) -> Estimate | None:
    """Slope of r over depth; `draws` holds r of each layer in each resample."""
    if len(layers) < 2:
        return None
    depths = torch.tensor([float(layer.name) for layer in layers])
    value = float(statistics.slope(torch.tensor([layer.r.value for layer in layers], dtype=torch.float64), depths))
    known = [r for layer in layers if (r := draws[layer.name]) is not None]
    return _estimate(value, statistics.slope(torch.stack(known, dim=-1), depths) if known else None)


def _last_norm(network: DeliveredNetwork, stats: LastNormStats, weights: Tensor | None) -> LastNormFindings:
    beta = network.norm.bias.detach().cpu().double()
    delivered = network.deliver(network.raw_pos_embed()).last
    shift = None
    if delivered is not None and network.global_pool == "avg":
        shift = network.pool(delivered)[0].detach().cpu().double()
    auc = None if stats.auc is None else [_mean(stats.auc, weights, index) for index in (0, 1)]
    return LastNormFindings(
        gamma=network.norm.weight.detach().cpu().double().tolist(),
        beta=beta.tolist(),
        shift=None if shift is None else shift.tolist(),
        beta_variance=statistics.variance(beta),
        beta_variance_effective=statistics.variance(beta if shift is None else beta + shift),
        mean_token=_mean(stats.mean_token, weights),
        mean_token_bare=_mean(stats.mean_token_bare, weights),
        class_token=None if stats.class_token is None else _mean(stats.class_token, weights),
        rows=None if stats.rows is None else stats.rows.mean().tolist(),
        auc_before=None if auc is None else auc[0],
        auc_behind=None if auc is None else auc[1],
    )


def _mean(values: statistics.GroupedMean, weights: Tensor | None, index: int | None = None) -> Estimate:
    """The mean over images, of the entry at an index if there are several values per image."""
    mean, draws = values.mean(), None if weights is None else values.mean(weights)
    if index is not None:
        mean, draws = mean[index], None if draws is None else draws[:, index]
    return _estimate(float(mean), draws)


def _estimate(value: float, draws: Tensor | None) -> Estimate:
    if draws is None or not draws.isfinite().all():
        return Estimate(value)
    return Estimate(value, statistics.bootstrap_interval(value, draws))


def without_nan(value: Any) -> Any:
    """Replaces NaN and infinite numbers, which JSON does not have, by None, also inside dicts and lists."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
