"""A network without values is the network in all but the values."""

import pytest
import torch

from mpvg.models.meta import without_values
from small_networks import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_it_has_the_shapes_of_the_network_and_no_memory(family: str) -> None:
    expected = build(family, "mpvg")
    with without_values():
        found = build(family, "mpvg")
    assert {name: value.shape for name, value in found.state_dict().items()} == {
        name: value.shape for name, value in expected.state_dict().items()
    }
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert all(parameter.is_meta for parameter in found.parameters())
    assert torch.zeros(2).add_(1).tolist() == [1.0, 1.0], "outside, tensors are filled again"


def test_tensors_that_have_values_are_filled_inside() -> None:
    with without_values():
        assert torch.zeros(2, device="cpu").add_(1).tolist() == [1.0, 1.0]
        assert torch.empty(3).requires_grad_().requires_grad
