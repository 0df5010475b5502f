"""`--model`: networks of the user's own, which are imported only where they are typed."""

import argparse
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mpvg.config.names import FORM, is_file, is_reference, same_network, split_reference


def add_model(
    parser: argparse.ArgumentParser, what: str = "the network of your own that the run was made with"
) -> None:
    """Adds --model, which may be given several times."""
    parser.add_argument("--model", action="append", default=[], metavar="FACTORY", help=f"{what}: {FORM}")


def use_models(typed: Sequence[str], named: Mapping[str, str]) -> None:
    """Imports the networks that are typed, under the names that runs have for them.

    Args:
        typed: what --model was given.
        named: who names a network, such as a run folder -> the network's name.

    Raises:
        ValueError: nobody names a typed one, or it cannot be imported.
    """
    for name in typed:
        own = _matching(name, named)
        if is_reference(name):
            from mpvg.models.own import import_network

            for stored in own:
                import_network(name, stored)


def use_models_of_runs(typed: Sequence[str], runs: Iterable[str]) -> None:
    """As `use_models`, for run folders; what is none, or is damaged, is left to those who read it."""
    if not typed:
        return
    from mpvg.runs import load

    named = {}
    for run in runs:
        if (Path(run) / "config.yaml").exists():
            with contextlib.suppress(ValueError, OSError):
                named[run] = load(run).config.model
    if named:
        use_models(typed, named)


def use_typed(name: str) -> None:
    """Imports a network whose name is an argument of its own."""
    if is_reference(name):
        from mpvg.models.own import import_network

        import_network(name)


def _matching(typed: str, named: Mapping[str, str]) -> list[str]:
    found = sorted({name for name in named.values() if same_network(name, typed)})
    if not found:
        who = "; ".join(f"{place} has {name}" for place, name in named.items()) or "nothing here needs one"
        gone = [name for name in named.values() if is_reference(name) and _is_renamed(name, typed)]
        renamed = "a file may be moved, not renamed: rename it back, or use mpvg.load(RUN, model=FACTORY) in Python"
        cure = renamed if gone else "give that name, or leave --model out"
        raise ValueError(f"--model is {typed}, but {who}; {cure}")
    return found


def _is_renamed(stored: str, typed: str) -> bool:
    """Whether a file is gone, and another file is given."""
    place, given = (split_reference(name)[0] if is_reference(name) else "" for name in (stored, typed))
    return is_file(place) and not Path(place).exists() and Path(place).name != Path(given).name
