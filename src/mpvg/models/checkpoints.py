"""Loads weights from files into networks; no code in a file is executed."""

import argparse
import logging
import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from torch import Tensor, nn

_log = logging.getLogger(__name__)

ENTRIES = ("state_dict_ema", "state_dict", "model", "model_ema")
"""Entries of a file in which training scripts save the weights, in order of preference: T2T-ViT and timm evaluate the
averaged weights, DeiT evaluates `model` although the file also has averaged weights."""

RENAMED = {"delivery.start": "delivery.reference_pos"}
"""Names of tensors in files of earlier versions of this package, and what they are called now."""


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


def read_tensors(path: str | Path, content: bytes | None = None) -> dict[str, Tensor]:
    """Reads the weights in a .safetensors file, or in a file of `torch.save`, onto the CPU.

    From a pickled file only tensors, plain containers, numbers and text are read (`weights_only`), and the
    `argparse.Namespace` that training scripts save with their weights. The entries in `ENTRIES` are looked up, the
    prefixes of DistributedDataParallel and torch.compile are removed, and names of earlier versions are replaced.

    Args:
        path: the file.
        content: the bytes of a .safetensors file that has been read already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, contains code or other objects, or no weights, or weights that are not finite.
    """
    path = Path(path)
    if content is None and not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give a .safetensors or .pth file")
    tensors = _weights(_read(path, content), path)
    while tensors and (prefix := _common_prefix(tensors)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {key} has values that are not finite; use an earlier checkpoint")
    return _migrate(tensors)


def _migrate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors that earlier versions of this package saved under other names."""
    return {RENAMED.get(key, key): tensor for key, tensor in tensors.items()}


def _read(path: Path, content: bytes | None) -> Any:
    try:
        if content is not None:
            return load(content)
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a .safetensors file ({error}); use another checkpoint") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it needs {found[1]}" if found else "it is not a plain checkpoint"
        raise ValueError(
            f"{path} is refused, and no code in it was run: {what}, but only tensors, numbers and text are read. "
            "If you trust its origin, save only its tensors from the program that wrote it: "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # torch's readers raise errors of many types on damaged or foreign bytes
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}: {reason}); use another checkpoint"
        ) from error


def _weights(found: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name in the content of a file."""
    if isinstance(found, Mapping):
        found = next((found[entry] for entry in ENTRIES if isinstance(found.get(entry), Mapping)), found)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} contains a {type(found).__name__} without weights by name; give a state_dict")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"{path} does not contain weights: its entry {key!r} is a {type(value).__name__}; "
                f"expected a state_dict, by itself or as one of {', '.join(ENTRIES)}"
            )
    return dict(found)


def _common_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    return next((p for p in ("module.", "_orig_mod.") if all(key.startswith(p) for key in tensors)), None)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was loaded from a checkpoint and what was not; the dictionaries map a tensor's name to the reason."""

    path: Path
    """The file."""
    source: str
    """The repository whose layout the file has."""
    taken: list[str] = field(default_factory=list)
    """Tensors that were loaded unchanged."""
    resampled: dict[str, str] = field(default_factory=dict)
    """Tensors that were resampled to another size."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors of the file, or rows of them, that the network does not have."""
    new: dict[str, str] = field(default_factory=dict)
    """Tensors of the network that the file does not have; they keep their initial values."""

    def __str__(self) -> str:
        lines = [f"{self.path}, names of {self.source}: {len(self.taken)} tensors taken"]
        for what in ("resampled", "dropped", "new"):
            by_reason: dict[str, list[str]] = {}
            for name, reason in getattr(self, what).items():
                by_reason.setdefault(reason, []).append(name)
            for reason, names in by_reason.items():
                shown = f"{names[0]} to {names[-1]} ({len(names)} tensors)" if len(names) > 4 else ", ".join(names)
                lines.append(f"  {what}: {shown}: {reason}")
        return "\n".join(lines)


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Loads a checkpoint of the same architecture from this package, timm or the original repositories.

    The method may differ (an LN' that the file does not have stays at 1 and 0; a class token and its row of the PE are
    dropped if the network has none), and so may the image size (the PE is resampled) and the number of classes (the
    head keeps its initial values). The report is logged, as a warning unless every tensor was loaded unchanged.

    Returns:
        What was taken, resampled, dropped and new.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is of another architecture; the network is unchanged.
    """
    return load_pretrained_tensors(model, read_tensors(path), path)


def load_pretrained_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> LoadReport:
    """As `load_checkpoint`, with the tensors that `read_tensors` returned for the file."""
    tensors, layout = translate(tensors, getattr(model, "layouts", ()))
    report = LoadReport(path=Path(path), source=layout.source if layout else "timm")
    state, problems = _CheckpointAdapter(model, tensors, report).adapt()
    if problems:
        raise ValueError(
            f"{path} does not fit: {_shown(problems)}. Use a checkpoint of this architecture; the method, the image "
            "size and the number of classes may differ"
        )
    model.load_state_dict(state)
    _log.log(logging.WARNING if report.resampled or report.dropped or report.new else logging.INFO, "%s", report)
    return report


class _CheckpointAdapter:
    """Adapts a file's tensors to a network; it fills the report and changes nothing else."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor], report: LoadReport) -> None:
        self.model: Any = model
        self.tensors = tensors
        self.report = report
        self.wanted = model.state_dict()
        self.problems: list[str] = []
        classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
        self.head = tuple(f"{classifier}.{name}" for name in ("weight", "bias"))

    def adapt(self) -> tuple[dict[str, Tensor], list[str]]:
        """Returns the network's new state, and the problems that prevent loading it."""
        state = {}
        replaced = self._replaced_head()
        for key, own in self.wanted.items():
            given = self.tensors.get(key)
            if given is None or key in replaced:
                self._keep(key, replaced)
                state[key] = own
                continue
            adapted = given if given.shape == own.shape else self._adapt_shape(key, given, own)
            if adapted is not None and key not in self.report.resampled:
                self.report.taken.append(key)
            state[key] = own if adapted is None else adapted
        for key in self.tensors:
            if key not in self.wanted:
                self._drop(key)
        return state, self.problems

    def _replaced_head(self) -> Sequence[str]:
        """The names of the head's tensors if the file has another number of classes, otherwise none."""
        own, given = (side.get(self.head[0]) for side in (self.wanted, self.tensors))
        if own is None or given is None or own.shape == given.shape or own.shape[1:] != given.shape[1:]:
            return ()
        for name in self.head:
            if name in self.tensors:
                self.report.dropped[name] = f"{len(given)} classes in the file, {len(own)} in the model"
        return self.head

    def _keep(self, key: str, replaced: Sequence[str]) -> None:
        """Reports a tensor of the network that the file does not have."""
        if key in replaced or key in self.head:
            self.report.new[key] = "the head has other classes" if key in replaced else "the file has no head"
        elif key.startswith("delivery.") and key != "delivery.reference_pos":
            self.report.new[key] = "LN' at 1 and 0"
        elif key in getattr(self.model, "may_be_new", ()):
            self.report.new[key] = "the file has none"
        else:
            self.problems.append(f"{key} is missing")

    def _drop(self, key: str) -> None:
        """Reports a tensor of the file that the network does not have."""
        if key == "cls_token":
            self.report.dropped[key] = "the model reads out the mean over tokens and has no class token"
        elif key.startswith("delivery."):
            self.report.dropped[key] = "the method delivers nothing there"
        elif key in self.head:
            self.report.dropped[key] = "the model has no head"
        else:
            self.problems.append(f"{key} has no place in the model")

    def _adapt_shape(self, key: str, given: Tensor, own: Tensor) -> Tensor | None:
        try:
            if key in ("pos_embed", "delivery.reference_pos") and given.ndim == 3 and given.shape[2] == own.shape[2]:
                return self._adapt_pos_embed(key, given, own)
            if key.endswith("relative_position_bias_table") and given.shape[1:] == own.shape[1:]:
                return self._adapt_bias_table(key, given, own)
        except ValueError as error:
            self.problems.append(str(error))
            return None
        self.problems.append(f"{key} is {tuple(given.shape)}, the model's is {tuple(own.shape)}")
        return None

    def _adapt_pos_embed(self, key: str, given: Tensor, own: Tensor) -> Tensor:
        """Resamples a PE to the network's grid and removes the rows of leading tokens that the network lacks."""
        grid: tuple[int, int] = self.model.patch_embed.grid_size
        rows_kept = own.shape[1] - math.prod(grid)
        tokens = 0
        for name in ("cls_token", "reg_token"):
            tokens += self.tensors[name].shape[1] if name in self.tensors else 0
        # The PE has a row for every leading token or, with timm's `no_embed_class`, for none.
        for prefix in dict.fromkeys((tokens, 0)):
            count = given.shape[1] - prefix
            side = math.isqrt(max(count, 0))
            if count == math.prod(grid) or (count > 0 and side * side == count):
                break
        else:
            raise ValueError(
                f"{key} has {given.shape[1]} rows, which is not a square grid plus {tokens} leading tokens, so it "
                "cannot be resampled; build the model with the checkpoint's image size"
            )
        if rows_kept > prefix:
            raise ValueError(f"{key} has no row for the model's class token")
        if prefix > rows_kept:
            self.report.dropped[f"{key}[:, :{prefix - rows_kept}]"] = "the rows of tokens that the model does not have"
        given = given[:, prefix - rows_kept :]
        if count != math.prod(grid):
            self.report.resampled[key] = f"from a grid of {side} x {side} to {grid[0]} x {grid[1]}"
            given = resample_abs_pos_embed(given, list(grid), [side, side], num_prefix_tokens=rows_kept)
        return given

    def _adapt_bias_table(self, key: str, given: Tensor, own: Tensor) -> Tensor:
        """Resamples a table of relative position biases to the network's window size."""
        module = self.model.get_submodule(key.rpartition(".")[0])
        side = math.isqrt(len(given))
        if side * side != len(given) or side % 2 == 0:
            raise ValueError(f"{key} has {len(given)} rows, which is not a square window")
        height, width = module.window_size
        self.report.resampled[key] = f"from windows of {(side + 1) // 2} to {height} x {width}"
        return resize_rel_pos_bias_table_simple(given, module.window_size, tuple(own.shape))


def _shown(problems: Sequence[str]) -> str:
    return "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads all weights from a file of the same network and method, or none of them.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the model is unchanged.
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
        raise ValueError(
            f"{path} is of another model or method: {_shown(problems)}. Use the model, method and classes it came from"
        )
    model.load_state_dict(tensors)
