"""Checks of values that come from files, flags and callers: names, choices, ranges and types.

Every error names the value, what is allowed and, where there is one, the nearest allowed name.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def unknown_name(what: str, name: str, known: Iterable[str], near: int = 3) -> str:
    """The error message for an unknown name: at most `near` similar names, and all known ones."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=near, cutoff=0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known) or 'none'}"


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
        raise ValueError(f"{prefix.rstrip('.')} must hold the keys {', '.join(fields)}, got {values!r}")
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
            raise ValueError(f"{prefix}{key} is {value!r}; allowed: {_type_name(kinds[key])}")
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
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _type_name(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
    return text.replace("typing.", "")


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
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
