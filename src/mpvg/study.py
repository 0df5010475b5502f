"""Runs side by side: a plan, its runs in parallel, and what they say together."""

import json
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mpvg import runs, training
from mpvg.analysis import report
from mpvg.config import RunConfig
from mpvg.recipes import recipe


@dataclass(frozen=True)
class Arm:
    """What is compared: a method and how its PE starts, at a budget."""

    label: str
    method: str
    pos_std: float | None
    epochs: int

    def run(self, base: RunConfig, seed: int, out: Path) -> RunConfig:
        """The arm's run of a seed."""
        std = "" if self.pos_std is None else f"-posstd{self.pos_std:g}"
        return replace(
            base,
            method=self.method,
            epochs=self.epochs,
            seed=seed,
            threads=1,
            device="cpu",
            out=str(out / f"{self.method}{std}-{self.epochs}ep-seed{seed}"),
            network=replace(base.network, pos_std=self.pos_std),
        )


DEMOS = {
    "digits": recipe(None, "digits"),
    "fashion-mnist": replace(recipe(None, "fashion-mnist"), model="vit_mini_patch7_28", epochs=1),
}
"""The data sets that the demo can be run on, and what it trains there."""

SEEDS = (0, 1)
LONGER = 4
"""How many times longer the second budget is."""


def demo(data: str, out: Path) -> None:
    """Trains GAP, GAP with its PE started at std 1, PVG and MPVG, and says what happened.

    Two seeds each; GAP and MPVG also at four times the budget. Runs of an earlier, interrupted demo in the same folder
    are continued. Writes report.html, its two figures as .svg and .png, and results.jsonl, a line a run, into `out`.

    Args:
        data: one of DEMOS.
        out: folder of the runs and the report.

    Raises:
        As `mpvg.training.train`.
    """
    base = DEMOS[data]
    short, long = base.epochs, LONGER * base.epochs
    arms = [
        Arm("GAP", "gap", None, short),
        Arm("GAP, PE std 1", "gap", 1.0, short),
        Arm("PVG", "pvg", None, short),
        Arm("MPVG", "mpvg", None, short),
        Arm("GAP", "gap", None, long),
        Arm("MPVG", "mpvg", None, long),
    ]
    plan = {(arm, seed): arm.run(base, seed, out) for arm in arms for seed in SEEDS}
    summaries = run_all(list(plan.values()))
    results = {arm: [summaries[plan[arm, seed].out] for seed in SEEDS] for arm in arms}
    folders = {arm: [runs.load(plan[arm, seed].out) for seed in SEEDS] for arm in arms}
    records = "".join(json.dumps(summaries[config.out]) + "\n" for config in plan.values())
    (out / "results.jsonl").write_text(records)
    Console().print(_table(results))
    sentence = _what_shrinks(results, arms)
    print(sentence)
    report = _report(data, base, results, folders, sentence, out)
    print(f"\nreport: {report}")


def run_all(configs: Sequence[RunConfig]) -> dict[str, dict[str, Any]]:
    """Runs the configs in parallel, one process a core and one thread a process; continues what was begun.

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
        task = progress.add_task("epochs", total=total)
        left: dict[Future[dict[str, Any]], RunConfig] = {pool.submit(_run, c): c for c in longest_first}
        try:
            while left:
                done, _ = wait(left, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    config = left.pop(future)
                    summary = summaries[config.out] = future.result()
                    line = f"{len(summaries)}/{len(configs)} done  {config.out}  {100 * summary['accuracy']:.2f} %"
                    progress.console.print(line, markup=False)
                progress.update(task, completed=sum(_epochs_done(config) for config in configs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return summaries


def _run(config: RunConfig) -> dict[str, Any]:
    """Trains or continues one run, in a process of the pool."""
    if (Path(config.out) / "config.yaml").is_file():
        found = runs.load(config.out).config
        if found.digest() != config.digest():
            raise ValueError(f"{config.out} holds another run than this plan's; remove it, or give another --out")
        return training.resume(config.out, quiet=True)
    return training.train(config, quiet=True)


def _epochs_done(config: RunConfig) -> int:
    file = Path(config.out) / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def _rows(results: dict[Arm, list[dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for arm, summaries in results.items():
        accuracies = [100 * summary["accuracy"] for summary in summaries]
        rows.append(
            [
                arm.label,
                str(arm.epochs),
                f"{statistics.mean(accuracies):.2f}",
                " ".join(f"{value:.2f}" for value in accuracies),
                f"{statistics.mean(summary['nll'] for summary in summaries):.4f}",
                f"{summaries[0]['parameters']:,}",
                f"{statistics.mean(summary['images_per_second'] for summary in summaries):.0f}",
            ]
        )
    return rows


_COLUMNS = ("", "epochs", "accuracy", "each seed, %", "NLL", "parameters", "images/s")


def _table(results: dict[Arm, list[dict[str, Any]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for row in _rows(results):
        table.add_row(*row)
    return table


def _what_shrinks(results: dict[Arm, list[dict[str, Any]]], arms: list[Arm]) -> str:
    """One sentence on which differences shrink with a longer budget."""

    def mean(arm: Arm) -> float:
        return 100 * statistics.mean(summary["accuracy"] for summary in results[arm])

    gap, started, pvg, mpvg, gap_long, mpvg_long = arms
    short, long = mean(mpvg) - mean(gap), mean(mpvg_long) - mean(gap_long)
    verdict = "shrinks to" if abs(long) < abs(short) else "does not shrink:"
    budget = f"{gap.epochs} epoch{'s' if gap.epochs > 1 else ''}"
    return (
        f"MPVG - GAP is {short:+.2f} points at {budget} and {verdict} {long:+.2f} at {gap_long.epochs}; "
        f"at {budget} starting GAP's PE at std 1 alone makes {mean(started) - mean(gap):+.2f}, "
        f"and PVG {mean(pvg) - mean(gap):+.2f} (means of {len(SEEDS)} seeds: this shows what moves, not who wins)."
    )


def _report(
    data: str,
    base: RunConfig,
    results: dict[Arm, list[dict[str, Any]]],
    folders: dict[Arm, list[runs.Run]],
    sentence: str,
    out: Path,
) -> Path:
    """Writes the report of all runs, with the comparison and the learning curves above the analysis."""
    from mpvg import figures

    curves = {
        f"{arm.label} ({arm.epochs} epochs)": [[100 * line["accuracy"] for line in run.metrics()] for run in repeated]
        for arm, repeated in folders.items()
    }
    drawn = figures.lines(curves, f"Learning curves on {data}", "epoch", "test accuracy, %", first=1)
    figures.save(drawn, out / "curves.svg", out / "curves.png")
    svg = (out / "curves.svg").read_text()
    summary = next(iter(results.values()))[0]
    head = "".join(f"<th>{escape(column)}</th>" for column in _COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(results))
    made = f"commit {summary['commit']}, {summary['hardware']}, torch {summary['torch']}, {summary['date'][:10]}"
    front = _FRONT.format(
        sentence=escape(sentence),
        head=head,
        body=body,
        model=escape(base.model),
        curves=svg[svg.index("<svg") :],
        made=escape(made),
    )
    analysed = [report.analyse_run(run, report.Options()) for repeated in folders.values() for run in repeated]
    return report.write(out, analysed, {}, title=f"mpvg demo: {data}", front=front).page


@dataclass(frozen=True)
class RunState:
    """What a run folder holds."""

    path: Path
    """The folder."""
    state: str
    """complete, unfinished, or why it cannot be read."""
    run: runs.Run | None
    """The run; None: it cannot be read."""
    metrics: list[dict[str, Any]]
    """Its epochs so far."""

    def row(self) -> tuple[str, ...]:
        """Path, state, epochs, best accuracy in percent, data, model, method and seed, as text."""
        if self.run is None:
            return (str(self.path), self.state, *("-" * 6))
        config = self.run.config
        best = f"{100 * max(line['accuracy'] for line in self.metrics):.2f}" if self.metrics else "-"
        epochs = f"{len(self.metrics)}/{config.epochs}"
        return (
            str(self.path),
            self.state,
            epochs,
            best,
            config.data,
            config.model,
            _method_name(config),
            str(config.seed),
        )


def _method_name(config: RunConfig) -> str:
    return config.method if isinstance(config.method, str) else "own"


def find_runs(root: Path) -> list[RunState]:
    """Reads all run folders in a folder, or the one that it is; one that is damaged is listed as such.

    Raises:
        FileNotFoundError: there is no run.
    """
    found = []
    for config in sorted(root.rglob("config.yaml")):
        try:
            run = runs.load(config.parent)
            state = "complete" if run.summary() is not None else "unfinished"
            found.append(RunState(config.parent, state, run, run.metrics()))
        except (ValueError, OSError) as error:
            found.append(RunState(config.parent, f"damaged: {error}", None, []))
    if not found:
        raise FileNotFoundError(
            f"no run in {root}; give a folder that `mpvg train` made, or one with such folders in it"
        )
    return found


def plot_runs(roots: Sequence[Path], key: str, file: Path) -> None:
    """Draws one number of every epoch for several runs; seeds of the same run are one line and a band.

    Args:
        roots: run folders, or folders that hold some.
        key: a number of metrics.jsonl, such as accuracy, ema_accuracy, nll, train_loss, lr.
        file: where to draw; its ending chooses the format.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: no run has an epoch with this number, or the format is unknown.
    """
    from mpvg import figures

    curves: dict[str, list[list[float]]] = {}
    known: set[str] = set()
    for found in (state for root in roots for state in find_runs(root)):
        known |= {name for line in found.metrics for name, value in line.items() if isinstance(value, float)}
        values = [line[key] for line in found.metrics if key in line]
        if found.run is not None and values:
            config = replace(found.run.config, seed=0)
            curves.setdefault(f"{config.model} {_method_name(config)} ({config.digest()})", []).append(values)
    if not curves:
        raise ValueError(
            f"no run has {key!r} yet; allowed: {', '.join(sorted(known)) or 'nothing, before an epoch ends'}"
        )
    shortest = {name: min(map(len, repeated)) for name, repeated in curves.items()}
    cut = {name: [values[: shortest[name]] for values in repeated] for name, repeated in curves.items()}
    figures.save(figures.lines(cut, key, "epoch", key, first=1), file)


_FRONT = """<p>{sentence}</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<p>{model}; accuracy and NLL on the test images after the last epoch; images/s of training on one thread, with as many
runs at a time as there are cores. A band is the range over the seeds.</p>
<figure>{curves}</figure>
<p><small>{made}</small></p>
"""
