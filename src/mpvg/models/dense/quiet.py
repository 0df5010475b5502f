"""Imports parts of transformers when they are needed, and lets nothing of what the import says reach the user."""

import contextlib
import functools
import importlib
import io
import logging
import warnings
from typing import Any


@functools.cache
def import_quietly(module: str) -> Any:
    """A module of transformers; its import takes seconds, and prints and logs about packages that are not used here.

    Args:
        module: full name.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    said, previous = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"dense networks need transformers ({error}); pip install 'mpvg[dense]'") from error
    finally:
        logging.disable(previous)
