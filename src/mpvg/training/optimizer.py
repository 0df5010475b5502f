"""Optimizer, schedule and averaged weights from timm's parts; the optimizer's state as plain tensors and JSON."""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from mpvg.config import RunConfig

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
"""timm's schedules but `plateau`, whose state is in no checkpoint."""


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """timm's optimizer of the config's name; 1-D parameters and what the network exempts get no weight decay.

    Raises:
        ValueError: timm knows no such optimizer, or it asks for more than the config has.
    """
    optim = config.optim
    freeze(model, optim.frozen)
    if optim.name not in (names := list_optimizers()):
        near = difflib.get_close_matches(optim.name, map(str, names), n=3) or ["adamw", "sgd", "lamb"]
        raise ValueError(f"optim.name is {optim.name!r}; allowed: timm's names, such as {', '.join(near)}")
    # One fused kernel instead of a dozen small ones a parameter.
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
            f"optim.name is {optim.name!r}, which cannot be made here ({error}); give adamw, say"
        ) from error
    pack(optimizer)  # refuses what cannot be saved before time is spent on it
    return optimizer


def _head_and_body(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """timm's groups by weight decay, each cut into the head and the rest, which learns at another rate."""
    optim, network = config.optim, cast(Any, model)
    if optim.layer_decay is not None:
        raise ValueError("optim.body_lr and optim.layer_decay both set the rates below the head; leave one out")
    groups = param_groups_weight_decay(
        model,
        optim.weight_decay,
        weight_decay_exclude_1d=not optim.decay_all,
        no_weight_decay_list=() if optim.decay_all else network.no_weight_decay(),
    )
    head = set(map(id, network.get_classifier().parameters()))
    cut: list[dict[str, Any]] = []
    for group in groups:
        for in_head, factor in ((False, optim.body_lr), (True, 1.0)):
            chosen = [parameter for parameter in group["params"] if (id(parameter) in head) == in_head]
            # A rate, not timm's `lr_scale`: that would scale the schedule's final rate as well.
            cut += [group | {"params": chosen, "lr": config.lr * (factor or 1.0)}] if chosen else []
    return cut


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes the parameters whose names match out of the training.

    Raises:
        ValueError: a pattern is none, or matches no parameter.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        try:
            found = [name for name in named if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"optim.frozen: {pattern!r} is no pattern ({error})") from error
        if not found:
            raise ValueError(f"optim.frozen: no parameter matches {pattern!r}; see the names in model.safetensors")
        for name in found:
            named[name].requires_grad_(False)


@dataclass(frozen=True)
class Schedule:
    """A schedule of timm's that is asked for the rate of an optimizer step, and holds no state that a resume needs."""

    scheduler: Scheduler
    by_epoch: bool
    lag: int

    def set_rate(self, epoch: int, step: int) -> None:
        """Sets the learning rates for step `step`, counted over all epochs, of epoch `epoch`; both from 0."""
        now = max((epoch if self.by_epoch else step) - self.lag, 0)
        self.scheduler.step(now) if self.by_epoch else self.scheduler.step_update(now)


def build_schedule(optimizer: torch.optim.Optimizer, config: RunConfig, steps_per_epoch: int) -> Schedule:
    """Linear warm-up into timm's schedule of the config's name, a cosine say, and a cool-down at its final rate.

    Raises:
        ValueError: timm knows no such schedule, or it goes by more than the time.
    """
    optim, by_epoch = config.optim, config.optim.schedule_unit == "epoch"
    if optim.schedule not in SCHEDULES:
        raise ValueError(
            f"optim.schedule is {optim.schedule!r}; allowed: timm's that go by time: {', '.join(SCHEDULES)}"
        )
    units = 1 if by_epoch else steps_per_epoch
    length = config.epochs - optim.cooldown_epochs - (optim.warmup_epochs if optim.warmup_prefix else 0)
    # In units, not in epochs as timm would count them: warm-ups of half an epoch are whole numbers of steps.
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=optim.schedule,
        num_epochs=round(length * units),
        decay_epochs=None if optim.decay_epochs is None else round(optim.decay_epochs * units),
        decay_rate=optim.decay_rate,
        min_lr=min(optim.min_lr, config.lr),
        warmup_lr=min(optim.warmup_lr, config.lr),
        warmup_epochs=round(optim.warmup_epochs * units),
        warmup_prefix=optim.warmup_prefix,
    )
    scheduler.t_in_epochs = by_epoch
    return Schedule(scheduler, by_epoch, optim.schedule_lag)


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors, and the rest as JSON-safe values.

    Raises:
        ValueError: the state is made of other things.
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
        raise ValueError(f"the state of the optimizer {name} cannot be saved ({error}); give adamw, say") from error
    return tensors, rest


def unpack(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Gives an optimizer the state that `pack` took.

    Raises:
        ValueError: the state is of other parameters.
    """
    current = optimizer.state_dict()
    parts: dict[str, dict[str, Any]] = {}
    for key, value in (values["state"] | tensors).items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = value
    state = {int(part): entries for part, entries in parts.items() if part.isdigit()}
    pairs = zip(values["param_groups"], current["param_groups"], strict=True)
    groups = [
        saved | parts.get(f"group{index}", {}) | {"params": own["params"]} for index, (saved, own) in enumerate(pairs)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():  # files hold no strides; fused kernels want those of the parameter
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
