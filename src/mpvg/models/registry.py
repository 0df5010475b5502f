"""Registration of the network families with timm."""

from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

default_cfgs: dict[str, Any] = {}
"""Configurations of the registered models; timm looks them up under this name."""


def register(
    network: type[nn.Module], sizes: Mapping[str, Mapping[str, Any]], out_indices: Any = 3, **cfg: Any
) -> None:
    """Registers the models of a family with timm as `mpvg_<name>`.

    Args:
        network: the family's class.
        sizes: the arguments of the class for each name; they must include `img_size`.
        out_indices: the feature maps that `features_only` returns by default.
        **cfg: entries of timm's configuration that differ from the ImageNet defaults.
    """
    shared = {
        "num_classes": 1000,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    for name, arguments in sizes.items():
        entry = shared | {"input_size": (3, arguments["img_size"], arguments["img_size"])} | cfg
        default_cfgs.update(generate_default_cfgs({f"mpvg_{name}": entry}))
        _register(network, name, dict(arguments), out_indices)


def _register(network: type[nn.Module], name: str, arguments: dict[str, Any], out_indices: Any) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"mpvg_{name} has no pretrained weights to download; give checkpoint_path=FILE")
        # "getter" calls the network's own loop; timm's other feature wrappers would call the blocks without a PE.
        features = {"out_indices": kwargs.pop("out_indices", out_indices), "feature_cls": "getter"}
        return build_model_with_cfg(network, f"mpvg_{name}", False, feature_cfg=features, **(arguments | kwargs))

    build.__name__ = f"mpvg_{name}"
    build.__doc__ = f"{name} with a delivered position embedding; `method` as in `mpvg.create_model`."
    register_model(build)


def check_divisible(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Refuses an image size that is not a multiple of the patch size.

    Raises:
        ValueError: naming both sizes and the nearest allowed image sizes.
    """
    for side, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True):
        if side < patch or side % patch:
            below = max(side // patch, 1) * patch
            raise ValueError(
                f"image size {side} is not divisible by the patch size {patch}; "
                f"the nearest sizes that are: {below}, {below + patch}"
            )
