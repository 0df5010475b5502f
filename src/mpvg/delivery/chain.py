"""The chain of LN' that a method asks for, computed from the raw PE once for a forward pass."""

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpvg.delivery.spec import DeliverySpec, Part

TABLE_STD = 0.02
"""Standard deviation of a random table: that at which DeiT's PE starts."""


class DeliveredPE(NamedTuple):
    """Finished values for one forward pass, each `(1, rows, dim)` with one row per token."""

    per_layer: tuple[Tensor | None, ...]
    """What is added to the attention input LN_l(x_l) of layer l; None: nothing."""
    last: Tensor | None
    """What is added to the output of the Last LN, on every token, before the mean; None: nothing."""
    carry: Tensor
    """The last value of the chain, `(1, pos rows, dim)`: the input of the next stage in a network with stages."""


class PositionDelivery(nn.Module):
    """Computes what each layer and the Last LN receive from the raw PE.

    Args:
        spec: a resolved method.
        depth: number of layers of the network, or of the stage that this module belongs to.
        dim: channels of the PE.
        eps: epsilon of every LN'; the network's own.
        prefix_rows: number of leading tokens without a row in the PE, for example registers; they receive zeros.
        class_rows: number of leading rows of the PE that are not patches'; a `Part` keeps them apart.
        rows: rows of the PE; a random table needs them.

    The parameters are `layer_norms.<layer>.{weight,bias}` and `last_norm.{weight,bias}`, initialized to the method's
    gains (1) and 0. A layer that receives nothing has no entry.

    Raises:
        ValueError: the method has a random table, and `rows` is not given.
    """

    table: Tensor | None
    """What LN'_last takes instead of pos_k, `(1, rows, dim)`; None: pos_k."""
    reference_pos: Tensor | None
    """A copy of the raw PE, for the owner to pass to `forward`: what it gives through untrained LN' is subtracted, so
    that a converted network starts with unchanged outputs. None: nothing is subtracted."""
    last_mean_folded = False
    """Whether the Last LN's beta already contains the mean of `last`, so that the mean over tokens can omit `last`."""

    def __init__(
        self,
        spec: DeliverySpec,
        depth: int,
        dim: int,
        *,
        eps: float = 1e-6,
        prefix_rows: int = 0,
        class_rows: int = 0,
        rows: int = 0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.depth = depth
        self.prefix_rows, self.class_rows, self.eps = prefix_rows, class_rows, eps
        layers = range(0) if spec.first_layer is None else range(spec.first_layer, depth)
        self.layer_norms = nn.ModuleDict({str(layer): nn.LayerNorm(dim, eps=eps) for layer in layers})
        self.last_norm = None if spec.last_index is None else nn.LayerNorm(dim, eps=eps)
        self.register_buffer("table", empty_table(spec, rows, dim))
        self.register_buffer("reference_pos", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts every LN' as the method says, and draws the random table from torch's generator if there is one."""
        starts = [(norm, self.spec.gain) for norm in self.layer_norms.children()]
        for norm, gain in [*starts, (self.last_norm, self.spec.last_gain)]:
            if norm is not None:
                nn.init.constant_(norm.get_parameter("weight"), gain)
                nn.init.zeros_(norm.get_parameter("bias"))
        if self.table is not None:
            nn.init.normal_(self.table, std=TABLE_STD)

    def forward(
        self,
        pos: Tensor,
        initial: Tensor | None = None,
        *,
        reference_pos: Tensor | None = None,
        table: Tensor | None = None,
    ) -> DeliveredPE:
        """Computes the whole chain.

        Args:
            pos: the raw PE, or the `carry` of the previous stage, `(1, rows, dim)`.
            initial: pos_0, if it is not `pos`: the raw PE after the previous stages' merging.
            reference_pos: a raw PE, `(1, rows, dim)`; the values that it gives with every LN' as it starts are
                subtracted from the delivered ones.
            table: what LN'_last takes instead of pos_k, `(1, rows, dim)`; None: `self.table`.
        """
        table = self.table if table is None else table
        delivered = self._chain(pos, pos if initial is None else initial, table, nn.LayerNorm.__call__)
        if reference_pos is None:
            return delivered
        with torch.no_grad():
            reference = self._chain(reference_pos, reference_pos, table, self._untrained_norm)
        per_layer = tuple(map(_subtract, delivered.per_layer, reference.per_layer))
        return DeliveredPE(per_layer, _subtract(delivered.last, reference.last), delivered.carry)

    def _chain(
        self, pos: Tensor, pos_0: Tensor, table: Tensor | None, apply: Callable[[Any, Tensor], Tensor]
    ) -> DeliveredPE:
        chain: dict[int, Tensor] = {0: pos_0}
        received: dict[int, Tensor] = {}
        carry = pos
        for key, norm in self.layer_norms.items():
            carry = apply(norm, carry if self.spec.hierarchical else pos_0)  # Eqs. (7), (10); flat: Table 6, row 2
            received[int(key)] = self._deliver(carry, self.spec.part)  # added to LN_l(x_l) by the layer: Eqs. (6), (9)
            if int(key) > 0:
                chain[int(key)] = carry
        last = None
        if self.last_norm is not None and self.spec.last_index is not None:
            source = chain[self.spec.last_index] if table is None else table
            source = source.detach() if self.spec.last_detach else source
            last = self._deliver(apply(self.last_norm, source), self.spec.last_part)  # Eq. (11); k > 0: Table 5
        return DeliveredPE(tuple(received.get(layer) for layer in range(self.depth)), last, carry)

    def prune(self, depth: int, *, keep_last: bool) -> None:
        """Keeps only what the first `depth` layers receive and, if `keep_last`, what the Last LN receives."""
        if not keep_last:
            self.last_norm = self.table = None
        k = -1 if self.last_norm is None or self.spec.last_index is None else self.spec.last_index
        for layer in map(int, list(self.layer_norms)):
            # pos_k needs every LN' up to LN'_k if hierarchical, and LN'_k alone otherwise.
            if layer >= depth and (layer > k if self.spec.hierarchical else layer != k):
                del self.layer_norms[str(layer)]
        self.depth = depth

    def start(self, pos_0: Tensor) -> Tensor:
        """What LN'_last(pos_0) adds to each token before training, `(1, N, dim)`, from pos_0 `(1, rows, dim)`."""
        return self._deliver(
            F.layer_norm(pos_0, pos_0.shape[-1:], eps=self.eps) * self.spec.last_gain, self.spec.last_part
        )

    def _deliver(self, value: Tensor, part: Part) -> Tensor:
        """The part of a PE `(1, rows, dim)` that is delivered, `(1, N, dim)`."""
        if part != "all":
            patches = value[:, self.class_rows :]
            mean = patches.mean(dim=1, keepdim=True)
            if part == "mean":
                value = mean.expand_as(value)
            elif part == "rest":
                value = value - mean
            else:
                order = [*range(self.class_rows), *(self.class_rows + row for row in _order(patches.shape[1]))]
                value = value[:, order]
        return F.pad(value, (0, 0, self.prefix_rows, 0)) if self.prefix_rows else value

    def _untrained_norm(self, norm: nn.LayerNorm, value: Tensor) -> Tensor:
        gain = self.spec.last_gain if norm is self.last_norm else self.spec.gain
        # With a weight, as LN' has one, so that the difference to an untrained LN' is 0 in every dtype.
        return F.layer_norm(value, norm.normalized_shape, torch.full_like(norm.weight, gain), eps=norm.eps)

    def extra_repr(self) -> str:
        """Shows the spec in `print(model)`."""
        return f"{self.spec}"


def empty_table(spec: DeliverySpec, rows: int, dim: int) -> Tensor | None:
    """Room for what LN'_last takes instead of pos_k, `(1, rows, dim)`; None: it takes pos_k.

    Raises:
        ValueError: `rows` is 0.
    """
    if spec.last_table == "pos":
        return None
    if rows < 1:
        raise ValueError(f"rows is {rows}, but last_table={spec.last_table!r} has as many rows as the PE; give rows")
    return torch.empty(1, rows, dim)


@functools.cache
def _order(rows: int) -> tuple[int, ...]:
    """The order of the rows that `part="permuted"` delivers."""
    # Numbers, not a tensor: one that is made in inference mode, on a device or while tracing could not be used again.
    draw = random.Random(0).random
    return tuple(sorted(range(rows), key=lambda _: draw()))


def _subtract(value: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if value is None or other is None else value - other
