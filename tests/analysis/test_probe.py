"""One pass with a probe, against stacks of what hooks see in every LN, and plain loops over them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpvg.analysis.probe import LAST, MAX_SAMPLES, LayerStats, ProbeResult, collect
from mpvg.data import DataInfo
from mpvg.models import create_model
from mpvg.models.fold import fold
from mpvg.statistics import GroupedMean
from reference import scattered

Batches = list[tuple[Tensor, Tensor]]

TINY: dict[str, Any] = {"embed_dim": 24, "num_heads": 2, "depth": 3}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_mini_patch2_8", TINY | {"img_size": 8}),
    "Swin": (
        "swin_mini_patch2_28",
        {"img_size": 16, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)},
    ),
    "CeiT": ("ceit_tiny_patch16_224", TINY | {"img_size": 32, "patch_size": 8}),
    "T2T-ViT": ("t2t_vit_7", TINY | {"img_size": 48}),
    "ViT-Lite": ("vit_lite_6_patch4_32", TINY | {"img_size": 16}),
    "timm's": ("timm/vit_tiny_patch16_224", TINY | {"img_size": 48, "readout": "method"}),
    "timm's, kept": ("timm/vit_tiny_patch16_224", TINY | {"img_size": 48}),
}
METHODS = ["gap", "pvg", "mpvg", "default", "pvg_token", "lape_gap"]
CELLS = [(n, m) for n in NETWORKS for m in METHODS if (n, m) != ("Swin", "pvg_token")]
IMAGES, GROUPS = 7, 3
NOISE = DataInfo(
    name="noise",
    class_names=tuple("abcde"),
    in_chans=3,
    img_size=8,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
    train_size=1,
    val_size=IMAGES,
)


def build(network: str, method: str, **kwargs: Any) -> Any:
    """A small network of the kind."""
    name, arguments = NETWORKS[network]
    return scattered(create_model(name, method, num_classes=5, **arguments | kwargs))


def images_for(network: str, count: int = IMAGES) -> Tensor:
    side = NETWORKS[network][1]["img_size"]
    return torch.randn(count, 3, side, side, dtype=torch.float64)


def in_batches(images: Tensor, size: int) -> Batches:
    targets = torch.arange(len(images)) % 5
    return list(zip(images.split(size), targets.split(size), strict=True))


# ---- what hooks see


@dataclass
class Seen:
    """Of one LN, `(images, rows, channels)` each."""

    before: np.ndarray
    after: np.ndarray
    received: np.ndarray
    """What came on, LN' of the PE or zeros: the attention's, or the head's, input less the LN's output."""


def rows_of(tokens: Tensor) -> np.ndarray:
    """Tokens of any network as `(B, N, C)`."""
    if tokens.ndim == 2:
        tokens = tokens[:, None]
    return tokens.reshape(len(tokens), -1, tokens.shape[-1]).numpy()


@torch.no_grad()
def record(model: Any, images: Tensor) -> tuple[list[Seen], Seen, Tensor]:
    """What every layer's LN and the Last LN are shown, over all images at once, and the logits."""
    norms: dict[int, tuple[Tensor, Tensor]] = {}
    inputs: dict[int, Tensor] = {}
    undo = []
    for layer, (module, owner, name) in enumerate(
        [
            *((b.norm1, b, "_attn") if hasattr(b, "_attn") else (b.norm1, b.attn, "forward") for b in model.blocks),
            (model.norm, model, "forward_head"),
        ]
    ):

        def hook(_: nn.Module, given: Any, made: Tensor, layer: int = layer) -> None:
            norms[layer] = given[0], made

        run = getattr(owner, name)

        def watched(x: Tensor, *args: Any, layer: int = layer, run: Any = run, **kwargs: Any) -> Any:
            inputs[layer] = x
            return run(x, *args, **kwargs)

        undo.append(module.register_forward_hook(hook))
        setattr(owner, name, watched)
    logits = model(images)
    for handle in undo:
        handle.remove()
    for block in model.blocks:
        vars(block).pop("_attn", None)
        vars(block.attn).pop("forward", None)
    del model.forward_head
    assert sorted(norms) == sorted(inputs) == list(range(len(model.blocks) + 1))
    found = [
        Seen(rows_of(norms[at][0]), rows_of(norms[at][1]), rows_of(inputs[at]) - rows_of(norms[at][1]))
        for at in sorted(norms)
    ]
    return found[:-1], found[-1], logits


def near(actual: Tensor | None, expected: Any) -> None:
    assert actual is not None
    expected = np.asarray(expected)
    assert tuple(actual.shape) == expected.shape
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-10)


def grouped(found: GroupedMean | None, per_image: list[Any]) -> None:
    """Sums over the images of each group: image i is in group i % GROUPS."""
    assert found is not None
    for group in range(GROUPS):
        members = per_image[group::GROUPS]
        near(found.sums[group], np.sum(members, axis=0))
        assert (found.counts[group] == len(members)).all()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.flatten(), b.flatten()
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(a * a) * sum(b * b)))


def delivered_layers(network: str, method: str) -> tuple[set[int], bool]:
    """By the words of the paper: the layers that receive a PE, and whether the Last LN does; Swin begins at 0."""
    depth = 4 if network == "Swin" else 3
    first = {"pvg": 1, "mpvg": 1, "pvg_token": 1, "lape_gap": 0}.get(method, depth)
    if network == "Swin" and first == 1:
        first = 0
    return set(range(first, depth)), method == "mpvg"


def assert_layer(stats: LayerStats, seen: Seen, raw: np.ndarray, prefix: int, delivered: bool) -> None:
    before, after, received = (x[:, prefix:] for x in (seen.before, seen.after, seen.received))
    near(stats.before, sum(before))
    near(stats.after, np.stack([sum(after[group::GROUPS]) for group in range(GROUPS)]))
    assert stats.delivered == delivered
    assert (np.abs(received).max() > 0.1) == delivered
    np.testing.assert_allclose(received, np.broadcast_to(received[0], received.shape), rtol=0, atol=1e-12)
    raw = raw[len(raw) - before.shape[1] :] if len(raw) >= before.shape[1] else raw
    pe = received[0] if delivered else raw
    if pe.shape[1] != before.shape[2]:  # a later stage of Swin
        assert stats.pe is None
        assert stats.image_r.counts.sum() == 0
        return
    near(stats.pe, pe)
    grouped(stats.image_r, [np.corrcoef(one.flatten(), pe.flatten())[0, 1] for one in after])


def assert_last(found: ProbeResult, seen: Seen, prefix: int, images: Tensor, *, token: bool, one_vector: bool) -> None:
    last, after = found.last, seen.after + seen.received
    skip = 0 if one_vector else prefix
    each = list(zip(seen.before, seen.after, after, strict=True))
    grouped(last.mean_token, [cosine(a[skip:].mean(axis=0), c[skip:].mean(axis=0)) for a, _, c in each])
    grouped(last.mean_token_bare, [cosine(a[skip:].mean(axis=0), b[skip:].mean(axis=0)) for a, b, _ in each])
    if token:
        grouped(last.class_token, [cosine(a[0], c[0]) for a, _, c in each])
    else:
        assert last.class_token is None
    assert last.auc is None
    if one_vector:
        assert last.rows is None
        assert found.samples == []
        return
    grouped(last.rows, [[cosine(x, y) for x, y in zip(a, c, strict=True)] for a, _, c in each])
    assert len(found.samples) == min(MAX_SAMPLES, len(images))
    for at, one in enumerate(found.samples):
        assert torch.equal(one.image, images[at])
        near(one.before, [math.sqrt(sum(row * row)) for row in seen.before[at, prefix:]])
        near(one.after, [math.sqrt(sum(row * row)) for row in after[at, prefix:]])


@pytest.mark.parametrize(("network", "method"), CELLS)
def test_what_is_collected_is_what_the_layers_saw(network: str, method: str) -> None:
    model, images = build(network, method), images_for(network)
    layers, last, logits = record(model, images)
    batches = in_batches(images, 3)
    found = collect(model, batches, NOISE, groups=GROUPS)

    assert found.images == IMAGES
    assert found.counts.tolist() == [3, 2, 2]
    answers = torch.cat([targets for _, targets in batches])
    assert found.correct == sum(int(logits[i].argmax()) == int(answers[i]) for i in range(IMAGES))
    raw = model.pos_embed.detach()[0].numpy()
    token = (method in ("default", "pvg_token") and network != "Swin") or network == "timm's, kept"
    prefix = int(token)
    served, to_last = delivered_layers(network, method)
    one_vector = network == "CeiT"
    names = [str(layer) for layer in range(len(layers))] + ([] if one_vector else [LAST])
    assert [stats.name for stats in found.layers] == names
    for layer, (stats, seen) in enumerate(zip(found.layers, layers, strict=False)):
        assert_layer(stats, seen, raw, prefix, layer in served)
    if not one_vector:
        assert_layer(found.layers[-1], last, raw, prefix, to_last)
    assert_last(found, last, prefix, images, token=token, one_vector=one_vector)


def test_layers_of_a_later_stage_have_no_pe_unless_one_is_delivered() -> None:
    images = in_batches(images_for("Swin"), 4)
    for method, fitting in (("gap", "0 1"), ("pvg", "0 1 2 3"), ("mpvg", f"0 1 2 3 {LAST}")):
        found = collect(build("Swin", method), images, NOISE)
        assert " ".join(stats.name for stats in found.layers if stats.pe is not None) == fitting
        assert len(found.layers) == 5


# ---- what must not matter


def numbers(found: ProbeResult) -> dict[str, Tensor]:
    """Everything that was found, by name."""
    values = {"counts": found.counts, "correct": torch.tensor(float(found.correct))}
    for stats in found.layers:
        own: dict[str, Any] = {"before": stats.before, "after": stats.after, "pe": stats.pe, "image_r": stats.image_r}
        values |= flat({f"{stats.name} {name}": value for name, value in own.items()})
    values |= flat(vars(found.last))
    for at, one in enumerate(found.samples):
        values |= flat({f"{at} {name}": value for name, value in vars(one).items()})
    return values


def flat(values: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, GroupedMean):
            found |= {f"{name} sums": value.sums, f"{name} counts": value.counts}
        elif value is not None:
            found[name] = value
    return found


@pytest.mark.parametrize(("network", "method"), [(n, "mpvg") for n in NETWORKS] + [("ViT", "pvg_token")])
def test_the_batch_size_does_not_matter(network: str, method: str) -> None:
    model, images = build(network, method), images_for(network, 15)
    info = replace(NOISE, name="digits", img_size=images.shape[-1])
    first, *others = (numbers(collect(model, in_batches(images, size), info, groups=4)) for size in (15, 1, 4))
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10, msg=name)


class Listening:
    """A probe that lets everything pass."""

    def layer(self, *_: Any) -> None: ...

    def last(self, *_: Any) -> None: ...


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_a_probe_changes_no_bit_of_the_answers(network: str) -> None:
    model, images = build(network, "mpvg"), images_for(network)
    alone = model(images)
    model.probe = Listening()
    assert torch.equal(model(images), alone)
    model.probe = None
    state = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, in_batches(images, 3), NOISE)
    assert torch.equal(model(images), alone)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_network_in_training_is_looked_at_in_evaluation() -> None:
    model, batches = build("ViT", "mpvg", drop_path_rate=0.5, proj_drop_rate=0.5), in_batches(images_for("ViT"), 3)
    first = numbers(collect(model.train(), batches, NOISE))
    for name, value in numbers(collect(model.eval(), batches, NOISE)).items():
        assert torch.equal(value, first[name]), name


def test_what_is_kept_is_not_a_part_of_the_batch() -> None:
    """A pipeline may write the next batch to where the last one was."""
    model, images = build("ViT", "mpvg"), images_for("ViT")
    buffer = torch.empty_like(images[:1])

    def reusing() -> Iterator[tuple[Tensor, Tensor]]:
        for image in images:
            yield buffer.copy_(image), torch.zeros(1, dtype=torch.int64)

    found = collect(model, reusing(), NOISE)
    assert all(torch.equal(one.image, images[at]) for at, one in enumerate(found.samples))
    for one in collect(model, in_batches(images, 7), NOISE).samples:
        assert one.image.untyped_storage().nbytes() == one.image.nbytes


def test_images_to_look_at_are_spread_evenly() -> None:
    """One of so many, over the borders of batches; the sums are over all images as before."""
    model, images = build("ViT", "mpvg"), images_for("ViT", 50)
    everything = collect(model, in_batches(images, 8), NOISE)
    for every, expected in ((4, range(0, 48, 4)), (7, range(0, 50, 7)), (100, [0])):
        found = collect(model, in_batches(images, 8), NOISE, keep_every=every)
        assert len(found.samples) == len(expected)
        for one, at in zip(found.samples, expected, strict=True):
            assert torch.equal(one.image, images[at])
        assert torch.equal(found.layers[0].after, everything.layers[0].after)
    assert len(everything.samples) == MAX_SAMPLES == 12


# ---- refusals


def test_no_probe_is_left_after() -> None:
    model, images = build("ViT", "mpvg"), images_for("ViT")
    collect(model, in_batches(images, 3), NOISE)
    assert model.probe is None

    def torn() -> Iterator[tuple[Tensor, Tensor]]:
        yield from in_batches(images, 3)
        assert model.probe is not None
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        collect(model, torn(), NOISE)
    assert model.probe is None


@pytest.mark.parametrize("network", ["ViT", "Swin", "CeiT"])
def test_a_folded_network_is_refused_or_shows_the_same(network: str) -> None:
    """Refused where a part of its PE has gone into a bias; with all of the PE in place nothing is lost."""
    batches = in_batches(images_for(network), 4)
    folded = fold(build(network, "mpvg"))
    with pytest.raises(ValueError, match="the network is folded.*analyze the network before folding"):
        collect(folded, batches, NOISE)
    assert folded.probe is None
    model = build(network, "pvg")
    expected = numbers(collect(model, batches, NOISE))
    for name, value in numbers(collect(fold(model), batches, NOISE)).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10, msg=name)


def test_a_raw_pe_of_another_grid_is_not_compared() -> None:
    """At half its size a network that takes any has a resampled PE: the first rows of its own are those of others."""
    model = build("ViT", "gap", dynamic_img_size=True)
    images = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    found = collect(model, in_batches(images, 2), NOISE)
    assert [stats.pe for stats in found.layers] == [None] * 4


# ---- where the object is


def drawn() -> Tensor:
    """Four images in values of [0, 1], 8 x 8 with patches of 2 x 2."""
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.float64)
    pixels[0, :, 2:4, 2:6] = 0.9  # patches 5 and 6, whole
    pixels[0, :, 0, 0] = 1.0  # a quarter of patch 0: not half
    pixels[1, 1, 6, :4] = 1 / 255  # half of patches 12 and 13, as dark as can be, in one channel
    pixels[3, 2, 0:6, 6:8] = 0.2  # patches 3, 7 and 11
    return pixels  # and nothing in image 2


ON = [{5, 6}, {12, 13}, set(), {3, 7, 11}]


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
@pytest.mark.parametrize("method", ["mpvg", "default"])
def test_norms_are_told_apart_by_hand(name: str, method: str) -> None:
    model, pixels = build("ViT", method), drawn()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (NOISE.mean, NOISE.std))
    images = (pixels - mean) / std
    _, last, _ = record(model, images)
    prefix = int(method == "default")
    expected: list[list[float]] = []
    for at, on in enumerate(ON):
        if not on:
            continue
        pair = []
        for tokens in (last.before[at, prefix:], last.after[at, prefix:] + last.received[at, prefix:]):
            norms = [math.sqrt(sum(row * row)) for row in tokens]
            wins = [norms[i] > norms[j] for i in range(16) for j in range(16) if i in on and j not in on]
            pair.append(sum(wins) / len(wins))
        expected.append(pair)
    found = collect(model, in_batches(images, 3), replace(NOISE, name=name)).last.auc
    assert found is not None
    near(found.mean(), np.mean(expected, axis=0))
    assert found.counts.sum(dim=0).tolist() == [3, 3]
    assert collect(model, in_batches(images, 3), replace(NOISE, name="cifar10")).last.auc is None


# ---- memory


def held(value: object, storages: dict[int, int], seen: set[int]) -> None:
    """Every tensor's storage that an object leads to, and its bytes; networks and data aside."""
    if id(value) in seen or isinstance(value, nn.Module | DataInfo):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for part in value.values():
            held(part, storages, seen)
    elif isinstance(value, list | tuple | set):
        for part in value:
            held(part, storages, seen)
    elif hasattr(value, "__dict__"):
        held(vars(value), storages, seen)


@pytest.mark.parametrize(
    ("network", "method"), [("ViT", "mpvg"), ("ViT", "default"), ("Swin", "mpvg"), ("CeiT", "pvg")]
)
def test_memory_stays_as_it_is_after_40_images(network: str, method: str) -> None:
    model = build(network, method)
    bytes_after: dict[int, int] = {}

    def watching() -> Iterator[tuple[Tensor, Tensor]]:
        for count in range(0, 401, 10):
            if count in (10, 40, 400):
                storages: dict[int, int] = {}
                held(model.probe, storages, set())
                bytes_after[count] = sum(storages.values())
            yield images_for(network, 10), torch.zeros(10, dtype=torch.int64)

    side = NETWORKS[network][1]["img_size"]
    assert collect(model, watching(), replace(NOISE, name="digits", img_size=side)).images == 410
    assert bytes_after[400] == bytes_after[40] > 10_000
    if network != "CeiT":  # which has no norms of tokens at its Last LN: no image is picked
        assert bytes_after[10] < bytes_after[40]  # 12 are picked
