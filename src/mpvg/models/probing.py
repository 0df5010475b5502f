"""Callback that sees each layer's tokens and delivered position embedding (PE)."""

from typing import Protocol

from torch import Tensor


class Probe(Protocol):
    """Set as a network's `probe`, it is called in every forward pass; with None, the default, nothing is computed."""

    def layer(self, layer: int, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        """Called before a layer runs.

        Args:
            layer: index of the layer, over all stages.
            tokens: x_l, `(B, N, D)`, or `(B, H, W, D)` in Swin.
            normed: LN_l(x_l), of the same shape; the attention input is its sum with `pe`.
            pe: what the method delivers to the layer, `(1, N, D)`; None: nothing.
        """

    def last(self, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        """Called after the Last LN has run.

        Args:
            tokens: the input of the Last LN, as for a layer; `(B, D)` if it normalizes one vector per image (CeiT).
            normed: its output, before `pe` is added.
            pe: what the method delivers to the Last LN; None: nothing.
        """
