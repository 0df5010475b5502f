"""Runs one `mpvg` command in a process group of its own; see `start_mpvg` in conftest.py, which sets the names."""

import multiprocessing
import os
import resource
import sys

names = globals()  # those that runpy was given
ARGUMENTS: list[str] = names["ARGUMENTS"]
LOG: str = names["LOG"]
AT_RENAME: tuple[str, int] | None = names["AT_RENAME"]
ENVIRONMENT: dict[str, str] = names["ENVIRONMENT"]

os.setsid()
os.environ.update(ENVIRONMENT)
multiprocessing.set_start_method(None, force=True)  # the loader's workers start as they do in any `mpvg train`
log = os.open(LOG, os.O_WRONLY)
os.dup2(log, 1)
os.dup2(log, 2)

from mpvg.cli.main import main  # noqa: E402  what it prints belongs into the log

if AT_RENAME is not None:
    name, size = AT_RENAME

    def limit(event: str, values: tuple[object, ...]) -> None:
        if event == "os.rename" and os.path.basename(str(values[1])) == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    sys.addaudithook(limit)
sys.exit(main(ARGUMENTS))
