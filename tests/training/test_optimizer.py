"""Optimizer, schedule, and the optimizer's state as tensors and JSON."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from mpvg.config import OptimConfig, RunConfig
from mpvg.models import create_model
from mpvg.recipes import recipe
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
        ("adan", "'adan', which cannot be created here"),  # three betas
        ("bnbadamw", "'bnbadamw', which cannot be created here"),  # another package
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
        schedule.set_rate(step // 10, step)
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
            schedule.set_rate(step // 10, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]


def test_a_peak_below_the_ends_flattens_them(tiny: MakeConfig) -> None:
    config = tiny(epochs=2, lr=1e-7, optim=OptimConfig(warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-5))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = build_schedule(optimizer, config, steps_per_epoch=5)
    for step in range(10):
        schedule.set_rate(step // 5, step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-7)


def test_a_warm_up_is_given_in_steps_whatever_the_epochs(tiny: MakeConfig) -> None:
    for epochs, steps_per_epoch in ((4, 10), (2, 20), (8, 5)):
        config = tiny(epochs=epochs, lr=1e-2, optim=OptimConfig(warmup_steps=7, warmup_lr=1e-4, min_lr=0.0))
        found = rates(config, steps_per_epoch)
        assert found[:7] == pytest.approx([1e-4 + (1e-2 - 1e-4) * step / 7 for step in range(7)])
        assert found[7:] == pytest.approx([cosine(step, 40, 0, 1e-2) for step in range(7, 40)])


def test_a_warm_up_in_steps_that_does_not_fit_is_refused(tiny: MakeConfig) -> None:
    with pytest.raises(ValueError, match="optim.warmup_steps 3 and optim.warmup_epochs 1 both give the warm-up"):
        rates(tiny(epochs=2, optim=OptimConfig(warmup_steps=3, warmup_epochs=1)), 10)
    with pytest.raises(ValueError, match="optim.warmup_steps is -1; allowed: a whole number >= 0"):
        OptimConfig(warmup_steps=-1)
    with pytest.raises(ValueError, match="optim.warmup_steps is 20, and the run has 20 steps; give fewer"):
        rates(tiny(epochs=2, optim=OptimConfig(warmup_steps=20)), 10)
    by_epoch = OptimConfig(warmup_steps=2, schedule_unit="epoch")
    with pytest.raises(ValueError, match="but the rate changes every epoch; give optim.schedule_unit step"):
        rates(tiny(epochs=2, optim=by_epoch), 10)


# ---- the schedules of the paper's runs, against formulas


def cosine(t: float, length: float, low: float, high: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * t / length)) / 2


def rates(config: RunConfig, steps_per_epoch: int) -> list[float]:
    """The rate of every step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule, found = build_schedule(optimizer, config, steps_per_epoch), []
    for step in range(config.epochs * steps_per_epoch):
        schedule.set_rate(step // steps_per_epoch, step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def by_epoch(name: str) -> list[float]:
    """One rate an epoch; that it is the same for all its steps is checked on the way."""
    found = rates(recipe(name), 2)
    assert found[::2] == found[1::2]
    return found[::2]


def test_the_segmenters_rate_falls_linearly_after_1500_steps() -> None:
    """mmcv's `poly` of power 1 over 160,000 steps; its warm-up is of the falling rate, so up to 1 % lower."""
    config = dataclasses.replace(recipe("ade20k_vit_adapter_tiny"), epochs=160)
    found = rates(config, 1000)  # 160 times 1,000 steps are as many as 10 times 16,000
    assert found[1500:] == pytest.approx([12e-5 * (1 - step / 160_000) for step in range(1500, 160_000)], rel=1e-9)
    for step in range(1500):
        regular = 12e-5 * (1 - step / 160_000)
        theirs = regular * (1 - (1 - step / 1500) * (1 - 1e-6))
        assert theirs * (1 - 1e-9) <= found[step] <= 1.0095 * theirs


@pytest.mark.parametrize("name", ["deit_tiny", "deit_small", "deit_base", "ceit_tiny"])
def test_deits_rate_comes_an_epoch_late(name: str) -> None:
    """Epochs 0 and 1 both at 1e-6, the last at the rate of epoch 298: 1.01e-5."""
    at = [1e-6 + (1e-3 - 1e-6) * e / 5 if e < 5 else cosine(e, 300, 1e-5, 1e-3) for e in range(300)]
    found = by_epoch(name)
    assert found == pytest.approx([at[0], *at[:-1]], rel=1e-9)
    assert found[:2] == [1e-6, 1e-6]
    assert found[-1] == pytest.approx(1.01e-5, rel=2e-2)


def test_swins_rate_changes_with_every_step_and_its_cosine_begins_behind_the_warm_up() -> None:
    steps = 3
    at = [1e-6 + (1e-3 - 1e-6) * s / (20 * steps) for s in range(20 * steps)]
    at += [cosine(s, 280 * steps, 1e-5, 1e-3) for s in range(280 * steps)]
    assert rates(recipe("swin_tiny"), steps) == pytest.approx([at[0], *at[:-1]], rel=1e-9)


@pytest.mark.parametrize(("name", "peak"), [("t2t_vit_7", 1e-3), ("vit_lite_7_cifar100", 6e-4)])
def test_the_last_ten_of_310_epochs_are_at_the_final_rate(name: str, peak: float) -> None:
    at = [1e-6 + (peak - 1e-6) * e / 10 if e < 10 else cosine(e, 300, 1e-5, peak) for e in range(300)]
    assert by_epoch(name) == pytest.approx(at + [1e-5] * 10, rel=1e-9)


def test_the_transfers_head_and_body_end_at_the_same_rate() -> None:
    """5e-2 for the head, a hundredth for the rest, 2e-4 at the end for both; no update for what the script left out."""
    config = recipe("t2t_vit_7_cifar100")
    model = create_model("t2t_vit_7", "mpvg", num_classes=100, img_size=32)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 2)
    named = dict(model.named_parameters())
    rate = {id(p): (lambda g=group: g["lr"]) for group in optimizer.param_groups for p in group["params"]}
    assert not isinstance(optimizer, torch.optim.AdamW)
    assert {(g["weight_decay"], g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(5e-4, 0.9, False)}
    still = [name for name in named if name.startswith(("norm.", "delivery.last_norm.", "pos_embed"))]
    still += [name for name in named if name.endswith((".attention1.w", ".attention2.w"))]
    assert sorted(set(named) - {n for n, p in named.items() if id(p) in rate}) == sorted(still)
    for epoch in (0, 30, 59):
        schedule.set_rate(epoch, 2 * epoch)
        for name, parameter in named.items():
            if name not in still:
                base = 5e-2 if name.startswith("head.") else 5e-4
                assert rate[id(parameter)]() == pytest.approx(cosine(epoch, 60, 2e-4, base)), name


@pytest.mark.parametrize("name", ["tanh", "step", "poly", "wsd", "rsqrt", "constant"])
def test_any_schedule_that_timm_knows_goes_by_name(tiny: MakeConfig, name: str) -> None:
    """As timm's own factory makes it, from the same values."""
    config = tiny(epochs=4, lr=1e-2, optim=OptimConfig(schedule=name, warmup_epochs=1, decay_epochs=1, decay_rate=0.5))
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    timms, _ = create_scheduler_v2(
        other,
        sched=name,
        num_epochs=4,
        decay_epochs=1,
        decay_rate=0.5,
        min_lr=1e-5,
        warmup_lr=1e-6,
        warmup_epochs=1,
        step_on_epochs=False,
        updates_per_epoch=5,
    )
    expected = []
    for step in range(20):
        timms.step_update(step)
        expected.append(other.param_groups[0]["lr"])
    assert rates(config, 5) == pytest.approx(expected)
    assert len(set(expected[5:])) > 1 or name == "constant"


def test_the_rate_drops_at_the_milestones(tiny: MakeConfig) -> None:
    """The run of the paper's Table 8, short: a line, and two drops to a tenth."""
    optim = OptimConfig(schedule="multistep", milestones=(2.0, 3.0), warmup_epochs=0.5, warmup_lr=1e-5)
    found = rates(tiny(epochs=4, lr=1e-2, optim=optim), 10)
    assert found[:5] == pytest.approx([1e-5 + step / 5 * (1e-2 - 1e-5) for step in range(5)])
    # timm counts a step before it takes it.
    assert found[5:] == pytest.approx([1e-2] * 14 + [1e-3] * 10 + [1e-4] * 11)


@pytest.mark.parametrize("optim", [{"schedule": "multistep"}, {"milestones": (2.0,)}])
def test_milestones_belong_to_one_schedule(tiny: MakeConfig, optim: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"optim\.schedule is '\w+' and optim\.milestones are .* allowed: milestones"):
        rates(tiny(optim=OptimConfig(**optim)), 2)


@pytest.mark.parametrize("name", ["cosin", "plateau", "none"])
def test_a_schedule_that_does_not_go_by_time_is_refused(tiny: MakeConfig, name: str) -> None:
    with pytest.raises(ValueError, match=rf"optim\.schedule is '{name}'; allowed: .* cosine, tanh"):
        rates(tiny(optim=OptimConfig(schedule=name)), 2)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"frozen": ("blocks[",)}, r"optim\.frozen: 'blocks\[' is not a valid pattern"),
        ({"frozen": ("blokcs",)}, r"optim\.frozen: no parameter matches 'blokcs'"),
        ({"body_lr": 0.1, "layer_decay": 0.7}, r"optim\.body_lr and optim\.layer_decay both set the learning rates"),
    ],
)
def test_what_cannot_be_grouped_is_refused(tiny: MakeConfig, optim: dict[str, Any], message: str) -> None:
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, tiny(optim=OptimConfig(**optim)))


# ---- factors on the rates of single parameters

BETA = r"^norm\.bias$"


def rates_of(config: RunConfig, steps_per_epoch: int = 5) -> dict[str, list[float]]:
    """The rate of each parameter at every step."""
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, steps_per_epoch)
    found: dict[str, list[float]] = {name: [] for name, _ in model.named_parameters()}
    for step in range(config.epochs * steps_per_epoch):
        schedule.set_rate(step // steps_per_epoch, step)
        rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            found[name].append(rate[id(parameter)])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_epochs": 1.0, "warmup_lr": 1e-4, "min_lr": 1e-5},
        {"warmup_epochs": 0.0, "min_lr": 1e-3, "cooldown_epochs": 1},
        {"schedule": "step", "decay_epochs": 1.0, "warmup_epochs": 1.0, "warmup_prefix": True},
        {"schedule": "constant", "schedule_unit": "epoch", "schedule_lag": 1, "warmup_epochs": 2.0},
        {"layer_decay": 0.5, "warmup_epochs": 1.0},
        {"body_lr": 0.1, "warmup_epochs": 1.0, "warmup_lr": 1e-4},
    ],
)
def test_a_factor_holds_exactly_at_every_step_of_the_schedule(tiny: MakeConfig, options: dict[str, Any]) -> None:
    """From the first step of the warm-up to the final rate, on top of other factors; other rates stay as they are."""
    config = tiny(epochs=4, lr=1e-2, optim=OptimConfig(**options))
    plain = rates_of(config)
    scaled = rates_of(tiny(epochs=4, lr=1e-2, optim=OptimConfig(**options, rates={BETA: 2.0, r"^pos_embed$": 0.02})))
    assert scaled.keys() == plain.keys()
    for name, before in plain.items():
        if name == "norm.bias":
            assert scaled[name] == [2 * rate for rate in before]
        elif name == "pos_embed":
            assert scaled[name] == pytest.approx([rate / 50 for rate in before], rel=1e-12)
        else:
            assert scaled[name] == before, name


def test_the_first_pattern_counts(tiny: MakeConfig) -> None:
    """In the order in which they are written, whether the later one is wider or narrower."""
    plain = rates_of(tiny(epochs=1, lr=1e-2, optim=OptimConfig()))["norm.bias"]
    for rates, factor in ({BETA: 2.0, "bias": 8.0}, 2), ({"bias": 8.0, BETA: 2.0}, 8):
        found = rates_of(tiny(epochs=1, lr=1e-2, optim=OptimConfig(rates=rates)))
        assert found["norm.bias"] == [factor * rate for rate in plain]
        assert found["head.bias"] == [8 * rate for rate in plain]
        assert found["head.weight"] == plain


def test_a_factor_leaves_weight_decay_and_each_parameters_one_group(tiny: MakeConfig) -> None:
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
    optimizer = build_optimizer(model, tiny(optim=OptimConfig(weight_decay=0.3, rates={r"norm1|head": 4.0})))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if parameter.ndim == 1 or name == "pos_embed" else 0.3), name


def test_without_factors_the_groups_are_timms(tiny: MakeConfig) -> None:
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
    ours = build_optimizer(model, tiny(lr=1e-2, optim=OptimConfig(weight_decay=0.3)))
    timms = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.3)
    assert [list(map(id, group["params"])) for group in ours.param_groups] == [
        list(map(id, group["params"])) for group in timms.param_groups
    ]
    assert not any("lr_scale" in group for group in ours.param_groups)


def test_a_state_with_factors_continues_exactly(tiny: MakeConfig) -> None:
    config = tiny(lr=1e-2, optim=OptimConfig(warmup_epochs=0.5, rates={BETA: 2.0, "norm1": 0.5}))
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
        made.append((model, build_optimizer(model, config)))
    (model, optimizer), (other, other_optimizer) = made
    steps(model, optimizer, 3)
    tensors, rest = pack(optimizer)
    other.load_state_dict(model.state_dict())
    unpack(other_optimizer, safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(rest)))
    for network, its in made:
        build_schedule(its, config, 5).set_rate(0, 4)
        torch.manual_seed(3)
        steps(network, its, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": {"norm[": 2.0}}, r"optim\.rates: 'norm\[' is not a valid pattern"),
        ({"rates": {"nrom": 2.0}}, r"optim\.rates: no parameter matches 'nrom'; the names are those in model"),
        ({"rates": {BETA: 2.0}, "frozen": (BETA,)}, r"optim\.rates: .* matches frozen parameters only; leave it out"),
    ],
)
def test_a_factor_that_would_have_no_effect_is_refused(tiny: MakeConfig, options: Any, message: str) -> None:
    model = create_model("vit_mini_patch2_8", "mpvg", num_classes=3)
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, tiny(optim=OptimConfig(**options)))


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_factor_is_a_number_above_0(factor: float) -> None:
    with pytest.raises(ValueError, match=r"optim\.rates\['bias'\] is .*; allowed: a number > 0; .* use optim\.frozen"):
        OptimConfig(rates={"bias": factor})
