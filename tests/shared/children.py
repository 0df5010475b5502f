"""Commands on a small canvas, in processes that can be killed."""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mpvg.cli.main import main


def shrink_canvas(patch: pytest.MonkeyPatch, cache: Path, scenes: int, validation: int = 5) -> None:
    """Gives this process's canvas few scenes and few tiles, drawn below `cache`."""
    patch.setattr("mpvg.data.canvas.SCENES", {"train": scenes, "val": validation})
    patch.setattr("mpvg.data.named_sets.TILES", {"train": 64, "val": 16})
    patch.setattr("mpvg.data.named_sets.CACHE", cache)


def start_on_small_canvas(
    arguments: list[str], cache: Path, scenes: int, variables: Mapping[str, str] | None = None, validation: int = 5
) -> BaseProcess:
    """Starts an `mpvg` command in another process; see `shrink_canvas`.

    It is not forked from this one: once autograd has run on a second device, which an estimate of memory does, it
    refuses to run in a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mpvg.cli.main", "mpvg.cli.train", "mpvg.training"])
    process = context.Process(target=_run, args=(arguments, cache, scenes, validation, dict(variables or {})))
    process.start()
    return process


def _run(arguments: list[str], cache: Path, scenes: int, validation: int, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    shrink_canvas(pytest.MonkeyPatch(), cache, scenes, validation)
    sys.exit(main(arguments))
