"""Norms of two gradients, which are equal where the Last LN's beta reaches the logits through the head alone."""

from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("gradient_beta", "gradient_head")
"""What an epoch's line of metrics.jsonl calls them: the norm of dL/dbeta of the Last LN, and that of W^T dL/dh, where h
are the logits, summed over the batch, and W is the head's weight; each a mean over the steps of the epoch."""


def gradient_norms(network: nn.Module) -> Tensor:
    """The norms after a backward pass, `(2,)`: with a mean over tokens the two gradients are the same vector.

    dL/dh, summed over the batch, is the gradient of the head's bias, so nothing is computed twice.
    """
    beta, head = _parts(network)
    return torch.stack([beta.grad.norm(), (head.weight.T @ head.bias.grad).norm()]).detach()


def check_gradient_norms(network: nn.Module) -> None:
    """Refuses a network in which one of the two does not exist.

    Raises:
        ValueError: it has no Last LN with a bias that is trained, or no linear head with one.
    """
    beta, head = _parts(network)
    trained = [getattr(one, "requires_grad", False) for one in (beta, getattr(head, "bias", None))]
    if not (isinstance(head, nn.Linear) and all(trained)):
        raise ValueError(
            "log_gradients is True, but the network has no Last LN and linear head with biases that are trained; "
            "leave it out"
        )


def _parts(network: nn.Module) -> tuple[Any, Any]:
    """The Last LN's bias and the head."""
    model: Any = network
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    return getattr(getattr(model, "norm", None), "bias", None), head
