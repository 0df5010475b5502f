"""A trained network for inference, in which everything that does not depend on the image is a constant."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpvg.delivery import DeliveredPE, DeliverySpec, PositionDelivery
from mpvg.models.network import delivered_network


def fold(model: nn.Module) -> nn.Module:
    """Returns a copy for evaluation in which the whole chain is replaced by one constant per layer that receives a PE.

    With average pooling the mean of LN'_last(pos_k) over the tokens is added to the Last LN's beta, so that the
    classifier costs as much as GAP plus one addition per layer that receives a PE. Token maps are unchanged: the
    remainder, whose mean is zero, is one constant addition.

    Args:
        model: a network of this package, in training or evaluation mode; it is not changed.

    Raises:
        ValueError: the model has no `delivery`, is folded already, or takes images of any size, in which case the
            constants would depend on the image.
    """
    _check_foldable(model)
    folded: Any = copy.deepcopy(model).eval()
    network = delivered_network(folded)
    with torch.no_grad():
        delivered = network.deliver(network.raw_pos_embed())
        last = delivered.last
        last_mean_folded = last is not None and network.global_pool == "avg"
        if last is not None and last_mean_folded:
            mean = network.pool(last)
            network.norm.bias.add_(mean[0])
            last = last - mean[:, None]
    constants = delivered._replace(last=last)
    if hasattr(network, "keep_maps"):  # Swin, whose tokens are maps
        constants = network.keep_maps(constants)
    folded.delivery = FoldedDelivery(network.spec, constants, last_mean_folded=last_mean_folded)
    # The class swap keeps the network's own forward pass, so that there is no second one, and the subclass replaces
    # only what a folded network does differently.
    folded.__class__ = _folded_class(type(model))
    if hasattr(folded, "_model_args"):  # what timm's save_for_hf writes, from which the network is built again
        folded._model_args = folded._model_args | {"folded": True}
    folded.requires_grad_(False).eval()
    return cast(nn.Module, folded)


class FoldedDelivery(nn.Module):
    """The output of a PositionDelivery for one PE, as buffers."""

    last: Tensor | None
    carry: Tensor

    def __init__(self, spec: DeliverySpec, delivered: DeliveredPE, *, last_mean_folded: bool) -> None:
        super().__init__()
        self.spec = spec
        self.depth = len(delivered.per_layer)
        self.last_mean_folded = last_mean_folded
        for layer, pe in enumerate(delivered.per_layer):
            if pe is not None:
                self.register_buffer(f"layer_{layer}", pe)
        self.register_buffer("last", delivered.last)
        # A copy: it is the last layer's constant or the raw PE itself, and safetensors refuses shared storage.
        self.register_buffer("carry", delivered.carry.detach().clone())

    def forward(self) -> DeliveredPE:
        """Returns the constants; the PE that they were computed from is not used."""
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
    """What a folded network does differently; the first base of its class, before the network's own class."""

    delivery: FoldedDelivery
    unfolded_class: type[nn.Module]

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

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle finds a class by its module and name, and this class is in no module: it is made from its network's.
        return _new_folded, (self.unfolded_class,), self.__getstate__()


_folded_classes: dict[type[nn.Module], type[nn.Module]] = {}
"""The class of the folded network for each class of a network."""


def _folded_class(network: type[nn.Module]) -> type[nn.Module]:
    if network not in _folded_classes:
        _folded_classes[network] = type(f"Folded{network.__name__}", (_Folded, network), {"unfolded_class": network})
    return _folded_classes[network]


def _new_folded(network: type[nn.Module]) -> nn.Module:
    """Creates a folded network without its state, for copy and pickle."""
    folded = _folded_class(network)
    return folded.__new__(folded)


def _check_foldable(model: nn.Module) -> None:
    """Refuses a model that cannot be folded, with the reason."""
    name, delivery = type(model).__name__, getattr(model, "delivery", None)
    folded_already = isinstance(delivery, FoldedDelivery)
    if folded_already or not (isinstance(delivery, PositionDelivery) or hasattr(model, "deliver")):
        state = "is folded already" if folded_already else "has no PositionDelivery"
        raise ValueError(f"{name} {state}; fold takes a trained network made by mpvg.create_model")
    if not hasattr(model, "raw_pos_embed"):
        raise ValueError(
            f"{name} has a PositionDelivery but is not a network of this package, so its Last LN and its mean are "
            "unknown; call its delivery once and keep the values instead"
        )
    if getattr(model, "dynamic_img_size", False):
        raise ValueError(
            "a model with dynamic_img_size=True resamples its PE for each image size, so nothing is constant; "
            "build it with dynamic_img_size=False, call set_input_size for the size it will see, then fold"
        )
