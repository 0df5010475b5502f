"""Faults of the machine that people met: settings in the environment, memory, lost terminals, killed parents."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn

from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, RunConfig
from mpvg.data.loader import LoadedBatches, count_cores
from mpvg.data.named_sets import _find
from mpvg.data.order import BatchOrder
from mpvg.data.types import Pipeline
from mpvg.runs import ensure_new_run_dir
from mpvg.runs.memory import OutOfMemory
from mpvg.tasks.classification import ClassificationTask
from mpvg.tasks.task import sum_device
from mpvg.training import resume, train
from mpvg.training.accelerator import make_accelerator, prepare_model
from mpvg.training.loop import _check_pairs
from mpvg.training.progress import Reporter
from mpvg.training.state import TrainProgress, _read_progress
from mpvg.training.stopping import SIGNALS, GracefulShutdown, Interrupted
from short_runs import weights

MakeConfig = Callable[..., RunConfig]

# What accelerate 1.15 reads; each would change the steps, ask for a package that is not there, or be refused.
SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "true",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true",
    "ACCELERATE_USE_CPU": "maybe",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_USE_SAGEMAKER": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_DEBUG_MODE": "maybe",
    "ACCELERATE_CPU_AFFINITY": "1",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_GRADIENT_CLIPPING": "0.001",
    "FP8_BACKEND": "TE",
    "FSDP_OFFLOAD_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "MEGATRON_LM_GRADIENT_CLIPPING": "0.001",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


@pytest.fixture
def short(tiny: MakeConfig) -> MakeConfig:
    """One epoch of two steps, in two parts each."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        plain = {"epochs": 1, "batch_size": 24, "accumulate": 2, "ema_decay": None}
        return tiny(name, **(plain | {"network": NetworkConfig(img_size=8)} | changes))

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images of two classes."""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                image = Image.fromarray(np.full((8, 8, 3), 40 * number, dtype=np.uint8))
                image.save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def own_state() -> Iterator[None]:
    """accelerate's state is the process's; the next test makes its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("names", [*([name] for name in SETTINGS), list(SETTINGS)], ids=lambda names: names[-1])
def test_no_setting_of_accelerate_in_the_environment_reaches_a_run(
    names: list[str], short: MakeConfig, own_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        monkeypatch.setenv(name, SETTINGS[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    accelerator = make_accelerator(short(device="cpu"))
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"
    assert accelerator.device == torch.device("cpu")
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert not accelerator.state.debug
    assert str(accelerator.distributed_type) == "DistributedType.NO"
    assert accelerator.state.deepspeed_plugins is None
    assert not set(names) & set(os.environ)  # some are read again at each step
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_a_run_has_the_same_bits_with_settings_of_accelerate_in_the_environment(
    short: MakeConfig, own_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(short("plain"), quiet=True)
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    train(short("set"), quiet=True)
    found = weights(short("set").out)
    for name, weight in weights(short("plain").out).items():
        assert torch.equal(found[name], weight), name


def test_a_compiled_run_takes_its_mode_from_the_config(
    short: MakeConfig, own_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    plugin = make_accelerator(short(compile="default")).state.dynamo_plugin
    found = (plugin.mode, plugin.fullgraph, plugin.dynamic, plugin.use_regional_compilation)
    assert found == ("default", False, None, False)


class Column(nn.Module):
    """A weight with a dimension of size 1, whose gradient comes with other strides than it has."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.movedim(0, -1) * x


@pytest.mark.parametrize("shape", [(5, 1), (1, 4), (1, 7, 1)])
def test_gradients_have_the_strides_of_their_parameters(shape: tuple[int, ...], short: MakeConfig) -> None:
    """Or DistributedDataParallel warns in every run of several processes; the values are the same, to the bit."""
    found = []
    factors = torch.rand(*shape[1:], shape[0])
    for count in (1, 2):
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=count)
        torch.manual_seed(0)
        model = prepare_model(Column(*shape), short(), accelerator)
        model(factors).sum().backward()
        found.append(model.weight)
    alone, together = found
    assert alone.grad.stride() != alone.stride()
    assert together.grad.stride() == together.stride()
    assert torch.equal(together.grad, alone.grad)


def test_two_processes_print_no_warning(start_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    command = "train --data digits --epochs 1 --batch_size 256 --optim.warmup_epochs 0"
    ranks = start_ranks(2, *command.split(), "--threads", "1", "--device", "cpu", "--out", tmp_path / "run")
    for rank in ranks:
        code, said = rank.wait(), rank.said()
        assert code == 0, said
        assert "arning" not in said


# ---- memory


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


LACKS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), "--accumulate than 2"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), "--accumulate"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory"), "--batch_size"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "a smaller --batch_size than 24"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "--accumulate than 2"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "--accumulate than 2"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "--loader.workers"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "--loader.workers"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "/dev/shm"),
    (
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\n"
        ),
        "/dev/shm",
    ),
    (RuntimeError("unable to write to file </torch_1_2_0>: No space left on device (28)"), "/dev/shm"),
    (RuntimeError("can't start new thread"), "ulimit"),
    (RuntimeError("received 0 items of ancdata"), "ulimit"),
    (MemoryError(), "--accumulate than 2"),
    (OSError(12, "Cannot allocate memory"), "--accumulate than 2"),
    (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit"),
]


@pytest.mark.parametrize(("error", "cure"), LACKS, ids=lambda value: str(value)[:40])
def test_memory_that_runs_out_is_one_line_with_the_cure(
    error: Exception, cure: str, short: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its folder is free for the next attempt, as nothing was saved."""
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "losses", raising(error))
        with pytest.raises(OutOfMemory, match=cure) as end:
            train(short(), quiet=True)
    assert "\n" not in str(end.value)
    assert isinstance(end.value, ValueError)
    ensure_new_run_dir(Path(short().out))


@pytest.mark.parametrize("error", LACKS[:1] + LACKS[6:7], ids=["device", "worker"])
def test_memory_that_runs_out_later_leaves_the_checkpoint(
    error: tuple[Exception, str], short: MakeConfig, before_step: Callable[..., None]
) -> None:
    before_step(lambda step, batch: raising(error[0])() if step == 2 else None)
    config = short(save_steps=1)
    with pytest.raises(OutOfMemory, match=f"or continue with `mpvg train --resume {config.out}`"):
        train(config, quiet=True)
    before_step(lambda step, batch: None)
    assert resume(config.out, quiet=True)["accuracy"] >= 0


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("out of memory"),  # nobody says so in these words
        KeyError("x"),
        AssertionError("memory"),
        OSError(28, "No space left on device"),
    ],
    ids=str,
)
def test_other_errors_are_left_as_they_are(
    error: Exception, short: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassificationTask, "losses", raising(error))
    with pytest.raises(type(error)) as end:
        train(short(), quiet=True)
    assert end.value is error


def test_memory_that_the_network_does_not_fit_into_is_one_line(
    short: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpvg.training.loop.prepare_model", raising(LACKS[0][0]))
    with pytest.raises(OutOfMemory, match="CUDA out of memory"):
        train(short(), quiet=True)
    assert not Path(short().out).exists()


# ---- no home, shares, devices and workers


def test_a_data_set_is_not_found_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user without HOME and without an entry in the password file."""

    def unknown(user: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(FileNotFoundError, match=r"data 'cifar10' \(a.bin\) was not found in any of ~/nowhere"):
        _find("cifar10", [(Path("~/nowhere"), ("a.bin",))], "load it")


@pytest.mark.parametrize(("batch_size", "processes", "fits"), [(24, 2, True), (26, 2, False), (12, 4, False)])
def test_an_odd_share_of_a_batch_cannot_be_mixed(
    batch_size: int, processes: int, fits: bool, short: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the folder is made; the parts of `accumulate` may be odd, as mixup comes before them."""
    config = short(batch_size=batch_size, accumulate=5)
    if fits:
        _check_pairs(config, processes)
        return
    with pytest.raises(ValueError, match=rf"batch_size {batch_size} .* multiple of {2 * processes}, or set augment"):
        _check_pairs(config, processes)
    _check_pairs(replace(config, augment=AugmentConfig()), processes)


def test_two_processes_with_odd_shares_are_refused_before_the_folder_is_made(
    short: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_accelerator

    def two(config: RunConfig) -> Any:
        made(config)
        return SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=2)

    monkeypatch.setattr("mpvg.training.loop.make_accelerator", two)
    with pytest.raises(ValueError, match="batch_size 26 gives each of 2 processes 13 images"):
        train(short(batch_size=26), quiet=True)
    assert not Path(short().out).exists()


def test_sums_are_on_the_cpu_where_the_device_has_no_float64() -> None:
    assert sum_device(torch.device("mps")) == torch.device("cpu")
    for name in ("cpu", "cuda:1", "xpu"):
        assert sum_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize("cores", [1, 2, 64])
@pytest.mark.parametrize("asked", [0, 1, 4])
def test_there_are_at_most_as_many_workers_as_cores(
    cores: int, asked: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("mpvg.data.loader.count_cores", lambda: cores)
    order = BatchOrder(size=8, batch_size=4, shuffle=False, seed=0, rank=0, world_size=1)
    pipeline = Pipeline(transform=lambda sample: sample, collate=list)
    loaded = LoadedBatches([], pipeline, order, LoaderConfig(workers=asked), seed=0, device=torch.device("cpu"))
    assert loaded._loader.num_workers == min(asked, cores)


def test_cores_are_those_that_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert count_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert count_cores() == len(before)


# ---- positions of checkpoints


def position(**changes: Any) -> dict[str, Any]:
    return asdict(TrainProgress(epoch=1, step=2, images=48)) | changes


def test_a_position_is_read_with_and_without_the_images_that_could_not_be_read() -> None:
    old = position()
    del old["unreadable"]  # as before they were kept
    assert _read_progress(old) == TrainProgress(epoch=1, step=2, images=48)
    assert _read_progress(position(unreadable=[3, 0])).unreadable == (3, 0)


@pytest.mark.parametrize("wrong", [{"unreadable": [3, -1]}, {"unreadable": "x"}, {"unreadable": ["x"]}, {"step": -1}])
def test_a_position_of_another_kind_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        _read_progress(position(**wrong))


# ---- signals, closed outputs and killed parents


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_hangup_stops_as_sigterm_does(
    number: signal.Signals, short: MakeConfig, before_step: Callable[..., None]
) -> None:
    before_step(lambda step, batch: os.kill(os.getpid(), number) if step == 1 else None)
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(Interrupted, match=rf"^{number.name}: stopped after step 2, which is saved") as end:
        train(short(epochs=2), quiet=True)
    assert end.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    before_step(lambda step, batch: None)
    resume(short().out, quiet=True)
    train(short("whole", epochs=2), quiet=True)
    found = weights(short().out)
    assert all(torch.equal(found[name], value) for name, value in weights(short("whole").out).items())


def test_a_command_under_nohup_goes_on_without_its_terminal(
    short: MakeConfig, before_step: Callable[..., None]
) -> None:
    before_step(lambda step, batch: os.kill(os.getpid(), signal.SIGHUP))
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(short(), quiet=True)["accuracy"] >= 0
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.parametrize("where", ["start", "epoch"])
def test_an_output_that_is_no_longer_read_stops_as_a_signal_does(
    where: str, short: MakeConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    if where == "start":
        os.close(reader)
    else:
        epoch = Reporter.epoch

        def close_and_report(*values: Any) -> None:
            os.close(reader)
            epoch(*values)

        monkeypatch.setattr(Reporter, "epoch", close_and_report)
    with (
        os.fdopen(writer, "w") as output,
        pytest.raises(Interrupted, match="no longer read: stopped after step") as end,
    ):
        monkeypatch.setattr("sys.stdout", output)
        train(short(epochs=3))
    assert end.value.exit_code == 141
    assert "finishing the step and saving" in capfd.readouterr().err
    monkeypatch.undo()
    assert resume(short().out, quiet=True)["accuracy"] >= 0


def test_without_a_terminal_there_is_nothing_to_say_it_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where errors cannot be written either, the request is still recorded."""
    gone: list[int] = []

    def write(descriptor: int, text: bytes) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("mpvg.training.stopping.os.write", write)
    monkeypatch.setattr("mpvg.training.stopping._discard", gone.append)
    with GracefulShutdown(quiet=False) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == signal.SIGHUP
    assert gone == [2]


def test_workers_do_not_outlive_a_parent_that_is_killed(
    start_mpvg: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    command = f"train --data {folder} --model vit_mini_patch4_32 --network.img_size 32 --epochs 1000 --batch_size 4"
    rest = "--loader.workers 1 --optim.warmup_epochs 0 --threads 1 --device cpu"
    child = start_mpvg(*command.split(), *rest.split(), "--out", tmp_path / "run")
    until = time.monotonic() + 60
    members: list[int] = []
    while len(members) < 2 and child.process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
        if (tmp_path / "run/config.yaml").exists():  # before it, git is asked for the commit: a process, but no worker
            members = child.members()
    assert len(members) > 1
    time.sleep(0.5)  # torch has set its handlers
    os.kill(child.process.pid, signal.SIGKILL)
    killed = time.monotonic()
    while child.members() and time.monotonic() < killed + 10:
        time.sleep(0.02)
    assert not child.members()
    assert time.monotonic() - killed < 3
