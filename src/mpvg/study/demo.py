"""`mpvg demo`: a few methods on small data, a table, a sentence on what moves, and a report."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mpvg import runs
from mpvg.analysis import page, report
from mpvg.config import RunConfig
from mpvg.files import atomic_text
from mpvg.recipes import recipe
from mpvg.study.pool import run_all
from mpvg.validation import printable


@dataclass(frozen=True)
class Arm:
    """What is compared: a method, the standard deviation at which its PE starts, and a number of epochs."""

    label: str
    method: str
    pos_std: float | None
    epochs: int

    def run(self, base: RunConfig, seed: int, out: Path) -> RunConfig:
        """The arm's run with a seed."""
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
"""Data set -> the config that the demo trains there."""

SEEDS = (0, 1)
LONGER = 4
"""The second budget, as a multiple of the first."""


def make_arms(epochs: int) -> dict[str, Arm]:
    """What the demo trains, by the names that its sentence uses."""
    return {
        "gap": Arm("GAP", "gap", None, epochs),
        "gap_std1": Arm("GAP, PE std 1", "gap", 1.0, epochs),
        "pvg": Arm("PVG", "pvg", None, epochs),
        "mpvg": Arm("MPVG", "mpvg", None, epochs),
        "gap_long": Arm("GAP", "gap", None, LONGER * epochs),
        "mpvg_long": Arm("MPVG", "mpvg", None, LONGER * epochs),
    }


@dataclass(frozen=True)
class Trained:
    """The runs of an arm, one per seed."""

    arm: Arm
    summaries: list[dict[str, Any]]
    runs: list[runs.Run]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of each seed, in percent."""
        return [100 * summary["accuracy"] for summary in self.summaries]

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds, in percent."""
        return statistics.mean(self.accuracies)


Results = Mapping[str, Trained]
"""By the names of the arms."""


def demo(data: str, out: Path) -> None:
    """Trains GAP, GAP with its PE started at std 1, PVG and MPVG, and prints what happened.

    Two seeds each; GAP and MPVG also at four times the budget. Runs of an interrupted demo in the same folder are
    continued. Writes report.html, its two figures as .svg and .png, and results.jsonl, one line per run, into `out`.

    Args:
        data: one of DEMOS.
        out: folder of the runs and the report.

    Raises:
        As `mpvg.training.train`.
    """
    base = DEMOS[data]
    arms = make_arms(base.epochs)
    plan = {(name, seed): arm.run(base, seed, out) for name, arm in arms.items() for seed in SEEDS}
    summaries = run_all(list(plan.values()))
    folders = {name: [plan[name, seed].out for seed in SEEDS] for name in arms}
    results = {
        name: Trained(arm, [summaries[path] for path in folders[name]], [runs.load(path) for path in folders[name]])
        for name, arm in arms.items()
    }
    records = "".join(json.dumps(summaries[config.out]) + "\n" for config in plan.values())
    atomic_text(out / "results.jsonl", records)
    Console().print(_table(results))
    sentence = what_shrinks(results)
    print(sentence)
    print("\nreport: " + printable(str(_write_report(data, base, results, sentence, out))))


def what_shrinks(results: Results) -> str:
    """One sentence on which differences shrink with a longer budget."""
    mean = {name: trained.mean for name, trained in results.items()}
    short, long = mean["mpvg"] - mean["gap"], mean["mpvg_long"] - mean["gap_long"]
    verdict = "shrinks to" if abs(long) < abs(short) else "does not shrink:"
    epochs = results["gap"].arm.epochs
    budget = f"{epochs} epoch{'s' if epochs > 1 else ''}"
    return (
        f"MPVG - GAP is {short:+.2f} points at {budget} and {verdict} {long:+.2f} at {results['gap_long'].arm.epochs}; "
        f"at {budget} starting GAP's PE at std 1 alone makes {mean['gap_std1'] - mean['gap']:+.2f}, "
        f"and PVG {mean['pvg'] - mean['gap']:+.2f} (means of {len(SEEDS)} seeds: this shows what moves, not who wins)."
    )


COLUMNS = ("", "epochs", "accuracy", "each seed, %", "NLL", "parameters", "images/s")


def table_rows(results: Results) -> list[list[str]]:
    """The table of the demo as text, a row per arm, in the order of COLUMNS."""
    return [
        [
            trained.arm.label,
            str(trained.arm.epochs),
            f"{trained.mean:.2f}",
            " ".join(f"{value:.2f}" for value in trained.accuracies),
            f"{statistics.mean(summary['nll'] for summary in trained.summaries):.4f}",
            f"{trained.summaries[0]['parameters']:,}",
            f"{statistics.mean(summary['images_per_second'] for summary in trained.summaries):.0f}",
        ]
        for trained in results.values()
    ]


def _table(results: Results) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in table_rows(results):
        table.add_row(*row)
    return table


def _write_report(data: str, base: RunConfig, results: Results, sentence: str, out: Path) -> Path:
    """Writes the report of all runs, with the sentence and the learning curves below its table of the runs."""
    from mpvg import figures

    curves = {
        f"{trained.arm.label} ({trained.arm.epochs} epochs)": [
            [line["accuracy"] for line in run.metrics()] for run in trained.runs
        ]
        for trained in results.values()
    }
    drawn = figures.lines(curves, f"Learning curves on {data}", "epoch", "test accuracy", first=1, percent=True)
    figures.save(drawn, out / "curves.svg", out / "curves.png")
    summary = results["gap"].summaries[0]
    made = (
        f"{base.model}; commit {summary['commit']}, {summary['hardware']}, torch {summary['torch']}, "
        f"{summary['date'][:10]}"
    )
    caption = "Accuracy on the test images after each epoch; a band is the range over the seeds."
    picture = page.figure(out / "curves.png", caption, f"{caption} Also as curves.svg.", id="curves")
    front = f"<p>{escape(sentence)}</p>{picture}<p><small>{escape(made)}</small></p>"
    analyzed = [report.analyze_run(run, report.Options()) for trained in results.values() for run in trained.runs]
    return report.write(out, analyzed, {}, title=f"mpvg demo: {data}", front=front).page
