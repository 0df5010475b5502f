"""`mpvg evaluate`: a run's weights on a validation set."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpvg.cli.arguments import positive, run_parser, say

if TYPE_CHECKING:
    from mpvg.runs import Run
    from mpvg.runs.checkpoints import Which


def evaluate(arguments: list[str]) -> int:
    """Prints the metrics of a checkpoint."""
    parser = run_parser("evaluate", "Scores a run's checkpoint on every validation image once.", "last")
    parser.add_argument("--data", help="another folder or data set with the same classes")
    parser.add_argument("--batch_size", type=positive, help="images at once (default: the run's)")
    parser.add_argument("--recipe", help="RUN is a file of weights, such as an official one, of this recipe's network")
    parser.add_argument("--method", default="default", help="with --recipe: the method of the file (default: default)")
    given = parser.parse_args(arguments)
    if given.recipe is not None:
        return _evaluate_file(given.run, given.recipe, given.data, given.method, given.batch_size)
    import torch

    from mpvg import runs
    from mpvg.runs.memory import evaluation_cure, memory_errors
    from mpvg.tasks import describe_metrics

    run = runs.load(given.run)
    device = torch.device("cuda" if torch.cuda.is_available() and run.config.device != "cpu" else "cpu")
    batch, task = given.batch_size or run.config.batch_size, run.task()
    with memory_errors(evaluation_cure(f"a smaller --batch_size than {batch}")):
        validation = run.validation(device, data=given.data, batch_size=batch)
        found = task.evaluate(run.model(given.checkpoint, ema=given.ema).to(device), validation)
    skipped = f", {validation.skipped} unreadable ones skipped" if validation.skipped else ""
    scores = ", ".join(describe_metrics(task, found.metrics))
    say(f"{given.run}: {scores} on {found.images} images{skipped}", weights_text(run, given.checkpoint, ema=given.ema))
    if given.checkpoint == "last" and given.data is None and (beside := best_text(run, ema=given.ema)):
        say(f"beside it, the best epoch, which was selected on this set: {beside}")
    return 0


def _evaluate_file(file: str, recipe: str, data: str | None, method: str, batch_size: int | None) -> int:
    """Prints the metrics of a file of weights, which is in no run folder."""
    import torch

    from mpvg.cli.arguments import parse_method
    from mpvg.recipes import recipe as find
    from mpvg.runs.memory import evaluation_cure, memory_errors
    from mpvg.runs.weights import weights_run
    from mpvg.tasks import describe_metrics

    config = replace(find(recipe, data), method=parse_method(method))
    device, batch = torch.device("cuda" if torch.cuda.is_available() else "cpu"), batch_size or config.batch_size
    with memory_errors(evaluation_cure(f"a smaller --batch_size than {batch}")):
        run, model, report = weights_run(Path(file), config)
        validation, task = run.validation(device, batch_size=batch), run.task()
        found = task.evaluate(model.to(device), validation)
    skipped = f", {validation.skipped} unreadable ones skipped" if validation.skipped else ""
    say(
        f"{file}: {', '.join(describe_metrics(task, found.metrics))} on {found.images} images{skipped}",
        *str(report).splitlines(),
    )
    return 0


def weights_text(run: "Run", which: "Which", *, ema: bool) -> str:
    """Which weights of a run are used, as text."""
    from mpvg.runs.checkpoints import SELECTED, checkpoint_folder, has_best
    from mpvg.runs.pointers import step_name

    lost = which == "best" and not has_best(run.path)
    name = run.best_step() if lost else checkpoint_folder(run.path, which, quiet=True).resolve().name
    epochs = [line["epoch"] for line in run.metrics() if step_name(line["step"]) == name]
    when = f", after epoch {epochs[0]} of {run.config.epochs}" if epochs else ""
    return f"{'averaged ' if ema else ''}weights: {which}{when}{SELECTED[which]}"


def best_text(run: "Run", *, ema: bool) -> str | None:
    """The recorded metrics of the best epoch; None before an epoch ends."""
    from mpvg.runs.pointers import step_name
    from mpvg.tasks import describe_metrics
    from mpvg.tasks.task import EMA

    task, prefix, best = run.task(), EMA if ema else "", run.best_step()
    for line in run.metrics():
        if step_name(line["step"]) == best:
            scores = {name: line[f"{prefix}{name}"] for name in task.metrics if f"{prefix}{name}" in line}
            return f"{', '.join(describe_metrics(task, scores))}, epoch {line['epoch']}"
    return None
