"""`mpvg analyze`."""

import argparse
from pathlib import Path

from mpvg.cli.arguments import Parser, add_data, add_ema, complain, output_path, positive, print_table, say, whole
from mpvg.cli.own import add_model, use_models_of_runs
from mpvg.cli.trained import data_config, which


def analyze(arguments: list[str]) -> int:
    """Writes a report on runs."""
    text = "What position embeddings do inside runs, beside the same networks before training."
    parser = Parser(prog="mpvg analyze", description=text)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders, those that differ only in the seed are repetitions; or one timm/NAME, with --data",
    )
    add_data(parser)
    parser.add_argument(
        "--images", type=positive, default=1000, help="validation images, spread evenly (default: 1000)"
    )
    parser.add_argument(
        "--checkpoint", default="last", metavar="WHICH", help="last (default), best; or timm/NAME's file"
    )
    add_ema(parser)
    parser.add_argument("--random", action="store_true", help="timm/NAME: random weights, which are refused otherwise")
    parser.add_argument(
        "--beyond",
        type=whole,
        default=0,
        metavar="IMAGES",
        help="also change PE, position and size on this many images: some hundred passes (default: 0)",
    )
    parser.add_argument(
        "--out", type=output_path, default="report", help="folder of report.html and all else (default: report)"
    )
    add_model(parser, "a network of your own that runs were made with")
    given = parser.parse_args(arguments)
    use_models_of_runs(given.model, given.runs)
    from mpvg.analysis import report

    if any(run.startswith("timm/") and not Path(run).exists() for run in given.runs):
        return _analyze_timm(given)
    if given.random:
        raise ValueError("--random is for timm/NAME, and a run has weights; leave it out")
    options = report.Options(
        data=given.data,
        images=given.images,
        which=which(given.checkpoint),
        ema=given.ema,
        sensitivity_images=given.beyond,
    )
    made = report.analyze(given.runs, given.out, options)
    say(f"weights: {options.weights}")
    for name, sentences in made.sentences.items():
        say(f"{name}:", *(f"  {sentence}" for sentence in sentences))
    for run, reason in made.problems.items():
        complain(f"warning: {run} is left out: {reason}")
    say("", f"report: {made.page}")
    return 0


def _analyze_timm(given: argparse.Namespace) -> int:
    """Writes a report on a network of timm."""
    from mpvg.analysis import plain
    from mpvg.analysis.trained import open_timm
    from mpvg.runs.memory import evaluation_cure, memory_errors

    if len(given.runs) != 1 or given.data is None:
        raise ValueError("give one timm/NAME, and --data; runs are analyzed by a command of their own")
    if given.beyond or given.ema:
        raise ValueError("--beyond and --ema are for runs; leave them out")
    checkpoint = None if given.checkpoint == "last" else given.checkpoint
    with memory_errors(evaluation_cure("fewer --images")):
        base = data_config(given.data, 0)
        trained = open_timm(given.runs[0], checkpoint, base, "val", random=given.random)
        found = plain.measure(trained, given.images)
    say(f"{found.network}, weights {found.weights}, {found.images:,} validation images of {found.data}", "")
    print_table([plain.HEAD, *plain.place_rows(found)], right=plain.HEAD[1:])
    if found.replaced:
        say("")
        print_table([plain.REPLACED_HEAD, *plain.replaced_rows(found)], right=plain.REPLACED_HEAD[1:])
    say("", *plain.lines(found), f"report: {plain.write(found, given.out)}")
    return 0
