"""CeiT (coeusguo/ceit): a ViT with convolutions in the stem and the MLPs, and a read-out over all layers."""

from collections import OrderedDict
from collections.abc import Container
from typing import Any, Literal, get_args

import torch
from timm.layers import LayerNorm, PatchEmbed, get_act_layer, get_norm_layer, to_2tuple
from timm.models import named_apply
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, get_init_weights_vit
from torch import Tensor, nn

from mpvg.delivery import Method, as_spec
from mpvg.models.layouts import Layout
from mpvg.models.registry import register
from mpvg.models.vision_transformer import DeliveredVisionTransformer

ReadFrom = Literal["layers", "tokens"]

_STEM_CHANNELS, _STEM_STRIDE = 64, 4

_REFUSED: dict[str, tuple[Any, str]] = {
    "dynamic_img_size": (False, "LeFF convolves over a grid of fixed size; call set_input_size instead"),
    "dynamic_img_pad": (False, "LeFF convolves over a grid of fixed size; call set_input_size instead"),
    "patch_drop_rate": (0.0, "LeFF convolves over the grid, so no patch may be missing; use drop_path_rate instead"),
    "reg_tokens": (0, "no token but the class token bypasses LeFF; leave it out"),
    "no_embed_class": (False, "the PE of a CeiT has a row for its class token; leave it out"),
    "scale_mlp_norm": (False, "LeFF has BatchNorms of its own; leave it out"),
    "fix_init": (False, "it rescales a layer of the plain MLP that LeFF does not have; leave it out"),
    "embed_layer": (None, "the stem is what makes a CeiT; leave it out"),
    "mlp_layer": (None, "LeFF is what makes a CeiT; leave it out"),
}
"""timm's arguments that cannot work here: the only allowed value, and the reason."""

_LAYER_OPTIONS = ("mlp_ratio", "qk_norm", "scale_attn_norm", "proj_bias", "init_values", "attn_layer")
"""timm's arguments that also apply to the LCA, with the same names and defaults as for the layers."""


class CeiT(DeliveredVisionTransformer):
    """CeiT whose layers and Last LN receive what a method delivers.

    Each layer gives one vector: its class token or, without a class token, the mean over its tokens. The LCA attends
    from the last of these L vectors to all of them, and the Last LN normalizes the result. What the Last LN receives is
    pooled in the same way: its row for the class token, or its mean over tokens.

    With gradient checkpointing a layer runs twice per step, so its BatchNorms count the batch twice in their running
    statistics.

    Args:
        method: a method's name or a DeliverySpec.
        read_from: "layers", as above; or, for methods without a class token, "tokens": the read-out of
            DeliveredVisionTransformer, that is, the Last LN on every token of the last layer and then the mean. The
            LCA still exists, but it is unused and frozen.
        **kwargs: as for DeliveredVisionTransformer; `patch_size` is that of stem and patches together.

    Raises:
        ValueError: the network cannot run the method, or does not support an argument.

    Source:
        Yuan et al., "Incorporating Convolution Designs into Visual Transformers", and coeusguo/ceit. The read-out
        without a class token is ours: docs/decisions/ceit-readout.md.
    """

    family = "CeiT"
    layouts = (
        Layout(
            source="coeusguo/ceit",
            marker=r"^i2t\.",
            names=(
                (r"^i2t\.backbone\.", "patch_embed.proj."),
                (r"^i2t\.proj\.", "patch_embed.proj.patches."),
                (r"^(blocks\.\d+)\.leff\.", r"\1.mlp."),
                (r"^lca\.feedforward\.", "lca.mlp."),
            ),
        ),
    )

    def __init__(self, method: Method = "mpvg", *, read_from: ReadFrom = "layers", **kwargs: Any) -> None:
        _check(method, read_from, kwargs)
        super().__init__(method, **kwargs | {"embed_layer": ImageToTokens, "mlp_layer": LeFF})
        self.read_from = read_from
        first: Any = self.blocks[0]
        self.lca = LayerwiseClassAttention(
            self.embed_dim,
            first.attn.num_heads,
            qkv_bias=first.attn.qkv.bias is not None,
            attn_drop=kwargs.get("attn_drop_rate", 0.0),
            proj_drop=kwargs.get("proj_drop_rate", 0.0),
            norm_layer=get_norm_layer(kwargs.get("norm_layer")) or LayerNorm,
            act_layer=get_act_layer(kwargs.get("act_layer")) or nn.GELU,
            **{name: kwargs[name] for name in _LAYER_OPTIONS if name in kwargs},
        ).to(self.pos_embed)
        named_apply(get_init_weights_vit(self.weight_init_mode, needs_reset=False), self.lca, "lca")
        self.pos_layer_embed = nn.Parameter(self.pos_embed.new_zeros(1, len(self.blocks), self.embed_dim))
        if read_from == "tokens":
            self.lca.requires_grad_(False)
            self.pos_layer_embed.requires_grad_(False)
        self._update_leff_grid()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initializes as CeiT does: as DeiT, with torch's defaults for convolutions and the layer embedding at 0."""
        super().init_weights(mode, needs_reset=needs_reset)
        if hasattr(self, "pos_layer_embed"):  # it does not exist yet when timm's constructor calls this
            nn.init.zeros_(self.pos_layer_embed)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's method, without pooling if the read-out is over layers: `x` is the LCA's output `(B, D)`."""
        if self.read_from == "tokens":
            return super().forward_head(x, pre_logits)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As DeliveredVisionTransformer; the Last LN is not for tokens if the read-out is over layers.

        Raises:
            ValueError: the Last LN is asked for on tokens.
        """
        early = stop_early and feature_take_indices(len(self.blocks), indices)[1] + 1 < len(self.blocks)
        if self.read_from == "layers" and (norm or (early and not intermediates_only)):
            raise ValueError(
                "norm=True, or stop_early=True before the last layer, asks for the Last LN on tokens, but the Last LN "
                "of a CeiT normalizes the output of its LCA, one vector per image; allowed: norm=False, and "
                "stop_early=True together with intermediates_only=True"
            )
        outputs = output_fmt, intermediates_only, output_dict
        return super().forward_intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, *outputs, attn_mask, is_causal
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's method; if a layer or the Last LN is removed, the read-out over layers is removed entirely."""
        take, last_taken = feature_take_indices(len(self.blocks), indices)
        if self.read_from == "layers":
            if last_taken + 1 == len(self.blocks) and not prune_norm:
                if prune_head:
                    self.reset_classifier(0)
                return take
            self.read_from, prune_norm, prune_head = "tokens", True, True
        if hasattr(self, "lca"):
            del self.lca, self.pos_layer_embed
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's method; the LCA supports the method's own read-out only.

        Raises:
            ValueError: another read-out is asked for.
        """
        if self.read_from == "layers" and global_pool not in (None, "", self.spec.pool):
            raise ValueError(
                f"global_pool is {global_pool!r}; allowed: None, {self.spec.pool!r}, as the method says, because "
                "the read-out is over layers; for tokens, use forward_intermediates"
            )
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's method; LeFF is set to the new grid, too."""
        super().set_input_size(img_size, patch_size)
        self._update_leff_grid()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As DeliveredVisionTransformer, with the LCA in the group of the Last LN."""
        groups = super().group_matcher(coarse)
        groups["blocks"].append((r"^lca|^pos_layer_embed", (99999,)))
        return groups

    def _update_leff_grid(self) -> None:
        for block in self.blocks:
            leff: Any = block.mlp
            leff.grid_size = self.patch_embed.grid_size
            leff.num_prefix_tokens = self.num_prefix_tokens

    def _encode(
        self,
        image: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        take: Container[int] = (),
        stop: int | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """As DeliveredVisionTransformer; over all layers, the Last LN's input is the LCA's output `(B, D)`."""
        depth = len(self.blocks)
        if self.read_from == "tokens" or (stop is not None and stop < depth):
            return super()._encode(image, attn_mask, is_causal, take, stop)
        _, last, layers = super()._encode(image, attn_mask, is_causal, range(depth))
        pool = self.spec.pool  # also with global_pool="", which leaves only tokens unpooled
        vectors = torch.stack([self.pool(tokens, pool) for tokens in layers], dim=1)  # (B, L, D)
        # In a folded network the Last LN's beta contains the mean of `last` over the tokens.
        last = None if last is None or self.delivery.last_mean_folded else self.pool(last, pool)
        taken = [tokens for layer, tokens in enumerate(layers) if layer in take]
        return self.lca(vectors + self.pos_layer_embed), last, taken


class ImageToTokens(PatchEmbed):
    """CeiT's stem: 64 channels at a quarter of the image size, then patches.

    Args:
        img_size: side or sides of the image in pixels.
        patch_size: side of a patch in pixels of the image, a multiple of 4.
        in_chans: channels of the image.
        **kwargs: timm's arguments.
    """

    def __init__(self, img_size: Any = 224, patch_size: Any = 16, in_chans: int = 3, **kwargs: Any) -> None:
        kernel: Any = tuple(side // _STEM_STRIDE for side in to_2tuple(patch_size))
        super().__init__(img_size=None, patch_size=kernel, in_chans=_STEM_CHANNELS, **kwargs)
        where: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        stem: Any = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_chans, _STEM_CHANNELS, 7, stride=2, padding=3, bias=False, **where),
                bn=nn.BatchNorm2d(_STEM_CHANNELS, **where),
                pool=nn.MaxPool2d(3, stride=2, padding=1),  # with no ReLU before it, as in the original
                patches=self.proj,
            )
        )
        self.proj = stem
        self.patch_size = to_2tuple(patch_size)
        self.img_size, self.grid_size, self.num_patches = self._init_img_size(img_size)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's method, for the image size only.

        Raises:
            ValueError: another patch size is asked for.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(
                f"patch_size is {patch_size}, but the stem of this network makes patches of {self.patch_size[0]} x "
                f"{self.patch_size[1]} and cannot be resampled; allowed: None; build a new network with this patch_size"
            )
        super().set_input_size(img_size)


class LeFF(nn.Module):
    """CeiT's locally enhanced MLP: 1 x 1, depthwise 3 x 3 and 1 x 1 convolutions over the grid of patches.

    Args:
        in_features: D.
        hidden_features: channels between the 1 x 1 convolutions.
        act_layer: activation after the first and the second BatchNorm.
        bias: whether the convolutions have a bias.
        norm_layer: None.
        drop: ignored; the original has no dropout here.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    grid_size: tuple[int, int]
    """Rows and columns of patches; the network sets it."""
    num_prefix_tokens: int
    """Number of leading tokens that are not patches and stay unchanged; the network sets it."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: None = None,
        bias: bool = True,
        drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_features, hidden_features, 1, bias=bias, **where)
        self.bn1 = nn.BatchNorm2d(hidden_features, **where)
        self.conv2 = nn.Conv2d(
            hidden_features, hidden_features, 3, padding=1, groups=hidden_features, bias=bias, **where
        )
        self.bn2 = nn.BatchNorm2d(hidden_features, **where)
        self.conv3 = nn.Conv2d(hidden_features, in_features, 1, bias=bias, **where)
        self.bn3 = nn.BatchNorm2d(in_features, **where)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, D)` to tokens."""
        count = self.num_prefix_tokens
        maps = x[:, count:].transpose(1, 2).unflatten(2, self.grid_size)  # (B, D, h, w)
        maps = self.act(self.bn1(self.conv1(maps)))
        maps = self.act(self.bn2(self.conv2(maps)))
        maps = self.bn3(self.conv3(maps))
        patches = maps.flatten(2).transpose(1, 2)
        return torch.cat([x[:, :count], patches], dim=1) if count else patches


class LayerwiseClassAttention(Block):
    """CeiT's LCA: a block that computes the last vector only."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """One vector for each layer, `(B, L, D)`, to the last one after attention to all, `(B, D)`."""
        # The other L - 1 queries are computed and not used; that costs less than a second attention module.
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)[:, -1]
        last = x[:, -1] + self.ls1(attended)
        return last + self.ls2(self.mlp(self.norm2(last)))


def _check(method: Method, read_from: str, kwargs: dict[str, Any]) -> None:
    """Refuses arguments that a CeiT does not support."""
    if read_from not in get_args(ReadFrom):
        raise ValueError(f"read_from is {read_from!r}; allowed: {', '.join(map(repr, get_args(ReadFrom)))}")
    if read_from == "tokens" and as_spec(method).pool == "token":
        raise ValueError(
            "read_from is 'tokens', but the method reads out the class token, for which CeiT is published; "
            "allowed: 'layers'; or use a method with pool='avg'"
        )
    for name, (allowed, reason) in _REFUSED.items():
        if kwargs.get(name, allowed) != allowed:
            raise ValueError(f"{name} is {kwargs[name]!r}; allowed: {allowed!r}: {reason}")
    patch_size = kwargs.get("patch_size", 16)
    if any(side < _STEM_STRIDE or side % _STEM_STRIDE for side in to_2tuple(patch_size)):
        raise ValueError(
            f"patch_size is {patch_size}; allowed: multiples of {_STEM_STRIDE}, the stride of the stem; "
            f"use 16, as published, or {_STEM_STRIDE} for small images"
        )


_SIZES: dict[str, dict[str, int]] = {
    "ceit_tiny_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "ceit_small_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "ceit_base_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
}

register(CeiT, _SIZES, first_conv="patch_embed.proj.conv")
