"""Silence for imports of transformers, which take seconds, and print and log about packages that are not used here."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Lets nothing of what an import says reach the user.

    Raises:
        ModuleNotFoundError: transformers is not installed; it says how to install it.
    """
    said, previous = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"dense networks need transformers ({error}); pip install 'mpvg[dense]'") from error
    finally:
        logging.disable(previous)
