"""The tasks by name: one file each, with the interface of `task.py`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from mpvg.config import RunConfig
from mpvg.data import DataInfo
from mpvg.tasks.classification import ClassificationTask
from mpvg.tasks.detection import DetectionOptions, DetectionTask
from mpvg.tasks.review import Review as Review
from mpvg.tasks.review import Reviewing as Reviewing
from mpvg.tasks.segmentation import SegmentationOptions, SegmentationTask
from mpvg.tasks.task import EMA
from mpvg.tasks.task import Evaluation as Evaluation
from mpvg.tasks.task import Metric as Metric
from mpvg.tasks.task import Placed as Placed
from mpvg.tasks.task import Prediction as Prediction
from mpvg.tasks.task import Ranking as Ranking
from mpvg.tasks.task import Tabular as Tabular
from mpvg.tasks.task import Task as Task
from mpvg.tasks.task import describe_metrics as describe_metrics
from mpvg.validation import build, shown, unknown_name


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a task that has none."""


_TASKS: dict[str, tuple[type[Task[Any]], type[Any]]] = {
    "classification": (ClassificationTask, NoOptions),
    "detection": (DetectionTask, DetectionOptions),
    "segmentation": (SegmentationTask, SegmentationOptions),
}


def register(name: str, task: type[Task[Any]], options: type[Any] = NoOptions) -> None:
    """Adds a task: configs with `task: NAME` are then trained and evaluated by it.

    Args:
        name: of the task.
        task: a class with the interface `Task`.
        options: a frozen dataclass; `task_options` of a config must fit it. Its class variable `evaluation`, if it has
            one, names those that `evaluated_with` may change; its property `unused` gives the reason for each option
            without an effect on an evaluation.

    Raises:
        ValueError: the name is taken.
    """
    if name in _TASKS:
        raise ValueError(f"task {name!r} is registered already; give another name")
    _TASKS[name] = task, options


def task_class(name: str) -> type[Task[Any]]:
    """The class of a task.

    Raises:
        ValueError: there is no such task.
    """
    if name not in _TASKS:
        raise ValueError(unknown_name("task", name, _TASKS) + "; a task of your own must be registered before")
    return _TASKS[name][0]


def evaluated_with(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """The config of a trained network with other values of the options that only evaluation uses.

    Args:
        config: of the run.
        options: take the place of those in `task_options`, one by one.

    Raises:
        ValueError: there is no such task, or it cannot change one of them after training.
    """
    task_class(config.task)
    kind = _TASKS[config.task][1]
    allowed: Sequence[str] = getattr(kind, "evaluation", ())
    known = f"allowed of {config.task}: {', '.join(allowed) or 'none'}"
    for name in options:
        if name not in allowed:
            has = any(one.name == name for one in fields(kind))
            reason = "cannot be changed after training" if has else f"is no option of {config.task}"
            raise ValueError(f"{shown('task_options.' + name)} {reason}; {known}")
    changed = replace(config, task_options={**config.task_options, **options})
    unused: Mapping[str, str] = getattr(build(kind, changed.task_options, "task_options."), "unused", {})
    for name in options:
        if name in unused:
            raise ValueError(f"{shown('task_options.' + name)} changes nothing: {unused[name]}")
    return changed


def selecting_metric(config: RunConfig) -> str:
    """Name, in a line of metrics.jsonl, of the metric that chooses the best checkpoint.

    Raises:
        ValueError: there is no such task.
    """
    best = task_class(config.task).best
    return f"{EMA}{best}" if config.ema_selects else best


def is_better(task: Task[Any] | type[Task[Any]], value: float, best: float | None) -> bool:
    """Whether a value of the task's metric is better than the best so far; anything is better than None and NaN."""
    if best is None or math.isnan(best):
        return True
    return value > best if task.metrics[task.best].higher_is_better else value < best


def best_line(config: RunConfig, metrics: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The line of metrics.jsonl whose checkpoint is the best one; None: there is no line."""
    kind, key = task_class(config.task), selecting_metric(config)
    best: Mapping[str, Any] | None = None
    for line in metrics:
        best = line if is_better(kind, line[key], best[key] if best else None) else best
    return best


def create_task(config: RunConfig, info: DataInfo) -> Task[Any]:
    """Builds the task that a config names, for the data that `info` describes.

    Raises:
        ValueError: there is no such task, or its options are not valid.
    """
    kind = task_class(config.task)
    return kind(config, info, build(_TASKS[config.task][1], config.task_options, "task_options."))
