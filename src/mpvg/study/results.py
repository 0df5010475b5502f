"""The results of a study from its plan and its ledger alone: what tables, pictures and claims show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpvg.statistics import Interval, mean_and_interval
from mpvg.study.contrasts import Result, evaluate
from mpvg.study.ledger import Row
from mpvg.study.measures import study_metrics
from mpvg.study.plan import Study
from mpvg.tasks import Metric

LEAST_SEEDS = 2
"""Seeds of an arm below which nothing is tested."""


@dataclass(frozen=True)
class ArmResult:
    """The runs of an arm in a setting."""

    name: str
    label: str
    values: dict[str, list[float]]
    """Metric -> the last epoch's value of each seed that did not diverge."""
    best: list[float]
    """The best epoch's value of the metric that chooses checkpoints: shown, never tested."""
    diverged: int
    parameters: int | None

    def mean(self, metric: str) -> tuple[float, Interval | None]:
        """Mean over the seeds with its 95 % interval."""
        return mean_and_interval(self.values[metric])


@dataclass(frozen=True)
class SettingResult:
    """The runs of a setting."""

    name: str
    label: str
    arms: tuple[ArmResult, ...]
    """Those with at least one run, in the order of the study."""
    contrasts: dict[str, tuple[Result, ...]] = field(default_factory=dict)
    """Metric -> what it says about each contrast; empty where there are too few seeds."""
    remarks: tuple[str, ...] = ()
    """What a reader must know before the numbers."""

    @property
    def controls_hold(self) -> bool:
        """Whether no arm differs from itself on other seeds."""
        return not any(r.is_control and r.differs for results in self.contrasts.values() for r in results)


@dataclass(frozen=True)
class StudyResults:
    """What came out of a study so far."""

    study: Study
    scale: str
    metrics: dict[str, Metric]
    """The metrics of the margins, the end point first."""
    settings: tuple[SettingResult, ...]
    made: str
    """Commits, machines and dates of the runs, as text."""


def collect(study: Study, scale: str, rows: Sequence[Row]) -> StudyResults:
    """Sorts the rows of a ledger into arms and tests the contrasts.

    Raises:
        ValueError: a row lacks a metric for which the study has a margin.
    """
    metrics = {name: _metric(name, rows) for name in study.margins}
    labels = {setting.name: setting.label for setting in study.scales.get(scale, ())}
    found = []
    for name, label in labels.items():
        own = [row for row in rows if row.setting == name]
        if own:
            found.append(_setting(study, name, label, own))
    return StudyResults(study, scale, metrics, tuple(found), describe_origin(rows))


def describe_origin(rows: Sequence[Row]) -> str:
    """Where, when and with what runs were made."""

    def some(values: Sequence[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    if not rows:
        return "no run yet"
    dates = sorted(row.date[:10] for row in rows)
    period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"{len(rows)} runs; commit {some([row.commit for row in rows])}; torch {some([row.torch for row in rows])}; "
        f"{some([row.hardware for row in rows])}; {period}"
    )


def _metric(name: str, rows: Sequence[Row]) -> Metric:
    task = str(rows[0].config.get("task", "classification")) if rows else "classification"
    for row in rows:
        if row.status == "done" and name not in row.metrics:
            raise ValueError(
                f"the run of arm {row.arm}, seed {row.seed}, has no metric {name}; allowed as a margin: "
                f"{', '.join(row.metrics)}"
            )
    return study_metrics(task).get(name) or Metric(title=name, higher_is_better=True)


def _setting(study: Study, name: str, label: str, rows: Sequence[Row]) -> SettingResult:
    arms = []
    for arm in study.arms:
        own = sorted((row for row in rows if row.arm == arm.name), key=lambda row: row.seed)
        done = [row for row in own if row.status == "done"]
        if own:
            values = {metric: [row.metrics[metric] for row in done] for metric in study.margins}
            best = [value for row in done for key, value in row.best.items() if key != "epoch"]
            parameters = done[0].parameters if done else None
            arms.append(ArmResult(arm.name, arm.label, values, best, len(own) - len(done), parameters))
    usable = [arm for arm in arms if len(next(iter(arm.values.values()))) >= LEAST_SEEDS]
    contrasts = {}
    for metric in study.margins:
        samples: Mapping[str, list[float]] = {arm.name: arm.values[metric] for arm in usable}
        if samples:
            contrasts[metric] = tuple(evaluate(study, samples, metric))
    result = SettingResult(name, label, tuple(arms), contrasts)
    return SettingResult(name, label, tuple(arms), contrasts, tuple(_remarks(result, rows)))


def _remarks(result: SettingResult, rows: Sequence[Row]) -> list[str]:
    remarks = []
    if not result.controls_hold:
        remarks.append("An arm differs from itself on other seeds, so the other differences here say nothing.")
    runs = {arm.label: len(next(iter(arm.values.values()))) + arm.diverged for arm in result.arms}
    if len(set(runs.values())) > 1:
        fewest, most = (pick(runs, key=lambda label: runs[label]) for pick in (min, max))
        remarks.append(f"Not every arm has as many runs: {fewest} has {runs[fewest]}, {most} has {runs[most]}.")
    few = [arm.label for arm in result.arms if len(next(iter(arm.values.values()))) < LEAST_SEEDS]
    if few:
        remarks.append(f"Fewer than {LEAST_SEEDS} runs, so that nothing is tested: {', '.join(few)}.")
    for arm in result.arms:
        if arm.diverged:
            remarks.append(f"{arm.diverged} of {runs[arm.label]} runs of {arm.label} diverged; they are in no mean.")
    for what in ("train_hash", "torch", "hardware"):
        values = {getattr(row, what) for row in rows}
        if len(values) > 1:
            remarks.append(f"The runs differ in {what.replace('_', ' ')}: {', '.join(sorted(map(str, values)))}.")
    return remarks
