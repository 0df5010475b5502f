"""The examples run, and say what the package says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpvg import runs
from mpvg.cli.main import main
from mpvg.inference import Predictor
from mpvg.inference.export import export_run

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "run"
    arguments = "train --data digits --model vit_mini_patch2_8 --epochs 2 --batch_size 256 --threads 1 --device cpu"
    assert main([*arguments.split(), "--out", str(path)]) == 0
    return path


def test_the_script_of_onnx_runtime_needs_no_torch_and_agrees(run: Path, tmp_path: Path) -> None:
    """Pillow's and torch's resizing differ in the last digit of a pixel."""
    files = []
    for number, shape in enumerate([(8, 8), (8, 8), (30, 21, 3)]):
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(files[-1])
    export_run(runs.load(run), tmp_path / "export", "onnx", which="best")
    script = EXAMPLES / "onnx_runtime.py"
    assert "torch" not in script.read_text()
    command = [sys.executable, str(script), str(tmp_path / "export"), *files]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    for line, file, prediction in zip(printed, files, Predictor(run).predict(files), strict=True):
        name, share = prediction.classes[0]  # type: ignore[attr-defined]
        said, value = line.removeprefix(f"{file}: ").split(" ")[:2]
        assert abs(float(value) - 100 * share) < 1
        assert said == name
