"""The normalization of images that belongs to the weights from which a run starts."""

from dataclasses import replace

from mpvg.config import RunConfig
from mpvg.data.named_sets import NAMED_SETS
from mpvg.models import pretrained_mean_std


def with_weights_normalization(config: RunConfig) -> RunConfig:
    """The config of a new run with the mean and standard deviation that the weights of its timm network expect.

    A config that gives one of them, or starts from no weights, or is of a network of this package, is returned as it
    is: the data set's own are then used, which are ImageNet's for image files.
    """
    network = config.network
    if network.init is None or network.mean is not None or network.std is not None:
        return config
    found = pretrained_mean_std(config.model, len(NAMED_SETS[config.data].mean) if config.data in NAMED_SETS else 3)
    if found is None:
        return config
    return replace(config, network=replace(network, mean=found[0], std=found[1]))


def describe_normalization(config: RunConfig) -> list[str]:
    """The normalization of a config that does not leave it to the data, as a phrase for the first line of a run."""
    network = config.network
    parts = [
        f"{name} {', '.join(f'{value:g}' for value in values)}"
        for name, values in (("mean", network.mean), ("std", network.std))
        if values is not None
    ]
    return [f"images normalized with {' and '.join(parts)}"] if parts else []
