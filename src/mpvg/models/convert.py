"""Converts a timm network into one whose layers and Last LN receive a delivered position embedding (PE)."""

import copy
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from timm.models import parse_model_name, resolve_model_input_args
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mpvg.config.names import TIMM
from mpvg.delivery import METHODS, DeliverySpec, Method, NetworkTraits, Pool, as_spec, resolve
from mpvg.models.checkpoints import load_source, read_source
from mpvg.models.network import POS_STD
from mpvg.models.registry import IMAGENET, check_divisible, register_builder
from mpvg.models.vision_transformer import DeliveredBlock, DeliveredVisionTransformer
from mpvg.validation import unknown_name

_log = logging.getLogger(__name__)

CONVERTED = "converted"
"""Name with timm, after `mpvg_`, of every converted network; its arguments say of what."""

Readout = Literal["keep", "method"]
Start = Literal["fresh", "preserve"]


def convert(
    model: nn.Module, method: Method = "mpvg", *, readout: Readout = "keep", start: Start = "fresh"
) -> DeliveredVisionTransformer:
    """Returns a copy of a timm vision transformer that runs a method; the given model is not changed.

    Args:
        model: timm's VisionTransformer with an absolute PE: ViT, DeiT, DeiT-III, AugReg, CLIP, SigLIP, DINOv2, ...
        method: a method's name or a DeliverySpec.
        readout: "keep" keeps the class token, the average or the attention pooling of the model, and delivers to the
            Last LN if it comes before the pooling and the tokens that are read out have rows in the PE. "method"
            uses the method's read-out, with the Last LN on every token.
        start: "fresh" delivers from the first step on, with every LN' at 1 and 0, as in the paper, or at the method's
            gains; a start of the Last LN's bias is added to the bias there is. "preserve" delivers the change since the
            conversion: the outputs are those of the original until the first step, while the PE and every LN' get the
            same gradients as with "fresh". It needs readout="keep" and a method with input PE and without start_beta.

    Raises:
        ValueError: the network has no absolute PE, or blocks other than timm's Block, or cannot run the method.
    """
    for name, value, allowed in (("readout", readout, get_args(Readout)), ("start", start, get_args(Start))):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    _check_convertible(model)
    spec = as_spec(method)
    if start == "preserve" and (readout != "keep" or not spec.input_pe or spec.start_beta):
        changes = "start_beta=True" if spec.start_beta else "removing the PE from the input"
        changes = f"readout={readout!r}" if readout != "keep" else changes
        raise ValueError(f"start='preserve' is not possible: {changes} changes the outputs; use start='fresh'")
    converted: Any = copy.deepcopy(model)
    if readout == "keep":
        spec = _with_kept_readout(spec, converted)
    else:
        _change_readout(converted, spec.pool)
    spec = resolve(spec, NetworkTraits(name=network_name(model), depth=len(converted.blocks), readouts=(spec.pool,)))
    # The class swap keeps modules, weights and hooks as they are and adds the delivery through the subclasses, so that
    # there is one forward pass for built and converted networks. It is safe because _check_convertible accepts exactly
    # VisionTransformer and Block: a subclass may have a forward pass of its own, which the swap would bypass.
    converted.__class__ = DeliveredVisionTransformer
    for block in converted.blocks:
        block.__class__ = DeliveredBlock
    converted.pos_std = None
    converted.set_delivery(spec)
    converted.delivery.train(model.training)
    if start == "preserve":
        converted.delivery.reference_pos = converted.pos_embed.detach().clone()
    converted.remark = _remark(as_spec(method), spec, model)
    if converted.remark:
        _log.warning("%s: %s", network_name(model), converted.remark)
    _describe_for_timm(converted, {"method": as_spec(method).to_dict(), "readout": readout, "start": start})
    return converted


def _describe_for_timm(converted: Any, conversion: dict[str, Any]) -> None:
    """Records how the network is built again from a folder of timm's save_for_hf: as timm's `mpvg_converted`."""
    config = getattr(converted, "pretrained_cfg", None) or {}
    if not config.get("architecture"):
        return  # not from timm.create_model
    arguments = getattr(converted, "_model_args", {})
    converted._model_args = arguments | {"network": config["architecture"]} | conversion
    converted.pretrained_cfg = config | {"architecture": f"mpvg_{CONVERTED}"}
    converted.default_cfg = converted.pretrained_cfg


def _build_converted(*, network: str, method: Method, readout: Readout, start: Start, **kwargs: Any) -> nn.Module:
    """The converted network of a folder that timm's save_for_hf wrote, without its weights."""
    return convert(timm.create_model(network, **kwargs), method, readout=readout, start=start)


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
    """Builds a timm network by name and converts it; used by `create_model("timm/<name>", ...)`.

    A checkpoint of the timm network is loaded before the conversion, one of the converted network after it.

    Raises:
        ValueError: timm has no model of this name, or it cannot be converted.
    """
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ValueError(unknown_name("timm model", name, _convertible_names()))
    try:
        model: Any = timm.create_model(name, **kwargs)
    except (TypeError, RuntimeError) as error:  # an unknown argument; an unknown pretrained tag
        raise ValueError(f"timm's {name} cannot be built: {error}; see its class in timm for the arguments") from error
    if kwargs.get("img_size") is not None and hasattr(model, "patch_embed"):
        check_divisible(kwargs["img_size"], model.patch_embed.patch_size)
    if pos_std is not None:
        _check_convertible(model)
        if kwargs.get("pretrained"):
            raise ValueError(f"pos_std={pos_std} rescales a new PE, but pretrained weights have a trained one")
        with torch.no_grad():
            model.pos_embed.mul_(pos_std / POS_STD)
    if checkpoint_path is None:
        return convert(model, method, readout=readout, start=start)
    source = read_source(checkpoint_path, model)
    # What timm's network gives is loaded before the conversion, in which start="preserve" copies the PE. The method's
    # read-out has no class token, so that what belongs to it is reported by the converted network.
    of_timm = readout == "keep" and not any(re.search(r"(^|\.)(delivery|pe_norm)\.", name) for name in source.names())
    if of_timm:
        load_source(model, source)
    converted = convert(model, method, readout=readout, start=start)
    if not of_timm:
        load_source(converted, source)
    return converted


def pretrained_mean_std(name: str, in_chans: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The normalization of images that the weights of a timm network were trained with.

    Args:
        name: as of `create_model`; with a tag of weights, such as ".augreg_in21k", theirs, otherwise those that timm
            takes by default.
        in_chans: channels of an image; where the weights have another number, each gets the mean of their values.

    Returns:
        Mean and standard deviation of each channel, for values in [0, 1]; None: not a network of timm, or not known.
    """
    if not name.startswith(TIMM):
        return None
    source, network = parse_model_name(name.removeprefix(TIMM))
    if source is None and not timm.is_model(network.split(".")[0]):
        return None  # create_model says that it is unknown
    found = resolve_model_input_args(name.removeprefix(TIMM))["pretrained_cfg"]
    if not found.get("mean") or not found.get("std"):
        return None
    mean, std = (
        tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans
        for values in (found["mean"], found["std"])
    )
    return mean, std


def _check_convertible(model: Any) -> None:
    """Refuses a network that cannot be converted, with the reason."""
    name = network_name(model)
    if hasattr(model, "delivery"):
        raise ValueError(f"{name} already receives a delivered PE; build a new one with create_model and the method")
    if getattr(model, "pos_embed", None) is None:
        names = " ".join([name for name, _ in model.named_parameters()] + [type(m).__name__ for m in model.modules()])
        rotary = re.search("rope|rotary", names, re.IGNORECASE)
        relative = re.search("rel_?pos|relative_position", names, re.IGNORECASE)
        only = "rotary" if rotary else "relative" if relative else None
        if only is None and not isinstance(model, VisionTransformer):
            raise ValueError(_not_timms(name, model))
        found = f"its PE is {only}, inside the attention" if only else "it has no absolute PE (pos_embed)"
        raise ValueError(f"{name} cannot be converted: {found}, and only an absolute PE can be delivered to layers")
    if not isinstance(model, VisionTransformer):
        raise ValueError(_not_timms(name, model))
    if type(model) is not VisionTransformer:
        raise ValueError(
            f"{name} cannot be converted: {type(model).__name__} is a subclass of timm's VisionTransformer, whose "
            "forward pass may differ; build timm's VisionTransformer itself, or change the class to a DeliveryMixin "
            "(docs/own.md)"
        )
    other = {type(block).__name__ for block in model.blocks if type(block) is not Block}
    if other:
        raise ValueError(
            f"{name} cannot be converted: its blocks are {', '.join(sorted(other))}, and only timm's Block has one "
            "attention input after one LN, to which a PE can be added"
        )


def _not_timms(name: str, model: Any) -> str:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return (
        f"{name} cannot be converted: convert takes timm's VisionTransformer, such as ViT, DeiT, DeiT-III, CLIP, "
        f"SigLIP or DINOv2, and this is {kind}; change its class to a DeliveryMixin (docs/own.md)"
    )


def _with_kept_readout(spec: DeliverySpec, model: Any) -> DeliverySpec:
    if model.global_pool in get_args(Pool):
        spec = replace(spec, pool=model.global_pool)
    # An LN after the mean has no tokens to which a PE could be added, and a class token without a row in the PE would
    # receive zeros, so that LN'_last would have no effect.
    no_row = model.global_pool == "token" and model.no_embed_class
    return spec.without_last() if no_row or isinstance(model.norm, nn.Identity) else spec


def _remark(asked: DeliverySpec, spec: DeliverySpec, model: Any) -> str:
    """What the network does not do although the method says so; empty if it does all of it."""
    if asked.last_index is None or spec.last_index is not None:
        return ""
    reason = "it has no LN before its pooling"
    if not isinstance(model.norm, nn.Identity):
        reason = "the class token that it reads out has no row in its position embedding"
    same = next((name for name, known in METHODS.items() if known == spec), None)
    runs_as = f", which is the method {same}" if same else ""
    return f"nothing is delivered to the Last LN{runs_as}, because {reason}; readout='method' delivers to it"


def _change_readout(model: Any, pool: Pool) -> None:
    """Changes the read-out to the method's: the Last LN on every token, then the class token or the mean."""
    if isinstance(model.norm, nn.Identity):
        if isinstance(model.fc_norm, nn.Identity):
            raise ValueError(f"{network_name(model)} has no Last LN, which the read-out needs; use readout='keep'")
        model.norm, model.fc_norm = model.fc_norm, nn.Identity()
    if pool == "token" and model.cls_token is None:
        raise ValueError(f"{network_name(model)} has no class token to read out; use a method with pool='avg'")
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


def network_name(model: Any) -> str:
    """The name by which a network was built, as far as it is known; otherwise its class."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = getattr(model, "_model_args", {}).get("network") or config.get("architecture") or type(model).__name__
    return str(name).removeprefix("mpvg_")


def _convertible_names() -> list[str]:
    return timm.list_models(["vit_*", "deit*"], module="vision_transformer") + timm.list_models(module="deit")


register_builder(_build_converted, CONVERTED, IMAGENET | {"input_size": (3, 224, 224)}, {}, 3)
