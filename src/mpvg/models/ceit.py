"""CeiT (coeusguo/ceit): a plain transformer with convolutions in its stem and MLPs, read out over all of its layers."""

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
from mpvg.models.checkpoints import Layout
from mpvg.models.plain import DeliveredVisionTransformer
from mpvg.models.registry import register

ReadFrom = Literal["layers", "tokens"]

_STEM_CHANNELS, _STEM_STRIDE = 64, 4

_REFUSED: dict[str, tuple[Any, str]] = {
    "dynamic_img_size": (False, "LeFF convolves over a grid that is known beforehand; call set_input_size instead"),
    "dynamic_img_pad": (False, "LeFF convolves over a grid that is known beforehand; call set_input_size instead"),
    "patch_drop_rate": (0.0, "LeFF convolves over the grid, so no patch may be missing; use drop_path_rate instead"),
    "reg_tokens": (0, "no token but the class token passes LeFF by; leave it out"),
    "no_embed_class": (False, "the PE of a CeiT has a row for its class token; leave it out"),
    "scale_mlp_norm": (False, "LeFF has BatchNorms of its own; leave it out"),
    "fix_init": (False, "it rescales a layer of the plain MLP that LeFF does not have; leave it out"),
    "embed_layer": (None, "the stem is what makes a CeiT; leave it out"),
    "mlp_layer": (None, "LeFF is what makes a CeiT; leave it out"),
}
"""Arguments of timm's that cannot work here: the value that is allowed, and the reason."""

_OF_A_LAYER = ("mlp_ratio", "qk_norm", "scale_attn_norm", "proj_bias", "init_values", "attn_layer")
"""Arguments of timm's that the LCA takes as the layers do, under the same name and with the same default."""


class CeiT(DeliveredVisionTransformer):
    """CeiT whose layers and Last LN receive what a method delivers.

    After every layer the class token, or the mean over tokens where there is none, gives one vector. The LCA attends
    from the last of these L vectors to all of them; the Last LN normalises its result, and what the Last LN receives
    is read out in the same way: its row of the class token, or its mean over tokens.

    Under gradient checkpointing a layer runs twice in a step, and so its BatchNorms count the same batch twice in their
    running statistics.

    Args:
        method: a method's name or a DeliverySpec.
        read_from: "layers", as above; or, for methods without class token, "tokens": as the plain transformer does,
            the Last LN on every token of the last layer and the mean, while the LCA is there, idle and frozen.
        **kwargs: as DeliveredVisionTransformer; `patch_size` is that of stem and patches together.

    Raises:
        ValueError: the method or an argument asks for what this network cannot do.

    Source:
        Yuan et al., "Incorporating Convolution Designs into Visual Transformers", and coeusguo/ceit. The read-out
        without class token is ours: docs/decisions/ceit-readout.md.
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
            **{name: kwargs[name] for name in _OF_A_LAYER if name in kwargs},
        ).to(self.pos_embed)
        named_apply(get_init_weights_vit(self.weight_init_mode, needs_reset=False), self.lca, "lca")
        self.pos_layer_embed = nn.Parameter(self.pos_embed.new_zeros(1, len(self.blocks), self.embed_dim))
        if read_from == "tokens":
            self.lca.requires_grad_(False)
            self.pos_layer_embed.requires_grad_(False)
        self._tell_grid()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialises as CeiT does: as DeiT, with convolutions as in torch and the layers' embedding at 0."""
        super().init_weights(mode, needs_reset=needs_reset)
        if hasattr(self, "pos_layer_embed"):  # not yet where timm's constructor calls this
            nn.init.zeros_(self.pos_layer_embed)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """timm's method of this name; `(B, D)`, which the LCA has made of all layers, stays as it is."""
        return x if x.ndim == 2 else super().pool(x, pool_type)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's method of this name; a read-out over layers that loses one, or its Last LN, goes as a whole."""
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
        """timm's method of this name; the LCA reads out as the method says, and in no other way.

        Raises:
            ValueError: another read-out is asked for.
        """
        if self.read_from == "layers" and global_pool not in (None, self.global_pool):
            raise ValueError(
                f"global_pool is {global_pool!r}; allowed: None, {self.global_pool!r}, as the method says, because it "
                "is the layers that are pooled; for tokens, take forward_intermediates"
            )
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """timm's method of this name, for another image size."""
        super().set_input_size(img_size, patch_size)
        self._tell_grid()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As the plain transformer's, with the LCA beside the Last LN."""
        groups = super().group_matcher(coarse)
        groups["blocks"].append((r"^lca|^pos_layer_embed", (99999,)))
        return groups

    def _tell_grid(self) -> None:
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
        """As the plain transformer's; over all layers, the LCA's `(B, D)` is what goes on to the Last LN."""
        depth = len(self.blocks)
        if self.read_from == "tokens" or (stop is not None and stop < depth):
            return super()._encode(image, attn_mask, is_causal, take, stop)
        _, last, layers = super()._encode(image, attn_mask, is_causal, range(depth))
        vectors = torch.stack([self.pool(tokens) for tokens in layers], dim=1)  # (B, L, D)
        # Folded, the mean of `last` over the tokens is in the Last LN's beta.
        last = None if last is None or self.delivery.averages_to_zero else self.pool(last)
        taken = [tokens for layer, tokens in enumerate(layers) if layer in take]
        return self.lca(vectors + self.pos_layer_embed), last, taken

    def _last_norm(self, x: Tensor, last: Tensor | None) -> Tensor:
        if self.read_from == "layers" and x.ndim == 3:
            raise ValueError(
                "norm=True, or stop_early=True before the last layer, asks for the Last LN on tokens, but that of a "
                "CeiT normalises the one vector which its LCA makes of all layers; allowed: norm=False, and "
                "stop_early=True together with intermediates_only=True"
            )
        return super()._last_norm(x, last)


class ImageToTokens(PatchEmbed):
    """CeiT's stem: a quarter of the image size in 64 channels, and from there to patches.

    Args:
        img_size: side or sides of the image.
        patch_size: pixels of the image in a side of a patch, a multiple of 4.
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
        """timm's method of this name, for another image size.

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
        bias: whether the convolutions have one.
        norm_layer: None.
        drop: ignored; the original has no dropout here.
        device: of the parameters.
        dtype: of the parameters.
    """

    grid_size: tuple[int, int]
    """Rows and columns of patches; the network sets it."""
    num_prefix_tokens: int
    """Leading tokens that are no patches and pass by unchanged; the network sets it."""

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
    """CeiT's LCA: a block of which only the last vector comes out."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """One vector for each layer, `(B, L, D)`, to the last one after attention to all, `(B, D)`."""
        # The other L - 1 queries are made in vain: that costs less than an attention of our own would.
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)[:, -1]
        last = x[:, -1] + self.ls1(attended)
        return last + self.ls2(self.mlp(self.norm2(last)))


def _check(method: Method, read_from: str, kwargs: dict[str, Any]) -> None:
    """Refuses what a CeiT cannot be built with."""
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
            f"patch_size is {patch_size}; allowed: multiples of {_STEM_STRIDE}, by which the stem reduces the image; "
            f"use 16, as published, or {_STEM_STRIDE} for small images"
        )


_SIZES: dict[str, dict[str, int]] = {
    "ceit_tiny_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "ceit_small_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "ceit_base_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
}

register(CeiT, _SIZES, first_conv="patch_embed.proj.conv")
