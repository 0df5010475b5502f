"""Run folders whose networks were never trained, for tests of what is done with a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpvg.data import describe, open_listing
from mpvg.recipes import recipe
from mpvg.runs import Run, create_run
from mpvg.runs.checkpoints import Checkpoint, save_checkpoint
from mpvg.tasks import create_task


def make_run(path: Path, method: str = "mpvg", **changes: Any) -> Run:
    """A run of a small network on digits, in which no parameter is where it starts."""
    changes = {"model": "vit_mini_patch2_8", "method": method, "out": str(path), "device": "cpu"} | changes
    config = replace(recipe(None, "digits"), **changes)
    info = describe(config, open_listing(config, ("train", "val")))
    run = create_run(config, info)
    torch.manual_seed(0)
    weights = create_task(config, info).build_model(init=True).state_dict()
    weights = {name: value + 0.1 * torch.randn_like(value) for name, value in weights.items()}
    save_checkpoint(path, 1, Checkpoint({"model": weights}, {"step": 1}), best=True)
    return run
