"""Many run folders at once: what each holds, and their curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpvg.config import UNCOUNTED, RunConfig, flatten
from mpvg.delivery import as_spec, describe_spec
from mpvg.runs.lock import current_holder
from mpvg.runs.run import Run, load
from mpvg.statistics import mean_and_interval
from mpvg.tasks import best_line, selecting_metric, task_class
from mpvg.tasks.task import EMA, Metric
from mpvg.validation import printable

FIELDS = (
    *("run", "state", "epochs_done", "epochs", "best_metric", "best", "recipe", "data", "model", "method", "seed"),
    "digest",
)
"""What `RunState.values` has."""
COLUMNS = ("run", "state", "epochs", "best", "data", "model", "method", "seed")

MEANS = ("runs", "seeds", "last epoch, mean (95 %)")


@dataclass(frozen=True)
class RunState:
    """What a run folder holds."""

    path: Path
    """The folder."""
    state: str
    """complete, unfinished, training with the process that does, or why it cannot be read."""
    run: Run | None
    """None: it cannot be read."""
    metrics: list[dict[str, Any]]
    """Its epochs so far."""

    def row(self) -> tuple[str, ...]:
        """The values of COLUMNS as text."""
        if self.run is None:
            return (str(self.path), self.state, *("-" * (len(COLUMNS) - 2)))
        config, metric = self.run.config, self._metric()
        best = self.best()
        shown = "-" if best is None else f"{metric.title} {metric.format(best)}"
        inside = config.task_options.get("vit")
        model = config.model if inside is None else f"{config.model} ({inside})"
        described = config.data, model, method_name(config), str(config.seed)
        return (str(self.path), self.state, f"{len(self.metrics)}/{config.epochs}", shown, *described)

    def values(self) -> dict[str, Any]:
        """The values of FIELDS, JSON-safe; None where it cannot be read."""
        values: dict[str, Any] = dict.fromkeys(FIELDS) | {"run": str(self.path), "state": self.state}
        if self.run is None:
            return values
        config = self.run.config
        values |= {name: getattr(config, name) for name in ("epochs", "recipe", "data", "model", "seed")}
        best = {"best_metric": task_class(config.task).best, "best": self.best()}
        return (
            values | best | {"epochs_done": len(self.metrics), "method": method_name(config), "digest": config.digest()}
        )

    def best(self) -> float | None:
        """The value of the metric that chooses checkpoints at the best epoch so far; None before an epoch ends."""
        if self.run is None or (line := best_line(self.run.config, self.metrics)) is None:
            return None
        value: float = line[selecting_metric(self.run.config)]
        return value

    def _metric(self) -> Metric:
        assert self.run is not None
        task = task_class(self.run.config.task)
        return task.metrics[task.best]


def seed_means(states: Sequence[RunState]) -> list[tuple[str, ...]]:
    """The rows of MEANS: complete runs that differ in the seed only, where there are several.

    The value is that of the last epoch, which no validation set selected, as mean and Student's t interval (95 %),
    which ends at 0 and at 100 %.
    """
    groups: dict[str, dict[int, RunState]] = {}
    configs: dict[str, RunConfig] = {}
    for state in states:
        if state.run is not None and state.state == "complete":
            config = replace(state.run.config, seed=0)
            configs[config.digest()] = config
            groups.setdefault(config.digest(), {})[state.run.config.seed] = state  # a copy of a run counts once
    names = names_by_difference(configs) if configs else {}
    rows: list[tuple[str, ...]] = []
    for digest, seeds in groups.items():
        task = task_class(configs[digest].task)
        metric = task.metrics[task.best]
        mean, interval = mean_and_interval([state.metrics[-1][task.best] for state in seeds.values()])
        if interval is not None:
            low, high = (min(max(value, 0), 1) if metric.percent else value for value in interval)
            spread = f"{metric.format(low)} to {metric.format(high)}"
            rows.append((names[digest], str(len(seeds)), f"{metric.title} {metric.format(mean)} ({spread})"))
    return rows


def method_name(config: RunConfig) -> str:
    """The name of a run's method; for a spec, the nearest method's and what differs."""
    return config.method if isinstance(config.method, str) else describe_spec(as_spec(config.method))


def find_runs(root: Path) -> list[RunState]:
    """Reads all run folders in a folder, or the one that it is; a damaged one is listed as such.

    Raises:
        FileNotFoundError: there is no run.
    """
    found = [_read(config.parent) for config in sorted(root.rglob("config.yaml"))]
    if not found:
        raise FileNotFoundError(
            f"no run in {root}; give a folder that `mpvg train` made, or one with such folders in it"
        )
    return found


def _read(path: Path) -> RunState:
    try:
        run = load(path)
        method_name(run.config)  # refuses a spec that does not exist
        metrics = run.metrics()
        if run.summary() is not None:
            if len(metrics) != run.config.epochs:
                raise ValueError(f"{path / 'metrics.jsonl'} has {len(metrics)} of {run.config.epochs} epochs")
            return RunState(path, "complete", run, metrics)
    except (ValueError, OSError) as error:
        return RunState(path, f"damaged: {' '.join(str(error).split())}", None, [])
    holder = current_holder(path)
    return RunState(path, f"training ({holder})" if holder else "unfinished", run, metrics)


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

    states = [state for root in roots for state in find_runs(root) if state.run is not None]
    known = {name for state in states for line in state.metrics for name, value in line.items() if type(value) is float}
    curves: dict[str, list[list[float]]] = {}
    configs: dict[str, RunConfig] = {}
    metric: Metric | None = None
    for state in states:
        assert state.run is not None
        task = task_class(state.run.config.task)
        key = key or task.best
        metric = metric or task.metrics.get(key.removeprefix(EMA))
        if values := [line[key] for line in state.metrics if key in line]:
            config = replace(state.run.config, seed=0)
            configs[config.digest()] = config
            curves.setdefault(config.digest(), []).append(values)
    if not curves:
        what = "a number to draw" if key is None else repr(key)
        allowed = ", ".join(sorted(known)) or "nothing, before an epoch ends"
        raise ValueError(f"no run has {what} yet; allowed: {allowed}")
    shortest = {digest: min(map(len, repeated)) for digest, repeated in curves.items()}
    names = names_by_difference(configs)
    cut = {names[digest]: [one[: shortest[digest]] for one in repeated] for digest, repeated in curves.items()}
    title = _title(key or "", metric)
    percent = metric is not None and metric.percent
    figures.save(figures.lines(cut, title, "epoch", title, first=1, percent=percent), file)


def names_by_difference(configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """Digest -> a short name that says in what the config differs from the others; alone: its network and method."""
    flat = {digest: flatten(config.to_dict()) | {"method": method_name(config)} for digest, config in configs.items()}
    fields = [name for name in next(iter(flat.values())) if name.split(".")[0] not in (*UNCOUNTED, "seed", "recipe")]
    differing = [name for name in fields if len({repr(values[name]) for values in flat.values()}) > 1]
    bare = [name for name in ("data", "model", "method") if name in differing]
    others = [name for name in differing if name not in bare]
    if not differing:
        bare = ["model", "method"]
    names = {}
    for digest, values in flat.items():
        parts = [str(values[name]) for name in bare] + [f"{name}={values[name]}" for name in others]
        names[digest] = printable(", ".join(parts))
    if len(set(names.values())) < len(names):  # they differ in a field that is no value of the config, or in the recipe
        names = {digest: f"{name}, recipe={flat[digest]['recipe']} ({digest})" for digest, name in names.items()}
    return names


def _title(key: str, metric: Metric | None) -> str:
    if metric is None:
        return key
    return f"{metric.title} of the averaged weights" if key.startswith(EMA) else metric.title
