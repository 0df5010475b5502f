"""Claims: verdicts follow from words, and what is generated is what stands in the repository."""

import filecmp
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from mpvg.statistics import Interval
from mpvg.study.claims import Cost, Evidence, claims_page, generated, paper_as_data, read_claims, read_results, verdict
from mpvg.study.contrasts import Result
from mpvg.study.plan import Contrast, read_study, ready_studies
from mpvg.study.results import SettingResult, StudyResults
from mpvg.study.tables import word_for, write_results
from mpvg.tasks import Metric

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def all_results() -> list[StudyResults]:
    """The studies of the repository."""
    return read_results(ROOT / "results")


def result(difference: float, p: float, p_equivalent: float) -> Result:
    return Result(
        contrast=Contrast(name="c", weights={"a": 1.0, "b": -1.0}),
        metric="nll",
        seeds=8,
        difference=difference,
        interval=Interval(-1.0, 1.0),
        p=p,
        p_holm=p,
        margin=0.05,
        p_equivalent=p_equivalent,
        needed=20,
        smallest_p=0.001,
        is_control=False,
    )


@pytest.mark.parametrize(
    ("expects", "given", "said"),
    [
        ("lower", (-0.1, 0.01, 0.9), "reproduced"),
        ("lower", (-0.01, 0.01, 0.01), "reproduced, but equivalent within 0.05"),
        ("lower", (0.1, 0.01, 0.9), "refuted"),
        ("lower", (-0.01, 0.5, 0.01), "refuted: equivalent within 0.05"),
        ("lower", (-0.1, 0.2, 0.9), "undecided: needs 20 seeds"),
        ("higher", (0.1, 0.01, 0.9), "reproduced"),
        ("higher", (-0.1, 0.01, 0.9), "refuted"),
        ("equivalent", (0.01, 0.5, 0.01), "reproduced"),
        ("equivalent", (0.01, 0.01, 0.01), "reproduced"),
        ("equivalent", (0.1, 0.01, 0.9), "refuted"),
        ("equivalent", (0.1, 0.2, 0.9), "undecided: needs 20 seeds"),
    ],
)
def test_a_verdict_follows_from_the_word(expects: Any, given: tuple[float, float, float], said: str) -> None:
    setting, given_result = SettingResult("x", "x", ()), result(*given)
    assert verdict(Evidence(study="s", contrast="c", expects=expects), given_result, setting, given_result.word) == said


def test_a_margin_is_in_the_unit_of_its_metric() -> None:
    given = result(-0.01, 0.5, 0.01)
    for percent, said in ((False, "equivalent within 0.05"), (True, "equivalent within 5")):
        assert word_for(given, Metric(title="x", higher_is_better=True, percent=percent)) == said


def test_every_piece_of_evidence_is_a_contrast_of_a_ready_study() -> None:
    contrasts = {name: {c.name for c in read_study(name).contrasts} for name in ready_studies()}
    for claim in read_claims():
        for evidence in claim.evidence:
            assert evidence.contrast in contrasts[evidence.study], claim.claim


def test_a_claim_is_added_by_adding_data() -> None:
    text = (
        b"- {claim: A, paper: B, algebra: C, evidence: [{study: e1, contrast: start, expects: lower}],"
        b" cost: {where: D, spread: 0.25, points: 0.2, arms: 3, contrasts: 4}}"
    )
    assert read_claims(text)[0].evidence == (Evidence(study="e1", contrast="start", expects="lower"),)
    for old, new, said in (
        (
            b"expects: lower",
            b"expects: better",
            "evidence.expects is 'better'; allowed: 'higher', 'lower', 'equivalent'",
        ),
        (b"paper: B, ", b"", "paper is missing"),
        (b"spread: 0.25, ", b"", "cost.spread is missing"),
        (b"claim: A", b"clam: A", "unknown config key 'claim 1.clam'"),
    ):
        with pytest.raises(ValueError, match="claim|evidence") as caught:
            read_claims(text.replace(old, new))
        assert said in str(caught.value)


def test_the_runs_that_would_decide_are_computed() -> None:
    """37 seeds for a difference at 1.25 %, and 28 for its absence."""
    cost = Cost(where="D", spread=0.25, points=0.2, arms=3, contrasts=4)
    said = "D, if the spread over seeds is 0.25 points, an assumption: 37 seeds of each of 3 arms, 111 runs,"
    assert str(cost).startswith(said)
    assert "public" not in str(cost)
    for claim in read_claims():
        assert (claim.cost is None) == bool(claim.decide), claim.claim


def test_no_fewer_seeds_are_asked_for_than_a_permutation_test_can_decide_with() -> None:
    """3 would have the power of a t test, but their smallest p is 0.1; public runs of DeiT-Ti spread by 0.31."""
    cost = Cost(where="DeiT-Ti on D", spread=0.05, points=0.77, arms=2, contrasts=1)
    assert ": 4 seeds of each of 2 arms, 8 runs," in str(cost)
    assert ": 5 seeds of each of 2 arms, 10 runs," in str(replace(cost, contrasts=5))
    assert str(replace(cost, points=0.34)).endswith("With the 0.31 of 5 public runs: 16 seeds of each arm.")


def test_the_papers_tables_as_data() -> None:
    text = "\n".join(paper_as_data())
    assert "+0.06 to +0.37 points, mean +0.21, positive in 8 of 8 (sign test p = 0.008)" in text
    assert "PVG - LaPE: median +0.05, positive in 5 of 8 (Wilcoxon p = 0.20)" in text
    assert "standard deviation of 0.31. The four k of Table 5 have 0.09, the four rows of Table 6 0.12" in text


def test_what_is_generated_is_what_the_repository_holds(all_results: list[StudyResults]) -> None:
    """`make results` rewrites it; the pictures are made again and compared by test_the_pictures below."""
    for file, text in generated(ROOT, all_results).items():
        assert file.read_bytes().decode() == text, f"{file} is not what `make results` writes"


def test_the_pictures_are_those_of_the_ledgers(all_results: list[StudyResults], tmp_path: Path) -> None:
    assert all_results
    for results in all_results:
        name = f"{results.study.name}-{results.scale}"
        folder, copy = ROOT / "results" / name, tmp_path / name
        if f"Matplotlib v{matplotlib.__version__}," not in (folder / "bars.svg").read_text("utf-8"):
            pytest.skip("another version of matplotlib draws other bytes")
        write_results(results, copy)
        for file in ("bars.svg", "table.html"):
            assert filecmp.cmp(copy / file, folder / file, shallow=False), folder / file


def test_a_readme_without_markers_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# mpvg\n")
    with pytest.raises(ValueError, match="README.md has <!-- results --> .* 0 times"):
        generated(tmp_path, [])


def test_a_claim_without_a_study_says_so() -> None:
    page = claims_page([])
    assert "not tested here" in page
    assert "## MPVG is better than PVG" in page
