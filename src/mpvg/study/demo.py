"""`mpvg demo`: a few methods on small data, a table, a sentence on what moves, and a report."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mpvg import runs
from mpvg.analysis import report
from mpvg.pages import figure
from mpvg.study.folder import StudyFolder, make_folder
from mpvg.study.plan import read_study
from mpvg.study.runner import run_study
from mpvg.validation import printable

STUDIES = {"digits": "demo", "fashion-mnist": "demo_fashion"}
"""Data set -> the ready study that the demo runs there."""
LONG = "_long"
"""How the name of an arm ends that repeats another one with a larger budget."""


@dataclass(frozen=True)
class Trained:
    """The runs of an arm, one per seed."""

    label: str
    summaries: list[dict[str, Any]]
    runs: list[runs.Run]

    @property
    def epochs(self) -> int:
        """Epochs of each run."""
        return int(self.summaries[0]["epochs"])

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

    Two seeds each; GAP and MPVG also at four times the budget. An interrupted demo in the same folder is continued.
    Writes report.html and its two figures as .svg and .png into `out`, which is the folder of a study.

    Args:
        data: one of STUDIES.
        out: folder of the study and the report.

    Raises:
        ValueError: a run diverged, or another command is doing it; else as `mpvg.study.runner.run_study`.
    """
    study = read_study(STUDIES[data])
    folder = make_folder(out, study, next(iter(study.scales)))
    run_study(folder)
    results = collect(folder)
    Console().print(_table(results))
    sentence = what_shrinks(results)
    print(sentence)
    print("\nreport: " + printable(str(_write_report(data, results, sentence, out))))


def collect(folder: StudyFolder) -> dict[str, Trained]:
    """The runs of the demo by arm.

    Raises:
        ValueError: one is missing.
    """
    done = {row.key for row in folder.rows() if row.status == "done"}
    found: dict[str, list[runs.Run]] = {arm.name: [] for arm in folder.study.arms}
    for cell in folder.cells():
        if cell.key not in done:
            raise ValueError(
                f"the demo has no result for {cell.folder}: it diverged, or another command is training it; "
                "give the same command again later, or another --out"
            )
        found[cell.arm].append(runs.load(folder.path / cell.folder))
    labels = {arm: folder.study.arm(arm.removesuffix(LONG)).label for arm in found}
    return {arm: Trained(labels[arm], [_summary(run) for run in own], own) for arm, own in found.items()}


def _summary(run: runs.Run) -> dict[str, Any]:
    summary = run.summary()
    if summary is None:
        raise ValueError(f"{run.path / 'summary.json'} is missing, although the ledger has the run; give another --out")
    return summary


def what_shrinks(results: Results) -> str:
    """One sentence on which differences shrink with a longer budget."""
    mean = {name: trained.mean for name, trained in results.items()}
    short, long = mean["mpvg"] - mean["gap"], mean["mpvg_long"] - mean["gap_long"]
    verdict = "shrinks to" if abs(long) < abs(short) else "does not shrink:"
    epochs, seeds = results["gap"].epochs, len(results["gap"].summaries)
    budget = f"{epochs} epoch{'s' if epochs > 1 else ''}"
    return (
        f"MPVG - GAP is {short:+.2f} points at {budget} and {verdict} {long:+.2f} at {results['gap_long'].epochs}; "
        f"at {budget} starting GAP's PE at std 1 alone makes {mean['gap_std1'] - mean['gap']:+.2f}, "
        f"and PVG {mean['pvg'] - mean['gap']:+.2f} (means of {seeds} seeds: this shows what moves, not who wins)."
    )


COLUMNS = ("", "epochs", "accuracy", "each seed, %", "NLL", "parameters", "images/s")


def table_rows(results: Results) -> list[list[str]]:
    """The table of the demo as text, a row per arm, in the order of COLUMNS."""
    return [
        [
            trained.label,
            str(trained.epochs),
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


def _write_report(data: str, results: Results, sentence: str, out: Path) -> Path:
    """Writes the report of all runs, with the sentence and the learning curves below its table of the runs."""
    from mpvg import figures

    curves = {
        f"{trained.label} ({trained.epochs} epochs)": [
            [line["accuracy"] for line in run.metrics()] for run in trained.runs
        ]
        for trained in results.values()
    }
    drawn = figures.lines(curves, f"Learning curves on {data}", "epoch", "test accuracy", first=1, percent=True)
    figures.save(drawn, out / "curves.svg", out / "curves.png")
    summary = results["gap"].summaries[0]
    made = (
        f"{summary['model']}; commit {summary['commit']}, {summary['hardware']}, torch {summary['torch']}, "
        f"{summary['date'][:10]}"
    )
    caption = "Accuracy on the test images after each epoch; a band is the range over the seeds."
    picture = figure(out / "curves.png", caption, f"{caption} Also as curves.svg.", id="curves")
    front = f"<p>{escape(sentence)}</p>{picture}<p><small>{escape(made)}</small></p>"
    analyzed = [report.analyze_run(run, report.Options()) for trained in results.values() for run in trained.runs]
    return report.write(out, analyzed, {}, title=f"mpvg demo: {data}", front=front).page
