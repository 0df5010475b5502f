"""What position embeddings do inside a network, and what a network costs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mpvg.delivery import DeliverySpec, Method
from mpvg.models import create_model


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a network is under a method."""

    spec: DeliverySpec
    """The method as the network runs it."""
    depth: int
    """Layers."""
    parameters: int
    """Parameters, frozen ones included, as the paper counts them."""
    delivery_parameters: int
    """Those of the LN' among them."""
    flops: int
    """Floating-point operations of a forward pass with one image: two for each multiply-add."""
    image: tuple[int, int, int]
    """Channels, height and width of that image."""


def inspect(name: str, method: Method, **kwargs: Any) -> Inspection:
    """Counts a network at full size without allocating it; arguments and errors as `create_model`."""
    with torch.device("meta"), torch.no_grad():
        model: Any = create_model(name, method, **kwargs).eval()
        image = (model.in_chans, *model.patch_embed.img_size)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *image))
    return Inspection(
        spec=model.spec,
        depth=len(model.blocks),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        delivery_parameters=sum(parameter.numel() for parameter in model.delivery.parameters()),
        flops=counter.get_total_flops(),
        image=image,
    )


@torch.inference_mode()
def position_correlation(model: nn.Module, images: Tensor) -> list[float]:
    """Pearson correlation between the tokens and the PE that each layer and the Last LN receive (Fig. 4).

    For layer l it is r(mean over images of LN_l(x_l), PE_l) over all patch tokens and channels, where PE_l is what the
    method delivers to the layer: LN'_l(pos_{l-1}) under PVG and MPVG. Where nothing is delivered PE_l is the raw PE, so
    that methods without layer-wise delivery can be drawn beside the others.

    Args:
        model: a network of this package, not folded.
        images: preprocessed images `(B, C, H, W)`.

    Returns:
        One value in [-1, 1] a layer, and one for the Last LN.
    """
    network: Any = model.eval()
    seen: list[Tensor] = []
    norms = [*(block.norm1 for block in network.blocks), network.norm]
    handles = [norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for norm in norms]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    pos = network.position()
    delivered = network.deliver(pos)
    # Rows are counted from the end: prefix tokens come first, and not every PE has a row for them.
    patches = network.patch_embed.num_patches
    pairs = zip(seen, [*delivered.per_layer, delivered.last], strict=True)
    return [
        _pearson(tokens[:, -patches:].mean(dim=0), (pos if pe is None else pe)[0, -patches:]) for tokens, pe in pairs
    ]


def _pearson(a: Tensor, b: Tensor) -> float:
    stacked = torch.stack([a.flatten().double(), b.flatten().double()])
    return float(torch.corrcoef(stacked)[0, 1])
