"""What detection and segmentation share: the dense network that a run's config names."""

from dataclasses import dataclass

from mpvg.config import PRETRAINED, NetworkConfig, RunConfig
from mpvg.config.names import check_architecture, is_reference
from mpvg.data import DataInfo
from mpvg.data.label_maps import SegmentationSizes
from mpvg.data.scenes import DetectionSizes
from mpvg.models.dense import create_adapter
from mpvg.models.dense.trunk import DenseBackbone, Forward
from mpvg.validation import check


@dataclass(frozen=True, kw_only=True)
class DenseOptions:
    """The options that detection and segmentation share."""

    vit: str | None = None
    """Another transformer inside the dense network: a name of `create_model`, such as timm/vit_small_patch16_224."""

    def __post_init__(self) -> None:
        if self.vit is not None:
            good = bool(self.vit) and not is_reference(self.vit)
            check("task_options.vit", self.vit, good, "a network of this package, or timm/NAME")
            check_architecture("task_options.vit", self.vit)


def longer_than_long(options: DetectionSizes | SegmentationSizes, name: str) -> dict[str, str]:
    """The option that gives the short side, and the reason, if the long side's limit is always reached first."""
    if getattr(options, name) <= options.long_side:
        return {}
    return {name: f"long_side is {options.long_side}; give a larger long_side too"}


def check_dense_network(config: RunConfig, reason: str) -> None:
    """Refuses the fields of `network` that only image classification has.

    Args:
        config: of the run.
        reason: why, as the end of the sentence "network.readout is 'method', ...".

    Raises:
        ValueError: one of them is given.
    """
    network = config.network
    for name in ("readout", "start", "img_size", "pooling", "registers"):
        if (value := getattr(network, name)) != getattr(NetworkConfig, name):
            where = "; image sizes are in task_options" if name == "img_size" else ""
            raise ValueError(f"network.{name} is {value!r}, {reason}; leave it out{where}")
    if network.init == PRETRAINED:
        raise ValueError(
            f"network.init is {PRETRAINED!r}, {reason}; give a file, or the folder of a run that trained the classifier"
        )


def dense_backbone(
    config: RunConfig, info: DataInfo, forward: Forward, vit: str | None, *, init: bool
) -> DenseBackbone:
    """The network of `mpvg.models.dense.ADAPTERS` that `model` names.

    Args:
        config: of the run.
        info: of its data.
        forward: the task, as `create_adapter` takes it.
        vit: another transformer than the network's own, as `create_adapter` takes it.
        init: whether it gets the weights that training starts from; see `Task.build_model`.

    Raises:
        As `create_adapter`.
    """
    network = config.network
    return create_adapter(
        config.model,
        config.method,
        forward=forward,
        vit=vit,
        checkpoint_path=network.init if init else None,
        drop_path_rate=network.drop_path,
        pos_std=network.pos_std,
        in_chans=info.in_chans,
    )
