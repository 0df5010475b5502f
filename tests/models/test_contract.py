"""Every network of the README's table with every method: one contract, at reduced size, through the real factories."""

import copy
import io
import multiprocessing
import operator
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from mpvg.analysis.contract import idle_parameters, probe_problems
from mpvg.analysis.networks import SUPPORTED, Support, support_table
from mpvg.delivery import METHODS, DeliverySpec
from mpvg.models import create_model, load_checkpoint, model_names
from mpvg.models.fold import fold
from mpvg.models.network import DeliveredNetwork, delivered_network
from reference import additions, assert_close

PLAIN: dict[str, Any] = {"img_size": (32, 48), "embed_dim": 24, "num_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "ViT, DeiT": PLAIN,
    "Swin": {
        **{"img_size": (32, 48), "patch_size": 2, "window_size": 4, "embed_dim": 8},
        **{"depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 4)},
    },
    "CeiT": PLAIN,
    "T2T-ViT": PLAIN,
    "ViT-Lite": PLAIN | {"img_size": (8, 12)},
    "timm's, read-out kept": PLAIN,
    "timm's, the method's read-out": PLAIN,
}
OTHER_SIZE = {"ViT-Lite": (12, 16)}
PVG, MPVG = METHODS["pvg"], METHODS["mpvg"]
ARMS = {
    "mean": replace(PVG, part="mean"),
    "rest": replace(MPVG, part="rest", last_part="permuted"),
    "permuted": replace(MPVG, part="permuted", last_part="mean"),
    "random": replace(MPVG, last_table="random", last_gain=0.25),
    "detached": replace(MPVG, last_detach=True, gain=0.02),
    "started": replace(PVG, start_beta=True),
}
"""Methods that the paper does not have, with every field that a spec has beyond the paper's."""
CELLS = [(column, method) for column in SUPPORTED for method in METHODS]
every_cell = pytest.mark.parametrize(("column", "method"), CELLS)
KINDS = ["default", "lape_gap", "pvg", "mpvg", "mpvg_flat", "gap_last0"]
every_kind = pytest.mark.parametrize(("column", "method"), [(c, m) for c in SUPPORTED for m in KINDS])
every_kind_and_arm = pytest.mark.parametrize(("column", "method"), [(c, m) for c in SUPPORTED for m in [*KINDS, *ARMS]])
every_cell_and_arm = pytest.mark.parametrize(("column", "method"), CELLS + [(c, m) for c in SUPPORTED for m in ARMS])
every_network = pytest.mark.parametrize("column", SUPPORTED)


@cache
def table() -> dict[str, dict[str, Support]]:
    return support_table()


def spec_of(method: str) -> DeliverySpec:
    return ARMS.get(method) or METHODS[method]


def sizes(column: str, method: str) -> dict[str, Any]:
    """Of three layers, unless the method needs the family's own depth."""
    shallow = column != "Swin" and (spec_of(method).last_index or 0) < 3
    return SMALL[column] | ({"depth": 3} if shallow else {})


def build(column: str, method: str, **kwargs: Any) -> nn.Module:
    """The column's network, reduced, in float64, in which no parameter is where it starts."""
    name, arguments = SUPPORTED[column]
    options = arguments | sizes(column, method) | kwargs
    model = create_model(name, spec_of(method), num_classes=5, **options).double().eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if not part.startswith("patch_embed.attention"):  # the exponentials of T2T's performers would saturate
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def images(column: str, size: tuple[int, int] | None = None) -> Tensor:
    return torch.randn(2, 3, *(size or SMALL[column]["img_size"]), dtype=torch.float64)


def supported(column: str, method: str) -> bool:
    """Whether a cell runs; the others are tested as refusals."""
    return method in ARMS or table()[method][column].refused is None


def test_every_registered_family_has_a_column() -> None:
    """A new family fails here until it is in the table, and so in every test below."""
    swin = {"depths": (1,), "num_heads": (1,)}
    with torch.device("meta"):
        families = {
            type(create_model(name, "default", **(swin if name.startswith("swin") else {"depth": 1})))
            for name in model_names()
        }
        columns = {type(build(column, "default")) for column in SUPPORTED}
    assert families == columns
    assert SMALL.keys() == SUPPORTED.keys()


@every_cell
def test_a_cell_of_the_table_is_what_it_says(column: str, method: str) -> None:
    """yes: it runs and its logits are finite; = x: with the same weights x gives the same; no: refused, so."""
    cell = table()[method][column]
    if cell.refused:
        name, arguments = SUPPORTED[column]
        with pytest.raises(ValueError, match=re.escape(cell.refused)):
            create_model(name, method, **arguments)
        return
    model, batch = build(column, method), images(column)
    logits = model(batch)
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    assert_close(model.forward_head(model.forward_features(batch)), logits, 1e-10)
    if cell.same_as:
        twin = build(column, cell.same_as)
        twin.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(twin(batch), logits)
    else:
        earlier = [m for m in METHODS if m != method and supported(column, m) and build_spec(column, m) == model.spec]
        assert all(table()[m][column].same_as == method for m in earlier)


@cache
def build_spec(column: str, method: str) -> Any:
    return build(column, method).spec


@every_cell_and_arm
def test_every_parameter_that_asks_for_a_gradient_gets_one(column: str, method: str) -> None:
    """With the PE delivered, no LN' idles; LeFF's constants before a BatchNorm, and the last LeFF behind a class token
    that passes it by, are CeiT's own exceptions, which its tests state. A constant in the last layer's LN' is what
    part="rest" takes away, and no later LN' takes it.
    """
    if not supported(column, method):
        return
    model = build(column, method)
    idle = idle_parameters(model, images(column))
    if column == "CeiT":
        idle = [name for name in idle if ".mlp." not in name and ".norm2." not in name]
    norms = [name for name, _ in model.named_parameters() if ".layer_norms." in name]
    assert idle == (norms[-1:] if model.spec.part == "rest" else [])


@every_cell_and_arm
def test_folded_gives_the_same_with_one_addition_a_served_layer(column: str, method: str) -> None:
    """The folded graph has GAP's additions and one for each served layer, exactly, and where the class token is read
    out one for the Last LN.
    """
    if not supported(column, method):
        return
    model, batch = build(column, method), images(column)
    folded = fold(model)
    with torch.no_grad():
        assert_close(folded(batch), model(batch), 1e-10)
        assert_close(folded.forward_features(batch), model.forward_features(batch), 1e-10)
        for one, other in zip(
            folded.forward_intermediates(batch)[1], model.forward_intermediates(batch)[1], strict=True
        ):
            assert_close(one, other, 1e-10)
    assert not list(folded.delivery.parameters())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    spec = model.spec
    served = 0 if spec.first_layer is None else len(model.blocks) - spec.first_layer
    kept = spec.pool == "token" and spec.last_index is not None
    assert additions(folded, batch) == additions_of_gap(column, len(model.blocks)) + served + kept - (not spec.input_pe)
    assert len([name for name, _ in folded.delivery.named_buffers() if name.startswith("layer_")]) == served


@cache
def additions_of_gap(column: str, depth: int) -> int:
    model = build(column, "gap", **({} if column == "Swin" else {"depth": depth}))
    assert len(model.blocks) == depth
    return additions(model, images(column))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save])
@every_network
def test_a_folded_network_can_be_copied_and_pickled(column: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    """The copy has the same class, weights and outputs, shares no storage, and still refuses training."""
    folded, batch = fold(build(column, "mpvg")), images(column)
    expected = folded(batch)
    again = copied(folded)
    assert type(again) is type(folded)
    assert torch.equal(again(batch), expected)
    with pytest.raises(RuntimeError, match="for evaluation: its PE is constant; train the model it was folded from"):
        again.train()
    with pytest.raises(RuntimeError, match="constants of one image size; call set_input_size first"):
        again.set_input_size(images(column).shape[-2:])
    with torch.no_grad():
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.zero_()
    assert torch.equal(folded(batch), expected)


def test_a_fresh_process_runs_folded_networks() -> None:
    """A server starts its workers so: nothing but the pickled network reaches them."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        for column in SUPPORTED:
            folded, batch = fold(build(column, "mpvg")), images(column)
            assert_close(pool.apply(operator.call, (folded, batch)), folded(batch), 1e-12)


@every_network
def test_a_network_has_all_of_its_protocol(column: str) -> None:
    model = build(column, "mpvg")
    for network in (delivered_network(model), delivered_network(fold(model))):
        assert not [name for name in dir(DeliveredNetwork) if not name.startswith("_") and not hasattr(network, name)]
        assert network.probe is None
        tokens = len(network.deliver(network.raw_pos_embed()).last[0])
        assert tokens == network.num_prefix_tokens + len(
            model.forward_intermediates(images(column))[1][-1][0, 0].flatten()
        )


def test_a_network_without_a_delivered_pe_is_named() -> None:
    with pytest.raises(ValueError, match=r"Linear does not receive a delivered PE \(it has no delivery\); use mpvg"):
        delivered_network(nn.Linear(2, 2))


@every_kind
def test_intermediates_come_from_the_same_loop(column: str, method: str) -> None:
    model, batch = build(column, method), images(column)
    final, maps = model.forward_intermediates(batch)
    assert_close(final, model.forward_features(batch), 0)
    info = model.feature_info
    assert [m.shape[1] for m in maps] == [entry["num_chs"] for entry in info]
    height, width = SMALL[column]["img_size"]
    assert [tuple(m.shape[2:]) for m in maps] == [(height // i["reduction"], width // i["reduction"]) for i in info]
    some = model.forward_intermediates(batch, [0, -1], intermediates_only=True)
    assert torch.equal(some[0], maps[0])
    assert torch.equal(some[1], maps[-1])
    if column != "CeiT":  # whose Last LN is not on tokens
        normalized = model.forward_intermediates(batch, [-1], norm=True, intermediates_only=True)[0].flatten(2)
        tokens = final.flatten(1, -2).transpose(1, 2)
        assert torch.equal(normalized, tokens[..., tokens.shape[-1] - normalized.shape[-1] :])


@every_kind
def test_timms_feature_wrapper_gives_these_maps(column: str, method: str) -> None:
    """It keeps no layer that it does not need, and nothing that such a layer or the Last LN received."""
    name, arguments = SUPPORTED[column]
    if name.startswith("timm/"):  # a converted network is no entry of timm's registry
        return
    model, batch = build(column, method), images(column)
    options = {"method": method, "features_only": True, "out_indices": (0, 1)}
    wrapped = timm.create_model(f"mpvg_{name}", **options, **arguments, **sizes(column, method)).double().eval()
    state = model.state_dict()
    wrapped.model.load_state_dict({key: state[key] for key in wrapped.model.state_dict()}, strict=True)
    expected = model.forward_intermediates(batch, [0, 1], intermediates_only=True)
    for one, other in zip(wrapped(batch), expected, strict=True):
        assert torch.equal(one, other)
    infos = model.feature_info[:2]
    assert wrapped.feature_info.channels() == [info["num_chs"] for info in infos]
    assert wrapped.feature_info.reduction() == [info["reduction"] for info in infos]
    assert len(wrapped.model.blocks) == (4 if column == "Swin" else 2)
    assert not [key for key in wrapped.model.state_dict() if re.match(r"norm\.|head|delivery.*last_norm", key)]
    wrapped.train()(batch)[1].sum().backward()
    idle = [key for key, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


PRUNED = [("lape_gap", False), ("mpvg", False), ("mpvg_flat", False), ("gap_last0", True), ("mpvg", True)]
PRUNED += [("random", True), ("random", False), ("permuted", True)]


@pytest.mark.parametrize(("method", "norm"), PRUNED)
@every_network
def test_a_pruned_network_keeps_its_intermediates(column: str, method: str, norm: bool) -> None:
    """Pruning, before folding or after, removes the head and what is unused, and changes no value that is left."""
    if norm and column == "CeiT":  # whose Last LN is not on tokens
        return
    model, batch, indices = build(column, method), images(column), [0, 1]
    take = {"norm": norm, "intermediates_only": True}
    expected = model.forward_intermediates(batch, indices, **take)
    folded = fold(model)
    for network in (model, folded):
        assert network.prune_intermediate_layers(indices, prune_norm=not norm) == indices
    assert all(map(torch.equal, model.forward_intermediates(batch, indices, **take), expected))
    for network in (folded, fold(model)):
        for one, other in zip(network.forward_intermediates(batch, indices, **take), expected, strict=True):
            assert_close(one, other, 1e-10)
        layers = [key for key, _ in network.delivery.named_buffers() if key.startswith("layer_")]
        assert len(layers) == (0 if model.spec.first_layer is None else len(network.blocks) - model.spec.first_layer)
    maps = model.forward_intermediates(batch, indices, **take)
    sum((value * torch.randn_like(value)).sum() for value in maps).backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle


@every_kind
def test_gradient_checkpointing_changes_nothing(column: str, method: str) -> None:
    """Same loss and same gradients, those of LN' included, although the PE comes from outside the checkpoint."""
    model = build(column, method, attn_drop_rate=0.0).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch, results, ran = images(column), [], []
    for enable in (False, True):
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing(enable)
        twin.blocks[1].checkpointed = enable
        twin.blocks[1].register_forward_pre_hook(lambda module, _: ran.append(module.checkpointed))
        loss = twin(batch).square().sum()
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}))
    assert ran == [False, True, True]  # once more on the way back
    assert_close(results[0][0], results[1][0], 1e-10)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        assert_close(results[1][1][name], gradient, 1e-10)


@every_kind_and_arm
def test_a_probe_sees_what_is_delivered(column: str, method: str) -> None:
    """Each layer's part and the Last LN's; CeiT pools the latter before its Last LN."""
    assert not probe_problems(build(column, method), images(column))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:torch.searchsorted")  # timm's own resizing
@every_kind_and_arm
def test_another_image_size_runs_and_folds(column: str, method: str) -> None:
    """The raw PE is resampled and then delivered; a network built at that size takes the weights."""
    model, size = build(column, method), OTHER_SIZE.get(column, (64, 32))
    model.set_input_size(img_size=size)
    batch = images(column, size)
    logits = model(batch)
    assert logits.shape == (2, 5)
    assert_close(fold(model)(batch), logits, 1e-10)


@every_kind
def test_layer_decay_puts_each_layer_norm_at_the_rate_of_its_layer(column: str, method: str) -> None:
    model: Any = build(column, method)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    rate = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(rate) == sorted(id(p) for group in optimizer.param_groups for p in group["params"])  # in one group
    assert rate.keys() == {id(p) for p in named.values()}
    assert {name for name, p in named.items() if decay[id(p)]} == decayed(model)
    assert all(rate[id(p)] == 1 for p in model.get_classifier().parameters())
    stem = [rate[id(p)] for name, p in named.items() if name == "pos_embed" or name.startswith("patch_embed.")]
    assert len(set(stem)) == 1
    blocks = {id(block): name for name, block in model.named_modules()}
    layer_rates = [rate[id(named[f"{blocks[id(block)]}.norm1.weight"])] for block in model.blocks]
    assert sorted({stem[0], *layer_rates}) == [stem[0], *layer_rates]  # one for each layer, upwards
    deliveries = [model.delivery] if not isinstance(model.delivery, nn.ModuleList) else list(model.delivery)
    layer: Any = 0
    for delivery in deliveries:
        for key, norm in delivery.layer_norms.items():
            assert rate[id(norm.weight)] == layer_rates[layer + int(key)]
            assert decay[id(norm.weight)] == decay[id(norm.bias)] == 0
        layer += delivery.depth
    if deliveries[-1].last_norm is not None:
        assert rate[id(deliveries[-1].last_norm.weight)] == rate[id(named["norm.weight"])] < 1


def decayed(model: Any) -> set[str]:
    """The parameters that weight decay reaches: no bias, no norm, and nothing that the network exempts."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    exempt = [name for name in named if any(name.endswith(end) for end in model.no_weight_decay())]
    return {name for name, parameter in named.items() if parameter.ndim > 1} - set(exempt)


# ViT-Lite's repository decays the PE and the class token, T2T-ViT's PE is frozen, and Swin has no class token.
EXEMPT = {"ViT-Lite": set[str](), "T2T-ViT": {"cls_token"}, "Swin": {"pos_embed"}}


@every_network
def test_no_weight_decay_on_norms_and_what_the_network_exempts(column: str) -> None:
    model = build(column, "default")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    reached = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in reached}
    assert names == decayed(model)
    matrices = {name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    assert {name for name in matrices - names if "relative_position_bias_table" not in name} == EXEMPT.get(
        column, {"pos_embed", "cls_token"}
    )


@every_kind_and_arm
def test_another_methods_weights_start_it_and_a_file_brings_back_its_own(
    column: str, method: str, tmp_path: Path
) -> None:
    """From the published baseline: what both have is equal, and the rest is reported; and from itself: everything."""
    source = build(column, "default")
    save_file(source.state_dict(), tmp_path / "default.safetensors")
    model = build(column, method)
    grid = "x".join(map(str, model.patch_embed.grid_size))  # not square, so that a file alone does not tell
    report = load_checkpoint(model, f"{tmp_path}/default.safetensors::grid={grid}")
    state, given = model.state_dict(), source.state_dict()
    for key in report.taken:
        if state[key].shape == given[key].shape:
            assert torch.equal(state[key], given[key]), key
    assert {*report.taken, *report.resampled, *report.new} == state.keys()
    assert all(key.startswith("delivery.") for key in report.new)
    assert {key.split("[")[0] for key in report.dropped} <= {"cls_token", "pos_embed"}

    save_file(model.state_dict(), tmp_path / "own.safetensors")
    other, batch = build(column, method), images(column)
    assert (other(batch) - model(batch)).abs().max() > 1e-4
    assert not load_checkpoint(other, f"{tmp_path}/own.safetensors::grid={grid}").new
    assert torch.equal(other(batch), model(batch))


EXPORTED = [*((column, "mpvg") for column in SUPPORTED), ("ViT, DeiT", "permuted")]


@pytest.mark.parametrize(("column", "method"), EXPORTED)
def test_an_exported_network_equals_the_network(column: str, method: str) -> None:
    """torch.export, as deployment needs it: unfolded and folded."""
    batch = images(column)
    model = build(column, method, **({} if column == "Swin" else {"depth": 2}))
    for network in (model, fold(model)):
        with torch.no_grad():
            program = torch.export.export(network, (batch,))
            assert_close(program.module()(batch), network(batch), 1e-9)


@every_network
def test_the_same_seed_makes_the_same_network(column: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(build(column, "mpvg").state_dict())
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key
