"""`mpvg analyze`."""

from pathlib import Path

from mpvg.cli.arguments import Parser, add_weights, complain, say
from mpvg.cli.own import add_model, use_models_of_runs


def analyze(arguments: list[str]) -> int:
    """Writes a report on runs."""
    text = "What position embeddings do inside runs, beside the same networks before training."
    parser = Parser(prog="mpvg analyze", description=text)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; those that differ only in the seed are repetitions"
    )
    parser.add_argument("--data", help="another folder or data set with the same classes (default: the run's own)")
    parser.add_argument("--images", type=int, default=1000, help="validation images, spread evenly (default: 1000)")
    add_weights(parser, "last")
    parser.add_argument(
        "--beyond",
        type=int,
        default=0,
        metavar="IMAGES",
        help="also change PE, position and size on this many images: some hundred passes (default: 0)",
    )
    parser.add_argument("--out", default="report", help="folder of report.html and all else (default: report)")
    add_model(parser, "a network of your own that runs were made with")
    given = parser.parse_args(arguments)
    use_models_of_runs(given.model, given.runs)
    from mpvg.analysis import report

    options = report.Options(
        data=given.data, images=given.images, which=given.checkpoint, ema=given.ema, sensitivity_images=given.beyond
    )
    made = report.analyze(given.runs, Path(given.out), options)
    say(f"weights: {options.weights}")
    for name, sentences in made.sentences.items():
        say(f"{name}:", *(f"  {sentence}" for sentence in sentences))
    for run, reason in made.problems.items():
        complain(f"warning: {run} is left out: {reason}")
    say("", f"report: {made.page}")
    return 0
