"""Runs that are killed from outside, and disks that are full: nothing here is played."""

import contextlib
import os
import re
import shutil
import signal
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
from mpvg.cli.main import main
from mpvg.data import ImageBatch
from mpvg.data.loader import count_cores
from mpvg.runs.checkpoints import read_checkpoint
from mpvg.tasks.classification import ClassificationTask

Record = Callable[..., dict[str, Any]]

WORKERS = min(2, count_cores())
"""As many as a loader starts on this machine."""


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
        "epochs": 2,
        "batch_size": 8,
        "save_steps": 2,
        "threads": 1,
        "device": "cpu",
        "loader.workers": WORKERS,
        "optim.warmup_epochs": 1,
        "recipe": "folder",  # DeiT's augmentation, and averaged weights
    }
    return ["train", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def folder_run(folder_command: list[str], record: Record, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command leaves when nothing happens."""
    out = tmp_path_factory.mktemp("folder-run") / "run"
    assert main([*folder_command, "--out", str(out)]) == 0
    return record(out)


def without_files(found: dict[str, Any]) -> dict[str, Any]:
    """A signal makes a checkpoint more, so that others are kept."""
    return {name: value for name, value in found.items() if name != "files"}


def onwards(command: list[str], out: Path) -> list[str]:
    """What a user gives after an interruption: the same command, or --resume once there is a run."""
    return ["train", "--resume", str(out)] if (out / "config.yaml").exists() else [*command, "--out", str(out)]


def newest(out: Path) -> str:
    link = out / "checkpoints/last"
    return os.readlink(link) if link.is_symlink() else ""


def lines(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


STAGES: dict[str, Callable[[Any, Path], object]] = {
    "start": lambda child, out: child is not None,
    "folder": lambda child, out: out.exists(),
    "config": lambda child, out: (out / "config.yaml").exists(),
    "workers": lambda child, out: child is not None and len(child.members()) > WORKERS,
    "writing": lambda child, out: (out / "checkpoints/.writing/model.safetensors").exists(),
    "checkpoint": lambda child, out: newest(out),
    "line": lambda child, out: lines(out),
    "summary": lambda child, out: (out / "summary.json").exists(),
}
"""What can be seen of a run: a stage is reached when it is there, or is another than before the command."""
KILLS = (
    ("start", "folder"),
    ("workers", "workers"),
    ("writing",),
    ("checkpoint", "checkpoint"),
    ("checkpoint", "writing", "line"),
    ("workers", "line", "summary"),
)
"""For each run the stages at which its commands are killed, one after the other."""


def kill_at(stage: str, start: Callable[..., Any], command: list[str], out: Path) -> int:
    """Kills a command and its group at a stage, or finds it complete; returns how many processes it had."""
    see = STAGES[stage]
    before = see(None, out)
    child = start(*command)
    while child.process.is_alive() and (not (now := see(child, out)) or now == before):
        time.sleep(0.004)
    members: int = child.kill()
    return members


def test_killed_runs_end_with_the_same_bits(
    folder_command: list[str],
    start_mpvg: Callable[..., Any],
    record: Record,
    folder_run: dict[str, Any],
    tmp_path: Path,
) -> None:
    """SIGKILL to the process group, one to three times a run, at any stage from start to summary."""
    stages, different = [], {}
    for number, kills in enumerate(KILLS):
        out = tmp_path / f"killed-{number}"
        for stage in kills:
            members = kill_at(stage, start_mpvg, onwards(folder_command, out), out)
            stages.append((stage, members, bool(newest(out))))
        child = start_mpvg(*onwards(folder_command, out))
        assert child.wait() == 0, child.said()
        found = record(out)
        different[number] = [name for name in found | folder_run if found.get(name) != folder_run.get(name)]
    assert different == {number: [] for number in range(len(KILLS))}
    assert sum(members > WORKERS for _, members, _ in stages) >= 4, stages  # killed with its workers running
    assert sum(saved for _, _, saved in stages) >= 3, stages
    assert sum(not saved for _, _, saved in stages) >= 3, stages


def test_a_killed_command_is_resumed_by_another(
    folder_command: list[str],
    record: Record,
    folder_run: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The installed command, from its start-up on."""
    mpvg, out = [sys.executable, "-m", "mpvg"], tmp_path / "run"
    with subprocess.Popen([*mpvg, *folder_command, "--out", str(out)], start_new_session=True) as process:
        while process.poll() is None and not (out / "checkpoints/last").exists():
            time.sleep(0.01)
        assert process.poll() is None
        subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=True)
    assert not (out / "summary.json").exists()
    capfd.readouterr()
    assert main(["train", "--resume", str(out)]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "epoch 2/2" in said.out
    assert record(out) == folder_run


# ---- signals


@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_signal_to_the_process_or_to_all_of_its_group_saves_the_step(
    folder_command: list[str],
    start_mpvg: Callable[..., Any],
    record: Record,
    folder_run: dict[str, Any],
    tmp_path: Path,
    number: signal.Signals,
    group: bool,
) -> None:
    """A scheduler, `timeout` and a terminal send it to all, the loader's workers too, which must not die of it."""
    out = tmp_path / "run"
    child = start_mpvg(*folder_command, "--out", out)
    while child.process.is_alive() and not (out / "checkpoints/last").exists():
        time.sleep(0.002)
    members = child.members()
    for member in members if group else [child.process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, number)
    assert child.wait() == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert len(members) > WORKERS
    said = child.said()
    step = read_checkpoint(out).state["position"]["step"]
    what = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert f"{what}: stopped after step {step}, which is saved; continue with `mpvg train --resume {out}`" in said
    assert "Traceback" not in said
    assert not child.members()  # no worker is left
    assert start_mpvg("train", "--resume", out).wait() == 0
    assert record(out, files=False) == without_files(folder_run)


def test_workers_that_an_error_left_behind_do_not_hold_up_the_end(folder_command: list[str], tmp_path: Path) -> None:
    """They are deaf to the SIGTERM with which multiprocessing would end them."""
    code = (
        "import sys\nfrom mpvg.cli.main import main\nfrom mpvg.tasks.classification import ClassificationTask\n"
        "def end(*a): raise RuntimeError('out of memory')\n"
        "ClassificationTask.losses = end\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *folder_command, "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "RuntimeError: out of memory" in ended.stderr


# ---- data that go away


@pytest.mark.parametrize(
    ("fault", "skip"), [("corrupt", False), ("removed", False), ("removed", True)], ids=["corrupt", "gone", "all gone"]
)
def test_data_that_go_away_late_leave_the_checkpoint_before(
    folder_command: list[str],
    record: Record,
    folder_run: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before_step: Callable[[Callable[[int, ImageBatch], Any]], None],
    fault: str,
    skip: bool,
) -> None:
    root, out = Path(folder_command[folder_command.index("--data") + 1]), tmp_path / "run"
    images, away = root / "train", tmp_path / "away"

    def break_it(step: int, batch: ImageBatch) -> None:
        if step == 7 and not away.exists():
            shutil.copytree(images, away)
            for file in images.rglob("*.png"):
                file.write_bytes(b"no image") if fault == "corrupt" else file.unlink()

    options = ["--loader.workers", "0", "--loader.skip_corrupt", str(skip).lower(), "--out", str(out)]
    try:
        before_step(break_it)
        assert main([*folder_command, *options]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"mpvg: error: image {images}/")
        assert "cannot be read (" in said
        assert said.count("\n") == 1
        assert read_checkpoint(out).state["position"]["step"] == 6
    finally:
        shutil.copytree(away, images, dirs_exist_ok=True)
    assert main(["train", "--resume", str(out)]) == 0
    assert record(out, files=False) == without_files(folder_run)


# ---- two processes


@contextlib.contextmanager
def start_two(processes: Any, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = [*processes.torchrun(2), *arguments]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(begun, env=environment, **pipes) as process:
        try:
            yield process
        finally:  # where the test fails, they may wait for each other for ever
            if process.poll() is None:
                processes.kill_below(process.pid)


def wait_for_another(out: Path, process: subprocess.Popen[str]) -> None:
    before = newest(out)
    while process.poll() is None and newest(out) == before:
        time.sleep(0.002)


def test_two_processes_are_stopped_killed_and_resumed_to_the_same_bits(
    processes: Any, start_ranks: Callable[..., list[Any]], record: Record, tmp_path: Path
) -> None:
    """SIGTERM to one of them stops both; then SIGKILL to all; and one process alone gives the same curve."""
    options = "--data digits --epochs 2 --batch_size 128 --save_steps 5 --threads 1 --device cpu"
    options += " --network.drop_path 0 --augment.mixup 0 --augment.cutmix 0"
    command = ["train", *options.split()]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert [rank.wait() for rank in start_ranks(2, *command, "--out", whole)] == [0, 0]
    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    lines = [runs.load(path).metrics() for path in (whole, tmp_path / "alone")]
    for two, one in zip(*lines, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-6)
        assert two["nll"] == pytest.approx(one["nll"], abs=1e-6)

    with start_two(processes, *command, "--out", str(out)) as process:
        wait_for_another(out, process)
        second = [
            pid for pid in processes.below(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
        ]
        os.kill(second[0], signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert re.search(r"exitcode +: 143", said), said
    step = read_checkpoint(out).state["position"]["step"]
    assert f"SIGTERM: stopped after step {step}, which is saved" in said
    assert 5 <= step < 22

    before = newest(out)
    ranks = start_ranks(2, "train", "--resume", out)
    while ranks[0].process.is_alive() and newest(out) == before:
        time.sleep(0.002)
    assert [len(rank.members()) for rank in ranks] == [1, 1]
    for rank in ranks:
        rank.kill()
    assert not (out / "summary.json").exists()
    assert newest(out) > f"step-{step:08d}"
    assert [rank.wait() for rank in start_ranks(2, "train", "--resume", out)] == [0, 0]
    assert record(out, files=False) == record(whole, files=False)


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
    assert read_checkpoint(out).state["position"]["step"] == 4
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
    following = {"data.json": out / "listing-train.txt.gz", "config.yaml": out / "metrics.jsonl"}[limited]
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
    assert read_checkpoint(out).state["position"]["step"] == 4

    resize(small_disk, str(5 * size))  # two, the best, and the one that is being written
    fill = small_disk / "fill"
    evaluate = ClassificationTask.evaluate

    def fill_up(*arguments: Any) -> Any:
        with pytest.raises(OSError, match="No space"), fill.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        return evaluate(*arguments)

    monkeypatch.setattr(ClassificationTask, "evaluate", fill_up)  # only the moment is chosen; the disk is full indeed
    (out / "metrics.jsonl").unlink(missing_ok=True)
    assert main(["train", "--resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"cannot write {out}/metrics.jsonl (No space left on device); make room, then continue with" in said
    monkeypatch.undo()
    fill.unlink()

    assert main(["train", "--resume", str(out)]) == 0
    assert record(out) == record(whole)
