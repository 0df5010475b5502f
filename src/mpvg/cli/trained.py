"""Which network and which data a verb is asked about: timm/<name> with a file of weights, or a run."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from mpvg.cli.arguments import whole

if TYPE_CHECKING:
    from mpvg.analysis.trained import Trained
    from mpvg.config import RunConfig
    from mpvg.runs.checkpoints import Which

WHICH: tuple["Which", ...] = ("last", "best")


def add_network(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose weights."""
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of timm/NAME; of a run: last (default) or best")
    parser.add_argument("--random", action="store_true", help="random weights, which are refused otherwise")
    parser.add_argument("--seed", type=whole, default=0, help="of random weights and of whatever else is drawn")


def which(checkpoint: str | None) -> "Which":
    """Which weights of a run."""
    for name in WHICH:
        if checkpoint in (name, None):
            return name
    raise ValueError(f"--checkpoint is {checkpoint!r}; allowed for a run: {', '.join(WHICH)}; for timm/NAME a file")


def data_config(data: str, seed: int) -> "RunConfig":
    """A config that names data, and says how images of files are read."""
    from mpvg.recipes import recipe

    return replace(recipe(None, data), seed=seed)


def open_trained(given: argparse.Namespace, model: str | None, run: str | None, data: str | None) -> "Trained":
    """Opens timm/NAME with the training images of `data`, or a run."""
    from mpvg import runs
    from mpvg.analysis.trained import open_run, open_timm

    if model is not None:
        assert data is not None
        base = data_config(data, given.seed)
        return open_timm(model, given.checkpoint, base, "train", random=given.random, head=False)
    assert run is not None
    if given.random:
        raise ValueError("--random is for --model timm/NAME, and a run has weights; leave it out")
    return open_run(runs.load(run), which(given.checkpoint), data)
