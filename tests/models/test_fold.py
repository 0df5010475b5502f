"""A folded network gives the same answers at lower cost, and refuses what would make them wrong."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mpvg.delivery import METHODS, DeliverySpec, Method, PositionDelivery
from mpvg.models import create_model
from mpvg.models.checkpoints import load_weights
from mpvg.models.fold import fold
from reference import additions, assert_close, operations

OWN = DeliverySpec(first_layer=0, hierarchical=False, last_index=3)
WITH_OWN = {**METHODS, "own": OWN}
every_method = pytest.mark.parametrize("method", WITH_OWN.values(), ids=WITH_OWN.keys())
# One of each kind: nothing delivered, layers only, Last LN only, both; class token and mean; pos_0 and a later pos_k.
KINDS = ["default", "lape", "pvg", "gap_last0", "mpvg", "mpvg_last5", "own"]
every_kind = pytest.mark.parametrize("method", [WITH_OWN[name] for name in KINDS], ids=KINDS)
every_precision = pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
DEPTH = 12


def trained_like(method: Method, dtype: torch.dtype = torch.float64, **kwargs: Any) -> nn.Module:
    """A small network of 12 layers whose LN', norms and PE are as far from their start as training takes them."""
    sizes = {"img_size": (8, 12), "embed_dim": 12, "num_heads": 3, "num_classes": 5}
    model = create_model("vit_narrow_patch4_28", method, **(sizes | kwargs)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name in ("pos_embed", "cls_token", "reg_token"):
                parameter += 0.3 * torch.randn_like(parameter)
            elif parameter.ndim > 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def images(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (8, 12)) -> Tensor:
    return torch.randn(2, 3, *size, dtype=dtype)


# ---- the same answers


@every_precision
@every_kind
def test_folded_equals_unfolded(method: DeliverySpec, dtype: torch.dtype, atol: float) -> None:
    """Logits, tokens, intermediates with and without the Last LN, and what the head receives."""
    model, batch = trained_like(method, dtype), images(dtype)
    folded = fold(model)
    with torch.no_grad():
        assert_close(folded(batch), model(batch), atol)
        tokens, folded_tokens = model.forward_features(batch), folded.forward_features(batch)
        assert_close(folded_tokens, tokens, atol)
        assert_close(
            folded.forward_head(folded_tokens, pre_logits=True), model.forward_head(tokens, pre_logits=True), atol
        )
        for norm in (False, True):
            final, maps = model.forward_intermediates(batch, norm=norm)
            folded_final, folded_maps = folded.forward_intermediates(batch, norm=norm)
            assert_close(folded_final, final, atol)
            for folded_map, plain_map in zip(folded_maps, maps, strict=True):
                assert_close(folded_map, plain_map, atol)


@pytest.mark.parametrize("options", [{"reg_tokens": 2}, {"reg_tokens": 2, "no_embed_class": True}])
@every_kind
def test_folding_knows_tokens_beside_the_patches(method: DeliverySpec, options: dict[str, Any]) -> None:
    """Only the tokens that the mean takes enter the shift of beta, and no other token changes by it."""
    model, batch = trained_like(method, **options), images()
    folded = fold(model)
    assert_close(folded(batch), model(batch), 1e-12)
    assert_close(folded.forward_features(batch), model.forward_features(batch), 1e-12)


@every_kind
def test_the_head_of_a_folded_network_can_be_replaced(method: DeliverySpec) -> None:
    """reset_classifier leaves the constants alone: with the same head, the logits are the same; without, too."""
    model, batch = trained_like(method), images()
    folded = fold(model)
    for classes in (3, 0):
        model.reset_classifier(classes)
        folded.reset_classifier(classes)
        folded.head.load_state_dict(model.head.state_dict())
        assert_close(folded(batch), model(batch), 1e-12)
        assert_close(fold(model)(batch), model(batch), 1e-12)


def test_another_read_out_of_a_folded_network() -> None:
    """The PE may be left out before a mean over tokens only; timm's maximum needs it on every token."""
    model, batch = trained_like("mpvg"), images()
    folded = fold(model)
    for network in (model, folded):
        network.reset_classifier(0, "max")
    assert_close(folded(batch), model(batch), 1e-12)


@pytest.mark.parametrize("method", ["lape", "mpvg"])
def test_a_network_without_head_folds(method: str) -> None:
    model, batch = trained_like(method, num_classes=0), images()
    assert_close(fold(model)(batch), model(batch), 1e-12)


def test_the_network_inside_timms_feature_wrapper_folds() -> None:
    """The wrapper itself is no network of ours and is refused; the network in it can be replaced by its folded copy."""
    wrapped = timm.create_model("mpvg_vit_narrow_patch4_28", method="mpvg", features_only=True, out_indices=(2, 6))
    wrapped = wrapped.double().eval()
    batch = images(size=(28, 28))
    expected = wrapped(batch)
    with pytest.raises(ValueError, match="FeatureGetterNet has no PositionDelivery"):
        fold(wrapped)
    wrapped.model = fold(wrapped.model)
    for one, other in zip(wrapped(batch), expected, strict=True):
        assert_close(one, other, 1e-12)


# ---- what folding leaves


@every_kind
def test_the_original_is_untouched(method: DeliverySpec) -> None:
    """Weights, mode, gradients wanted, class and delivery stay; and no storage is shared with the copy."""
    model = trained_like(method).train()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    folded = fold(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert kinds == [type(module) for module in model.modules()]
    with torch.no_grad():
        for tensor in (*folded.parameters(), *folded.buffers()):
            tensor.zero_()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_kind
def test_a_folded_network_can_be_copied_moved_and_saved(method: DeliverySpec, tmp_path: Path) -> None:
    """deepcopy, another precision and back, and its weights through a file into another folded network."""
    model, batch = trained_like(method), images()
    folded = fold(model)
    expected = folded(batch)
    assert torch.equal(copy.deepcopy(folded)(batch), expected)
    assert_close(copy.deepcopy(folded).float()(batch.float()), expected.float(), 1e-4)

    other = fold(trained_like(method))
    assert (other(batch) - expected).abs().max() > 1e-3
    save_file(folded.state_dict(), tmp_path / "folded.safetensors")
    load_weights(other, tmp_path / "folded.safetensors")
    assert torch.equal(other(batch), expected)


@pytest.mark.parametrize("method", [name for name, spec in WITH_OWN.items() if spec.pool == "avg"])
def test_with_a_mean_a_folded_classifier_costs_gap_and_one_addition_a_layer(method: str) -> None:
    """Every operation is counted: beside the additions, a folded MPVG runs what GAP runs."""
    spec, batch = WITH_OWN[method], images()
    model, gap = trained_like(spec), trained_like("gap")
    served = 0 if spec.first_layer is None else DEPTH - spec.first_layer
    plain, folded, baseline = (operations(net, batch) for net in (model, fold(model), gap))

    assert baseline["aten.add"] == 1 + 2 * DEPTH
    assert folded["aten.add"] == baseline["aten.add"] + served - (not spec.input_pe)
    assert plain["aten.add"] == folded["aten.add"] + (spec.last_index is not None)
    assert baseline["aten.native_layer_norm"] == 2 * DEPTH + 1
    assert plain["aten.native_layer_norm"] == 2 * DEPTH + 1 + served + (spec.last_index is not None)
    del folded["aten.add"], baseline["aten.add"]
    if not spec.input_pe:  # the sum with the PE is what makes the patches contiguous; without it that takes a copy
        baseline["aten.clone"] += 1
    assert folded == baseline


def test_token_maps_of_a_folded_mpvg_keep_one_addition_for_the_last_norm() -> None:
    """What is left of LN'_last(pos_0) has mean zero over the tokens, and beta holds the rest."""
    model, batch = trained_like("mpvg"), images()
    folded = fold(model)
    added = [additions(net.forward_features, batch) for net in (folded, trained_like("pvg"))]
    assert added[0] == added[1] + 1
    constant = model.delivery(model.pos_embed).last.mean(dim=(0, 1))
    assert constant.abs().max() > 0.1
    assert_close(folded.norm.bias, (model.norm.bias + constant).detach(), 1e-12)
    assert folded.delivery.last.mean(dim=1).abs().max() < 1e-12


# ---- refusals


def test_a_folded_network_refuses_training_and_another_size() -> None:
    folded = fold(trained_like("mpvg"))
    with pytest.raises(RuntimeError, match=r"for evaluation: its PE is constant; train the model it was folded from"):
        folded.train()
    assert not folded.training
    assert folded.eval() is folded
    assert folded.train(False) is folded
    with pytest.raises(RuntimeError, match=r"constants of one image size; call set_input_size first, then fold"):
        folded.set_input_size((16, 16))
    with pytest.raises(AssertionError, match="Input height"):
        folded(images(size=(16, 16)))


class OwnNetwork(nn.Module):
    """A user's network, which may call its Last LN anything."""

    def __init__(self) -> None:
        super().__init__()
        self.delivery = PositionDelivery(METHODS["mpvg"], 2, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fold(trained_like("mpvg")), r"FoldedDeliveredVisionTransformer is folded already"),
        (lambda: nn.Linear(2, 2), r"Linear has no PositionDelivery; fold takes a trained network made by mpvg"),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), r"VisionTransformer has no PositionDelivery"),
        (OwnNetwork, r"OwnNetwork has a PositionDelivery but is not a network of this package"),
        (
            lambda: trained_like("mpvg", dynamic_img_size=True),
            r"dynamic_img_size=True resamples .* call set_input_size",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match=message):
        fold(build())


# ---- MPVG is a PVG


def test_a_trained_mpvg_is_a_pvg_whose_last_norm_is_shifted() -> None:
    """The mean of LN'_last(pos_0) over the tokens is one constant, so that beta can hold it.

    That is: the PE at the Last LN changes how a classifier is trained, not which classifiers there are.
    """
    digits = load_digits()
    inputs = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    build: dict[str, Any] = {"depth": 3, "embed_dim": 32, "num_heads": 2, "in_chans": 1, "num_classes": 10}
    model = create_model("vit_mini_patch2_8", "mpvg", **build)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        index = torch.randint(len(inputs), (64,))
        loss = nn.functional.cross_entropy(model(inputs[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()

    with torch.no_grad():
        pos_0 = model.pos_embed
        norm = model.delivery.last_norm
        last = nn.functional.layer_norm(pos_0, (32,), norm.weight, norm.bias, 1e-6)
        constant = last[0].mean(dim=0)
        assert constant.abs().max() > 0.1
        pvg = create_model("vit_mini_patch2_8", "pvg", **build).eval()
        kept = {key: value for key, value in model.state_dict().items() if "last_norm" not in key}
        pvg.load_state_dict(kept, strict=True)

        expected = model(inputs[:100])
        assert (pvg(inputs[:100]) - expected).abs().max() > 1e-2
        pvg.norm.bias += constant
        assert_close(pvg(inputs[:100]), expected, 1e-5)
