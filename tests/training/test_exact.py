"""The same run twice, a run interrupted anywhere, a run whose loss is no number: what is left in the folder."""

import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mpvg import runs
from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, OptimConfig, RunConfig
from mpvg.data import ImageBatch
from mpvg.runs.checkpoints import CorruptCheckpointError
from mpvg.seeding import seed_everything
from mpvg.tasks.classification import ClassificationTask
from mpvg.training import Interrupted, NonFiniteLoss, resume, stopping, train
from mpvg.training.accelerator import bf16_refusal
from short_runs import Death

MakeConfig = Callable[..., RunConfig]
Record = Callable[..., dict[str, Any]]
BeforeStep = Callable[[Callable[[int, ImageBatch], Any]], None]
TrainUntil = Callable[[RunConfig, int], None]


def assert_same(actual: dict[str, Any], expected: dict[str, Any], where: str = "") -> None:
    """Names what differs, instead of showing megabytes of weights."""
    assert [name for name in actual | expected if actual.get(name) != expected.get(name)] == [], where


# ---- the same command


def test_the_same_config_twice_gives_the_same_bits_and_another_seed_others(tiny: MakeConfig, record: Record) -> None:
    summaries = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(7), np.random.rand(3)  # what was drawn before must not matter
        summaries[name] = train(tiny(name, epochs=1, seed=seed), quiet=True)
    a, b, c = (record(tiny(name).out) for name in "abc")
    assert_same(b, a)
    assert "last/ema.safetensors" in a
    for file in ("model", "ema", "optimizer"):
        assert a[f"last/{file}.safetensors"] != c[f"last/{file}.safetensors"]
    assert summaries["a"]["nll"] != summaries["c"]["nll"]


def test_each_setting_reaches_the_training(tiny: MakeConfig, record: Record) -> None:
    changes: list[tuple[str, dict[str, Any]]] = [
        ("network", {"drop_path": 0.0}),
        ("network", {"pos_std": 1.0}),
        ("augment", {"crop_padding": 0}),
        ("augment", {"hflip": 0.0}),
        ("augment", {"auto_augment": None}),
        ("augment", {"erase": 0.0}),
        ("augment", {"mixup": 0.0}),
        ("augment", {"cutmix": 0.0}),
        ("augment", {"mix_prob": 0.0}),
        ("augment", {"mix_switch": 1.0}),
        ("augment", {"smoothing": 0.0}),
        ("optim", {"clip_grad": None}),
        ("optim", {"warmup_epochs": 0.0}),
        ("optim", {"weight_decay": 0.0}),
        ("optim", {"betas": (0.8, 0.999)}),
        ("optim", {"eps": 1e-3}),
        ("optim", {"layer_decay": 0.5}),
        ("optim", {"warmup_lr": 1e-4}),
        ("optim", {"min_lr": 1e-3}),
    ]
    base = tiny("base", epochs=1, batch_size=24, ema_decay=None)
    train(base, quiet=True)
    weights = record(base.out)["last/model.safetensors"]
    for number, (part, change) in enumerate(changes):
        config = replace(base, out=f"{base.out}-{number}", **{part: replace(getattr(base, part), **change)})
        train(config, quiet=True)
        assert record(config.out)["last/model.safetensors"] != weights, (part, change)


def test_the_average_follows_the_weights_with_the_decay_that_was_asked_for(tiny: MakeConfig) -> None:
    config = tiny(epochs=1, batch_size=50, ema_decay=0.75)  # one step
    train(config, quiet=True)
    run = runs.load(config.out)
    seed_everything(config.seed)
    start = run.task().build_model(init=False).state_dict()
    weights, average = run.model().state_dict(), run.model(ema=True).state_dict()
    assert any(not torch.equal(start[name], weights[name]) for name in start)
    for name in start:
        torch.testing.assert_close(average[name], 0.75 * start[name] + 0.25 * weights[name], rtol=1e-6, atol=1e-7)


# ---- interrupted and resumed


def test_a_stopped_run_ends_as_if_it_had_not_been(tiny: MakeConfig, record: Record, train_until: TrainUntil) -> None:
    """Before the first checkpoint, beside one, behind one, at an epoch's end, in the last step, again and again."""
    whole = tiny("whole", save_steps=3)
    train(whole, quiet=True)
    expected = record(whole.out)
    for stops in [(1,), (3,), (4,), (5,), (6,), (8,), (2, 2, 6), tuple(range(2, 9))]:
        stopped = tiny(f"stopped-{stops}", save_steps=3)
        for stop in stops:
            train_until(stopped, stop)
            assert not (Path(stopped.out) / "summary.json").exists()
        resume(stopped.out, quiet=True)
        assert_same(record(stopped.out), expected, f"stopped at {stops}")


def test_a_resumed_run_does_not_repeat_what_was_saved(
    tiny: MakeConfig, train_until: TrainUntil, before_step: BeforeStep
) -> None:
    config = tiny(save_steps=3)
    train_until(config, 6)
    done: list[int] = []
    before_step(lambda step, batch: done.append(step))
    resume(config.out, quiet=True)
    assert done == [5, 6, 7, 8]  # it died before step 6, and 4 were saved


@pytest.fixture
def stop_at_file() -> Iterator[Callable[[Path, int], list[str]]]:
    """Raises before the n-th operation, from 0, that changes a file below a folder; returns those so far."""
    operations = ("os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir")
    now: dict[str, Any] = {"seen": []}

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if "folder" not in now or event not in (*operations, "open"):
            return
        if event == "open" and (not isinstance(values[2], int) or not values[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        inside = str(values[1] if event == "os.symlink" else values[0]).startswith(now["folder"])
        if not inside and not (event in ("os.remove", "os.rmdir") and values[1] != -1):  # rmtree's names are relative
            return
        now["seen"].append(f"{event} {values[0]}")
        if len(now["seen"]) == now["number"] + 1:
            del now["folder"]
            raise Death

    sys.addaudithook(hook)  # for the life of the process, so it must know when it is not wanted

    def arrange(folder: Path, number: int) -> list[str]:
        now.update(folder=str(folder), number=number, seen=[])
        return now["seen"]

    yield arrange
    now.pop("folder", None)


def test_a_run_that_dies_at_any_file_operation_is_continued_to_the_same_bits(
    tiny: MakeConfig, record: Record, stop_at_file: Callable[[Path, int], list[str]]
) -> None:
    """In the folder's making, in two checkpoints, one of which removes another, in the metrics and the summary."""
    sizes = {"epochs": 1, "batch_size": 16, "save_steps": 1, "augment": AugmentConfig(), "ema_decay": None}
    whole = tiny("whole", **sizes)
    seen = stop_at_file(Path(whole.out), 10**6)
    train(whole, quiet=True)
    operations = list(seen)
    expected = record(whole.out)
    assert len(operations) > 30
    assert {operation.split()[0] for operation in operations} == {
        "open",
        "os.mkdir",
        "os.rename",
        "os.symlink",
        "os.remove",
        "os.rmdir",
    }
    ends = [number for number, operation in enumerate(operations) if "/.last." in operation]
    ends = [number for number in ends if operations[number].startswith("os.rename")]
    assert len(ends) == 3
    for number, operation in enumerate(operations):
        if ends[0] < number <= ends[1]:  # the second checkpoint is made as the third
            continue
        config = tiny(f"died-{number}", **sizes)
        stop_at_file(Path(config.out), number)
        with pytest.raises(Death):
            train(config, quiet=True)
        stop_at_file(Path(config.out), 10**6)
        if (Path(config.out) / "config.yaml").exists():
            resume(config.out, quiet=True)
        else:
            train(config, quiet=True)  # what a user does: the same command again
        assert_same(record(config.out), expected, operation)


# ---- a checkpoint that is damaged


def flip(folder: Path) -> None:
    with (folder / "optimizer.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 4]))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit": flip,
    "half": lambda folder: os.truncate(folder / "model.safetensors", 50_000),
    "empty": lambda folder: (folder / "ema.safetensors").write_bytes(b""),
    "missing file": lambda folder: (folder / "model.safetensors").unlink(),
    "bad JSON": lambda folder: (folder / "state.json").write_bytes(b"\0" * 100),
    "bad hashes": lambda folder: (folder / "checksums.json").write_text("{"),
    "no hashes": lambda folder: (folder / "checksums.json").unlink(),
    "missing": shutil.rmtree,
}


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are that several tests copy; each is trained when it is first needed."""
    return tmp_path_factory.mktemp("trained-once")


@pytest.fixture
def whole(tiny: MakeConfig, record: Record, trained_once: Path) -> dict[str, Any]:
    """A run that nothing happened to, with a checkpoint at every step."""
    config = tiny(out=str(trained_once / "whole"), save_steps=1)
    if not Path(config.out).exists():
        train(config, quiet=True)
    return record(config.out)


@pytest.fixture
def copy_of_stopped(tiny: MakeConfig, train_until: TrainUntil, trained_once: Path) -> Callable[[int], Path]:
    """Copies a run that died before the step of a number."""

    def copy(stop: int) -> Path:
        config = tiny(out=str(trained_once / f"stopped-{stop}"), save_steps=1)
        if not Path(config.out).exists():
            train_until(config, stop)
        return Path(shutil.copytree(config.out, tiny().out, symlinks=True))

    return copy


@pytest.mark.parametrize(
    ("damage", "stop", "damaged", "taken"),
    [
        *((damage, 5, ["step-00000004"], 3) for damage in DAMAGE),  # the newest is the best one, too
        ("a bit", 6, ["step-00000005"], 4),
        *((damage, 7, ["step-00000006", "step-00000005"], 4) for damage in ("a bit", "missing")),  # the best is left
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    record: Record,
    copy_of_stopped: Callable[[int], Path],
    whole: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
    before_step: BeforeStep,
    damage: str,
    stop: int,
    damaged: list[str],
    taken: int,
) -> None:
    """One line says so, the metrics are cut to it, and the run ends with the same bits."""
    path = copy_of_stopped(stop)
    root = path / "checkpoints"
    for name in damaged:
        DAMAGE[damage](root / name)
    steps: list[int] = []
    before_step(lambda step, batch: steps.append(step))
    capfd.readouterr()
    resume(path, quiet=True)
    assert steps == list(range(taken + 1, 9))
    said = capfd.readouterr().err
    assert said.startswith(f"mpvg: warning: {root}/last")
    assert " is damaged (" in said
    assert said.endswith(f"; continuing from step-{taken:08d}, the one before\n")
    assert said.count("\n") == 1
    assert_same(record(path), whole)


def test_there_is_a_best_one_where_the_best_was_damaged_and_is_not_reached_again(
    tiny: MakeConfig, train_until: TrainUntil, set_accuracies: Callable[[list[float]], None]
) -> None:
    """As may be on a GPU, where the steps that are done again are not the same to the last bit."""
    set_accuracies([0.5, 0.9, 0.3, 0.2])
    config = tiny("run", epochs=3, batch_size=24, save_steps=1, ema_decay=None)
    train_until(config, 5)
    shutil.rmtree(Path(config.out) / "checkpoints/step-00000004")
    resume(config.out, quiet=True)
    assert (
        Path(config.out) / "checkpoints/best"
    ).readlink().name == "step-00000004"  # 0.3 this time, and 0.5 is no longer kept
    runs.load(config.out).model("best")


def test_a_complete_run_with_a_damaged_end_can_be_trained_to_it_again(
    record: Record, whole: dict[str, Any], trained_once: Path, tmp_path: Path
) -> None:
    """As the message tells: without its summary it is taken up from the checkpoint before."""
    shutil.copytree(trained_once / "whole", tmp_path / "again", symlinks=True)
    os.truncate(tmp_path / "again/checkpoints/last/model.safetensors", 50_000)
    offered = r"go back to step-00000007: remove .*/summary\.json, and `mpvg train"
    with pytest.raises(CorruptCheckpointError, match=offered):
        runs.load(tmp_path / "again").model()
    (tmp_path / "again/summary.json").unlink()
    resume(tmp_path / "again", quiet=True)
    assert_same(record(tmp_path / "again"), whole)


# ---- signals


@pytest.mark.parametrize(
    ("number", "moment", "saved"),
    [
        *((signal.SIGTERM, moment, saved) for moment, saved in ((1, 2), (3, 4), (4, 4), (5, 5), (6, 7))),
        (signal.SIGINT, 6, 7),
        *((number, "evaluation", 4) for number in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_a_signal_stops_after_the_step_and_saves_it(
    tiny: MakeConfig,
    record: Record,
    whole: dict[str, Any],
    before_step: BeforeStep,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    moment: int | str,
    saved: int,
) -> None:
    config = tiny("run", save_steps=5)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        if moment == "evaluation":
            evaluate = ClassificationTask.evaluate

            def evaluate_after_signal(*arguments: Any) -> Any:
                os.kill(os.getpid(), number)
                return evaluate(*arguments)

            patch.setattr(ClassificationTask, "evaluate", evaluate_after_signal)
        else:  # seen when the next step is in progress
            before_step(lambda step, batch: os.kill(os.getpid(), number) if step == moment else None)
        with pytest.raises(
            Interrupted, match=f"stopped after step {saved}, which is saved; continue with `mpvg"
        ) as end:
            train(config, quiet=True)
    assert isinstance(end.value, KeyboardInterrupt)
    assert end.value.exit_code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert (Path(config.out) / "checkpoints/last").readlink().name == f"step-{saved:08d}"
    assert not (Path(config.out) / "summary.json").exists()
    before_step(lambda step, batch: None)
    resume(config.out, quiet=True)
    # A checkpoint more was made, so another is the one before the newest.
    assert_same(record(config.out, files=False), {name: whole[name] for name in whole if name != "files"})


def test_a_signal_in_the_last_step_lets_the_run_end(
    tiny: MakeConfig, record: Record, whole: dict[str, Any], before_step: BeforeStep
) -> None:
    before_step(lambda step, batch: os.kill(os.getpid(), signal.SIGTERM) if step == 8 else None)
    train(tiny("run", save_steps=1), quiet=True)
    assert_same(record(tiny("run").out), whole)


def test_ctrl_c_again_stops_at_once(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """But not within a second of the first: that is torchrun handing on what the terminal has sent already."""
    clock = iter([100.0, 100.5, 102.0])
    monkeypatch.setattr("mpvg.training.stopping.time.monotonic", lambda: next(clock))
    reached = []
    with pytest.raises(KeyboardInterrupt) as end, stopping.GracefulShutdown(quiet=False) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(stop.requested)
    assert reached == [signal.SIGINT] * 2
    assert not isinstance(end.value, Interrupted)
    assert capfd.readouterr().err.count("press Ctrl-C to stop at once") == 1


def test_signals_are_left_alone_outside_the_main_thread(tiny: MakeConfig) -> None:
    def in_thread() -> None:
        train(tiny(epochs=1, batch_size=50), quiet=True)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert runs.load(tiny().out).summary() is not None


def test_a_step_that_cannot_be_saved_at_a_signal_is_an_error(
    tiny: MakeConfig, before_step: BeforeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise OSError(28, "cannot save")

    monkeypatch.setattr("mpvg.training.state.save_checkpoint", full)
    before_step(lambda step, batch: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(OSError, match="cannot save"):
        train(tiny(), quiet=True)


def test_resuming_a_complete_run_changes_nothing(tiny: MakeConfig) -> None:
    config = tiny(epochs=1, batch_size=50)
    summary = train(config, quiet=True)
    files = {file: file.stat().st_mtime_ns for file in Path(config.out).rglob("*")}
    assert resume(config.out, quiet=True) == summary
    assert {file: file.stat().st_mtime_ns for file in Path(config.out).rglob("*")} == files


def test_a_moved_run_is_continued_where_it_lies(
    record: Record, tmp_path: Path, trained_once: Path, copy_of_stopped: Callable[[int], Path], whole: dict[str, Any]
) -> None:
    path = copy_of_stopped(6)
    before = {file: file.read_bytes() for file in trained_once.rglob("*") if file.is_file()}
    path.rename(tmp_path / "new")
    resume(tmp_path / "new", quiet=True)
    assert not path.exists()
    assert before == {file: file.read_bytes() for file in trained_once.rglob("*") if file.is_file()}
    assert_same(record(tmp_path / "new"), whole)


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion"])
def test_other_optimizers_are_resumed_exactly_too(
    tiny: MakeConfig, record: Record, train_until: TrainUntil, name: str
) -> None:
    optim = OptimConfig(name=name, layer_decay=0.8)
    whole, stopped = (tiny(out, batch_size=24, save_steps=3, optim=optim) for out in ("whole", "stopped"))
    train(whole, quiet=True)
    train_until(stopped, 4)
    resume(stopped.out, quiet=True)
    assert_same(record(stopped.out), record(whole.out))


def test_a_resumed_run_counts_unreadable_images_as_one_that_was_not_stopped(
    tmp_path: Path, record: Record, train_until: TrainUntil
) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    for name in "ab":
        (tmp_path / "images/train" / name / "0.png").write_bytes(b"no image")
    config = RunConfig(
        data=str(tmp_path / "images"),
        model="vit_mini_patch2_8",
        epochs=2,
        batch_size=2,
        lr=1e-3,
        recipe="none",
        device="cpu",
        threads=1,
        save_steps=1,
        network=NetworkConfig(img_size=8),
        augment=AugmentConfig(),
        loader=LoaderConfig(workers=0, skip_corrupt=True),
    )
    assert train(replace(config, out=str(tmp_path / "whole")), quiet=True)["skipped"] == 2  # images, not readings
    for stop in (4, 7):
        train_until(replace(config, out=str(tmp_path / "stopped")), stop)
    assert resume(tmp_path / "stopped", quiet=True)["skipped"] == 2
    assert_same(record(tmp_path / "stopped"), record(tmp_path / "whole"))


# ---- a loss that is no number


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tiny: MakeConfig) -> None:
    config = tiny(lr=1e20, optim=OptimConfig(), augment=AugmentConfig())
    message = r"the loss is nan at step 2 \(epoch 1, batch 2\); no checkpoint had been saved yet; .* lower lr"
    with pytest.raises(NonFiniteLoss, match=message):
        train(config, quiet=True)
    assert runs.load(config.out).metrics() == []


def test_the_checkpoint_from_before_the_loss_was_no_number_is_kept(tiny: MakeConfig) -> None:
    # One step an epoch. The first is at the warm-up's 1e-6; the second throws the weights so far off that their scores
    # are no numbers.
    optim = OptimConfig(warmup_epochs=3)
    config = tiny(lr=1e20, batch_size=50, epochs=4, optim=optim, augment=AugmentConfig(), ema_decay=None)
    for _ in range(2):  # resumed, it meets the same end
        with pytest.raises(NonFiniteLoss, match=r"is nan after step 2; .*last \(step-00000001\) is kept"):
            resume(config.out, quiet=True) if Path(config.out).exists() else train(config, quiet=True)
    run = runs.load(config.out)
    assert [line["step"] for line in run.metrics()] == [1]
    assert all(bool(tensor.isfinite().all()) for tensor in run.model().state_dict().values())
    assert run.summary() is None


def test_weights_that_are_no_numbers_are_not_saved_inside_an_epoch(tiny: MakeConfig) -> None:
    # SGD at such a rate overflows in its very first step, whose loss is still a number.
    optim = OptimConfig(name="sgd", weight_decay=1e30)
    config = tiny(lr=1e20, save_steps=1, optim=optim, augment=AugmentConfig())
    with pytest.raises(NonFiniteLoss, match="the weights are no longer finite after step 1; no checkpoint"):
        train(config, quiet=True)
    assert not (Path(config.out) / "checkpoints").exists()


# ---- what is written


def test_metrics_and_summary_say_what_happened(tiny: MakeConfig) -> None:
    config = tiny()
    summary = train(config, quiet=True)
    lines = runs.load(config.out).metrics()
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["step"] for line in lines] == [4, 8]
    assert summary["accuracy"] == lines[-1]["accuracy"]
    assert summary["nll"] == lines[-1]["nll"]
    assert summary["ema_accuracy"] == lines[-1]["ema_accuracy"]
    assert summary["ema_nll"] == lines[-1]["ema_nll"]
    assert summary["best_accuracy"] == max(line["accuracy"] for line in lines)
    best = next(line for line in lines if line["accuracy"] == summary["best_accuracy"])
    assert summary["best_epoch"] == best["epoch"]
    assert os.readlink(Path(config.out, "checkpoints/best")) == f"step-{best['step']:08d}"
    assert os.readlink(Path(config.out, "checkpoints/last")) == "step-00000008"
    assert summary["images_per_second"] > 0
    assert summary["seconds"] > 0
    assert math.isclose(summary["images_per_second"], 2 * 48 / summary["seconds"], rel_tol=0.05)
    assert Path(config.out, "summary.json").read_text() == json.dumps(summary) + "\n"


def test_the_loss_in_the_metrics_is_the_mean_over_the_epoch(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    original = ClassificationTask.losses

    def recording(*arguments: Any) -> dict[str, torch.Tensor]:
        found = original(*arguments)
        losses.append(float(found["loss"].detach()))
        return found

    monkeypatch.setattr(ClassificationTask, "losses", recording)
    config = tiny(save_steps=3)
    train(config, quiet=True)
    for line, epoch in zip(runs.load(config.out).metrics(), (losses[:4], losses[4:]), strict=True):
        assert line["train_loss"] == pytest.approx(sum(epoch) / 4, rel=1e-12)


def test_a_step_is_what_it_says(tiny: MakeConfig, before_step: BeforeStep) -> None:
    """One step without mixing, against torch: loss, gradient, AdamW."""
    config = tiny(epochs=1, batch_size=50, augment=AugmentConfig(smoothing=0.1), optim=OptimConfig(weight_decay=0.0))
    config = replace(config, network=replace(config.network, drop_path=0.0), ema_decay=None)
    batches: list[ImageBatch] = []
    before_step(lambda step, batch: batches.append(batch))
    train(config, quiet=True)
    run = runs.load(config.out)
    seed_everything(config.seed)
    model = run.task().build_model(init=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    ((images, targets),) = batches
    nn.CrossEntropyLoss(label_smoothing=0.1)(model(images), targets).backward()
    optimizer.step()
    for (name, expected), actual in zip(model.state_dict().items(), run.model().state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


# ---- several runs in one process


def test_a_run_does_not_inherit_the_precision_of_an_earlier_one(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate keeps the first run's settings for the whole process; bf16 is refused here before anything runs."""
    train(tiny("first", epochs=1, batch_size=50), quiet=True)
    monkeypatch.setattr("mpvg.training.accelerator.bf16_refusal", lambda device: "it is not wanted in this test")
    with pytest.raises(
        ValueError, match="precision is 'bf16', but it is not wanted in this test; give --precision fp32"
    ):
        train(tiny("second", epochs=1, precision="bf16"), quiet=True)
    train(tiny("third", epochs=1, batch_size=50), quiet=True)


def test_bf16_is_refused_on_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "flags\t\t: fpu avx2 avx512f"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: flags)
    assert "neither avx512_bf16 nor amx_bf16" in (bf16_refusal(torch.device("cpu")) or "")
    for flag in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(Path, "read_text", lambda self, flag=flag, **_: f"{flags} {flag}")
        assert bf16_refusal(torch.device("cpu")) is None
