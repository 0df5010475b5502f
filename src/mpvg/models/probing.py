"""What a network tells whoever looks at what its position embedding (PE) does."""

from typing import Protocol

from torch import Tensor


class Probe(Protocol):
    """Set as a network's `probe`, it is shown every forward pass; None, the usual value, costs nothing."""

    def layer(self, layer: int, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        """A layer is about to run.

        Args:
            layer: its number, over all stages.
            tokens: x_l, `(B, N, D)`, or `(B, H, W, D)` in Swin.
            normed: LN_l(x_l), to which `pe` is added for the attention, of the same shape.
            pe: what the method delivers to the layer, `(1, N, D)`; None: nothing.
        """

    def last(self, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        """The Last LN has run.

        Args:
            tokens: its input, as for a layer; `(B, D)` where it normalises the one vector that is read out (CeiT).
            normed: its output, before `pe` is added.
            pe: what the method delivers to it; None: nothing.
        """
