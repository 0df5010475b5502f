"""Where the weights come from that a new run starts from."""

from dataclasses import replace
from pathlib import Path

from mpvg.config import RunConfig
from mpvg.runs import load


def with_init_file(config: RunConfig) -> RunConfig:
    """The config of a new run whose `network.init` may be a run folder, with the file of its best checkpoint instead.

    Raises:
        FileNotFoundError: the folder holds no run, or the run has no checkpoint.
        ValueError: its checkpoint is damaged.
    """
    given = config.network.init
    if given is None or not Path(given).is_dir():
        return config
    run = load(given)
    file = run.weights_file("best", ema=run.config.ema_selects)
    # In the folder of the step, not through the pointer: that may point to another step later.
    file = run.path / "checkpoints" / file.parent.resolve().name / file.name
    return replace(config, network=replace(config.network, init=str(file)))
