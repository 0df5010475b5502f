"""`mpvg runs` and `mpvg plot`: many run folders at once."""

import argparse
from pathlib import Path


def runs(arguments: list[str]) -> int:
    """Lists run folders."""
    parser = argparse.ArgumentParser(prog="mpvg runs", description="Lists the run folders below a folder.")
    parser.add_argument("folder", nargs="?", default="runs", help="where to look (default: runs)")
    given = parser.parse_args(arguments)
    from mpvg.runs import listing

    rows = [listing.COLUMNS, *(state.row() for state in listing.find_runs(Path(given.folder)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


def plot(arguments: list[str]) -> int:
    """Draws the curves of runs."""
    parser = argparse.ArgumentParser(prog="mpvg plot", description="Draws one number of every epoch for several runs.")
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--key", help="a number of metrics.jsonl (default: what chooses the best checkpoint)")
    parser.add_argument("--out", default="curves.png", help="file, .png, .svg or .pdf (default: curves.png)")
    given = parser.parse_args(arguments)
    from mpvg.runs import listing

    listing.plot_runs([Path(run) for run in given.runs], given.key, Path(given.out))
    print(f"drawn in {given.out}")
    return 0
