"""The statistics of the paper's analysis, on float64 tensors; what the paper leaves open is an argument."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 1000
"""Resamples behind an interval."""
LEVEL = 0.95
"""Coverage of every interval."""


class Interval(NamedTuple):
    """Where a value lies."""

    low: float
    high: float


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation over all entries of two tensors of one shape; NaN where one is constant."""
    return cosine(centred(a), centred(b))


def centred(values: Tensor) -> Tensor:
    """All entries less their mean, flat; zeros where they are equal, which a rounded mean would miss."""
    values = values.double().flatten()
    return torch.zeros_like(values) if values.min() == values.max() else values - values.mean()


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation over all entries: Pearson's of their ranks, ties by their mean."""
    from scipy.stats import rankdata

    return pearson(*(torch.from_numpy(rankdata(value.double().flatten().numpy())) for value in (a, b)))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity over all entries of two tensors; NaN where one is zero."""
    a, b = a.double().flatten(), b.double().flatten()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else math.nan


def variance(values: Tensor, *, correction: int = 0) -> float:
    """Variance over channels: of the population (default), or the sample's with a correction of 1."""
    return float(values.double().var(correction=correction))


def auc(scores: Tensor, inside: Tensor) -> float:
    """Probability that a score inside an object is larger than one outside; NaN where there is no inside or outside."""
    from scipy.stats import rankdata

    inside = inside.flatten()
    ones, zeros = int(inside.sum()), int((~inside).sum())
    if not ones or not zeros:
        return math.nan
    ranks = torch.from_numpy(rankdata(scores.double().flatten().numpy()))
    return float(ranks[inside].sum() - ones * (ones + 1) / 2) / (ones * zeros)


def effective_rank(matrix: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007), of rows by channels.

    NaN where all entries are 0.
    """
    values = torch.linalg.svdvals(matrix.double())
    if not values.any():
        return math.nan
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def spectrum(pe: Tensor, grid: tuple[int, int]) -> list[float]:
    """Share of a PE's power at each spatial frequency, the mean over the grid left out.

    Args:
        pe: `(N, C)`, a row a patch.
        grid: rows and columns of patches.

    Returns:
        Shares for radii of 1, 2, ... cycles over the image, rounded; they add up to 1.
    """
    height, width = grid
    power = torch.fft.fft2(pe.double().T.reshape(-1, height, width)).abs().square().sum(dim=0)
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
    radius = (rows[:, None] ** 2 + columns**2).sqrt().round().long().flatten()
    by_radius = torch.zeros(int(radius.max()) + 1, dtype=torch.float64).index_add_(0, radius, power.flatten())[1:]
    shares: list[float] = (by_radius / by_radius.sum()).tolist()
    return shares


def slope(values: Tensor, places: Tensor) -> Tensor:
    """Least-squares slope of values `(..., L)` over places `(L,)`."""
    centred = places.double() - places.double().mean()
    result: Tensor = (values.double() * centred).sum(dim=-1) / centred.square().sum()
    return result


def resamples(groups: int, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """How often each group is drawn in each bootstrap resample, `(draws, groups)`, float64."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(groups, (draws, groups), generator=generator)
    counts = torch.zeros(draws, groups, dtype=torch.float64)
    return counts.scatter_add_(1, chosen, torch.ones(draws, groups, dtype=torch.float64))


def interval(value: float, draws: Tensor) -> Interval:
    """The basic bootstrap interval of a value, from what it is in each resample `(draws,)`.

    Basic, not percentile: a mean over fewer different images is noisier, so that its correlation is weaker in every
    resample than in the sample, as it is weaker there than over all images; taking off that difference corrects for it.
    """
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(2 * value - high, 2 * value - low)


def over_seeds(values: list[float]) -> tuple[float, Interval | None]:
    """Mean over repetitions, and Student's interval of it; None for a single one."""
    from scipy.stats import t

    sample = torch.tensor(values, dtype=torch.float64)
    mean, count = float(sample.mean()), len(values)
    if count < 2:
        return mean, None
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * float(sample.std()) / math.sqrt(count)
    return mean, Interval(mean - half, mean + half)


class MeanCorrelation:
    """Correlation of a mean map with a PE, for any weights of groups of images, from sums over the groups.

    A weighted mean is linear in the sums, so its inner products need the groups' Gram matrix only, and a resample costs
    no pass over the maps.

    Args:
        sums: sum of the maps of each group, `(G, N, C)`, float64.
        counts: images of each group, `(G,)`.
        pe: `(N, C)`.
    """

    def __init__(self, sums: Tensor, counts: Tensor, pe: Tensor) -> None:
        maps, target = sums.flatten(1), pe.double().flatten()
        self.maps, self.target, self.counts = maps, target, counts.double()
        self._gram, self._inner, self._norm = maps @ maps.T, maps @ target, float(target.norm())
        around, centred_target = maps - maps.mean(dim=1, keepdim=True), centred(target)
        self._centred = around @ around.T, around @ centred_target, float(centred_target.norm())

    @property
    def mean(self) -> Tensor:
        """The mean map, flat."""
        return self.maps.sum(dim=0) / self.counts.sum()

    def pearson(self, weights: Tensor | None = None) -> Tensor:
        """Pearson's r of the mean map, `(draws,)` for weights `(draws, G)`; one value without."""
        return self._ratio(weights, *self._centred)

    def cosine(self, weights: Tensor | None = None) -> Tensor:
        """The same for cosine similarity."""
        return self._ratio(weights, self._gram, self._inner, self._norm)

    def _ratio(self, weights: Tensor | None, gram: Tensor, inner: Tensor, norm: float) -> Tensor:
        weights = torch.ones_like(self.counts)[None] if weights is None else weights
        squared = torch.einsum("dg,gh,dh->d", weights, gram, weights)
        return (weights @ inner) / (squared.sqrt() * norm)


class GroupedMean:
    """Mean over images of a value each, and its interval, from sums over groups of images; NaNs are left out.

    Args:
        groups: number of groups.
        shape: of each value.
    """

    def __init__(self, groups: int, *shape: int) -> None:
        self.sums = torch.zeros(groups, *shape, dtype=torch.float64)
        self.counts = torch.zeros(groups, *shape, dtype=torch.float64)

    def add(self, group: Tensor, values: Tensor) -> None:
        """Adds a value each of some images, `(B, ...)`, to the groups `(B,)` that they are in."""
        known = ~values.isnan()
        self.sums.index_add_(0, group, values.double().nan_to_num(0.0))
        self.counts.index_add_(0, group, known.double())

    def mean(self, weights: Tensor | None = None) -> Tensor:
        """The mean, `(...)`; for weights `(draws, G)`: `(draws, ...)`."""
        if weights is None:
            return self.sums.sum(dim=0) / self.counts.sum(dim=0)
        return torch.tensordot(weights, self.sums, 1) / torch.tensordot(weights, self.counts, 1)
