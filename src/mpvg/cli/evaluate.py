"""`mpvg evaluate`: a run's weights on a validation set."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpvg.cli.arguments import add_data, add_skip_corrupt, json_object, positive, run_parser, say, skipping
from mpvg.cli.own import add_model, use_models, use_models_of_runs
from mpvg.validation import printable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mpvg.config import RunConfig
    from mpvg.runs import Run
    from mpvg.runs.checkpoints import Which


def evaluate(arguments: list[str]) -> int:
    """Prints the metrics of a checkpoint."""
    parser = run_parser("evaluate", "Scores a run's checkpoint on every validation image once.", "last")
    add_data(parser)
    parser.add_argument("--batch_size", type=positive, help="images at once (default: the run's)")
    parser.add_argument("--recipe", help="RUN is a file of weights, such as an official one, of this recipe's network")
    parser.add_argument("--method", help="with --recipe: the method of the file (default: default)")
    parser.add_argument(
        "--task_options", type=json_object, metavar="JSON", help='other sizes or scales, such as {"flips": true}'
    )
    add_skip_corrupt(parser)
    parser.add_argument("--orientation", choices=("exif", "stored"), help="as `mpvg train` has it (default: the run's)")
    parser.add_argument("--out", metavar="DIR", help="new folder for the mistakes: mistakes.html, CSV, PNG, JSON")
    add_model(parser)
    given = parser.parse_args(arguments)
    out = None if given.out is None else Path(given.out)
    if out is not None:
        from mpvg.files import check_output

        check_output(out)
    if given.recipe is not None:
        return _evaluate_file(given, out)
    if given.method is not None:
        raise ValueError("--method is for a file of weights, with --recipe; a run has its own: leave it out")
    use_models_of_runs(given.model, [given.run])

    from mpvg import runs
    from mpvg.runs.memory import evaluation_cure, memory_errors

    run = runs.load(given.run)
    own, run = run.config, replace(run, config=_changed(run.config, given))
    batch, which = given.batch_size or run.config.batch_size, weights_text(run, given.checkpoint, ema=given.ema)
    with memory_errors(evaluation_cure(f"a smaller --batch_size than {batch}")):
        model = run.model(given.checkpoint, ema=given.ema).to(run.device)
        line = _score(run, model, run.device, given, out, which)
    say(line, which, *([] if out is None else [f"mistakes in {out}"]))
    unchanged = given.data is None and replace(run.config, loader=own.loader) == own
    if given.checkpoint == "last" and unchanged and (beside := best_text(run, ema=given.ema)):
        say(f"beside it, the best epoch, which was selected on this set: {beside}")
    return 0


def _score(
    run: "Run", model: "nn.Module", device: "torch.device", given: argparse.Namespace, out: Path | None, which: str
) -> str:
    """Evaluates a model and, if asked for, writes its mistakes; returns the scores as a line."""
    from mpvg.tasks import describe_metrics

    options = "" if given.task_options is None else f" with {json.dumps(given.task_options)}"
    options += "" if given.orientation is None else f", orientation {given.orientation}"
    task = run.task()
    if out is not None:
        from mpvg.inference.mistakes import reviewing, write_mistakes

        tells = reviewing(task, run.config.task)  # refused before anything is read
    data = None if given.recipe else given.data
    validation = run.validation(device, data=data, batch_size=given.batch_size)
    if out is None:
        found = task.evaluate(model, validation)
    else:
        title = f"The mistakes of {Path(given.run).name} on {given.data or run.config.data}"
        found = write_mistakes(
            out, tells, model, validation, title=printable(title), weights=f"{which}{options}"
        ).evaluation
    skipped = f", {validation.skipped} unreadable ones skipped" if validation.skipped else ""
    scores = ", ".join(describe_metrics(task, found.metrics))
    return f"{given.run}: {scores} on {found.images} images{options}{skipped}"


def _evaluate_file(given: argparse.Namespace, out: Path | None) -> int:
    """Prints the metrics of a file of weights, which is in no run folder."""
    import torch

    from mpvg.cli.arguments import parse_method
    from mpvg.recipes import recipe as find
    from mpvg.runs.memory import evaluation_cure, memory_errors
    from mpvg.runs.weights import weights_run

    config = replace(find(given.recipe, given.data), method=parse_method(given.method or "default"))
    use_models(given.model, {f"the recipe {given.recipe}": config.model})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = _changed(config, given)
    batch = given.batch_size or config.batch_size
    with memory_errors(evaluation_cure(f"a smaller --batch_size than {batch}")):
        run, model, report = weights_run(Path(given.run), config)
        line = _score(run, model.to(device), device, given, out, f"weights: {given.run}")
    say(line, *str(report).splitlines(), *([] if out is None else [f"mistakes in {out}"]))
    return 0


def _changed(config: "RunConfig", given: argparse.Namespace) -> "RunConfig":
    """The config with what an evaluation may do in another way."""
    from mpvg.tasks import evaluated_with

    config = skipping(evaluated_with(config, given.task_options or {}), given.skip_corrupt)
    return replace(config, orientation=given.orientation or config.orientation)


def weights_text(run: "Run", which: "Which", *, ema: bool) -> str:
    """Which weights of a run are used, as text."""
    from mpvg.runs.checkpoints import SELECTED

    line = run.recorded(which)
    when = f", after epoch {line['epoch']} of {run.config.epochs}" if line else ""
    return f"{'averaged ' if ema else ''}weights: {which}{when}{SELECTED[which]}"


def best_text(run: "Run", *, ema: bool) -> str | None:
    """The recorded metrics of the best epoch; None before an epoch ends."""
    from mpvg.tasks import best_line, describe_metrics
    from mpvg.tasks.task import EMA

    if (line := best_line(run.config, run.metrics())) is None:
        return None
    task, prefix = run.task(), EMA if ema else ""
    scores = {name: line[f"{prefix}{name}"] for name in task.metrics if f"{prefix}{name}" in line}
    return f"{', '.join(describe_metrics(task, scores))}, epoch {line['epoch']}"
