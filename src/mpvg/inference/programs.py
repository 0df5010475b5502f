"""Writers of exported networks: torch.export, ONNX, OpenVINO, and 8-bit ONNX."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mpvg.inference.quantization import quantize
from mpvg.models.convert import network_name
from mpvg.validation import shorten

INPUT, OUTPUT = "images", "logits"
"""Names of an exported network's input and output."""
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}
"""OpenVINO's option without which it computes in bfloat16 where the processor has it."""
FILES = {"onnx": "model.onnx", "torch-export": "model.pt2", "openvino": "model.xml"}
"""The file of each kind; OpenVINO's weights are beside it, in model.bin."""


def need_packages(kind: str) -> None:
    """Refuses a kind whose packages are not installed.

    Raises:
        ValueError: naming what is missing and the command that installs it.
    """
    with from_extra():
        if kind in ("onnx", "openvino"):
            import onnx as onnx
            import onnxscript as onnxscript
        if kind == "onnx":
            import onnxruntime as onnxruntime
        if kind == "openvino":
            import openvino as openvino


@contextmanager
def from_extra(extra: str = "export") -> Iterator[None]:
    """Around imports of optional packages: what is not installed becomes a ValueError with the command for it."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; it comes with: pip install 'mpvg[{extra}]'") from error


def trace(network: nn.Module, example: Tensor, patch: tuple[int, int] | None = None) -> ExportedProgram:
    """The network's graph, for any number of images.

    Args:
        network: in evaluation mode.
        example: images `(B, C, H, W)` with B >= 2; torch.export keeps them in the program, so no real ones.
        patch: rows and columns of pixels in a patch, where the size of images is free, too; None: it is not.

    Raises:
        ValueError: its code cannot become a graph.
    """
    shape: dict[int, Any] = {0: Dim("batch", min=1)}
    if patch is not None:  # torch.export takes a size of 1 for a constant, hence the 2
        shape |= {2: patch[0] * Dim("rows", min=2), 3: patch[1] * Dim("columns", min=2)}
    try:
        with torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=(shape,))
    except MemoryError:
        raise
    except Exception as error:  # of code that runs, and that no graph can hold; torch's have no common class
        raise ValueError(
            f"torch.export makes no graph of {network_name(network)}: {shorten(' '.join(str(error).split()))}; write "
            "the forward pass for any number of images (x.shape[0], where len(x) is a constant), without `if` on values"
        ) from error
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def write(program: ExportedProgram, kind: str, folder: Path, *, int8: bool = False) -> None:
    """Writes a graph as one of `FILES`."""
    file = folder / FILES[kind]
    if kind == "torch-export":
        torch.export.save(program, file)
    elif kind == "openvino":
        _write_openvino(program, file)
    else:
        _write_onnx(program, file)
        if int8:
            quantize(file)


def to_onnx(program: ExportedProgram) -> Any:
    """The graph as an ONNX ModelProto with named sizes and without paths of this machine."""
    with _quiet():
        exported: Any = torch.onnx.export(
            program, (), None, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
    proto = exported.model_proto
    names = _size_names(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = names.get(size.dim_param, size.dim_param)
    del proto.graph.value_info[:]  # it has the sizes under torch's names; each runtime finds the shapes itself
    for part in (proto, proto.graph, *proto.graph.node, *proto.functions):
        del part.metadata_props[:]
    for node in proto.graph.node:
        node.doc_string = ""
    return proto


def _size_names(proto: Any) -> dict[str, str]:
    """torch's names of the free sizes of the input -> ours."""
    sizes = proto.graph.input[0].type.tensor_type.shape.dim
    return {
        size.dim_param: name
        for size, name in zip(sizes, ("batch", "channels", "height", "width"), strict=True)
        if size.dim_param
    }


def _write_onnx(program: ExportedProgram, file: Path) -> None:
    file.write_bytes(to_onnx(program).SerializeToString())


def _write_openvino(program: ExportedProgram, file: Path) -> None:
    """By way of ONNX, so that there is one translation of torch's operations."""
    with from_extra():
        import openvino

    onnx = file.with_suffix(".onnx")
    _write_onnx(program, onnx)
    model = openvino.Core().read_model(onnx)
    openvino.save_model(model, file, compress_to_fp16=False)  # by default it rounds the weights to 16 bits
    onnx.unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the exporter says to those who work on it."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
