"""`mpvg runs` and `mpvg plot`: many run folders at once."""

import argparse
import json
import sys
from pathlib import Path

from mpvg.cli.arguments import Parser, output_file, print_table, say

PICTURES = "file that ends in .png, .svg or .pdf"


def runs(arguments: list[str]) -> int:
    """Lists run folders."""
    parser = Parser(prog="mpvg runs", description="Lists the run folders below a folder.")
    parser.add_argument("folder", nargs="?", default="runs", help="where to look (default: runs)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as a list of JSON objects, with unrounded numbers")
    form.add_argument("--csv", action="store_true", help="the same as CSV")
    given = parser.parse_args(arguments)
    from mpvg.files import csv_text
    from mpvg.runs import listing

    found = listing.find_runs(Path(given.folder))
    if given.json:
        print(json.dumps([state.values() for state in found], indent=1))
    elif given.csv:
        sys.stdout.write(csv_text(listing.FIELDS, [state.values() for state in found]))
    else:
        print_table([listing.COLUMNS, *(state.row() for state in found)])
        if means := listing.seed_means(found):
            say("")
            print_table([listing.MEANS, *means])
    return 0


def _picture(text: str) -> Path:
    path = output_file(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a {PICTURES}")
    return path


def plot(arguments: list[str]) -> int:
    """Draws the curves of runs."""
    parser = Parser(prog="mpvg plot", description="Draws one number of every epoch for several runs.")
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--key", help="a number of metrics.jsonl (default: what chooses the best checkpoint)")
    parser.add_argument("--out", type=_picture, default="curves.png", help=f"{PICTURES} (default: curves.png)")
    given = parser.parse_args(arguments)
    from mpvg.runs import listing

    listing.plot_runs([Path(run) for run in given.runs], given.key, given.out)
    say(f"drawn in {given.out}")
    return 0
