"""Arguments that several verbs share."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mpvg.files import check_place
from mpvg.validation import parse_json, printable, shown

if TYPE_CHECKING:
    from mpvg.config import RunConfig


class Parser(argparse.ArgumentParser):
    """Raises what it refuses as a ValueError, which `mpvg.cli.main` shows in one line as any other."""

    def error(self, message: str) -> NoReturn:
        """Names the next step."""
        raise ValueError(f"{message}; see `{self.prog} --help`")


def say(*lines: str) -> None:
    """Prints lines; what a name, a path or a class holds beside plain characters is shown as an escape."""
    print("\n".join(map(printable, lines)), flush=True)


def print_table(rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Prints rows in columns.

    Args:
        rows: the titles, and below them the values.
        right: titles of the columns that are set to the right, such as numbers.
    """
    shown = [[printable(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = zip(rows[0], row, widths, strict=True)
        print("  ".join(v.rjust(width) if title in right else v.ljust(width) for title, v, width in cells).rstrip())


def complain(message: str) -> None:
    """Prints a line to stderr, as `say`."""
    with contextlib.suppress(OSError):  # stderr may be closed or full; the exit code still says it
        print(f"mpvg: {printable(message)}", file=sys.stderr, flush=True)


def run_parser(verb: str, description: str, weights: str) -> argparse.ArgumentParser:
    """A parser for a verb that uses the weights of one run, by default the `weights`: last or best."""
    parser = Parser(prog=f"mpvg {verb}", description=description)
    parser.add_argument("run", help="folder that `mpvg train` made")
    add_weights(parser, weights)
    return parser


def positive(text: str) -> int:
    """A whole number >= 1, as the type of an argument."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a whole number >= 1")
    return int(text)


def output_path(text: str) -> Path:
    """A file or folder that is not within a checkpoint, as the type of an argument."""
    try:
        check_place(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def output_file(text: str) -> Path:
    """A file that can be written later, as the type of an argument."""
    path = output_path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give the name of a file in a folder that exists")
    return path


def whole(text: str) -> int:
    """A whole number >= 0, as the type of an argument."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a whole number >= 0")
    return int(text)


def new_file(text: str) -> Path:
    """A file that can be written later and is not there yet, as the type of an argument."""
    path = output_file(text)
    if os.path.lexists(path):
        raise argparse.ArgumentTypeError(f"{text!r} exists; give another name, or remove it")
    return path


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, as the type of an argument."""
    try:
        value = parse_json(text.encode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not allowed; give a JSON object")
    return value


def add_weights(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the arguments that choose a run's weights."""
    help = f"the last weights, or those of the best epoch on the run's validation set (default: {default})"
    parser.add_argument("--checkpoint", choices=("last", "best"), default=default, help=help)
    add_ema(parser)


def add_ema(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that chooses averaged weights."""
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the trained ones")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that names other data than a run's."""
    parser.add_argument("--data", help="another folder or data set with the same classes (default: the run's own)")


def add_skip_corrupt(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that leaves out what cannot be read, as `mpvg train` has it."""
    parser.add_argument(
        "--loader.skip_corrupt",
        dest="skip_corrupt",
        choices=("true", "false"),
        help="leave out, and count, images that cannot be read and what is wrong in annotations (default: the run's)",
    )


def skipping(config: "RunConfig", given: str | None) -> "RunConfig":
    """The config with the value of --loader.skip_corrupt."""
    return config if given is None else replace(config, loader=replace(config.loader, skip_corrupt=given == "true"))


def parse_method(text: str) -> Any:
    """A method's name, or a spec's fields as JSON.

    Raises:
        ValueError: it starts like JSON and is not valid.
    """
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--method {text!r} is not valid JSON ({error}); give a name or a spec's fields") from error
