"""Weights from files into networks; nothing a file contains is executed."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the checkpoints of one repository name their tensors."""

    source: str
    """The repository, as owner/name."""
    marker: str
    """Pattern of a name that only this layout has."""
    names: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()
    """Patterns and replacements, as for re.sub, applied in this order; a name that none matches stays."""
    computed: str | None = None
    """Pattern of buffers that the network computes itself, which are left out."""


def translate(tensors: Mapping[str, Tensor], layouts: Sequence[Layout]) -> tuple[dict[str, Tensor], Layout | None]:
    """Renames tensors from the layout that they are in, if it is one of these, to the network's own names."""
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


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads a .safetensors file onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is not a .safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give a .safetensors file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no .safetensors file ({error}); use another checkpoint") from error


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads all of a network's weights from a .safetensors file, or nothing.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; the model is unchanged.
    """
    tensors = read_tensors(path)
    wanted = model.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in tensors]
    problems += [f"{key} has no place in the model" for key in tensors if key not in wanted]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, the model's is {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(
            f"{path} is of another model or method: {shown}. Use the model, method and classes it came from"
        )
    model.load_state_dict(tensors)
