"""A task and a data format that the package does not know: the center of a box, whose metric is an error."""

import dataclasses
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from mpvg import data, tasks
from mpvg.cli.main import main
from mpvg.config import RunConfig
from mpvg.data import Batches, DataInfo, ImageBatch, Listing, Pipeline, Sample
from mpvg.data import factory as formats
from mpvg.data.types import Preprocess
from mpvg.models import create_model
from mpvg.runs import load
from mpvg.tasks import Evaluation, Metric, Prediction
from mpvg.training import train
from short_runs import weight_files

SIDE = 28


@dataclass(frozen=True)
class Boxes:
    """Gray images of a white box, from files that hold its corners: no image format, no classes."""

    files: list[Path]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> Sample:
        left, top, right, bottom = (int(word) for word in self.files[index].read_text().split())
        image = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(image).rectangle((left, top, right, bottom), fill=255)
        return Sample(image, ((left + right) / 2 / SIDE, (top + bottom) / 2 / SIDE))


def open_boxes(config: RunConfig, splits: Sequence[str], class_names: tuple[str, ...] | None) -> Listing:
    root = Path(config.data.removeprefix("boxes/"))
    found = {split: Boxes(sorted((root / split).glob("*.txt"))) for split in splits}
    return Listing(
        class_names=(),
        train=found.get("train"),
        val=found.get("val"),
        in_chans=1,
        img_size=SIDE,
        mean=(0.5,),
        std=(0.5,),
    )


@dataclass(frozen=True, kw_only=True)
class CenterOptions:
    """`task_options` of the task."""

    power: float = 2.0
    flip: bool = True


@dataclass(frozen=True)
class Center:
    """A prediction."""

    x: float
    y: float

    def lines(self) -> list[str]:
        return [f"center ({self.x:.2f}, {self.y:.2f})"]


class CenterTask:
    """Regression of the center; the mean distance, in pixels, chooses the best checkpoint: lower is better."""

    metrics: ClassVar[Mapping[str, Metric]] = {"distance": Metric(title="distance, px", higher_is_better=False)}
    summarized: ClassVar[tuple[str, ...]] = ("distance",)
    best: ClassVar[str] = "distance"

    def __init__(self, config: RunConfig, info: DataInfo, options: CenterOptions) -> None:
        self.config, self.info, self.options = config, info, options

    @staticmethod
    def make_pipeline(config: RunConfig, info: DataInfo, split: str, device: torch.device) -> Pipeline:
        flips = split == "train" and config.task_options.get("flip", True)
        return Pipeline(FlipBoth(0.5 if flips else 0.0), collate)

    def build_model(self, *, init: bool) -> nn.Module:
        return create_model(
            self.config.model,
            self.config.method,
            num_classes=2,
            in_chans=1,
            img_size=SIDE,
            drop_path_rate=self.config.network.drop_path,
        )

    def prepare(self, batch: ImageBatch) -> ImageBatch:
        return batch._replace(images=batch.images + 0.1 * torch.randn_like(batch.images))

    def losses(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        error = (model(batch.images) - batch.targets).abs() ** self.options.power
        return {"x": error[:, 0].mean(), "y": error[:, 1].mean()}

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, batches: Batches[ImageBatch], accelerator: Accelerator | None = None
    ) -> Evaluation:
        model.eval()
        distances = [(model(images) - targets).norm(dim=1) for images, targets in batches.epoch()]
        found = torch.cat(distances)
        return Evaluation({"distance": SIDE * float(found.mean())}, len(found))

    def preprocess(self) -> Preprocess:
        return lambda image: functional.pil_to_tensor(image.convert("L").resize((SIDE, SIDE))).float() / 255 * 2 - 1

    def predict(self, model: nn.Module, images: Tensor) -> list[Prediction]:
        return [Center(*center.tolist()) for center in model.eval()(images)]


@dataclass(frozen=True)
class FlipBoth:
    """A random flip of image and target together."""

    probability: float

    def __call__(self, sample: Sample) -> Sample:
        pixels = functional.pil_to_tensor(sample.image).float() / 255 * 2 - 1
        x, y = sample.target
        if random.random() < self.probability:
            pixels, x = pixels.flip(-1), 1 - x
        return Sample(pixels, torch.tensor([x, y]))


def collate(samples: list[Sample]) -> ImageBatch:
    return ImageBatch(torch.stack([s.image for s in samples]), torch.stack([s.target for s in samples]))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are taken away after the test."""
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    tasks.register("center", CenterTask, CenterOptions)
    data.register_format("boxes", open_boxes)


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for split, size in (("train", 40), ("val", 12)):
        (tmp_path / "boxes" / split).mkdir(parents=True)
        for number in range(size):
            left, top = rng.randrange(20), rng.randrange(20)
            corners = left, top, left + rng.randrange(3, 8), top + rng.randrange(3, 8)
            (tmp_path / "boxes" / split / f"{number:03d}.txt").write_text(" ".join(map(str, corners)))
    return tmp_path / "boxes"


@pytest.fixture
def command(boxes: Path) -> list[str]:
    options = {
        "data": f"boxes/{boxes}",
        "task": "center",
        "task_options": '{"power": 1.5}',
        "recipe": "digits",
        "model": "vit_mini_patch7_28",
        "network.drop_path": 0.1,
        "epochs": 4,
        "batch_size": 8,
        "lr": 0.003,
        "ema_decay": 0.5,
        "save_steps": 2,
        "threads": 1,
        "device": "cpu",
        "loader.workers": 0,
    }
    return ["train", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lets the task die in a step, counted from 1."""
    original, steps = CenterTask.prepare, iter(range(1, 10**6))

    def prepare(self: CenterTask, batch: ImageBatch) -> ImageBatch:
        if next(steps) == step:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(CenterTask, "prepare", prepare)


def test_it_trains_resumes_evaluates_predicts_and_is_listed(
    command: list[str], boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*command, "--out", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "distance, px" in printed
    assert "accuracy" not in printed
    for step in (3, 5, 9):  # before the first epoch ends, inside the others, again and again
        with pytest.MonkeyPatch.context() as patch:
            interrupted(patch, step)
            start = ["train", "--resume", str(killed)] if killed.exists() else [*command, "--out", str(killed)]
            assert main(start) == 130
    assert main(["train", "--resume", str(killed)]) == 0
    assert weight_files(killed) == weight_files(whole)
    capsys.readouterr()

    summary, lines = load(whole).summary(), load(whole).metrics()
    assert summary is not None
    assert (summary["task"], summary["best_metric"], summary["higher_is_better"]) == ("center", "distance", False)
    best = min(lines, key=lambda line: line["distance"])
    assert (summary["best_distance"], summary["best_epoch"]) == (best["distance"], best["epoch"])
    assert summary["distance"] == lines[-1]["distance"]
    assert summary["ema_distance"] == lines[-1]["ema_distance"]
    assert (whole / "checkpoints/best").readlink().name == f"step-{best['step']:08d}"
    assert lines[-1]["distance"] < lines[0]["distance"]

    assert main(["evaluate", str(whole), "--checkpoint", "best"]) == 0
    shown = f"{whole}: distance, px {best['distance']:.4f} on 12 images\n"
    assert capsys.readouterr().out.startswith(shown)
    assert main(["runs", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert f"distance, px {best['distance']:.4f}" in rows[-1]
    assert "accuracy" not in "".join(rows)

    Image.new("L", (SIDE, SIDE)).save(tmp_path / "empty.png")
    assert main(["predict", str(whole), str(tmp_path / "empty.png")]) == 0
    assert "  center (" in capsys.readouterr().out
    assert main(["plot", str(whole), "--out", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_its_options_change_the_training_and_the_digest(command: list[str], tmp_path: Path) -> None:
    found = {}
    for name, options in (("a", "{}"), ("b", '{"power": 1.5}'), ("c", '{"power": 1.5, "flip": false}')):
        extra = ["--task_options", options, "--epochs", "1", "--out", str(tmp_path / name)]
        assert main([*command, *extra, "--optim.warmup_epochs", "0"]) == 0
        found[name] = (weight_files(tmp_path / name)["model.safetensors"], load(tmp_path / name).config.digest())
    assert len({weight for weight, _ in found.values()}) == 3
    assert len({digest for _, digest in found.values()}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('{"power": "x"}', "task_options.power is 'x'; allowed: float"),
        ('{"flip": 1}', "task_options.flip is 1; allowed: bool"),
        ('{"powr": 2}', "unknown config key 'task_options.powr'; did you mean task_options.power? Known: "),
        ('{"__import__": "os"}', "unknown config key 'task_options.__import__'"),
    ],
)
def test_options_are_validated_by_the_dataclass(
    command: list[str], tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--task_options", options, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"mpvg: error: {message}")
    assert not (tmp_path / "run").exists()


def test_a_run_of_a_task_that_is_not_registered_is_refused_and_still_listed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*command, "--epochs", "1", "--optim.warmup_epochs", "0", "--out", str(run)]) == 0
    del tasks._TASKS["center"]
    capsys.readouterr()
    for arguments in (["evaluate", str(run)], ["train", "--task", "center", "--out", str(tmp_path / "new")]):
        assert main(arguments) == 2
        assert "unknown task 'center'. Known: classification, " in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert "unknown task 'center'" in capsys.readouterr().out


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="task 'center' is registered already; give another name"):
        tasks.register("center", CenterTask, CenterOptions)
    with pytest.raises(ValueError, match="data format 'boxes': give a name"):
        data.register_format("boxes", open_boxes)


def test_a_metric_that_is_not_finite_stops_the_run(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CenterTask, "evaluate", lambda *_: Evaluation({"distance": math.nan}, 12))
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "distance, px on the validation set is nan after step 5" in capsys.readouterr().err


def test_accumulation_is_the_same_step(boxes: Path, tmp_path: Path) -> None:
    """The losses are means over images, so that parts of a batch, weighed by their images, add up to the whole."""
    base = RunConfig(
        data=f"boxes/{boxes}", task="center", model="vit_mini_patch7_28", epochs=1, batch_size=8, lr=1e-3, recipe="own"
    )
    base = dataclasses.replace(base, device="cpu", threads=1, loader=dataclasses.replace(base.loader, workers=0))
    train(dataclasses.replace(base, out=str(tmp_path / "one")), quiet=True)
    train(dataclasses.replace(base, out=str(tmp_path / "three"), accumulate=3), quiet=True)
    one, three = (load(tmp_path / name).metrics()[0] for name in ("one", "three"))
    assert three["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert json.dumps(one) != ""


def test_the_batches_are_iterated_like_any_others(boxes: Path) -> None:
    batch: Any = ImageBatch(torch.zeros(5, 1, 2, 2), torch.arange(5))
    assert batch.size == 5
    parts: Iterator[Any] = iter(batch.split(2))
    assert [part.targets.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
