"""From a run to a file for an application: the network is folded, written, and run beside the original."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpvg.files import cannot_write, check_place, whole_folder, write_json
from mpvg.inference import preprocessing as prepared
from mpvg.inference.card import model_card
from mpvg.inference.hub import WEIGHTS, write_hub_folder
from mpvg.inference.loading import HUB, KINDS, Exported, load_export
from mpvg.inference.programs import FILES, need_packages, trace, write
from mpvg.inference.quantization import int8_instruction
from mpvg.inference.resample import any_size
from mpvg.models.fold import fold
from mpvg.models.network import check_logits, count_parameters
from mpvg.models.own import is_own
from mpvg.runs import Run
from mpvg.runs.checkpoints import Which
from mpvg.validation import shorten, unknown_name

LIMIT = 1e-4
"""Largest difference of a logit, between an export and the network in PyTorch, with which an export counts."""
BATCHES = (1, 4)
"""Images in the batches with which an export is compared."""


@dataclass(frozen=True)
class Report:
    """What an export is, and what was measured of it."""

    path: Path
    """The folder."""
    difference: float
    """Largest difference of a logit to the network in PyTorch; with int8, of the float32 graph before."""
    batches: tuple[tuple[int, ...], ...]
    """Shapes of the batches that it was measured on."""
    images: str
    """Which images these were."""
    int8: tuple[float, float, float] | None = None
    """With int8: largest difference of a logit relative to the largest logit; accuracy before and after, NaN where the
    data are not there."""


def export_run(
    run: Run,
    out: str | Path,
    kind: str,
    *,
    which: Which = "last",
    ema: bool = False,
    int8: bool = False,
    dynamic_size: bool = False,
) -> Report:
    """Exports a run's network and compares the result with PyTorch; nothing is left behind if that fails.

    Args:
        run: a run of image classification.
        out: a new folder.
        kind: "onnx", "torch-export", "openvino" or "hub-folder".
        which: the checkpoint.
        ema: the averaged weights instead of the trained ones.
        int8: 8-bit weights, for ONNX.
        dynamic_size: images of any size; such a network is not folded.

    Raises:
        FileExistsError: the folder exists.
        FileNotFoundError: the run has no such weights.
        ValueError: the network cannot have what is asked for, a runtime is missing, or the results differ.
    """
    out = Path(out)
    _check(kind, out, int8=int8, dynamic_size=dynamic_size)
    if is_own(run.config.model):
        _check_own(run.config.model, kind, dynamic_size=dynamic_size)
    values = prepared.preprocessing(run)
    model = run.model(which, ema=ema)
    network = _prepare(model, kind, dynamic_size=dynamic_size)
    real, images = _images(run)
    with torch.no_grad():  # a network that fails says so here, and not in the words of a tracer
        check_logits(model(real[:1]), 1, run.info.num_classes)
    patch = _patch(network) if dynamic_size else None
    values |= {
        "kind": kind,
        "file": WEIGHTS if kind == HUB else FILES[kind],
        "folded": kind != HUB and not dynamic_size,
        "int8": int8,
        "multiple_of": list(patch) if patch else None,
    }
    values["source"] |= {"checkpoint": which, "averaged": ema}
    with new_folder(out) as folder:
        write_json(folder / prepared.FILE, values)
        if kind == HUB:
            write_hub_folder(model, folder, values, model_card(run, count_parameters(model), which=which, ema=ema))
        else:
            program = trace(network, torch.randn(2, *real.shape[1:]), patch)
            write(program, kind, folder)
        batches = _batches(real, patch)
        expected = network if dynamic_size else model
        difference = compare(load_export(folder), expected, batches)
        measured = _quantized(run, folder, model, real, program) if int8 else None
    return Report(out, difference, tuple(tuple(batch.shape) for batch in batches), images, measured)


def _check(kind: str, out: Path, *, int8: bool, dynamic_size: bool) -> None:
    """Refuses what can be refused before anything is loaded."""
    if kind not in KINDS:
        raise ValueError(unknown_name("format", kind, KINDS))
    if int8 and kind != "onnx":
        raise ValueError(f"--int8 is for ONNX Runtime, and the format is {kind!r}; give --format onnx, or leave it out")
    if dynamic_size and kind == HUB:
        raise ValueError(
            "--dynamic_size is for graphs; a hub folder holds weights, and timm.create_model('local-dir:PATH', "
            "dynamic_img_size=True) builds the network for any size; leave it out"
        )
    check_place(out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already; give another --out")
    need_packages(kind)


def _check_own(name: str, kind: str, *, dynamic_size: bool) -> None:
    """Refuses what needs a network that this package builds again by its name."""
    if kind == HUB:
        graphs = ", ".join(FILES)
        raise ValueError(
            f"a hub folder names the network, and {name} is code that nobody else has; give --format {graphs}, which "
            "hold the network itself"
        )
    if dynamic_size:
        raise ValueError(
            f"--dynamic_size is for networks of this package, and {name} is of your own; leave it out, and train at "
            "the size that is wanted"
        )


def _prepare(model: nn.Module, kind: str, *, dynamic_size: bool) -> nn.Module:
    """The network that is written."""
    if dynamic_size:
        return any_size(model)
    return model if kind == HUB else fold(model)


def _patch(network: Any) -> tuple[int, int]:
    rows, columns = network.patch_embed.patch_size
    return rows, columns


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets its own when all went well and is removed otherwise.

    Raises:
        FileExistsError: there is something by this name.
        OSError: it cannot be written.
    """
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        with whole_folder(out) as folder:
            yield folder
            if os.path.lexists(out):  # an empty folder would be replaced
                raise FileExistsError(f"{out} exists already; give another --out")
    except BaseException as error:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and not isinstance(error, FileExistsError) and error.strerror:
            raise cannot_write(out, error) from error
        raise


def _images(run: Run) -> tuple[Tensor, str]:
    """A few prepared images of the run's validation set, `(B, C, H, W)`, or random ones; and which they are."""
    count = sum(BATCHES)
    try:
        batches = run.validation(torch.device("cpu"), images=count, batch_size=count)
        images: Tensor = next(iter(batches.epoch())).images
        if len(images) > 1:
            return images.float(), f"{len(images)} validation images"
        reason = "the validation set has too few"
    except (OSError, ValueError, ImportError) as error:
        reason = str(error)
    info = run.info
    images = torch.randn(count, info.in_chans, info.img_size, info.img_size)
    return images, f"{count} random images, because the validation set cannot be read ({reason})"


def _batches(images: Tensor, patch: tuple[int, int] | None) -> list[Tensor]:
    """The images in batches of two sizes; where their size is free, also enlarged to two others, one not square."""
    batches = [images[:1], images[1 : sum(BATCHES)]]
    if patch is not None:
        height, width = (side // part for side, part in zip(images.shape[2:], patch, strict=True))
        for rows, columns in ((height + 1, max(width // 2, 2)), (2 * height, 2 * width)):
            size = rows * patch[0], columns * patch[1]
            batches.append(torch.nn.functional.interpolate(images[:2], size, mode="bilinear"))
    return batches


def compare(exported: Exported, model: nn.Module, batches: list[Tensor]) -> float:
    """The largest difference of a logit between an export and a network.

    Raises:
        ValueError: it is more than `LIMIT`, or not a number.
    """
    found = []
    with torch.no_grad():
        for batch in batches:
            expected, actual = model(batch), exported(batch)
            if actual.shape != expected.shape:
                raise ValueError(
                    f"the export gives {tuple(actual.shape)} and PyTorch {tuple(expected.shape)}; nothing was written"
                )
            found.append(float((actual - expected).abs().max()))
    worst = max(found)
    if not worst <= LIMIT:  # NaN, too
        raise ValueError(
            f"the export differs from PyTorch by {worst:.1e} in a logit; allowed: {LIMIT:g}; nothing was written; "
            "try another --format, and report it with the run's config.yaml"
        )
    return worst


class _AsModule(nn.Module):
    """An export where a task takes a network."""

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.exported = exported

    def forward(self, images: Tensor) -> Tensor:
        return self.exported(images)


def _quantized(run: Run, folder: Path, model: nn.Module, images: Tensor, program: Any) -> tuple[float, float, float]:
    """Replaces the ONNX file by one with 8-bit weights, and measures what that changes."""
    write(program, "onnx", folder, int8=True)
    try:
        exported = load_export(folder)
        with torch.no_grad():
            expected, actual = model(images), exported(images)
    except Exception as error:  # ONNX Runtime's have no common class
        instruction = int8_instruction() or "none"
        reason = shorten(" ".join(str(error).split()))
        raise ValueError(
            f"ONNX Runtime cannot run the network with 8-bit weights here ({reason}; the processor's instruction for "
            f"8-bit products: {instruction}); leave --int8 out"
        ) from error
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    task, best = run.task(), run.task().best
    scores = []
    for network in (model, _AsModule(exported)):
        try:
            validation = run.validation(torch.device("cpu"))
        except (OSError, ValueError, ImportError):
            return difference, float("nan"), float("nan")
        scores.append(task.evaluate(network, validation).metrics[best])
    return difference, scores[0], scores[1]
