"""docs/claims.md and the README's results: what the paper claims, what was found here, and what would decide it.

Everything is generated from `claims.yaml`, the paper's printed values and the folders in results/.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from mpvg.files import atomic_text
from mpvg.statistics import ALPHA
from mpvg.study.contrasts import Result, least_seeds, seeds_needed
from mpvg.study.folder import STUDY, open_folder
from mpvg.study.paper import printed_tables
from mpvg.study.results import SettingResult, StudyResults, collect
from mpvg.study.tables import describe_result, margin_text, render, word_for, write_results
from mpvg.validation import build, check_choices, parse_yaml

NOT_BY_THE_PAPER = "Not discussed."
"""What a claim says of the paper if it is a question of this project."""
START, END = "<!-- results -->", "<!-- /results -->"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A contrast of a study that speaks for or against a claim."""

    study: str
    contrast: str
    expects: Literal["higher", "lower", "equivalent"]
    """What the claim says about the metric."""
    metric: str = ""
    """One of the study's margins; empty: the end point."""

    def __post_init__(self) -> None:
        check_choices(self, "evidence.")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What would decide a claim on the real data."""

    where: str
    spread: float
    """Standard deviation over seeds, in points; an assumption. For DeiT-Ti, that of the public runs stands beside."""
    points: float
    """The difference to decide."""
    arms: int
    contrasts: int

    def __str__(self) -> str:
        seeds = self.seeds(self.spread)
        text = (
            f"{self.where}, if the spread over seeds is {self.spread:g} points, an assumption: {seeds} seeds of "
            f"each of {self.arms} arms, {self.arms * seeds} runs, decide {self.points:g} points (power of 80 %)."
        )
        if not self.where.startswith("DeiT-Ti "):
            return text
        public = printed_tables()["table1"].repeats["DeiT-Ti"]
        spread = float(np.std(public, ddof=1))
        return f"{text} With the {spread:.2f} of {len(public)} public runs: {self.seeds(spread)} seeds of each arm."

    def seeds(self, spread: float) -> int:
        """Seeds of each arm at a spread: at least so many that permutation tests can pass Holm's correction."""
        enough = seeds_needed(spread, self.points, alpha=ALPHA / self.contrasts)
        return max(enough, least_seeds(ALPHA, self.contrasts))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that the paper says, or that follows if it is right."""

    claim: str
    paper: str
    algebra: str
    evidence: tuple[Evidence, ...] = ()
    seen: str = ""
    """What was measured here outside a study, without a test."""
    cost: Cost | None = None
    decide: str = ""
    """What would decide it, where that is no number of seeds."""


@dataclass(frozen=True)
class Finding:
    """What a study says about a claim in one setting."""

    results: StudyResults
    setting: SettingResult
    result: Result
    verdict: str


def read_claims(content: bytes | None = None) -> list[Claim]:
    """The claims in a YAML file; None: those of the package.

    Raises:
        ValueError: a key is unknown or missing.
    """
    values = parse_yaml(content or (resources.files("mpvg.study") / "claims.yaml").read_bytes())
    if not isinstance(values, list) or not all(isinstance(entry, dict) for entry in values):
        raise ValueError("claims must be a list of entries with claim, paper, algebra and evidence")
    claims = []
    for number, entry in enumerate(values, 1):
        given = entry.get("evidence", [])
        evidence = tuple(build(Evidence, e, f"claim {number}.evidence.") for e in given)
        cost = build(Cost, entry["cost"], f"claim {number}.cost.") if "cost" in entry else None
        claim: Claim = build(Claim, {**entry, "evidence": [], "cost": None}, f"claim {number}.")
        claims.append(replace(claim, evidence=evidence, cost=cost))
    return claims


def read_results(root: Path) -> list[StudyResults]:
    """The studies in a folder, by name and scale."""
    found = []
    for file in sorted(root.glob(f"*/{STUDY}")):
        folder = open_folder(file.parent)
        found.append(collect(folder.study, folder.scale, folder.rows()))
    return found


def find(claim: Claim, studies: Sequence[StudyResults]) -> list[tuple[Evidence, list[Finding]]]:
    """What the studies say about a claim; an empty list for evidence that no study has."""
    pairs = []
    for evidence in claim.evidence:
        findings = []
        for results in studies:
            metric = evidence.metric or next(iter(results.study.margins))
            for setting in results.settings:
                for result in setting.contrasts.get(metric, ()):
                    if (results.study.name, result.contrast.name) == (evidence.study, evidence.contrast):
                        word = word_for(result, results.metrics[metric])
                        findings.append(Finding(results, setting, result, verdict(evidence, result, setting, word)))
        pairs.append((evidence, findings))
    return pairs


def verdict(evidence: Evidence, result: Result, setting: SettingResult, word: str) -> str:
    """What a result says about a claim: reproduced, refuted or undecided; `word`: of `tables.word_for`."""
    if not setting.controls_hold:
        return "says nothing: the control differs"
    direction = "higher" if result.difference > 0 else "lower"
    if evidence.expects == "equivalent":
        if result.is_equivalent:
            return "reproduced"
        return "refuted" if result.differs else word
    if result.differs and direction == evidence.expects:
        return "reproduced" + word.removeprefix(direction)
    if result.differs:
        return "refuted"
    return "refuted: " + word if result.is_equivalent else word


def claims_page(studies: Sequence[StudyResults]) -> str:
    """docs/claims.md."""
    lines = [
        "# The paper's claims, and what was found here",
        "",
        "This page is generated by `make results` from `src/mpvg/study/claims.yaml` and the ledgers in `results/`. "
        "What was expected of each experiment is in [predictions.md](predictions.md), which is older than its runs. "
        "The end point is the NLL of the test images after the last epoch, unless a row names another metric. A "
        "verdict holds for its data and budget, which are small and short: *tiny* is 1,797 digits, or scenes "
        "of digits, *small* is fashion-mnist. How a verdict is reached: [statistics.md](statistics.md).",
        "",
    ]
    for claim in read_claims():
        lines += [f"## {claim.claim}", "", f"**The paper.** {claim.paper}", "", f"**Algebra.** {claim.algebra}", ""]
        pairs = find(claim, studies)
        if claim.seen:
            lines += [f"**Seen here, without a test.** {claim.seen}", ""]
        if not pairs:
            lines += ["**Evidence here.** Not tested by a study.", ""]
        else:
            lines += [
                "**Evidence here.**",
                "",
                "| study | question | expected | difference (95 %) | margin | seeds | verdict |",
            ]
            lines += ["|---|---|---|---|---:|---:|---|", *(row for pair in pairs for row in _rows(*pair)), ""]
        lines += [f"**To decide it on the real data.** {claim.cost or claim.decide}", ""]
    return "\n".join([*lines, *paper_as_data()]).rstrip() + "\n"


def _rows(evidence: Evidence, findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return [f"| {evidence.study} | {evidence.contrast} | {evidence.expects} | - | - | - | not tested here |"]
    rows = []
    for found in findings:
        study = found.results.study.name
        place = f"[{study}](../results/{study}-{found.results.scale}/table.md), {found.setting.label}"
        formula, difference = describe_result(found.results, found.result)
        metric, seeds = found.results.metrics[found.result.metric], found.result.seeds
        margin, title = margin_text(metric, found.result.margin), metric.title
        values = f"{evidence.expects} | {title} {difference} | {margin} | {seeds} | {found.verdict}"
        rows.append(f"| {place} | {formula} | {values} |")
    return rows


def results_section(studies: Sequence[StudyResults]) -> str:
    """The README's table of verdicts: a row for each claim, with the contrast that has the most seeds."""
    lines = [
        "| claim (ours: not of the paper) | contrasts | the one with the most seeds: difference (95 %) | verdict |",
        "|---|---|---|---|",
    ]
    untested = []
    for claim in read_claims():
        findings = [found for _, several in find(claim, studies) for found in several]
        if not findings:
            untested.append(claim.claim)
            continue
        words = Counter(found.verdict.partition(":")[0] for found in findings)
        verdicts = ", ".join(f"{count} {word}" for word, count in words.items())
        most = max(findings, key=lambda found: found.result.seeds)
        formula, difference = describe_result(most.results, most.result)
        title = most.results.metrics[most.result.metric].title
        scale = f"{most.results.scale}, {most.setting.label}, {most.result.seeds} seeds"
        name = claim.claim + (" (ours)" if claim.paper == NOT_BY_THE_PAPER else "")
        lines.append(f"| {name} | {verdicts} | {scale}: {formula}: {title} {difference} | {most.verdict} |")
    if untested:
        lines += ["", f"Not tested here yet: {'; '.join(untested)}."]
    return "\n".join(lines)


def paper_as_data() -> list[str]:
    """What the paper's own tables say when they are taken as data, as lines of Markdown."""
    from scipy import stats

    tables = printed_tables()

    def values(table: str, row: str) -> list[float]:
        return [value for value in tables[table].rows[row] if value is not None]

    def differences(first: str, second: str) -> list[float]:
        pairs = [zip(values(name, first), values(name, second), strict=True) for name in ("table1", "table2")]
        return [round(a - b, 2) for pair in pairs for a, b in pair]

    mpvg, pvg = differences("MPVG", "PVG"), differences("PVG", "LaPE")
    sign = stats.binomtest(sum(d > 0 for d in mpvg), len(mpvg)).pvalue
    wilcoxon = stats.wilcoxon(pvg).pvalue
    five = [values("table5", label)[0] for label in tables["table5"].rows if label.startswith("k")]
    six = [values("table6", label)[0] for label in tables["table6"].rows]
    repeats = tables["table1"].repeats["DeiT-Ti"]
    spread = {name: f"{np.std(given, ddof=1):.2f}" for name, given in (("5", five), ("6", six), ("", repeats))}
    return [
        "## The paper's tables as data",
        "",
        f"- MPVG - PVG in Tables 1 and 2: {min(mpvg):+.2f} to {max(mpvg):+.2f} points, mean {np.mean(mpvg):+.2f}, "
        f"positive in {sum(d > 0 for d in mpvg)} of {len(mpvg)} (sign test p = {sign:.3f}).",
        f"- PVG - LaPE: median {np.median(pvg):+.2f}, positive in {sum(d > 0 for d in pvg)} of {len(pvg)} (Wilcoxon "
        f"p = {wilcoxon:.2f}).",
        f"- {len(repeats)} public runs of DeiT-Ti with one recipe ({', '.join(map(str, repeats))}) have a standard "
        f"deviation of {spread['']}. The four k of Table 5 have {spread['5']}, the four rows of Table 6 {spread['6']}: "
        "one run for each cell cannot order them.",
    ]


def publish(root: Path) -> list[Path]:
    """Rewrites the tables of every study in results/, docs/claims.md and the README's results.

    Args:
        root: of the repository.
    """
    studies = read_results(root / "results")
    written = []
    for results in studies:
        written += write_results(results, root / "results" / f"{results.study.name}-{results.scale}")
    for path, text in generated(root, studies).items():
        atomic_text(path, text)
        written.append(path)
    return written


def generated(root: Path, studies: Sequence[StudyResults]) -> dict[Path, str]:
    """File -> its generated text, without the pictures and the pages that hold them.

    Raises:
        ValueError: the README does not have the markers.
    """
    texts: dict[Path, str] = {root / "docs" / "claims.md": claims_page(studies)}
    for results in studies:
        folder = root / "results" / f"{results.study.name}-{results.scale}"
        texts |= {folder / name: text for name, text in render(results).items()}
    readme = (root / "README.md").read_text("utf-8")
    section = f"{START}\n{results_section(studies)}\n{END}"
    pattern = f"{re.escape(START)}.*?{re.escape(END)}"
    texts[root / "README.md"], count = re.subn(pattern, lambda _: section, readme, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md has {START} ... {END} {count} times; it must have them once, around the results")
    return texts


if __name__ == "__main__":
    for file in publish(Path()):
        print(file)
