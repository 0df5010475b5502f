"""What a network must do to be trained, analyzed and folded, as checks: `mpvg check-network`, and the tests.

Each check is a function of a network and images, which gives what is wrong in words, or a number that says how much.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from mpvg.analysis.perturbed import Build, delivering, noisy, shifted, supports
from mpvg.delivery import METHODS, as_spec
from mpvg.models.fold import fold
from mpvg.models.mixin import DeliveryMixin
from mpvg.models.network import delivered_network, patch_grid
from mpvg.models.own import problems

TOLERANCE = 1e-4
"""Largest difference of a logit that is rounding, in float32, relative to the largest logit."""
IMAGES = 2
FOLDED = ("default", "lape_gap", "pvg", "mpvg")
"""Methods with which a network is folded and resized: with and without PE at the input, layers and Last LN."""


@dataclass(frozen=True)
class Check:
    """What a check found."""

    name: str
    passed: bool | None
    """None: the network does not have what is checked, and need not."""
    text: str
    """What was seen, or what is wrong, in one line."""


class Recorder:
    """A probe that keeps what it is shown: the layer, or -1 for the Last LN, the tokens and the PE."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor | None]] = []

    def layer(self, layer: int, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        """See `Probe.layer`."""
        self.seen.append((layer, tokens, pe))

    def last(self, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        """See `Probe.last`."""
        self.seen.append((-1, tokens, pe))


def check_network(build: Build) -> Iterator[Check]:
    """Runs every check, one after another.

    Args:
        build: builds the network; it takes `method`, a name, and `num_classes`.
    """
    first = next((method for method in ("mpvg", *METHODS) if supports(build, method)), "mpvg")
    build = partial(build, method=first)  # calls may give another
    model = noisy(build)
    missing = problems(model)
    yield _check("members", missing, "pos_embed, delivery, blocks, norm and all that follows from them")
    if missing:
        return
    for name, check in (("shapes", shapes), ("gradients", _gradients), ("probe", _probe), ("delivery", delivery)):
        yield _guarded(name, check, build)
    variants = [method for method in METHODS if supports(build, method)]
    refused = [method for method in METHODS if method not in variants]
    yield _guarded("methods", lambda build: _methods(build, variants, refused), build)
    kinds = [method for method in FOLDED if method in variants]
    kinds = kinds if len(kinds) > 1 else variants  # of a network that has to have its class token
    yield _guarded("fold", lambda build: _folds(build, kinds), build)
    yield _guarded("image sizes", lambda build: _sizes(build, kinds), build)
    yield _guarded("weights", weights, build)


def shapes(build: Build) -> tuple[list[str], str]:
    """Logits `(B, classes)`, tokens `(B, N, D)` with the prefix first, pooled `(B, D)`; the head on the pooled ones."""
    classes = 5
    model = noisy(build, num_classes=classes)
    network: Any = model
    batch = example_images(model)
    logits = model(batch)
    wrong = [] if logits.shape == (IMAGES, classes) else [f"logits are {tuple(logits.shape)}, not {(IMAGES, classes)}"]
    if not wrong and not logits.isfinite().all():
        wrong.append("logits are NaN or infinite")
    seen = f"{IMAGES} images to logits {tuple(logits.shape)}"
    if isinstance(model, DeliveryMixin) and _has_stages(network):
        return wrong, f"{seen}; tokens and pooling are not checked in a network with stages"
    if isinstance(model, DeliveryMixin):  # a family of this package may read out in its own way
        found = _wrong_tokens(network, network.forward_features(batch), None if wrong else logits)
        wrong += [] if found is None else [found]
    return wrong, seen


def _wrong_tokens(network: Any, tokens: Tensor, logits: Tensor | None) -> str | None:
    """What is wrong with the tokens, their pooling, or the head on it; without logits the head is not looked at."""
    rows, columns = patch_grid(network)
    count = rows * columns + network.num_prefix_tokens
    if tokens.ndim != 3 or tokens.shape[:2] != (IMAGES, count):
        return (
            f"forward_features gives {tuple(tokens.shape)}, not {(IMAGES, count, 'D')}: {rows} x {columns} patches "
            f"and {network.num_prefix_tokens} prefix tokens"
        )
    pooled = network.pool(tokens)
    if pooled.shape != (IMAGES, tokens.shape[2]):
        return f"pool gives {tuple(pooled.shape)}, not {(IMAGES, tokens.shape[2])}"
    if network.global_pool == "avg" and _adds_up(network.pool, tokens) > TOLERANCE:
        return "pool is not a mean, and global_pool is 'avg': give it another name there"
    if logits is not None and difference(network.get_classifier()(pooled), logits) > TOLERANCE:
        return "logits are not the head on what pool gives for forward_features"
    return None


def idle_parameters(model: nn.Module, images: Tensor, least: float = 1e-12) -> list[str]:
    """Names of the parameters that ask for a gradient and get none, in training mode."""
    model.train()
    logits = model(images)
    (logits * torch.randn_like(logits)).sum().backward()
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.numel()
        and (parameter.grad is None or not parameter.grad.abs().max() >= least)
    ]


def probe_problems(model: nn.Module, images: Tensor) -> list[str]:
    """Where a probe does not see each layer once, in order, and then the Last LN, with what is delivered to it."""
    network = delivered_network(model.eval())
    recorder = Recorder()
    network.probe = recorder
    try:
        model(images)
    finally:
        network.probe = None
    delivered = network.deliver(network.raw_pos_embed())
    order = [layer for layer, _, _ in recorder.seen]
    expected = [*range(len(network.blocks)), -1]
    if order != expected:
        seen = ", ".join("the Last LN" if layer < 0 else f"layer {layer}" for layer in order) or "nothing"
        return [f"the probe saw {seen}, and not layers 0 to {len(network.blocks) - 1}, then the Last LN, once each"]
    one_vector = recorder.seen[-1][1].ndim == 2  # which the Last LN normalizes, in place of tokens (CeiT)
    at_last = network.pool(delivered.last) if one_vector and delivered.last is not None else delivered.last
    return [
        "the probe was shown another PE than is delivered at " + ("the Last LN" if layer < 0 else f"layer {layer}")
        for (layer, _, shown), pe in zip(recorder.seen, (*delivered.per_layer, at_last), strict=True)
        if (shown is None) != (pe is None) or (shown is not None and pe is not None and not torch.equal(shown, pe))
    ]


def delivery(build: Build) -> tuple[list[str] | None, str]:
    """What is delivered to a place is added to its LN's output: the same vector on every token is a shift of its bias.

    This also finds a network that computes what is delivered past `deliver`, which folding and analysis replace.
    """
    model = noisy(build)
    network: Any = model
    if not hasattr(network, "attention_norms"):
        return None, "a family of this package, which has tests of its own"
    batch, wrong = example_images(model), []
    if _has_stages(network):
        return None, "not checked in a network with stages, whose tokens change their width"
    norms = [*network.attention_norms, network.norm]
    depth = len(network.blocks)
    shift = torch.randn(network.raw_pos_embed().shape[-1])
    count = patch_grid(network)[0] * patch_grid(network)[1] + network.num_prefix_tokens
    for place, norm in enumerate(norms):
        name = f"layer {place}" if place < depth else "the Last LN"
        if getattr(norm, "bias", None) is None:
            wrong.append(f"the LN of {name} has no bias, which folding and analysis need")
            continue
        nothing: list[Tensor | None] = [None] * (depth + 1)
        pes = [*nothing[:place], shift.expand(1, count, -1), *nothing[place + 1 :]]
        with delivering(model, nothing):
            without = model(batch)
            with shifted(norm.bias, shift):
                expected = model(batch)
        with delivering(model, pes):
            found = model(batch)
        if difference(found, without) < TOLERANCE:
            wrong.append(f"what deliver returns for {name} changes nothing: use the values of self.deliver, once")
        elif difference(found, expected) > TOLERANCE:
            wrong.append(f"what is delivered to {name} is not added to the output of its LN, or only to a part of it")
    return wrong, f"added to the output of {depth} LNs before the attention, and of the Last LN"


def _has_stages(network: Any) -> bool:
    """Whether the LNs are for tokens of more than one width."""
    biases = (getattr(norm, "bias", None) for norm in (*network.attention_norms, network.norm))
    return len({bias.numel() for bias in biases if bias is not None}) > 1


def fold_difference(model: nn.Module, images: Tensor) -> float:
    """The largest difference of a logit between a network and the folded one, relative to the largest logit."""
    return difference(fold(model)(images), model.eval()(images))


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-6))


def weights(build: Build) -> tuple[list[str], str]:
    """Weights are saved and loaded completely: no tensor is saved under two names, and none is missing."""
    model, other = noisy(build), noisy(build)
    state = model.state_dict()
    places: dict[int, str] = {}
    for name, tensor in state.items():
        if tensor.numel() and (first := places.setdefault(tensor.untyped_storage().data_ptr(), name)) != name:
            return [f"{first} and {name} are one tensor, which safetensors cannot save twice"], ""
    other.load_state_dict(state)
    batch = example_images(model)
    if difference(other(batch), model(batch)) > TOLERANCE:
        return ["a second network with the same weights gives other logits: a value is in no parameter and buffer"], ""
    return [], f"{len(state)} tensors, which give the same logits in a second network"


def example_images(model: nn.Module, size: tuple[int, int] | None = None) -> Tensor:
    """Random images of a network's own size, or of another."""
    network = delivered_network(model)
    return torch.randn(IMAGES, network.in_chans, *(size or to_2tuple(network.img_size)))


def _adds_up(pool: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """How far the pooled sum is from the sum of what is pooled."""
    other = torch.randn_like(tokens)
    return difference(pool(tokens + other), pool(tokens) + pool(other))


def _gradients(build: Build) -> tuple[list[str], str]:
    model = noisy(build)
    idle = idle_parameters(model, example_images(model))
    wrong = [f"no gradient reaches {', '.join(idle[:4])}" + (" and others" if len(idle) > 4 else "")] if idle else []
    return wrong, f"each of {len(list(model.parameters()))} parameters gets one"


def _probe(build: Build) -> tuple[list[str], str]:
    model = noisy(build)
    wrong = probe_problems(model, example_images(model))
    return wrong, f"it sees {len(delivered_network(model).blocks)} layers, then the Last LN, with what they receive"


def _methods(build: Build, variants: list[str], refused: list[str]) -> tuple[list[str], str]:
    wrong = []
    for method in variants:
        model = noisy(build, method=method)
        network, asked = delivered_network(model), as_spec(method)
        if replace(network.spec, pool=asked.pool, first_layer=asked.first_layer) != asked:
            wrong.append(f"with method {method} it runs {network.spec.to_dict()}: pass the method on")
            continue
        batch = example_images(model)
        wrong += [f"{method}: {problem}" for problem in probe_problems(model, batch)]
        nothing: list[Tensor | None] = [None] * (len(network.blocks) + 1)
        with delivering(model, nothing):
            before = model(batch)
            with shifted(network.raw_pos_embed(), torch.randn_like(network.raw_pos_embed())):
                moved = difference(model(batch), before) > TOLERANCE
        if moved != network.spec.input_pe:
            what = "is added" if moved else "is not added"
            wrong.append(f"{method}: the PE {what} before layer 0, and spec.input_pe is {network.spec.input_pe}")
    text = f"{len(variants)} of {len(METHODS)}"
    return wrong, text + (f"; refused, with a reason: {', '.join(refused)}" if refused else "")


def _folds(build: Build, methods: list[str]) -> tuple[list[str], str]:
    worst, wrong = 0.0, []
    for method in methods:
        model = noisy(build, method=method)
        found = fold_difference(model, example_images(model))
        worst = max(worst, found)
        if not found <= TOLERANCE:
            wrong.append(f"{method}: folded, a logit differs by {found:.1e} of the largest")
    return wrong, f"with {', '.join(methods)}: logits differ by {worst:.0e} of the largest"


def _sizes(build: Build, methods: list[str]) -> tuple[list[str] | None, str]:
    for method in methods:
        model = noisy(build, method=method)
        network = delivered_network(model)
        (height, width), (rows, columns) = to_2tuple(network.img_size), to_2tuple(network.patch_size)
        size = height + rows, width + 2 * columns
        try:
            network.set_input_size(size)
        except (AssertionError, NotImplementedError, ValueError) as error:
            return None, f"for images of {height} x {width} only: {error or type(error).__name__}"
        shape = f"{size[0]} x {size[1]}"
        try:
            found = fold_difference(model, example_images(model, size))
        except Exception as error:  # whatever the forward pass meets
            return [
                f"{method}: after set_input_size({size}) images of {shape} raise {type(error).__name__}: {error}; "
                "if the network is for one size, let set_input_size raise a ValueError"
            ], ""
        if not found <= TOLERANCE:
            return [f"{method}: at {shape}, folded, a logit differs by {found:.1e} of the largest"], ""
    return [], f"{shape} too, with the PE resampled"


def _guarded(name: str, check: Callable[[Build], tuple[list[str] | None, str]], build: Build) -> Check:
    """The result of a check; what the network raises in it is a failure."""
    try:
        wrong, text = check(build)
    except Exception as error:  # whatever the network's code does
        return _check(name, [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"], "")
    return Check(name, None, text) if wrong is None else _check(name, wrong, text)


def _check(name: str, wrong: list[str], text: str) -> Check:
    return Check(name, not wrong, "; ".join(wrong) or text)
