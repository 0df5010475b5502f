"""The flags of `mpvg train`: one for each field of a config, and no others.

A flag holds one plain value, so that no text on the command line or in a file can name something to import.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from mpvg.cli.arguments import Parser
from mpvg.config import RunConfig, flatten
from mpvg.validation import parse_json, shorten, shown, type_text

HELP = "see `mpvg train --help`"
USAGE = "mpvg train [--data DATA] [--method METHOD] [--out RUN] [options] | mpvg train --resume RUN"
DESCRIPTION = "Trains a network. Values come from the recipe, then from --config, then from the flags."
FREE = ("method", "task_options", "optim.rates")
"""Fields that hold a JSON object; the parts of a config are dataclasses instead."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """What a command line gives."""

    options: argparse.Namespace
    """The options that are no fields of a config, such as `resume`."""
    values: dict[str, Any]
    """Dotted field name -> value."""


def parse_flags(arguments: list[str]) -> Flags:
    """Reads a command line.

    Raises:
        ValueError: a flag does not exist, or its value is missing or not of the field's type.
    """
    options, surplus = make_parser(None).parse_known_args(arguments)
    kinds = field_kinds()
    if surplus:
        _refuse(surplus, kinds)
    texts = {name: vars(options).pop(name) for name in kinds if name in options}
    return Flags(options, {name: parse_value(name, text, kinds[name]) for name, text in texts.items()})


def make_parser(base: RunConfig | None) -> argparse.ArgumentParser:
    """The parser; a base gives the defaults that the help shows, and the help itself."""
    parser = Parser(prog="mpvg train", allow_abbrev=False, add_help=False, usage=USAGE, description=DESCRIPTION)
    parser.add_argument("-h", "--help", action="store_true", help="Show this help and exit.")
    parser.add_argument("--config", help="YAML file with any of the options below; the flags win over it.")
    parser.add_argument("--print_config", action="store_true", help="Print the resulting config as YAML and exit.")
    parser.add_argument("--resume", help="Run folder to continue, to the same bits as if it had not been interrupted.")
    parser.add_argument(
        "--auto_resume",
        action="store_true",
        help="Continue the run in --out if there is one: for commands that are restarted.",
    )
    parser.add_argument(
        "--break_lock",
        action="store_true",
        help="Take over a run that a process of another host has locked, where that process has ended.",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Print what would be trained and what it takes, and stop."
    )
    parser.add_argument("--measure", action="store_true", help="As --dry_run, after a few steps, with the time.")
    values = flatten(base.to_dict()) if base else {}
    texts = _field_texts() if base else {}
    for name, kind in field_kinds().items():
        text = f"{texts[name]} (type: {type_text(kind)}, default: {_default_text(values[name])})" if base else ""
        metavar = name.rpartition(".")[2].upper()
        help = text.replace("%", "%%")
        parser.add_argument(f"--{name}", metavar=metavar, default=argparse.SUPPRESS, help=help)
    return parser


def field_kinds() -> dict[str, Any]:
    """Dotted name -> type of every field of a config; those of a part follow the plain ones."""
    kinds = get_type_hints(RunConfig)
    plain = {name: kind for name, kind in kinds.items() if not dataclasses.is_dataclass(kind)}
    return plain | {
        f"{part}.{name}": inner
        for part, kind in kinds.items()
        if part not in plain
        for name, inner in get_type_hints(kind).items()
    }


def parse_value(name: str, text: str, kind: Any) -> Any:
    """The value of a flag.

    Raises:
        ValueError: it is not of the type.
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in options and text in ("null", "none", "None"):
        return None
    for option in options:
        try:
            return _convert(text, option)
        except ValueError as error:
            if option is not type(None) and _is_json(option) and text.lstrip()[:1] in ("{", "["):
                reason = f"--{name} {shown(text)} is not valid JSON of the type {type_text(option)} ({error})"
                raise ValueError(f"{reason}; {HELP}") from error
    raise ValueError(f"--{name} is {shown(text)}; allowed: {type_text(kind)}; {HELP}")


def _is_json(kind: Any) -> bool:
    return get_origin(kind) in (tuple, dict)


def _convert(text: str, kind: Any) -> Any:
    """One value of a type that is no union; a Literal's choices are checked by the config."""
    if kind is str or get_origin(kind) is Literal:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("it is neither true nor false")
        return text.lower() == "true"
    if kind in (int, float):
        return kind(text.replace("_", "x"))  # Python takes 1_000
    if kind is type(None):
        raise ValueError("it is not null")
    value = parse_json(text.encode("utf-8", "surrogateescape"))
    if not isinstance(value, dict if get_origin(kind) is dict else list):
        raise ValueError("it is of another type")
    return value


def _refuse(surplus: list[str], kinds: Mapping[str, Any]) -> NoReturn:
    """Refuses what is no flag, with the way for a whole part and the nearest name for a slip."""
    message = f"unrecognized arguments: {shorten(' '.join(surplus))}"
    for word in (argument.partition("=")[0].removeprefix("--") for argument in surplus):
        fields = [name for name in kinds if name.startswith(f"{word}.")]
        if fields:
            raise ValueError(
                f"--{word} as a whole is not taken; give its fields, such as --{fields[0]}, or a file with --config"
            )
        if near := difflib.get_close_matches(word, kinds, n=1, cutoff=0.75):
            raise ValueError(f"{message}; did you mean {near[0]}?")
    raise ValueError(f"{message}; {HELP}")


def _field_texts() -> dict[str, str]:
    """Dotted name -> the docstring below the field."""
    texts: dict[str, str] = {}
    kinds = get_type_hints(RunConfig)
    parts = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    for prefix, cls in {"": RunConfig, **parts}.items():
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body  # type: ignore[arg-type]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in itertools.pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                name = f"{prefix}.{ast.unparse(field.target)}".lstrip(".")
                texts[name] = " ".join(str(text.value.value).split())
    return texts


def _default_text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
