"""Metrics that a study may ask for and no training records: they are taken from a finished run's last weights."""

from collections.abc import Iterable
from pathlib import Path

import torch
from timm.layers import to_2tuple

from mpvg import runs
from mpvg.analysis.resolutions import at_size, scores
from mpvg.models.network import delivered_network
from mpvg.tasks import Metric, task_class
from mpvg.validation import unknown_name

RISE = "nll_rise_2x"
"""NLL at twice the image size minus that at the run's own, in nats; images and PE are resampled, antialiased."""
MEASURES = {RISE: Metric(title="rise of nll at 2 x", higher_is_better=False)}


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


def measure(path: Path, names: Iterable[str]) -> dict[str, float]:
    """Those of the named metrics that training did not record.

    Args:
        path: run folder.
        names: metrics of the study.

    Raises:
        ValueError: the network cannot take images of twice the size.
    """
    return {RISE: _rise(path)} if RISE in names else {}


@torch.inference_mode()
def _rise(path: Path) -> float:
    run = runs.load(path)
    model = run.model().to(run.device)
    batches = list(run.validation(run.device).epoch())
    height, width = to_2tuple(delivered_network(model).img_size)
    twice = 2 * height, 2 * width
    after = scores(at_size(model, twice, "antialias"), batches, twice)[1]
    before = scores(model, batches, (height, width))[1]
    return float((after - before).mean())
