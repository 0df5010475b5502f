"""Builds the dense networks by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpvg.delivery import Method
from mpvg.models import create_model, load_checkpoint
from mpvg.models.dense.pyramid import ViTPyramid
from mpvg.models.dense.trunk import STAGES, DenseBackbone, Forward, dense_spec, without_readout
from mpvg.models.dense.vit_adapter import ViTAdapter
from mpvg.models.vision_transformer import DeliveredVisionTransformer
from mpvg.validation import unknown_name


@dataclass(frozen=True, kw_only=True)
class DenseSizes:
    """The sizes of a dense network."""

    vit: str
    """The transformer inside, by its name in `create_model`."""
    window: int
    """Side of a window in patches."""
    global_layers: tuple[int, ...] = ()
    """Layers that attend to the whole image; empty: the last layer of each stage."""
    adapter: Mapping[str, Any] | None = field(default_factory=dict)
    """Arguments of ViTAdapter; None: the plain pyramid."""


_OFFICIAL_HEADS = {192: 6, 384: 6, 768: 12, 1024: 16}
"""Heads of the deformable attentions by the width of another transformer, as in czczup/ViT-Adapter's configurations of
Ti, S, B and L; at other widths they are as many as the transformer's own."""

_CANVAS: dict[str, Any] = {"vit": "vit_canvas_patch16_64", "window": 4, "global_layers": (3,)}

ADAPTERS: dict[str, DenseSizes] = {
    "vit_adapter_tiny": DenseSizes(vit="deit_tiny_patch16_224", window=14),
    "vit_adapter_canvas": DenseSizes(**_CANVAS, adapter={"prior_width": 24, "heads": 4}),
    "vit_pyramid_tiny": DenseSizes(vit="deit_tiny_patch16_224", window=14, adapter=None),
    "vit_pyramid_canvas": DenseSizes(**_CANVAS, adapter=None),
}
"""The dense networks by name: ViT-Adapter-Ti of Tables 3 and 4 (czczup/ViT-Adapter's configurations); the same
architecture at small width for images of 128 pixels, a grid of 8 x 8, where each stage is one layer and only the last
layer is global; and the plain pyramid in both sizes."""


def create_adapter(
    name: str,
    method: Method = "mpvg",
    *,
    forward: Forward,
    vit: str | None = None,
    checkpoint_path: str | Path | None = None,
    drop_path_rate: float = 0.0,
    **kwargs: Any,
) -> DenseBackbone:
    """Builds a dense network whose layers receive what a method delivers.

    Args:
        name: one of `ADAPTERS`.
        method: a method's name (`mpvg.METHODS`) or a DeliverySpec. What it delivers to the Last LN is left out, because
            there is none; the network's `remark` says so.
        forward: the task, which decides where the layers attend and which tokens each map gets.
        vit: another transformer to stand inside, by its name in `create_model`; also "timm/<name>", of patch size 16,
            with an absolute PE and a depth divisible by 4.
        checkpoint_path: weights of a classifier to start the transformer from, trained with any method; the network's
            `load_report` says what was taken, resampled, dropped and new. See `mpvg.models.load_checkpoint`.
        drop_path_rate: of the layers, from 0 in the first to this in the last, and of the extractors.
        **kwargs: further arguments of the transformer, as of `create_model`.

    Raises:
        ValueError: a name is unknown, or the transformer cannot stand inside or run the method.
    """
    if name not in ADAPTERS:
        raise ValueError(unknown_name("dense network", name, list(ADAPTERS)))
    sizes = ADAPTERS[name]
    if kwargs.get("pos_std") is not None and checkpoint_path is not None:
        raise ValueError(f"pos_std={kwargs['pos_std']} rescales a new PE, but {checkpoint_path} has a trained one")
    trunk = _create_trunk(sizes.vit if vit is None else vit, method, drop_path_rate=drop_path_rate, **kwargs)
    depth = len(trunk.blocks)
    own = vit is None and sizes.global_layers
    where: dict[str, Any] = {"forward": forward, "window": sizes.window}
    where["global_layers"] = own or tuple(range(depth // STAGES - 1, depth, depth // STAGES))
    network: DenseBackbone
    if sizes.adapter is None:
        network = ViTPyramid(trunk, **where)
    else:
        adapter = dict(sizes.adapter)
        if vit is not None:
            inside: Any = trunk.blocks[0].attn
            adapter["heads"] = _OFFICIAL_HEADS.get(trunk.embed_dim, inside.num_heads)
        network = ViTAdapter(trunk, **where, **adapter, drop_path_rate=drop_path_rate)
    if checkpoint_path is not None:
        load_checkpoint(trunk, checkpoint_path)
    return network


def _create_trunk(name: str, method: Method, **kwargs: Any) -> DeliveredVisionTransformer:
    """The transformer inside; it is built without class token whatever the method, so that all methods start alike."""
    for argument in ("num_classes", "dynamic_img_size", "readout", "start"):
        if argument in kwargs:
            raise ValueError(f"{argument}={kwargs[argument]!r}: a dense network decides it; leave it out")
    inside: Any = create_model(name, dense_spec(method), num_classes=0, **kwargs)
    return without_readout(inside, method)
