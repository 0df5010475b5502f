"""Delivery of a position embedding (PE) in a network with stages, between which the PE is merged as the tokens are."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from torch import Tensor, nn

from mpvg.delivery import TABLE_STD, DeliveredPE, DeliverySpec, PositionDelivery, empty_table

Grid = tuple[int, int]


class StagedDelivery(nn.ModuleList):
    """One PositionDelivery per stage, for a network that merges the PE between stages.

    Args:
        spec: the resolved method of the whole network.
        depths: number of layers of each stage.
        dims: channels of each stage.
        eps: epsilon of every LN'; the network's own.
        rows: rows of the raw PE.
    """

    table: Tensor | None
    """What LN'_last takes instead of pos_0, of the raw PE's shape and merged as the PE is; None: pos_0."""
    last_mean_folded = False
    """As in PositionDelivery."""

    def __init__(self, spec: DeliverySpec, depths: list[int], dims: list[int], *, eps: float, rows: int) -> None:
        # In every stage the first layer receives a PE, too: resolve() sets first_layer to 0 for Swin. The table is
        # merged between the stages, so that no stage has one of its own.
        last = replace(spec, last_table="pos")
        specs = [spec.without_last()] * (len(depths) - 1) + [last]
        stages = zip(specs, depths, dims, strict=True)
        super().__init__(PositionDelivery(stage, depth, dim, eps=eps) for stage, depth, dim in stages)
        self.hierarchical = spec.hierarchical
        self.register_buffer("table", empty_table(spec, rows, dims[0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As PositionDelivery.reset_parameters, for what the stages do not hold: the table."""
        if self.table is not None:
            nn.init.normal_(self.table, std=TABLE_STD)

    @property
    def stages(self) -> list[PositionDelivery]:
        """The deliveries of the stages."""
        return [stage for stage in self if isinstance(stage, PositionDelivery)]

    def forward(
        self, pos: Tensor, grid: Grid, mergings: Sequence[nn.Module], table: Tensor | None = None
    ) -> DeliveredPE:
        """Computes what every layer of every stage and the Last LN receive.

        Args:
            pos: the raw PE, `(1, rows, D)` for the first stage.
            grid: its rows and columns of patches.
            mergings: the patch merging of the tokens before each stage; the first stage's is not used.
            table: `self.table`, resampled if the PE is.
        """
        carry = initial = pos
        per_layer: list[Tensor | None] = []
        last = None
        for index, (merging, delivery) in enumerate(zip(mergings, self.stages, strict=True)):
            if index > 0:
                carry_needed, initial_needed = self._needed_from(index)
                carry = _merge(merging, carry, grid) if carry_needed else carry
                initial = _merge(merging, initial, grid) if initial_needed else initial
                table = None if table is None else _merge(merging, table, grid)
                grid = merged_grid(grid)
            delivered = delivery(carry, initial, table=table)
            carry, last = delivered.carry, delivered.last
            per_layer += delivered.per_layer
        return DeliveredPE(tuple(per_layer), last, carry)

    def start(self, pos: Tensor, grid: Grid, mergings: Sequence[nn.Module]) -> Tensor:
        """As PositionDelivery.start: from the raw PE, `(1, rows, D)`, for the tokens of the last stage."""
        for merging in mergings[1:]:
            pos, grid = _merge(merging, pos, grid), merged_grid(grid)
        return self.stages[-1].start(pos)

    def prune(self, depth: int, *, keep_last: bool) -> None:
        """As PositionDelivery.prune; `depth` must be the end of a stage."""
        ends = accumulate(delivery.depth for delivery in self.stages)
        kept = [delivery for delivery, end in zip(self.stages, ends, strict=True) if end <= depth]
        del self[len(kept) :]
        kept[-1].prune(kept[-1].depth, keep_last=keep_last)
        if kept[-1].last_norm is None:
            self.table = None

    def _needed_from(self, stage: int) -> tuple[bool, bool]:
        """Whether this or a later stage needs the chain's value, and whether one needs pos_0."""
        stages = self.stages[stage:]
        to_layers = any(len(delivery.layer_norms) for delivery in stages)
        to_last_norm = self.table is None and any(delivery.last_norm is not None for delivery in stages)
        return to_layers and self.hierarchical, to_last_norm or (to_layers and not self.hierarchical)


def _merge(merging: nn.Module, value: Tensor, grid: Grid) -> Tensor:
    """Applies the patch merging of the tokens to a PE, `(1, rows, D)` to `(1, rows / 4, 2 D)`."""
    return merging(value.unflatten(1, grid)).flatten(1, 2)


def merged_grid(grid: Grid) -> Grid:
    """The grid of patches after a merging."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2
