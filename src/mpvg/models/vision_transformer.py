"""timm's VisionTransformer with a delivered position embedding (PE); the base of ViT, CeiT, T2T-ViT and ViT-Lite."""

import warnings
from collections.abc import Callable, Container
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.layers.patch_dropout import PatchDropout, patch_dropout_forward
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer, global_pool_nlc
from torch import Tensor, nn

from mpvg.delivery import DeliveredPE, DeliverySpec, Method, NetworkTraits, PositionDelivery, resolve
from mpvg.models.adapting import LoadReport
from mpvg.models.layouts import Layout
from mpvg.models.network import POS_STD, TimmSizes
from mpvg.models.probing import Probe
from mpvg.models.registry import check_divisible

AttentionLike = Callable[..., Tensor]
"""What a layer may run in place of its attention, with the same arguments."""


class DeliveredBlock(Block):
    """timm's pre-norm block with an optional PE added to the attention input."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        pe: Tensor | None = None,
        attention: AttentionLike | None = None,
    ) -> Tensor:
        """Runs attention and MLP on tokens `(B, N, D)`; `pe`, `(1, N, D)`, is added to the attention input only."""
        x = self.attend(x, attn_mask, is_causal, pe, attention)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # Eq. (3)

    def attend(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        pe: Tensor | None,
        attention: AttentionLike | None = None,
    ) -> Tensor:
        """The attention half of the block, including the residual; `attention` runs in place of the block's own."""
        attended = self.norm1(x)
        if pe is not None:
            attended = attended + pe  # Eqs. (6), (9): MSA(LN_l(x_l) + LN'_l(pos))
        attention = attention or self.attn
        return x + self.drop_path1(self.ls1(attention(attended, attn_mask=attn_mask, is_causal=is_causal)))  # Eq. (2)


class DeliveredVisionTransformer(TimmSizes, VisionTransformer):
    """timm's VisionTransformer whose layers and Last LN receive what a method delivers.

    Args:
        method: a method's name or a DeliverySpec; it also decides the read-out and whether there is a class token.
        pos_std: initial standard deviation of the PE, by rescaling the same draw; None: `default_pos_std`.
        **kwargs: timm's arguments; the method decides `class_token`, `fc_norm`, `block_fn` and `global_pool`, which may
            be "" for tokens that are not pooled.

    Raises:
        ValueError: the network cannot run the method, or an argument is given that the method decides.

    Source:
        Sizes and initialization: facebookresearch/deit. The Last LN is applied to every token, before the mean
        (Eq. 4); timm's average pooling normalizes the mean instead.
    """

    family = "ViT"
    """The family's name, for error messages."""
    block: type[Block] = DeliveredBlock
    """The class of the layers."""
    default_pos_std = POS_STD
    """Initial standard deviation of the PE if `pos_std` is None."""
    layouts: tuple[Layout, ...] = (
        Layout(
            source="Ingrid725/LaPE",
            marker=r"blocks\.\d+\.pe_norm\.weight",
            names=((r"^blocks\.(\d+)\.pe_norm\.", r"delivery.layer_norms.\1."),),
        ),
    )
    """How checkpoints of the original repositories name their tensors, if not as here."""

    pos_antialias = True
    """Whether a PE is smoothed before it is resampled to a coarser grid, as timm does."""
    remark = ""
    """How the network differs from what the method's name promises; empty if it does not."""
    load_report: LoadReport | None = None
    """What was loaded from a checkpoint; None: nothing was."""
    probe: Probe | None = None
    """Called with the tokens and the delivered PE of each layer and of the Last LN."""
    spec: DeliverySpec
    """The method as this network runs it."""
    delivery: PositionDelivery
    norm: nn.LayerNorm
    pos_embed: nn.Parameter

    def __init__(self, method: Method = "mpvg", *, pos_std: float | None = None, **kwargs: Any) -> None:
        if kwargs.get("pos_embed", "learn") != "learn":
            raise ValueError(f"pos_embed={kwargs['pos_embed']!r} leaves no position embedding to deliver; use 'learn'")
        if not kwargs.get("final_norm", True):
            raise ValueError("final_norm=False leaves no Last LN, which the read-out needs (Eq. 4); leave it out")
        spec = resolve(method, NetworkTraits(name=self.family, depth=kwargs.get("depth", 12)))
        token = spec.pool == "token"
        # timm gives these when it builds a network again, and global_pool="" for tokens that are not pooled.
        decided: dict[str, tuple[Any, ...]] = {
            "global_pool": (spec.pool, ""),
            "class_token": (token,),
            "fc_norm": (False,),
            "block_fn": (self.block,),
        }
        for name, allowed in decided.items():
            if kwargs.setdefault(name, allowed[0]) not in allowed:
                raise ValueError(f"{name}={kwargs[name]!r}: the method decides it; give method=DeliverySpec(pool=...)")
        if not kwargs.get("dynamic_img_pad", False):
            check_divisible(kwargs.get("img_size", 224), kwargs.get("patch_size", 16))
        self.pos_std = pos_std
        super().__init__(**kwargs)
        self.set_delivery(spec)

    def set_delivery(self, spec: DeliverySpec) -> None:
        """Creates the PositionDelivery of a resolved method, with every LN' as the method starts it.

        Raises:
            ValueError: the method starts the Last LN's bias, and nothing can be delivered to what is read out.
        """
        first: Any = self.blocks[0]
        delivery = PositionDelivery(
            spec,
            len(self.blocks),
            self.embed_dim,
            eps=first.norm1.eps,
            prefix_rows=self.num_prefix_tokens if self.no_embed_class else 0,
            class_rows=0 if self.no_embed_class else self.num_prefix_tokens,
            rows=self.pos_embed.shape[1],
        )
        self.spec = spec
        self.delivery = delivery.to(device=self.pos_embed.device, dtype=self.pos_embed.dtype)
        self._start_beta()

    @torch.no_grad()
    def _start_beta(self) -> None:
        """Adds to the Last LN's bias what LN'_last(pos_0) adds to the read-out, if the method starts it there."""
        if not self.spec.start_beta:
            return
        if getattr(self.norm, "bias", None) is None:
            raise ValueError("start_beta is True, but no LN with a bias comes before the pooling; leave it out")
        if self.spec.pool == "token" and self.no_embed_class:
            raise ValueError("start_beta is True, but the class token has no row in the PE; leave it out")
        # Not self.pool: it may be attention, whose result for a PE alone would not be what the PE adds.
        start, prefix = self.delivery.start(self.pos_embed), self.num_prefix_tokens
        self.norm.bias.add_(global_pool_nlc(start, self.spec.pool, prefix, self.pool_include_prefix)[0])

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initializes as DeiT does: timm's scheme, with the class token at std 0.02."""
        super().init_weights(mode, needs_reset=needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=POS_STD)
        self._start_pos_embed()
        if hasattr(self, "delivery") and self.spec.start_beta:  # timm's constructor calls this before there is one
            nn.init.zeros_(self.norm.bias)
            self._start_beta()

    @torch.no_grad()
    def _start_pos_embed(self) -> None:
        """Rescales the PE that timm's scheme drew."""
        std = self.default_pos_std if self.pos_std is None else self.pos_std
        if std != POS_STD:
            self.pos_embed.mul_(std / POS_STD)

    def raw_pos_embed(self, grid: tuple[int, int] | None = None) -> Tensor:
        """The raw PE, `(1, rows, D)`, resampled to a grid of patches if one is given."""
        return self.pos_embed if grid is None else self._resample(self.pos_embed, grid)

    def deliver(self, pos: Tensor, grid: tuple[int, int] | None = None) -> DeliveredPE:
        """Computes what every layer and the Last LN receive; `pos` is `raw_pos_embed(grid)`."""
        tables = {"reference_pos": self.delivery.reference_pos, "table": self.delivery.table}
        if grid is not None:
            tables = {name: None if t is None else self._resample(t, grid) for name, t in tables.items()}
        return self.delivery(pos, **tables)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images `(B, C, H, W)` to logits `(B, classes)`."""
        x, last, _ = self._encode(x, attn_mask, is_causal)
        if self.delivery.last_mean_folded and self.global_pool == "avg":
            last = None
        return self.forward_head(self._last_norm(x, last))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images `(B, C, H, W)` to the tokens after the Last LN, `(B, N, D)`."""
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
        """As timm's method; with `norm`, the intermediates also get what the Last LN receives."""
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
        """As timm's method; what the removed layers and the removed Last LN received is removed, too."""
        take: list[int] = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.delivery.prune(len(self.blocks), keep_last=not prune_norm)
        return take

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's method: the raw PE is resampled, and delivered after that."""
        check_divisible(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        grid = self.patch_embed.grid_size
        super().set_input_size(img_size, patch_size)
        for name in ("reference_pos", "table"):
            if (table := getattr(self.delivery, name)) is not None:
                setattr(self.delivery, name, self._resample(table, self.patch_embed.grid_size, grid))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer decay, with each LN' in the group of its layer's LN or of the Last LN."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [
                (r"^(?:blocks|delivery\.layer_norms)\.(\d+)", None),
                (r"^norm|^delivery\.last_norm", (99999,)),
            ],
        }

    def embed(self, image: Tensor) -> tuple[Tensor, DeliveredPE]:
        """Images to the tokens that enter layer 0, `(B, N, D)`, and what the layers receive."""
        x = self.patch_embed(image)
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else None
        pos = self.raw_pos_embed(grid)
        x = x.flatten(1, -2)
        # The convolution returns the patches transposed, and a sum has the memory order of its first operand. With the
        # PE first, the residual stream is contiguous; otherwise every LayerNorm would make a copy.
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        input_pe = self.spec.input_pe
        if self.no_embed_class and input_pe:
            x = pos + x
        if prefix:
            x = torch.cat([*prefix, x], dim=1)
        if not self.no_embed_class and input_pe:
            x = pos + x  # Eqs. (1), (8); LaPE omits it, Eq. (5)
        return self.pos_drop(x.contiguous()), self.deliver(pos, grid)

    def _encode(
        self,
        image: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        take: Container[int] = (),
        stop: int | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Runs the layers: the one loop that every kind of forward pass uses.

        Returns:
            The tokens before the Last LN, `(B, N, D)`; what the Last LN receives; the tokens after the layers `take`.
        """
        is_causal = _as_bool(is_causal)
        x, delivered = self.embed(image)
        kept = None
        if isinstance(self.patch_drop, PatchDropout):
            drop = self.patch_drop
            x, kept = patch_dropout_forward(x, drop.prob, drop.num_prefix_tokens, drop.ordered, self.training)
        x = self.norm_pre(x)
        per_layer = [self._keep_rows(pe, kept) for pe in delivered.per_layer]
        taken = []
        for layer in range(len(self.blocks))[:stop]:
            x = self.run_layer(layer, x, per_layer[layer], attn_mask, is_causal)
            if layer in take:
                taken.append(x)
        return x, self._keep_rows(delivered.last, kept), taken

    def run_layer(
        self,
        layer: int,
        x: Tensor,
        pe: Tensor | None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        attention: AttentionLike | None = None,
    ) -> Tensor:
        """Runs one layer on tokens `(B, N, D)` and what is delivered to it; `attention` replaces the layer's own."""
        block: Any = self.blocks[layer]
        if self.probe is not None:
            self.probe.layer(layer, x, block.norm1(x), pe)
        arguments = (x, attn_mask, is_causal, pe) + (() if attention is None else (attention,))
        return checkpoint(block, *arguments) if self.grad_checkpointing else block(*arguments)

    def _last_norm(self, x: Tensor, last: Tensor | None) -> Tensor:
        normed = self.norm(x)
        if self.probe is not None:
            self.probe.last(x, normed, last)
        return normed if last is None else normed + last  # Eq. (11); without `last`, Eq. (4)

    def _resample(self, pos: Tensor, grid: tuple[int, int], old: tuple[int, int] | None = None) -> Tensor:
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        old = old or self.patch_embed.grid_size
        return resample_abs_pos_embed(pos, grid, old, num_prefix_tokens=prefix, antialias=self.pos_antialias)

    def _keep_rows(self, pe: Tensor | None, kept: Tensor | None) -> Tensor | None:
        """Selects the rows of a PE whose tokens patch dropout kept, `(B, kept, D)`."""
        if pe is None or kept is None:
            return pe
        prefix, patches = pe[:, : self.num_prefix_tokens], pe[:, self.num_prefix_tokens :]
        rows = patches.expand(len(kept), -1, -1).gather(1, kept.unsqueeze(-1).expand(-1, -1, pe.shape[-1]))
        return torch.cat([prefix.expand(len(kept), -1, -1), rows], dim=1)


def _as_bool(flag: bool | Tensor) -> bool:
    """A flag as attention takes it: torch.onnx.export(dynamo=False) makes a tensor of every argument's default."""
    if not isinstance(flag, Tensor):
        return flag
    with warnings.catch_warnings():  # that the graph holds its value is intended
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return bool(flag)
