"""The tables of a study in Markdown, LaTeX, HTML and CSV, its picture, and its numbers as JSON.

All forms are made of the same blocks, which are made of `results` and of the paper's printed values.
"""

import json
from pathlib import Path
from typing import Any

from mpvg.files import atomic_text, csv_text
from mpvg.statistics import Interval
from mpvg.study.contrasts import Result
from mpvg.study.folder import open_folder
from mpvg.study.formats import Block, to_html, to_latex, to_markdown
from mpvg.study.paper import printed_table
from mpvg.study.plan import Study
from mpvg.study.results import ArmResult, SettingResult, StudyResults, collect
from mpvg.tasks import Metric


def write_tables(path: Path) -> list[Path]:
    """Writes table.md, table.tex, table.html, table.csv, results.json and bars.svg into a study's folder.

    Args:
        path: of the study; study.yaml and ledger.jsonl are all that is read.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the study or its ledger is damaged.
    """
    folder = open_folder(path)
    return write_results(collect(folder.study, folder.scale, folder.rows()), path)


def write_results(results: StudyResults, path: Path) -> list[Path]:
    """Writes what `write_tables` writes, from results.

    Raises:
        OSError: a file cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    texts, picture = render(results), None
    if results.settings:
        from mpvg import figures
        from mpvg.study.bars import draw_bars

        figures.save(draw_bars(results), path / "bars.svg")
        picture = (path / "bars.svg").read_bytes()
    texts["table.html"] = to_html(_title(results.study), header(results), make_blocks(results), picture)
    for name, text in texts.items():
        atomic_text(path / name, text)
    return [*(path / name for name in texts), *([path / "bars.svg"] if picture is not None else [])]


def render(results: StudyResults) -> dict[str, str]:
    """File name -> its text, for every form without the picture."""
    blocks, top = make_blocks(results), header(results)
    values = to_values(results)
    return {
        "table.md": to_markdown(_title(results.study), top, blocks),
        "table.tex": to_latex([_title(results.study), *top], blocks),
        "table.csv": csv_text(tuple(values["rows"][0]) if values["rows"] else ("setting",), values["rows"]),
        "results.json": json.dumps(values, indent=1) + "\n",
    }


def _title(study: Study) -> str:
    return f"{study.name}: {study.question}"


def header(results: StudyResults) -> list[str]:
    """What stands above the tables."""
    end_point, study = next(iter(results.study.margins)), results.study
    return [
        *(f"{setting.label}: {remark}" for setting in results.settings for remark in setting.remarks),
        f"Study {study.name} at scale {results.scale}. End point: {results.metrics[end_point].title} after the last "
        "epoch. Mean over seeds with 95 % interval. The best epoch is selected on the test set: shown, never tested.",
        f"Made by {results.made}.",
    ]


def headline(results: StudyResults) -> list[str]:
    """The verdicts on the end point, one line for each contrast, below what must be known before them."""
    end_point = next(iter(results.study.margins))
    metric = results.metrics[end_point]
    lines = []
    for setting in results.settings:
        lines += [f"{setting.label}: {remark}" for remark in setting.remarks]
        for r in setting.contrasts.get(end_point, ()):
            formula, difference = describe_result(results, r)
            lines.append(f"{setting.label}: {formula}: {metric.title} {difference}: {verdict(r, metric)}")
    return lines


def describe_result(results: StudyResults, result: Result) -> tuple[str, str]:
    """A contrast as a formula, and its difference with the interval."""
    metric = results.metrics[result.metric]
    interval = f"{_signed(metric, result.interval.low)} to {_signed(metric, result.interval.high)}"
    formula = _formula(result, {arm.name: arm.label for arm in results.study.arms})
    return formula, f"{_signed(metric, result.difference)} ({interval})"


def as_text(results: StudyResults) -> list[str]:
    """The arms and the verdicts as lines for a terminal."""
    lines = []
    for setting in results.settings:
        block = _arms_block(results, setting)
        widths = [max(map(len, column)) for column in zip(block.head, *block.rows, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (block.head, *block.rows)
        ]
    return [*lines, "", *headline(results)]


def make_blocks(results: StudyResults) -> list[Block]:
    """The tables of a study: arms and contrasts of each setting, and the paper's values."""
    blocks = []
    for setting in results.settings:
        blocks.append(_arms_block(results, setting))
        blocks += [_contrasts_block(results, setting, metric) for metric in setting.contrasts]
    return blocks + _paper_blocks(results.study.table)


def _arms_block(results: StudyResults, setting: SettingResult) -> Block:
    metrics = results.metrics
    head = ("", "seeds", *(_unit(metric) for metric in metrics.values()), "best epoch", "parameters")
    printed_head, printed = _printed_beside(results.study, setting.label)
    rows = []
    for arm in setting.arms:
        count = len(next(iter(arm.values.values())))
        shown = [_mean(arm, name, metric) for name, metric in metrics.items()]
        best = f"{100 * sum(arm.best) / len(arm.best):.2f}" if arm.best else "-"
        seeds = f"{count} ({arm.diverged} diverged)" if arm.diverged else str(count)
        parameters = f"{arm.parameters:,}" if arm.parameters else "-"
        rows.append((arm.label, seeds, *shown, best, parameters, *printed.get(arm.label, ["-"] * len(printed_head))))
    return Block(setting.label, (*head, *printed_head), tuple(rows))


def _printed_beside(study: Study, setting: str) -> tuple[tuple[str, ...], dict[str, tuple[str, str]]]:
    """The heads of the paper's two columns, and label of an arm -> its value and what it is above the reference."""
    if study.table is None:
        return (), {}
    table, reference = printed_table(study.table), study.arm(study.reference).label
    column = table.column(setting)
    values = {label: row[column] for label, row in table.rows.items()}
    base = values.get(reference)
    shown = {
        label: (f"{value:.2f}", "-" if base is None else f"{value - base:+.2f}")
        for label, value in values.items()
        if value is not None
    }
    return (f"paper: {table.columns[column]}, {table.metric}", f"paper: above {reference}"), shown


def _contrasts_block(results: StudyResults, setting: SettingResult, name: str) -> Block:
    metric, labels = results.metrics[name], {arm.name: arm.label for arm in results.study.arms}
    head = ("", f"difference in {_unit(metric)}", "95 % interval", "p", "p (Holm)", "p (TOST)", "verdict")
    rows = []
    for r in setting.contrasts[name]:
        interval = f"{_signed(metric, r.interval.low)} to {_signed(metric, r.interval.high)}"
        values = _signed(metric, r.difference), interval, _p(r.p), "-" if r.is_control else _p(r.p_holm)
        rows.append((_formula(r, labels), *values, _p(r.p_equivalent), verdict(r, metric)))
    notes = tuple(f"{_formula(r, labels)}: {r.contrast.claim}" for r in setting.contrasts[name] if r.contrast.claim)
    return Block(
        f"{setting.label}: {metric.title}, margin {margin_text(metric, results.study.margins[name])}",
        head,
        tuple(rows),
        notes,
    )


def margin_text(metric: Metric, margin: float) -> str:
    """A margin in the unit in which the metric is shown."""
    return f"{100 * margin if metric.percent else margin:g}"


def word_for(result: Result, metric: Metric) -> str:
    """The word for a result, with its margin in the unit in which the metric is shown."""
    return result.word.replace(f"within {result.margin:g}", f"within {margin_text(metric, result.margin)}")


def verdict(result: Result, metric: Metric) -> str:
    """The word for a result, or what it says of a control."""
    word = word_for(result, metric)
    if result.is_control:
        if not result.can_differ:
            return f"no control: {result.seeds} seeds cannot show a difference"
        return f"control: {word}" if result.differs else "control holds"
    return word


def _paper_blocks(table: str | None) -> list[Block]:
    if table is None:
        return []
    given = printed_table(table)
    rows = tuple(
        (label, *("-" if value is None else f"{value:.2f}" for value in values)) for label, values in given.rows.items()
    )
    return [Block(f"{given.title} of the paper, {given.metric}", ("", *given.columns), rows, given.notes)]


def _unit(metric: Metric) -> str:
    return f"{metric.title}, %" if metric.percent else metric.title


def _mean(arm: ArmResult, name: str, metric: Metric) -> str:
    if not arm.values[name]:
        return "-"
    mean, interval = arm.mean(name)
    return _plain(metric, mean) + (f" ± {_plain(metric, (interval.high - interval.low) / 2)}" if interval else "")


def _plain(metric: Metric, value: float) -> str:
    return f"{100 * value:.2f}" if metric.percent else f"{value:.4f}"


def _signed(metric: Metric, value: float) -> str:
    return f"{100 * value:+.2f}" if metric.percent else f"{value:+.4f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _formula(result: Result, labels: dict[str, str]) -> str:
    """A contrast as text, such as "PVG - GAP"."""
    parts = []
    for arm, weight in sorted(result.contrast.weights.items(), key=lambda item: -item[1]):
        size = "" if abs(weight) == 1 else f"{abs(weight):g} x "
        sign = " - " if weight < 0 else " + "
        label = f"({labels[arm]})" if any(c in labels[arm] for c in ",-+") else labels[arm]
        parts.append(f"{sign}{size}{label}")
    return "".join(parts).removeprefix(" + ")


def to_values(results: StudyResults) -> dict[str, Any]:
    """All numbers, JSON-safe: one row for each arm and metric, and one for each contrast and metric."""
    rows, contrasts = [], []
    for setting in results.settings:
        for arm in setting.arms:
            for metric, values in arm.values.items():
                mean, interval = arm.mean(metric) if values else (None, None)
                rows.append(
                    {
                        "setting": setting.name,
                        "arm": arm.name,
                        "metric": metric,
                        "seeds": len(values),
                        "diverged": arm.diverged,
                        "mean": mean,
                        **_bounds(interval),
                    }
                )
        for metric, found in setting.contrasts.items():
            for r in found:
                contrasts.append(
                    {
                        "setting": setting.name,
                        "contrast": r.contrast.name,
                        "metric": metric,
                        "difference": r.difference,
                        **_bounds(r.interval),
                        "p": r.p,
                        "p_holm": r.p_holm,
                        "p_equivalent": r.p_equivalent,
                        "margin": r.margin,
                        "seeds": r.seeds,
                        "needed": r.needed,
                        "control": r.is_control,
                        "verdict": r.word,
                    }
                )
    return {
        "study": results.study.name,
        "question": results.study.question,
        "scale": results.scale,
        "made": results.made,
        "remarks": {setting.name: setting.remarks for setting in results.settings},
        "rows": rows,
        "contrasts": contrasts,
    }


def _bounds(interval: Interval | None) -> dict[str, float | None]:
    return {"low": interval.low if interval else None, "high": interval.high if interval else None}
