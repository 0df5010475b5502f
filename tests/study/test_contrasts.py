"""Statistics against scipy, statsmodels, known answers and simulation."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind

from mpvg.statistics import Interval, weighted_means
from mpvg.study import contrasts
from mpvg.study.contrasts import (
    Result,
    decidable,
    evaluate,
    pooled_sd,
    seeds_to_differ,
    seeds_to_exclude,
    smallest_p,
)
from mpvg.study.plan import Arm, Contrast, Setting, Study

PAIR = {"a": 1.0, "b": -1.0}


def make_study(*weights: dict[str, float], margin: float = 0.5, again: bool = False) -> Study:
    names = sorted({name for one in weights for name in one})
    arms = tuple(Arm(name=name, label=name, set={} if again else {"method": name}) for name in names)
    return Study(
        name="s",
        question="?",
        reference=names[0],
        margins={"nll": margin},
        arms=arms,
        contrasts=tuple(Contrast(name=f"c{number}", weights=one) for number, one in enumerate(weights)),
        scales={"tiny": (Setting(name="x", recipe="digits", seeds=2),)},
    )


def samples(seed: int = 0, **means: float) -> dict[str, list[float]]:
    draw = np.random.default_rng(seed)
    return {name: list(draw.normal(mean, 0.3, 8)) for name, mean in means.items()}


def test_a_difference_is_tested_by_all_permutations_and_by_welch() -> None:
    given = samples(a=1.0, b=0.8)
    (result,) = evaluate(make_study(PAIR), given, "nll")
    values, a = given["a"] + given["b"], np.array(given["a"])
    every = [sum(values[i] for i in chosen) for chosen in itertools.combinations(range(16), 8)]
    extreme = np.abs(2 * np.array(every) / 8 - sum(values) / 8) >= abs(result.difference) - 1e-12
    assert result.p == pytest.approx(extreme.mean(), abs=2e-4)  # 12,870 permutations, without drawing
    welch = stats.ttest_ind(given["a"], given["b"], equal_var=False).confidence_interval(0.95)
    assert result.interval == pytest.approx((welch.low, welch.high))
    assert result.difference == pytest.approx(a.mean() - np.mean(given["b"]))


def test_equivalence_is_that_of_statsmodels() -> None:
    for seed in range(5):
        given = samples(seed, a=1.0, b=0.9)
        (result,) = evaluate(make_study(PAIR, margin=0.4), given, "nll")
        expected = ttost_ind(given["a"], given["b"], -0.4, 0.4, usevar="unequal")[0]
        assert result.p_equivalent == pytest.approx(expected)
        assert result.is_equivalent == (expected < 0.05)


def test_holm_is_over_the_contrasts_and_not_over_controls() -> None:
    study = make_study(PAIR, {"a": 1.0, "c": -1.0}, {"b": 1.0, "c": -1.0})
    results = evaluate(study, samples(a=1.0, b=0.5, c=0.9), "nll")
    assert [r.p_holm for r in results] == pytest.approx(multipletests([r.p for r in results], method="holm")[1])
    (control,) = evaluate(make_study(PAIR, again=True), samples(a=1.0, b=0.5), "nll")
    assert control.is_control
    assert control.p_holm == control.p


def test_an_interaction_has_welch_and_satterthwaites_interval() -> None:
    weights = {"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}
    given = samples(a=1.0, b=0.8, c=0.5, d=0.4)
    (result,) = evaluate(make_study(weights), given, "nll")
    shares = {name: np.var(values, ddof=1) / len(values) for name, values in given.items()}
    error = math.sqrt(sum(shares.values()))
    degrees = error**4 / sum(share**2 / 7 for share in shares.values())
    difference = sum(weight * np.mean(given[name]) for name, weight in weights.items())
    half = stats.t.ppf(0.975, degrees) * error
    assert result.interval == pytest.approx((difference - half, difference + half))
    assert result.p == pytest.approx(2 * stats.t.sf(abs(difference) / error, degrees))


@pytest.mark.parametrize(
    ("sd", "differ", "strict", "exclude"),
    [  # points -> seeds of each arm, at 5 % and at 1.25 %; equivalence within 0.2, 0.3 and 0.5 points
        (0.15, (10, 5, 3, 2), (15, 7, 4, 3), (11, 6, 3)),
        (0.25, (26, 10, 6, 3), (37, 14, 8, 4), (28, 13, 6)),
        (0.5, (100, 35, 17, 6), (141, 50, 24, 8), (108, 49, 18)),
        (0.8, (253, 88, 42, 12), (359, 126, 59, 16), (275, 123, 45)),
    ],
)
def test_the_seeds_that_are_needed(
    sd: float, differ: tuple[int, ...], strict: tuple[int, ...], exclude: tuple[int, ...]
) -> None:
    points = (0.2, 0.34, 0.5, 1.0)
    assert tuple(seeds_to_differ(sd, point) for point in points) == differ
    assert tuple(seeds_to_differ(sd, point, alpha=0.0125) for point in points) == strict
    assert tuple(seeds_to_exclude(sd, point) for point in (0.2, 0.3, 0.5)) == exclude


def test_a_contrast_of_four_arms_needs_twice_the_seeds() -> None:
    four = {"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}
    assert seeds_to_differ(1.0, 0.2, four) == pytest.approx(2 * seeds_to_differ(1.0, 0.2), rel=0.01)


def test_the_smallest_p_of_few_seeds() -> None:
    assert [smallest_p(n) for n in (3, 4, 5)] == pytest.approx([0.1, 0.02857, 0.00794], abs=1e-4)
    given = {"a": [0.0, 0.1, 0.2], "b": [5.0, 5.1, 5.2]}  # as far apart as three seeds can be
    (result,) = evaluate(make_study(PAIR), given, "nll")
    assert result.p == pytest.approx(0.1)
    assert result.word == "undecided: needs 4 seeds (3 cannot show a difference)"


def test_the_seeds_that_are_needed_pass_holms_correction() -> None:
    """With four contrasts, the smallest p of four seeds is 4 x 0.029: it is the fifth that can pass."""
    weights = [{"a": 1.0, name: -1.0} for name in "bcde"]
    apart = {name: [10.0 * place + 0.1 * seed for seed in range(4)] for place, name in enumerate("abcde")}
    results = evaluate(make_study(*weights), apart, "nll")
    assert [r.p_holm for r in results] == pytest.approx([4 * 2 / 70] * 4)
    assert {r.word for r in results} == {"undecided: needs 5 seeds (4 cannot show a difference)"}
    five = {name: [*values, values[-1] + 0.1] for name, values in apart.items()}
    assert {r.word for r in evaluate(make_study(*weights), five, "nll")} == {"lower"}


def test_contrasts_that_are_tested_by_t_take_no_seeds_from_those_by_permutation() -> None:
    four = {"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}
    study = make_study(PAIR, *({name: w * k for name, w in four.items()} for k in (1, 2, 3)))
    given = {name: [level + 0.01 * seed for seed in range(4)] for name, level in zip("abcd", (9, 5, 1, 2), strict=True)}
    results = evaluate(study, given, "nll")
    assert results[0].p_holm == pytest.approx(2 / 70), "three t tests come first, so that nothing is left to correct"
    assert [r.word for r in results] == ["higher"] * 4


def test_the_smallest_p_is_that_of_the_seeds_that_did_not_diverge() -> None:
    assert smallest_p(3, 5) == pytest.approx(2 / 56)
    given = {"a": [5.0, 5.1, 5.2], "b": [0.0, 0.1, 0.2, 0.3, 0.4]}
    (result,) = evaluate(make_study(PAIR), given, "nll")
    assert result.p == pytest.approx(result.smallest_p)
    assert result.word == "higher"


def test_a_control_of_few_seeds_cannot_fail() -> None:
    given = {"a": [0.0, 0.1, 0.2, 0.3], "b": [5.0, 5.1, 5.2, 5.3]}
    (control,) = evaluate(make_study(PAIR, again=True), given, "nll")
    assert not control.can_differ
    (enough,) = evaluate(make_study(PAIR, again=True), {k: [*v, v[-1] + 0.1] for k, v in given.items()}, "nll")
    assert enough.can_differ
    assert enough.differs


def test_what_can_be_decided_is_said_for_the_contrast_that_needs_most() -> None:
    four = {"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}
    pairs = decidable(make_study(PAIR, margin=0.5), 0.5, 17, "nll")
    assert "by 17 seeds of each arm, and excluded by 18: 17 are too few" in pairs
    found, excluded = seeds_to_differ(0.5, 0.5, four, alpha=0.025), seeds_to_exclude(0.5, 0.5, four)
    text = decidable(make_study(PAIR, four), 0.5, 100, "nll")
    assert f"by {found} seeds of each arm, and excluded by {excluded}: 100 are enough" in text
    assert "by 5 seeds of each arm" in decidable(make_study(*({"a": 1.0, x: -1.0} for x in "bcde")), 1e-6, 4, "nll")


def test_the_pooled_spread_is_blind_to_the_means() -> None:
    given = samples(a=1.0, b=0.8, c=3.0)
    moved = {name: [value + 10 * len(name) * ord(name) for value in values] for name, values in given.items()}
    assert pooled_sd(given) == pytest.approx(pooled_sd(moved))
    assert pooled_sd(given) == pytest.approx(math.sqrt(np.mean([np.var(v, ddof=1) for v in given.values()])))


def result(**changes: Any) -> Result:
    values: dict[str, Any] = dict(
        contrast=Contrast(name="c", weights=PAIR),
        metric="nll",
        seeds=8,
        difference=0.1,
        interval=Interval(0.0, 0.2),
        p=0.01,
        p_holm=0.01,
        margin=0.05,
        p_equivalent=0.9,
        needed=12,
        smallest_p=0.001,
        is_control=False,
    )
    return Result(**values | changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "higher"),
        ({"difference": -0.1}, "lower"),
        ({"p_equivalent": 0.01}, "higher, but equivalent within 0.05"),
        ({"p_holm": 0.2, "p_equivalent": 0.01}, "equivalent within 0.05"),
        ({"p_holm": 0.2}, "undecided: needs 12 seeds"),
        ({"p_holm": 0.2, "needed": 8}, "undecided with 8 seeds"),
        ({"p_holm": 0.3, "smallest_p": 0.3}, "undecided: needs 12 seeds (8 cannot show a difference)"),
        ({"p_holm": 0.03, "is_control": True}, "undecided: needs 12 seeds"),  # one control in twenty is so far off
        ({"p_holm": 0.005, "is_control": True}, "higher"),
    ],
)
def test_words_follow_numbers(changes: dict[str, Any], word: str) -> None:
    assert result(**changes).word == word


def test_too_few_seeds_are_named() -> None:
    with pytest.raises(ValueError, match="arm b has 1 seeds; a test needs at least 2"):
        evaluate(make_study(PAIR), {"a": [1.0, 2.0], "b": [1.0]}, "nll")
    with pytest.raises(ValueError, match="no arm has two seeds"):
        pooled_sd({"a": [1.0]})


def test_equal_values_are_no_division_by_zero() -> None:
    (same,) = evaluate(make_study(PAIR), {"a": [1.0, 1.0], "b": [1.0, 1.0]}, "nll")
    assert (same.p, same.p_equivalent, same.interval) == (1.0, 0.0, (0.0, 0.0))


def test_intervals_cover_and_equivalence_keeps_its_size() -> None:
    """With a fixed seed; benchmarks/study_statistics.py prints the same of 1,000 repetitions, with all tests."""
    draw, repetitions = np.random.default_rng(0), 1000
    covered = equivalent = 0
    for _ in range(repetitions):
        given = {"a": draw.normal(1, 1, 8), "b": draw.normal(0, 1, 8)}  # just as far apart as the margin
        low, high = weighted_means(PAIR, given).interval
        covered += low <= 1 <= high
        equivalent += weighted_means(PAIR, given).equivalence_p(1.0) < 0.05
    bound = 3 * math.sqrt(0.05 * 0.95 / repetitions)
    assert covered / repetitions == pytest.approx(0.95, abs=bound)
    assert equivalent / repetitions <= 0.05 + bound


def test_the_permutation_test_keeps_its_size() -> None:
    draw, repetitions = np.random.default_rng(0), 200
    rejected = 0
    for _ in range(repetitions):
        given = {name: list(draw.normal(0, 1, 4)) for name in "ab"}
        rejected += contrasts._two_sided(PAIR, given) < 0.05
    assert 0 < rejected / repetitions <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)
