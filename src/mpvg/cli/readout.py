"""`mpvg readout`: class token, mean, or something else, on your data?"""

import argparse

from mpvg.cli.arguments import Parser, new_file, positive, print_table, say
from mpvg.cli.own import use_models_of_runs
from mpvg.cli.trained import add_network, open_trained
from mpvg.config.names import FORM, is_reference


def readout(arguments: list[str]) -> int:
    """Prints a table of linear probes, and what to use."""
    text = "Fits linear probes of what can be read out of a frozen network, and says which to use."
    parser = Parser(
        prog="mpvg readout",
        description=text,
        usage="mpvg readout DATA --model timm/NAME --checkpoint FILE [...]\n       mpvg readout [DATA] RUN [...]",
    )
    parser.add_argument("what", nargs="+", metavar="DATA or RUN", help="data set or folder, and without --model a run")
    parser.add_argument(
        "--model", metavar="timm/NAME", help=f"a timm network; with RUN: your own network, as the run names it: {FORM}"
    )
    add_network(parser)
    parser.add_argument("--readouts", nargs="+", metavar="NAME", help="default: all that the network can have")
    parser.add_argument("--samples", type=positive, help="images, spread evenly over the data (default: all)")
    parser.add_argument("--folds", type=positive, default=10, help="parts of the cross-validation (default: 10)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also writes every number, fold by fold")
    given = parser.parse_args(arguments)
    data, run = _asked(given)
    from mpvg.analysis import readout as question
    from mpvg.analysis.paired import note
    from mpvg.files import write_json
    from mpvg.runs.memory import evaluation_cure, memory_errors

    with memory_errors(evaluation_cure("fewer --samples")):
        trained = open_trained(given, None if run else given.model, run, data)
        found = question.compare_readouts(
            trained, given.readouts, samples=given.samples, folds=given.folds, seed=given.seed
        )
    kind = "training" if trained.split == "train" else "validation"
    say(
        f"{trained.name}, weights {trained.weights}",
        f"{found.images:,} {kind} images of {trained.info.name}, {given.folds} folds; 95 % intervals",
        "",
    )
    print_table(question.rows(found), right=("accuracy, %", "nll", "best minus it, points"))
    left_out = (f"not measured: {name}: {reason}" for name, reason in found.left_out.items())
    say("", *left_out, found.sentence, *note([one.word for one in found.compared]))
    if given.json:
        write_json(given.json, found.to_dict(trained))
    return 0


def _asked(given: argparse.Namespace) -> tuple[str | None, str | None]:
    """The data and the run that are asked about; None: none is named."""
    if given.model is not None and is_reference(given.model):
        use_models_of_runs([given.model], given.what[-1:])
    elif given.model is not None:
        if len(given.what) != 1:
            raise ValueError(f"--model {given.model} takes one DATA; got {' '.join(given.what)}")
        return given.what[0], None
    if len(given.what) > 2:
        raise ValueError(f"give RUN, or DATA and RUN; got {' '.join(given.what)}")
    return (given.what[0] if len(given.what) == 2 else None), given.what[-1]
