"""Arguments that several verbs share."""

import argparse
import json
from typing import Any


def run_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser for a verb that uses the weights of one run."""
    parser = argparse.ArgumentParser(prog=f"mpvg {verb}", description=description)
    parser.add_argument("run", help="folder that `mpvg train` made")
    add_weights(parser)
    return parser


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose a run's weights."""
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which weights (default: last)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the trained ones")


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
