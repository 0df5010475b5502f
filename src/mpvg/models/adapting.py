"""Adapts the tensors of a checkpoint to a network: grids, channels, classes and class tokens."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from timm.models import adapt_input_conv
from torch import Tensor, nn

from mpvg.models.network import patch_grid
from mpvg.validation import named

Grid = tuple[int, int]
"""Rows and columns of patches."""

_POS = ("pos_embed", "delivery.reference_pos", "delivery.table")
_LEADING = ("cls_token", "dist_token", "reg_token")
_DISTILLED = ("dist_token", "head_dist.weight", "head_dist.bias")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was loaded from a checkpoint and what was not; the dictionaries map a tensor's name to the reason."""

    path: Path
    """The file."""
    source: str
    """The repository whose layout the file has."""
    entry: str = ""
    """The entry of the file that the tensors are from, with the prefix of their names; empty: the file itself."""
    taken: list[str] = field(default_factory=list)
    """Tensors that were loaded unchanged."""
    resampled: dict[str, str] = field(default_factory=dict)
    """Tensors that were resampled to another size, or adapted to another number of channels."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Tensors that have another function in the file."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors of the file, or rows of them, that the network does not have."""
    new: dict[str, str] = field(default_factory=dict)
    """Tensors of the network that the file does not have; they keep their initial values."""

    @property
    def changed(self) -> bool:
        """Whether anything but unchanged loading happened."""
        return bool(self.resampled or self.renamed or self.dropped or self.new)

    def __str__(self) -> str:
        entry = f", entry {self.entry}" if self.entry else ""
        lines = [f"{self.path}{entry}, names of {self.source}: {len(self.taken)} tensors taken"]
        for what in ("resampled", "renamed", "dropped", "new"):
            by_reason: dict[str, list[str]] = {}
            for name, reason in getattr(self, what).items():
                by_reason.setdefault(reason, []).append(name)
            for reason, names in by_reason.items():
                shown = f"{names[0]} to {names[-1]} ({len(names)} tensors)" if len(names) > 4 else ", ".join(names)
                lines.append(f"  {what}: {shown}: {reason}")
        return "\n".join(lines)


class CheckpointAdapter:
    """Adapts a file's tensors to a network; it fills the report and changes nothing else.

    Args:
        model: the network.
        tensors: the file's tensors, under the network's names.
        report: what is filled.
        grid: the grid of patches of the file's PE; None: not known.
    """

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor], report: LoadReport, grid: Grid | None) -> None:
        self.model: Any = model
        self.tensors = tensors
        self.report = report
        self.grid = grid
        self.wanted = model.state_dict()
        self.problems: list[str] = []
        config = getattr(model, "pretrained_cfg", None) or {}
        classifier = config.get("classifier") or "head"
        self.head = tuple(f"{classifier}.{name}" for name in ("weight", "bias"))
        first = config.get("first_conv", "patch_embed.proj") or ()
        self.first_convs = [f"{name}.weight" for name in ([first] if isinstance(first, str) else first)]

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
            adapted = self._adapt(key, given, own)
            if adapted is not None and key not in self.report.resampled and key not in self.report.renamed:
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
        elif re.search(r"^delivery\.(\d+\.)?(layer_norms|last_norm)\.", key):
            spec = self.model.spec
            self.report.new[key] = f"LN' at {spec.last_gain if 'last_norm' in key else spec.gain:g} and 0"
        elif key == "delivery.table":
            self.report.new[key] = "random, as the method says"
        elif key in getattr(self.model, "may_be_new", ()):
            self.report.new[key] = "the file has none"
        else:
            self.problems.append(f"{key} is missing")

    def _drop(self, key: str) -> None:
        """Reports a tensor of the file that the network does not have."""
        has_token = "cls_token" in self.wanted
        without: dict[str, str] = getattr(self.model, "may_be_dropped", {})
        if key in without:
            self.report.dropped[key] = without[key]
        elif key == "cls_token":
            self.report.dropped[key] = "the model reads out the mean over tokens and has no class token"
        elif key in _DISTILLED and not has_token:
            self.report.dropped[key] = "of the distillation token; the model reads out the mean over tokens"
        elif key == "dist_token":
            self.problems.append(
                "it is a distilled DeiT, which reads out a distillation token (dist_token) together with the class "
                "token; give a method with pool='avg'"
            )
        elif key in _DISTILLED:
            return  # named with dist_token
        elif key.startswith("delivery."):
            self.report.dropped[key] = "the method delivers nothing there"
        elif key in self.head:
            self.report.dropped[key] = "the model has no head"
        else:
            self.problems.append(f"{named(key)} has no place in the model")

    def _adapt(self, key: str, given: Tensor, own: Tensor) -> Tensor | None:
        """A tensor of the file in the shape of the network's; None: it cannot be, which is then among the problems."""
        try:
            # Grids are compared even where the numbers of rows are equal: 6 x 12 and 12 x 6 are not the same.
            if key in _POS and given.ndim == 3 and given.shape[::2] == own.shape[::2]:
                return self._adapt_pos_embed(key, given, own)
            if key.endswith("relative_position_bias_table") and given.shape[1:] == own.shape[1:]:
                return self._adapt_bias_table(key, given, own)
        except ValueError as error:
            self.problems.append(str(error))
            return None
        if given.shape == own.shape:
            return given
        if key in self.first_convs and given.ndim == 4 and (len(given), *given.shape[2:]) == (len(own), *own.shape[2:]):
            chans = given.shape[1], own.shape[1]
            self.report.resampled[key] = f"from {chans[0]} to {chans[1]} channels, as timm does"
            adapted: Tensor = adapt_input_conv(chans[1], given, base_chans=chans[0])
            return adapted
        self.problems.append(f"{key} is {tuple(given.shape)}, the model's is {tuple(own.shape)}")
        return None

    def _adapt_pos_embed(self, key: str, given: Tensor, own: Tensor) -> Tensor:
        """Resamples a PE to the network's grid and removes the rows of leading tokens that the network lacks."""
        grid = patch_grid(self.model)
        rows_kept = own.shape[1] - math.prod(grid)
        prefix, old = self._split_rows(key, given.shape[1], grid)
        if rows_kept > prefix:
            raise ValueError(f"{key} has no row for the model's class token")
        if prefix > rows_kept:
            self.report.dropped[f"{key}[:, :{prefix - rows_kept}]"] = "the rows of tokens that the model does not have"
        given = given[:, prefix - rows_kept :]
        if old != grid:
            self.report.resampled[key] = f"from a grid of {old[0]} x {old[1]} to {grid[0]} x {grid[1]}"
            smooth = getattr(self.model, "pos_antialias", True)
            given = resample_abs_pos_embed(given, list(grid), list(old), num_prefix_tokens=rows_kept, antialias=smooth)
        return given

    def _split_rows(self, key: str, rows: int, grid: Grid) -> tuple[int, Grid]:
        """The number of leading rows of a PE that are not patches, and the grid of the others."""
        leading = {name: self.tensors[name].shape for name in _LEADING if name in self.tensors}
        for name, shape in leading.items():
            if len(shape) != 3:
                raise ValueError(f"{name} is {tuple(shape)}; allowed: (1, tokens, width)")
        tokens = sum(shape[1] for shape in leading.values())
        # The PE has a row for every leading token or, with timm's `no_embed_class`, for none.
        order = (0, tokens) if getattr(self.model, "no_embed_class", False) else (tokens, 0)
        counts = {prefix: rows - prefix for prefix in dict.fromkeys(order) if rows > prefix}
        if self.grid is not None:
            for prefix, count in counts.items():
                if count == math.prod(self.grid):
                    return prefix, self.grid
            raise ValueError(
                f"{key} has {rows} rows, with {tokens} leading tokens, and not the {math.prod(self.grid)} of a grid of "
                f"{self.grid[0]} x {self.grid[1]}; give the grid of the file"
            )
        for prefix, count in counts.items():
            side = math.isqrt(count)
            if side * side == count:
                return prefix, (side, side)
        raise ValueError(
            f"{key} has {rows} rows, which is not a square grid plus {tokens} leading tokens, so it cannot be known "
            f"how its patches lie; give rows and columns as FILE::grid=HxW, such as "
            f"{self.report.path}::grid={grid[0]}x{grid[1]} if the file is for the model's image size"
        )

    def _adapt_bias_table(self, key: str, given: Tensor, own: Tensor) -> Tensor:
        """Resamples a table of relative position biases to the network's window size."""
        height, width = self.model.get_submodule(key.rpartition(".")[0]).window_size
        same_image = self.grid == patch_grid(self.model)
        side = math.isqrt(len(given))
        square = side * side == len(given) and side % 2 == 1
        if len(given) == len(own) and (same_image or (square and height == width)):
            return given
        if not square:
            raise ValueError(
                f"{key} has {len(given)} rows, which is not a square window; if the file is for the model's size, "
                f"say so: {self.report.path}::grid={'x'.join(map(str, patch_grid(self.model)))}"
            )
        self.report.resampled[key] = f"from windows of {(side + 1) // 2} to {height} x {width}"
        return resize_rel_pos_bias_table_simple(given, (height, width), tuple(own.shape))
