"""The lines that a run leaves: one of metrics.jsonl per epoch, and summary.json at the end."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from mpvg.config import RunConfig
from mpvg.models.network import count_parameters
from mpvg.runs.environment import commit, hardware
from mpvg.tasks import Evaluation, Task, best_line, selecting_metric
from mpvg.tasks.task import EMA
from mpvg.training.gradients import NAMES
from mpvg.training.state import TrainProgress


def epoch_record(
    progress: TrainProgress, lr: float, trained: Evaluation, averaged: Evaluation | None
) -> dict[str, Any]:
    """The line of an epoch that has just ended; `progress` still counts its batches."""
    steps, *sums = progress.gradient_sums or (0.0,)
    record: dict[str, Any] = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "train_loss": progress.loss_sum / progress.batch,
        "lr": lr,
        **{name: total / steps for name, total in zip(NAMES, sums, strict=False)},
        **trained.metrics,
    }
    if averaged is not None:
        record |= {f"{EMA}{name}": value for name, value in averaged.metrics.items()}
    return record | {
        "images_per_second": progress.images / progress.seconds,
        "skipped": progress.skipped,
        "seconds": round(progress.seconds, 3),
    }


def summary(
    config: RunConfig, task: Task[Any], metrics: Sequence[Mapping[str, Any]], network: nn.Module
) -> dict[str, Any]:
    """The run in one line: what a study collects."""
    last, best = metrics[-1], best_line(config, metrics)
    assert best is not None
    values: dict[str, Any] = {
        "config_hash": config.digest(),
        "recipe": config.recipe,
        "data": config.data,
        "model": config.model,
        "method": config.method,
        "pos_std": config.network.pos_std,
        "epochs": config.epochs,
        "seed": config.seed,
        "task": config.task,
        "best_metric": task.best,
        "higher_is_better": task.metrics[task.best].higher_is_better,
        **{name: last[name] for name in task.summarized},
        f"best_{task.best}": best[selecting_metric(config)],
        "best_epoch": best["epoch"],
    }
    if config.ema_decay:
        values |= {f"{EMA}{name}": last[f"{EMA}{name}"] for name in task.summarized}
    return values | {
        "parameters": count_parameters(network),
        "images_per_second": last["images_per_second"],
        "seconds": last["seconds"],
        "skipped": last["skipped"],
        "commit": commit(),
        "hardware": hardware(),
        "threads": config.threads,
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
