"""A worker that dies is started again by torchrun, and training goes on as if nothing had happened."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Record = Callable[..., dict[str, Any]]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TRAIN = "-m mpvg train --data digits --epochs 2 --batch_size 128 --save_steps 4 --threads 1 --device cpu"
DRAWS = "--network.drop_path 0.2 --augment.mixup 0.8 --ema_decay 0.9 --optim.clip_grad 1 --auto_resume"
# Without it the new workers share the store of the dead ones, and connect to the addresses that those left in it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(out: Path) -> subprocess.Popen[str]:
    command = [*TORCHRUN, "--max-restarts", "2", *TRAIN.split(), *DRAWS.split(), "--out", str(out)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def variable(process: int, name: str) -> str:
    """An environment variable of another process."""
    lines = Path(f"/proc/{process}/environ").read_text().split("\0")
    return next((line.partition("=")[2] for line in lines if line.startswith(f"{name}=")), "")


@pytest.mark.slow
def test_killed_workers_are_started_again_and_nothing_is_lost(
    processes: Any, start_ranks: Callable[..., list[Any]], record: Record, tmp_path: Path
) -> None:
    """SIGKILL to the worker that only reads, then to the one that writes, each once there is another checkpoint.

    torchrun restarts both, and all but the times is the same as in an undisturbed run.
    """
    whole, out = tmp_path / "whole", tmp_path / "run"
    ranks = start_ranks(2, *TRAIN.split()[2:], *DRAWS.split(), "--out", whole)
    assert [rank.wait() for rank in ranks] == [0, 0]
    last = out / "checkpoints/last"
    with start(out) as process:
        try:
            for rank in ("1", "0"):
                before = os.readlink(last) if last.is_symlink() else None
                while process.poll() is None and (not last.is_symlink() or os.readlink(last) == before):
                    time.sleep(0.002)
                workers = [member for member in processes.below(process.pid) if variable(member, "RANK") == rank]
                os.kill(workers[0], signal.SIGKILL)
                while process.poll() is None and workers[0] in processes.below(process.pid):
                    time.sleep(0.002)
            said, errors = process.communicate(timeout=120)
        finally:  # where the test fails, they may wait for each other for ever
            if process.poll() is None:
                processes.kill_below(process.pid)
    assert process.returncode == 0, errors
    for rank in "10":
        assert re.search(rf"exitcode: -9\) local_rank: {rank} ", errors), errors
    begun = re.findall(r"^training .*$", said, flags=re.MULTILINE)
    assert len(begun) == 3, said
    steps = [int(step) for step in re.findall(r", from step (\d+)$", "\n".join(begun), flags=re.MULTILINE)]
    assert len(steps) == 2, begun
    assert 4 <= steps[0] < steps[1] < 22
    found, expected = record(out), record(whole)
    assert [name for name in found | expected if found.get(name) != expected.get(name)] == []
