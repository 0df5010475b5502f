"""What a report says in words and in its first table: what follows from the numbers, and when nothing does."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

from mpvg.analysis import comparison
from mpvg.analysis.comparison import compare, least_accuracy, why_inconclusive
from mpvg.analysis.findings import AnalyzedRun, Estimate, Findings, Scores
from mpvg.analysis.sensitivity import KINDS, Change, Importance, Sensitivity
from mpvg.analysis.sentences import make_sentences, references_of
from mpvg.analysis.tables import comparison_table
from mpvg.statistics import Interval, difference_and_interval


def analyzed(
    slope: float = -0.05,
    before: float = 0.0,
    r: float = -0.2,
    *,
    delivered: str = "123",
    accuracy: float = 0.5,
    classes: int = 10,
    recorded: Scores | None = None,
    positional: float | None = 0.01,
    sensitivity: Sensitivity | None = None,
) -> AnalyzedRun:
    """A run of which only what the sentences read is made; `delivered`: layers that receive a PE."""

    def around(value: float) -> Estimate:
        return Estimate(value, Interval(value - 0.05, value + 0.05))

    def findings(value: float, r: float) -> Findings:
        made: Any = object.__new__(Findings)
        places = [
            SimpleNamespace(
                name=name,
                delivered=name in delivered,
                r=around(r),
                r_constant=around(2 * r),
                r_positional=Estimate(math.nan) if positional is None else around(positional),
            )
            for name in "0123"
        ]
        made.__dict__.update(
            images=100,
            accuracy=accuracy,
            slope=Estimate(value, Interval(value - 0.01, value + 0.01)),
            slope_layers=[int(name) for name in delivered or "0123"],
            places=places,
            missing=[],
            last=SimpleNamespace(beta_variance=0.02, beta_variance_effective=0.03, shift=[0.0]),
        )
        return made

    one: Any = object.__new__(AnalyzedRun)
    one.__dict__.update(
        trained=findings(slope, r),
        untrained=findings(before, 0.1),
        name="run",
        run=SimpleNamespace(
            info=SimpleNamespace(num_classes=classes), config=SimpleNamespace(model="vit", data="digits")
        ),
        sensitivity=sensitivity,
        result=SimpleNamespace(nll=150.0, images=100),
        recorded=recorded,
    )
    return one


def seeds(count: int, value: float, spread: float = 0.001) -> list[float]:
    """Values around one, with a small spread."""
    return [value + spread * (number - (count - 1) / 2) for number in range(count)]


CONCLUSIONS = ("fall with depth", "rise with depth", "no effect", "the paper", "opposed", "lowers r")


@pytest.mark.parametrize(
    ("slopes", "verdict"),
    [
        (seeds(5, -0.05), "training makes the correlation fall with depth, as the paper says"),
        (seeds(6, 0.05), "training makes the correlation rise with depth, against the paper's claim"),
        ([-0.05, 0.02, 0.03, -0.01, 0.0], "no effect shown, because the interval includes 0"),
    ],
)
def test_the_verdict_follows_the_numbers(slopes: list[float], verdict: str) -> None:
    sentences = make_sentences([analyzed(slope) for slope in slopes], {})
    assert sentences[1].endswith(f": {verdict}.")
    assert sum(other in sentences[1] for other in CONCLUSIONS[:3]) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [-0.05, 0.05])
def test_nothing_is_concluded_from_fewer_than_five_seeds(count: int, value: float) -> None:
    text = " ".join(make_sentences([analyzed(slope) for slope in seeds(count, value)], {}))
    assert f"nothing is concluded from them: {count} seed" in text
    assert "at least 5 are needed" in text
    assert [word for word in CONCLUSIONS if word in text] == []
    assert re.search(r"r changes by [+-]0\.05", text)


@pytest.mark.parametrize("chance", [0.2, 0.15, 0.1, 0.0])
def test_nothing_is_concluded_near_chance(chance: float) -> None:
    """One seed that has learned nothing is enough."""
    runs = [analyzed(slope) for slope in seeds(7, 0.05)]
    assert why_inconclusive(runs) == ""
    runs[3] = analyzed(0.05, accuracy=chance)
    text = " ".join(make_sentences(runs, {}))
    assert f"the lowest accuracy is {100 * chance:.2f}" in text.replace("15.0 %", "15.00 %")
    assert "20.0 % is needed (twice chance for 10 classes)" in text.replace("20.00", "20.0")
    assert [word for word in CONCLUSIONS if word in text] == []


@pytest.mark.parametrize(("classes", "least"), [(1, 1.0), (2, 0.75), (3, 2 / 3), (4, 0.5), (10, 0.2), (1000, 0.002)])
def test_what_is_needed_can_be_reached_with_any_number_of_classes(classes: int, least: float) -> None:
    assert least_accuracy(classes) == pytest.approx(least, abs=1e-12)
    runs = [analyzed(slope, classes=classes, accuracy=least + 0.001) for slope in seeds(5, 0.05)]
    assert why_inconclusive(runs) == ""
    runs = [analyzed(slope, classes=classes, accuracy=least - 0.001) for slope in seeds(5, 0.05)]
    needed = "halfway from chance" if classes in (1, 2) else "twice chance"
    assert f"{needed}" in why_inconclusive(runs)


def test_an_effect_that_was_there_before_training_is_none() -> None:
    runs = [analyzed(slope, slope + wobble) for slope, wobble in zip(seeds(5, -0.05), seeds(5, 0.0), strict=True)]
    assert "no effect shown" in make_sentences(runs, {})[1]


def test_opposed_layers_are_counted_by_their_intervals() -> None:
    sentences = make_sentences([analyzed(r=r) for r in seeds(5, -0.2)], {})
    assert (
        "Tokens and delivered PE are opposed (the whole interval of r is below 0) in 3 of these 3; training lowers r "
        "in 3 and raises it in 0." in sentences[2]
    )
    sentences = make_sentences([analyzed(r=r) for r in (-0.2, 0.21, 0.01, 0.2, -0.1)], {})
    assert "in 0 of these 3; training lowers r in 0 and raises it in 0." in sentences[2]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("delivered", ["", "123", "0123", "23"])
def test_layers_that_receive_no_pe_are_not_called_opposed(count: int, delivered: str) -> None:
    """GAP receives none, PVG and MPVG none in layer 0, LaPE everywhere."""
    sentences = make_sentences([analyzed(r=r, delivered=delivered) for r in seeds(count, -0.2)], {})
    raw = [text for text in sentences if "compared with the raw PE that they do not receive" in text]
    assert len(raw) == (len(delivered) < 4)
    assert not any("opposed" in text or "paper" in text for text in raw)
    opposed = [text for text in sentences if "opposed" in text]
    assert len(opposed) == (count == 5 and delivered != "")
    assert all(f"of these {len(delivered)};" in text for text in opposed)
    if not delivered:
        assert "r with the raw PE, which they do not receive, changes by" in " ".join(sentences)
        assert "paper" not in " ".join(sentences)


@pytest.mark.parametrize("count", [4, 5])
def test_each_part_is_counted_by_its_own_intervals(count: int) -> None:
    """Here r_constant is twice r, and r_positional is around 0."""
    text = make_sentences([analyzed(r=r) for r in seeds(count, -0.2)], {})[2 if count == 5 else 3]
    assert "r_constant, of the means over patches, is between -0.40" in text
    assert "r_positional, of what is left, is between +0.01" in text
    concluded = (
        "(the whole interval of r_constant is below 0) in 3 of these 3; training lowers r_constant in 3",
        "(the whole interval of r_positional is below 0) in 0 of these 3; training lowers r_positional in 0",
    )
    assert [part in text for part in concluded] == [count == 5] * 2


@pytest.mark.parametrize("count", [1, 5])
def test_a_part_that_is_not_there_is_undefined(count: int) -> None:
    text = " ".join(make_sentences([analyzed(r=r, positional=None) for r in seeds(count, -0.2)], {}))
    assert "r_positional, of what is left, is undefined in 3 of 3." in text
    assert "nan" not in text
    if count == 5:
        assert "(the whole interval of r_positional is below 0) in 0 of these 3" in text


# ---- r with a PE that is not delivered, beside


def test_r_of_a_network_without_delivery_stands_beside() -> None:
    gap = [analyzed(slope, r=-0.1, delivered="") for slope in seeds(5, -0.03)]
    mpvg = [analyzed(slope) for slope in seeds(5, -0.05)]
    groups = {"mpvg": mpvg, "gap": gap}
    assert list(references_of(mpvg, groups)) == ["gap"]
    (said,) = [text for text in make_sentences(mpvg, {"gap": gap}) if "For comparison" in text]
    assert said.startswith("For comparison, gap receives no PE: its r with the raw PE is between -0.1")
    assert "and changes by -0.030" in said
    assert "It is negative (the whole interval of r is below 0) in 4 of these 4" in said
    assert not any("For comparison" in text or "This report has no run" in text for text in make_sentences(gap, {}))


@pytest.mark.parametrize(("few", "other"), [("gap", "mpvg"), ("mpvg", "gap")])
def test_nothing_is_concluded_of_a_comparison_with_few_seeds(few: str, other: str) -> None:
    groups = {
        name: [analyzed(slope, r=-0.1, delivered="" if name == "gap" else "123") for slope in seeds(count, -0.03)]
        for name, count in ((few, 4), (other, 5))
    }
    (said,) = [text for text in make_sentences(groups["mpvg"], {"gap": groups["gap"]}) if "For comparison" in text]
    assert "negative" not in said


def test_a_comparison_needs_the_same_network_and_data() -> None:
    mpvg, gap = [analyzed()], [analyzed(delivered="")]
    gap[0].run.config.__dict__.update(data="fashion-mnist")
    assert references_of(mpvg, {"mpvg": mpvg, "gap": gap}) == {}
    (said,) = [text for text in make_sentences(mpvg, {}) if "no run of the same network and data" in text]
    assert "a negative r alone does not show what a delivered PE does" in said


# ---- replacements


def replaced(removed: float, mean: float) -> Sensitivity:
    """Two layers; NLL is the given number, and accuracy its negative; the second layer matters half as much."""

    def change(value: float) -> Change:
        return Change(accuracy=-value, nll=value)

    importance = [
        Importance(
            name=name,
            neighbor=neighbor,
            removed=change(share * removed),
            mean=change(share * mean),
            swapped=None if neighbor is None else change(0.0),
            shuffled=change(share * removed),
            noise=change(share * removed),
        )
        for name, neighbor, share in (("2", "3", 1.0), ("3", None, 0.5))
    ]
    return Sensitivity(images=100, accuracy=0.9, nll=0.3, importance=importance, translation={}, resolutions={})


@pytest.mark.parametrize("count", [1, 4, 5])
def test_replacements_are_compared_with_removal_in_each_seed(count: int) -> None:
    runs = [analyzed(sensitivity=replaced(value, value / 2)) for value in seeds(count, 0.3)]
    text = make_sentences(runs, {})[-1]
    assert text.startswith("Changes of accuracy and NLL at layer 2, where removal of the PE costs most: removed -30.")
    for words in KINDS.values():
        assert words in text
    assert "the neighbor's (3) +0.00" in text
    assert "its mean over patches -15.0" in text
    concluded = (
        "Of 2 places, removal raises the NLL by more (the whole interval of the difference is above 0) than its mean "
        "over patches in 2, the neighbor's in 1, its rows shuffled in 0, noise of its mean and std in 0."
    )
    assert (concluded in text) == (count == 5)
    assert ("raises" in text) == (count == 5)


def test_without_a_measurement_there_is_no_sentence_on_replacements() -> None:
    empty = replace(replaced(0.1, 0.1), importance=[])
    for sensitivity in (None, empty):
        assert "beta is" in make_sentences([analyzed(sensitivity=sensitivity)], {})[-1]


# ---- the first table


def scored(*accuracies: float, images: int = 1000) -> list[AnalyzedRun]:
    return [analyzed(recorded=Scores(accuracy, 2 - accuracy, images)) for accuracy in accuracies]


def test_every_config_is_compared_with_the_first() -> None:
    """Independent: scipy's Welch test."""
    first, second = (0.80, 0.82, 0.81), (0.85, 0.83, 0.88, 0.86)
    compared = compare({"gap": scored(*first), "mpvg": scored(*second)})
    assert compared["gap"].accuracy_difference is compared["gap"].nll_difference is None
    found = compared["mpvg"].accuracy_difference
    assert found is not None
    assert found.interval is not None
    expected = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert found.value == pytest.approx(sum(second) / 4 - sum(first) / 3, abs=1e-12)
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert compared["mpvg"].nll_difference is not None
    assert compared["mpvg"].nll_difference.value == pytest.approx(-found.value, abs=1e-12)


@pytest.mark.parametrize(("values", "others"), [([0.5], [0.4, 0.3]), ([0.5, 0.6], [0.4]), ([0.5], [0.4])])
def test_a_single_seed_has_no_interval_of_its_difference(values: Sequence[float], others: Sequence[float]) -> None:
    assert difference_and_interval(list(values), list(others))[1] is None


def test_equal_seeds_have_an_interval_of_no_width() -> None:
    difference, interval = difference_and_interval([0.5, 0.5], [0.25, 0.25, 0.25])
    assert (difference, interval) == (0.25, Interval(0.25, 0.25))


def test_scores_of_all_images_are_used_only_if_every_run_has_them() -> None:
    runs = scored(0.8, 0.9, images=360)
    assert [one.images for one in compare({"a": runs})["a"].scores] == [360, 360]
    runs[1].__dict__["recorded"] = None
    assert compare({"a": runs})["a"].scores == [Scores(0.5, 1.5, 100)] * 2


def test_the_table_has_accuracy_nll_seeds_and_differences() -> None:
    html = comparison_table(compare({"<gap>": scored(0.80, 0.82), "mpvg": scored(0.85, 0.87)}))
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    assert rows[0][:6] == ["runs", "seeds", "images", "accuracy, %", "each seed, %", "NLL"]
    assert rows[0][6:] == ["accuracy minus &lt;gap&gt;, points", "NLL minus &lt;gap&gt;"]
    gap, mpvg = rows[1:]
    assert gap[:3] == ["&lt;gap&gt;", "2", "1,000"]
    assert gap[3].startswith("81.00<br><small>68.")
    assert gap[4] == "80.00 82.00"
    assert gap[6:] == ["-", "-"]
    assert mpvg[6].startswith("+5.00<br><small>")
    assert mpvg[7].startswith("-0.05")


def test_the_number_of_seeds_is_said_where_it_is_decided() -> None:
    assert comparison.MIN_SEEDS == 5
    runs = [analyzed(slope) for slope in seeds(5, -0.05)]
    assert why_inconclusive(runs) == ""
    assert why_inconclusive(runs[:4]).startswith("4 seeds, and at least 5 are needed")


def test_the_negative_log_likelihood_is_that_of_the_targets() -> None:
    """Independent: written out, on a network of which the probe collects the rest."""
    from mpvg import create_model
    from mpvg.analysis.probe import collect
    from mpvg.data import DataInfo

    info = DataInfo(
        name="noise", class_names=("a", "b"), in_chans=1, img_size=8, mean=(0.0,), std=(1.0,), train_size=1, val_size=1
    )
    torch.manual_seed(0)
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=2, in_chans=1, img_size=8).eval()
    images, targets = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 1, 0, 1, 0])
    with torch.inference_mode():
        probabilities = model(images).double().softmax(dim=1)
    expected = -sum(float(probabilities[i, target].log()) for i, target in enumerate(targets))
    batches = [(images[:4], targets[:4]), (images[4:], targets[4:])]
    assert collect(model, batches, replace(info)).nll == pytest.approx(expected, abs=1e-5)
