"""`mpvg compare`: run folders against one another."""

import math
import sys
from pathlib import Path

from mpvg.cli.arguments import Parser, output_path, say


def compare(arguments: list[str]) -> int:
    """Compares complete runs."""
    parser = Parser(
        prog="mpvg compare",
        description="Groups runs by the one config field in which they differ, takes seeds as repetitions, and prints "
        "means, differences, intervals and tests.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders that `mpvg train` made, or folders that hold some"
    )
    parser.add_argument("--reference", help="the value that the others are compared with (default: the first run's)")
    parser.add_argument(
        "--margin",
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="the smallest difference that matters (default: nll=0.01, accuracy=0.005)",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="let a config field, or data, torch or hardware, differ too",
    )
    form = parser.add_mutually_exclusive_group()
    for name in ("markdown", "latex", "csv", "json"):
        form.add_argument(f"--{name}", action="store_true", help=f"print {name} instead of a short text")
    parser.add_argument("--out", type=output_path, help="also write all forms and a picture into this folder")
    given = parser.parse_args(arguments)
    from mpvg.runs.listing import find_runs
    from mpvg.study import compare as comparison
    from mpvg.study import tables

    paths: list[Path] = []
    for run in map(Path, given.runs):
        is_run = (run / "config.yaml").exists()
        paths += [run] if is_run else [state.path for state in find_runs(run)]
    margins = dict(_margin(text) for text in given.margin)
    if len(margins) < len(given.margin):
        raise ValueError(f"--margin is {', '.join(given.margin)}; allowed: one for each metric, chosen before the runs")
    results = comparison.compare(paths, reference=given.reference, margins=margins, allow=given.allow)
    texts = tables.render(results)
    for form_name, file in (
        ("markdown", "table.md"),
        ("latex", "table.tex"),
        ("csv", "table.csv"),
        ("json", "results.json"),
    ):
        if getattr(given, form_name):
            sys.stdout.write(texts[file])
    if not (given.markdown or given.latex or given.csv or given.json):
        say(*tables.as_text(results))
    if given.out:
        say("written: " + ", ".join(map(str, tables.write_results(results, given.out))))
    return 0


def _margin(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"--margin is {text!r}; allowed: METRIC=VALUE with a number > 0, such as nll=0.01")
    return name, number
