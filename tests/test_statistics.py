"""Every statistic against the textbook: worked examples, plain loops, numpy and scipy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from mpvg import statistics
from mpvg.statistics import GroupedMean, MeanCorrelation


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- how two tensors go together


def test_worked_examples() -> None:
    """Deviations (-1, 0, 1) and (-4/3, -1/3, 5/3): their product is 3, their squares add up to 2 and 42/9."""
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])
    assert statistics.pearson(a, b) == pytest.approx(3 / math.sqrt(2 * 42 / 9), abs=1e-12)
    assert statistics.spearman(a, b) == pytest.approx(1.0, abs=1e-12)
    assert statistics.cosine(a, b) == pytest.approx(17 / math.sqrt(14 * 21), abs=1e-12)
    assert statistics.cosine(a, torch.tensor([3.0, 0.0, -1.0])) == 0.0
    # Ranks (1, 2.5, 2.5, 4) and (2, 1, 3, 4): the deviations' product is 3, their squares add up to 4.5 and 5.
    tied, other = torch.tensor([1.0, 5.0, 5.0, 9.0]), torch.tensor([20.0, 10.0, 30.0, 40.0])
    assert statistics.spearman(tied, other) == pytest.approx(3 / math.sqrt(4.5 * 5), abs=1e-12)
    values = torch.tensor([1.0, 2.0, 6.0])
    assert statistics.variance(values) == pytest.approx(14 / 3, abs=1e-12)
    assert statistics.variance(values, correction=1) == pytest.approx(7, abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_correlations_are_numpys_and_scipys(offset: float) -> None:
    """Over all entries; also far from 0, where sums of squares would lose their digits, and of float32."""
    a = noise(7, 5) + offset
    b = (0.3 * a - 0.3 * offset + noise(7, 5)) * 2 - offset
    assert statistics.pearson(a, b) == pytest.approx(np.corrcoef(a.flatten(), b.flatten())[0, 1], abs=1e-10)
    dots, norms = float((a * b).sum()), math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    assert statistics.cosine(a, b) == pytest.approx(dots / norms, abs=1e-10)
    ties = (3 * a).round(), (2 * b).round()
    expected = scipy.stats.spearmanr(*(value.flatten().numpy() for value in ties)).statistic
    assert statistics.spearman(*ties) == pytest.approx(expected, abs=1e-10)
    halves = (a.float(), b.float())
    expected = np.corrcoef(halves[0].double().flatten(), halves[1].double().flatten())[0, 1]
    assert statistics.pearson(*halves) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("count", [2, 3, 7, 10, 49, 100, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3, 1e8 + 0.1])
def test_nothing_correlates_with_a_constant(value: float, count: int) -> None:
    """Also where a mean of equal values is not that value, in floating point."""
    constant, other = torch.full((count,), value, dtype=torch.float64), noise(count)
    for pair in ((constant, other), (other, constant), (constant, constant)):
        assert math.isnan(statistics.pearson(*pair))
        assert math.isnan(statistics.spearman(*pair))
    sums, ones = torch.stack([other, noise(count)])[..., None], torch.ones(2)
    assert MeanCorrelation(sums, ones, constant[:, None]).pearson().isnan().all()
    if value == 0.0:
        assert math.isnan(statistics.cosine(constant, other))
        assert MeanCorrelation(sums, ones, constant[:, None]).cosine().isnan().all()


def test_auc_counts_pairs() -> None:
    """Every pair of one inside and one outside: 1 where the inside's is larger, a half where they are equal."""
    for ones in (1, 4, 11):
        scores = torch.randint(5, (12,)).double()
        inside = torch.arange(12)[torch.randperm(12)] < ones
        points = 0.0
        for i in range(12):
            for j in range(12):
                if inside[i] and not inside[j]:
                    points += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
        assert statistics.auc(scores, inside) == pytest.approx(points / (ones * (12 - ones)), abs=1e-12)
    scores = torch.arange(6.0)
    assert statistics.auc(scores, scores > 3) == 1.0
    assert statistics.auc(scores, scores < 2) == 0.0
    assert statistics.auc(torch.ones(6), scores < 2) == 0.5
    assert math.isnan(statistics.auc(scores, scores < 0))
    assert math.isnan(statistics.auc(scores, scores < 9))


# ---- what a PE is like


def test_effective_rank_of_known_matrices() -> None:
    for k in (1, 2, 5):
        assert statistics.effective_rank(torch.eye(k)) == pytest.approx(k, abs=1e-10)
    assert statistics.effective_rank(3 * torch.outer(noise(6), noise(4))) == pytest.approx(1.0, abs=1e-6)
    one_in_four = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert statistics.effective_rank(one_in_four) == pytest.approx(math.exp(entropy), abs=1e-10)
    turned = torch.linalg.qr(noise(5, 5)).Q[:, :2] @ one_in_four.double() @ torch.linalg.qr(noise(3, 3)).Q[:2]
    assert statistics.effective_rank(turned) == pytest.approx(math.exp(entropy), abs=1e-6)
    assert math.isnan(statistics.effective_rank(torch.zeros(3, 2)))


GRIDS = [(7, 7), (8, 8), (6, 9), (14, 4)]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_wave_has_all_its_power_at_its_frequency(grid: tuple[int, int]) -> None:
    """Along rows and along columns, with any phase, gain and offset, in any channel; a row of the PE is a patch."""
    height, width = grid
    for axis, size in enumerate(grid):
        for cycles in range(1, size // 2 + 1):
            pe = torch.full((height * width, 3), 5.0, dtype=torch.float64)
            for patch in range(height * width):
                at = divmod(patch, width)[axis]
                pe[patch, 1] += 2 * math.cos(2 * math.pi * cycles * at / size + 0.3)
                pe[patch, 2] += math.sin(2 * math.pi * cycles * at / size + 0.3)
            found = statistics.spectrum(pe, grid)
            expected = [float(k == cycles) for k in range(1, len(found) + 1)]
            assert found == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_spectrum_is_the_squared_fourier_sums(grid: tuple[int, int]) -> None:
    height, width = grid
    pe = noise(height * width, 2)
    power: dict[int, float] = {}
    for v in range(-((height - 1) // 2), height // 2 + 1):
        for u in range(-((width - 1) // 2), width // 2 + 1):
            for channel in range(2):
                total = 0j
                for patch in range(height * width):
                    row, column = divmod(patch, width)
                    turn = -2j * math.pi * (v * row / height + u * column / width)
                    total += float(pe[patch, channel]) * np.exp(turn)
                radius = round(math.hypot(u, v))
                power[radius] = power.get(radius, 0.0) + abs(total) ** 2
    del power[0]
    shares = [power.get(radius, 0.0) / sum(power.values()) for radius in range(1, max(power) + 1)]
    found = statistics.spectrum(pe, grid)
    assert found == pytest.approx(shares, abs=1e-10)
    assert sum(found) == pytest.approx(1.0, abs=1e-12)


def test_slopes_of_lines_and_of_scattered_points() -> None:
    places = torch.tensor([1.0, 2.0, 3.0, 5.0])
    lines = torch.stack([2.5 - 0.75 * places, 0 * places + 4, -1 + 1e-3 * places]).double()
    assert statistics.slope(lines, places).tolist() == pytest.approx([-0.75, 0.0, 1e-3], abs=1e-7)
    values = noise(2, 4)
    expected = [np.polyfit(places.numpy(), row.numpy(), 1)[0] for row in values]
    assert statistics.slope(values, places).tolist() == pytest.approx(expected, abs=1e-10)


# ---- intervals


def test_resamples_draw_as_many_groups_as_there_are_and_are_seeded() -> None:
    counts = statistics.resamples(7, 4000, seed=3)
    assert counts.shape == (4000, 7)
    assert counts.dtype == torch.float64
    assert (counts.sum(dim=1) == 7).all()
    assert torch.equal(counts, statistics.resamples(7, 4000, seed=3))
    assert not torch.equal(counts, statistics.resamples(7, 4000, seed=4))
    assert len(statistics.resamples(7)) == statistics.RESAMPLES == 1000
    # A group is drawn binomially: 1 on average, and not at all in (6/7)^7 of the resamples.
    assert counts.mean(dim=0).tolist() == pytest.approx([1.0] * 7, abs=0.06)
    assert (counts == 0).double().mean(dim=0).tolist() == pytest.approx([(6 / 7) ** 7] * 7, abs=0.03)
    before = torch.get_rng_state()
    statistics.resamples(3)
    assert torch.equal(before, torch.get_rng_state())


def test_an_interval_is_the_basic_one() -> None:
    """Percentiles of the draws, mirrored at the value: what the draws lie too low by, the value lies too low by."""
    draws = torch.arange(1001.0)[torch.randperm(1001)]
    assert statistics.bootstrap_interval(600.0, draws) == pytest.approx((1200 - 975, 1200 - 25), abs=1e-9)
    draws = noise(333)
    low, high = np.percentile(draws.numpy(), [2.5, 97.5])
    assert statistics.bootstrap_interval(0.1, draws) == pytest.approx((0.2 - high, 0.2 - low), abs=1e-10)


def test_the_interval_of_a_correlation_covers_the_truth_where_percentiles_leave_even_r_out() -> None:
    """In a resample the mean map is noisier and r weaker, so that percentiles would leave r itself out."""
    outside, covered = 0, 0
    pe, other = noise(2, 1500)
    truth = 0.8 * pe + 0.6 * other
    weights = statistics.resamples(20, 300)
    for _ in range(100):
        sums = truth * 2 + noise(20, 1500) * math.sqrt(2)  # 40 images with noise of 1 each
        correlation = MeanCorrelation(sums[..., None], torch.full((20,), 2), pe[:, None])
        r, draws = float(correlation.pearson()), correlation.pearson(weights)
        low, high = statistics.bootstrap_interval(r, draws)
        outside += float(torch.quantile(draws, 0.975)) < r
        covered += low <= statistics.pearson(truth, pe) <= high
    assert outside > 50
    assert covered > 80


def test_students_interval_over_seeds() -> None:
    """The table's t for 4 degrees of freedom is 2.776; deviations of 1 to 5 have a standard deviation of sqrt(2.5)."""
    mean, interval = statistics.mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451052 * math.sqrt(2.5) / math.sqrt(5)
    assert mean == 3.0
    assert interval == pytest.approx((3 - half, 3 + half), abs=1e-8)
    mean, interval = statistics.mean_and_interval([0.2, 0.6])
    assert mean == pytest.approx(0.4)
    assert interval == pytest.approx((0.4 - 12.7062047364 * 0.2, 0.4 + 12.7062047364 * 0.2), abs=1e-8)
    assert statistics.mean_and_interval([0.7]) == (0.7, None)


def repeated(values: Tensor, group: list[int], weights: list[int]) -> list[Tensor]:
    """The images of a resample: each as often as its group was drawn."""
    return [value for value, g in zip(values, group, strict=True) for _ in range(weights[g])]


GROUP = [0, 1, 2, 0, 1, 2, 0, 1, 0]
"""Of nine images; the groups differ in size."""
WEIGHTS = [[1, 1, 1], [0, 3, 0], [2, 0, 1], [0, 1, 2], [3, 0, 0]]


def test_a_resampled_correlation_is_that_of_the_repeated_images() -> None:
    pe, images = noise(4, 5) + 0.5, noise(9, 4, 5) + 0.3 * noise(4, 5)
    sums = torch.zeros(3, 4, 5, dtype=torch.float64)
    for image, g in zip(images, GROUP, strict=True):
        sums[g] += image
    correlation = MeanCorrelation(sums, torch.tensor([4, 3, 2]), pe)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    pearsons, cosines = correlation.pearson(weights), correlation.cosine(weights)
    assert pearsons.shape == cosines.shape == (5,)
    target = pe.flatten().numpy()
    for at, row in enumerate(WEIGHTS):
        mean = np.mean([image.flatten().numpy() for image in repeated(images, GROUP, row)], axis=0)
        cosine = mean @ target / np.sqrt((mean @ mean) * (target @ target))
        assert float(pearsons[at]) == pytest.approx(np.corrcoef(mean, target)[0, 1], abs=1e-10)
        assert float(cosines[at]) == pytest.approx(cosine, abs=1e-10)
    mean = images.numpy().mean(axis=0).flatten()
    assert float(correlation.pearson()) == pytest.approx(np.corrcoef(mean, target)[0, 1], abs=1e-10)
    assert float(correlation.cosine()) == pytest.approx(float(cosines[0]), abs=1e-12)
    assert correlation.mean.numpy() == pytest.approx(mean, abs=1e-12)


def covariances(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Over positions and channels: of two maps, of their token means at every position, and of what is left."""
    total = np.mean((a - a.mean()) * (b - b.mean()))
    means = [np.tile(one.mean(axis=0), (len(one), 1)) for one in (a, b)]
    rest = [one - mean for one, mean in zip((a, b), means, strict=True)]
    of_means = np.mean((means[0] - means[0].mean()) * (means[1] - means[1].mean()))
    return float(total), float(of_means), float(np.mean(rest[0] * rest[1]))


def test_a_covariance_is_that_of_the_constant_parts_plus_that_of_the_positional_parts() -> None:
    """In every resample, in float64; the offsets are a grand mean, which must belong to neither part."""
    pe, images = noise(6, 5) + noise(5) + 3.0, noise(9, 6, 5) + noise(5) - 7.0
    sums = torch.zeros(3, 6, 5, dtype=torch.float64)
    for image, g in zip(images, GROUP, strict=True):
        sums[g] += image
    counts, weights = torch.tensor([4, 3, 2]), torch.tensor(WEIGHTS, dtype=torch.float64)
    split = zip(statistics.split_positions(sums), statistics.split_positions(pe), strict=True)
    whole, constant, positional = (MeanCorrelation(maps, counts, part) for maps, part in [(sums, pe), *split])
    for at, row in enumerate(WEIGHTS):
        mean = np.mean([image.numpy() for image in repeated(images, GROUP, row)], axis=0)
        pairs = [(mean, pe.numpy()), (mean, mean), (pe.numpy(), pe.numpy())]
        expected, variances, pe_variances = (covariances(*pair) for pair in pairs)
        for number, part in enumerate((whole, constant, positional)):
            assert float(part.covariance(weights)[at]) == pytest.approx(expected[number], abs=1e-12)
            assert float(part.variance(weights)[at]) == pytest.approx(variances[number], abs=1e-12)
            assert part.pe_variance == pytest.approx(pe_variances[number], abs=1e-12)
            r = expected[number] / math.sqrt(variances[number] * pe_variances[number])
            assert float(part.pearson(weights)[at]) == pytest.approx(r, abs=1e-12)
        assert expected[1] + expected[2] == pytest.approx(expected[0], abs=1e-13)
    assert float(whole.covariance()) == pytest.approx(float(whole.covariance(weights)[0]), abs=1e-13)
    total = constant.covariance(weights) + positional.covariance(weights)
    assert (total - whole.covariance(weights)).abs().max() < 1e-14
    assert abs(constant.pe_variance + positional.pe_variance - whole.pe_variance) < 1e-14


@pytest.mark.parametrize("positions", [1, 2, 3, 7, 49])
def test_equal_rows_have_no_positional_part(positions: int) -> None:
    """Also where a mean of equal values is not that value, in floating point."""
    rows = noise(5) / 3
    constant, positional = statistics.split_positions(rows.expand(2, positions, 5))
    assert torch.equal(constant, rows.expand(2, 1, 5))
    assert not positional.any()
    pe = noise(positions, 5)
    r = MeanCorrelation(statistics.split_positions(pe[None])[1], torch.ones(1), positional[0]).pearson()
    assert r.isnan().all()


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_a_resampled_mean_is_that_of_the_repeated_images(shape: tuple[int, ...]) -> None:
    """Without the images whose value is NaN, each entry for itself; in batches of any size."""
    values = noise(9, *shape)
    values.view(9, -1)[4, 0] = values.view(9, -1)[0, -1] = math.nan
    grouped = GroupedMean(3, *shape)
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        grouped.add(torch.tensor(GROUP[start:stop]), values[start:stop])
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    found = grouped.mean(weights)
    assert found.shape == (5, *shape)
    for at, row in enumerate(WEIGHTS):
        expected = np.nanmean(np.stack([value.numpy() for value in repeated(values, GROUP, row)]), axis=0)
        assert found[at].numpy() == pytest.approx(expected, abs=1e-10)
    assert grouped.mean().numpy() == pytest.approx(np.nanmean(values.numpy(), axis=0), abs=1e-10)
    assert GroupedMean(3).mean().isnan()


NORMAL: Callable[[int, int], Tensor] = noise


@pytest.mark.parametrize("draw", [NORMAL, lambda *shape: torch.rand(*shape, dtype=torch.float64)])
def test_an_interval_covers_the_truth_about_as_often_as_it_says(draw: Callable[[int, int], Tensor]) -> None:
    """2,000 data sets of 60 images in 20 groups: the bootstrap of a mean of 20 reaches sqrt(19/20) * 1.96 of its
    standard errors, and so, by Student's law with 19 degrees of freedom, 92.9 %.
    """
    sets = 2000
    grouped = GroupedMean(20, sets)
    grouped.add(torch.arange(60) % 20, draw(60, sets))
    truth = 0.0 if draw is NORMAL else 0.5
    columns = grouped.mean(statistics.resamples(20)).T
    found = [
        statistics.bootstrap_interval(float(mean), draws) for mean, draws in zip(grouped.mean(), columns, strict=True)
    ]
    share = sum(low <= truth <= high for low, high in found) / sets
    assert 0.905 < share < 0.95
