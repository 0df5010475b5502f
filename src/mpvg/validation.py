"""Checks of values that come from files, flags and callers: names, choices, ranges and types.

Every error names the value, what is allowed and, where there is one, the nearest allowed name.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_DEPTH = 64
"""How deeply the values in a file may be nested."""
MAX_INT = 2**63
"""Whole numbers in files and configs are below it, and above its negative."""
MAX_SHOWN = 200
"""Characters of a value that an error shows."""


def parse_json(content: bytes, *, finite: bool = True) -> Any:
    """The plain values in an untrusted JSON file.

    Args:
        content: of the file.
        finite: whether NaN and infinite numbers are refused.

    Raises:
        ValueError: with the reason in one line: it is not valid JSON or UTF-8, or holds what `check_plain` refuses.
    """
    try:
        return check_plain(json.loads(content.decode("utf-8-sig")), finite=finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(content: bytes) -> Any:
    """The plain values in an untrusted YAML file, in which nothing is repeated by an alias.

    PyYAML takes a second for 64 kB, so a limit on the size belongs before it.

    Raises:
        ValueError: with the reason in one line: it is not valid YAML or UTF-8, or holds what `check_plain` refuses.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses aliases, deep nesting, and a key that is given twice.

        Aliases of ten of ten of ten ... would fill the memory from a few hundred bytes. Of two values of a key, only
        the last one would count.
        """

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias (*), which a config may not have")
            if self.depth > MAX_DEPTH:
                raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            if isinstance(node, yaml.MappingNode):
                seen: set[str] = set()
                for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                    if key in seen:
                        raise yaml.YAMLError(f"it has the key {key} twice")
                    seen.add(key)
            return node

    try:
        return check_plain(yaml.load(content.decode("utf-8-sig"), Loader))
    except Exception as error:  # PyYAML raises errors of many types on dates, tags and numbers that are none
        raise ValueError(shorten(" ".join(str(error).split()) or type(error).__name__)) from error


def parse_config(content: bytes, name: str, newest: int, hint: str, *, default: int) -> dict[str, Any]:
    """The keys of an untrusted config in YAML, without its `format`.

    Args:
        content: of the file.
        name: of the file, for errors.
        newest: format that is known.
        hint: next step, for errors.
        default: format of a file that has none.

    Raises:
        ValueError: it is not valid YAML, holds no keys, or is not of a known format.
    """
    try:
        values = parse_yaml(content)
    except ValueError as error:
        raise ValueError(f"{name} is not readable YAML ({printable(str(error))}); {hint}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} holds no keys; {hint}")
    format = values.pop("format", default)
    if type(format) is not int or format < 1:
        raise ValueError(f"{name}: format is {shown(format)}; allowed: 1 to {newest}; {hint}")
    if format > newest:
        raise ValueError(f"{name} has format {format}, and this version of mpvg reads 1 to {newest}; update mpvg")
    return values


def check_plain(values: Any, *, finite: bool = True) -> Any:
    """Returns values that come from a file, unless they are not plain.

    Plain are texts without NUL, finite numbers of ordinary size, booleans and None, and lists and dictionaries of them
    with texts as keys, nested at most `MAX_DEPTH` deep.

    Raises:
        ValueError: naming what is not.
    """
    level, depth = [values], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
                _check_keys(value)
            elif isinstance(value, list):
                below += value
            else:
                _check_scalar(value, finite)
        level, depth = below, depth + 1
    return values


def _check_keys(values: dict[Any, Any]) -> None:
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"the key {shown(key)} is a {type(key).__name__}; allowed: text")


def _check_scalar(value: object, finite: bool) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(f"{shown(value)} has a NUL character")
    elif isinstance(value, (int, float)):
        if not _is_ordinary(value) and (finite or isinstance(value, int)):
            raise ValueError("it has a number that is not finite or has more than 64 bits")
    elif value is not None:
        raise ValueError(f"{shown(value)} is a {type(value).__name__}; allowed: text, numbers, true, false and null")


def _is_ordinary(value: float) -> bool:
    return abs(value) < MAX_INT if isinstance(value, int) else math.isfinite(value)


def shown(value: object) -> str:
    """A value as an error shows it: in one line of bounded length."""
    return shorten(repr(value))


def shorten(text: str) -> str:
    """The text, cut where it is too long for an error."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def printable(text: str) -> str:
    """The text with everything that a terminal would not show as a character written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def named(name: str) -> str:
    """A name of others as an error shows it: in one line of bounded length, without quotes."""
    return shorten(printable(name))


def unknown_name(what: str, name: str, known: Iterable[str], near: int = 3) -> str:
    """The error message for an unknown name: at most `near` similar names, and all known ones."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=near, cutoff=0.6)
    beginnings = {candidate[: len(name)]: candidate for candidate in reversed(known)}
    close = close or [beginnings[begun] for begun in difflib.get_close_matches(name, beginnings, n=near, cutoff=0.8)]
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"unknown {what} {shown(name)}{hint} Known: {', '.join(known) or 'none'}"


def build(cls: type[Any], values: object, prefix: str) -> Any:
    """Builds a dataclass from untrusted values.

    Args:
        cls: the dataclass.
        values: field names and values, lists in place of tuples; anything else is refused.
        prefix: what precedes a field's name in errors, such as "optim."

    Raises:
        ValueError: a key is unknown or missing, or a value is not of its field's type or out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')} must hold the keys {', '.join(fields)}, got {shown(values)}")
    for key in values:
        if key not in fields:
            raise ValueError(
                unknown_name("config key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields], near=1)
            )
    for key, f in fields.items():
        if key not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"config key {prefix}{key} is missing")
    kinds = get_type_hints(cls)
    for key, value in values.items():
        if not _fits(value, kinds[key]):
            raise ValueError(f"{prefix}{key} is {shown(value)}; allowed: {type_text(kinds[key])}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _fits(value: object, kind: Any) -> bool:
    """Whether a value from a file is of an annotated type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or origin is Literal:  # choices are checked by the class itself
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if isinstance(value, (tuple, list)) and ... in arguments else arguments
        return isinstance(value, (tuple, list)) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, arguments[0]) and _fits(v, arguments[1]) for key, v in value.items()
        )
    if kind in (int, float):
        number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        return number and _is_ordinary(value)  # type: ignore[arg-type]
    return isinstance(value, origin or kind)


def type_text(kind: Any) -> str:
    """An annotated type, written as its values are in JSON: `[float] | null` for `tuple[float] | None`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(map(type_text, arguments))
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin is tuple:
        return f"[{', '.join('...' if part is ... else type_text(part) for part in arguments)}]"
    if origin is dict:
        return f"{{{': '.join(map(type_text, arguments))}}}"
    return "null" if kind is type(None) else "any value" if kind is Any else str(kind.__name__)


def check_choices(config: Any, prefix: str) -> None:
    """Checks the fields that are declared as a Literal."""
    for name, kind in get_type_hints(type(config)).items():
        choices = [c for part in (kind, *get_args(kind)) if get_origin(part) is Literal for c in get_args(part)]
        if choices:
            choices += [None] if type(None) in get_args(kind) else []
            value = getattr(config, name)
            check(f"{prefix}{name}", value, value in choices, ", ".join(map(repr, choices)))


def check(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raises ValueError unless the value holds."""
    if not holds:
        raise ValueError(f"{name} is {shown(value)}; allowed: {allowed}")
