"""ViT-Adapter against plain loops over one image, written from the papers and facts of the original, in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from mpvg.delivery import METHODS, DeliverySpec, as_spec
from mpvg.models import create_model
from mpvg.models.dense import ADAPTERS, create_adapter
from mpvg.models.dense.interaction import DeformableAttention, Extractor, Injector, prior_grids, reference_points
from mpvg.models.dense.trunk import windowed_attention
from reference import assert_close, ref_attention, ref_delivered, ref_gelu, ref_linear, ref_norm, ref_patches, scattered

DIM, HEADS, POINTS, DEFORM_HEADS, EPS = 16, 2, 4, 4, 1e-6
NARROW: dict[str, Any] = {"embed_dim": DIM, "num_heads": HEADS}
KINDS = ["default", "lape", "mpvg", "mpvg_flat", "mpvg_no_input_pe"]

Grid = tuple[int, int]
Weights = dict[str, Tensor]


def small(method: Any = "mpvg", forward: Any = "detection", name: str = "vit_adapter_canvas", **kwargs: Any) -> Any:
    return create_adapter(name, method, forward=forward, **NARROW, **kwargs)


def images(size: Grid, count: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, dtype=torch.float64)


# ---- the references


def ref_sample(values: Tensor, grid: Grid, x: float, y: float) -> Tensor:
    """A map `(H * W, d)` at a point from 0 to 1, bilinear between the centers of its cells; zeros lie around it."""
    rows, columns = grid
    column, row = x * columns - 0.5, y * rows - 0.5
    found = torch.zeros(values.shape[1], dtype=values.dtype)
    for r, c in itertools.product((math.floor(row), math.floor(row) + 1), (math.floor(column), math.floor(column) + 1)):
        if 0 <= r < rows and 0 <= c < columns:
            found += (1 - abs(row - r)) * (1 - abs(column - c)) * values[r * columns + c]
    return found


def ref_centers(grids: list[Grid]) -> list[tuple[float, float]]:
    return [
        ((c + 0.5) / columns, (r + 0.5) / rows) for rows, columns in grids for r in range(rows) for c in range(columns)
    ]


def ref_deformable(
    weights: Weights, name: str, query: Tensor, centers: list[tuple[float, float]], values: Tensor, grids: list[Grid]
) -> Tensor:
    """Eq. (3) of Deformable DETR: the softmax is over all points of all maps."""
    heads, levels = DEFORM_HEADS, len(grids)
    value = ref_linear(values, weights, f"{name}.value_proj").split([r * c for r, c in grids])
    offsets = ref_linear(query, weights, f"{name}.sampling_offsets").reshape(-1, heads, levels, POINTS, 2).tolist()
    scores = torch.exp(ref_linear(query, weights, f"{name}.attention_weights").reshape(-1, heads, levels, POINTS))
    width, found = value[0].shape[1] // heads, torch.zeros_like(query)
    for q, head in itertools.product(range(len(query)), range(heads)):
        part = slice(head * width, (head + 1) * width)
        for level, point in itertools.product(range(levels), range(POINTS)):
            (rows, columns), (dx, dy) = grids[level], offsets[q][head][level][point]
            x, y = centers[q][0] + dx / columns, centers[q][1] + dy / rows
            share = scores[q, head, level, point] / scores[q, head].sum()
            found[q, part] += share * ref_sample(value[level][:, part], (rows, columns), x, y)
    return ref_linear(found, weights, f"{name}.output_proj")


def ref_injector(weights: Weights, name: str, x: Tensor, prior: Tensor, grid: Grid) -> Tensor:
    rows, columns = grid
    grids = [(2 * rows, 2 * columns), grid, (rows // 2, columns // 2)]
    query, values = (ref_norm(t, weights, f"{name}.{n}", EPS) for t, n in ((x, "query_norm"), (prior, "feat_norm")))
    return x + weights[f"{name}.gamma"] * ref_deformable(
        weights, f"{name}.attn", query, ref_centers([grid]), values, grids
    )


def ref_extractor(weights: Weights, name: str, prior: Tensor, x: Tensor, grid: Grid) -> Tensor:
    rows, columns = grid
    grids = [(2 * rows, 2 * columns), grid, (rows // 2, columns // 2)]
    query, values = (ref_norm(t, weights, f"{name}.{n}", EPS) for t, n in ((prior, "query_norm"), (x, "feat_norm")))
    prior = prior + ref_deformable(weights, f"{name}.attn", query, ref_centers(grids), values, [grid])
    hidden = ref_linear(ref_norm(prior, weights, f"{name}.ffn_norm", EPS), weights, f"{name}.ffn.fc1")
    kernel, bias = weights[f"{name}.ffn.dwconv.weight"], weights[f"{name}.ffn.dwconv.bias"]
    mixed, start = torch.zeros_like(hidden), 0
    for r, c in grids:  # one depthwise convolution, map by map
        for row, column in itertools.product(range(r), range(c)):
            total = bias.clone()
            for i, j in itertools.product(range(3), range(3)):
                if 0 <= row + i - 1 < r and 0 <= column + j - 1 < c:
                    total += kernel[:, 0, i, j] * hidden[start + (row + i - 1) * c + column + j - 1]
            mixed[start + row * c + column] = total
        start += r * c
    return prior + ref_linear(ref_gelu(mixed), weights, f"{name}.ffn.fc2")


def ref_windowed(weights: Weights, name: str, x: Tensor, heads: int, window: int, grid: Grid) -> Tensor:
    """Attention window by window; where a window leaves the grid, query, key and value are zeros and take part."""
    (rows, columns), dim = grid, x.shape[1]
    qkv, found = ref_linear(x, weights, f"{name}.qkv"), torch.zeros_like(x)
    for top, left in itertools.product(range(0, rows, window), range(0, columns, window)):
        cells = [(top + i, left + j) for i, j in itertools.product(range(window), range(window))]
        inside = [(i, r * columns + c) for i, (r, c) in enumerate(cells) if r < rows and c < columns]
        filled = torch.zeros(window * window, 3 * dim, dtype=x.dtype)
        for i, token in inside:
            filled[i] = qkv[token]
        q, k, v = filled.split(dim, dim=1)
        attended = ref_attention(q, k, v, heads)
        for i, token in inside:
            found[token] = attended[i]
    return ref_linear(found, weights, f"{name}.proj")


def ref_batch_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    mean, variance = (weights[f"{name}.running_{part}"].reshape(1, -1, 1, 1) for part in ("mean", "var"))
    gain, bias = (weights[f"{name}.{part}"].reshape(1, -1, 1, 1) for part in ("weight", "bias"))
    return (x - mean) / torch.sqrt(variance + 1e-5) * gain + bias


def ref_prior(weights: Weights, image: Tensor) -> list[Tensor]:
    def convolution(x: Tensor, name: str, index: int, stride: int) -> Tensor:
        x = F.conv2d(x, weights[f"spm.{name}.{index}.weight"], stride=stride, padding=1)
        return ref_batch_norm(x, weights, f"spm.{name}.{index + 1}").clamp(min=0)

    x = image[None]
    for index, stride in ((0, 2), (3, 1), (6, 1)):
        x = convolution(x, "stem", index, stride)
    c = [F.max_pool2d(x, 3, 2, 1)]
    for name in ("conv2", "conv3", "conv4"):
        c.append(convolution(c[-1], name, 0, 2))
    return [F.conv2d(t, weights[f"spm.fc{i}.weight"], weights[f"spm.fc{i}.bias"]) for i, t in enumerate(c, start=1)]


def ref_pos(pos: Tensor, old: Grid, new: Grid) -> Tensor:
    """A PE `(rows, D)` on another grid, as the original resamples it; in float32 on the way."""
    maps = pos.T.reshape(1, -1, *old).float()
    maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False)
    return maps[0].flatten(1).T.double()


def ref_adapter(weights: Weights, spec: DeliverySpec, image: Tensor, forward: str) -> list[Tensor]:
    """The four maps of one image, from a network of four layers."""
    grid = image.shape[1] // 16, image.shape[2] // 16
    c1, *rest = ref_prior(weights, image)
    prior = torch.cat([t[0].flatten(1).T + weights["level_embed"][i] for i, t in enumerate(rest)])
    vit = {name.removeprefix("vit."): value for name, value in weights.items() if name.startswith("vit.")}
    pos = vit["pos_embed"][0]
    pos = pos if grid == (4, 4) else ref_pos(pos, (4, 4), grid)
    per_layer, _ = ref_delivered(spec.without_last(), vit, pos, 4, EPS)
    x = ref_patches(image, vit, "patch_embed.proj", 16)
    x = x + pos if spec.input_pe else x
    outputs = []
    for layer in range(4):
        x = ref_injector(weights, f"interactions.{layer}.injector", x, prior, grid)
        name = f"blocks.{layer}"
        attended = ref_norm(x, vit, f"{name}.norm1", EPS) + per_layer[layer]
        if forward == "detection" and layer != 3:
            attended = ref_windowed(vit, f"{name}.attn", attended, HEADS, 4, grid)
        else:
            q, k, v = ref_linear(attended, vit, f"{name}.attn.qkv").split(DIM, dim=1)
            attended = ref_linear(ref_attention(q, k, v, HEADS), vit, f"{name}.attn.proj")
        x = x + vit[f"{name}.ls1.gamma"] * attended
        hidden = ref_gelu(ref_linear(ref_norm(x, vit, f"{name}.norm2", EPS), vit, f"{name}.mlp.fc1"))
        x = x + vit[f"{name}.ls2.gamma"] * ref_linear(hidden, vit, f"{name}.mlp.fc2")
        extra = [f"extra_extractors.{i}" for i in range(2)] if layer == 3 else []
        for extractor in ["extractor", *extra]:
            prior = ref_extractor(weights, f"interactions.{layer}.{extractor}", prior, x, grid)
        outputs.append(x.T.reshape(1, DIM, *grid))
    sizes = [(2 * grid[0], 2 * grid[1]), grid, (grid[0] // 2, grid[1] // 2)]
    c2, c3, c4 = (
        part.T.reshape(1, DIM, *size) for part, size in zip(prior.split([h * w for h, w in sizes]), sizes, strict=True)
    )
    c1 = c1 + F.conv_transpose2d(c2, weights["up.weight"], weights["up.bias"], stride=2)
    found = []
    for i, c in enumerate((c1, c2, c3, c4)):
        feature = outputs[i] if forward == "segmentation" else outputs[3]
        if i < 2:
            feature = F.interpolate(feature, scale_factor=4 / 2**i, mode="bilinear", align_corners=False)
        elif i == 3:  # half way between four cells
            feature = F.avg_pool2d(feature, 2)
        found.append(ref_batch_norm(c + feature, weights, f"norm{i + 1}"))
    return found


# ---- the parts


@pytest.mark.parametrize("grid", [(2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("levels", [1, 3])
def test_deformable_attention_is_the_plain_loop(grid: Grid, levels: int) -> None:
    module = scattered(DeformableAttention(DIM, heads=DEFORM_HEADS, points=POINTS, levels=levels))
    grids = prior_grids(grid)[:levels] if levels > 1 else [grid]
    query = torch.randn(2, 5, DIM, dtype=torch.float64)
    values = torch.randn(2, sum(r * c for r, c in grids), DIM, dtype=torch.float64)
    centers = torch.rand(5, 2, dtype=torch.float64)  # near the borders too, so that points fall outside
    weights = {f"a.{name}": value for name, value in module.state_dict().items()}
    found = module(query, centers, values, grids)
    for one, q, v in zip(found, query, values, strict=True):
        assert_close(one, ref_deformable(weights, "a", q, [tuple(c) for c in centers.tolist()], v, grids))


def test_deformable_attention_starts_with_a_direction_for_each_head() -> None:
    """Head m looks along angle 2 pi m / M, its point k at k cells in the maximum norm; all weights are equal."""
    module = DeformableAttention(12, heads=6, points=4, levels=3)
    offsets = module.sampling_offsets.bias.reshape(6, 3, 4, 2)
    for head, level, point in itertools.product(range(6), range(3), range(4)):
        x, y = math.cos(2 * math.pi * head / 6), math.sin(2 * math.pi * head / 6)
        expected = torch.tensor([x, y]) / max(abs(x), abs(y)) * (point + 1)
        assert_close(offsets[head, level, point], expected, 1e-5)
    zeros = [module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias]
    assert not any(parameter.any() for parameter in [*zeros, module.value_proj.bias, module.output_proj.bias])
    assert module.value_proj.weight.abs().max() <= math.sqrt(6 / 24)


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="6 heads do not divide 64 channels"):
        DeformableAttention(64, heads=6, points=4, levels=1)


def test_reference_points_are_the_centers_in_row_order() -> None:
    grids = [(2, 3), (1, 2)]
    expected = torch.tensor(ref_centers(grids), dtype=torch.float64)
    assert_close(reference_points(grids, expected), expected, 1e-15)


@pytest.mark.parametrize("grid", [(2, 2), (2, 4)])
def test_injector_and_extractor_are_plain_loops(grid: Grid) -> None:
    injector = scattered(Injector(DIM, heads=DEFORM_HEADS, points=POINTS))
    extractor = scattered(Extractor(DIM, heads=DEFORM_HEADS, points=POINTS, ffn_ratio=0.5, drop_path=0.3))
    count = grid[0] * grid[1]
    x, prior = (torch.randn(2, n, DIM, dtype=torch.float64) for n in (count, count * 21 // 4))
    injected, extracted = injector(x, prior, grid), extractor(prior, x, grid)
    for i in range(2):
        weights = {f"a.{name}": value for name, value in injector.state_dict().items()}
        assert_close(injected[i], ref_injector(weights, "a", x[i], prior[i], grid))
        weights = {f"a.{name}": value for name, value in extractor.state_dict().items()}
        assert_close(extracted[i], ref_extractor(weights, "a", prior[i], x[i], grid))


@pytest.mark.parametrize(("grid", "window"), [((4, 4), 4), ((4, 4), 2), ((5, 7), 3), ((2, 7), 4)])
def test_windowed_attention_is_the_plain_loop(grid: Grid, window: int) -> None:
    attention = scattered(Attention(DIM, num_heads=HEADS, qkv_bias=True))
    x = torch.randn(2, grid[0] * grid[1], DIM, dtype=torch.float64)
    weights = {f"a.{name}": value for name, value in attention.state_dict().items()}
    found = windowed_attention(attention, x, window=window, grid=grid)
    for one, tokens in zip(found, x, strict=True):
        assert_close(one, ref_windowed(weights, "a", tokens, HEADS, window, grid))


def test_a_window_as_large_as_the_grid_is_global_attention() -> None:
    attention = scattered(Attention(DIM, num_heads=HEADS, qkv_bias=True))
    x = torch.randn(2, 16, DIM, dtype=torch.float64)
    assert_close(windowed_attention(attention, x, window=4, grid=(4, 4)), attention(x), 1e-12)


# ---- the whole


@pytest.mark.parametrize(
    ("method", "forward", "size"),
    [
        ("mpvg", "detection", (64, 96)),  # a grid of 4 x 6, so that windows of 4 are padded at the right
        ("mpvg", "segmentation", (64, 96)),
        ("lape", "detection", (64, 64)),
        ("lape", "segmentation", (64, 64)),
    ],
)
def test_the_maps_are_those_of_the_reference(method: str, forward: str, size: Grid) -> None:
    model, image = scattered(small(method, forward)), images(size)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        found = model(image)
    expected = ref_adapter(model.state_dict(), METHODS[method], image[0], forward)
    assert [one.shape[2:] for one in found] == [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-6 if size != (64, 64) else 1e-9)  # the PE is resampled in float32


@pytest.mark.parametrize("name", ["vit_adapter_canvas", "vit_pyramid_canvas"])
@pytest.mark.parametrize("method", KINDS)
def test_the_trunk_runs_the_layers_of_classification(method: str, name: str) -> None:
    """Where every layer is global, an image of the classifier's size has the classifier's tokens after every layer."""
    spec = DeliverySpec(**{**as_spec(method).to_dict(), "pool": "avg"})
    classifier = create_model("vit_canvas_patch16_64", spec, num_classes=3, init_values=1.0, **NARROW).eval()
    model = small(method, "segmentation", name)
    weights = {key: value for key, value in classifier.state_dict().items() if key in model.vit.state_dict()}
    model.vit.load_state_dict(weights)
    image = torch.randn(2, 3, 64, 64)
    x, per_layer, grid = model.eval().embed(image)
    for layer, expected in enumerate(
        classifier.forward_intermediates(image, output_fmt="NLC", intermediates_only=True)
    ):
        x = model.run(x, per_layer, [layer], grid)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("grid", [(4, 6), (3, 2), (7, 8)])
def test_the_pe_is_resampled_without_antialiasing_and_then_delivered(grid: Grid) -> None:
    vit = small("mpvg").vit
    pos = vit.pos_embed.detach()
    maps = pos[0].T.reshape(1, -1, 4, 4)
    plain, smooth = (
        F.interpolate(maps, size=grid, mode="bicubic", align_corners=False, antialias=a)[0].flatten(1).T
        for a in (False, True)
    )
    assert torch.equal(vit.raw_pos_embed(grid)[0], plain)
    assert (plain - smooth).abs().max() > 1e-3
    layer_1 = vit.deliver(vit.raw_pos_embed(grid), grid).per_layer[1]
    assert_close(layer_1[0], F.layer_norm(plain, (DIM,), eps=EPS), 1e-6)


@pytest.mark.parametrize("name", ["vit_adapter_canvas", "vit_pyramid_canvas"])
@pytest.mark.parametrize("forward", ["detection", "segmentation"])
def test_maps_do_not_depend_on_batch_mates(name: str, forward: str) -> None:
    model, batch = scattered(small("mpvg", forward, name)), images((64, 96), 3)
    with torch.no_grad():
        together = model(batch)
        for i in range(3):
            for one, alone in zip(together, model(batch[i : i + 1]), strict=True):
                assert_close(one[i : i + 1], alone, 1e-12)


@pytest.mark.parametrize("name", ["vit_adapter_canvas", "vit_pyramid_canvas"])
@pytest.mark.parametrize("forward", ["detection", "segmentation"])
@pytest.mark.parametrize("method", KINDS)
def test_every_parameter_gets_a_gradient_within_three_steps(method: str, forward: str, name: str) -> None:
    """The injectors' gamma starts at 0, and so do the weights that make offsets and shares of the queries.

    At the first step nothing of an injector but gamma has a gradient, and at the second its query's LN still has none.
    BatchNorm evaluates, because in training a constant in front of it has no effect and so no gradient.
    """
    model = small(method, forward, name).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    without: list[list[str]] = []
    for _ in range(3):
        optimizer.zero_grad()
        maps = model(torch.randn(2, 3, 64, 96))
        sum((one * torch.randn_like(one)).sum() for one in maps).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        without.append([n for n, grad in grads.items() if grad is None or not grad.abs().max() > 1e-9])
        optimizer.step()
    injectors = [n for n in grads if ".injector." in n and not n.endswith("gamma")]
    queries = [n for n in grads if ".query_norm." in n]
    assert without == [
        [n for n in grads if n in (*injectors, *queries)],
        [n for n in queries if n in injectors],
        [],
    ]
    assert [len(names) for names in without] == ([60, 8, 0] if "adapter" in name else [0, 0, 0])


def test_drop_path_rises_over_layers_and_is_constant_over_extractors() -> None:
    model = small("mpvg", drop_path_rate=0.3)
    layers = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.vit.blocks]
    assert layers == pytest.approx([0, 0.1, 0.2, 0.3])
    extractors = [part for part in model.modules() if isinstance(part, Extractor)]
    assert [part.drop_path.drop_prob for part in extractors] == [0.3] * 6
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(image)[0], model(image)[0])


def test_the_adapter_starts_by_injecting_nothing() -> None:
    model = small("mpvg")
    for interaction in model.interactions:
        assert not interaction.injector.gamma.any()
        x, prior = torch.randn(1, 16, DIM), torch.randn(1, 84, DIM)
        assert torch.equal(interaction.injector(x, prior, (4, 4)), x)
    assert 0.5 < model.level_embed.std() < 1.5
    for block in model.vit.blocks:
        assert torch.equal(block.ls1.gamma, torch.ones(DIM))
    kernel = model.spm.conv2[0].weight  # N(0, sqrt(2 / fan_out))
    assert kernel.std().item() == pytest.approx(math.sqrt(2 / (9 * 48)), rel=0.05)


def test_it_runs_in_mixed_precision() -> None:
    model, image = small("mpvg"), torch.randn(1, 3, 64, 96)
    plain = model.eval()(image)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(image)
    for one, other in zip(mixed, plain, strict=True):
        assert_close(one.float(), other, 0.05 * other.abs().max().item())


# ---- sizes


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_at_paper_size() -> None:
    """The original's 7,966,640 but for the row of its PE that it does not use; each LN' is 2 x 192 more."""
    with torch.device("meta"):
        model: Any = create_adapter("vit_adapter_tiny", "default", forward="detection")
        other = create_adapter("vit_adapter_tiny", "default", forward="segmentation")
        more = {m: count(create_adapter("vit_adapter_tiny", m, forward="detection")) for m in ("lape", "mpvg")}
    assert count(other) == count(model)
    row, layer_scale = 192, 12 * 2 * 192
    assert count(model) == 7_961_840 + layer_scale == 7_966_640 - row
    assert [count(part) for part in (model.spm, model.interactions, model.up)] == [1_171_520, 1_116_912, 147_648]
    assert count(model.vit.blocks) == 5_342_976
    assert count(model.vit.patch_embed) == 147_648
    assert {m: n - count(model) for m, n in more.items()} == {"lape": 12 * 384, "mpvg": 11 * 384}


def test_windows_and_stages() -> None:
    """At paper size the last layer of each stage is global; in segmentation all are."""
    deep = small(depth=12, vit="vit_canvas_patch16_64")
    assert deep.windows == dict.fromkeys((0, 1, 3, 4, 6, 7, 9, 10), 4)
    assert [list(stage) for stage in deep.stages()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert small().windows == dict.fromkeys((0, 1, 2), 4)
    assert small(forward="segmentation").windows == {}
    assert ADAPTERS["vit_adapter_tiny"].window == 14


def test_the_pyramid_has_the_adapter_s_maps() -> None:
    image = torch.randn(1, 3, 64, 96)
    pyramid, adapter = (small("mpvg", name=f"vit_{kind}_canvas").eval() for kind in ("pyramid", "adapter"))
    assert [one.shape for one in pyramid(image)] == [one.shape for one in adapter(image)]
    assert pyramid.windows == adapter.windows
    assert pyramid.vit.state_dict().keys() == adapter.vit.state_dict().keys()


def test_images_of_other_sizes_are_refused() -> None:
    for name in ("vit_adapter_canvas", "vit_pyramid_canvas"):
        with pytest.raises(ValueError, match=r"images are 64 x 80, but .* multiples of 32; pad them to 64 x 96"):
            small(name=name)(torch.randn(1, 3, 64, 80))
