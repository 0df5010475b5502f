"""Finds the weights of a network in the content of a checkpoint, judged by what fits the network."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpvg.models.adapting import CheckpointAdapter, Grid, LoadReport
from mpvg.models.layouts import Translated, translate_for
from mpvg.validation import named
from mpvg.validation import shown as quoted

ENTRIES = ("state_dict_ema", "state_dict", "model", "model_ema")
"""Entries of a file in which training scripts save the weights, in order of preference: T2T-ViT and timm evaluate the
averaged weights, DeiT evaluates `model` although the file also has averaged weights."""

_DEPTH = 6
"""Mappings inside mappings that are searched; no training script nests deeper."""
_NAMES = 4
"""Names under which one mapping is found; one that contains itself has names without end."""
_WRAPPER = "_orig_mod."
"""What torch.compile puts before the names of what it compiled."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The content of a file, and what the user has said about it."""

    path: Path
    """The file."""
    content: Any
    """What was read: tensors by name, possibly in entries of entries, beside other values."""
    entry: str = ""
    """The entry to take; empty: the one that fits."""
    grid: Grid | None = None
    """The grid of patches of the PE; None: not known."""

    def names(self) -> set[str]:
        """The names of all tensors, without those of their entries."""
        return {key for _, tensors in mappings(self.content) for key in tensors}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """A set of tensors in a file that may be the network's weights."""

    entry: str
    """The mapping that contains it; empty: the file itself."""
    prefix: str
    """What every name begins with, and the network's names do not."""
    translated: Translated
    outside: dict[str, str]
    """Tensors of the mapping whose names do not begin with the prefix -> the reason why they are dropped."""
    score: int
    """Number of the network's tensors that it has."""

    @property
    def name(self) -> str:
        """What chooses it."""
        return ".".join(part for part in (self.entry, self.prefix.rstrip(".")) if part)


def is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor whose elements are all in memory, and no other kind of tensor."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    if value.is_quantized or value.is_complex() or value.is_nested:
        return False
    # An expanded tensor of a few bytes may claim any size.
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def fitting(source: Source, model: nn.Module) -> tuple[dict[str, Tensor], LoadReport]:
    """Finds the one set of tensors in a file that fits a network, under any entry and any prefix.

    Returns:
        The network's new state and the report.

    Raises:
        ValueError: none fits, or several do; the message says which.
    """
    tried = [(candidate, *_adapt(source, candidate, model)) for candidate in _candidates(source, model)]
    fits = [trial for trial in tried if not trial[3]]
    if not fits:
        problems = max(tried, key=lambda trial: (trial[0].score, -len(trial[3])))[3]
        raise ValueError(
            f"{source.path} does not fit: {shown(problems)}. Use a checkpoint of this architecture; the method, the "
            "image size and the number of classes may differ"
        )
    _, state, report, _ = fits[_preferred(source.path, [trial[0] for trial in fits])]
    for key in (*report.taken, *report.resampled, *report.renamed):
        if state[key].is_floating_point() and not state[key].float().isfinite().all():
            raise ValueError(f"{source.path}: {key} has values that are not finite; use an earlier checkpoint")
    return state, report


def _preferred(path: Path, fits: list[_Candidate]) -> int:
    """The index of the only set of weights, or of the one that training scripts evaluate."""
    entries = [candidate.entry for candidate in fits]
    if len(fits) == 1:
        return 0
    if set(entries) <= set(ENTRIES) and len(set(entries)) == len(entries):
        return entries.index(next(entry for entry in ENTRIES if entry in entries))
    names = sorted(candidate.name for candidate in fits)
    listed = shown([named(name) or "the file itself" for name in names], ", ")
    raise ValueError(
        f"{path} has {len(fits)} sets of weights that fit: {listed}; "
        f"choose one as FILE::ENTRY, such as {path}::{named(names[-1])}"
    )


def _adapt(source: Source, candidate: _Candidate, model: nn.Module) -> tuple[dict[str, Tensor], LoadReport, list[str]]:
    translated = candidate.translated
    report = LoadReport(
        path=source.path,
        source=translated.source,
        entry=candidate.name,
        renamed=dict(translated.renamed),
        dropped=candidate.outside | translated.dropped,
    )
    state, problems = CheckpointAdapter(model, translated.tensors, report, source.grid).adapt()
    return state, report, problems


def _candidates(source: Source, model: nn.Module) -> list[_Candidate]:
    """The sets of tensors that have at least half of what the network needs; if there is none, the best one."""
    required = [key for key in model.state_dict() if not key.startswith(("delivery.", "head"))]
    sets = list(mappings(source.content))
    if not sets:
        raise ValueError(
            f"{source.path} contains a {type(source.content).__name__} without weights by name; give a state_dict"
        )
    least = len(required) // 2
    # An optimizer's state is as many small mappings as there are parameters.
    large = [one for one in sets if len(one[1]) >= least] or [max(sets, key=lambda one: len(one[1]))]
    found = []
    for entry, tensors in large:
        for prefix in _prefixes(tensors, least):
            inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            reason = f"not a part of the network, whose names begin with {prefix!r}"
            outside = dict.fromkeys((key for key in tensors if not key.startswith(prefix)), reason)
            translated = translate_for(model, inside)
            score = sum(key in translated.tensors for key in required)
            found.append(_Candidate(entry=entry, prefix=prefix, translated=translated, outside=outside, score=score))
    enough = [candidate for candidate in found if 2 * candidate.score >= len(required)]
    chosen = [candidate for candidate in found if f"{candidate.name}.".startswith(source.entry and f"{source.entry}.")]
    if not chosen:
        names = shown(sorted(named(candidate.name) or "the file itself" for candidate in enough), ", ") or "none"
        raise ValueError(
            f"{source.path} has no entry {quoted(source.entry)}; entries with weights of this network: {names}"
        )
    best = max(chosen, key=lambda candidate: (candidate.score, len(candidate.translated.tensors)))
    return [candidate for candidate in enough if candidate in chosen] or [best]


def mappings(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping with tensors in the content of a file, by the names of the entries that lead to it."""
    seen: Counter[int] = Counter()
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    for name, found, depth in waiting:  # it grows while it is read
        if not isinstance(found, Mapping) or seen[id(found)] == _NAMES or depth > _DEPTH:
            continue
        seen[id(found)] += 1
        tensors = {str(key).replace(_WRAPPER, ""): value for key, value in found.items() if is_plain(value)}
        if tensors:
            yield name, tensors
        waiting += [(f"{name}.{key}".lstrip("."), value, depth + 1) for key, value in found.items()]


def _prefixes(names: Mapping[str, Tensor], least: int) -> list[str]:
    """No prefix, and every beginning that ends with a dot and that at least so many names have."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:end]) + "." for end in range(1, min(len(parts), _DEPTH + 1)))
    return ["", *(prefix for prefix, count in counts.items() if count >= max(least, 1))]


def shown(problems: Sequence[str], between: str = "; ") -> str:
    """The first few problems, and how many there are besides."""
    return between.join([*problems[:4], *([f"and {len(problems) - 4} more"] if len(problems) > 4 else [])])
