"""Loads checkpoints of czczup/ViT-Adapter, which MMDetection and mmsegmentation wrote, part by part."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mpvg.models.adapting import LoadReport
from mpvg.models.checkpoints import load_checkpoint, read_tensors
from mpvg.models.entries import shown

_log = logging.getLogger(__name__)

SOURCE = "czczup/ViT-Adapter"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A tensor that the official network holds in another form."""

    name: str
    """Pattern of its name in this package's network, without the part's `place`."""
    apply: Callable[[Tensor, Tensor], Tensor]
    """The file's tensor and the network's own to the tensor that is loaded; the file's own where nothing is to do."""
    reason: str
    """What is changed, for the report."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """How one part of an official network, such as its backbone, names its tensors."""

    prefix: str
    """What the names of its tensors begin with in the file."""
    place: str = ""
    """What they begin with in this package's network."""
    names: tuple[tuple[str, str], ...] = ()
    """Patterns and replacements for re.sub, applied in this order, without prefix and place; others are kept."""
    changes: tuple[Change, ...] = ()
    """Tensors that need more than another name."""
    dropped: tuple[tuple[str, str], ...] = ()
    """Patterns of names, as in the file without the prefix, that the network does without, and the reasons."""


def _patch_rows(given: Tensor, own: Tensor) -> Tensor:
    """A PE without the class token's row, if it has one more row than the network's."""
    return given[:, 1:] if given.ndim == 3 and given.shape[1] == own.shape[1] + 1 else given


BACKBONE = Part(
    prefix="backbone.",
    names=(
        (r"^blocks\.(\d+)\.gamma([12])$", r"blocks.\1.ls\2.gamma"),
        (r"^(blocks|patch_embed|pos_embed)", r"vit.\1"),
        (r"\.ffn\.dwconv\.dwconv\.", ".ffn.dwconv."),
    ),
    changes=(
        Change(
            name=r"^vit\.pos_embed$",
            apply=_patch_rows,
            reason="without the class token's row, which the official network does not use",
        ),
    ),
    dropped=((r"^cls_token$", "the official network does not use it"),),
)
"""ViTAdapter's own tensors; in a network that holds one, `replace(BACKBONE, place="backbone.")`."""


def load_official(network: nn.Module, path: str | Path, parts: Sequence[Part] = (BACKBONE,)) -> LoadReport:
    """Loads the parts of a complete checkpoint of the original repository into a network.

    The method may deliver more than the file's, which has no LN'. Tensors of the file that belong to no part are
    dropped and reported. Nothing is loaded unless all of the network's tensors are there.

    Args:
        network: this package's network.
        path: the file, of MMDetection, mmsegmentation or as .safetensors.
        parts: the parts that the network has.

    Returns:
        What was taken, changed, dropped and new.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or a tensor is missing, unknown or of another shape; the network is unchanged.
    """
    report = LoadReport(path=Path(path), source=SOURCE)
    wanted, state, problems = network.state_dict(), {}, []
    for name, tensor in read_tensors(path).items():
        part = next((part for part in parts if name.startswith(part.prefix)), None)
        if part is None:
            report.dropped[name] = "of a part that is not loaded"
            continue
        inside = name.removeprefix(part.prefix)
        reason = next((reason for pattern, reason in part.dropped if re.search(pattern, inside)), None)
        if reason is not None:
            report.dropped[name] = reason
            continue
        key, adapted = _translated(part, inside, tensor, wanted, report)
        if key not in wanted:
            problems.append(f"{name} has no place in the network")
        elif adapted.shape != wanted[key].shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, the network's is {tuple(wanted[key].shape)}")
        else:
            state[key] = adapted
    for key in wanted.keys() - state.keys():
        if re.search(r"(^|\.)delivery\.layer_norms\.", key):
            report.new[key] = "LN' at 1 and 0"
            state[key] = wanted[key]
        else:
            problems.append(f"{key} is missing")
    if problems:
        raise ValueError(
            f"{path} does not fit: {shown(sorted(problems))}. Use a checkpoint of {SOURCE} of this architecture"
        )
    network.load_state_dict(state)
    _log.log(logging.WARNING if report.changed else logging.INFO, "%s", report)
    return report


def load_complete(network: nn.Module, path: str | Path) -> LoadReport:
    """Loads all weights of a trained network from a file: of the original repositories, of timm, or of this package.

    Raises:
        As `load_official` and `mpvg.models.load_checkpoint`; ValueError also where the file has no head that fits.
    """
    parts: Sequence[Part] = getattr(network, "official", ())
    if parts:
        state, wanted = read_tensors(path), network.state_dict()
        names = state.keys()
        if not any(".vit." in name for name in names):  # not a dense network of this package
            return load_official(network, path, parts)
        problems = [f"{name} is missing" for name in wanted.keys() - names]
        problems += [f"{name} has no place in the network" for name in names - wanted.keys()]
        problems += [
            f"{name} is {tuple(tensor.shape)}, the network's is {tuple(wanted[name].shape)}"
            for name, tensor in state.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ]
        if problems:
            raise ValueError(
                f"{path} does not fit: {shown(sorted(problems))}. Give the --recipe, --method and --data that it is of"
            )
        network.load_state_dict(state)
        return LoadReport(path=Path(path), source="mpvg", taken=list(names))
    report = load_checkpoint(network, path)
    if new := [name for name in report.new if not re.search(r"(^|\.)delivery\.", name)]:
        raise ValueError(f"{path} has no {shown(sorted(new))}: it is no complete classifier of this data; train one")
    return report


def _translated(
    part: Part, inside: str, tensor: Tensor, wanted: dict[str, Tensor], report: LoadReport
) -> tuple[str, Tensor]:
    """The name of a tensor in the network, and what is loaded there."""
    own = inside
    for pattern, replacement in part.names:
        own = re.sub(pattern, replacement, own)
    key, adapted = part.place + own, tensor
    for change in part.changes:
        if key in wanted and re.search(change.name, own):
            adapted = change.apply(adapted, wanted[key])
            if adapted is not tensor:
                report.resampled[key] = change.reason
    if key not in report.resampled:
        report.taken.append(key)
    return key, adapted
