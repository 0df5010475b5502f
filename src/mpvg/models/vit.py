"""ViT and DeiT on timm's VisionTransformer, with a delivered position embedding (PE)."""

from collections.abc import Container
from itertools import islice
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.layers.patch_dropout import PatchDropout, patch_dropout_forward
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mpvg.delivery import Method, NetworkTraits, PositionDelivery, resolve

POS_STD = 0.02
"""Standard deviation at which DeiT's PE and class token start (facebookresearch/deit, timm 0.3.2)."""


class DeliveredBlock(Block):
    """timm's pre-norm block whose attention input may receive a PE."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, pe: Tensor | None = None
    ) -> Tensor:
        """Runs attention and MLP on tokens `(B, N, D)`; `pe`, `(1, N, D)`, reaches the attention input only."""
        attended = self.norm1(x)
        if pe is not None:
            attended = attended + pe  # Eqs. (6), (9): MSA(LN_l(x_l) + LN'_l(pos))
        x = x + self.drop_path1(self.ls1(self.attn(attended, attn_mask=attn_mask, is_causal=is_causal)))  # Eq. (2)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # Eq. (3)


class DeliveredVisionTransformer(VisionTransformer):
    """timm's VisionTransformer whose layers and Last LN receive what a method delivers.

    Args:
        method: a method's name or a DeliverySpec; it also decides the read-out and whether there is a class token.
        pos_std: standard deviation at which the PE starts: the same draw, rescaled; None: 0.02.
        **kwargs: timm's arguments, less `global_pool`, `class_token`, `fc_norm` and `block_fn`.

    Raises:
        ValueError: the method asks for what this network cannot do, or an argument that the method decides is given.

    Source:
        Sizes and initialisation: facebookresearch/deit. The Last LN is on every token and before the mean (Eq. 4),
        unlike timm's own average pooling, which normalises the mean.
    """

    delivery: PositionDelivery
    norm: nn.LayerNorm
    pos_embed: nn.Parameter

    def __init__(self, method: Method = "mpvg", *, pos_std: float | None = None, **kwargs: Any) -> None:
        for name in ("global_pool", "class_token", "fc_norm", "block_fn"):
            if name in kwargs:
                raise ValueError(f"{name}={kwargs[name]!r}: the method decides it; give method=DeliverySpec(pool=...)")
        if kwargs.get("pos_embed", "learn") != "learn":
            raise ValueError(f"pos_embed={kwargs['pos_embed']!r} leaves no position embedding to deliver; use 'learn'")
        if not kwargs.get("final_norm", True):
            raise ValueError("final_norm=False leaves no Last LN, which the read-out needs (Eq. 4); leave it out")
        spec = resolve(method, NetworkTraits(name="ViT", depth=kwargs.get("depth", 12)))
        if not kwargs.get("dynamic_img_pad", False):
            check_divisible(kwargs.get("img_size", 224), kwargs.get("patch_size", 16))
        self.pos_std = pos_std
        token = spec.pool == "token"
        super().__init__(global_pool=spec.pool, class_token=token, fc_norm=False, block_fn=DeliveredBlock, **kwargs)
        bare = self.num_prefix_tokens if self.no_embed_class else 0
        delivery = PositionDelivery(spec, len(self.blocks), self.embed_dim, eps=self.norm.eps, prefix_rows=bare)
        self.delivery = delivery.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialises as DeiT does: timm's scheme, with the class token at std 0.02."""
        super().init_weights(mode, needs_reset=needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=POS_STD)
        if self.pos_std is not None:
            with torch.no_grad():
                self.pos_embed.mul_(self.pos_std / POS_STD)

    def position(self, grid: tuple[int, int] | None = None) -> Tensor:
        """The raw PE, `(1, rows, D)`, resampled to a grid of patches if one is given."""
        if grid is None:
            return self.pos_embed
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return resample_abs_pos_embed(self.pos_embed, grid, self.patch_embed.grid_size, num_prefix_tokens=prefix)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images `(B, C, H, W)` to logits `(B, classes)`."""
        x, last, _ = self._encode(x, attn_mask, is_causal)
        if self.delivery.averages_to_zero and self.global_pool == "avg":
            last = None
        return self.forward_head(self._last_norm(x, last))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images `(B, C, H, W)` to the tokens behind the Last LN, `(B, N, D)`."""
        x, last, _ = self._encode(x, attn_mask, is_causal)
        return self._last_norm(x, last)

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
        """timm's method of this name, arguments and results included; `norm` applies what the Last LN receives, too."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed: 'NCHW', 'NLC'")
        take, last_taken = feature_take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        stop = last_taken + 1 if stop_early else None
        x, last, taken = self._encode(x, attn_mask, is_causal, take, stop)
        if norm:
            taken = [self._last_norm(tokens, last) for tokens in taken]
        count = self.num_prefix_tokens
        prefix = [tokens[:, :count] for tokens in taken]
        maps = [tokens[:, count:] for tokens in taken]
        if output_fmt == "NCHW":
            maps = [t.reshape(t.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous() for t in maps]
        with_prefix = return_prefix_tokens and count > 0
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                named["image_intermediates_prefix"] = prefix
            return named if intermediates_only else named | {"image_features": self._last_norm(x, last)}
        out = list(zip(maps, prefix, strict=True)) if with_prefix else maps
        return out if intermediates_only else (self._last_norm(x, last), out)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's method of this name; what the removed layers and Last LN would have received goes with them."""
        take: list[int] = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.delivery.prune(len(self.blocks), keep_last=not prune_norm)
        return take

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """timm's method of this name: the raw PE is resampled, and delivered from then on."""
        check_divisible(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(img_size, patch_size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer decay, with each LN' beside the LN it is paired with."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [
                (r"^(?:blocks|delivery\.layer_norms)\.(\d+)", None),
                (r"^norm|^delivery\.last_norm", (99999,)),
            ],
        }

    def _embed(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images to the tokens that enter layer 0, `(B, N, D)`, and the raw PE, `(1, rows, D)`."""
        x = self.patch_embed(image)
        pos = self.position((x.shape[1], x.shape[2]) if self.dynamic_img_size else None)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        # The patches come transposed out of the convolution, and a sum takes its order in memory from its first
        # operand: with the PE first the residual stream is contiguous, otherwise every LayerNorm would make a copy.
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        input_pe = self.delivery.spec.input_pe
        if self.no_embed_class and input_pe:
            x = pos + x
        if prefix:
            x = torch.cat([*prefix, x], dim=1)
        if not self.no_embed_class and input_pe:
            x = pos + x  # Eqs. (1), (8); LaPE leaves it out, Eq. (5)
        return self.pos_drop(x.contiguous()), pos

    def _encode(
        self,
        image: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        take: Container[int] = (),
        stop: int | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Runs the layers: the one loop behind every kind of forward pass.

        Returns:
            The tokens before the Last LN, `(B, N, D)`; what the Last LN receives; the tokens after the layers `take`.
        """
        x, pos = self._embed(image)
        delivered = self.delivery(pos)
        kept = None
        if isinstance(self.patch_drop, PatchDropout):
            drop = self.patch_drop
            x, kept = patch_dropout_forward(x, drop.prob, drop.num_prefix_tokens, drop.ordered, self.training)
        x = self.norm_pre(x)
        taken = []
        for layer, (block, pe) in enumerate(islice(zip(self.blocks, delivered.per_layer, strict=True), stop)):
            pe = self._rows_kept(pe, kept)
            if self.grad_checkpointing:
                x = checkpoint(block, x, attn_mask, is_causal, pe)
            else:
                x = block(x, attn_mask, is_causal, pe)
            if layer in take:
                taken.append(x)
        return x, self._rows_kept(delivered.last, kept), taken

    def _last_norm(self, x: Tensor, last: Tensor | None) -> Tensor:
        x = self.norm(x)
        return x if last is None else x + last  # Eq. (11); without `last`, Eq. (4)

    def _rows_kept(self, pe: Tensor | None, kept: Tensor | None) -> Tensor | None:
        """The rows of a PE that belong to the tokens which patch dropout kept, `(B, kept, D)`."""
        if pe is None or kept is None:
            return pe
        prefix, patches = pe[:, : self.num_prefix_tokens], pe[:, self.num_prefix_tokens :]
        rows = patches.expand(len(kept), -1, -1).gather(1, kept.unsqueeze(-1).expand(-1, -1, pe.shape[-1]))
        return torch.cat([prefix.expand(len(kept), -1, -1), rows], dim=1)


def check_divisible(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Refuses an image size that is no multiple of the patch size.

    Raises:
        ValueError: naming both, and the nearest sizes that are.
    """
    for side, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True):
        if side < patch or side % patch:
            below = max(side // patch, 1) * patch
            raise ValueError(
                f"image size {side} is not divisible by the patch size {patch}; "
                f"the nearest sizes that are: {below}, {below + patch}"
            )


_SIZES: dict[str, dict[str, int]] = {
    "deit_tiny_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "deit_small_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "deit_base_patch16_224": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    # Members of our own for small images; the narrow one has the 12 layers that Table 5's k ask for.
    "vit_mini_patch2_8": {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4},
    "vit_mini_patch7_28": {"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 4},
    "vit_mini_patch4_28": {"img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 4},
    "vit_mini_patch4_32": {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "vit_narrow_patch4_28": {"img_size": 28, "patch_size": 4, "embed_dim": 48, "depth": 12, "num_heads": 3},
}


def _default_cfg(img_size: int) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({f"mpvg_{name}": _default_cfg(size["img_size"]) for name, size in _SIZES.items()})


def _register(name: str, sizes: dict[str, int]) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"mpvg_{name} has no pretrained weights to fetch; give checkpoint_path=FILE")
        out_indices = kwargs.pop("out_indices", 3)
        # The getter runs the network's own loop; timm's other feature wrappers call the blocks without their PE.
        features = {"out_indices": out_indices, "feature_cls": "getter"}
        return build_model_with_cfg(
            DeliveredVisionTransformer, f"mpvg_{name}", False, feature_cfg=features, **(sizes | kwargs)
        )

    build.__name__ = f"mpvg_{name}"
    build.__doc__ = f"{name} with a delivered position embedding; `method` as in `mpvg.create_model`."
    register_model(build)


for _name, _sizes in _SIZES.items():
    _register(_name, _sizes)
