"""Networks that receive a delivered position embedding (PE); the import registers them with timm as `mpvg_<name>`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
from torch import nn

from mpvg.config.names import TIMM as TIMM
from mpvg.delivery import Method, as_spec
from mpvg.models import ceit as ceit
from mpvg.models import swin as swin
from mpvg.models import t2t_vit as t2t_vit
from mpvg.models import vit as vit
from mpvg.models import vit_lite as vit_lite
from mpvg.models.checkpoints import LoadReport, load_checkpoint
from mpvg.models.convert import CONVERTED, create_converted, pretrained_mean_std
from mpvg.models.mixin import DeliveryMixin
from mpvg.models.own import create_own, is_own, register_network
from mpvg.models.vision_transformer import DeliveredVisionTransformer
from mpvg.validation import unknown_name

if TYPE_CHECKING:
    from mpvg.models.network import DeliveredNetwork

    # mypy checks here that every family has the type; CeiT, T2T-ViT and ViT-Lite inherit from the first.
    _NETWORKS: tuple[type[DeliveredNetwork], ...] = (
        *(DeliveredVisionTransformer, swin.DeliveredSwinTransformer, DeliveryMixin),
    )

__all__ = [
    "DeliveryMixin",
    "LoadReport",
    "create_model",
    "load_checkpoint",
    "model_names",
    "pretrained_mean_std",
    "register_network",
]


def model_names() -> list[str]:
    """Returns the names that `create_model` accepts."""
    names = timm.list_models("mpvg_*", exclude_filters=f"mpvg_{CONVERTED}")
    return sorted(name.removeprefix("mpvg_") for name in names)


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
        name: one of `model_names()`, such as "deit_tiny_patch16_224"; or "timm/<name>" for a converted timm network; or
            that of a network of your own, see `register_network`.
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
    if is_own(name):
        kwargs |= {"num_classes": num_classes, "checkpoint_path": checkpoint_path, "pos_std": pos_std}
        return create_own(name, method, **kwargs)
    if name.startswith(TIMM):
        kwargs |= {"num_classes": num_classes, "checkpoint_path": checkpoint_path, "pos_std": pos_std}
        return create_converted(name.removeprefix(TIMM), method, **kwargs)
    names = model_names()
    if name not in names:
        raise ValueError(unknown_name("model", name, names))
    as_spec(method)  # refuses it before the network is built
    # timm writes the arguments into the config of save_for_hf, as JSON.
    kwargs |= {"method": method if isinstance(method, str) else as_spec(method).to_dict(), "num_classes": num_classes}
    try:
        model: Any = timm.create_model(f"mpvg_{name}", pos_std=pos_std, **kwargs)
    except RuntimeError as error:
        if "No pretrained weights exist" not in str(error):
            raise
        raise ValueError(f"mpvg_{name} has no pretrained weights to download; give checkpoint_path=FILE") from error
    if hasattr(model, "adapts_first_load"):
        model.adapts_first_load = False
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return cast(nn.Module, model)
