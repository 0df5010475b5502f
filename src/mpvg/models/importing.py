"""Imports a network's factory that the user has named on the command line; never one that stands in a file."""

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mpvg.config.names import is_file, split_reference
from mpvg.files import check_regular
from mpvg.validation import shorten, shown

MAX_BYTES = 2**24
"""Size of a file of code."""


def import_factory(name: str) -> Callable[..., Any]:
    """The factory of `package.module:factory` or `path/file.py:factory`.

    A module is looked up as by `import`, and last in the current folder, which is on the path for this import only.

    Raises:
        ValueError: there is no such module, file or factory, or the code cannot be imported.
    """
    place, factory = split_reference(name)
    module = _import_file(Path(place), name) if is_file(place) else _import_module(place, name)
    found = getattr(module, factory, None)
    if not callable(found):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "has no" if found is None else f"holds a {type(found).__name__} named"
        listed = shorten(", ".join(sorted(there)) or "none")
        raise ValueError(f"{module.__file__ or place} {what} {factory}; functions and classes there: {listed}")
    return found


def absolute_reference(name: str) -> str:
    """The same name for a process in another folder."""
    place, factory = split_reference(name)
    return f"{Path(place).resolve()}:{factory}" if is_file(place) else name


def _import_module(module: str, name: str) -> ModuleType:
    folder = str(Path.cwd())
    try:
        with _one_line(name), _last_on_path(folder):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _cannot_import(name, error) from error
        raise ValueError(
            f"{shown(name)}: there is no module {error.name}, neither installed nor in {folder}; give the name as for "
            "`import`, or path/file.py:factory"
        ) from error


def _import_file(file: Path, name: str) -> ModuleType:
    """A file as a module of its own name, so that its classes can be pickled in this process."""
    try:
        check_regular(file, limit=MAX_BYTES)
    except FileNotFoundError as error:
        raise ValueError(f"{shown(name)}: {file} does not exist; give a path from {Path.cwd()}, or a whole one") from (
            error
        )
    path = file.resolve()
    module_name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        with _one_line(name), _last_on_path(str(path.parent)):
            spec.loader.exec_module(module)
        _check_neighbors(path, name)
    except ModuleNotFoundError as error:
        del sys.modules[module_name]
        raise _cannot_import(name, error) from error
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _check_neighbors(file: Path, name: str) -> None:
    """Refuses a file that got another module than the one beside it, which has the same name."""
    wanted = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            wanted |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            wanted.add(node.module.partition(".")[0])
    for module in sorted(wanted & sys.modules.keys()):
        taken = getattr(sys.modules[module], "__file__", None)
        places = (file.parent / f"{module}.py", file.parent / module / "__init__.py")
        beside = [place.resolve() for place in places if place.exists() and place != file]
        if beside and taken is not None and Path(taken).resolve() not in beside:
            raise ValueError(f"{name} imports {module}, which is {taken} and not {beside[0]}; give that another name")


@contextlib.contextmanager
def _last_on_path(folder: str) -> Iterator[None]:
    """Looks modules up in a folder, too, after all other places."""
    sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the code may have changed the path itself
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turns what the user's code raises into a ValueError; a module that is missing is left to the caller."""
    try:
        yield
    except (ModuleNotFoundError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # whatever the code does
        raise _cannot_import(name, error) from error


def _cannot_import(name: str, error: BaseException) -> ValueError:
    return ValueError(f"{shown(name)} cannot be imported: {describe_error(error)}; MPVG_TRACEBACK=1 shows where")


def describe_error(error: BaseException) -> str:
    """An error of the user's code in one line."""
    place = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}{place}: {shorten(' '.join(str(text).split()))}".rstrip(": ")
