"""8-bit weights for ONNX Runtime: what is quantized, and what the processor has for it."""

import logging
from pathlib import Path

_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx512vnni", "i8mm", "asimddp")
"""Names in /proc/cpuinfo of instructions that multiply 8-bit numbers into 32-bit sums."""


def int8_instruction(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's instruction for products of 8-bit numbers; None: it has none, or that is not known."""
    try:
        flags = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return None
    return next((name for name in _INSTRUCTIONS if name in flags), None)


def quantize(file: Path) -> None:
    """Replaces an ONNX file by one with 8-bit weights, per channel, and activations that are quantized as they come.

    MatMul and Gemm are quantized where a matrix of weights is a factor; convolutions, the products inside the attention
    and those that resample the position embedding stay.
    Without an instruction for them, products of 8-bit numbers are summed in 16 bits and may saturate: then the weights
    have 7 bits.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(file, load_external_data=False).graph
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    others = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in matrices]
    whole = file.with_suffix(".float.onnx")
    file.rename(whole)
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises a step for static quantization
    try:
        quantize_dynamic(
            whole,
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=others,
            per_channel=True,
            reduce_range=int8_instruction() is None,
            weight_type=QuantType.QInt8,
        )
    finally:
        logger.setLevel(level)
    whole.unlink()
