"""One image in a network whose PEs are changed: against forwards written by hand, and properties."""

import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mpvg import fold
from mpvg.analysis import explore
from mpvg.analysis.explore import INPUT, Changes, ExploredRun, predict, receiving
from mpvg.analysis.probe import LAST
from mpvg.inference import Predictor
from small_networks import FAMILIES, build, images
from untrained_runs import make_run


def one(model: Any) -> Tensor:
    return images(model, 1)[0]


@pytest.mark.parametrize("method", ["mpvg", "pvg", "lape", "gap", "default"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_changes_it_is_the_plain_forward_to_the_bit(family: str, method: str) -> None:
    try:
        model = build(family, method)
    except ValueError:
        assert family in ("Swin", "CeiT", "timm")  # they do not run every method
        return
    image = one(model)
    with torch.inference_mode():
        plain = model(image[None])[0]
    unit = Changes(factors=dict.fromkeys(receiving(model), 1.0))
    for changes in (None, Changes(), unit):
        output = predict(model, image, changes)
        assert torch.equal(output.logits, plain)
        assert torch.equal(output.image, image)
    assert "deliver" not in vars(model)
    assert "raw_pos_embed" not in vars(model)
    assert model.probe is None
    assert {place.name for place in output.places if place.delivered} <= {*receiving(model), LAST}


def by_hand(model: Any, image: Tensor, pes: list[Tensor | None], last: Tensor | None, pos: Tensor) -> Tensor:
    """A ViT with average pooling, from its equations: what is delivered is given."""
    x = model.patch_embed.proj(image[None]).flatten(2).transpose(1, 2) + pos
    for block, pe in zip(model.blocks, pes, strict=True):
        a = block.norm1(x) if pe is None else block.norm1(x) + pe
        attention, (b, n, c) = block.attn, x.shape
        q, k, v = attention.qkv(a).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        x = x + attention.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
        x = x + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
    x = model.norm(x)
    return model.head((x if last is None else x + last).mean(dim=1))[0]


@torch.no_grad()
def test_every_change_equals_a_forward_by_hand() -> None:
    model = build("ViT", "mpvg", depth=4).double()
    image = one(model).double()
    raw = model.pos_embed
    pes, last = list(model.deliver(raw).per_layer), model.deliver(raw).last
    assert list(receiving(model)) == [INPUT, "1", "2", "3", LAST]
    off = [None, pes[1], None, pes[3]]
    exchanged = [None, last, pes[2], pes[3]]
    for changes, expected in (
        (Changes(), by_hand(model, image, pes, last, raw)),
        (Changes(factors={"2": 0}), by_hand(model, image, off, last, raw)),
        (Changes(factors={LAST: 0}), by_hand(model, image, pes, None, raw)),
        (Changes(factors={"1": -0.5}), by_hand(model, image, [None, -0.5 * pes[1], *pes[2:]], last, raw)),
        (Changes(factors={INPUT: 3}), by_hand(model, image, pes, last, 3 * raw)),
        (Changes(factors={INPUT: 0}), by_hand(model, image, pes, last, 0 * raw)),
        (Changes(exchanged=("1", LAST)), by_hand(model, image, exchanged, pes[1], raw)),
        (
            Changes(exchanged=(LAST, "1"), factors={"1": 2}),
            by_hand(model, image, [None, 2 * last, *pes[2:]], pes[1], raw),
        ),
    ):
        torch.testing.assert_close(predict(model, image, changes).logits, expected, atol=1e-12, rtol=0)
    outputs = [predict(model, image, Changes(factors={name: 0})).logits for name in (INPUT, "1", "2", "3", LAST)]
    assert all(not torch.allclose(output, predict(model, image).logits, atol=1e-6) for output in outputs)


def test_an_exchange_twice_is_none_and_its_order_does_not_matter() -> None:
    model = build("ViT", "mpvg", depth=4)
    delivered = model.deliver(model.raw_pos_embed())
    changes = Changes(exchanged=("1", "3"))
    once = explore.apply(delivered, changes)
    assert torch.equal(once.per_layer[1], delivered.per_layer[3])
    assert torch.equal(once.per_layer[3], delivered.per_layer[1])
    twice = explore.apply(once, changes)
    assert all(a is b for a, b in zip(twice.per_layer, delivered.per_layer, strict=True))
    image = one(model)
    assert torch.equal(
        predict(model, image, changes).logits, predict(model, image, Changes(exchanged=("3", "1"))).logits
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_pe_alone_is_changed(family: str) -> None:
    """What is delivered is computed from the PE as it was learned."""
    model = build(family)
    image, before = one(model), model.deliver(model.raw_pos_embed())
    seen = []
    original = model.delivery.forward

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(original(*arguments, **named))
        return seen[-1]

    model.delivery.forward = watched
    assert not torch.equal(predict(model, image, Changes(factors={INPUT: 2.0})).logits, predict(model, image).logits)
    for delivered in seen:
        assert torch.equal(delivered.carry, before.carry)


def test_the_image_moves_and_its_border_is_repeated() -> None:
    model = build("ViT")
    image = one(model)
    output = predict(model, image, Changes(right=3, down=-2))
    side = image.shape[-1]
    for row, column in ((0, 0), (2, 5), (side - 1, side - 1)):
        source = image[:, min(side - 1, row + 2), max(0, column - 3)]
        assert torch.equal(output.image[:, row, column], source)
    assert torch.equal(output.logits, predict(model, output.image).logits)
    assert predict(model, image, Changes(right=10 * side)).image.std(dim=-1).max() == 0


@torch.no_grad()
@pytest.mark.parametrize("method", ["mpvg", "default", "gap"])
def test_norms_and_r_are_those_of_the_equations(method: str) -> None:
    model = build("ViT", method, depth=3)
    image = one(model)
    output = predict(model, image)
    assert [place.name for place in output.places] == ["0", "1", "2", LAST]
    delivered, prefix = model.deliver(model.pos_embed), model.num_prefix_tokens
    tokens, _ = model.embed(image[None])
    for layer, (place, pe) in enumerate(zip(output.places, [*delivered.per_layer, delivered.last], strict=True)):
        last = layer == len(model.blocks)
        normed = (model.norm if last else model.blocks[layer].norm1)(tokens)
        a = normed[0, prefix:].double().numpy()
        b = (model.pos_embed if pe is None else pe)[0, prefix:].double().numpy()
        assert place.delivered == (pe is not None)
        assert place.norms.numpy() == pytest.approx(np.linalg.norm(tokens[0, prefix:].double(), axis=1))
        assert place.r == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        constant = np.corrcoef(a.mean(axis=0), b.mean(axis=0))[0, 1]
        positional = np.corrcoef((a - a.mean(axis=0)).ravel(), (b - b.mean(axis=0)).ravel())[0, 1]
        assert (place.r_constant, place.r_positional) == pytest.approx((constant, positional))
        if last:
            after = a if pe is None else a + b
            assert output.norms_after.numpy() == pytest.approx(np.linalg.norm(after, axis=1))
        else:
            tokens = model.blocks[layer](tokens, pe=pe)


def test_a_place_that_is_switched_off_is_compared_with_the_raw_pe() -> None:
    model = build("ViT", "mpvg", depth=3)
    image = one(model)
    on, off = (predict(model, image, Changes(factors={"1": factor})).places[1] for factor in (1, 0))
    assert (on.delivered, off.delivered) == (True, False)
    assert on.r != off.r
    small = predict(model, image, Changes(factors={"1": 0.25})).places[1]
    assert small.r == pytest.approx(on.r)  # r does not see a factor above 0, at the place itself


@pytest.mark.parametrize("family", ["CeiT", "Swin"])
def test_what_a_network_does_not_have_is_left_out(family: str) -> None:
    model = build(family)
    output = predict(model, one(model))
    assert len(output.places) == len(model.blocks) + (family == "Swin")
    assert (output.norms_after is None) == (family == "CeiT")


def test_a_timm_network_that_normalizes_the_mean_has_no_last_ln_on_tokens() -> None:
    model = build("timm", "pvg", readout="keep", global_pool="avg")
    output = predict(model, one(model))
    assert [place.name for place in output.places] == ["0", "1"]
    assert output.norms_after is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (Changes(factors={"0": 0.5}), "'0' receives no PE; allowed: input, 1, Last LN"),
        (Changes(factors={"7": 0.5}), "'7' receives no PE"),
        (Changes(factors={"1": math.nan}), "the factor of 1 is nan; allowed: a finite number"),
        (Changes(factors={INPUT: math.inf}), "the factor of input is inf"),
        (Changes(exchanged=("1", INPUT)), "'input' receives no PE; allowed: 1, Last LN"),
        (Changes(exchanged=("Last", "1")), "'Last' receives no PE"),
        (Changes(factors={"1": 1e38, LAST: 1e38}), "NaN or infinite values; use smaller factors"),
    ],
    ids=["layer 0", "no layer", "nan", "inf", "input", "no name", "overflow"],
)
def test_changes_that_cannot_be_are_refused(changes: Changes, reason: str) -> None:
    model = build("ViT")
    with pytest.raises(ValueError, match=reason):
        predict(model, one(model), changes)
    assert model.probe is None
    assert "deliver" not in vars(model)


def test_a_network_without_any_pe_to_deliver_says_so() -> None:
    model = build("ViT", "gap")
    assert list(receiving(model)) == [INPUT]
    with pytest.raises(ValueError, match=r"'1' receives no PE; allowed: none, because the method delivers no PE"):
        predict(model, one(model), Changes(exchanged=("1", LAST)))


def test_pes_of_different_shapes_are_not_exchanged() -> None:
    model = build("Swin")
    with pytest.raises(ValueError, match="have the shapes"):
        predict(model, one(model), Changes(exchanged=("0", "1")))


def test_folded_networks_and_others_are_refused() -> None:
    with pytest.raises(ValueError, match="folded"):
        receiving(fold(build("ViT")))
    with pytest.raises(ValueError, match="does not receive a delivered PE"):
        receiving(torch.nn.Linear(1, 1))


# ---- of a run


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> ExploredRun:
    return ExploredRun(make_run(tmp_path_factory.mktemp("explored") / "run"))


def test_a_validation_image_is_what_evaluation_sees(explored: ExploredRun) -> None:
    run = explored.run
    everything = torch.cat([batch.images for batch in run.validation(torch.device("cpu"), batch_size=64).epoch()])
    assert explored.images == len(everything)
    for number in (0, 7, explored.images - 1):
        selected = explored.validation_image(number)
        assert torch.equal(selected.input, everything[number])
        assert selected.name == f"number {number}"
        assert selected.target in run.info.class_names
    for number in (-1, explored.images):
        with pytest.raises(ValueError, match=rf"the number of the image is {number}; allowed: 0 to"):
            explored.validation_image(number)


def test_an_upload_is_answered_as_the_predictor_does(explored: ExploredRun, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 21, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    selected = explored.read(tmp_path / "a.png")
    assert (selected.name, selected.target) == ("a.png", None)
    (expected,) = Predictor(explored.run, checkpoint="last").predict(tmp_path / "a.png")
    found = explored.predict(selected.input).probabilities
    best, place = found.topk(5)
    names = [explored.run.info.class_names[number] for number in place.tolist()]
    assert tuple(zip(names, best.tolist(), strict=True)) == expected.classes  # type: ignore[attr-defined]


def png_header(width: int, height: int) -> bytes:
    """A PNG of some dozen bytes that says it has so many pixels, and has none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png_header(30_000, 30_000), "DecompressionBomb"),
        (b"no image at all", "cannot identify image file"),
        (b"", "cannot identify image file"),
        (png_header(8, 8), r"\(OSError: "),
    ],
    ids=["30,000 pixels", "text", "empty", "cut"],
)
def test_an_upload_that_is_no_image_is_refused(
    explored: ExploredRun, tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "upload.png").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as refused:
        explored.read(tmp_path / "upload.png")
    assert "\n" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_a_run_without_its_data_takes_uploads(explored: ExploredRun, tmp_path: Path) -> None:
    run = explored.run
    gone = ExploredRun(replace(run, config=replace(run.config, data=str(tmp_path / "gone"))))
    assert gone.images == 0
    with pytest.raises(ValueError, match=r"the validation set is missing \(.*gone.*upload an image"):
        gone.validation_image(0)


def test_a_run_of_another_task_is_refused(explored: ExploredRun) -> None:
    class Dense:
        config = replace(explored.run.config, task="detection")
        path = explored.run.path

        def task(self) -> object:
            return object()

    with pytest.raises(ValueError, match=r" is a run of detection; give a run of classification"):
        ExploredRun(Dense())
