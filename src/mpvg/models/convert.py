"""An existing timm network becomes one whose layers and Last LN receive a delivered position embedding (PE)."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mpvg.config import unknown
from mpvg.delivery import DeliverySpec, Method, NetworkTraits, Pool, as_spec, resolve
from mpvg.models.checkpoints import read_tensors, start_from
from mpvg.models.plain import POS_STD, DeliveredBlock, DeliveredVisionTransformer
from mpvg.models.registry import check_divisible

Readout = Literal["keep", "method"]
Start = Literal["fresh", "preserve"]


def convert(
    model: nn.Module, method: Method = "mpvg", *, readout: Readout = "keep", start: Start = "fresh"
) -> DeliveredVisionTransformer:
    """Returns a copy of a timm vision transformer that runs a method; the network itself is not changed.

    Args:
        model: timm's VisionTransformer with an absolute PE: ViT, DeiT, DeiT-III, AugReg, CLIP, SigLIP, DINOv2, ...
        method: a method's name or a DeliverySpec.
        readout: "keep" leaves class token, average or attention pooling as they are, and delivers to the Last LN where
            one stands before the pooling and what is read out has rows in the PE; "method" makes the read-out the
            method's, with the Last LN on every token.
        start: "fresh" delivers from the first step on, each LN' at 1 and 0, as the paper trains. "preserve" delivers
            what has changed since the conversion: the answers are the original's until the first step, while the PE
            and every LN' receive gradients as under "fresh". It needs readout="keep" and a method with input PE.

    Raises:
        ValueError: the network has no absolute PE or other blocks than timm's Block, or cannot do what is asked for.
    """
    for name, value, allowed in (("readout", readout, get_args(Readout)), ("start", start, get_args(Start))):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    _check_convertible(model)
    spec = as_spec(method)
    if start == "preserve" and (readout != "keep" or not spec.input_pe):
        reason = f"readout={readout!r} changes the answers" if readout != "keep" else "the method takes the PE away"
        raise ValueError(f"start='preserve' cannot hold: {reason}; use start='fresh'")
    converted: Any = copy.deepcopy(model)
    if readout == "keep":
        spec = _with_kept_readout(spec, converted)
    else:
        _change_readout(converted, spec.pool)
    spec = resolve(spec, NetworkTraits(name=_name(model), depth=len(converted.blocks), readouts=(spec.pool,)))
    # The same modules, weights and hooks under the classes whose forward passes deliver: no second forward anywhere.
    converted.__class__ = DeliveredVisionTransformer
    for block in converted.blocks:
        block.__class__ = DeliveredBlock
    converted.pos_std = None
    converted.receive(spec)
    converted.delivery.train(model.training)
    if start == "preserve":
        converted.delivery.start = converted.pos_embed.detach().clone()
    return converted


def create_converted(
    name: str,
    method: Method,
    *,
    checkpoint_path: str | Path | None,
    pos_std: float | None,
    readout: Readout = "keep",
    start: Start = "fresh",
    **kwargs: Any,
) -> DeliveredVisionTransformer:
    """Builds a timm network by its name and converts it; `create_model("timm/<name>", ...)`.

    The checkpoint is one of timm's network, loaded before the conversion, or one of the converted network.

    Raises:
        ValueError: timm knows no such name, or the network cannot be converted.
    """
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ValueError(unknown("timm model", name, _convertible_names()))
    try:
        model: Any = timm.create_model(name, **kwargs)
    except (TypeError, RuntimeError) as error:  # an argument that its class does not have; an unknown tag
        raise ValueError(f"timm's {name} cannot be built so: {error}; see its class in timm") from error
    if kwargs.get("img_size") is not None and hasattr(model, "patch_embed"):
        check_divisible(kwargs["img_size"], model.patch_embed.patch_size)
    if pos_std is not None:
        _check_convertible(model)
        if kwargs.get("pretrained"):
            raise ValueError(f"pos_std={pos_std} rescales the start of a PE, and pretrained weights have theirs")
        with torch.no_grad():
            model.pos_embed.mul_(pos_std / POS_STD)
    if checkpoint_path is None:
        return convert(model, method, readout=readout, start=start)
    tensors = read_tensors(checkpoint_path)
    body = {key for key in model.state_dict() if not key.startswith("head.")}
    originals = body <= tensors.keys() and not any(key.startswith("delivery.") for key in tensors)
    if originals:  # what preserves its answers must see its weights
        start_from(model, tensors, checkpoint_path)
    converted = convert(model, method, readout=readout, start=start)
    if not originals:
        start_from(converted, tensors, checkpoint_path)
    return converted


def _check_convertible(model: Any) -> None:
    """Refuses what cannot be converted, with the reason."""
    name = _name(model)
    if hasattr(model, "delivery"):
        raise ValueError(f"{name} receives a delivered PE already; build it anew with create_model and the method")
    if getattr(model, "pos_embed", None) is None:
        names = " ".join([name for name, _ in model.named_parameters()] + [type(m).__name__ for m in model.modules()])
        rotary = re.search("rope|rotary", names, re.IGNORECASE)
        relative = re.search("rel_?pos|relative_position", names, re.IGNORECASE)
        only = "rotary" if rotary else "relative" if relative else None
        found = f"its PE is {only}, inside the attention" if only else "it has no absolute PE (pos_embed)"
        raise ValueError(f"{name} cannot be converted: {found}, and only an absolute PE can be delivered to layers")
    if type(model) is not VisionTransformer:
        raise ValueError(
            f"{name} cannot be converted: {type(model).__name__} has a forward pass of its own; "
            "allowed: timm's VisionTransformer itself, such as ViT, DeiT, DeiT-III, CLIP, SigLIP, DINOv2"
        )
    other = {type(block).__name__ for block in model.blocks if type(block) is not Block}
    if other:
        raise ValueError(
            f"{name} cannot be converted: its blocks are {', '.join(sorted(other))}, and only timm's Block has the "
            "one attention input behind one LN that a PE is delivered to"
        )


def _with_kept_readout(spec: DeliverySpec, model: Any) -> DeliverySpec:
    if model.global_pool in get_args(Pool):
        spec = replace(spec, pool=model.global_pool)
    # An LN behind the mean has no tokens to which a PE could be added, and a class token without a row receives zeros:
    # the LN' would be idle.
    unread = model.global_pool == "token" and model.no_embed_class
    return replace(spec, last_index=None) if unread or isinstance(model.norm, nn.Identity) else spec


def _change_readout(model: Any, pool: Pool) -> None:
    """Makes the read-out the method's: the Last LN on every token, then the class token or the mean."""
    if isinstance(model.norm, nn.Identity):
        if isinstance(model.fc_norm, nn.Identity):
            raise ValueError(f"{_name(model)} has no Last LN, which the read-out needs; use readout='keep'")
        model.norm, model.fc_norm = model.fc_norm, nn.Identity()
    if pool == "token" and model.cls_token is None:
        raise ValueError(f"{_name(model)} has no class token to read out; use a method with pool='avg'")
    if pool == "avg" and model.cls_token is not None:
        model.cls_token, model.has_class_token = None, False
        model.num_prefix_tokens -= 1
        if hasattr(model.patch_drop, "num_prefix_tokens"):
            model.patch_drop.num_prefix_tokens -= 1
        if not model.no_embed_class:
            pos = model.pos_embed
            model.pos_embed = nn.Parameter(pos.detach()[:, 1:].clone(), requires_grad=pos.requires_grad)
    model.attn_pool, model.pool_include_prefix = None, False
    model.global_pool = pool


def _name(model: Any) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__


def _convertible_names() -> list[str]:
    return timm.list_models(["vit_*", "deit*"], module="vision_transformer") + timm.list_models(module="deit")
