"""Reads what `mpvg export` wrote, as one callable whatever the runtime."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor

from mpvg.files import check_regular
from mpvg.inference.hub import read_hub_folder
from mpvg.inference.preprocessing import read_preprocessing
from mpvg.inference.programs import FILES, INPUT, PRECISION, from_extra
from mpvg.models.fold import fold
from mpvg.validation import shown

Array = Any
"""A numpy array; its types say no more than that."""
Compute = Callable[[Array], Array]
Images = TypeVar("Images", Tensor, Array)
HUB = "hub-folder"
KINDS = (*FILES, HUB)
"""What `mpvg export --format` takes."""


@dataclass(frozen=True)
class Exported:
    """An exported network: images to logits, on the CPU."""

    path: Path
    """Its folder."""
    preprocessing: dict[str, Any]
    """What its inputs and outputs are; see `mpvg.inference.preprocessing.preprocessing`."""
    compute: Compute
    """Images `(B, C, H, W)` to logits, as arrays."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return str(self.preprocessing["kind"])

    def __call__(self, images: Images) -> Images:
        """Prepared images `(B, C, H, W)` to logits `(B, classes)`, float32; an array for an array, else a tensor.

        Raises:
            ValueError: the images have another type, number of channels or size than the network takes.
        """
        array = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
        self._check(array)
        if len(array) == 0:  # not every runtime has a product of nothing
            logits = np.zeros((0, len(self.preprocessing["class_names"])), np.float32)
        else:
            logits = self.compute(np.ascontiguousarray(array))
        return torch.from_numpy(logits) if isinstance(images, Tensor) else logits

    def _check(self, images: Array) -> None:
        takes = self.preprocessing
        channels, height, width = takes["channels"], takes["height"], takes["width"]
        if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.ndim != 4:
            what = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(f"images are {what}; allowed: float32 (images, {channels}, height, width), prepared")
        rows, columns = takes.get("multiple_of") or (height, width)
        free = takes.get("multiple_of") is not None
        fits = images.shape[2] % rows == 0 and images.shape[3] % columns == 0 and min(images.shape[2:]) > 0
        smallest = images.shape[2] >= 2 * rows and images.shape[3] >= 2 * columns
        if images.shape[1] != channels or not (fits and smallest if free else images.shape[2:] == (height, width)):
            sizes = f"multiples of {rows} x {columns}, at least twice as much" if free else f"{height} x {width}"
            raise ValueError(f"images are {images.shape[1:]}; allowed: {channels} channels of {sizes}")


def load_export(path: str | Path) -> Exported:
    """Loads what `mpvg export` wrote.

    Args:
        path: the folder, or the file of the network in it.

    Raises:
        FileNotFoundError: there is no such folder, or no preprocessing beside the network.
        ValueError: the file is not of a kind that is known, is damaged, or its runtime is not installed.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder that `mpvg export` made")
    values = read_preprocessing(folder)
    kind, file = values["kind"], folder / values["file"]
    if kind not in KINDS:
        raise ValueError(f"{folder} holds an export of kind {shown(kind)}; allowed: {', '.join(KINDS)}")
    if kind != HUB and file.name != FILES[kind]:
        raise ValueError(f"{file} cannot be loaded (the file of {kind} is {FILES[kind]}); export the run again")
    if path not in (folder, file) and path.resolve() != file.resolve():
        raise ValueError(f"{path} is not the network of {folder}, which is {file.name}; give the folder")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; export the run again")
    check_regular(file)
    return Exported(folder, values, _LOADERS[kind](file))


def _damaged(file: Path, error: Exception) -> ValueError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ValueError(f"{file} cannot be loaded ({shown(lines[-1])}); export the run again")


def _load_onnx(file: Path) -> Compute:
    with from_extra():
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal: all else is raised, too
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise _damaged(file, error) from error

    def compute(images: Array) -> Array:
        return session.run(None, {INPUT: images})[0]

    return compute


def _load_openvino(file: Path) -> Compute:
    with from_extra():
        import openvino

    try:
        compiled = openvino.Core().compile_model(str(file), "CPU", PRECISION)
    except Exception as error:  # a RuntimeError with the source file of OpenVINO in it
        raise _damaged(file, error) from error

    def compute(images: Array) -> Array:
        return np.array(compiled([images])[0])  # a copy: OpenVINO reuses the memory of its outputs

    return compute


def _load_program(file: Path) -> Compute:
    try:
        if not is_zipfile(file):  # torch would log a traceback
            raise ValueError("it is no zip file")
        module = torch.export.load(file).module()
    except Exception as error:  # of the zip file, its JSON or its tensors
        raise _damaged(file, error) from error
    return _as_compute(module)


def _load_hub(file: Path) -> Compute:
    model = read_hub_folder(file.parent)
    try:
        model = fold(model)
    except ValueError:  # a network of any image size, or folded already
        model = model.eval()
    return _as_compute(model)


def _as_compute(module: Callable[[Tensor], Tensor]) -> Compute:
    def compute(images: Array) -> Array:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return compute


_LOADERS: dict[str, Callable[[Path], Compute]] = {
    "onnx": _load_onnx,
    "openvino": _load_openvino,
    "torch-export": _load_program,
    HUB: _load_hub,
}
