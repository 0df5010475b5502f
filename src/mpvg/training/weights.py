"""The weights from which a run starts, where they are another run's."""

from dataclasses import replace
from pathlib import Path

from mpvg import runs
from mpvg.config import RunConfig
from mpvg.runs.checkpoints import checkpoint_folder


def with_weights_file(config: RunConfig) -> RunConfig:
    """The config of a new run in which a run's folder in `network.init` is replaced by the file of its best weights.

    These are the averaged ones where they chose the best checkpoint. A config with a file is returned as it is.

    Raises:
        FileNotFoundError: the folder holds no run, or one without a best checkpoint.
    """
    network = config.network
    if network.init is None or not Path(network.init).is_dir():
        return config
    run = runs.load(network.init)
    # The folder of the step, not the pointer: that may point to another step later.
    step = checkpoint_folder(run.path, "best").resolve().name
    name = "ema.safetensors" if run.config.ema_selects else "model.safetensors"
    return replace(config, network=replace(network, init=str(run.path / "checkpoints" / step / name)))
