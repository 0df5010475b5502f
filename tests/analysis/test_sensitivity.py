"""Sensitivity to changes of PE, position and size, compared with calculations by hand."""

import math
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpvg.analysis import sensitivity
from mpvg.analysis.sensitivity import CachedBatches, Change
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


def changed(before: Mapping[str, float], after: Mapping[str, float]) -> Change:
    return Change(after["accuracy"] - before["accuracy"], after["nll"] - before["nll"])


@pytest.mark.parametrize("method", ["mpvg", "pvg", "lape", "pvg_token"])
def test_removing_the_pe_of_a_layer_is_a_zero_in_its_ln(method: str) -> None:
    """LN' at 0 and 0 delivers zeros; where the chain goes on below it, the other layers get theirs as before."""
    model, some = network(method), batches_of()
    found = {change.name: change for change in sensitivity.importance(model, some)}
    expected = [str(layer) for layer in map(int, model.delivery.layer_norms)]
    assert list(found) == expected + ["Last LN"] * (model.delivery.last_norm is not None)
    last_layer = expected[-1]  # nothing hangs on the end of the chain
    own = evaluate(model, some).metrics
    with torch.no_grad():
        model.delivery.layer_norms[last_layer].weight.zero_()
        model.delivery.layer_norms[last_layer].bias.zero_()
    assert found[last_layer].removed == changed(own, evaluate(model, some).metrics)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("patches", [1, 2, 16])
def test_a_replacement_is_what_numpy_says(prefix: int, patches: int) -> None:
    """The mean in every row; the same rows elsewhere; other numbers with the same mean and deviation per channel."""
    pe = torch.randn(1, prefix + patches, 5, dtype=torch.float64) * 3 + 1
    made = {name: value.numpy()[0] for name, value in sensitivity.replacements(pe, prefix).items()}
    assert list(made) == ["mean", "shuffled", "noise"]
    own = pe.numpy()[0]
    for value in made.values():
        assert value.shape == own.shape
        assert np.array_equal(value[:prefix], own[:prefix])
    rows = own[prefix:]
    assert made["mean"][prefix:] == pytest.approx(np.tile(rows.mean(axis=0), (patches, 1)), abs=1e-12)
    assert sorted(map(tuple, made["shuffled"][prefix:])) == sorted(map(tuple, rows))
    noise = made["noise"][prefix:]
    assert noise.mean(axis=0) == pytest.approx(rows.mean(axis=0), abs=1e-12)
    assert noise.std(axis=0) == pytest.approx(rows.std(axis=0), abs=1e-12)
    if patches > 2:
        assert np.abs(made["shuffled"] - own).max() > 0.1
        r = [abs(np.corrcoef(noise[:, channel], rows[:, channel])[0, 1]) for channel in range(5)]
        assert max(r) < 0.9
    for name, value in sensitivity.replacements(pe, prefix).items():
        assert np.array_equal(value.numpy()[0], made[name])


@pytest.mark.parametrize("method", ["mpvg", "pvg_token", "lape"])
@torch.no_grad()
def test_every_change_is_that_of_a_network_which_holds_the_replacement(method: str) -> None:
    """Independent: the LayerNorm of the layer at the end of the chain gives another value, for nothing hangs on it."""
    model, some = network(method), batches_of()
    own, prefix = evaluate(model, some).metrics, model.num_prefix_tokens
    found = {change.name: change for change in sensitivity.importance(model, some)}["3"]
    delivered = model.deliver(model.raw_pos_embed())
    pe, neighbor = delivered.per_layer[3], delivered.last if method == "mpvg" else delivered.per_layer[2]
    assert found.neighbor == ("Last LN" if method == "mpvg" else "2")
    values = {"removed": torch.zeros_like(pe), "swapped": neighbor, **sensitivity.replacements(pe, prefix)}
    seen = set()
    for name, value in values.items():
        norm = model.delivery.layer_norms["3"]
        handle = norm.register_forward_hook(lambda *_, value=value: value)
        after = evaluate(model, some).metrics
        handle.remove()
        assert getattr(found, name) == changed(own, after)
        seen.add(after["nll"])
    assert len(seen) == 5


@torch.no_grad()
def test_average_pooling_sees_the_mean_of_the_last_pe_alone() -> None:
    """A hand-made fact: the mean over patches of y + P is that of y plus that of P, so only removal is a change."""
    model, some = network("mpvg").double(), batches_of()
    some = some.map(Tensor.double)
    last = sensitivity.importance(model, some)[-1]
    assert last.name == "Last LN"
    assert last.neighbor == "3"
    for control in (last.mean, last.shuffled, last.noise):
        assert abs(control.nll) < 1e-6  # logits are compared in float32
        assert control.accuracy == 0
    assert abs(last.removed.nll) > 1e-3


class OneLayer(nn.Module):
    """Patches of one pixel; the layer adds what it is delivered, and pixel n has the weight n in the logit."""

    num_prefix_tokens = 0

    def __init__(self, pe: Tensor) -> None:
        super().__init__()
        self.pe = nn.Parameter(pe)
        self.delivery = None

    def raw_pos_embed(self, grid: Any = None) -> Tensor:
        return self.pe

    def deliver(self, pos: Tensor, grid: Any = None) -> DeliveredPE:
        return DeliveredPE((pos,), None, pos)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(1)[..., None]
        pe = self.deliver(self.raw_pos_embed()).per_layer[0]
        tokens = tokens if pe is None else tokens + pe
        first = (tokens[..., 0] * torch.arange(float(tokens.shape[1]))).mean(dim=1)
        return torch.stack([first, torch.ones_like(first)], dim=1)


def test_a_hand_made_network_has_the_changes_of_a_calculator() -> None:
    """One black image of class 0, four patches, PE 0, 0, 0, 4: the logits are 3 and 1."""
    model = OneLayer(torch.tensor([0.0, 0.0, 0.0, 4.0])[None, :, None])
    some = CachedBatches([ImageBatch(torch.zeros(1, 1, 2, 2), torch.tensor([0]))])
    (found,) = sensitivity.importance(model, some)

    def change(logit: float) -> Any:
        nll = math.log1p(math.exp(1 - logit)) - math.log1p(math.exp(1 - 3))
        return pytest.approx((-1 if logit < 1 else 0, nll), abs=1e-6)

    assert astuple(found.removed) == change(0)
    assert astuple(found.mean) == change((0 + 1 + 2 + 3) / 4)
    assert any(astuple(found.shuffled) == change(place) for place in range(4))  # the 4 at any patch
    noise = sensitivity.replacements(model.pe, 0)["noise"][0, :, 0].tolist()
    assert astuple(found.noise) == change(sum(place * value for place, value in enumerate(noise)) / 4)
    assert (found.swapped, found.neighbor) == (None, None)
    assert found.removed.accuracy == -1


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
        with sensitivity.change_delivery(model, lambda d, c=change: sensitivity.replace_pe(d, 2, c(d.per_layer[2]))):
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
    assert [change.neighbor for change in found] == ["1", "0", "3", "Last LN", "3"]  # two stages of two layers
    assert all(change.swapped is not None for change in found)
    one_layer = network("mpvg", depth=2)
    one_layer.delivery.last_norm = None
    assert [(one.swapped, one.neighbor) for one in sensitivity.importance(one_layer, batches_of())] == [(None, None)]


@pytest.mark.parametrize(("right", "down"), [(1, 0), (-1, 0), (0, 1), (0, -1), (3, 0), (0, -2)])
def test_a_shift_moves_the_image_and_repeats_its_border(right: int, down: int) -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    actual = sensitivity.shifted(image, right, down)[0, 0]
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
    own = evaluate(model, some).metrics
    assert (found.accuracy, found.nll) == (own["accuracy"], own["nll"])
    assert len(found.importance) == 4
