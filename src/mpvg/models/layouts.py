"""How checkpoints of other repositories name their tensors, and what they hold beside a network's weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

RENAMED = {"delivery.start": "delivery.reference_pos"}
"""Names of tensors in files of earlier versions of this package, and what they are called now."""

EXTRAS = (
    (r"^mask_token$", "for masked images in pretraining only"),
    (r"^decoder(_\w+)?\.|^decoder_pos_embed$", "the decoder of pretraining"),
    (r"^pre_logits\.", "a layer before the head that newer networks do not have"),
    (r"^attn_pool\.", "the model pools without attention"),
    (r"relative_position_index$|attn_mask$", "the network computes it"),
)
"""Patterns of names that pretraining leaves in its files, and the reason why a classifier does without them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the checkpoints of one repository name their tensors."""

    source: str
    """The repository, as owner/name."""
    marker: str
    """Pattern of a name that occurs in this layout only."""
    names: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()
    """Patterns and replacements for re.sub, applied in this order; a name that matches none is kept."""
    computed: str | None = None
    """Pattern of buffers that are left out because the network computes them itself."""


@dataclass(frozen=True, kw_only=True)
class Translated:
    """Tensors of a file under the names of a network."""

    tensors: dict[str, Tensor]
    """The tensors that have, or could have, a place in the network."""
    source: str = "timm"
    """The repository whose layout the file has."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Names in the file of tensors that are known to be of no use -> the reason."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Names of tensors with another function in the file than in the network -> the difference."""


def translate(tensors: Mapping[str, Tensor], layouts: Sequence[Layout]) -> tuple[dict[str, Tensor], Layout | None]:
    """Renames tensors from one of these layouts, if they are in one, to the network's own names."""
    for layout in layouts:
        if any(re.search(layout.marker, key) for key in tensors):
            break
    else:
        return dict(tensors), None
    renamed = {}
    for key, tensor in tensors.items():
        if layout.computed is not None and re.search(layout.computed, key):
            continue
        for pattern, replacement in layout.names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed, layout


def translate_for(model: nn.Module, tensors: Mapping[str, Tensor]) -> Translated:
    """Renames the tensors of a file, whatever layout it has, to the names of a network."""
    wanted = model.state_dict().keys()
    tensors = {RENAMED.get(key, key): tensor for key, tensor in tensors.items()}
    tensors, layout = translate(tensors, getattr(model, "layouts", ()))
    if layout is not None:
        return Translated(tensors=tensors, source=layout.source)
    dropped = {
        key: reason for key in tensors if key not in wanted for pattern, reason in EXTRAS if re.search(pattern, key)
    }
    converted = _timms_names(tensors, model)
    kept = {key: tensor for key, tensor in converted.items() if key not in dropped}
    dropped |= _lost(tensors, converted, dropped)
    renamed = _match_last_norm(kept, dropped, wanted)
    return Translated(tensors=kept, dropped=dropped, renamed=renamed)


def _timms_names(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Applies timm's filter for official checkpoints of a ViT (DINOv2, DeiT-III, OpenCLIP), without its resampling.

    The filter resamples the PE to a grid that it assumes, and the patches silently. It is given no PE and the patch
    size of the file, so that it only renames, and this package resamples what it knows how to.
    """
    kernel = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "weight", None)
    if not isinstance(model, VisionTransformer) or kernel is None:
        return tensors
    convolution = next((tensor for tensor in tensors.values() if tensor.ndim == 4), kernel)
    shell: Any = SimpleNamespace(
        patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=convolution)), pos_embed=None, head=model.head
    )
    try:
        renamed: dict[str, Tensor] = checkpoint_filter_fn(dict(tensors), shell, adapt_layer_scale=True)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return tensors  # not a file that the filter knows; the names that do not fit are reported with it
    return renamed


def _lost(tensors: dict[str, Tensor], converted: dict[str, Tensor], known: Mapping[str, str]) -> dict[str, str]:
    """Tensors that timm's filter left out: neither their name nor their values are in its result."""
    values = {tensor.untyped_storage().data_ptr() for tensor in converted.values()}
    return {
        key: "not a part of the image encoder"
        for key, tensor in tensors.items()
        if key not in converted and key not in known and tensor.untyped_storage().data_ptr() not in values
    }


def _match_last_norm(tensors: dict[str, Tensor], dropped: dict[str, str], wanted: Any) -> dict[str, str]:
    """Moves the LN after the mean (`fc_norm`) to the Last LN (`norm`), or back, where the network has only the other.

    MAE's fine-tuning exchanges the two in this way. What has no place is dropped.
    """
    renamed = {}
    places = {"norm": "before", "fc_norm": "after"}
    for own, other in (("norm", "fc_norm"), ("fc_norm", "norm")):
        for part in ("weight", "bias"):
            key, target = f"{own}.{part}", f"{other}.{part}"
            if key not in tensors or key in wanted:
                continue
            tensor = tensors.pop(key)
            if target in wanted and target not in tensors:
                tensors[target] = tensor
                renamed[target] = f"the file has it {places[own]} the pooling ({own}), the model {places[other]}"
            else:
                dropped[key] = f"the model has no LN {places[own]} the pooling"
    return renamed
