"""Networks with every parameter, delivered PE or tensor changed, for the checks of `contract`."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpvg.analysis.sensitivity import change_delivery
from mpvg.delivery import DeliveredPE

NOISE = 0.1
"""Standard deviation of what is added to every parameter, so that none is where it starts: a head at 0 passes no
gradient on, and a PE of 0 is not seen."""
Build = Callable[..., nn.Module]
"""Builds a network; it takes `method`, a name, and `num_classes`."""


def supports(build: Build, method: str) -> bool:
    """Whether a network takes a method; an error of its code, which the factory's caller gave a name, is none."""
    try:
        build(method=method)
    except ValueError as error:
        if isinstance(error.__cause__, ValueError | None):
            return False
        raise
    return True


def noisy(build: Build, **options: Any) -> nn.Module:
    """A network in evaluation mode in which no parameter is where it starts."""
    model = build(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
    return model


@contextmanager
def delivering(model: nn.Module, pes: list[Tensor | None]) -> Iterator[None]:
    """Delivers these values, those of the layers and the Last LN's, and computes no gradients."""

    def change(delivered: DeliveredPE) -> DeliveredPE:
        return delivered._replace(per_layer=tuple(pes[:-1]), last=pes[-1])

    with torch.no_grad(), change_delivery(model, change):
        yield


@contextmanager
def shifted(tensor: Tensor, shift: Tensor) -> Iterator[None]:
    """Adds to a tensor, inside a `with` block."""
    before = copy.deepcopy(tensor.data)
    tensor.data += shift
    try:
        yield
    finally:
        tensor.data = before
