"""timm's optimizers and schedules from a config; the optimizer's state as plain tensors and JSON."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from mpvg.config import RunConfig

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
"""timm's schedules without `plateau`, whose state no checkpoint holds."""


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The timm optimizer that the config names; 1-D parameters and those that the network exempts get no weight decay.

    A parameter's rate is, at every step, the schedule's times the first factor of `optim.rates` whose pattern matches.
    The factor multiplies what `optim.layer_decay` or `optim.body_lr` give the parameter.

    Raises:
        ValueError: timm has no such optimizer, or it needs arguments that the config does not have; a pattern is not
            valid, or matches no parameter that is trained.
    """
    optim = config.optim
    freeze(model, optim.frozen)
    if optim.name not in (names := list_optimizers()):
        near = difflib.get_close_matches(optim.name, map(str, names), n=3) or ["adamw", "sgd", "lamb"]
        raise ValueError(f"optim.name is {optim.name!r}; allowed: timm's names, such as {', '.join(near)}")
    # One fused kernel instead of a dozen small ones per parameter.
    fused: dict[str, Any] = {"fused": True} if optim.name == "adamw" else {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model if optim.body_lr is None else _head_and_body(model, config),
            opt=optim.name,
            lr=config.lr,
            weight_decay=optim.weight_decay,
            filter_bias_and_bn=not optim.decay_all,
            layer_decay=optim.layer_decay,
            momentum=optim.momentum,
            betas=optim.betas,
            eps=optim.eps,
            **fused,
        )
    except (AssertionError, IndexError, RuntimeError, TypeError) as error:  # Adan's third beta, a GPU, a package
        raise ValueError(
            f"optim.name is {optim.name!r}, which cannot be created here ({error}); use for example adamw"
        ) from error
    _apply_rates(optimizer, model, optim.rates)
    pack(optimizer)  # refuses what cannot be saved, before any training
    return optimizer


def _apply_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Splits the groups by the factors on their learning rates; timm's schedules multiply by a group's `lr_scale`."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    factors: dict[int, float] = {}
    for pattern, factor in reversed(list(rates.items())):  # the first pattern is written last, so it counts
        matching = set(map(id, _matching(model, pattern, "optim.rates"))) & trained
        if not matching:
            raise ValueError(f"optim.rates: {pattern!r} matches frozen parameters only; leave it out, or train them")
        factors |= dict.fromkeys(matching, factor)
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for factor in dict.fromkeys(factors.get(id(parameter), 1.0) for parameter in group["params"]):
            chosen = [parameter for parameter in group["params"] if factors.get(id(parameter), 1.0) == factor]
            scale = {} if factor == 1.0 else {"lr_scale": group.get("lr_scale", 1.0) * factor}
            groups.append(group | {"params": chosen} | scale)
    optimizer.param_groups[:] = groups


def _head_and_body(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """timm's groups by weight decay, each split into the head and the rest, which has another learning rate."""
    optim, network = config.optim, cast(Any, model)
    if optim.layer_decay is not None:
        raise ValueError(
            "optim.body_lr and optim.layer_decay both set the learning rates below the head; leave one out"
        )
    groups = param_groups_weight_decay(
        model,
        optim.weight_decay,
        weight_decay_exclude_1d=not optim.decay_all,
        no_weight_decay_list=() if optim.decay_all else network.no_weight_decay(),
    )
    head = set(map(id, network.get_classifier().parameters()))
    split: list[dict[str, Any]] = []
    for group in groups:
        for in_head, factor in ((False, optim.body_lr), (True, 1.0)):
            chosen = [parameter for parameter in group["params"] if (id(parameter) in head) == in_head]
            # A rate, not timm's `lr_scale`: that would scale the schedule's final rate as well.
            split += [group | {"params": chosen, "lr": config.lr * (factor or 1.0)}] if chosen else []
    return split


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters whose names match.

    Raises:
        ValueError: a pattern is not valid, or matches no parameter.
    """
    for pattern in patterns:
        for parameter in _matching(model, pattern, "optim.frozen"):
            parameter.requires_grad_(False)


def _matching(model: nn.Module, pattern: str, field: str) -> list[nn.Parameter]:
    """The parameters whose names match a regular expression."""
    named = dict(model.named_parameters())
    try:
        found = [parameter for name, parameter in named.items() if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is not a valid pattern ({error})") from error
    if not found:
        raise ValueError(f"{field}: no parameter matches {pattern!r}; the names are those in model.safetensors")
    return found


@dataclass(frozen=True)
class Schedule:
    """A timm schedule as a function of the step, without state that a resume would need."""

    scheduler: Scheduler
    by_epoch: bool
    lag: int

    def set_rate(self, epoch: int, step: int) -> None:
        """Sets the learning rates for step `step`, counted over all epochs, of epoch `epoch`; both from 0."""
        now = max((epoch if self.by_epoch else step) - self.lag, 0)
        self.scheduler.step(now) if self.by_epoch else self.scheduler.step_update(now)


def build_schedule(optimizer: torch.optim.Optimizer, config: RunConfig, steps_per_epoch: int) -> Schedule:
    """Linear warm-up, the timm schedule that the config names, and a cool-down at its final rate.

    Raises:
        ValueError: timm has no such schedule, or it depends on more than the step; or its milestones are missing.
    """
    optim, by_epoch = config.optim, config.optim.schedule_unit == "epoch"
    if optim.schedule not in SCHEDULES:
        raise ValueError(
            f"optim.schedule is {optim.schedule!r}; allowed: timm's schedules that depend on the step alone: "
            f"{', '.join(SCHEDULES)}"
        )
    if (optim.schedule == "multistep") != bool(optim.milestones):
        raise ValueError(
            f"optim.schedule is {optim.schedule!r} and optim.milestones are {optim.milestones}; allowed: milestones "
            "with multistep, which needs them, and with no other schedule"
        )
    units = 1 if by_epoch else steps_per_epoch
    warmup = _warmup_epochs(config, steps_per_epoch)
    length = config.epochs - optim.cooldown_epochs - (warmup if optim.warmup_prefix else 0)
    # In units, not in epochs: a warm-up of half an epoch is a whole number of steps.
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=optim.schedule,
        num_epochs=round(length * units),
        decay_epochs=None if optim.decay_epochs is None else round(optim.decay_epochs * units),
        decay_milestones=[round(epoch * units) for epoch in optim.milestones],
        decay_rate=optim.decay_rate,
        min_lr=min(optim.min_lr, config.lr),
        warmup_lr=min(optim.warmup_lr, config.lr),
        warmup_epochs=round(warmup * units),
        warmup_prefix=optim.warmup_prefix,
    )
    scheduler.t_in_epochs = by_epoch
    return Schedule(scheduler, by_epoch, optim.schedule_lag)


def _warmup_epochs(config: RunConfig, steps_per_epoch: int) -> float:
    """The epochs of the warm-up, also where the config gives its steps."""
    steps, total = config.optim.warmup_steps, config.epochs * steps_per_epoch
    if steps is None:
        return config.optim.warmup_epochs
    if config.optim.warmup_epochs:
        raise ValueError(
            f"optim.warmup_steps {steps} and optim.warmup_epochs {config.optim.warmup_epochs:g} both give the warm-up; "
            "set warmup_epochs to 0, or leave out warmup_steps"
        )
    if config.optim.schedule_unit == "epoch":
        raise ValueError(
            f"optim.warmup_steps is {steps}, but the rate changes every epoch; give optim.schedule_unit step"
        )
    if steps >= total:
        raise ValueError(f"optim.warmup_steps is {steps}, and the run has {total} steps; give fewer")
    return steps / steps_per_epoch


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors, and the rest as JSON-safe values.

    Raises:
        ValueError: the state holds something else.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            target: dict[str, Any] = tensors if isinstance(value, Tensor) else values
            target[f"{index}.{name}"] = value
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(state["param_groups"]):
        # LAMB, for one, counts its steps in a tensor of the group.
        tensors |= {f"group{index}.{name}": value for name, value in group.items() if isinstance(value, Tensor)}
        groups.append({k: v for k, v in group.items() if k != "params" and not isinstance(v, Tensor)})
    rest = {"state": values, "param_groups": groups}
    try:
        json.dumps(rest)
    except TypeError as error:
        name = type(optimizer).__name__
        raise ValueError(
            f"the state of the optimizer {name} cannot be saved ({error}); use for example adamw"
        ) from error
    return tensors, rest


def unpack(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
    """Loads a state that `pack` made into an optimizer.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    current = optimizer.state_dict()
    parts: dict[str, dict[str, Any]] = {}
    for key, value in {**values["state"], **tensors}.items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = value
    state = {int(part): entries for part, entries in parts.items() if part.isdigit()}
    pairs = zip(values["param_groups"], current["param_groups"], strict=True)
    groups = [
        saved | parts.get(f"group{index}", {}) | {"params": own["params"]} for index, (saved, own) in enumerate(pairs)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():  # files hold no strides; fused kernels need those of the parameter
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
