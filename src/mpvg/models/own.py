"""Networks that are code of the user, by the name under which a config knows them."""

import inspect
import shlex
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from mpvg.config.names import TIMM, is_reference
from mpvg.delivery import Method, as_spec
from mpvg.models.checkpoints import load_checkpoint
from mpvg.models.importing import absolute_reference, describe_error, import_factory
from mpvg.models.mixin import DeliveryMixin
from mpvg.models.network import DeliveredNetwork, OutputError, delivered_network
from mpvg.validation import shown

Factory = Callable[..., nn.Module]
"""Builds a network: `factory(method=..., num_classes=..., in_chans=..., img_size=..., ...)`."""
Networks = Mapping[str, Factory | str]
"""Name -> the factory, or what it is imported as."""

_FACTORIES: dict[str, Factory] = {}
_IMPORTED: dict[str, str] = {}
"""Names of imported networks -> the reference by which another process imports the same."""


class NotImportedError(ValueError):
    """A network is code that nobody has named in this process."""


def register_network(name: str, factory: Factory) -> None:
    """Makes a network of your own available as `model="NAME"` in a config; one of the same name before is replaced.

    Args:
        name: of the network.
        factory: is called with the keyword arguments `method`, `num_classes` and, where they are known, `in_chans` and
            `img_size`, the side of the image in pixels, and returns a network with the members of
            `mpvg.models.network.DeliveredNetwork`, such as a `DeliveryMixin`. Where a config asks for stochastic depth,
            it is also given `drop_path_rate`.

    Raises:
        ValueError: the name is empty, or that of a network of this package or of timm.
    """
    if not name or name.startswith(TIMM) or timm.is_model(f"mpvg_{name}"):
        raise ValueError(f"the name of a network is {shown(name)}; allowed: a name that mpvg and timm do not use")
    if not callable(factory):
        raise ValueError(f"the factory of {shown(name)} is a {type(factory).__name__}; allowed: a function or a class")
    _FACTORIES[name] = factory
    _IMPORTED.pop(name, None)


def import_network(reference: str, name: str | None = None) -> None:
    """Imports the factory that the user names, and registers it.

    Args:
        reference: `package.module:factory` or `path/file.py:factory`, as the user types it.
        name: the name that a config has for it; None: the same.

    Raises:
        ValueError: it cannot be imported.
    """
    name = reference if name is None else name
    register_network(name, import_factory(reference))
    _IMPORTED[name] = absolute_reference(reference)


def networks(names: Iterable[str]) -> dict[str, Factory | str]:
    """Those networks among the names that are known in this process, for another one."""
    return {name: _IMPORTED.get(name, _FACTORIES[name]) for name in names if name in _FACTORIES}


def use_networks(given: Networks) -> None:
    """Makes the networks of another process known in this one.

    Raises:
        ValueError: one cannot be imported here.
    """
    for name, source in given.items():
        if isinstance(source, str):
            import_network(source, name)
        else:
            register_network(name, source)


def is_own(name: str) -> bool:
    """Whether a network is code of the user."""
    return name in _FACTORIES or is_reference(name)


def check_imported(name: str) -> None:
    """Refuses a network that is code which the user has not named in this process.

    Raises:
        NotImportedError: with the flag to type.
    """
    if name not in _FACTORIES:
        raise NotImportedError(
            f"the network {name} is code, which is only imported if you name it yourself: add --model "
            f"{shlex.quote(name)}; in Python: mpvg.register_network({name!r}, FACTORY)"
        )


def create_own(
    name: str,
    method: Method,
    *,
    checkpoint_path: str | Path | None = None,
    pos_std: float | None = None,
    drop_path_rate: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a network by its factory; used by `mpvg.models.create_model`.

    Raises:
        NotImportedError: nobody has named it.
        ValueError: the factory refuses the arguments, raises, or returns something else than a complete network.
    """
    check_imported(name)
    as_spec(method)
    arguments = {"method": method} | {key: value for key, value in kwargs.items() if value is not None}
    if drop_path_rate:
        arguments["drop_path_rate"] = drop_path_rate
    model = call_factory(name, arguments)
    if missing := problems(model):
        raise ValueError(f"{name}: {missing[0]}; see docs/own.md, and `mpvg check-network {shlex.quote(name)}`")
    if pos_std is not None:
        _rescale(name, delivered_network(model), pos_std)
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


def call_factory(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """What a registered factory returns, in memory even where networks are built without: code may compute its sizes.

    Raises:
        ValueError: it raises, or returns no nn.Module.
    """
    try:
        with torch.device("cpu"):
            model = _FACTORIES[name](**arguments)
    except ValueError as error:  # such as that of a method which the network cannot run
        raise ValueError(f"{name}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:  # whatever the code does
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        unknown = next((key for key in arguments if f"unexpected keyword argument '{key}'" in str(error)), None)
        cure = "MPVG_TRACEBACK=1 shows where" if unknown is None else "let the factory take it (docs/own.md)"
        if unknown == "drop_path_rate":
            cure = "let the factory take it, or give --network.drop_path 0"
        raise ValueError(f"{name}({given}) raises {describe_error(error)}; {cure}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returns a {type(model).__name__}; allowed: a factory that returns an nn.Module")
    return model.to("meta") if torch.get_default_device().type == "meta" else model


def network_error(error: BaseException) -> str | None:
    """An error as one line that names the networks of the user's own which are known in this process.

    Returns:
        None if none is known, or if it is a ValueError of mpvg's, or an end of the process, outside of forward passes.
    """
    while type(error) is ValueError and isinstance(error.__cause__, ValueError):  # it was given a prefix
        error = error.__cause__
    names = " or ".join(_FACTORIES)
    advice = f"see `mpvg check-network {' or '.join(map(shlex.quote, _FACTORIES))}`"
    if names and isinstance(error, OutputError):
        return f"{names}: {error}; {advice}"
    frames = traceback.walk_tb(error.__traceback__)
    forward = any(frame.f_code.co_name in ("_call_impl", "forward", "forward_features") for frame, _ in frames)
    said = (ValueError, OSError, ModuleNotFoundError, SystemExit)
    if not names or (isinstance(error, said) and not forward):
        return None
    return f"{names} raises {describe_error(error)}; {advice}; MPVG_TRACEBACK=1 shows where"


def problems(model: nn.Module) -> list[str]:
    """What a network lacks to be trained and analyzed, in words."""
    members = [name for name in (*dir(DeliveredNetwork), *DeliveredNetwork.__annotations__) if not name.startswith("_")]
    missing = [name for name in dict.fromkeys((*getattr(model, "required", ()), *members)) if not _has(model, name)]
    if missing:
        cure = "" if isinstance(model, DeliveryMixin) else ", most of which mpvg.DeliveryMixin gives it"
        return [f"{type(model).__name__} has no {', '.join(missing)}{cure}"]
    network: Any = model
    name, layers = type(model).__name__, len(network.blocks)
    try:
        norms = len(network.attention_norms) if hasattr(network, "attention_norms") else layers
    except ValueError as error:
        return [f"{name}: {error}"]
    counts = {"delivery is for": getattr(network.delivery, "depth", layers), "attention_norms has": norms}
    found = [f"{what} {n} layers, and {name} has {layers} blocks" for what, n in counts.items() if n != layers]
    return found + (network.check() if hasattr(network, "check") else [])


def _has(model: nn.Module, name: str) -> bool:
    """Whether a member is there, and is more than declared; one that is computed may need what is missing."""
    if isinstance(inspect.getattr_static(type(model), name, None), property):
        return True
    return hasattr(model, name)


@torch.no_grad()
def _rescale(name: str, network: DeliveredNetwork, std: float) -> None:
    """Gives the PE that a factory drew another standard deviation."""
    pos = network.raw_pos_embed()
    if not pos.is_leaf or (not pos.is_meta and float(pos.std()) == 0):
        why = "starts at 0" if pos.is_leaf else "is computed from others"
        raise ValueError(f"network.pos_std is {std}, and the PE of {name} {why}, so it has no scale; leave it out")
    pos.mul_(std / pos.std())
