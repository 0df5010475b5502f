"""Many run folders at once: what each holds, and their curves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpvg.config import RunConfig
from mpvg.runs.run import Run, load
from mpvg.tasks import task_class

COLUMNS = ("run", "state", "epochs", "best", "data", "model", "method", "seed")


@dataclass(frozen=True)
class RunState:
    """What a run folder holds."""

    path: Path
    """The folder."""
    state: str
    """complete, unfinished, or why it cannot be read."""
    run: Run | None
    """None: it cannot be read."""
    metrics: list[dict[str, Any]]
    """Its epochs so far."""

    def row(self) -> tuple[str, ...]:
        """The values of COLUMNS as text."""
        if self.run is None:
            return (str(self.path), self.state, *("-" * (len(COLUMNS) - 2)))
        config = self.run.config
        epochs = f"{len(self.metrics)}/{config.epochs}"
        described = (config.data, config.model, method_name(config), str(config.seed))
        return (str(self.path), self.state, epochs, self._best(), *described)

    def _best(self) -> str:
        """The best value so far of the metric that the run's task names, as text."""
        if self.run is None or not self.metrics:
            return "-"
        task = task_class(self.run.config.task)
        metric = task.metrics[task.best]
        best = (max if metric.higher_is_better else min)(line[task.best] for line in self.metrics)
        return f"{metric.title} {metric.format(best)}"


def method_name(config: RunConfig) -> str:
    """The name of a run's method; "own" for a spec."""
    return config.method if isinstance(config.method, str) else "own"


def find_runs(root: Path) -> list[RunState]:
    """Reads all run folders in a folder, or the one that it is; a damaged one is listed as such.

    Raises:
        FileNotFoundError: there is no run.
    """
    found = []
    for config in sorted(root.rglob("config.yaml")):
        try:
            run = load(config.parent)
            task_class(run.config.task)
            state = "complete" if run.summary() is not None else "unfinished"
            found.append(RunState(config.parent, state, run, run.metrics()))
        except (ValueError, OSError) as error:
            found.append(RunState(config.parent, f"damaged: {error}", None, []))
    if not found:
        raise FileNotFoundError(
            f"no run in {root}; give a folder that `mpvg train` made, or one with such folders in it"
        )
    return found


def plot_runs(roots: Sequence[Path], key: str | None, file: Path) -> None:
    """Draws one number of every epoch for several runs; seeds of the same run are one line and a band.

    Args:
        roots: run folders, or folders that hold some.
        key: a number of metrics.jsonl, such as nll, train_loss or lr; None: what chooses the best checkpoint.
        file: where to draw; its suffix chooses the format.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: no run has an epoch with this number, or the format is unknown.
    """
    from mpvg import figures

    curves: dict[str, list[list[float]]] = {}
    known: set[str] = set()
    for found in (state for root in roots for state in find_runs(root)):
        known |= {name for line in found.metrics for name, value in line.items() if isinstance(value, float)}
        if found.run is None:
            continue
        key = key or task_class(found.run.config.task).best
        values = [line[key] for line in found.metrics if key in line]
        if values:
            config = replace(found.run.config, seed=0)
            curves.setdefault(f"{config.model} {method_name(config)} ({config.digest()})", []).append(values)
    if not curves:
        wanted = repr(key) if key else "an epoch to draw"
        raise ValueError(
            f"no run has {wanted} yet; allowed: {', '.join(sorted(known)) or 'nothing, before an epoch ends'}"
        )
    shortest = {name: min(map(len, repeated)) for name, repeated in curves.items()}
    cut = {name: [values[: shortest[name]] for values in repeated] for name, repeated in curves.items()}
    label = key or ""
    figures.save(figures.lines(cut, label, "epoch", label, first=1), file)
