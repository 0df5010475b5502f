"""Optimizer, schedule, and the optimizer's state as tensors and JSON."""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from mpvg.config import OptimConfig, RunConfig
from mpvg.models import create_model
from mpvg.training.optimizer import build_optimizer, build_schedule, pack, unpack

MakeConfig = Callable[..., RunConfig]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[torch.Tensor]:
    for _ in range(count):
        inputs = torch.randn(4, 3, 8, 8)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "nadamw", "rmsproptf", "madgrad", "adafactor"])
def test_a_state_taken_apart_and_put_together_continues_exactly(tiny: MakeConfig, name: str) -> None:
    config = tiny(optim=OptimConfig(name=name, layer_decay=0.7), lr=1e-3)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
        made.append((model, build_optimizer(model, config)))
    (model, optimizer), (other, other_optimizer) = made
    steps(model, optimizer, 3)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5  # what the schedule does
    tensors, rest = pack(optimizer)
    tensors = safetensors.torch.load(safetensors.torch.save(tensors))
    rest = json.loads(json.dumps(rest))
    other.load_state_dict(model.state_dict())
    unpack(other_optimizer, tensors, rest)
    torch.manual_seed(3)
    expected = steps(model, optimizer, 3)
    torch.manual_seed(3)
    actual = steps(other, other_optimizer, 3)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    again, rest_again = pack(other_optimizer)
    assert pack(optimizer)[0].keys() == again.keys() == tensors.keys()
    assert all(torch.equal(value, again[key]) for key, value in pack(optimizer)[0].items())
    assert json.dumps(rest_again) == json.dumps(pack(optimizer)[1])


def test_vectors_position_embeddings_and_class_tokens_get_no_weight_decay(tiny: MakeConfig) -> None:
    model = create_model("vit_mini_patch2_8", "pvg_token", num_classes=3)
    optimizer = build_optimizer(model, tiny(optim=OptimConfig(weight_decay=0.3)))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named: dict[str, Any] = dict(model.named_parameters())
    assert len(decay) == len(named)
    for name, parameter in named.items():
        exempt = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert decay[id(parameter)] == (0.0 if exempt else 0.3), name
    assert {"pos_embed", "cls_token", "delivery.layer_norms.1.weight"} <= named.keys()


def test_layer_decay_falls_from_the_head_downwards(tiny: MakeConfig) -> None:
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
    optimizer = build_optimizer(model, tiny(optim=OptimConfig(layer_decay=0.5)))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    named: dict[str, Any] = dict(model.named_parameters())
    assert scale[id(named["head.weight"])] == 1
    layers = [scale[id(named[f"blocks.{layer}.attn.qkv.weight"])] for layer in range(len(model.blocks))]
    assert all(below == above * 0.5 for below, above in itertools.pairwise(layers))
    assert scale[id(named["pos_embed"])] == layers[0] * 0.5
    assert scale[id(named["delivery.layer_norms.3.weight"])] == layers[3]


def test_an_unknown_optimizer_is_refused_with_the_nearest_names(tiny: MakeConfig) -> None:
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
    with pytest.raises(ValueError, match=r"optim.name is 'adamww'; allowed: timm's names, such as adamw, "):
        build_optimizer(model, tiny(optim=OptimConfig(name="adamww")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adan", "'adan', which cannot be made here"),  # three betas
        ("bnbadamw", "'bnbadamw', which cannot be made here"),  # another package
        ("adafactorbv", "state of the optimizer AdafactorBigVision cannot be saved"),
    ],
)
def test_an_optimizer_that_cannot_be_made_or_saved_is_refused_at_once(
    tiny: MakeConfig, name: str, message: str
) -> None:
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, tiny(optim=OptimConfig(name=name)))


@pytest.mark.parametrize("warmup", [0, 1, 0.5, 4])
def test_the_schedule_is_a_line_and_then_a_cosine_over_all_epochs(tiny: MakeConfig, warmup: float) -> None:
    optim = OptimConfig(warmup_epochs=warmup, warmup_lr=1e-4, min_lr=1e-5)
    config = tiny(epochs=4, lr=1e-2, optim=optim)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = build_schedule(optimizer, config, steps_per_epoch=10)
    rates = []
    for step in range(40):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    ramp = int(10 * warmup)
    expected = [1e-4 + (1e-2 - 1e-4) * step / ramp for step in range(ramp)]
    expected += [1e-5 + (1e-2 - 1e-5) * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(ramp, 40)]
    assert rates == pytest.approx(expected, rel=1e-9)
    if ramp < 40:
        assert rates[-1] < 1e-5 + 2e-4


def test_the_schedule_needs_no_history(tiny: MakeConfig) -> None:
    config = tiny(epochs=4, optim=OptimConfig(warmup_epochs=1))
    rates = []
    for order in (range(25), [24]):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
        schedule = build_schedule(optimizer, config, steps_per_epoch=10)
        for step in order:
            schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]


def test_a_peak_below_the_ends_flattens_them(tiny: MakeConfig) -> None:
    config = tiny(epochs=2, lr=1e-7, optim=OptimConfig(warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-5))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = build_schedule(optimizer, config, steps_per_epoch=5)
    for step in range(10):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-7)
