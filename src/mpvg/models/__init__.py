"""Networks that receive a delivered position embedding; importing this registers them with timm as `mpvg_<name>`."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from mpvg.config import unknown
from mpvg.delivery import Method, as_spec
from mpvg.models import ceit as ceit
from mpvg.models import swin as swin
from mpvg.models import t2t_vit as t2t_vit
from mpvg.models import vit as vit
from mpvg.models import vit_lite as vit_lite
from mpvg.models.checkpoints import LoadReport, load_checkpoint
from mpvg.models.convert import create_converted

__all__ = ["LoadReport", "create_model", "load_checkpoint", "model_names"]

TIMM = "timm/"
"""What the name of a converted network starts with."""


def model_names() -> list[str]:
    """The names that `create_model` takes."""
    return sorted(name.removeprefix("mpvg_") for name in timm.list_models("mpvg_*"))


def create_model(
    name: str,
    method: Method = "mpvg",
    *,
    num_classes: int = 1000,
    checkpoint_path: str | Path | None = None,
    pos_std: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a network that runs a method.

    Args:
        name: one of `model_names()`, such as "deit_tiny_patch16_224"; or "timm/<name>", a network of timm's converted.
        method: a method's name (`mpvg.METHODS`) or a DeliverySpec.
        num_classes: classes of the head; 0: no head.
        checkpoint_path: weights to start from, of any method: see `load_checkpoint`.
        pos_std: standard deviation at which the position embedding starts; None: the network's own.
        **kwargs: further arguments of the network, such as img_size, in_chans, drop_path_rate; for "timm/<name>" also
            readout, start (as in `convert`) and pretrained.

    Raises:
        ValueError: the name is unknown, or the network cannot do what the method says.
    """
    if pos_std is not None and checkpoint_path is not None:
        raise ValueError(f"pos_std={pos_std} rescales the start of a PE, and {checkpoint_path} has its own; give one")
    if kwargs.get("features_only") and (checkpoint_path is not None or name.startswith(TIMM)):
        raise ValueError(
            "features_only wraps a new network of this package only; build the network with its weights, "
            "then wrap it: timm.models._features.FeatureGetterNet(model)"
        )
    if name.startswith(TIMM):
        kwargs |= {"num_classes": num_classes, "checkpoint_path": checkpoint_path, "pos_std": pos_std}
        return create_converted(name.removeprefix(TIMM), method, **kwargs)
    names = model_names()
    if name not in names:
        raise ValueError(unknown("model", name, names))
    model = timm.create_model(
        f"mpvg_{name}", method=as_spec(method), num_classes=num_classes, pos_std=pos_std, **kwargs
    )
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model
