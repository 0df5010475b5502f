"""One row of a ledger, run again and compared."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mpvg import training
from mpvg.runs.environment import hardware
from mpvg.statistics import CONFIDENCE_LEVEL
from mpvg.study.ledger import Row, read_ledger
from mpvg.study.measures import measure, study_metrics
from mpvg.study.runner import weights_hash
from mpvg.validation import unknown_name


@dataclass(frozen=True)
class Replay:
    """What a second run showed."""

    lines: list[str]
    """In words."""
    agrees: bool
    """Whether it is the same to the bit, or elsewhere within what the seeds of its arm spread over."""


def choose_row(ledger: Path, number: int) -> tuple[Row, list[Row]]:
    """A row by its number, from 1, and the other finished rows of its arm.

    Raises:
        FileNotFoundError: there is no ledger.
        ValueError: it has no such row, or the row's config or a metric is damaged.
    """
    if not ledger.is_file():
        raise FileNotFoundError(f"{ledger} is no ledger; give the ledger.jsonl in a study's folder")
    rows = read_ledger(ledger)
    if not rows:
        raise ValueError(f"{ledger} has no row; run the study first")
    if not 1 <= number <= len(rows):
        raise ValueError(f"--row is {number}; allowed: 1 to {len(rows)}, the lines of {ledger}")
    row = rows[number - 1]
    others = [r for r in rows if (r.setting, r.arm, r.status) == (row.setting, row.arm, "done") and r is not row]
    try:
        known = study_metrics(row.run_config().task)
    except ValueError as error:
        raise ValueError(f"{ledger}, line {number} is damaged ({error}); restore it, or remove the line") from error
    for name in row.metrics:
        if name not in known:
            raise ValueError(f"{ledger}, line {number}: {unknown_name('metric', name, known)}")
    return row, others


def replay(row: Row, others: list[Row], out: Path, study: Path) -> Replay:
    """Trains a row's run anew into a folder and compares.

    Args:
        row: what is run again.
        others: the other rows of its arm.
        out: the new run folder.
        study: the ledger's folder, where the pre-trained runs are that its runs started from.

    Raises:
        ValueError: the row's digest is not that of its config, or the data are others.
    """
    config = replace(row.run_config(), out=str(out), threads=row.threads)
    start = config.network.init
    if start is not None and (study / start).is_dir():  # the run that came first, which the row names below the study
        config = replace(config, network=replace(config.network, init=str(study / start)))
    try:
        summary = training.train(config, quiet=True)
        summary |= measure(out, row.metrics)
    except training.NonFiniteLoss as error:
        return Replay([f"the run diverged, the row's {row.status}: {error}"], row.status == "diverged")
    if row.status == "diverged":
        return Replay([f"the run did not diverge; the row's did: {row.reason}"], False)
    here = {"torch": torch.__version__, "hardware": hardware()}
    differing = [
        f"{name} ({getattr(row, name)}, here {value})" for name, value in here.items() if getattr(row, name) != value
    ]
    same_bits = weights_hash(out) == row.weights
    metrics = study_metrics(config.task)
    lines, inside = [], True
    for name, value in row.metrics.items():
        low, high = _prediction_interval([other.metrics[name] for other in others if name in other.metrics])
        within = value == summary[name] or low <= summary[name] <= high
        inside = inside and within
        spread = (
            f"; another seed lies in {metrics[name].format(low)} to {metrics[name].format(high)}"
            if len(others) > 1
            else ""
        )
        lines.append(
            f"{metrics[name].title}: {metrics[name].format(summary[name])}, the row has "
            f"{metrics[name].format(value)}{spread}"
        )
    if same_bits:
        return Replay([*lines, "the weights are the same to the bit"], True)
    if not differing:
        return Replay([*lines, "the weights differ, although torch and the hardware are the row's"], False)
    verdict = "inside" if inside else "outside"
    return Replay(
        [
            *lines,
            f"the weights differ, as does {', '.join(differing)}; the metrics are {verdict} what the "
            "seeds of the arm spread over",
        ],
        inside,
    )


def _prediction_interval(values: list[float]) -> tuple[float, float]:
    """Where one more value lies with 95 % confidence; nowhere with fewer than two values."""
    from scipy import stats

    if len(values) < 2:
        return float("inf"), float("-inf")
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, len(values) - 1)) * sd * (1 + 1 / len(values)) ** 0.5
    return mean - half, mean + half
