"""Sensitivity to changes of PE, position and size, compared with calculations by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mpvg.analysis import sensitivity
from mpvg.analysis.sensitivity import CachedBatches
from mpvg.data import ImageBatch
from mpvg.delivery import DeliveredPE
from mpvg.models import create_model
from mpvg.tasks.classification import evaluate


def batches_of(channels: int = 1, side: int = 8, count: int = 24) -> CachedBatches:
    images = torch.randn(count, channels, side, side)
    return CachedBatches([ImageBatch(part, torch.arange(len(part)) % 5) for part in images.split(10)])


def network(method: str = "mpvg", name: str = "vit_mini_patch2_8", **kwargs: Any) -> Any:
    model = create_model(name, method, num_classes=5, in_chans=1, img_size=8, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("method", ["mpvg", "pvg", "lape", "pvg_token"])
def test_removing_the_pe_of_a_layer_is_a_zero_in_its_ln(method: str) -> None:
    """LN' at 0 and 0 delivers zeros; where the chain goes on below it, the other layers get theirs as before."""
    model, some = network(method), batches_of()
    found = {change.name: change for change in sensitivity.importance(model, some)}
    expected = [str(layer) for layer in map(int, model.delivery.layer_norms)]
    assert list(found) == expected + ["Last LN"] * (model.delivery.last_norm is not None)
    last_layer = expected[-1]  # nothing hangs on the end of the chain
    with torch.no_grad():
        model.delivery.layer_norms[last_layer].weight.zero_()
        model.delivery.layer_norms[last_layer].bias.zero_()
    assert found[last_layer].removed == evaluate(model, some).metrics["accuracy"]


@torch.no_grad()
def test_shuffled_and_swapped_are_other_deliveries() -> None:
    model, some = network(), batches_of()
    own = evaluate(model, some).metrics["accuracy"]
    seen: list[list[Tensor | None]] = []
    original = model.deliver(model.raw_pos_embed())

    def record(delivered: DeliveredPE) -> DeliveredPE:
        seen.append([*delivered.per_layer, delivered.last])
        return delivered

    with sensitivity.change_delivery(model, record):
        assert evaluate(model, some).metrics["accuracy"] == own
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1:], [*original.per_layer, original.last][1:], strict=True))
    assert "deliver" not in vars(model)
    answers = []
    for change in (lambda pe: pe.flip(1), lambda pe: original.per_layer[3]):
        with sensitivity.change_delivery(model, lambda d, c=change: sensitivity._replace(d, 2, c(d.per_layer[2]))):
            answers.append(model(some.batches[0][0]))
    assert not torch.equal(answers[0], answers[1])


def test_a_network_is_itself_again_after_an_error() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="stop"), sensitivity.change_delivery(model, lambda delivered: delivered):
        raise RuntimeError("stop")
    assert "deliver" not in vars(model)


def test_nothing_is_important_where_nothing_is_delivered() -> None:
    assert sensitivity.importance(network("gap"), batches_of()) == []


def test_a_swap_needs_another_pe_of_the_same_shape() -> None:
    swin = create_model("swin_mini_patch2_28", "mpvg", num_classes=5, in_chans=1).eval()
    found = sensitivity.importance(swin, batches_of(side=28, count=4))
    assert [change.swapped is None for change in found] == [False, True, False, False, True]
    one_layer = network("mpvg", depth=2)
    one_layer.delivery.last_norm = None
    assert [change.swapped for change in sensitivity.importance(one_layer, batches_of())] == [None]


@pytest.mark.parametrize(("right", "down"), [(1, 0), (-1, 0), (0, 1), (0, -1), (3, 0), (0, -2)])
def test_a_shift_moves_the_image_and_repeats_its_border(right: int, down: int) -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    actual = sensitivity._shifted(image, right, down)[0, 0]
    for row in range(4):
        for column in range(4):
            y, x = (min(3, max(0, at)) for at in (row - down, column - right))
            assert actual[row, column] == image[0, 0, y, x]


def test_a_network_without_position_keeps_its_answers_under_whole_patches() -> None:
    """Without any PE, average pooling sees a set of patches: on images with a wide border a shift changes nothing."""
    model: Any = network("gap")
    with torch.no_grad():
        model.pos_embed.zero_()
    images = torch.zeros(6, 1, 8, 8)
    images[..., 2:6, 2:6] = torch.randn(6, 1, 4, 4)
    kept = sensitivity.translation(model, CachedBatches([ImageBatch(images, torch.zeros(6, dtype=torch.int64))]))
    assert kept[2] == 1.0
    assert set(kept) == {1, 2}


def test_at_its_own_size_a_network_has_its_own_accuracy() -> None:
    model, some = network(), batches_of()
    found = sensitivity.resolutions(model, some)
    assert found[8] == evaluate(model, some).metrics["accuracy"]
    assert set(found) == {4, 6, 8, 10, 12, 16}
    assert all(value is not None for value in found.values())
    assert model.patch_embed.img_size == (8, 8)


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's, in resampling a bias
def test_a_size_that_a_network_refuses_is_left_open() -> None:
    swin = create_model("swin_mini_patch2_28", "mpvg", num_classes=5, in_chans=1).eval()
    found = sensitivity.resolutions(swin, batches_of(side=28, count=4))
    assert found[28] is not None
    assert len(found) == 6


def test_everything_together_is_of_the_same_images() -> None:
    model, some = network(), batches_of()
    found = sensitivity.measure_sensitivity(model, some)
    assert found.images == 24
    assert found.accuracy == evaluate(model, some).metrics["accuracy"]
    assert len(found.importance) == 4
