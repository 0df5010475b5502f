"""Several processes, started as a user starts them: the same steps as one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

COMMAND = "train --data digits --method mpvg --epochs 2 --batch_size 128 --threads 1 --device cpu --optim.clip_grad 1"


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def run(out: Path, processes: int, *more: str) -> list[dict[str, Any]]:
    """Trains with so many processes; returns the lines of metrics."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--master_port", str(free_port()), "-m", "mpvg"]
    command = [*(launcher if processes > 1 else [sys.executable, "-m", "mpvg"]), *COMMAND.split(), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("one") / "run"
    return out, run(out, 1)


@pytest.mark.parametrize(("processes", "parts"), [(2, 1), (4, 1), (2, 3)])
def test_the_same_batch_makes_the_same_curve_on_any_number_of_processes(
    processes: int, parts: int, alone: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Losses to 1e-5 and weights to 1e-4 after two epochs without random layers; every image scored once."""
    metrics = run(tmp_path / "run", processes, "--accumulate", str(parts))
    for one, other in zip(alone[1], metrics, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert other["nll"] == pytest.approx(one["nll"], rel=1e-5)
        assert other["lr"] == one["lr"]
        assert other["accuracy"] == one["accuracy"]
    weights, expected = (load_file(out / "checkpoints/last/model.safetensors") for out in (tmp_path / "run", alone[0]))
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "run/summary.json").read_text())["parameters"] > 0


def test_a_batch_that_does_not_divide_is_refused_without_a_hang(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="batch_size 127 does not divide among 2 processes"):
        run(tmp_path / "run", 2, "--batch_size", "127")
    assert not (tmp_path / "run").exists()
