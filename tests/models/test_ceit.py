"""CeiT with a delivered PE, against a plain loop over weights under the names of coeusguo/ceit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Mlp
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from mpvg.delivery import METHODS, DeliverySpec, Method, as_spec
from mpvg.models import create_model, load_checkpoint
from mpvg.models.ceit import CeiT
from mpvg.models.checkpoints import translate
from mpvg.models.fold import fold
from reference import (
    assert_close,
    operations,
    ref_attention,
    ref_delivered,
    ref_gelu,
    ref_linear,
    ref_mlp,
    ref_norm,
    ref_resampled,
    windows,
)

NAME = "ceit_tiny_patch16_224"
OWN = {
    "own": DeliverySpec(first_layer=0, hierarchical=False, last_index=3),
    # No method of the paper's reads out the class token and delivers to the Last LN.
    "own_token": DeliverySpec(pool="token", first_layer=0, last_index=0),
}
WITH_OWN = {**METHODS, **OWN}
KINDS = ["default", "lape", "pvg", "gap_last0", "mpvg", "mpvg_last5", "own_token"]
every_kind = pytest.mark.parametrize("method", [WITH_OWN[name] for name in KINDS], ids=KINDS)
LOOPED = [*KINDS, "gap", "lape_gap", "mpvg_flat", "mpvg_no_input_pe", "own"]

DEPTH, DIM, HEADS, HIDDEN, CLASSES, EPS, BN_EPS = 12, 12, 3, 24, 5, 1e-6, 1e-5
IMAGE, GRID = (32, 48), (2, 3)  # an image that is not square tells rows from columns
SIZES: dict[str, Any] = {"img_size": IMAGE, "embed_dim": DIM, "num_heads": HEADS, "mlp_ratio": HIDDEN / DIM}


def images(size: tuple[int, int] = IMAGE, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, dtype=torch.float64)


# ---- weights under the original names


def published_shapes(dim: int, hidden: int, classes: int, rows: int, *, token: bool = True) -> dict[str, Any]:
    """The entries of a checkpoint of coeusguo/ceit with 12 layers."""
    shapes: dict[str, Any] = {"pos_embed": (1, rows, dim), "pos_layer_embed": (1, DEPTH, dim)}
    if token:
        shapes["cls_token"] = (1, 1, dim)

    def add(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def add_batch_norm(name: str, channels: int) -> None:
        add(name, channels)
        shapes.update({f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)})
        shapes[f"{name}.num_batches_tracked"] = ()

    def add_attention(name: str) -> None:
        for norm in ("norm1", "norm2"):
            add(f"{name}.{norm}", dim)
        add(f"{name}.attn.qkv", 3 * dim, dim)
        add(f"{name}.attn.proj", dim, dim)

    add("i2t.backbone.conv", 64, 3, 7, 7, bias=False)
    add_batch_norm("i2t.backbone.bn", 64)
    add("i2t.proj", dim, 64, 4, 4)
    for layer in range(DEPTH):
        add_attention(f"blocks.{layer}")
        convs = {1: (hidden, dim, 1, 1), 2: (hidden, 1, 3, 3), 3: (dim, hidden, 1, 1)}
        for number, shape in convs.items():
            add(f"blocks.{layer}.leff.conv{number}", *shape)
            add_batch_norm(f"blocks.{layer}.leff.bn{number}", shape[0])
    add_attention("lca")
    add("lca.feedforward.fc1", hidden, dim)
    add("lca.feedforward.fc2", dim, hidden)
    add("norm", dim)
    add("head", classes, dim)
    return shapes


def random_weights(spec: DeliverySpec) -> dict[str, Tensor]:
    """Random tensors under the original names, and those of the delivery under ours."""
    token = spec.pool == "token"
    shapes = published_shapes(DIM, HIDDEN, CLASSES, 6 + token, token=token)
    served = range(DEPTH if spec.first_layer is not None else 0)[spec.first_layer or 0 :]
    norms = [f"layer_norms.{layer}" for layer in served] + ["last_norm"] * (spec.last_index is not None)
    shapes |= {f"delivery.{norm}.{name}": (DIM,) for norm in norms for name in ("weight", "bias")}
    weights = {}
    for name, shape in shapes.items():
        value = 0.3 * torch.randn(shape, dtype=torch.float64)
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(7)
        elif name.endswith("running_var"):
            value = value.abs() + 0.5
        elif name.endswith(".weight") and len(shape) == 1:
            value = value + 1
        weights[name] = value
    return weights


def network(method: Method, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    """A network of 12 narrow layers in float64, and the weights that it was given, under the original names."""
    weights = random_weights(as_spec(method))
    model = create_model(NAME, method, num_classes=CLASSES, **SIZES | kwargs).double().eval()
    translated, layout = translate(weights, CeiT.layouts)
    assert layout is not None
    assert layout.source == "coeusguo/ceit"
    model.load_state_dict(translated, strict=True)
    return model, weights


# ---- the reference


def ref_batch_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Over the last dimension, with running statistics."""
    mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    return (x - mean) / torch.sqrt(variance + BN_EPS) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def ref_stem(image: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, int, int]:
    """Tokens (N, D), and the rows and columns of patches."""
    kernel = weights["i2t.backbone.conv.weight"].flatten(1)
    found, high, wide = windows(image, 7, 2, 3)
    rows = ref_batch_norm(torch.stack([kernel @ w.flatten() for w in found]), weights, "i2t.backbone.bn")
    found, high, wide = windows(rows.T.reshape(-1, high, wide), 3, 2, 1, fill=-math.inf)
    maps = torch.stack([w.amax(dim=(1, 2)) for w in found]).T.reshape(-1, high, wide)
    found, high, wide = windows(maps, 4, 4)
    return ref_linear(torch.stack([w.flatten() for w in found]), weights, "i2t.proj"), high, wide


def ref_leff(x: Tensor, weights: dict[str, Tensor], name: str, high: int, wide: int) -> Tensor:
    """Patches (N, D) to patches."""
    x = ref_gelu(ref_batch_norm(ref_linear(x, weights, f"{name}.conv1"), weights, f"{name}.bn1"))
    kernel, bias = weights[f"{name}.conv2.weight"][:, 0], weights[f"{name}.conv2.bias"]
    found, _, _ = windows(x.T.reshape(-1, high, wide), 3, 1, 1)
    x = torch.stack([(kernel * w).sum(dim=(1, 2)) + bias for w in found])
    x = ref_gelu(ref_batch_norm(x, weights, f"{name}.bn2"))
    return ref_batch_norm(ref_linear(x, weights, f"{name}.conv3"), weights, f"{name}.bn3")


def ref_last_attention(x: Tensor, weights: dict[str, Tensor], name: str, queries: int) -> Tensor:
    """What the last `queries` rows of x get from all rows."""
    weight, bias = weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"]
    q = x[len(x) - queries :] @ weight[:DIM].T + bias[:DIM]
    k = x @ weight[DIM : 2 * DIM].T + bias[DIM : 2 * DIM]
    v = x @ weight[2 * DIM :].T + bias[2 * DIM :]
    return ref_linear(ref_attention(q, k, v, HEADS), weights, f"{name}.proj")


def ref_lca(vectors: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Vectors of the layers (L, D) to one (D)."""
    vectors = vectors + weights["pos_layer_embed"][0]
    x = vectors[-1] + ref_last_attention(ref_norm(vectors, weights, "lca.norm1", EPS), weights, "lca.attn", 1)[0]
    return x + ref_mlp(ref_norm(x, weights, "lca.norm2", EPS), weights, "lca.feedforward.fc1", "lca.feedforward.fc2")


def ref_ceit(
    weights: dict[str, Tensor],
    spec: DeliverySpec,
    image: Tensor,
    *,
    pos: Tensor | None = None,
    read_from: str = "layers",
) -> dict[str, Any]:
    """Runs one image (C, H, W); under "default" this is the published network."""
    pos = weights["pos_embed"][0] if pos is None else pos
    token = spec.pool == "token"
    x, high, wide = ref_stem(image, weights)
    x = torch.cat([weights["cls_token"][0], x]) if token else x
    x = x + pos if spec.input_pe else x
    per_layer, last = ref_delivered(spec, weights, pos, DEPTH, EPS)

    def pooled(tokens: Tensor) -> Tensor:
        return tokens[0] if token else tokens.mean(dim=0)

    layers = []
    for layer in range(DEPTH):
        name = f"blocks.{layer}"
        attended = ref_norm(x, weights, f"{name}.norm1", EPS) + per_layer[layer]
        x = x + ref_last_attention(attended, weights, f"{name}.attn", len(x))
        update = ref_norm(x, weights, f"{name}.norm2", EPS)
        patches = ref_leff(update[token:], weights, f"{name}.leff", high, wide)
        x = x + torch.cat([update[:token], patches])
        layers.append(x)
    if read_from == "tokens":
        vector = pooled(ref_norm(x, weights, "norm", EPS) + last)
    else:
        vector = ref_lca(torch.stack([pooled(tokens) for tokens in layers]), weights)
        vector = ref_norm(vector, weights, "norm", EPS) + pooled(last)
    return {"layers": layers, "vector": vector, "logits": ref_linear(vector, weights, "head")}


def reference(weights: dict[str, Tensor], method: Method, batch: Tensor, key: str = "logits", **kwargs: Any) -> Tensor:
    return torch.stack([ref_ceit(weights, as_spec(method), image, **kwargs)[key] for image in batch])


# ---- sizes and start


def test_a_published_checkpoint_fits_entry_by_entry() -> None:
    """All 375 entries of CeiT-Ti get a place of their shape, the counters of its BatchNorms included."""
    shapes = published_shapes(192, 768, 1000, 197)
    assert len(shapes) == 375
    translated, _ = translate({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, CeiT.layouts)
    with torch.device("meta"):
        wanted = create_model(NAME, "default").state_dict()
    assert {name: t.shape for name, t in translated.items()} == {name: t.shape for name, t in wanted.items()}
    assert sum(name.endswith("num_batches_tracked") for name in translated) == 37


def test_own_names_are_nobody_elses() -> None:
    """A checkpoint of this package is not taken for one of the original repository, though names are shared."""
    state = create_model(NAME, "mpvg", num_classes=CLASSES, **SIZES).state_dict()
    assert translate(state, CeiT.layouts) == (state, None)


@pytest.mark.parametrize(
    ("name", "method", "count"),
    [
        (NAME, "default", 6_356_904),
        (NAME, "lape", 6_361_512),
        (NAME, "pvg", 6_360_744),
        (NAME, "mpvg", 6_361_128),
        (NAME, "gap", 6_356_520),
        (NAME, "pvg_token", 6_361_128),
        ("ceit_small_patch16_224", "default", 24_204_840),
        ("ceit_base_patch16_224", "default", 94_405_416),
    ],
)
def test_parameters_are_counted_to_the_last(name: str, method: str, count: int) -> None:
    """Tiny is the paper's 6.356 M and 6.361 M, but for PVG; small is published as 24.2 M."""
    with torch.device("meta"):
        model = create_model(name, method)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_start_is_that_of_the_original() -> None:
    """Linear layers at std 0.02 and 0, the LCA's too, convolutions as torch makes them, layers' embedding at 0."""
    model: Any = create_model(NAME, "default", depth=1, embed_dim=768)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert 0.018 < module.weight.std() < 0.022, name
            assert not module.bias.any(), name
        elif isinstance(module, nn.Conv2d):  # uniform, of variance 1 / (3 fan_in)
            fan_in = module.weight[0].numel()
            assert module.weight.abs().max() <= 1 / math.sqrt(fan_in), name
            assert module.weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.05), name
            assert module.bias is None or module.bias.abs().max() > 0, name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == EPS, name
    for value in (model.cls_token, model.pos_embed):
        assert 0.018 < value.std() < 0.022
    assert not model.pos_layer_embed.any()
    assert isinstance(model.lca.mlp, Mlp)
    model.pos_layer_embed.data.fill_(1)
    model.init_weights()
    assert not model.pos_layer_embed.any()


def test_options_of_the_layers_are_those_of_the_lca() -> None:
    """All but stochastic depth, which the original leaves out there."""
    options = {"mlp_ratio": 3, "qkv_bias": False, "qk_norm": True, "init_values": 0.1, "attn_drop_rate": 0.2}
    norm = nn.LayerNorm
    model: Any = create_model(
        NAME, "mpvg", **SIZES | options, proj_drop_rate=0.3, drop_path_rate=0.4, norm_layer=norm, act_layer="relu"
    )
    layer = model.blocks[-1]
    assert model.lca.mlp.fc1.weight.shape == layer.mlp.conv1.weight.shape[:2] == (36, 12)
    for attention in (layer.attn, model.lca.attn):
        assert attention.qkv.bias is None
        assert isinstance(attention.q_norm, norm)
        assert (attention.attn_drop.p, attention.proj_drop.p, attention.num_heads) == (0.2, 0.3, HEADS)
    assert model.lca.norm1.eps == layer.norm1.eps == model.delivery.last_norm.eps == 1e-5
    assert isinstance(model.lca.mlp.act, nn.ReLU)
    assert isinstance(layer.mlp.act, nn.ReLU)
    assert model.lca.ls1.gamma.shape == (DIM,)
    assert layer.drop_path1.drop_prob == pytest.approx(0.4)
    assert isinstance(model.lca.drop_path1, nn.Identity)
    assert model(images().float()).isfinite().all()


# ---- values


@pytest.mark.parametrize("method", [WITH_OWN[name] for name in LOOPED], ids=LOOPED)
def test_the_network_equals_the_plain_loop(method: DeliverySpec) -> None:
    """Tokens after every layer, the vector behind the Last LN, and logits; "default" is the published network."""
    model, weights = network(method)
    batch = images()
    vector, layers = model.forward_intermediates(batch, return_prefix_tokens=True, output_fmt="NLC")
    for index, image in enumerate(batch):
        expected = ref_ceit(weights, method, image)
        for layer, tokens in enumerate(expected["layers"]):
            parts = layers[layer]
            found = parts[index] if method.pool == "avg" else torch.cat([parts[1][index], parts[0][index]])
            assert_close(found, tokens)
        assert_close(vector[index], expected["vector"])
        assert_close(model(batch)[index], expected["logits"])
    assert_close(model.forward_features(batch), vector, 1e-12)
    assert_close(model.forward_head(vector), model(batch), 1e-12)
    assert_close(model.forward_head(vector, pre_logits=True), vector, 0)


FLIPPED = ["pos_layer_embed", "pos_embed", "i2t.backbone.bn.running_mean", "blocks.11.leff.bn3.running_var"]
FLIPPED += [
    "blocks.0.leff.conv2.weight",
    "lca.attn.qkv.bias",
    "delivery.last_norm.weight",
    "delivery.layer_norms.1.bias",
]


@pytest.mark.parametrize("name", FLIPPED)
def test_no_weight_is_without_effect(name: str) -> None:
    """A reference in which one tensor is turned over is far away, so that the comparison above is tested by it."""
    model, weights = network("mpvg")
    batch = images(count=1)
    turned = weights | {name: weights[name].flip(-2 if name.startswith("pos") else -1)}
    assert_close(model(batch), reference(weights, "mpvg", batch))
    assert (model(batch) - reference(turned, "mpvg", batch)).abs().max() > 1e-3


def test_the_class_token_passes_the_convolutions_by() -> None:
    """Its update is LN2 of itself, and no patch sees it there."""
    model, _ = network("default")
    leff = model.blocks[0].mlp
    tokens = torch.randn(2, 7, DIM, dtype=torch.float64)
    out = leff(tokens)
    assert torch.equal(out[:, 0], tokens[:, 0])
    tokens[:, 0] += 1
    assert torch.equal(leff(tokens)[:, 1:], out[:, 1:])
    tokens[0, 1] += 1  # the corner: its neighbors in 2 x 3 patches are all but the last column
    changed = (leff(tokens)[0, 1:] - out[0, 1:]).abs().amax(dim=1) > 1e-6
    assert changed.tolist() == [True, True, False, True, True, False]


# ---- training


def gradients(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = (model(batch) * torch.linspace(-1, 2, CLASSES, dtype=torch.float64)).square().sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_kind
def test_every_parameter_gets_a_gradient(method: DeliverySpec) -> None:
    """With statistics of the batch and with running ones.

    The exceptions are CeiT's own: statistics of the batch take a constant in front of a BatchNorm off again, and no
    class token ever hears of the patches that the last LeFF makes.
    """
    model, _ = network(method)
    deaf = f"blocks.{DEPTH - 1}.mlp." if method.pool == "token" else "nothing"
    for training in (True, False):
        _, found = gradients(model.train(training), images())
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, gradient in found.items():
            constant = name.endswith(".bias") and (".mlp.conv" in name or (method.pool == "avg" and ".norm2." in name))
            taken_off = training and name.startswith("blocks.") and constant
            assert (gradient.abs().max() > 1e-9) != (taken_off or name.startswith(deaf)), (name, training)


def test_under_gradient_checkpointing_a_batch_counts_twice() -> None:
    """In the running statistics, since a layer runs twice; loss and gradients are the same (test_contract.py)."""
    model, _ = network("mpvg")
    model.set_grad_checkpointing()
    gradients(model.train(), images())
    assert model.blocks[0].mlp.bn1.num_batches_tracked == 7 + 2


def test_training_moves_the_running_statistics() -> None:
    model, weights = network("mpvg")
    model.train()(images())
    translated, _ = translate(weights, CeiT.layouts)
    for name, value in model.state_dict().items():
        assert torch.equal(value, translated[name]) != ("running_" in name or "num_batches" in name), name


@pytest.mark.parametrize("method", [WITH_OWN["own_token"], WITH_OWN["mpvg"]], ids=["own_token", "mpvg"])
def test_layer_decay_puts_each_part_beside_its_pair(method: DeliverySpec) -> None:
    """The stem at its own rate, LN'_l at that of layer l, the LCA at that of the Last LN, none at that of the head."""
    model, _ = network(method)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert groups.keys() == {id(parameter) for parameter in named.values()}
    scale = {name: groups[id(parameter)]["lr_scale"] for name, parameter in named.items()}
    decay = {name: groups[id(parameter)]["weight_decay"] for name, parameter in named.items()}

    assert scale["head.weight"] == 1
    assert len({scale[f"blocks.{layer}.norm1.weight"] for layer in range(DEPTH)}) == DEPTH
    assert scale["blocks.11.norm1.weight"] == scale["norm.weight"] < 1  # so timm has it: no step between the two
    pairs = {"patch_embed.": "pos_embed", "cls_token": "pos_embed", "lca.": "norm.weight"}
    pairs |= {"pos_layer_embed": "norm.weight", "delivery.last_norm": "norm.weight"}
    for kind in ("blocks", "delivery.layer_norms"):
        pairs |= {f"{kind}.{layer}.": f"blocks.{layer}.norm1.weight" for layer in range(DEPTH)}
    for name in named:
        for start, pair in pairs.items():
            assert not name.startswith(start) or scale[name] == scale[pair], name
        exempt = name in ("pos_embed", "cls_token") or named[name].ndim == 1
        assert decay[name] == (0 if exempt else 0.05), name
    assert scale["pos_embed"] < scale["blocks.0.norm1.weight"]


# ---- image sizes


@pytest.mark.parametrize(("size", "grid"), [((48, 32), (3, 2)), ((64, 32), (4, 2))])
@pytest.mark.parametrize("method", [WITH_OWN["own_token"], WITH_OWN["mpvg"]], ids=["own_token", "mpvg"])
def test_another_image_size(method: DeliverySpec, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """LeFF hears of it, also where the number of patches is the same; and so does a folded network."""
    model, weights = network(method)
    pos = ref_resampled(weights["pos_embed"][0], GRID, grid, model.num_prefix_tokens)
    model.set_input_size(size)
    batch = images(size)
    expected = reference(weights, method, batch, pos=pos)
    assert_close(model(batch), expected)
    assert_close(fold(model)(batch), expected)
    with pytest.raises(AssertionError, match=r"Input height \(32\) doesn't match model"):
        model(images())


@pytest.mark.parametrize("method", ["default", "mpvg"])
def test_small_images_take_small_patches(method: str) -> None:
    model: Any = create_model(NAME, method, **SIZES | {"img_size": (16, 24)}, patch_size=4, depth=2).eval()
    assert model.patch_embed.grid_size == (4, 6)
    assert model.feature_info[0]["reduction"] == 4
    assert model(torch.randn(1, 3, 16, 24)).shape == (1, 1000)
    assert model.forward_intermediates(torch.randn(1, 3, 16, 24), intermediates_only=True)[0].shape == (1, DIM, 4, 6)


# ---- intermediate layers


@pytest.mark.parametrize("method", [WITH_OWN["own_token"], WITH_OWN["mpvg"]], ids=["own_token", "mpvg"])
def test_intermediates_are_maps_of_tokens(method: DeliverySpec) -> None:
    """Only the last result is the read-out; norm=True would normalize what the Last LN never sees."""
    model, weights = network(method)
    batch, prefix = images(), int(method.pool == "token")
    final, maps = model.forward_intermediates(batch, [2, -1])
    assert torch.equal(final, model.forward_features(batch))
    only = model.forward_intermediates(batch, [2, -1], intermediates_only=True)
    stopped = model.forward_intermediates(batch, [2], intermediates_only=True, stop_early=True)
    whole, _ = model.forward_intermediates(batch, [2, 11], stop_early=True)
    assert torch.equal(whole, final)
    for found, layer in zip(maps, (2, DEPTH - 1), strict=True):
        tokens = torch.stack([ref_ceit(weights, method, image)["layers"][layer] for image in batch])
        assert_close(found, tokens[:, prefix:].transpose(1, 2).reshape(2, DIM, 2, 3))
    assert all(map(torch.equal, maps, only))
    assert torch.equal(stopped[0], maps[0])
    for refused in ({"norm": True}, {"indices": [2], "stop_early": True}):
        with pytest.raises(
            ValueError,
            match=r"norm=True, or stop_early=True .* normalizes the output of its LCA, one vector per image; allowed:",
        ):
            model.forward_intermediates(batch, **refused)


def test_stop_early_stops() -> None:
    model, _ = network("mpvg")
    ran: list[int] = []
    for block in (*model.blocks, model.lca):
        block.register_forward_hook(lambda *_: ran.append(1))
    model.forward_intermediates(images(), [1, 2], stop_early=True, intermediates_only=True)
    assert len(ran) == 3


@pytest.mark.parametrize("indices", [[1, 3], [1, 11]])
@pytest.mark.parametrize(
    ("method", "read_from"), [("default", "layers"), ("mpvg", "layers"), ("own_token", "layers"), ("mpvg", "tokens")]
)
def test_a_pruned_network_keeps_its_intermediates_and_no_read_out(
    method: str, read_from: str, indices: list[int]
) -> None:
    """What is left is used: every parameter of it gets a gradient."""
    model, _ = network(WITH_OWN[method], read_from=read_from)
    batch = images()
    expected = model.forward_intermediates(batch, indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices, prune_norm=True)
    found = model.forward_intermediates(batch, taken, intermediates_only=True)
    assert all(map(torch.equal, found, expected))
    assert len(model.blocks) == indices[-1] + 1
    left = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert left <= {"cls_token", "pos_embed", "patch_embed", "blocks", "delivery"}
    sum((value * torch.randn_like(value)).sum() for value in found).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert model(batch).shape == (2, 6 + model.num_prefix_tokens, DIM)


def test_without_its_head_alone_the_read_out_stays() -> None:
    model, weights = network("mpvg")
    batch = images()
    model.prune_intermediate_layers([2, 11])
    assert_close(model(batch), reference(weights, "mpvg", batch, "vector"))
    model.prune_intermediate_layers([2, 5], prune_head=False)
    assert model(batch).shape == (2, 6, DIM)


# ---- head


def test_the_head_can_be_replaced() -> None:
    model, weights = network("mpvg")
    batch = images()
    vector = reference(weights, "mpvg", batch, "vector")
    model.reset_classifier(3, "avg")
    assert_close(model.double()(batch), vector @ model.head.weight.T + model.head.bias)
    model.reset_classifier(0)
    assert_close(model(batch), vector)
    with pytest.raises(ValueError, match=r"global_pool is 'max'; allowed: None, 'avg', as the method says"):
        model.reset_classifier(0, "max")
    model.reset_classifier(0, "")
    assert_close(model(batch), vector)
    model, _ = network("mpvg", read_from="tokens")
    model.reset_classifier(0, "")
    assert model(batch).shape == (2, 6, DIM)


# ---- folding


@pytest.mark.parametrize("method", ["lape_gap", "gap_last0", "mpvg", "own"])
def test_a_folded_classifier_costs_gap_and_one_addition_a_layer(method: str) -> None:
    """Every operation is counted, on the way to logits and to features."""
    spec, batch = WITH_OWN[method], images()
    (model, _), (gap, _) = network(spec), network("gap")
    served = 0 if spec.first_layer is None else DEPTH - spec.first_layer
    folded = fold(model)
    for way in ("forward", "forward_features"):
        plain, found, baseline = (operations(getattr(net, way), batch) for net in (model, folded, gap))
        # PE, two residuals a layer, the layers' embedding, and the LCA's two residuals.
        assert baseline["aten.add"] == 1 + 2 * DEPTH + 1 + 2
        assert found["aten.add"] == baseline["aten.add"] + served - (not spec.input_pe)
        assert plain["aten.add"] == found["aten.add"] + (spec.last_index is not None)
        del found["aten.add"], baseline["aten.add"]
        if not spec.input_pe:  # the sum with the PE is what makes the patches contiguous; without it that takes a copy
            baseline["aten.clone"] += 1
        assert found == baseline


# ---- the switch


@pytest.mark.parametrize("method", ["gap", "lape_gap", "pvg", "mpvg", "mpvg_last5", "own"])
def test_the_idle_lca(method: str) -> None:
    """The plain transformer's read-out, folded or not, with as many parameters, those of the LCA frozen."""
    spec, batch = WITH_OWN[method], images()
    model, weights = network(spec, read_from="tokens")
    expected = reference(weights, spec, batch, read_from="tokens")
    assert_close(model(batch), expected)
    features, maps = model.forward_intermediates(batch, norm=True)
    assert_close(model.forward_features(batch), features, 0)
    assert_close(maps[-1].flatten(2).transpose(1, 2), features, 0)
    assert_close(features.mean(dim=1), reference(weights, spec, batch, "vector", read_from="tokens"))
    assert_close(fold(model)(batch), expected)

    used, _ = network(spec)
    assert used.state_dict().keys() == model.state_dict().keys()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in used.named_parameters() if name.startswith(("lca.", "pos_layer_embed"))}
    _, found = gradients(model.train(), batch)
    assert found.keys() == {name for name, _ in model.named_parameters()} - frozen


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_img_size": True}, r"dynamic_img_size is True; allowed: False: LeFF .*; call set_input_size"),
        ({"dynamic_img_pad": True}, r"dynamic_img_pad is True; allowed: False: LeFF .*; call set_input_size"),
        ({"patch_drop_rate": 0.1}, r"patch_drop_rate is 0.1; allowed: 0.0: .* no patch may be missing; use drop_path"),
        ({"reg_tokens": 2}, r"reg_tokens is 2; allowed: 0: no token but the class token bypasses LeFF"),
        ({"no_embed_class": True}, r"no_embed_class is True; allowed: False: .* has a row for its class token"),
        ({"scale_mlp_norm": True}, r"scale_mlp_norm is True; allowed: False: LeFF has BatchNorms"),
        ({"fix_init": True}, r"fix_init is True; allowed: False: .* LeFF does not have"),
        ({"embed_layer": nn.Identity}, r"embed_layer is .*Identity.*; allowed: None: the stem is what makes a CeiT"),
        ({"mlp_layer": Mlp}, r"mlp_layer is .*Mlp.*; allowed: None: LeFF is what makes a CeiT"),
        ({"patch_size": 6, "img_size": 36}, r"patch_size is 6; allowed: multiples of 4.*; use 16"),
        ({"patch_size": 2}, r"patch_size is 2; allowed: multiples of 4.*; use 16"),
        ({"img_size": 50}, r"image size 50 is not divisible by the patch size 16; .* are: 48, 64"),
        ({"read_from": "lca"}, r"read_from is 'lca'; allowed: 'layers', 'tokens'"),
        (
            {"read_from": "tokens", "method": "default"},
            r"read_from is 'tokens', but .* allowed: 'layers'; or use a method",
        ),
        ({"method": "mpvg_last8", "depth": 4}, r"last_index 8 asks for pos_8, but CeiT has 4 layers"),
        ({"class_token": True}, r"class_token=True: the method decides it"),
    ],
)
def test_what_a_ceit_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match=message):
        create_model(NAME, **SIZES | options)
    allowed = {
        "dynamic_img_size": False,
        "patch_drop_rate": 0,
        "reg_tokens": 0,
        "embed_layer": None,
        "read_from": "layers",
    }
    create_model(NAME, depth=1, **SIZES | allowed)


def test_a_patch_size_is_for_life() -> None:
    model, weights = network("mpvg")
    model.set_input_size(IMAGE, 16)
    with pytest.raises(ValueError, match=r"patch_size is 8, but the stem .* 16 x 16 .*; allowed: None; build a new"):
        model.set_input_size(patch_size=8)
    batch = images()
    assert_close(model(batch), reference(weights, "mpvg", batch))


# ---- files


def test_files_of_the_original_repository_start_networks(tmp_path: Path) -> None:
    """In float64 as the file has it: the published read-out as it is; without class token what was of it is dropped."""
    path, batch, weights = tmp_path / "ceit.pth", images(), random_weights(METHODS["default"])
    torch.save({"model": weights, "epoch": 300}, path)
    named = f"{path}::grid=2x3"
    arguments: dict[str, Any] = {"num_classes": CLASSES, "checkpoint_path": named, "dtype": torch.float64, **SIZES}
    assert_close(create_model(NAME, "default", **arguments).eval()(batch), reference(weights, "default", batch))

    model = create_model(NAME, "gap", **arguments).eval()
    rest = {name: value for name, value in weights.items() if name != "cls_token"}
    rest["pos_embed"] = weights["pos_embed"][:, 1:]
    assert_close(model(batch), reference(rest, "gap", batch))
    report = load_checkpoint(model, named)
    assert (report.source, set(report.dropped)) == ("coeusguo/ceit", {"cls_token", "pos_embed[:, :1]"})
