"""Names of networks that are code of the user: `package.module:factory` or `path/file.py:factory`.

Nothing is imported here; `mpvg.models.importing` does it, for names that the user types.
"""

import keyword
import os
import shlex
import sys
from pathlib import Path

from mpvg.validation import shown

TIMM = "timm/"
"""Prefix of the name of a converted timm network, which may have a colon."""
FORM = "package.module:factory or path/file.py:factory"


def check_architecture(field: str, name: str) -> None:
    """Refuses a name of timm that says where weights are, such as timm/hf-hub:...: a run must open without them.

    Raises:
        ValueError: it does; the message names the field of the config.
    """
    if name.startswith(TIMM) and ":" in name:
        raise ValueError(
            f"{field} is {shown(name)}, which is looked up elsewhere each time that the run is opened; "
            "give timm/<name of the architecture>, and the weights with network.init=FILE"
        )


def is_reference(name: str) -> bool:
    """Whether a network's name stands for code that would have to be imported."""
    return ":" in name and not name.startswith(TIMM)


def split_reference(name: str) -> tuple[str, str]:
    """The module, or the file, which ends in .py, and the factory in it.

    Raises:
        ValueError: the name is not of this form, or its module is one of Python's or of this package.
    """
    place, _, factory = name.rpartition(":")
    parts = place.split(".")
    known = is_file(place) or all(map(_is_name, parts))
    if not (known and _is_name(factory)):
        raise ValueError(f"{shown(name)} is not the name of a network of your own; allowed: {FORM}")
    here = __name__.partition(".")[0]
    if not is_file(place) and parts[0] in (here, *sys.stdlib_module_names):
        whose = here if parts[0] == here else "Python"
        raise ValueError(
            f"{shown(name)}: the module {parts[0]} is {whose}'s, and one of yours with this name would not be found; "
            f"give it another name, or give path/file.py:{factory}"
        )
    return place, factory


def is_file(place: str) -> bool:
    """Whether the code is in a file that is named by its path."""
    return place.endswith(".py") and Path(place).name != ".py"


def network_label(name: str) -> str:
    """The name of a network without path or module, for names of folders."""
    return name.rpartition(":")[2] if is_reference(name) else name


def model_flag(name: str) -> str:
    """What a command needs beside a run to import the run's network; empty: nothing."""
    return f" --model {shlex.quote(name)}" if is_reference(name) else ""


def same_network(one: str, other: str) -> bool:
    """Whether two names are of the same network; a file may be named from another folder, or by its whole path.

    Where one of the paths leads nowhere from here, as the path in a run folder that was made elsewhere, the files are
    taken for the same if the whole path of one ends with that of the other.
    """
    if one == other or not (is_reference(one) and is_reference(other)):
        return one == other
    (place, factory), (other_place, other_factory) = split_reference(one), split_reference(other)
    if factory != other_factory or not (is_file(place) and is_file(other_place)):
        return (place, factory) == (other_place, other_factory)
    if Path(place).exists() and Path(other_place).exists():
        return Path(place).samefile(other_place)
    short, long = sorted((_parts(place), _parts(other_place)), key=len)
    return long[len(long) - len(short) :] == short


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _parts(path: str) -> tuple[str, ...]:
    """The parts of a path by which it can be found below some folder."""
    parts = Path(os.path.normpath(path)).parts
    return tuple(part for part in parts if part not in ("..", "/"))
