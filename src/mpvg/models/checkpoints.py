"""Weights from files into networks; nothing a file contains is executed."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


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
