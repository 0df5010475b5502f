"""`mpvg resolutions`: a run at other image sizes."""

import argparse
from dataclasses import replace
from pathlib import Path

from mpvg.cli.arguments import (
    Parser,
    add_data,
    add_skip_corrupt,
    add_weights,
    new_file,
    positive,
    print_table,
    say,
    skipping,
)
from mpvg.cli.own import add_model, use_models_of_runs


def resolutions(arguments: list[str]) -> int:
    """Prints accuracy and NLL at several image sizes, and how to resample the PE."""
    given = _parse(arguments)
    use_models_of_runs(given.model, [given.run])
    from mpvg import runs
    from mpvg.analysis import resolutions as question
    from mpvg.analysis.paired import note
    from mpvg.analysis.trained import check_classification
    from mpvg.files import check_output, whole_folder, write_json
    from mpvg.runs.checkpoints import describe_weights
    from mpvg.runs.memory import evaluation_cure, memory_errors

    sizes = [question.parse_size(size) for size in given.sizes]
    if given.out is not None:
        check_output(Path(given.out))
    run = runs.load(given.run)
    run = replace(run, config=skipping(run.config, given.skip_corrupt))
    check_classification(run)
    weights = describe_weights(given.checkpoint, ema=given.ema)
    with memory_errors(evaluation_cure("fewer --samples, or smaller --sizes")):
        model = run.model(given.checkpoint, ema=given.ema).to(run.device)
        batches = list(run.validation(run.device, data=given.data, images=given.samples).epoch())
        found = question.measure(
            model, batches, sizes, network=Path(given.run).name, weights=weights, data=given.data or run.config.data
        )
    say(f"{given.run}: {found.images:,} validation images of {found.data}; weights: {weights}; 95 % intervals", "")
    print_table([question.HEAD, *map(question.cells, found.rows)], right=question.HEAD[2:5])
    left_out = (f"size {name} is left out: {reason}" for name, reason in found.refused.items())
    say("", *left_out, found.sentence, *note([row.word for row in found.rows]))
    if given.json:
        write_json(given.json, found.to_dict())
    if given.out is not None:
        with whole_folder(Path(given.out).absolute()) as folder:
            question.write_page(found, folder / "resolutions.html")
            write_json(folder / "resolutions.json", found.to_dict())
        say(f"page: {Path(given.out) / 'resolutions.html'}")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    text = "Accuracy and NLL of a run at other image sizes, with the position embedding resampled in three ways."
    parser = Parser(prog="mpvg resolutions", description=text)
    parser.add_argument("run", metavar="RUN", help="folder that `mpvg train` made")
    parser.add_argument("--sizes", nargs="+", required=True, metavar="SIZE", help="224, or 320x224: height x width")
    add_data(parser)
    add_skip_corrupt(parser)
    parser.add_argument("--samples", type=positive, help="validation images, spread evenly (default: all)")
    add_weights(parser, "last")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also writes every number")
    parser.add_argument("--out", metavar="DIR", help="new folder for resolutions.html and resolutions.json")
    add_model(parser)
    return parser.parse_args(arguments)
