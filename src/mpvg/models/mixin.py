"""What makes a network of your own one that mpvg trains, analyzes, folds and exports."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpvg.delivery import DeliveredPE, DeliverySpec
from mpvg.models.network import patch_grid
from mpvg.models.probing import Probe
from mpvg.models.registry import check_divisible


class DeliveryMixin(nn.Module):
    """Base class that gives a vision transformer the members of `mpvg.models.network.DeliveredNetwork`.

    A subclass sets, in its constructor:

    - `pos_embed`: the raw PE, `(1, rows, D)`; the rows of the class token come first, if it has one.
    - `delivery`: a `mpvg.PositionDelivery`, or a subclass of it.
    - `blocks`: the layers, each with its LN before the attention as `norm1`; else it overrides `attention_norms`.
    - `norm` and `head`: the Last LN and the classifier.
    - `img_size`, `patch_size`, in pixels, and `in_chans`; with a class token or registers, `num_prefix_tokens`.

    and defines `forward_features`: images `(B, C, H, W)` to the tokens after the Last LN, `(B, N, D)`, where the
    prefix tokens come first. It adds to its layers and to the Last LN what `self.deliver(self.pos_embed)` returns.
    """

    required: ClassVar[tuple[str, ...]] = (
        *("pos_embed", "delivery", "blocks", "norm", "head"),
        *("img_size", "patch_size", "in_chans", "forward_features"),
    )
    """What a subclass brings."""
    num_prefix_tokens: int = 0
    """Number of tokens before the patches: class token and registers."""
    remark: str = ""
    """How the network differs from what the method's name promises; empty if it does not."""
    pos_embed: Tensor
    delivery: Any
    blocks: Any
    norm: Any
    head: Any
    img_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    in_chans: int
    forward_features: Any
    _probe: Probe | None = None
    _hooks: tuple[RemovableHandle, ...] = ()

    def forward(self, images: Tensor) -> Any:
        """Images `(B, C, H, W)` to logits `(B, classes)`."""
        return self.head(self.pool(self.forward_features(images)))

    @property
    def spec(self) -> DeliverySpec:
        """The method as this network runs it."""
        spec: DeliverySpec = self.delivery.spec
        return spec

    @property
    def global_pool(self) -> str:
        """What is read out: "token" or "avg"."""
        return self.spec.pool

    @property
    def attention_norms(self) -> Sequence[nn.Module]:
        """The LN before the attention of each layer, in order: here a probe looks.

        Raises:
            ValueError: a block has no `norm1`.
        """
        norms = [getattr(block, "norm1", None) for block in self.blocks]
        if None in norms:
            raise ValueError(f"block {norms.index(None)} has no norm1; define attention_norms, the LN of each layer")
        return norms  # type: ignore[return-value]

    def raw_pos_embed(self, grid: tuple[int, int] | None = None) -> Tensor:
        """The raw PE, `(1, rows, D)`, resampled to a grid of patches if one is given."""
        return self.pos_embed if grid is None else self._resample(self.pos_embed, grid)

    def deliver(self, pos: Tensor, grid: tuple[int, int] | None = None) -> DeliveredPE:
        """Computes what every layer and the Last LN receive; `pos` is `raw_pos_embed(grid)`."""
        tables = self._tables()
        if grid is not None:
            tables = {name: self._resample(table, grid) for name, table in tables.items()}
        delivered: DeliveredPE = self.delivery(pos, **tables)
        return delivered

    def pool(self, tokens: Tensor, /) -> Tensor:
        """The class token, or the mean over patches, as the method says: `(B, N, D)` to `(B, D)`."""
        return tokens[:, 0] if self.spec.pool == "token" else tokens[:, self.num_prefix_tokens :].mean(dim=1)

    @torch.no_grad()
    def set_input_size(self, img_size: Any = None) -> None:
        """Resamples the raw PE to another image size.

        A network for one size only overrides this, and raises a ValueError.
        """
        if img_size is None:
            return
        check_divisible(img_size, self.patch_size)
        old, self.img_size = patch_grid(self), to_2tuple(img_size)
        for tensor in (self.pos_embed, *self._tables().values()):
            tensor.data = self._resample(tensor, patch_grid(self), old)

    def get_classifier(self) -> nn.Module:
        """The head."""
        head: nn.Module = self.head
        return head

    def no_weight_decay(self) -> set[str]:
        """Names of the PE and of class tokens: all parameters of the shape `(1, rows, D)`."""
        return {name for name, value in self.named_parameters() if value.ndim == 3 and len(value) == 1}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer decay, with each LN' in the group of its layer, or of the Last LN."""
        names = {id(module): name for name, module in self.named_modules()}
        layers, norm, head = (names[id(part)] for part in (self.blocks[0], self.norm, self.get_classifier()))
        layer = rf"^(?:{re.escape(layers.rpartition('.')[0])}|delivery\.\w+)\.\D*(\d+)(?:\.|$)"
        last = rf"^(?:{re.escape(norm)}|delivery\.last_norm)\."
        other = rf"{layer}|{last}|^{re.escape(head)}\."
        stem = [re.escape(name) for name, _ in self.named_parameters() if not re.search(other, name)]
        return {"stem": rf"^(?:{'|'.join(stem)})$", "blocks": [(layer, None), (last, (99999,))]}

    @property
    def probe(self) -> Probe | None:
        """Called with the tokens and the delivered PE of each layer and of the Last LN."""
        return self._probe

    @probe.setter
    def probe(self, probe: Probe | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._probe, self._hooks = probe, ()
        if probe is not None:
            layers = [
                norm.register_forward_hook(partial(self._show_layer, probe, layer))
                for layer, norm in enumerate(self.attention_norms)
            ]
            self._hooks = (*layers, self.norm.register_forward_hook(partial(self._show_last, probe)))

    def check(self) -> list[str]:
        """What does not fit together, in words."""
        grid, rows = patch_grid(self), self.pos_embed.shape[1]
        patches = grid[0] * grid[1]
        if not patches <= rows <= patches + self.num_prefix_tokens:
            return [
                f"pos_embed has {rows} rows, and there are {patches} patches and {self.num_prefix_tokens} prefix tokens"
            ]
        return []

    def _tables(self) -> dict[str, Tensor]:
        """What the delivery holds in the shape of the PE."""
        tables = {name: getattr(self.delivery, name, None) for name in ("reference_pos", "table")}
        return {name: table for name, table in tables.items() if table is not None}

    def _show_layer(self, probe: Probe, layer: int, norm: nn.Module, inputs: tuple[Tensor], normed: Tensor) -> None:
        probe.layer(layer, inputs[0], normed, self.deliver(self.raw_pos_embed()).per_layer[layer])

    def _show_last(self, probe: Probe, norm: nn.Module, inputs: tuple[Tensor], normed: Tensor) -> None:
        probe.last(inputs[0], normed, self.deliver(self.raw_pos_embed()).last)

    def _resample(self, pos: Tensor, grid: tuple[int, int], old: tuple[int, int] | None = None) -> Tensor:
        old = old or patch_grid(self)
        prefix = pos.shape[1] - old[0] * old[1]
        resampled: Tensor = resample_abs_pos_embed(pos, list(grid), list(old), num_prefix_tokens=prefix)
        return resampled
