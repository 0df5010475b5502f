"""What tests that train share: how a run dies, the weights that it leaves, and small images to train on."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


class Death(BaseException):
    """What ends a run; no part of the package can take it for an error of its own."""


def weight_files(run: Path) -> dict[str, bytes]:
    """Name -> content of each file of weights in the last checkpoint of a run."""
    return {file.name: file.read_bytes() for file in (run / "checkpoints/last").glob("*.safetensors")}


def weights(run: str | Path, name: str = "model", which: str = "last") -> dict[str, torch.Tensor]:
    """The tensors of one of them."""
    return load_file(Path(run) / f"checkpoints/{which}/{name}.safetensors")


def write_cifar10(folder: Path, batch: int = 10, test: int = 13) -> Path:
    """CIFAR-10's binary version with five times `batch` training images, of noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in [*((f"data_batch_{n}", batch) for n in range(1, 6)), ("test_batch", test)]:
        records = rng.integers(0, 256, (size, 1 + 3072), dtype=np.uint8)
        records[:, 0] = rng.integers(0, 10, size)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (folder / "batches.meta.txt").write_text(names.replace(" ", "\n") + "\n\n")
    return folder
