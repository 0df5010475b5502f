"""Dense tasks in two processes: killed, and resumed to the same bits."""

import json
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from children import start_on_small_canvas
from mpvg.recipes import recipe

SIZES = {
    "canvas_segmentation": {"short_side": 64, "crop": 64},
    "canvas_detection": {"short_sides": [64], "long_side": 64, "max_side": 64, "test_side": 64},
}
WARMUP = {"canvas_segmentation": "--optim.warmup_steps", "canvas_detection": "--optim.warmup_epochs"}


def begin(variables: list[dict[str, str]], arguments: list[str], cache: Path, validation: int = 5) -> list[BaseProcess]:
    """Processes that train together."""
    threads = {"OMP_NUM_THREADS": "1"}  # as torchrun
    return [start_on_small_canvas(arguments, cache, 12, own | threads, validation) for own in variables]


def finish(ranks: list[BaseProcess]) -> list[int | None]:
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def command(name: str) -> list[str]:
    options = json.dumps(recipe(name).task_options | SIZES[name])
    words = ["train", "--recipe", name, "--task_options", options, "--epochs", "2", "--batch_size", "4"]
    return [*words, WARMUP[name], "1", *"--network.drop_path 0.2 --threads 1 --device cpu".split()]


def test_a_process_without_a_validation_image_waits_for_nobody(processes: Any, tmp_path: Path) -> None:
    """Of one image, the second of two processes has none."""
    words = [*command("canvas_segmentation"), "--epochs", "1", "--out", str(tmp_path / "run")]
    ranks = begin(processes.rank_variables(2), words, tmp_path / "cache", validation=1)
    try:
        assert finish(ranks) == [0, 0]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_dense_run_is_killed_and_resumed_to_the_same_bits(
    name: str, processes: Any, record: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """SIGKILL to both processes, twice, each time once there is another checkpoint."""
    words = [*command(name), "--save_steps", "1"]
    whole, out, cache = tmp_path / "whole", tmp_path / "run", tmp_path / "cache"
    assert finish(begin(processes.rank_variables(2), [*words, "--out", str(whole)], cache)) == [0, 0]
    for step in (1, 4):
        start = ["train", "--resume", str(out)] if out.exists() else [*words, "--out", str(out)]
        ranks, deadline = begin(processes.rank_variables(2), start, cache), time.monotonic() + 120
        while not any(int(path.name[5:]) >= step for path in (out / "checkpoints").glob("step-*")):
            assert all(process.is_alive() for process in ranks), "one ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        for process in ranks:
            process.kill()
        assert finish(ranks) == [-signal.SIGKILL] * 2
    assert finish(begin(processes.rank_variables(2), ["train", "--resume", str(out)], cache)) == [0, 0]
    assert record(out, files=False) == record(whole, files=False)
