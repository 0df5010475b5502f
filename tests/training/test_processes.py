"""Several processes, with what torchrun would give them: the same steps as one. torchrun itself is in test_kill.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpvg import runs
from mpvg.cli.main import main
from mpvg.models.importing import import_factory

COMMAND = "train --data digits --method mpvg --epochs 2 --batch_size 256 --threads 1 --device cpu --optim.clip_grad 1"
ROOT = Path(__file__).parents[2]
StartRanks = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    assert main([*COMMAND.split(), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(("processes", "parts"), [(4, 1), (2, 3)])
def test_the_same_batch_makes_the_same_curve_on_any_number_of_processes(
    processes: int, parts: int, alone: Path, start_ranks: StartRanks, tmp_path: Path
) -> None:
    """Losses to 1e-5 and weights to 1e-4 after two epochs without random layers; every image scored once."""
    out = tmp_path / "run"
    ranks = start_ranks(processes, *COMMAND.split(), "--out", out, "--accumulate", parts)
    assert [(rank.wait(), rank.said())[0] for rank in ranks] == [0] * processes
    for one, other in zip(runs.load(alone).metrics(), runs.load(out).metrics(), strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert other["nll"] == pytest.approx(one["nll"], rel=1e-5)
        assert other["lr"] == one["lr"]
        assert other["accuracy"] == one["accuracy"]
    weights, expected = (load_file(path / "checkpoints/last/model.safetensors") for path in (out, alone))
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-4)
    assert json.loads((out / "summary.json").read_text())["parameters"] > 0


def test_the_scores_of_averaged_weights_are_those_of_the_ones_that_are_saved(
    start_ranks: StartRanks, tmp_path: Path
) -> None:
    """Each process follows the BatchNorm statistics of its own batches."""
    conv = "nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)"
    text = (ROOT / "examples/own_network.py").read_text()
    assert conv in text
    (tmp_path / "normed.py").write_text(text.replace(conv, f"nn.Sequential({conv}, nn.BatchNorm2d(dim, momentum=0.9))"))
    options = ["--model", f"{tmp_path}/normed.py:small_vit", "--ema_decay", "0.5", "--epochs", "1"]
    out = tmp_path / "run"
    ranks = start_ranks(2, *COMMAND.split(), *options, "--out", out)
    assert [(rank.wait(), rank.said())[0] for rank in ranks] == [0, 0]
    run = runs.load(out, model=import_factory(f"{tmp_path}/normed.py:small_vit"))
    (line,) = run.metrics()
    for prefix, ema in (("", False), ("ema_", True)):
        found = run.task().evaluate(run.model("last", ema=ema), run.validation(torch.device("cpu")))
        assert line[f"{prefix}nll"] == pytest.approx(found.metrics["nll"], rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused_without_a_hang(start_ranks: StartRanks, tmp_path: Path) -> None:
    ranks = start_ranks(2, *COMMAND.split(), "--out", tmp_path / "run", "--batch_size", "127")
    for rank in ranks:
        assert rank.wait() == 2
        assert "batch_size 127 is not divisible by the number of processes, 2; it counts" in rank.said()
    assert not (tmp_path / "run").exists()
