"""Files of complete weights, which are in no run folder: those of the original repositories, for example."""

from pathlib import Path

from torch import nn

from mpvg.config import RunConfig
from mpvg.data.factory import describe, open_listing
from mpvg.models.adapting import LoadReport
from mpvg.models.dense.official import load_complete
from mpvg.runs.run import Run
from mpvg.tasks import create_task


def weights_run(file: Path, config: RunConfig) -> tuple[Run, nn.Module, LoadReport]:
    """A run as if it had been trained to the weights in a file, its network in evaluation mode, and what was loaded.

    Args:
        file: all weights of a network.
        config: names the network, its method and the data, whose classes are those of the file in the same order.

    Raises:
        FileNotFoundError: there is no such file, or no data.
        ValueError: the weights do not fit, or the head's are not in the file.
    """
    info = describe(config, open_listing(config, ("val",)))
    model = create_task(config, info).build_model(init=False)
    report = load_complete(model, file)
    return Run(file, config, info), model.eval(), report
