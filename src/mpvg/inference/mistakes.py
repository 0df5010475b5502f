"""`mpvg evaluate RUN --out DIR`: what a model gets wrong, as files and as one page that needs nothing else.

DIR/mistakes.html        everything below on one page
DIR/results.json         the scores, the tables, which run and weights
DIR/<table>.csv          one file for each table
DIR/<chart>.png          one file for each chart
DIR/predictions.jsonl    a line for each image: its name, where it has one, and what was predicted
"""

import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from mpvg.data.types import Batches, NamedSamples
from mpvg.files import atomic_text, atomic_write, check_output, csv_text, whole_folder, write_json
from mpvg.pages import embedded, figure, fill, table
from mpvg.runs.environment import environment, made_with
from mpvg.tasks import Metric, Review, Reviewing, Task
from mpvg.tasks.review import Cell, Chart, Example, Table

TEMPLATE = Path(__file__).with_name("mistakes.html")
PAGE = "mistakes.html"
_WIDE = 1.3  # aspect ratio from which on an example takes more than a narrow column


def reviewing(task: Task[Any], name: str) -> Reviewing:
    """The task, if it tells of mistakes and what draws them is installed.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the task does not tell of mistakes.
    """
    if not isinstance(task, Reviewing):
        raise ValueError(f"--out is for tasks that tell of their mistakes, and {name!r} has no `review`; leave it out")
    from mpvg.inference import charts  # noqa: F401  # said now, not after the pass

    return task


def write_mistakes(
    out: Path, task: Reviewing, model: nn.Module, batches: Batches[Any], *, title: str, weights: str
) -> Review:
    """Evaluates a model in one pass and writes what it gets wrong; the folder appears when it is complete.

    Args:
        out: folder that is not there, or is empty.
        task: of the run.
        model: on the device of the batches.
        batches: the validation set.
        title: of the page.
        weights: which weights these are, in words.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: no image can be read.
    """
    check_output(out)
    review = task.review(model, batches)
    names = sample_names(batches, review.evaluation.images)
    with whole_folder(out.absolute()) as folder:
        _write(folder, review, task.metrics, names, title=title, weights=weights, skipped=batches.skipped)
    return review


def sample_names(batches: Batches[Any], images: int) -> list[str | None]:
    """The names of the samples that were evaluated, in order; None where they have none.

    Args:
        batches: after a whole pass over them on one process.
        images: how many were evaluated.
    """
    if not isinstance(batches, NamedSamples):
        return [None] * images
    numbers = (number for number in range(images + batches.skipped) if number not in batches.unreadable)
    return [batches.name(number) for number in numbers]


def _write(
    folder: Path,
    review: Review,
    metrics: Mapping[str, Metric],
    names: Sequence[str | None],
    *,
    title: str,
    weights: str,
    skipped: int,
) -> None:
    from mpvg.figures import save
    from mpvg.inference.charts import draw

    for one in review.tables:
        rows = [dict(zip(one.columns, row, strict=True)) for row in one.rows]
        atomic_text(folder / f"{one.name}.csv", csv_text(one.columns, rows))
    pictures = {chart.name: folder / f"{chart.name}.png" for chart in review.charts}
    for chart in review.charts:
        save(draw(chart), pictures[chart.name])
    lines = [
        json.dumps({**({} if name is None else {"sample": name}), **one})
        for name, one in zip(names, review.predictions, strict=True)
    ]
    atomic_write(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines).encode())
    results = {
        "title": title,
        "weights": weights,
        "images": review.evaluation.images,
        "skipped": skipped,
        "metrics": review.evaluation.metrics,
        **review.facts,
        "tables": {one.name: {"columns": one.columns, "rows": one.rows} for one in review.tables},
        "environment": environment(),
    }
    write_json(folder / "results.json", results)
    left_out = f", and {skipped:,} that cannot be read are left out" if skipped else ""
    files = sorted(path.name for path in folder.iterdir())
    parts = {
        "title": escape(title),
        "scores": _scores(review, metrics),
        "about": escape(f"{review.evaluation.images:,} images{left_out}; {weights}."),
        "examples": _examples(review, names),
        "parts": "".join(
            [
                *(_chart(chart, pictures[chart.name]) for chart in review.charts),
                *(_table(one) for one in review.tables if one.shown != 0),
            ]
        ),
        "files": escape(", ".join(files)),
        "made": escape(made_with()),
    }
    atomic_text(folder / PAGE, fill(TEMPLATE, parts))


def _scores(review: Review, metrics: Mapping[str, Metric]) -> str:
    rows = [(metrics[name].title, [metrics[name].format(value)]) for name, value in review.evaluation.metrics.items()]
    rows += [(name.upper(), [f"{value:.4f}"]) for name, value in review.facts.items()]
    return table("Scores", ["", "value"], [(escape(title), values) for title, values in rows])


def _chart(chart: Chart, picture: Path) -> str:
    return f"<h2>{escape(chart.title)}</h2>" + figure(picture, chart.title, chart.text, id=chart.name)


def _table(one: Table) -> str:
    shown = one.rows[: one.shown]
    rest = len(one.rows) - len(shown)
    more = f" The other {rest:,} rows are in {one.name}.csv." if rest else ""
    rows = [
        (
            escape(str(row[0])),
            [_cell(cell, share=name in one.shares) for name, cell in zip(one.columns[1:], row[1:], strict=True)],
        )
        for row in shown
    ]
    head = [f"{name}, %" if name in one.shares else name for name in one.columns]
    return f"<h2>{escape(one.title)}</h2><p>{escape(one.text + more)}</p>{table(one.title, head, rows)}"


def _cell(value: Cell, *, share: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.2f}" if share else f"{value:.4f}"
    return escape(f"{value:,}" if isinstance(value, int) else value)


def _examples(review: Review, names: Sequence[str | None]) -> str:
    if not review.examples:
        return f"<h2>{escape(review.examples_title)}</h2><p>There is none.</p>"
    wide = any(one.picture.width > _WIDE * one.picture.height for one in review.examples)
    items = "".join(_example(one, names[one.index]) for one in review.examples)
    return (
        f"<h2>{escape(review.examples_title)}</h2><p>{escape(review.examples_text)}</p>"
        f'<ul class="examples{" wide" if wide else ""}">{items}</ul>'
    )


def _example(one: Example, name: str | None) -> str:
    content = io.BytesIO()
    one.picture.save(content, "PNG")
    said = f"image {one.index}" if name is None else name
    lines = "".join(f"<br>{escape(line)}" for line in one.lines)
    return (
        f'<li><img alt="{escape("; ".join((said, *one.lines)))}" src="{embedded(content.getvalue())}">'
        f"<small>{escape(said)}</small>{lines.removeprefix('<br>')}</li>"
    )
