"""Runs of two methods on digits, trained and analyzed once for all tests of a process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpvg.analysis import report
from mpvg.analysis.report import Options
from mpvg.recipes import recipe
from mpvg.training import train


def train_run(out: Path, method: str = "mpvg", seed: int = 0, **changes: Any) -> Path:
    base = replace(recipe(None, "digits"), epochs=1, threads=1, device="cpu")
    train(replace(base, method=method, seed=seed, out=str(out), **changes), quiet=True)
    return out


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mpvg-0, mpvg-1 and gap-0."""
    threads = torch.get_num_threads()
    root = tmp_path_factory.mktemp("trained")
    for method, seed in (("mpvg", 0), ("mpvg", 1), ("gap", 0)):
        train_run(root / f"{method}-{seed}", method, seed)
    torch.set_num_threads(threads)
    return root


@pytest.fixture(scope="session")
def written(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of all three runs."""
    out = tmp_path_factory.mktemp("report")
    report.analyze([trained / name for name in ("mpvg-0", "mpvg-1", "gap-0")], out, Options(sensitivity_images=20))
    return out
