"""A vision transformer that gives tokens of images of any size to a dense network, and has no read-out of its own."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch.nn.functional as F
from timm.layers import Attention, Format, LayerScale
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn

from mpvg.delivery import DeliverySpec, Method, NetworkTraits, as_spec, describe_spec, resolve
from mpvg.models.adapting import Grid, LoadReport
from mpvg.models.convert import network_name
from mpvg.models.vision_transformer import AttentionLike, DeliveredVisionTransformer

PATCH = 16
STRIDES = (4, 8, 16, 32)
"""Strides of the four maps of a dense network, in pixels."""
SIDE = 32
"""The sides of an image must be multiples of it, so that every map has whole rows and columns."""
STAGES = 4
"""A trunk's layers are divided into as many equal stages."""

Forward = Literal["detection", "segmentation"]


@dataclass(frozen=True, kw_only=True)
class ForwardSpec:
    """In what the networks for two tasks differ (czczup/ViT-Adapter, `detection` and `segmentation`)."""

    windowed: bool
    """Whether the layers that are not global attend within windows; otherwise all are global."""
    each_stage: bool
    """Whether map i gets the tokens after stage i, or every map those after the last stage."""


FORWARDS: dict[str, ForwardSpec] = {
    "detection": ForwardSpec(windowed=True, each_stage=False),
    "segmentation": ForwardSpec(windowed=False, each_stage=True),
}
_NO_TOKEN = "a dense network has no tokens but the patches'"
_NO_LAST = "a dense network has no Last LN"
_NO_READOUT = "a dense network has no read-out"
_DROPPED = dict.fromkeys(("cls_token", "dist_token", "reg_token"), _NO_TOKEN)
_DROPPED |= {f"{name}.{part}": _NO_READOUT for name in ("head", "head_dist") for part in ("weight", "bias")}
_DROPPED |= {f"{name}.{part}": _NO_LAST for name in ("norm", "fc_norm") for part in ("weight", "bias")}


def layer_groups(transformer: str) -> dict[str, Any]:
    """timm's groups for layer decay: the layers of the transformer; adapter and heads are in the last group.

    Args:
        transformer: the name that its parameters begin with.

    Source:
        czczup/ViT-Adapter, `segmentation/mmcv_custom/layer_decay_optimizer_constructor.py`.
    """
    inside = "^" + re.escape(transformer)
    return {
        "stem": inside + r"(?:pos_embed|patch_embed|norm_pre)",
        "blocks": [(inside + r"(?:blocks|delivery\.layer_norms)\.(\d+)", None)],
    }


class DenseBackbone(nn.Module):
    """What the networks around a vision transformer share: its tokens, stage by stage.

    Args:
        vit: the transformer, changed by `without_readout`.
        forward: the task's forward pass.
        window: side of a window in patches; None: all layers are global.
        global_layers: layers that attend to the whole image.

    Raises:
        ValueError: the transformer cannot stand inside, or `forward` is not known.
    """

    vit: DeliveredVisionTransformer

    def __init__(
        self, vit: DeliveredVisionTransformer, *, forward: Forward, window: int | None, global_layers: Sequence[int]
    ) -> None:
        super().__init__()
        if forward not in FORWARDS:
            raise ValueError(f"forward is {forward!r}; allowed: {', '.join(map(repr, get_args(Forward)))}")
        self.vit = vit
        self.embed_dim: int = vit.embed_dim
        self.forward_spec = FORWARDS[forward]
        self.windows: dict[int, int] = {}
        """Side of the windows of each layer that has windows."""
        if self.forward_spec.windowed and window is not None:
            self.windows = {layer: window for layer in range(len(vit.blocks)) if layer not in global_layers}
        _check_windows(vit, self.windows)

    @property
    def remark(self) -> str:
        """How the network differs from what the method's name promises; empty if it does not."""
        return self.vit.remark

    @property
    def spec(self) -> DeliverySpec:
        """The method as this network runs it."""
        return self.vit.spec

    @property
    def load_report(self) -> LoadReport | None:
        """What the transformer took from a checkpoint; None: nothing was loaded."""
        return self.vit.load_report

    def stages(self) -> list[range]:
        """The layers of each stage."""
        size = len(self.vit.blocks) // STAGES
        return [range(stage * size, (stage + 1) * size) for stage in range(STAGES)]

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...], Grid]:
        """Images to the tokens that enter layer 0, `(B, N, D)`; what each layer receives; and the grid of patches.

        The raw PE is resampled to the grid of the image, and delivered after that.

        Raises:
            ValueError: a side is not a multiple of 32.
        """
        height, width = image.shape[-2:]
        if height % SIDE or width % SIDE:
            raise ValueError(
                f"images are {height} x {width}, but both sides must be multiples of {SIDE}; pad them to "
                f"{-(-height // SIDE) * SIDE} x {-(-width // SIDE) * SIDE}"
            )
        x, delivered = self.vit.embed(image)
        return self.vit.norm_pre(x), delivered.per_layer, (height // PATCH, width // PATCH)

    def run(self, x: Tensor, per_layer: Sequence[Tensor | None], layers: Iterable[int], grid: Grid) -> Tensor:
        """Runs some layers on tokens `(B, N, D)`, within windows where the layer has them."""
        for layer in layers:
            attention: AttentionLike | None = None
            if layer in self.windows:
                block: Any = self.vit.blocks[layer]
                attention = partial(windowed_attention, block.attn, window=self.windows[layer], grid=grid)
            x = self.vit.run_layer(layer, x, per_layer[layer], attention=attention)
        return x


def as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens `(B, H * W, D)` as a map `(B, D, H, W)`."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def windowed_attention(
    attention: Attention,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    window: int,
    grid: Grid,
) -> Tensor:
    """Runs an attention within square windows of the grid.

    The windows at the right and at the bottom are filled with zeros after the projection to query, key and value. The
    zeros are not masked: as keys they take part in the softmax, with score 0 and value 0.

    Args:
        attention: timm's attention, whose parameters are used.
        x: tokens `(B, H * W, D)`.
        attn_mask: None; a mask of all tokens has no meaning within windows.
        is_causal: False.
        window: side of a window in patches.
        grid: H and W.

    Returns:
        `(B, H * W, D)`.

    Source:
        czczup/ViT-Adapter, `base/vit.py`, WindowedAttention.
    """
    assert attn_mask is None
    assert not is_causal
    (rows, columns), batch, heads = grid, len(x), attention.num_heads
    down, right = -(-rows // window), -(-columns // window)
    qkv = attention.qkv(x).reshape(batch, rows, columns, -1)
    qkv = F.pad(qkv, (0, 0, 0, right * window - columns, 0, down * window - rows))
    qkv = qkv.reshape(batch, down, window, right, window, 3, heads, -1)
    qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch * down * right, heads, window * window, -1)
    q, k, v = qkv.unbind(0)
    dropout = attention.attn_drop.p if attention.training else 0.0
    found = F.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v, dropout_p=dropout)
    found = found.reshape(batch, down, right, heads, window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    found = found.reshape(batch, down * window, right * window, -1)[:, :rows, :columns]
    return attention.proj_drop(attention.proj(attention.norm(found.reshape(batch, rows * columns, -1))))


def dense_spec(method: Method) -> DeliverySpec:
    """The method as a network without Last LN and class token runs it."""
    return replace(as_spec(method).without_last(), pool="avg", start_beta=False)


def without_readout(vit: Any, asked: Method) -> DeliveredVisionTransformer:
    """Removes what only a classifier needs: prefix tokens with their rows of the PE, Last LN, pooling and head.

    Layers without layer scale get one that starts at 1, and from now on the PE is resampled without antialiasing; both
    are as in czczup/ViT-Adapter. `vit.remark` says what of the method does not take place.

    Args:
        vit: a new network, which is changed.
        asked: the method that was asked for.

    Returns:
        The same network.

    Raises:
        ValueError: it cannot stand inside a dense network; the message gives the reason.
    """
    _check_trunk(vit)
    spec = resolve(asked, NetworkTraits(name="a dense network", depth=len(vit.blocks)))
    prefix = vit.num_prefix_tokens
    if prefix and not vit.no_embed_class:
        vit.pos_embed = nn.Parameter(vit.pos_embed.detach()[:, prefix:].clone(), vit.pos_embed.requires_grad)
    vit.cls_token = vit.reg_token = vit.attn_pool = None
    vit.has_class_token, vit.num_prefix_tokens, vit.num_reg_tokens = False, 0, 0
    vit.norm, vit.fc_norm, vit.head_drop, vit.head = (nn.Identity() for _ in range(4))
    vit.global_pool, vit.pool_include_prefix, vit.num_classes = "avg", False, 0
    vit.dynamic_img_size, vit.pos_antialias = True, False
    vit.patch_embed.flatten, vit.patch_embed.output_fmt, vit.patch_embed.strict_img_size = False, Format.NHWC, False
    scaled = []
    for index, block in enumerate(vit.blocks):
        for name in ("ls1", "ls2"):
            if isinstance(getattr(block, name), nn.Identity):
                setattr(block, name, LayerScale(vit.embed_dim, init_values=1.0).to(vit.pos_embed))
                scaled.append(f"blocks.{index}.{name}.gamma")
    vit.set_delivery(dense_spec(spec))
    vit.may_be_new, vit.may_be_dropped = frozenset(scaled), _DROPPED
    remarks = []
    if spec.pool != vit.spec.pool or prefix:
        remarks.append("it has no class token and no register, only patches")
    if spec.last_index is not None:
        remarks.append(f"it has no Last LN, so nothing is delivered there and it runs as {describe_spec(vit.spec)}")
    vit.remark = "; ".join(remarks)
    return vit


def _check_trunk(vit: Any) -> None:
    """Refuses a network that cannot stand inside a dense one, with the reason."""
    name = network_name(vit)
    if type(vit) is not DeliveredVisionTransformer:
        raise ValueError(
            f"{name} cannot stand inside a dense network: {type(vit).__name__} has a stem or layers of its own; "
            "allowed: this package's ViT and DeiT, and timm's VisionTransformer with an absolute PE, as timm/<name>"
        )
    patch, depth = tuple(vit.patch_embed.patch_size), len(vit.blocks)
    if patch != (PATCH, PATCH):
        raise ValueError(
            f"{name} cannot stand inside a dense network: its patches are {patch[0]} x {patch[1]} pixels, but the maps "
            f"have strides {', '.join(map(str, STRIDES))}; allowed: a patch size of {PATCH}"
        )
    if depth % STAGES:
        raise ValueError(
            f"{name} cannot stand inside a dense network: its {depth} layers cannot be divided into {STAGES} equal "
            f"stages; allowed: a depth that is divisible by {STAGES}"
        )
    if isinstance(vit.patch_drop, PatchDropout):
        raise ValueError(f"{name} drops patches, but the maps need all of them; leave out patch_drop_rate")


def _check_windows(vit: DeliveredVisionTransformer, windows: Iterable[int]) -> None:
    blocks: Any = vit.blocks
    for layer in windows:
        attention = blocks[layer].attn
        if type(attention) is not Attention or attention.gate is not None:
            raise ValueError(
                f"layer {layer} has an attention of its own ({type(attention).__name__}), which cannot run within "
                "windows; allowed: timm's Attention without a gate, or forward='segmentation', which has no windows"
            )
