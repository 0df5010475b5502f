"""Optimizer, schedule and averaged weights from timm's parts; the optimizer's state as plain tensors and JSON."""

import difflib
import json
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from mpvg.config import RunConfig


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """timm's optimizer of the config's name; 1-D parameters and what the network exempts get no weight decay.

    Raises:
        ValueError: timm knows no such optimizer, or it asks for more than the config has.
    """
    optim = config.optim
    if optim.name not in (names := list_optimizers()):
        near = difflib.get_close_matches(optim.name, map(str, names), n=3) or ["adamw", "sgd", "lamb"]
        raise ValueError(f"optim.name is {optim.name!r}; allowed: timm's names, such as {', '.join(near)}")
    # One fused kernel instead of a dozen small ones a parameter.
    fused: dict[str, Any] = {"fused": True} if optim.name == "adamw" else {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=optim.name,
            lr=config.lr,
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
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


def build_schedule(optimizer: torch.optim.Optimizer, config: RunConfig, steps_per_epoch: int) -> Scheduler:
    """Linear warm-up into a cosine over all epochs; `step_update(n)` sets the rate of step n, and holds no state."""
    optim = config.optim
    return CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * steps_per_epoch,
        lr_min=min(optim.min_lr, config.lr),
        warmup_t=round(optim.warmup_epochs * steps_per_epoch),
        warmup_lr_init=min(optim.warmup_lr, config.lr),
        t_in_epochs=False,
    )


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
