"""Swin: stages with smaller grids and larger widths, with a delivered position embedding (PE)."""

from collections.abc import Container
from itertools import islice
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from mpvg.delivery import DeliveredPE, DeliverySpec, Method, NetworkTraits, resolve
from mpvg.models.adapting import LoadReport
from mpvg.models.layouts import Layout
from mpvg.models.network import POS_STD, TimmSizes
from mpvg.models.probing import Probe
from mpvg.models.registry import check_divisible, register
from mpvg.models.staged import StagedDelivery, merged_grid


class DeliveredSwinBlock(SwinTransformerBlock):
    """timm's block with (shifted) windows, with an optional PE added to the attention input."""

    pe_is_map = False
    """Whether the PE comes in the shape of the tokens, as a folded network keeps it."""

    def forward(self, x: Tensor, pe: Tensor | None = None) -> Tensor:
        """Runs attention and MLP on tokens `(B, H, W, D)`; `pe` goes to the attention input only.

        `pe` is `(1, H * W, D)`, or `(1, H, W, D)` where `pe_is_map`.
        """
        attended = self.norm1(x)
        if pe is not None:
            # Before the cyclic shift and the windows, so that each token gets the PE of its own position.
            pe = pe if self.pe_is_map else pe.unflatten(1, x.shape[1:3])
            attended = attended + pe  # Eqs. (6), (9): MSA(LN_l(x_l) + LN'_l(pos))
        # timm's attention cannot reshape no windows; a size that is not an int is traced, and not known to be 0.
        if not isinstance(x.shape[0], int) or x.shape[0] > 0:
            x = x + self.drop_path1(self._attn(attended))  # type: ignore[no-untyped-call]  # Eq. (2)
        return x + self.drop_path2(self.mlp(self.norm2(x)))  # Eq. (3)


class DeliveredSwinTransformer(TimmSizes, SwinTransformer):
    """timm's SwinTransformer with an absolute PE, whose layers and Last LN receive what a method delivers.

    The PE has the size of the first stage's tokens. Between stages it goes through the patch merging of the tokens:
    see docs/decisions/staged-networks.md. Each window's relative position bias is unchanged.

    Args:
        method: a method's name or a DeliverySpec.
        pos_std: initial standard deviation of the PE, by rescaling the same draw; None: 0.02.
        drop_path_rate: rate of stochastic depth at the last layer; it increases linearly from 0.
        **kwargs: timm's arguments; `global_pool` is "avg", or "" for tokens that are not pooled.

    Raises:
        ValueError: the network cannot run the method, or an argument is given that the method decides.

    Source:
        microsoft/Swin-Transformer, `models/swin_transformer.py` (`ape=True`).
    """

    layouts: tuple[Layout, ...] = (
        Layout(
            source="microsoft/Swin-Transformer",
            # There the merging belongs to the stage before it, in timm to the stage after it.
            marker=r"^layers\.0\.downsample\.",
            names=(
                (r"^absolute_pos_embed$", "pos_embed"),
                (r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample."),
                (r"^head\.(weight|bias)$", r"head.fc.\1"),
            ),
            computed=r"relative_position_index|attn_mask",
        ),
    )
    """How checkpoints of the original repository name their tensors."""
    may_be_new = ("pos_embed",)
    """Tensors that may be missing from a checkpoint: the released networks have no absolute PE."""

    num_prefix_tokens = 0
    """Swin has no class token and no registers."""
    remark = ""
    """How the network differs from what the method's name promises; empty if it does not."""
    load_report: LoadReport | None = None
    """What was loaded from a checkpoint; None: nothing was."""
    probe: Probe | None = None
    """Called with the tokens and the delivered PE of each layer and of the Last LN."""
    spec: DeliverySpec
    """The method as this network runs it."""
    delivery: StagedDelivery
    patch_embed: Any
    layers: Any
    norm: nn.LayerNorm
    pos_embed: nn.Parameter

    def __init__(
        self, method: Method = "mpvg", *, pos_std: float | None = None, drop_path_rate: float = 0.0, **kwargs: Any
    ) -> None:
        if kwargs.setdefault("global_pool", "avg") not in ("avg", ""):
            raise ValueError(
                f"global_pool={kwargs['global_pool']!r}: the method decides it, and Swin has 'avg' only; leave it out"
            )
        depth = sum(kwargs.get("depths", (2, 2, 6, 2)))
        traits = NetworkTraits(name="Swin", depth=depth, readouts=("avg",), first_layer=0, uniform_width=False)
        spec = resolve(method, traits)
        check_divisible(kwargs.get("img_size", 224), kwargs.get("patch_size", 4))
        super().__init__(drop_path_rate=drop_path_rate, **kwargs)
        for block in self.blocks:
            # timm's SwinTransformerStage has no argument for the class of its blocks. The class swap keeps timm's
            # constructor, its weights and its random draws; the subclass changes forward() only.
            block.__class__ = DeliveredSwinBlock
        self.spec = spec
        self.pos_std = pos_std
        depths = [len(stage.blocks) for stage in self.layers]
        dims = [info["num_chs"] for info in self.feature_info]
        weight = self.norm.weight
        rows = self.patch_embed.num_patches
        delivery = StagedDelivery(spec, depths, dims, eps=self.norm.eps, rows=rows)
        self.delivery = delivery.to(device=weight.device, dtype=weight.dtype)
        # Drawn last, so that every other parameter is what timm draws from the same seed.
        self.pos_embed = nn.Parameter(weight.new_empty(1, rows, dims[0]))
        self._init_pos_embed()

    @property
    def blocks(self) -> list[DeliveredSwinBlock]:
        """The layers of all stages, in the order in which they run."""
        return [block for stage in self.layers for block in stage.blocks]

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As timm's method; the PE is drawn again, too."""
        super().init_weights(mode, needs_reset=needs_reset)
        if hasattr(self, "pos_embed"):  # it does not exist yet when timm's constructor calls this
            self._init_pos_embed()

    def raw_pos_embed(self, grid: tuple[int, int] | None = None) -> Tensor:
        """The raw PE, `(1, rows, D)` for the first stage, resampled to a grid of patches if one is given."""
        return self.pos_embed if grid is None else _resample(self.pos_embed, grid, self.patch_embed.grid_size)

    def deliver(self, pos: Tensor, grid: tuple[int, int] | None = None) -> DeliveredPE:
        """Computes what every layer of every stage and the Last LN receive; `pos` is `raw_pos_embed(grid)`."""
        table = self.delivery.table
        if table is not None and grid is not None:
            table = _resample(table, grid, self.patch_embed.grid_size)
        mergings = [stage.downsample for stage in self.layers]
        return self.delivery(pos, grid or self.patch_embed.grid_size, mergings, table)

    def keep_maps(self, delivered: DeliveredPE) -> DeliveredPE:
        """What the layers of a folded network receive, in the shape in which they add it, `(1, H, W, D)`.

        A constant that is reshaped in the forward pass would be an operation more for each layer.
        """
        sides = self.patch_embed.grid_size
        per_layer, kept = iter(delivered.per_layer), []
        for index, stage in enumerate(self.layers):
            sides = merged_grid(sides) if index > 0 else sides
            for block in stage.blocks:
                pe = next(per_layer)
                kept.append(None if pe is None else pe.unflatten(1, sides))
                block.pe_is_map = True
        return delivered._replace(per_layer=tuple(kept))

    def pool(self, tokens: Tensor) -> Tensor:
        """The head's mean over tokens, `(B, N, D)` to `(B, D)`."""
        return tokens.mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to logits `(B, classes)`."""
        x, last, _ = self._encode(x)
        if self.delivery.last_mean_folded and self.global_pool == "avg":
            last = None
        return self.forward_head(self._last_norm(x, last))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to the last stage's tokens after the Last LN, `(B, H, W, D)`."""
        x, last, _ = self._encode(x)
        return self._last_norm(x, last)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's method; with `norm`, the map of the last stage also gets what the Last LN receives."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed: 'NCHW'")
        count = len(self.layers)
        take, last_taken = feature_take_indices(count, indices)
        stop = last_taken + 1 if stop_early else count
        x, last, taken = self._encode(x, take, stop)
        if norm and count - 1 in take:
            taken[-1] = self._last_norm(taken[-1], last)
        maps = [tokens.permute(0, 3, 1, 2).contiguous() for tokens in taken]
        if intermediates_only:
            return maps
        return (self._last_norm(x, last) if stop == count else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's method; what the removed stages and the removed Last LN received is removed, too."""
        take: list[int] = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.delivery.prune(len(self.blocks), keep_last=not isinstance(self.norm, nn.Identity))
        return take

    def set_input_size(
        self,
        img_size: Any = None,
        patch_size: Any = None,
        window_size: Any = None,
        window_ratio: Any = None,
        always_partition: bool | None = None,
    ) -> None:
        """As timm's method: the raw PE is resampled, and delivered after that."""
        check_divisible(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        before = self.patch_embed.grid_size
        super().set_input_size(img_size, patch_size, window_size, window_ratio, always_partition)
        if self.patch_embed.grid_size != before:
            grid = self.patch_embed.grid_size
            pos = _resample(self.pos_embed, grid, before).detach()
            self.pos_embed = nn.Parameter(pos, requires_grad=self.pos_embed.requires_grad)
            if self.delivery.table is not None:
                self.delivery.table = _resample(self.delivery.table, grid, before)

    def no_weight_decay(self) -> set[str]:
        """timm's names, and the absolute PE."""
        names: set[str] = super().no_weight_decay()
        return names | {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer decay, with each LN' in the group of its layer's LN or of the Last LN."""
        stem = r"^patch_embed|^pos_embed"
        if coarse:
            return {"stem": stem, "blocks": r"^(?:layers|delivery)\.(\d+)\.(?!last_norm)"}
        return {
            "stem": stem,
            "blocks": [
                (r"^layers\.(\d+)\.downsample", (0,)),
                (r"^(?:layers|delivery)\.(\d+)\.\w+\.(\d+)", None),
                (r"^norm|^delivery\.\d+\.last_norm", (99999,)),
            ],
        }

    def _encode(
        self, image: Tensor, take: Container[int] = (), stop: int | None = None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Runs the stages: the one loop that every kind of forward pass uses.

        Returns:
            The tokens before the Last LN, `(B, H, W, D)`; what the Last LN receives, `(1, H * W, D)`; the tokens after
            the stages `take`.
        """
        x = self.patch_embed(image)
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else None
        pos = self.raw_pos_embed(grid)
        if self.spec.input_pe:
            x = x + pos.unflatten(1, x.shape[1:3])  # Eqs. (1), (8); LaPE omits it, Eq. (5)
        delivered = self.deliver(pos, grid)
        per_layer = enumerate(delivered.per_layer)
        taken = []
        for index, stage in enumerate(islice(self.layers, stop)):
            x = stage.downsample(x)
            for block in stage.blocks:
                layer, pe = next(per_layer)
                if self.probe is not None:
                    rows = pe.flatten(1, 2) if pe is not None and block.pe_is_map else pe
                    self.probe.layer(layer, x, block.norm1(x), rows)
                x = checkpoint(block, x, pe) if stage.grad_checkpointing else block(x, pe)
            if index in take:
                taken.append(x)
        return x, delivered.last, taken

    def _last_norm(self, x: Tensor, last: Tensor | None) -> Tensor:
        normed = self.norm(x)
        if self.probe is not None:
            self.probe.last(x, normed, last)
        return normed if last is None else normed + last.unflatten(1, x.shape[1:3])  # Eq. (11); without `last`, Eq. (4)

    @torch.no_grad()
    def _init_pos_embed(self) -> None:
        """Draws the PE, and with it the start of the Last LN's bias if the method starts it."""
        trunc_normal_(self.pos_embed, std=POS_STD)
        if self.pos_std is not None:
            self.pos_embed.mul_(self.pos_std / POS_STD)
        if self.spec.start_beta:
            mergings = [stage.downsample for stage in self.layers]
            start = self.delivery.start(self.pos_embed, self.patch_embed.grid_size, mergings)
            self.norm.bias.copy_(self.pool(start)[0])


def _resample(pos: Tensor, grid: tuple[int, int], old: tuple[int, int]) -> Tensor:
    return resample_abs_pos_embed(pos, list(grid), list(old), num_prefix_tokens=0)


_SWIN_224: dict[str, Any] = {"img_size": 224, "patch_size": 4, "window_size": 7}

_SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": _SWIN_224 | {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "swin_small_patch4_window7_224": _SWIN_224
    | {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "swin_base_patch4_window7_224": _SWIN_224
    | {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}

# Our own size for small images: two stages, with 14 x 14 and 7 x 7 tokens.
_SMALL: dict[str, dict[str, Any]] = {
    "swin_mini_patch2_28": {
        "img_size": 28,
        "patch_size": 2,
        "window_size": 7,
        "embed_dim": 48,
        "depths": (2, 2),
        "num_heads": (3, 6),
    },
}

register(DeliveredSwinTransformer, _SIZES, out_indices=(0, 1, 2, 3), classifier="head.fc", pool_size=(7, 7))
register(DeliveredSwinTransformer, _SMALL, out_indices=(0, 1), classifier="head.fc", pool_size=(7, 7))
