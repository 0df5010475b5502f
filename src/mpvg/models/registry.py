"""Registration of the network families with timm."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mpvg.config.parts import Pooling
from mpvg.models.checkpoints import adapt_state_dict
from mpvg.models.fold import fold
from mpvg.models.readout import set_pooling

default_cfgs: dict[str, Any] = {}
"""Configurations of the registered models; timm looks them up under this name."""


IMAGENET: dict[str, Any] = {
    "num_classes": 1000,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "fixed_input_size": True,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
"""timm's configuration of a network for ImageNet."""


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
    for name, arguments in sizes.items():
        entry = IMAGENET | {"input_size": (3, arguments["img_size"], arguments["img_size"])} | cfg
        register_builder(network, name, entry, dict(arguments), out_indices)


def register_builder(
    network: Callable[..., nn.Module], name: str, cfg: Mapping[str, Any], arguments: Mapping[str, Any], out_indices: Any
) -> None:
    """Registers one model; `network` returns it for `arguments` and those of the user."""

    def build(pretrained: bool = False, folded: bool = False, **kwargs: Any) -> nn.Module:
        # "getter" calls the network's own loop; timm's other feature wrappers would call the blocks without a PE.
        pooling = kwargs.pop("pooling", "method")
        features = {"out_indices": kwargs.pop("out_indices", out_indices), "feature_cls": "getter"}
        model: Any = build_model_with_cfg(
            _finished(network, pooling, folded=folded),
            f"mpvg_{name}",
            pretrained,
            feature_cfg=features,
            pretrained_filter_fn=checkpoint_filter_fn,
            **(dict(arguments) | kwargs),
        )
        if hasattr(model, "delivery"):  # not a wrapper of features_only
            # timm.create_model(checkpoint_path=FILE) calls load_state_dict with the content of a file and no filter.
            model.adapts_first_load = True
            model.register_load_state_dict_pre_hook(_adapt_first)
        return cast(nn.Module, model)

    default_cfgs.update(generate_default_cfgs({f"mpvg_{name}": dict(cfg)}))
    build.__name__ = f"mpvg_{name}"
    build.__doc__ = f"{name} with a delivered position embedding; `method` as in `mpvg.create_model`."
    register_model(build)


def _finished(network: Callable[..., nn.Module], pooling: Pooling, *, folded: bool) -> Callable[..., nn.Module]:
    """Builds the network, gives it its read-out, and folds it if asked for."""

    def build(**kwargs: Any) -> nn.Module:
        if kwargs.get("reg_tokens") and not (isinstance(network, type) and issubclass(network, VisionTransformer)):
            raise ValueError(f"reg_tokens is {kwargs['reg_tokens']}, and {network.__name__} has no registers; give 0")
        model = network(**kwargs)
        set_pooling(model, pooling)
        return fold(model) if folded else model

    return build


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's filter for pretrained weights: adapts them to the network as `mpvg.models.load_checkpoint` does.

    Raises:
        ValueError: they do not fit.
    """
    source: Any = getattr(model, "pretrained_model_args", {})  # of a folder that timm's save_for_hf wrote
    network: Any = model
    grid = None
    if source.get("img_size") is not None:
        rows, columns = zip(to_2tuple(source["img_size"]), network.patch_embed.patch_size, strict=True)
        grid = rows[0] // rows[1], columns[0] // columns[1]
    return adapt_state_dict(state_dict, model, grid)


def _adapt_first(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Adapts the first state dict that a network from timm.create_model is given; after that, it must fit."""
    if prefix or not model.adapts_first_load:
        return
    model.adapts_first_load = False
    own = model.state_dict()
    if own.keys() != state_dict.keys() or any(own[key].shape != value.shape for key, value in state_dict.items()):
        adapted = adapt_state_dict(dict(state_dict), model)
        state_dict.clear()
        state_dict.update(adapted)


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
