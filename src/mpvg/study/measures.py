"""Metrics that a study may ask for and no training records: they are taken from a finished run's last weights."""

from collections.abc import Iterable
from pathlib import Path
from statistics import linear_regression, mean

import torch
from timm.layers import to_2tuple
from torch import nn

from mpvg import runs
from mpvg.analysis.findings import Findings, summarize
from mpvg.analysis.probe import BLACK_BACKGROUND, LAST, collect
from mpvg.analysis.resolutions import at_size, check_resampled, scores
from mpvg.config import RunConfig
from mpvg.models.network import delivered_network
from mpvg.runs import Run
from mpvg.tasks import Metric, task_class
from mpvg.validation import unknown_name

RISE = "nll_rise_2x"
"""NLL at twice the image size minus that at the run's own, in nats; images and PE are resampled, antialiased."""
SEPARATION = "separation"
"""Distance from 1/2 of the probability that a patch of the object has a larger norm than one of the background after
the Last LN (Fig. 7); in [0, 1/2], and 0 if the norms tell nothing."""
INSIDE = {
    # Over the layers after layer 0, without the Last LN, for every method: where nothing is delivered, with the raw PE.
    "r": Metric(title="mean r (Fig. 4)", higher_is_better=False),
    "r_slope": Metric(title="slope of r (Fig. 4)", higher_is_better=False),
    "beta_variance": Metric(title="var(beta) (Fig. 6)", higher_is_better=False),
    "beta_variance_effective": Metric(title="var(beta + PE's mean)", higher_is_better=False),
    SEPARATION: Metric(title="separation (Fig. 7)", higher_is_better=True),
}
"""What `mpvg analyze` measures, here on all validation images; docs/analysis.md defines it."""
MEASURES = {RISE: Metric(title="rise of nll at 2 x", higher_is_better=False), **INSIDE}


def study_metrics(task: str) -> dict[str, Metric]:
    """The metrics for which a study of a task may have a margin."""
    kind = task_class(task)
    trained = {name: kind.metrics[name] for name in kind.summarized}
    return trained | (MEASURES if task == "classification" else {})


def check_metrics(names: Iterable[str], task: str) -> None:
    """Checks the names of margins.

    Raises:
        ValueError: one is no metric of the task's studies.
    """
    allowed = study_metrics(task)
    for name in names:
        if name not in allowed:
            raise ValueError(f"margins: {unknown_name('metric', name, allowed)}")


def check_measures(names: Iterable[str], model: nn.Module, config: RunConfig) -> None:
    """Checks before a run that it can be measured.

    Raises:
        ValueError: the network cannot take images of twice the size, or it is not known where the data's objects are.
    """
    if RISE in names:
        check_resampled(model)
    if SEPARATION in names and config.data not in BLACK_BACKGROUND:
        known = ", ".join(BLACK_BACKGROUND)
        raise ValueError(f"{SEPARATION} needs data whose objects are known: {known}; got {config.data}")


@torch.inference_mode()
def measure(path: Path, names: Iterable[str]) -> dict[str, float]:
    """Those of the named metrics that training did not record.

    Args:
        path: run folder.
        names: metrics of the study.

    Raises:
        ValueError: a metric is not defined for the network.
    """
    run = runs.load(path)
    found = {RISE: _rise(run)} if RISE in names else {}
    if inside := [name for name in INSIDE if name in names]:
        model = run.model().to(run.device)
        findings = summarize(model, collect(model, run.validation(run.device).epoch(), run.info))
        found |= {name: _inside(findings, name) for name in inside}
    return found


def _inside(findings: Findings, name: str) -> float:
    if name == SEPARATION:
        area = findings.last.auc_behind
        if area is None:
            raise ValueError(f"the network has no {SEPARATION}: its Last LN normalizes one vector of each image")
        return abs(area.value - 0.5)
    if name in ("r", "r_slope"):
        r = {int(place.name): place.r.value for place in findings.places if place.name not in ("0", LAST)}
        return mean(r.values()) if name == "r" else linear_regression(list(r), list(r.values())).slope
    value: float = getattr(findings.last, name)
    return value


def _rise(run: Run) -> float:
    model = run.model().to(run.device)
    batches = list(run.validation(run.device).epoch())
    height, width = to_2tuple(delivered_network(model).img_size)
    twice = 2 * height, 2 * width
    after = scores(at_size(model, twice, "antialias"), batches, twice)[1]
    before = scores(model, batches, (height, width))[1]
    return float((after - before).mean())
