"""What the fields of a DeliverySpec beyond the paper's do in networks: a started bias, a random table, other gains."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mpvg.delivery import METHODS, DeliverySpec, Method
from mpvg.models import create_model, load_checkpoint
from mpvg.models.convert import convert
from reference import ref_resampled

PVG, MPVG = METHODS["pvg"], METHODS["mpvg"]
STARTED, RANDOM = replace(PVG, start_beta=True), replace(MPVG, last_table="random")
TOKEN = DeliverySpec(pool="token", first_layer=1, last_index=0)
NARROW: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 2}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 2, 2)}
NETWORKS: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": NARROW,
    "swin_tiny_patch4_window7_224": SWIN,
    "ceit_tiny_patch16_224": NARROW,
    "t2t_vit_7": NARROW,
    "vit_lite_7_patch4_32": NARROW,
    "timm/vit_tiny_patch16_224": NARROW | {"readout": "method"},
}
OWN = [name for name in NETWORKS if not name.startswith("timm/")]
every_network = pytest.mark.parametrize("name", NETWORKS)
every_own = pytest.mark.parametrize("name", OWN)


def build(name: str, method: Method, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    return create_model(name, method, num_classes=5, **NETWORKS[name] | kwargs)


def timms(**kwargs: Any) -> Any:
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **NARROW | kwargs).eval()


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


# ---- the start of the Last LN's bias


@every_network
def test_pvg_with_a_started_bias_starts_as_mpvg_does(name: str) -> None:
    """From the same seed it differs in the bias alone, and gives the same outputs with nothing at the Last LN."""
    mpvg, started, batch = build(name, "mpvg").eval(), build(name, STARTED).eval(), images()
    weights, own = mpvg.state_dict(), started.state_dict()
    assert weights.keys() - own.keys() == {key for key in weights if "last_norm" in key}
    assert [key for key, value in own.items() if not torch.equal(value, weights[key])] == ["norm.bias"]
    torch.testing.assert_close(started(batch), mpvg(batch), rtol=0, atol=1e-5)
    assert (build(name, "pvg").eval()(batch) - mpvg(batch)).abs().max() > 1e-3


def test_with_a_class_token_it_is_the_row_of_the_class_token() -> None:
    """Where that row receives the mean over patches instead, it is that mean."""
    for method in (TOKEN, replace(TOKEN, last_part="mean"), replace(TOKEN, last_gain=0.25)):
        mpvg = build("deit_tiny_patch16_224", method).eval()
        started = build("deit_tiny_patch16_224", replace(method, start_beta=True)).eval()
        with torch.no_grad():
            expected = mpvg.delivery(mpvg.pos_embed).last[0, 0]
        torch.testing.assert_close(started.norm.bias.detach(), expected, rtol=0, atol=1e-6)
        assert expected.abs().max() > 0.1


@pytest.mark.parametrize("registers", [{}, {"reg_tokens": 2}, {"reg_tokens": 2, "no_embed_class": True}])
def test_registers_have_no_part_in_it(registers: dict[str, Any]) -> None:
    model = build("deit_tiny_patch16_224", STARTED, **registers)
    patches = model.pos_embed[0, -model.patch_embed.num_patches :]
    expected = F.layer_norm(patches, (24,), eps=1e-6).mean(dim=0)
    torch.testing.assert_close(model.norm.bias, expected, rtol=0, atol=1e-6)


@every_own
def test_it_starts_again_with_the_network(name: str) -> None:
    """init_weights draws a PE, and starts the bias from that one; gains start again, too."""
    model = build(name, replace(STARTED, gain=0.02))
    with torch.no_grad():
        for parameter in (model.norm.bias, *model.delivery.parameters()):
            parameter += 1
    for options in ({}, {"needs_reset": False}):
        model.init_weights(**options)
        again = model.norm.bias.detach().clone()
        assert again.abs().max() > 1e-3
        if name.startswith("swin"):
            grid, mergings = model.patch_embed.grid_size, [stage.downsample for stage in model.layers]
            expected = model.delivery.start(model.pos_embed, grid, mergings).mean(dim=1)[0]
        else:
            expected = F.layer_norm(model.pos_embed, (24,), eps=model.norm.eps).mean(dim=1)[0]
        torch.testing.assert_close(again, expected.detach(), rtol=0, atol=1e-5)
        for key, parameter in model.delivery.named_parameters():
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if key.endswith("bias") else 0.02))


@every_own
def test_a_checkpoint_that_is_loaded_after_it_wins(name: str, tmp_path: Path) -> None:
    source, model = build(name, "gap"), build(name, STARTED)
    nn.init.normal_(source.norm.bias)
    save_file(source.state_dict(), tmp_path / "gap.safetensors")
    load_checkpoint(model, tmp_path / "gap.safetensors")
    assert torch.equal(model.norm.bias, source.norm.bias)


def test_tokens_that_are_not_pooled_get_the_same_start() -> None:
    pooled, not_pooled = (build("deit_tiny_patch16_224", STARTED, global_pool=pool) for pool in ("avg", ""))
    assert torch.equal(not_pooled.norm.bias, pooled.norm.bias)


@pytest.mark.parametrize("pooling", [{"global_pool": "avg", "class_token": False, "fc_norm": False}, {}])
def test_a_conversion_adds_it_to_the_bias_that_the_network_has(pooling: dict[str, Any]) -> None:
    vit = timms(**pooling)
    nn.init.normal_(vit.norm.bias)
    rows = F.layer_norm(vit.pos_embed, (24,), eps=1e-6)[0]
    expected = vit.norm.bias + (rows.mean(dim=0) if pooling else rows[0])
    started = convert(vit, STARTED)
    torch.testing.assert_close(started.norm.bias, expected, rtol=0, atol=1e-6)


def test_with_attention_pooling_it_is_the_mean_over_tokens() -> None:
    """Not what the attention makes of a PE without an image."""
    vit = timms(global_pool="map", class_token=False)
    expected = F.layer_norm(vit.pos_embed, (24,), eps=1e-6).mean(dim=1)[0]
    torch.testing.assert_close(convert(vit, STARTED).norm.bias, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "start", "message"),
    [
        ({}, "preserve", r"start='preserve' is not possible: start_beta=True changes the outputs; use start='fresh'"),
        ({"global_pool": "avg", "class_token": False, "fc_norm": True}, "fresh", r"start_beta is True, but no LN with"),
        ({"no_embed_class": True}, "fresh", r"start_beta is True, but the class token has no row in the PE"),
    ],
)
def test_a_conversion_in_which_it_cannot_be_is_refused(arguments: dict[str, Any], start: Any, message: str) -> None:
    vit = timms(**arguments)
    with pytest.raises(ValueError, match=message):
        convert(vit, STARTED, start=start)


def test_a_class_token_without_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="start_beta is True, but the class token has no row in the PE; leave it out"):
        build("deit_tiny_patch16_224", replace(TOKEN, start_beta=True), no_embed_class=True)


# ---- gains and parts in a converted network


@pytest.mark.parametrize(
    "method",
    [
        replace(MPVG, gain=0.3, last_gain=0.7),
        replace(MPVG, part="permuted", last_part="mean"),
        replace(MPVG, part="rest", last_detach=True),
        RANDOM,
    ],
)
def test_a_preserved_network_has_its_outputs_until_the_first_step(method: DeliverySpec) -> None:
    vit, batch = timms(), images()
    converted = convert(vit, method, start="preserve")
    assert torch.equal(converted(batch), vit(batch))
    with torch.no_grad():
        for parameter in converted.delivery.parameters():
            parameter += 0.1
    assert (converted(batch) - vit(batch)).abs().max() > 1e-4


# ---- a random table


@every_network
def test_a_random_table_has_the_shape_and_the_seed_of_the_pe(name: str) -> None:
    """It follows the PE through the mergings of a network with stages, and is the same for the same seed."""
    one, other = build(name, RANDOM).eval(), build(name, RANDOM).eval()
    assert one.delivery.table.shape == one.pos_embed.shape
    assert torch.equal(one.delivery.table, other.delivery.table)
    assert one.delivery.table.std().item() == pytest.approx(0.02, rel=0.2)
    plain = build(name, "mpvg").eval()
    plain.load_state_dict({key: value for key, value in one.state_dict().items() if key != "delivery.table"})
    with torch.no_grad():
        last = one.deliver(one.raw_pos_embed()).last
        torch.testing.assert_close(last, plain.deliver(one.delivery.table).last)
        assert (last - plain.deliver(one.pos_embed).last).abs().max() > 0.1
        one.pos_embed.add_(torch.randn_like(one.pos_embed))
        assert torch.equal(one.deliver(one.raw_pos_embed()).last, last)


@every_network
def test_a_random_table_is_never_trained(name: str) -> None:
    model = build(name, RANDOM).train()
    before = model.delivery.table.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images()).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.delivery.table, before)
    assert before.data_ptr() not in {parameter.data_ptr() for parameter in model.parameters()}


@every_own
def test_a_random_table_is_drawn_again_with_the_network(name: str) -> None:
    model = build(name, RANDOM)
    before = model.delivery.table.clone()
    model.init_weights()
    assert not torch.equal(model.delivery.table, before)
    assert model.delivery.table.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:torch.searchsorted")  # timm's own resizing
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "t2t_vit_7"])
def test_a_random_table_is_resampled_with_the_pe(name: str, tmp_path: Path) -> None:
    """By set_input_size, from a file of another image size, and for each image where the size is not fixed."""
    model = build(name, RANDOM)
    save_file(model.state_dict(), tmp_path / "random.safetensors")
    dynamic, loaded = build(name, RANDOM, dynamic_img_size=True), build(name, RANDOM, img_size=64)
    dynamic.load_state_dict(model.state_dict())
    load_checkpoint(loaded, tmp_path / "random.safetensors")
    table, grid = model.delivery.table[0].double(), model.patch_embed.grid_size
    new = (2 * grid[0], 2 * grid[1])
    expected = ref_resampled(table, grid, new, 0).float()
    model.set_input_size(img_size=64)
    for network in (model, loaded):
        torch.testing.assert_close(network.delivery.table[0], expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        last = [network.deliver(network.raw_pos_embed(at), at).last for network, at in ((model, None), (dynamic, new))]
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pick", [lambda: ("gap", RANDOM), lambda: (RANDOM, "gap")])
@every_own
def test_a_random_table_needs_no_place_in_a_file(name: str, pick: Callable[[], Any], tmp_path: Path) -> None:
    """Another method's weights start it, and its weights another method; the report says so."""
    given, wanted = pick()
    source, model = build(name, given), build(name, wanted)
    before = {key: value.clone() for key, value in model.state_dict().items() if key == "delivery.table"}
    save_file(source.state_dict(), tmp_path / "source.safetensors")
    report = load_checkpoint(model, tmp_path / "source.safetensors")
    if before:
        assert report.new["delivery.table"] == "random, as the method says"
        assert report.new[
            "delivery.2.last_norm.weight" if name.startswith("swin") else "delivery.last_norm.weight"
        ] == ("LN' at 1 and 0")
        assert torch.equal(model.delivery.table, before["delivery.table"])
    else:
        assert report.dropped["delivery.table"] == "the method delivers nothing there"


def test_the_report_of_a_load_names_the_gains(tmp_path: Path) -> None:
    save_file(build("deit_tiny_patch16_224", "gap").state_dict(), tmp_path / "gap.safetensors")
    model = build("deit_tiny_patch16_224", replace(MPVG, gain=0.02, last_gain=0.25))
    new = load_checkpoint(model, tmp_path / "gap.safetensors").new
    assert new["delivery.layer_norms.1.weight"] == "LN' at 0.02 and 0"
    assert new["delivery.last_norm.weight"] == "LN' at 0.25 and 0"
