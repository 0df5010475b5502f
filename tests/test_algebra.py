"""What a PE at the Last LN can and cannot change, proven without a run: exact statements, in float64.

Letters: W and h are the head's weight and bias, beta is the Last LN's bias, beta' is that of LN'_last, b is what beta
and LN'_last(pos_k) together add to the read-out, and m is the rest of the read-out. Under the mean and the class token,
logits = W (m + b) + h.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpvg.config import OptimConfig, RunConfig
from mpvg.delivery import METHODS, DeliverySpec, Method, Pool
from mpvg.models import create_model
from mpvg.training.optimizer import build_optimizer, build_schedule

CLASSES, BATCH, TOKENS, DIM = 5, 6, 16, 96
MPVG_TOKEN = DeliverySpec(pool="token", first_layer=1, last_index=0)
EXACT, CLEAR = 1e-12, 1e-3
"""Rounding in float64; and a difference that no rounding explains."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def build(method: Method, *, start: bool = False, **kwargs: Any) -> Any:
    """In float64; no parameter is where it starts, unless the start is asked for."""
    model = create_model("vit_mini_patch7_28", method, num_classes=CLASSES, in_chans=1, **kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0 if start else 0.2 * torch.randn_like(parameter)
    return model


def images(count: int = BATCH) -> Tensor:
    return torch.randn(count, 1, 28, 28, dtype=torch.float64)


def targets(count: int = BATCH) -> Tensor:
    """Soft ones, as Mixup makes them; the class frequencies are not equal."""
    return torch.randn(count, CLASSES, dtype=torch.float64).mul(2).softmax(dim=1)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1)


def differentiate(model: Any, loss: Tensor) -> None:
    model.zero_grad()
    loss.backward()


def worst(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@torch.no_grad()
def without_last(model: Any) -> Any:
    """The same weights, and nothing delivered to the Last LN."""
    twin = copy.deepcopy(model)
    twin.delivery.last_norm = None
    return twin


# ---- 1.1: the function class


@pytest.mark.parametrize("method", ["mpvg", "gap_last0", "mpvg_flat", "mpvg_last5", MPVG_TOKEN])
def test_the_pe_at_the_last_norm_moves_into_beta_or_into_the_heads_bias(method: Method) -> None:
    """MPVG = PVG with another beta = PVG with beta 0 and another head bias; so no function is gained."""
    model, batch = build(method), images()
    with torch.no_grad():
        shift = model.pool(model.deliver(model.raw_pos_embed()).last)[0]
        moved, without_beta = without_last(model), without_last(model)
        moved.norm.bias += shift
        without_beta.head.bias += without_beta.head.weight @ (without_beta.norm.bias + shift)
        without_beta.norm.bias.zero_()
        expected = model(batch)
        assert worst(moved(batch), expected) < EXACT
        assert worst(without_beta(batch), expected) < EXACT
        assert worst(without_last(model)(batch), expected) > CLEAR


# ---- 1.2: the gradient


@pytest.mark.parametrize("method", ["mpvg", "gap_last0", MPVG_TOKEN])
def test_beta_and_its_twin_learn_what_the_heads_bias_learns(method: Method) -> None:
    """dL/dbeta = dL/dbeta' = W^T dL/dh, and dL/dh is the predicted minus the true class frequency."""
    model, batch, target = build(method), images(), targets()
    logits = model(batch)
    differentiate(model, loss_of(logits, target))
    smoothed = 0.9 * target + 0.1 / CLASSES
    assert worst(model.head.bias.grad, (logits.softmax(dim=1) - smoothed).mean(dim=0)) < EXACT
    expected = model.head.weight.T @ model.head.bias.grad
    assert expected.abs().max() > CLEAR
    assert worst(model.norm.bias.grad, expected) < EXACT
    assert worst(model.delivery.last_norm.bias.grad, expected) < EXACT


def test_the_pe_at_the_last_norm_never_sees_an_image() -> None:
    """All that it learns from is dL/dh: LN'_last's weight gets W^T dL/dh times the mean normalized row of the PE."""
    model = build("mpvg")
    differentiate(model, loss_of(model(images()), targets()))
    pos = model.pos_embed[0]
    rows = (pos - pos.mean(dim=1, keepdim=True)) / (pos.var(dim=1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = model.head.weight.T @ model.head.bias.grad * rows.mean(dim=0)
    assert worst(model.delivery.last_norm.weight.grad, expected) < EXACT


def test_where_the_heads_bias_is_stationary_it_learns_nothing() -> None:
    """Images that the network still confuses give it no gradient, while every layer has one."""
    model, batch, target = build("mpvg"), images(), targets()
    fit = torch.optim.LBFGS([model.head.bias], max_iter=200, tolerance_grad=1e-14, tolerance_change=0)

    def closure() -> Tensor:
        differentiate(model, loss := loss_of(model(batch), target))
        return loss

    fit.step(closure)
    differentiate(model, loss_of(model(batch), target))
    for parameter in (model.head.bias, model.norm.bias, *model.delivery.last_norm.parameters()):
        assert parameter.grad.abs().max() < 1e-8
    for parameter in (model.head.weight, model.norm.weight, *model.delivery.layer_norms.parameters()):
        assert parameter.grad.abs().max() > 1e-4


# ---- 1.3: the head's weight


def test_the_heads_weight_gets_one_more_term_of_rank_one() -> None:
    """dL/dW of MPVG is that of the network with b in the head's bias, plus (dL/dh) b^T."""
    model, batch, target = build("mpvg"), images(), targets()
    twin = without_last(model)
    with torch.no_grad():
        b = model.norm.bias + model.pool(model.deliver(model.raw_pos_embed()).last)[0]
        twin.head.bias += twin.head.weight @ b
        twin.norm.bias.zero_()
    for network in (model, twin):
        differentiate(network, loss_of(network(batch), target))
    assert worst(model.head.bias.grad, twin.head.bias.grad) < EXACT
    more = model.head.weight.grad - twin.head.weight.grad
    assert worst(more, torch.outer(model.head.bias.grad, b)) < EXACT
    assert more.abs().max() > CLEAR


# ---- 1.4: the optimizer

FREE = DeliverySpec(first_layer=1, last_index=0, last_gain=0.0)
"""With LN'_last's weight frozen at 0, what the Last LN receives is beta' on every token: a free constant vector."""


def train(method: Method, epochs: int = 6, lr: float = 1e-3, clip: float | None = None, **optim: Any) -> Any:
    """Epochs of 10 steps with a warm-up and a cosine: the same first weights and the same images for every method."""
    torch.manual_seed(1)
    state = build("pvg", start=True, depth=2).state_dict()
    model = build(method, start=True, depth=2).train()
    model.load_state_dict(state, strict=False)
    options = {"warmup_epochs": 1.0, "weight_decay": 0.05} | optim
    run: dict[str, Any] = {"data": "digits", "model": "vit_mini_patch7_28", "recipe": "test", "batch_size": BATCH}
    config = RunConfig(**run, lr=lr, epochs=epochs, optim=OptimConfig(**options))
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, steps_per_epoch=10)
    torch.manual_seed(2)
    batch, target = images(), targets()
    for step in range(10 * epochs):
        schedule.set_rate(step // 10, step)
        differentiate(model, loss_of(model(batch), target))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def free_and_doubled(name: str = "adamw", **options: Any) -> tuple[Any, Any]:
    """MPVG with a free constant vector, and PVG with the doubled rate of beta, trained from the same weights."""
    free = train(FREE, name=name, frozen=(r"^delivery\.last_norm\.weight$",), **options)
    return free, train("pvg", name=name, rates={r"^norm\.bias$": 2.0}, **options)


def apart(free: Any, doubled: Any) -> float:
    """The largest difference of any weight, with beta + beta' in beta's place."""
    sum_of_both = free.norm.bias + free.delivery.last_norm.bias
    named = dict(free.named_parameters()) | {"norm.bias": sum_of_both}
    return max(worst(named[name], parameter) for name, parameter in doubled.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_a_free_constant_vector_is_beta_at_twice_the_rate(name: str) -> None:
    """Every weight of the two networks is the same after 60 steps of warm-up and cosine, and beta has moved; also with
    LAMB, because timm's has no trust ratio for what does not decay.
    """
    free, doubled = free_and_doubled(name)
    assert apart(free, doubled) < EXACT
    assert worst(free.norm.bias, free.delivery.last_norm.bias) < EXACT
    assert worst(free.norm.bias, doubled.norm.bias) > CLEAR


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd", "lr": 0.1, "clip": 0.1},
        {"name": "adamw", "decay_all": True, "weight_decay": 1.0},
        {"name": "lamb", "decay_all": True, "weight_decay": 1e-12},
    ],
    ids=["clipping", "decay of vectors", "trust ratio"],
)
def test_it_is_not_where_the_optimizer_sees_more_than_each_gradient(options: dict[str, Any]) -> None:
    """One vector and two differ in the norm over all gradients, in the pull to 0, and in the norm of each."""
    free, doubled = free_and_doubled(epochs=2, warmup_epochs=0.0, **options)
    assert apart(free, doubled) > 1e-5


def test_beta_and_its_twin_stay_equal_for_ever() -> None:
    """In MPVG itself, where LN'_last's weight and the PE are trained, too."""
    model = train("mpvg")
    assert model.norm.bias.abs().max() > CLEAR
    assert worst(model.norm.bias, model.delivery.last_norm.bias) < EXACT


# ---- 1.5: what is left of MPVG: a start, and a route into the PE


def started(pool: Pool, seed: int) -> Tensor:
    torch.manual_seed(seed)
    model = build(DeliverySpec(pool=pool, first_layer=1, start_beta=True), start=True, depth=2)
    bias: Tensor = model.norm.bias.detach()
    return bias


def test_the_start_has_a_variance_of_one_by_the_number_of_tokens() -> None:
    """Over 16 networks: 1/N under the mean, and N times that, 1, for the class token's single row (1.6)."""
    mean, token = (torch.stack([started(pool, seed) for seed in range(16)]) for pool in ("avg", "token"))
    assert mean.shape == (16, DIM)
    assert mean.square().mean().item() == pytest.approx(1 / TOKENS, rel=0.1)
    assert token.square().mean().item() == pytest.approx(1, rel=0.01)


def test_the_route_into_the_pe_amplifies_fifty_times() -> None:
    """A change of a row, orthogonal to it and to its mean, leaves LN'_last divided by the row's std: 1 / 0.02."""
    model = build("mpvg", start=True)
    pos = model.pos_embed.detach()
    row = pos - pos.mean(dim=-1, keepdim=True)
    change = torch.randn_like(pos)
    change -= change.mean(dim=-1, keepdim=True)
    change -= row * (change * row).sum(dim=-1, keepdim=True) / row.square().sum(dim=-1, keepdim=True)
    _, moved = torch.autograd.functional.jvp(lambda p: model.deliver(p).last, pos, change)
    gain = 1 / (pos.var(dim=-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert worst(moved, change * gain) < 1e-9
    assert gain.mean().item() == pytest.approx(50, rel=0.05)


def test_the_route_into_the_pe_can_be_closed() -> None:
    """With last_detach the logits are the same, and the PE learns only from the other places it goes to."""
    model = build("mpvg")
    closed = build(replace(METHODS["mpvg"], last_detach=True))
    closed.load_state_dict(model.state_dict())
    plain, batch, target = without_last(model), images(), targets()
    with torch.no_grad():
        plain.norm.bias += model.pool(model.deliver(model.raw_pos_embed()).last)[0]
    for network in (model, closed, plain):
        differentiate(network, loss_of(network(batch), target))
    assert torch.equal(model(batch), closed(batch))
    assert worst(closed.pos_embed.grad, plain.pos_embed.grad) < EXACT
    assert worst(closed.pos_embed.grad, model.pos_embed.grad) > CLEAR / 10
    assert torch.equal(closed.delivery.last_norm.weight.grad, model.delivery.last_norm.weight.grad)


# ---- 1.6: the class token


def test_mpvg_with_a_class_token_adds_one_constant_row() -> None:
    """LN'_last(pos_cls), the same for every image: nothing about the class token stands in the way."""
    model, batch = build(MPVG_TOKEN), images()
    with torch.no_grad():
        moved = model(batch) - without_last(model)(batch)
        row = model.delivery.last_norm(model.pos_embed[:, 0])
    assert worst(moved, (row @ model.head.weight.T).expand_as(moved)) < EXACT
    assert moved.abs().max() > CLEAR
    mean = build(replace(MPVG_TOKEN, last_part="mean"))
    mean.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved = mean(batch) - without_last(mean)(batch)
        rows = mean.delivery.last_norm(mean.pos_embed[:, 1:]).mean(dim=1)
    assert worst(moved, (rows @ mean.head.weight.T).expand_as(moved)) < EXACT


@pytest.mark.parametrize("gain", [0.0, 0.25, 1.0])
def test_the_class_tokens_offset_starts_at_the_gain(gain: float) -> None:
    model, batch = build(replace(MPVG_TOKEN, last_gain=gain), start=True), images()
    with torch.no_grad():
        offset = model.forward_features(batch)[:, 0] - without_last(model).forward_features(batch)[:, 0]
    assert offset[0].square().mean().sqrt().item() == pytest.approx(gain, rel=0.01)


def test_what_the_mean_takes_away_cannot_be_learned() -> None:
    """LN'_last(pos_0) without its token mean adds nothing to the mean over tokens, and gets no gradient."""
    model, batch = build(replace(METHODS["mpvg"], last_part="rest")), images()
    differentiate(model, loss_of(model(batch), targets()))
    assert worst(model(batch), without_last(model)(batch)) < EXACT
    for parameter in model.delivery.last_norm.parameters():
        assert parameter.grad.abs().max() < EXACT


# ---- 1.7: other read-outs, on top of the tokens after the Last LN

Pooling = Callable[[Tensor], Tensor]


def attend(tokens: Tensor, query: Tensor) -> Tensor:
    """Softmax attention of one query over the tokens."""
    return ((tokens @ query).softmax(dim=1).unsqueeze(2) * tokens).sum(dim=1)


def readouts() -> dict[str, tuple[Method, Pooling, Pooling]]:
    """Name -> method, pooling, and what follows it before the head."""
    query = torch.randn(DIM, dtype=torch.float64)
    norm = nn.LayerNorm(DIM).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    same: Pooling = nn.Identity()
    return {
        "mean": ("mpvg", lambda tokens: tokens.mean(dim=1), same),
        "token": (MPVG_TOKEN, lambda tokens: tokens[:, 0], same),
        "fc_norm": ("mpvg", lambda tokens: tokens.mean(dim=1), norm),
        "max": ("mpvg", lambda tokens: tokens.amax(dim=1), same),
        "attention": ("mpvg", lambda tokens: attend(tokens, query), same),
    }


# Into beta; into the head's bias; dL/dbeta = W^T dL/dh; dL/dbeta = dL/dbeta'.
TABLE = {
    "mean": (True, True, True, True),
    "token": (True, True, True, True),
    "fc_norm": (True, False, False, True),
    "max": (False, False, True, True),
    "attention": (False, False, True, True),
}


def measured(name: str) -> Iterator[float]:
    """How far each of the four identities is from holding."""
    method, pool, after = readouts()[name]
    model, batch, target = build(method), images(), targets()
    bare = without_last(model)

    def logits(network: Any) -> Tensor:
        return model.head(after(pool(network.forward_features(batch))))

    with torch.no_grad():
        # If any constant in beta served every image, it would be this: where no norm follows, adding it to all tokens
        # adds it to their maximum and to their weighted means.
        shift = (pool(model.forward_features(batch)) - pool(bare.forward_features(batch))).mean(dim=0)
        moved = copy.deepcopy(bare)
        moved.norm.bias += shift
        yield worst(logits(moved), logits(model))
        difference = logits(model) - logits(bare)
        yield worst(difference, difference.mean(dim=0).expand_as(difference))
    differentiate(model, loss_of(logits(model), target))
    beta, twin = model.norm.bias.grad, model.delivery.last_norm.bias.grad
    yield worst(beta, model.head.weight.T @ model.head.bias.grad)
    yield worst(beta, twin)


@pytest.mark.parametrize("name", TABLE)
def test_each_identity_holds_for_the_read_outs_of_its_column_and_fails_for_the_others(name: str) -> None:
    for holds, distance in zip(TABLE[name], measured(name), strict=True):
        assert distance < EXACT if holds else distance > CLEAR
