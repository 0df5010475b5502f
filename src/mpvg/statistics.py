"""Correlations, intervals and other statistics, computed on float64 tensors."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
"""Bootstrap resamples from which an interval is computed."""
CONFIDENCE_LEVEL = 0.95
"""Confidence level of every interval."""
ALPHA = 0.05
"""Level of every test but that of a control."""


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation over all entries of two tensors of the same shape; NaN if one of them is constant."""
    return cosine(centered(a), centered(b))


def centered(values: Tensor) -> Tensor:
    """Flattens a tensor and subtracts its mean; the result is exactly 0 if all entries are equal, despite rounding."""
    values = values.double().flatten()
    return torch.zeros_like(values) if values.min() == values.max() else values - values.mean()


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation over all entries: Pearson's correlation of their ranks; ties get their mean rank."""
    from scipy.stats import rankdata

    return pearson(*(torch.from_numpy(rankdata(value.double().flatten().numpy())) for value in (a, b)))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity over all entries of two tensors; NaN if one of them is zero."""
    a, b = a.double().flatten(), b.double().flatten()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else math.nan


def variance(values: Tensor, *, correction: int = 0) -> float:
    """Variance over all entries: of the population by default, of a sample with `correction=1`."""
    return float(values.double().var(correction=correction))


def auc(scores: Tensor, inside: Tensor) -> float:
    """Probability that a score inside an object is larger than one outside (ties count half).

    Args:
        scores: one number per position.
        inside: boolean mask of the same shape: which positions are inside the object.

    Returns:
        A value in [0, 1]; NaN if no position is inside, or none is outside.
    """
    from scipy.stats import rankdata

    inside = inside.flatten()
    positives, negatives = int(inside.sum()), int((~inside).sum())
    if not positives or not negatives:
        return math.nan
    ranks = torch.from_numpy(rankdata(scores.double().flatten().numpy()))
    return float(ranks[inside].sum() - positives * (positives + 1) / 2) / (positives * negatives)


def effective_rank(matrix: Tensor) -> float:
    """Exponential of the entropy of the normalized singular values (Roy and Vetterli, 2007).

    Args:
        matrix: `(rows, channels)`.

    Returns:
        A value between 1 and the rank of the matrix; NaN if all entries are 0.
    """
    values = torch.linalg.svdvals(matrix.double())
    if not values.any():
        return math.nan
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def spectrum(pe: Tensor, grid: tuple[int, int]) -> list[float]:
    """Share of a position embedding's power at each spatial frequency, without its mean over the grid.

    Args:
        pe: `(N, C)`, one row per patch.
        grid: number of rows and columns of patches.

    Returns:
        The shares at frequencies of 1, 2, ... cycles per image (the radius, rounded); they add up to 1.
    """
    height, width = grid
    power = torch.fft.fft2(pe.double().T.reshape(-1, height, width)).abs().square().sum(dim=0)
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
    radius = (rows[:, None] ** 2 + columns**2).sqrt().round().long().flatten()
    by_radius = torch.zeros(int(radius.max()) + 1, dtype=torch.float64).index_add_(0, radius, power.flatten())[1:]
    shares: list[float] = (by_radius / by_radius.sum()).tolist()
    return shares


def slope(values: Tensor, positions: Tensor) -> Tensor:
    """Least-squares slope of values `(..., L)` over positions `(L,)`."""
    centered = positions.double() - positions.double().mean()
    result: Tensor = (values.double() * centered).sum(dim=-1) / centered.square().sum()
    return result


def resamples(groups: int, draws: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Draws bootstrap resamples: how often each group occurs in each of them, `(draws, groups)`, float64."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(groups, (draws, groups), generator=generator)
    counts = torch.zeros(draws, groups, dtype=torch.float64)
    return counts.scatter_add_(1, chosen, torch.ones(draws, groups, dtype=torch.float64))


def bootstrap_interval(value: float, draws: Tensor) -> Interval:
    """The basic bootstrap interval of a value.

    It is the basic interval, not the percentile interval. A resample contains fewer different images than the sample,
    so its mean is noisier and correlates less; in the same way the sample correlates less than the population. The
    basic interval corrects for this bias, because it mirrors the resamples at the value.

    Args:
        value: computed from the whole sample.
        draws: the same, computed from each resample, `(draws,)`.
    """
    tail = (1 - CONFIDENCE_LEVEL) / 2
    low, high = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(2 * value - high, 2 * value - low)


def proportion_interval(share: float, count: int) -> Interval:
    """Wilson's interval of a share in [0, 1] of `count` independent cases."""
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(CONFIDENCE_LEVEL, dtype=torch.float64)))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At 0 and 1 the end is exact; computed, it may be beside it in the last bit.
    return Interval(0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half)


def mean_and_interval(values: list[float]) -> tuple[float, Interval | None]:
    """Mean of independent repetitions with its Student's t interval; None instead of an interval for a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    found = weighted_means({"all": 1}, {"all": values})
    return found.value, found.interval


def difference_and_interval(values: list[float], others: list[float]) -> tuple[float, Interval | None]:
    """Difference of the means of two samples with Welch's t interval; None instead of it if one has a single value."""
    if min(len(values), len(others)) < 2:
        return float(np.mean(values) - np.mean(others)), None
    found = weighted_means({"first": 1, "second": -1}, {"first": values, "second": others})
    return found.value, found.interval


class WeightedMeans(NamedTuple):
    """A weighted sum of the means of independent samples, such as a difference."""

    value: float
    error: float
    """Standard error."""
    degrees: float
    """Of freedom, Welch's and Satterthwaite's."""

    @property
    def interval(self) -> Interval:
        """Welch's t interval."""
        from scipy.stats import t

        half = float(t.ppf((1 + CONFIDENCE_LEVEL) / 2, self.degrees)) * self.error
        return Interval(self.value - half, self.value + half)

    @property
    def p(self) -> float:
        """Welch's t test of 0, two-sided."""
        from scipy.stats import t

        size = abs(self.value) / self.error if self.error else math.inf if self.value else 0.0
        return float(2 * t.sf(size, self.degrees))

    def equivalence_p(self, margin: float) -> float:
        """Of a size of at least the margin: the larger p of two one-sided Welch tests (TOST)."""
        from scipy.stats import t

        room = margin - abs(self.value)
        if self.error == 0:
            return 0.0 if room > 0 else 1.0
        return float(t.sf(room / self.error, self.degrees))


def weighted_means(weights: Mapping[str, float], samples: Mapping[str, Sequence[float]]) -> WeightedMeans:
    """The sum over the names of `weights` of weight times mean of the sample, of at least two values each."""
    value = sum(weight * float(np.mean(samples[name])) for name, weight in weights.items())
    squares = {name: w**2 * float(np.var(samples[name], ddof=1)) / len(samples[name]) for name, w in weights.items()}
    total = sum(squares.values())
    if total == 0:
        return WeightedMeans(value, 0.0, math.inf)
    degrees = total**2 / sum(square**2 / (len(samples[name]) - 1) for name, square in squares.items())
    return WeightedMeans(value, math.sqrt(total), degrees)


def holm(ps: Sequence[float]) -> list[float]:
    """Each p, corrected by Holm's method for all of them."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(ps, method="holm")[1]] if len(ps) > 1 else list(ps)


def verdict(difference: float, *, differs: bool, equivalent: str | None, undecided: str) -> str:
    """The word for a difference; docs/statistics.md says when which is used.

    Args:
        difference: its sign says higher or lower.
        differs: whether a test shows it.
        equivalent: what it is if it is shown to be smaller than the margin, such as "equivalent within 0.01"; None: it
            is not shown.
        undecided: what to say if neither is shown.
    """
    if differs:
        direction = "higher" if difference > 0 else "lower"
        return direction if equivalent is None else f"{direction}, but {equivalent}"
    return undecided if equivalent is None else equivalent


def split_positions(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Splits maps into what is the same at every position, and the rest.

    Position n and channel c of a map is a_nc = m_c + d_nc, with m_c the mean over positions (the constant part) and
    d_nc the rest (the positional part), which adds up to 0 over n. So for two maps, with g the mean over all entries,
    sum_nc (m_c - g) d'_nc = sum_c (m_c - g) sum_n d'_nc = 0: over all entries, the covariance of the maps is that of
    their constant parts plus that of their positional parts, and so is each variance. The mean g belongs to neither
    share: the centering removes it from the constant part, and the positional part has none.

    Args:
        maps: `(..., N, C)`.

    Returns:
        The constant part `(..., 1, C)` and the positional part `(..., N, C)`; the latter is exactly 0 in a channel
        whose entries are all equal, despite rounding. Covariances and variances are per entry, so that one row is
        enough.
    """
    maps = maps.double()
    equal = maps.amin(dim=-2, keepdim=True) == maps.amax(dim=-2, keepdim=True)
    constant = torch.where(equal, maps[..., :1, :], maps.mean(dim=-2, keepdim=True))
    return constant, maps - constant


class MeanCorrelation:
    """Correlation of a weighted mean of token maps with a position embedding (PE), for many sets of weights.

    The images are divided into groups, and only the sum of each group is kept. A weighted mean is linear in these sums,
    so that its inner products follow from their Gram matrix: a bootstrap resample needs no pass over the maps.

    Args:
        sums: sum of the maps of each group, `(G, N, C)`, float64.
        counts: number of images in each group, `(G,)`.
        pe: `(N, C)`.
    """

    def __init__(self, sums: Tensor, counts: Tensor, pe: Tensor) -> None:
        maps, target = sums.flatten(1), pe.double().flatten()
        self.maps, self.target, self.counts = maps, target, counts.double()
        self._gram, self._inner, self._norm = maps @ maps.T, maps @ target, float(target.norm())
        around, centered_target = maps - maps.mean(dim=1, keepdim=True), centered(target)
        self._centered = around @ around.T, around @ centered_target, float(centered_target.norm())

    @property
    def mean(self) -> Tensor:
        """The mean map over all images, flattened to `(N * C,)`."""
        return self.maps.sum(dim=0) / self.counts.sum()

    def pearson(self, weights: Tensor | None = None) -> Tensor:
        """Pearson's r of the mean map and the PE.

        Args:
            weights: how often each group counts, `(draws, G)`; None: every group counts once.

        Returns:
            `(draws,)`; `(1,)` without weights.
        """
        return self._ratio(weights, *self._centered)

    def cosine(self, weights: Tensor | None = None) -> Tensor:
        """Cosine similarity of the mean map and the PE; arguments and result as for `pearson`."""
        return self._ratio(weights, self._gram, self._inner, self._norm)

    def covariance(self, weights: Tensor | None = None) -> Tensor:
        """Covariance of the mean map and the PE over their entries; arguments and result as for `pearson`."""
        weights = self._known(weights)
        return (weights @ self._centered[1]) / (weights @ self.counts * len(self.target))

    def variance(self, weights: Tensor | None = None) -> Tensor:
        """Variance of the mean map over its entries; arguments and result as for `pearson`."""
        weights = self._known(weights)
        return _squared(weights, self._centered[0]) / ((weights @ self.counts).square() * len(self.target))

    @property
    def pe_variance(self) -> float:
        """Variance of the PE over its entries."""
        return self._centered[2] ** 2 / len(self.target)

    def _known(self, weights: Tensor | None) -> Tensor:
        return torch.ones_like(self.counts)[None] if weights is None else weights

    def _ratio(self, weights: Tensor | None, gram: Tensor, inner: Tensor, norm: float) -> Tensor:
        weights = self._known(weights)
        return (weights @ inner) / (_squared(weights, gram).sqrt() * norm)


def _squared(weights: Tensor, gram: Tensor) -> Tensor:
    """Squared norm of each weighted sum."""
    return torch.einsum("dg,gh,dh->d", weights, gram, weights)


class GroupedMean:
    """Mean over images of one value per image, from sums over groups of images; NaNs are ignored.

    Args:
        groups: number of groups.
        shape: shape of the value of one image.
    """

    def __init__(self, groups: int, *shape: int) -> None:
        self.sums = torch.zeros(groups, *shape, dtype=torch.float64)
        self.counts = torch.zeros(groups, *shape, dtype=torch.float64)

    def add(self, group: Tensor, values: Tensor) -> None:
        """Adds the values `(B, ...)` of some images, which are in the groups `(B,)`."""
        known = ~values.isnan()
        self.sums.index_add_(0, group, values.double().nan_to_num(0.0))
        self.counts.index_add_(0, group, known.double())

    def mean(self, weights: Tensor | None = None) -> Tensor:
        """The mean, of the shape of one value; for weights `(draws, G)` one mean per row, `(draws, ...)`."""
        if weights is None:
            return self.sums.sum(dim=0) / self.counts.sum(dim=0)
        return torch.tensordot(weights, self.sums, 1) / torch.tensordot(weights, self.counts, 1)
