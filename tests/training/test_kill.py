"""Runs that are killed from outside, and disks that are full: nothing here is played."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mpvg import runs
from mpvg.cli import main
from mpvg.training import loop

Record = Callable[[str | Path], dict[str, Any]]

WORKERS = 2


@pytest.fixture(scope="session")
def folder_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`train` on a folder of 3 x 12 images, 4 steps an epoch, with workers and augmentation; --out is to be given."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, size in (("train", 12), ("val", 3)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for number in range(size):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    options = {
        "data": root,
        "model": "vit_mini_patch4_32",
        "network.img_size": 32,
        "network.drop_path": 0.2,
        "epochs": 3,
        "batch_size": 8,
        "save_steps": 2,
        "threads": 1,
        "device": "cpu",
        "loader.workers": WORKERS,
        "optim.warmup_epochs": 1,
        "recipe": "folder",  # DeiT's augmentation, and averaged weights
    }
    return ["train", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def onwards(command: list[str], out: Path) -> list[str]:
    """What a user gives after an interruption: the same command, or --resume once there is a run."""
    return ["train", "--resume", str(out)] if (out / "config.yaml").exists() else [*command, "--out", str(out)]


def test_ten_of_ten_killed_runs_end_with_the_same_bits(
    folder_command: list[str], start_mpvg: Callable[..., Any], record: Record, tmp_path: Path
) -> None:
    """SIGKILL to the process group at a random moment, one to three times a run, at any stage from start to summary."""
    whole = tmp_path / "whole"
    assert start_mpvg("--help").wait() == 0  # from now on torch is imported
    begun = time.monotonic()
    child = start_mpvg(*folder_command, "--out", whole)
    assert child.wait() == 0, child.said()
    seconds = time.monotonic() - begun
    expected = record(whole)
    moments = random.Random(0)
    stages, different = [], {}
    for number in range(10):
        out = tmp_path / f"killed-{number}"
        # The first moments are spread evenly over the run, so that each stage is met; the others lie anywhere.
        delays = [seconds * (number + moments.random()) / 10]
        delays += [seconds * moments.random() for _ in range(moments.choice((0, 0, 1, 2)))]
        for delay in delays:
            child = start_mpvg(*onwards(folder_command, out))
            child.process.join(timeout=delay)
            members = child.kill()
            stages.append((members, (out / "checkpoints").exists()))
        child = start_mpvg(*onwards(folder_command, out))
        assert child.wait() == 0, child.said()
        found = record(out)
        different[number] = [name for name in found | expected if found.get(name) != expected.get(name)]
    assert different == {number: [] for number in range(10)}
    assert sum(members > WORKERS for members, _ in stages) >= 5, stages  # killed with its workers running
    assert sum(saved for _, saved in stages) >= 4, stages


def test_a_killed_command_is_resumed_by_another(folder_command: list[str], record: Record, tmp_path: Path) -> None:
    """The installed command, from its start-up on."""
    mpvg, out = [sys.executable, "-m", "mpvg"], tmp_path / "run"
    with subprocess.Popen([*mpvg, *folder_command, "--out", str(out)], start_new_session=True) as process:
        while process.poll() is None and not (out / "checkpoints/last").exists():
            time.sleep(0.01)
        assert process.poll() is None
        subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=True)
    assert not (out / "summary.json").exists()
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}  # torch warns of more workers than cores
    resume = [*mpvg, "train", "--resume", str(out)]
    ended = subprocess.run(resume, env=quiet, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "epoch 3/3" in ended.stdout
    assert main([*folder_command, "--out", str(tmp_path / "whole")]) == 0
    assert record(out) == record(tmp_path / "whole")


# ---- a full disk


def can_mount(folder: Path) -> bool:
    """Whether a small tmpfs can be mounted, as root in a container often can."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def tiny_command(cifar_root: Path) -> list[str]:
    options = "--model vit_mini_patch2_8 --network.img_size 8 --epochs 3 --batch_size 8 --optim.warmup_epochs 1"
    where = ["--data", "cifar10", "--loader.root", str(cifar_root), "--device", "cpu", "--threads", "1"]
    return ["train", *where, *options.split(), "--save_steps", "4"]


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before_it(
    tiny_command: list[str], start_mpvg: Callable[..., Any], record: Record, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE, from the moment at which the first checkpoint becomes the newest."""
    out = tmp_path / "run"
    child = start_mpvg(*tiny_command, "--out", out, at_rename=("last", 500_000))
    assert child.wait() == 2
    said = child.said()
    assert "Traceback" not in said
    message = (
        f"mpvg: error: cannot save step 6 in {out}/checkpoints (File too large); the previous checkpoint (step-0000"
    )
    assert message in said
    assert f"continue with `mpvg train --resume {out}`" in said
    _, state = runs.load_checkpoint(out)
    assert state["position"]["step"] == 4
    assert not list((out / "checkpoints").glob(".*"))
    assert start_mpvg("train", "--resume", out).wait() == 0
    assert start_mpvg(*tiny_command, "--out", tmp_path / "whole").wait() == 0
    assert record(out) == record(tmp_path / "whole")


@pytest.mark.parametrize("limited", ["data.json", "config.yaml"])
def test_a_run_that_cannot_even_be_begun_can_be_begun_later(
    tiny_command: list[str], start_mpvg: Callable[..., Any], tmp_path: Path, limited: str
) -> None:
    out = tmp_path / "run"
    child = start_mpvg(*tiny_command, "--out", out, at_rename=(limited, 0))
    # The file of that name is written by then; it is the next one that cannot be.
    following = {"data.json": out / "environment.json", "config.yaml": out / "metrics.jsonl"}[limited]
    assert child.wait() == 2
    said = child.said()
    assert "Traceback" not in said
    if limited == "data.json":
        assert f"mpvg: error: cannot write {following} (File too large); make room, then give the same command" in said
        assert start_mpvg(*tiny_command, "--out", out).wait() == 0
    else:
        assert f"mpvg: error: cannot save step 4 in {out}/checkpoints (File too large); the previous" in said
        assert start_mpvg("train", "--resume", out).wait() == 0
    assert runs.load(out).summary() is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB, or, where none can be mounted, a folder on the common disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = can_mount(disk)
    yield disk
    if mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before_it(
    tiny_command: list[str],
    small_disk: Path,
    record: Record,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No room at all, room for one checkpoint, and room for all but the last line of the metrics."""
    if not small_disk.is_mount():  # nobody may mount here; RLIMIT_FSIZE is tried above, on any system
        return
    assert main([*tiny_command, "--out", str(tmp_path / "whole")]) == 0
    whole = tmp_path / "whole"
    size = sum(file.stat().st_size for file in (whole / "checkpoints/last").iterdir())
    out = small_disk / "run"
    capsys.readouterr()

    assert main([*tiny_command, "--out", str(out)]) == 2  # 1 MiB: not one checkpoint
    said = capsys.readouterr().err
    assert f"cannot save step 4 in {out}/checkpoints (No space left on device); the previous checkpoint (none)" in said

    resize(small_disk, str(int(1.5 * size)))
    assert main(["train", "--resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"cannot save step 6 in {out}/checkpoints (No space left on device)" in said
    assert "the previous checkpoint (step-00000004) is kept; make room" in said
    assert said.count("\n") == 1
    _, state = runs.load_checkpoint(out)
    assert state["position"]["step"] == 4

    resize(small_disk, str(4 * size))
    fill = small_disk / "fill"
    evaluate = loop.evaluate

    def fill_up(*arguments: Any) -> Any:
        with pytest.raises(OSError, match="No space"), fill.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", fill_up)  # only the moment is chosen; the disk is full indeed
    (out / "metrics.jsonl").unlink(missing_ok=True)
    assert main(["train", "--resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"cannot write {out}/metrics.jsonl (No space left on device); make room, then continue with" in said
    monkeypatch.undo()
    fill.unlink()

    assert main(["train", "--resume", str(out)]) == 0
    assert record(out) == record(whole)
