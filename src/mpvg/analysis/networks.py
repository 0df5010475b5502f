"""The size and cost of a network with a method, and which networks support which methods."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch.utils.flop_counter import FlopCounterMode

from mpvg import models
from mpvg.delivery import METHODS, DeliverySpec, Method
from mpvg.files import write_json
from mpvg.models import create_model, model_names
from mpvg.models.meta import without_values
from mpvg.models.network import count_parameters


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Properties of a network with a method."""

    spec: DeliverySpec
    """The method, resolved for this network."""
    pool: str
    """Pooling before the head, by its name in timm."""
    depth: int
    """Number of layers."""
    parameters: int
    """Number of parameters including frozen ones, as in the paper."""
    delivery_parameters: int
    """Number of parameters in the LN'."""
    flops: int
    """Floating-point operations of a forward pass with one image; a multiply-add counts as two."""
    image: tuple[int, int, int]
    """Channels, height and width of that image."""


def inspect(name: str, method: Method, **kwargs: Any) -> Inspection:
    """Measures a network at full size without allocating it; arguments and errors are those of `create_model`."""
    with without_values(), torch.no_grad():
        model: Any = create_model(name, method, **kwargs).eval()
        model.requires_grad_(False)  # the counter would ask for gradients
        image = (model.in_chans, *to_2tuple(model.img_size))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *image))
    return Inspection(
        spec=model.spec,
        pool=model.global_pool,
        depth=len(model.blocks),
        parameters=count_parameters(model),
        delivery_parameters=count_parameters(model.delivery),
        flops=counter.get_total_flops(),
        image=image,
    )


def sizes() -> dict[str, dict[str, Any]]:
    """Name -> size and cost of every network with method mpvg: what models/sizes.json holds for `mpvg models`."""
    found = {name: inspect(name, "mpvg") for name in model_names()}
    return {
        name: {"image": list(one.image), "depth": one.depth, "parameters": one.parameters, "flops": one.flops}
        for name, one in found.items()
    }


_COUNTED = ("default", "lape", "pvg", "mpvg")
_PAPER_MILLIONS = {
    ("deit_tiny_patch16_224", 1000): ("5.717", "5.721", "5.721", "5.721"),
    ("deit_small_patch16_224", 1000): ("22.050", "22.059", "22.058", "22.059"),
    ("deit_base_patch16_224", 1000): ("86.567", "86.586", "86.583", "86.584"),
    ("swin_tiny_patch4_window7_224", 1000): ("28.589", "28.599", "28.598", "28.599"),
    ("ceit_tiny_patch16_224", 1000): ("6.356", "6.361", "6.361", "6.361"),
    ("t2t_vit_7", 1000): ("4.310", "4.313", "4.312", "4.313"),
    ("vit_lite_7_patch4_32", 100): ("3.740", "3.744", "3.742", "3.743"),
    ("t2t_vit_7", 100): ("4.078", "4.082", "4.081", "4.081"),
}
_CANNOT_MATCH = {
    ("deit_tiny_patch16_224", "lape"): "LaPE's own code counts 5,722,024, too; LaPE with GAP would be 5,721,640",
    (
        "swin_tiny_patch4_window7_224",
        "lape",
    ): "12 LN' make 28,598,242; 28.599 needs 758 more, and LaPE's Swin is unpublished",
    (
        "ceit_tiny_patch16_224",
        "pvg",
    ): "256 too few; an unused LN' in the LCA block, or keeping the class token, would fit",
    ("vit_lite_7_patch4_32", "lape"): "the paper truncates to three decimals; only this row looks rounded",
}


@dataclass(frozen=True, kw_only=True)
class Count:
    """One entry of the paper's #Params, compared with ours."""

    network: str
    """Name of the network."""
    num_classes: int
    """Number of classes: 1000 for ImageNet (Table 1), 100 for CIFAR-100 (Table 2)."""
    method: str
    """Name of the method."""
    parameters: int
    """Our number of parameters, including frozen ones."""
    paper: str
    """The paper's number in millions, truncated to three decimals."""
    reason: str
    """Why no reading of the paper gives its number; empty if ours agrees."""

    @property
    def shown(self) -> str:
        """Our number in the paper's format."""
        return f"{self.parameters // 1_000_000}.{self.parameters // 1000 % 1000:03d}"


def parameter_table() -> list[Count]:
    """Counts all 32 networks of Tables 1 and 2."""
    with without_values():
        return [
            Count(
                network=network,
                num_classes=classes,
                method=method,
                parameters=count_parameters(create_model(network, method, num_classes=classes)),
                paper=paper,
                reason=_CANNOT_MATCH.get((network, method), ""),
            )
            for (network, classes), row in _PAPER_MILLIONS.items()
            for method, paper in zip(_COUNTED, row, strict=True)
        ]


SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT, DeiT": ("deit_tiny_patch16_224", {}),
    "Swin": ("swin_tiny_patch4_window7_224", {}),
    "CeiT": ("ceit_tiny_patch16_224", {}),
    "T2T-ViT": ("t2t_vit_7", {}),
    "ViT-Lite": ("vit_lite_7_patch4_32", {}),
    "timm's, read-out kept": ("timm/vit_tiny_patch16_224", {}),
    "timm's, the method's read-out": ("timm/vit_tiny_patch16_224", {"readout": "method"}),
}
"""The columns of `support_table`: one network of each family, with its arguments."""


@dataclass(frozen=True)
class Support:
    """Whether a network supports a method."""

    same_as: str | None = None
    """An earlier method that is identical in this network; None: there is none."""
    refused: str | None = None
    """The error message if the method is not supported, otherwise None."""


def support_table() -> dict[str, dict[str, Support]]:
    """Builds every method with one network of each family; returns method -> column of SUPPORTED -> result."""
    table: dict[str, dict[str, Support]] = {method: {} for method in METHODS}
    for column, (name, kwargs) in SUPPORTED.items():
        first: dict[DeliverySpec, str] = {}
        for method in METHODS:
            try:
                with without_values():
                    model: Any = create_model(name, method, **kwargs)
            except ValueError as error:
                table[method][column] = Support(refused=str(error))
                continue
            earlier = first.setdefault(model.spec, method)
            table[method][column] = Support(same_as=None if earlier is method else earlier)
    return table


if __name__ == "__main__":
    write_json(Path(models.__file__).with_name("sizes.json"), sizes())
