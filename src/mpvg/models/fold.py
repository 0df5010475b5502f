"""A trained network for inference: what does not depend on the image becomes a constant."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mpvg.delivery import DeliveredPE, DeliverySpec, PositionDelivery


def fold(model: nn.Module) -> nn.Module:
    """Returns a copy for evaluation in which the delivery's whole chain is one constant per served layer.

    With average pooling the mean of LN'_last(pos_k) over the tokens moves into the Last LN's beta, so that the
    classifier costs what GAP costs, plus one addition per served layer. Token maps keep what is left of it, of mean
    zero, as one constant addition, and stay what they were.

    Args:
        model: a network of this package, in either mode; it is not changed.

    Raises:
        ValueError: the model holds no `delivery`, is folded already, or takes images of any size, in which case the
            constants would depend on the image.
    """
    delivery = getattr(model, "delivery", None)
    folded_already = isinstance(delivery, FoldedDelivery)
    if folded_already or not (isinstance(delivery, PositionDelivery) or hasattr(model, "deliver")):
        state = "is folded already" if folded_already else "holds no PositionDelivery"
        raise ValueError(f"{type(model).__name__} {state}; fold takes a trained network made by mpvg.create_model")
    if not hasattr(model, "position"):
        raise ValueError(
            f"{type(model).__name__} has a PositionDelivery but is no network of this package, so where its Last LN "
            "and its mean are is unknown; call its delivery once and keep the values instead"
        )
    if getattr(model, "dynamic_img_size", False):
        raise ValueError(
            "a model with dynamic_img_size=True resamples its PE for each image size, so nothing is constant; "
            "build it with dynamic_img_size=False, call set_input_size for the size it will see, then fold"
        )
    folded: Any = copy.deepcopy(model).eval()
    with torch.no_grad():
        delivered = folded.deliver(folded.position())
        last, pooled = delivered.last, folded.global_pool == "avg" and delivered.last is not None
        if pooled:
            mean = folded.pool(last)
            folded.norm.bias += mean[0]
            last = last - mean[:, None]
    folded.delivery = FoldedDelivery(folded.spec, delivered._replace(last=last), averages_to_zero=pooled)
    network = type(model)
    folded.__class__ = type(f"Folded{network.__name__}", (_Folded, network), {})
    return folded.requires_grad_(False).eval()


class FoldedDelivery(nn.Module):
    """What a PositionDelivery gives for one PE, as buffers; called in its place."""

    last: Tensor | None
    carry: Tensor

    def __init__(self, spec: DeliverySpec, delivered: DeliveredPE, *, averages_to_zero: bool) -> None:
        super().__init__()
        self.spec = spec
        self.depth = len(delivered.per_layer)
        self.averages_to_zero = averages_to_zero
        for layer, pe in enumerate(delivered.per_layer):
            if pe is not None:
                self.register_buffer(f"layer_{layer}", pe)
        self.register_buffer("last", delivered.last)
        # A copy: it is the last layer's constant, or the raw PE itself, and safetensors saves no storage twice.
        self.register_buffer("carry", delivered.carry.detach().clone())

    def forward(self) -> DeliveredPE:
        """Returns the constants; the PE they were made from is not read again."""
        per_layer = tuple(getattr(self, f"layer_{layer}", None) for layer in range(self.depth))
        return DeliveredPE(per_layer, self.last, self.carry)

    def prune(self, depth: int, *, keep_last: bool) -> None:
        """As PositionDelivery.prune."""
        for layer in range(depth, self.depth):
            if hasattr(self, f"layer_{layer}"):
                delattr(self, f"layer_{layer}")
        self.depth = depth
        if not keep_last:
            self.last = None


class _Folded:
    """What a folded network does otherwise, in front of the network's own class."""

    delivery: FoldedDelivery

    def deliver(self, pos: Tensor, grid: tuple[int, int] | None = None) -> DeliveredPE:
        return self.delivery()

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(
                "a folded model is for evaluation: its PE is constant; train the model it was folded from"
            )
        return super().train(False)  # type: ignore[misc]

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a folded model has constants of one image size; call set_input_size first, then fold")
