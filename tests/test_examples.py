"""The examples run, and say what the package says."""

import json
import os
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
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "16.png")
    (tmp_path / "none.png").write_text("no image")
    for file, said in (
        ("16.png", "has more than 8 bits; this script reads 8-bit images only"),
        ("none.png", "cannot be read"),
    ):
        done = subprocess.run([*command[:3], str(tmp_path / file)], check=False, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"{tmp_path / file} {said}" in done.stderr


def test_the_gradio_app_says_what_the_predictor_says(run: Path, tmp_path: Path) -> None:
    """Asked over HTTP by Gradio's client, in a process of its own: Gradio leaves event loops open."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 21, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    script = f"""
import json, sys, warnings
sys.path.insert(0, {str(EXAMPLES)!r})
import gradio_app
from gradio_client import Client, handle_file
page = gradio_app.build({str(run)!r})
_, address, shared = page.launch(prevent_thread_lock=True, quiet=True, **gradio_app.LOCAL)
client = Client(address, verbose=False, analytics_enabled=False)
found = client.predict(handle_file({str(tmp_path / "a.png")!r}), api_name="/label")
try:
    client.predict(handle_file({str(tmp_path / "b.png")!r}), api_name="/label")
    refused = None
except Exception as error:
    refused = str(error)
page.close(verbose=False)
print(json.dumps([address, shared, found, refused]))
"""
    environment = os.environ | {"TMPDIR": str(tmp_path), "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    address, shared, found, refused = json.loads(done.stdout.splitlines()[-1])
    assert address.startswith("http://127.0.0.1:")
    assert shared is None
    (prediction,) = Predictor(run).predict(tmp_path / "a.png")
    said = {one["label"]: one["confidence"] for one in found["confidences"]}
    assert said == pytest.approx(dict(prediction.classes), abs=1e-6)  # type: ignore[attr-defined]
    assert "cannot be read" in refused
    assert len((EXAMPLES / "gradio_app.py").read_text().splitlines()) < 50


@pytest.mark.parametrize("name", ["first_run", "compare_methods", "fine_tune_timm", "onnx_runtime", "gradio_app"])
def test_an_example_without_arguments_says_what_it_needs(name: str) -> None:
    ended = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"python {name}.py " in ended.stderr
    assert "Traceback" not in ended.stderr
