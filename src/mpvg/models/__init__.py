"""Networks that receive a delivered position embedding (PE); the import registers them with timm as `mpvg_<name>`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from mpvg.delivery import Method, as_spec
from mpvg.models import ceit as ceit
from mpvg.models import swin as swin
from mpvg.models import t2t_vit as t2t_vit
from mpvg.models import vit as vit
from mpvg.models import vit_lite as vit_lite
from mpvg.models.checkpoints import LoadReport, load_checkpoint
from mpvg.models.convert import create_converted
from mpvg.models.vision_transformer import DeliveredVisionTransformer
from mpvg.validation import unknown_name

if TYPE_CHECKING:
    from mpvg.models.network import DeliveredNetwork

    # mypy checks here that every family has the type; CeiT, T2T-ViT and ViT-Lite inherit from the first.
    _NETWORKS: tuple[type[DeliveredNetwork], ...] = (DeliveredVisionTransformer, swin.DeliveredSwinTransformer)

__all__ = ["LoadReport", "create_model", "load_checkpoint", "model_names"]

TIMM = "timm/"
"""Prefix of the name of a converted timm network."""


def model_names() -> list[str]:
    """Returns the names that `create_model` accepts."""
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
        name: one of `model_names()`, such as "deit_tiny_patch16_224"; or "timm/<name>" for a converted timm network.
        method: a method's name (`mpvg.METHODS`) or a DeliverySpec.
        num_classes: classes of the head; 0: no head.
        checkpoint_path: weights to start from, trained with any method; see `load_checkpoint`.
        pos_std: initial standard deviation of the position embedding; None: the network's default.
        **kwargs: further arguments of the network, such as img_size, in_chans, drop_path_rate; for "timm/<name>" also
            readout, start (as in `convert`) and pretrained.

    Raises:
        ValueError: the name is unknown, or the network cannot run the method.
    """
    if pos_std is not None and checkpoint_path is not None:
        raise ValueError(f"pos_std={pos_std} rescales a new PE, but {checkpoint_path} has a trained one; give one only")
    if kwargs.get("features_only") and (checkpoint_path is not None or name.startswith(TIMM)):
        raise ValueError(
            "features_only is for new networks of this package without a checkpoint; build the network without it and "
            "call model.forward_intermediates(images, indices, intermediates_only=True) for the same feature maps"
        )
    if name.startswith(TIMM):
        kwargs |= {"num_classes": num_classes, "checkpoint_path": checkpoint_path, "pos_std": pos_std}
        return create_converted(name.removeprefix(TIMM), method, **kwargs)
    names = model_names()
    if name not in names:
        raise ValueError(unknown_name("model", name, names))
    model = timm.create_model(
        f"mpvg_{name}", method=as_spec(method), num_classes=num_classes, pos_std=pos_std, **kwargs
    )
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model
