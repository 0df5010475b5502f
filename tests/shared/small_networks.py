"""A small network of each family, and the methods that small networks take."""

from typing import Any

import torch

from mpvg.delivery import METHODS, DeliverySpec, NetworkTraits, resolve
from mpvg.models import create_model

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_mini_patch2_8", {"depth": 2, "embed_dim": 12, "num_heads": 2}),
    "Swin": ("swin_mini_patch2_28", {"depths": (1, 1), "embed_dim": 12, "num_heads": (2, 2)}),
    "CeiT": ("ceit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 12, "num_heads": 2}),
    "T2T-ViT": ("t2t_vit_7", {"img_size": 32, "depth": 2, "embed_dim": 12, "num_heads": 2}),
    "ViT-Lite": ("vit_lite_6_patch4_32", {"img_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 2}),
    "timm": ("timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 12, "num_heads": 2}),
}


def accepted(depth: int) -> dict[str, DeliverySpec]:
    """The methods that fit a network of so few layers, and one of a researcher's own."""
    found = {"own": DeliverySpec(pool="token", first_layer=0, hierarchical=False, last_index=3)}
    for name in METHODS:
        try:
            found[name] = resolve(name, NetworkTraits(name="small", depth=depth))
        except ValueError:
            assert name in ("mpvg_last8", "mpvg_last11")
    return found


def build(family: str, method: Any = "mpvg", **kwargs: Any) -> Any:
    """A small network in which no parameter is where it starts."""
    name, sizes = FAMILIES[family]
    if name.startswith("timm/"):
        kwargs = {"readout": "method"} | kwargs
    model: Any = create_model(name, method, **{"num_classes": 3, **sizes, **kwargs})
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if not part.startswith("patch_embed.attention"):  # the exponentials of T2T's performers would saturate
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def images(model: Any, count: int) -> torch.Tensor:
    return torch.randn(count, model.in_chans, *model.patch_embed.img_size)
