"""Runs in parallel processes, one thread each; runs that were begun are continued."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mpvg import runs, training
from mpvg.config import RunConfig
from mpvg.tasks import task_class
from mpvg.validation import printable


def run_all(configs: Sequence[RunConfig]) -> dict[str, dict[str, Any]]:
    """Trains the configs, as many at a time as there are cores.

    Returns:
        Run folder -> summary.
    """
    longest_first = sorted(configs, key=lambda config: -config.epochs)
    total = sum(config.epochs for config in configs)
    summaries: dict[str, dict[str, Any]] = {}
    workers = min(os.cpu_count() or 1, len(configs))
    console = Console(soft_wrap=True, highlight=False)
    context = multiprocessing.get_context("spawn")
    console.print(f"training {len(configs)} networks, {total} epochs in all, {workers} at a time", markup=False)
    with (
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("epochs", total=total)
        left: dict[Future[dict[str, Any]], RunConfig] = {pool.submit(_run, c): c for c in longest_first}
        try:
            while left:
                done, _ = wait(left, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    config = left.pop(future)
                    summary = summaries[config.out] = future.result()
                    score = _score(config, summary)
                    progress.console.print(
                        printable(f"{len(summaries)}/{len(configs)} done  {config.out}  {score}"), markup=False
                    )
                progress.update(bar, completed=sum(_epochs_done(config) for config in configs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return summaries


def _run(config: RunConfig) -> dict[str, Any]:
    """Trains or continues one run, in a process of the pool."""
    if (Path(config.out) / "config.yaml").is_file():
        found = runs.load(config.out).config
        if found.digest() != config.digest():
            raise ValueError(
                f"{config.out} holds a run with another config than this plan's; remove it, or give another --out"
            )
        return training.resume(config.out, quiet=True)
    return training.train(config, quiet=True)


def _score(config: RunConfig, summary: dict[str, Any]) -> str:
    task = task_class(config.task)
    return task.metrics[task.best].format(summary[task.best])


def _epochs_done(config: RunConfig) -> int:
    file = Path(config.out) / "metrics.jsonl"
    return file.read_text(encoding="utf-8").count("\n") if file.is_file() else 0
