"""Loads weights from files into networks; no code in a file is executed."""

import _codecs
import argparse
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from mpvg.models.adapting import Grid
from mpvg.models.adapting import LoadReport as LoadReport
from mpvg.models.entries import ENTRIES, Source, fitting, is_plain, shown
from mpvg.models.layouts import RENAMED
from mpvg.models.layouts import translate as translate
from mpvg.models.numpy_weights import read_numpy
from mpvg.validation import named
from mpvg.validation import shown as quoted

_log = logging.getLogger(__name__)

_KINDS = {
    ".npz": "a NumPy archive",
    ".npy": "a NumPy array",
    ".h5": "a Keras file",
    ".hdf5": "a Keras file",
    ".keras": "a Keras file",
    ".msgpack": "a Flax file",
    ".onnx": "an ONNX graph",
    ".gguf": "a GGUF file",
    ".tflite": "a TensorFlow Lite file",
    ".pdparams": "a Paddle file",
}
"""Endings of files of weights that are not PyTorch's."""
_SCALAR = np.float64(0).__reduce__()[0]  # numpy's function for a single number
_PLAIN: list[Any] = [
    argparse.Namespace,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "bool"))),
    _codecs.encode,  # of the bytes of a number
]
"""What is read beside tensors and plain containers: the settings that training scripts save, and numpy's numbers."""

_THROUGH_TIMM = (
    "if timm can load it, save its tensors from there: safetensors.torch.save_file(timm.create_model(NAME, "
    "checkpoint_path=FILE).state_dict(), NEW)"
)


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Loads a checkpoint of the same architecture from this package, timm or the original repositories.

    The method may differ (an LN' that the file does not have stays at 1 and 0; a class token and its row of the PE are
    dropped if the network has none), and so may the image size (the PE is resampled), the number of classes (the head
    keeps its initial values) and the number of channels of an image. The report is logged, as a warning unless every
    tensor was loaded unchanged.

    Args:
        model: the network.
        path: the file, `FILE`. `FILE::ENTRY` chooses one of several sets of weights in it, such as `FILE::teacher`;
            `FILE::grid=HxW` gives the rows and columns of patches of its PE, where they cannot be known because the
            grid is not square. Both may be given.

    Returns:
        What was taken, resampled, dropped and new, and from which entry of the file; `model.load_report` keeps it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is of another architecture, or has several sets of weights that fit; the network
            is unchanged.
    """
    return load_source(model, read_source(path, model))


def load_source(model: nn.Module, source: Source) -> LoadReport:
    """As `load_checkpoint`, from what `read_source` returned."""
    state, report = fitting(source, model)
    model.load_state_dict(state)
    _publish(model, report)
    return report


def _publish(model: Any, report: LoadReport) -> None:
    model.load_report = report
    _log.log(logging.WARNING if report.changed else logging.INFO, "%s", report)


def read_source(path: str | Path, model: nn.Module) -> Source:
    """Reads a file, `FILE`, `FILE::ENTRY` or `FILE::grid=HxW`.

    Args:
        path: the file.
        model: the network that it is for: an archive of NumPy is read by its class in timm.
    """
    file, entry, grid = _split(path)
    _check_file(file)
    if file.suffix.lower() == ".npz" and hasattr(model, "load_pretrained"):
        return Source(path=file, content=read_numpy(file, model), entry=entry, grid=grid)
    return Source(path=file, content=_read(file, None), entry=entry, grid=grid)


def adapt_state_dict(content: Mapping[str, Any], model: nn.Module, grid: Grid | None = None) -> dict[str, Tensor]:
    """What `load_checkpoint` loads into a network, from the content of a file; timm's `checkpoint_filter_fn`."""
    state, report = fitting(Source(path=Path("the checkpoint"), content=content, grid=grid), model)
    _publish(model, report)
    return state


def read_tensors(path: str | Path, content: bytes | None = None) -> dict[str, Tensor]:
    """Reads the weights in a .safetensors file, or in a file of `torch.save`, onto the CPU.

    From a pickled file only tensors, plain containers, numbers (also numpy's) and text are read (`weights_only`), and
    the `argparse.Namespace` that training scripts save with their weights. The entries in `ENTRIES` are looked up, the
    prefixes of DistributedDataParallel and torch.compile are removed, and names of earlier versions are replaced.

    Args:
        path: the file.
        content: the bytes of a .safetensors file that has been read already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, contains code or other objects, or no weights, or weights that are not finite.
    """
    path = Path(path)
    if content is None:
        _check_file(path)
    tensors = _weights(_read(path, content), path)
    while tensors and (prefix := _common_prefix(tensors)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {named(key)} has values that are not finite; use an earlier checkpoint")
    return {RENAMED.get(key, key): tensor for key, tensor in tensors.items()}


def _split(path: str | Path) -> tuple[Path, str, Grid | None]:
    """The file, entry and grid in `FILE::ENTRY::grid=HxW`; a file that has the whole name comes first."""
    if Path(path).exists():
        return Path(path), "", None
    name, *choices = str(path).split("::")
    entry, grid = "", None
    for choice in choices:
        if not choice.startswith("grid="):
            entry = choice
        elif found := re.fullmatch(r"grid=([1-9]\d{0,5})x([1-9]\d{0,5})", choice):
            grid = int(found[1]), int(found[2])
        else:
            raise ValueError(
                f"{quoted(choice)} after {name}:: is not a grid; give rows and columns, such as grid=14x14"
            )
    return Path(name), entry, grid


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give a .safetensors or .pth file")


def _read(path: Path, content: bytes | None) -> Any:
    kind = _KINDS.get(path.suffix.lower())
    if kind is not None:
        raise ValueError(
            f"{path} is {kind}, and only .safetensors files and files of torch.save are read here; {_THROUGH_TIMM}"
        )
    try:
        if content is not None:
            return load(content)
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        reason = named(str(error))
        raise ValueError(f"{path} is damaged or not a .safetensors file ({reason}); use another checkpoint") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it needs {named(found[1])}" if found else "it is not a plain checkpoint"
        raise ValueError(
            f"{path} is refused, and no code in it was run: {what}, but only tensors, numbers and text are read. "
            "If you trust its origin, save only its tensors from the program that wrote it: "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # torch's readers raise errors of many types on damaged or foreign bytes
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript program, and no code in it was run; {_THROUGH_TIMM}") from error
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
        if not isinstance(key, str) or not is_plain(value):
            raise ValueError(
                f"{path} does not contain weights: its entry {quoted(key)} is a {type(value).__name__}; "
                f"expected a state_dict, by itself or as one of {', '.join(ENTRIES)}"
            )
    return dict(found)


def _common_prefix(tensors: Mapping[str, Tensor]) -> str | None:
    return next((p for p in ("module.", "_orig_mod.") if all(key.startswith(p) for key in tensors)), None)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads all weights from a file of the same network and method, or none of them.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the model is unchanged.
    """
    tensors = read_tensors(path)
    wanted = model.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in tensors]
    problems += [f"{named(key)} has no place in the model" for key in tensors if key not in wanted]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, the model's is {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        raise ValueError(
            f"{path} is of another model or method: {shown(problems)}. Use the model, method and classes it came from"
        )
    model.load_state_dict(tensors)
