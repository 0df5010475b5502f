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
    command = [*TORCHRUN, "--max-restarts", "1", *TRAIN.split(), *DRAWS.split(), "--out", str(out)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def variable(process: int, name: str) -> str:
    """An environment variable of another process."""
    lines = Path(f"/proc/{process}/environ").read_text().split("\0")
    return next((line.partition("=")[2] for line in lines if line.startswith(f"{name}=")), "")


@pytest.fixture(scope="module")
def undisturbed(record: Record, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole") / "run"
    with start(out) as process:
        assert process.wait(120) == 0, process.communicate()[1]
    return record(out)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1], ids=["writer", "reader"])
def test_a_killed_worker_is_started_again_and_nothing_is_lost(
    undisturbed: dict[str, Any], processes: Any, record: Record, tmp_path: Path, rank: int
) -> None:
    """SIGKILL to one worker once a checkpoint exists; torchrun restarts both, and all but the times is the same."""
    out = tmp_path / "run"
    with start(out) as process:
        try:
            while process.poll() is None and not (out / "checkpoints/last").is_symlink():
                time.sleep(0.002)
            workers = [member for member in processes.below(process.pid) if variable(member, "RANK") == str(rank)]
            os.kill(workers[0], signal.SIGKILL)
            said, errors = process.communicate(timeout=120)
        finally:  # where the test fails, they may wait for each other for ever
            if process.poll() is None:
                processes.kill_below(process.pid)
    assert process.returncode == 0, errors
    assert re.search(rf"exitcode: -9\) local_rank: {rank} ", errors), errors
    begun = re.findall(r"^training .*$", said, flags=re.MULTILINE)
    assert len(begun) == 2, said
    step = re.search(r", from step (\d+)$", begun[1])
    assert step is not None, begun
    assert 4 <= int(step[1]) < 22
    found = record(out)
    assert [name for name in found | undisturbed if found.get(name) != undisturbed.get(name)] == []
