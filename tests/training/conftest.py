"""A small data set, a run with everything on, what of a run must be reproducible, and processes that can be killed."""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, OptimConfig, RunConfig
from mpvg.data import ImageBatch
from mpvg.tasks.classification import ClassificationTask
from mpvg.training import resume, train
from mpvg.training.progress import Reporter
from short_runs import Death, write_cifar10

TIMINGS = ("seconds", "images_per_second")


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's binary version with 5 x 10 training and 13 test images."""
    return write_cifar10(tmp_path_factory.mktemp("cifar"))


@pytest.fixture
def everything() -> RunConfig:
    """Digits with all that draws random numbers or keeps a state; `out` is to be given."""
    return RunConfig(
        data="digits",
        model="vit_mini_patch2_8",
        epochs=1,
        batch_size=64,
        lr=2e-3,
        recipe="none",
        device="cpu",
        threads=1,
        ema_decay=0.9,
        network=NetworkConfig(drop_path=0.3),
        augment=AugmentConfig(
            crop_padding=1,
            hflip=0.5,
            auto_augment="rand-m9-mstd0.5-inc1",
            erase=0.5,
            mixup=0.8,
            cutmix=1.0,
            smoothing=0.1,
        ),
        optim=OptimConfig(warmup_epochs=0.5, clip_grad=1.0),
    )


@pytest.fixture
def tiny(everything: RunConfig, cifar_root: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """The same on 50 images of 8x8, 4 steps an epoch; arguments: the name of its folder, and what else is changed."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        network, loader = replace(everything.network, img_size=8), LoaderConfig(root=str(cifar_root))
        own = {"data": "cifar10", "batch_size": 12, "epochs": 2, "network": network, "loader": loader}
        return replace(everything, **(own | {"out": str(tmp_path / name)} | changes))

    return make


BeforeStep = Callable[[int, ImageBatch], Any]


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[BeforeStep], None]:
    """Sets what is called before each step, with its number over all epochs, from 1, and with its batch."""
    now = SimpleNamespace(step=0, call=lambda step, batch: None)
    begin, prepare = Reporter.__init__, ClassificationTask.prepare

    def begin_counting(self: Reporter, total: int, done: int = 0, *, quiet: bool = False) -> None:
        now.step = done
        begin(self, total, done, quiet=quiet)

    def call_and_prepare(self: ClassificationTask, batch: ImageBatch) -> ImageBatch:
        now.step += 1
        now.call(now.step, batch)
        return prepare(self, batch)

    def arrange(call: BeforeStep) -> None:
        now.call = call

    monkeypatch.setattr(Reporter, "__init__", begin_counting)
    monkeypatch.setattr(ClassificationTask, "prepare", call_and_prepare)
    return arrange


@pytest.fixture
def train_until(before_step: Callable[[BeforeStep], None]) -> Callable[[RunConfig, int], None]:
    """Trains a new run, or resumes the one that is there, until it dies before the step of a number."""

    def run(config: RunConfig, last: int) -> None:
        def die(step: int, batch: ImageBatch) -> None:
            if step == last:
                raise Death

        before_step(die)
        with pytest.raises(Death):
            resume(config.out, quiet=True) if Path(config.out).exists() else train(config, quiet=True)
        before_step(lambda step, batch: None)

    return run


@pytest.fixture
def set_accuracies(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Sets what the next evaluations find as accuracy."""
    evaluate = ClassificationTask.evaluate

    def arrange(accuracies: list[float]) -> None:
        left = iter(accuracies)

        def score(self: ClassificationTask, *arguments: Any) -> Any:
            found = evaluate(self, *arguments)
            return replace(found, metrics=found.metrics | {"accuracy": next(left)})

        monkeypatch.setattr(ClassificationTask, "evaluate", score)

    return arrange


def read_record(path: str | Path, *, files: bool = True) -> dict[str, Any]:
    """All of a complete run that must be the same in another that did the same, to the last bit.

    `files`: their names, too, which differ where a signal has made a checkpoint more.
    """
    path = Path(path)
    found: dict[str, Any] = {}
    for which in ("last", "best"):
        folder = path / "checkpoints" / which
        found[which] = folder.readlink().name
        found |= {f"{which}/{file.name}": file.read_bytes() for file in folder.glob("*.safetensors")}
    state = json.loads((path / "checkpoints/last/state.json").read_text())
    found["position"] = {k: v for k, v in state.pop("position").items() if k not in TIMINGS}
    found["state"] = state
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
    summary = json.loads((path / "summary.json").read_text())
    found["summary"] = {k: v for k, v in summary.items() if k not in (*TIMINGS, "date", "commit")}
    if files:
        names = (str(file.relative_to(path)) for file in path.rglob("*"))
        found["files"] = sorted(name for name in names if name != ".lock")  # a process that is killed leaves it
    return found


@pytest.fixture(scope="session")
def record() -> Callable[..., dict[str, Any]]:
    return read_record


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def torchrun(processes: int) -> list[str]:
    """The beginning of a command that starts `mpvg` in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launcher, "--master_port", str(free_port()), "-m", "mpvg"]


def rank_variables(count: int) -> list[dict[str, str]]:
    """The variables that torchrun gives each of so many processes on this machine."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def below(process: int) -> list[int]:
    """A process and all that it has started, and they in turn: torchrun gives each a session of its own."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = entry.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                parents[int(entry.parent.name)] = int(parent)
    found = [process]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def kill_below(process: int) -> int:
    """SIGKILL to a process and all below it; returns how many they were."""
    members = below(process)
    for member in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    return len(members)


@pytest.fixture(scope="session")
def processes() -> SimpleNamespace:
    return SimpleNamespace(torchrun=torchrun, below=below, kill_below=kill_below, rank_variables=rank_variables)


@dataclass
class Child:
    """A process, in a group of its own, that runs one `mpvg` command."""

    process: BaseProcess
    log: int
    """Where it prints to: a pipe, because a process whose files may not grow could not print into one."""

    def wait(self) -> int:
        """Waits for its end and returns its exit code."""
        self.process.join(timeout=120)
        assert self.process.exitcode is not None, f"hangs: {self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        """What it has printed since the last call, to both outputs."""
        return os.read(self.log, 2**16).decode()

    def members(self) -> list[int]:
        """The living processes of its group: itself and its loader's workers."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = entry.read_text().rsplit(")", 1)[1].split()[:3]
            except OSError:
                continue
            if int(group) == self.process.pid and state != "Z":
                found.append(int(entry.parent.name))
        return found

    def kill(self) -> int:
        """SIGKILL to the whole group; returns how many processes it had."""
        assert self.process.pid is not None
        members = len(self.members())
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or has no group of its own yet
            self.process.kill()
        self.process.join(timeout=30)
        for _ in range(500):
            if not self.members():
                return members
            time.sleep(0.01)
        raise AssertionError("a process of the group survived SIGKILL")


@pytest.fixture
def start_mpvg(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Starts `mpvg` commands in processes forked from one that has imported torch, which takes seconds, before.

    `at_rename` is a pair: once a file is renamed to the first, no file may grow beyond the second, in bytes.
    """
    context = multiprocessing.get_context("forkserver")
    modules = ["pytest", "mpvg.cli.main", "mpvg.cli.train", "mpvg.training", "torch.utils.data", "sklearn.datasets"]
    context.set_forkserver_preload(modules)
    children: list[Child] = []

    def start(
        *arguments: object, at_rename: tuple[str, int] | None = None, environment: dict[str, str] | None = None
    ) -> Child:
        log = tmp_path / f"log-{len(children)}.txt"
        os.mkfifo(log)
        reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        values: dict[str, Any] = {"ARGUMENTS": [str(a) for a in arguments], "LOG": str(log)}
        values |= {"AT_RENAME": at_rename, "ENVIRONMENT": environment or {}}
        child = context.Process(target=runpy.run_path, args=(str(Path(__file__).with_name("child.py")), values))
        child.start()
        children.append(Child(child, reader))
        return children[-1]

    yield start
    for child in children:
        if child.process.is_alive():
            child.kill()
        os.close(child.log)


@pytest.fixture
def start_ranks(start_mpvg: Callable[..., Child]) -> Callable[..., list[Child]]:
    """Starts one `mpvg` command in several processes that train together, as torchrun would."""

    def start(count: int, *arguments: object) -> list[Child]:
        return [start_mpvg(*arguments, environment=own) for own in rank_variables(count)]

    return start
