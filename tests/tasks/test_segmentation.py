"""Segmentation: scores and windows against plain writings, and runs that are trained, killed and resumed."""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from children import shrink_canvas, start_on_small_canvas
from mpvg.cli.main import main
from mpvg.config import AugmentConfig, LoaderConfig, NetworkConfig, RunConfig
from mpvg.data import DataInfo, Shard, open_data
from mpvg.data.label_maps import LabelBatch
from mpvg.models.dense.upernet import PixelLogits
from mpvg.recipes import recipe
from mpvg.runs import load
from mpvg.runs.weights import weights_run
from mpvg.tasks import create_task
from mpvg.tasks.segmentation import SegmentationOptions, confusion, pixel_loss, probabilities, scores
from mpvg.training import train
from scene_files import write_ade20k

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
SMALL = {
    **{"short_side": 64, "long_side": 128, "crop": 64, "stride": 32, "distorted": False, "max_share": 1.0},
    **{"channels": 8, "auxiliary_channels": 8},
}


def config(data: object = "ade20k/x", batch_size: int = 2, **options: Any) -> RunConfig:
    return RunConfig(
        data=str(data),
        model="vit_adapter_canvas",
        task="segmentation",
        task_options=SMALL | options,
        epochs=1,
        batch_size=batch_size,
        lr=1e-3,
        recipe="none",
        loader=LoaderConfig(workers=0),
    )


def info(classes: int = 4) -> DataInfo:
    names, stats = tuple("abcdefgh"[:classes]), (0.5, 0.5, 0.5)
    return DataInfo(
        name="any", class_names=names, in_chans=3, img_size=64, mean=stats, std=stats, train_size=2, val_size=2
    )


def task(made: RunConfig | None = None) -> Any:
    return create_task(made or config(), info())


class Listed:
    """Batches in a list."""

    def __init__(self, *batches: LabelBatch) -> None:
        self.batches = batches

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[LabelBatch]:
        yield from self.batches


class Colors(nn.Module):
    """The scores of four classes are the three channels of an image and their mean, and where it is in the image."""

    def __init__(self, ramp: float = 3) -> None:
        super().__init__()
        self.unused, self.ramp = nn.Parameter(torch.zeros(1)), ramp

    def forward(self, images: Tensor) -> PixelLogits:
        ramp = torch.linspace(0, self.ramp, images.shape[-1]).expand(len(images), 1, *images.shape[-2:])
        return PixelLogits(torch.cat([images, images.mean(1, keepdim=True) + ramp], dim=1), None)


# ---- scores


def plain_scores(pairs: list[tuple[Any, Any]], classes: int) -> dict[str, float]:
    """Class by class, pixel by pixel."""
    ious, accuracies, right, labelled = [], [], 0, 0
    for c in range(classes):
        both = either = true = 0
        for found, labels in pairs:
            for f, t in zip(found.flatten().tolist(), labels.flatten().tolist(), strict=True):
                if t != 255:
                    both += f == t == c
                    either += c in (f, t)
                    true += t == c
        ious += [both / either] if either else []
        accuracies += [both / true] if true else []
        right, labelled = right + both, labelled + true
    return {
        "miou": sum(ious) / len(ious),
        "macc": sum(accuracies) / len(accuracies),
        "aacc": right / labelled,
    }


def test_scores_are_those_of_a_plain_count_with_absent_classes_and_pixels_of_none() -> None:
    """Class 3 is predicted and never true, class 4 is neither."""
    pairs, table = [], torch.zeros(5, 5, dtype=torch.int64)
    for height, width in ((7, 9), (12, 5), (4, 4)):
        labels = RNG.choice([0, 1, 2, 255], (height, width)).astype(np.uint8)
        found = RNG.choice(4, (height, width)).astype(np.int64)
        pairs.append((found, labels))
        table += confusion(torch.from_numpy(found), torch.from_numpy(labels), 5)
    assert scores(table) == pytest.approx(plain_scores(pairs, 5), rel=1e-12)


def test_a_perfect_prediction_of_few_of_many_classes_has_all_points() -> None:
    labels = torch.tensor([[0, 7, 255], [7, 149, 0]], dtype=torch.uint8)
    found = torch.where(labels == 255, 3, labels.long())
    assert scores(confusion(found, labels, 150)) == {"miou": 1.0, "macc": 1.0, "aacc": 1.0}


def test_counts_are_integers_beyond_those_of_float32() -> None:
    table = torch.tensor([[2**24, 0], [1, 0]])
    labels = torch.zeros(3, 5, dtype=torch.uint8)
    table += confusion(torch.zeros(3, 5, dtype=torch.int64), labels, 2)
    assert table.tolist() == [[2**24 + 15, 0], [1, 0]]


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="label 4 is of none of the 4 classes; allowed: less, or 255"):
        confusion(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[4, 255]], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="no pixel of the validation set is of a class"):
        scores(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no image could be evaluated"):
        task().evaluate(Colors(), Listed())


def test_mistakes_have_the_scores_of_the_evaluation() -> None:
    images = torch.from_numpy(RNG.normal(size=(3, 3, 64, 64))).float()
    labels = [torch.from_numpy(RNG.integers(0, 4, size)).byte() for size in ((64, 64), (50, 40), (20, 30))]
    labels[0][:5] = 255
    batch = LabelBatch(images, labels, [(64, 64)] * 3)
    made: Any = task(config(sliding=False))
    review = made.review(Colors(), Listed(batch))
    assert review.evaluation == made.evaluate(Colors(), Listed(batch))
    assert sorted(one.index for one in review.examples) == [0, 1, 2]
    assert len(review.predictions) == 3
    with pytest.raises(ValueError, match="no image could be evaluated"):
        made.review(Colors(), Listed())


def test_labels_beyond_the_classes_stop_training_and_evaluation(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path / "data", classes=4)
    (root / "classes.txt").write_text("a\nb\nc\n")
    made = config(f"ade20k/{root}")
    data = open_data(made, Shard(CPU), type(task()).make_pipeline)
    for batches in (data.train, data.val):
        with pytest.raises(ValueError, match=r"it has the labels \[4\]; there are 3 classes"):
            list(batches.epoch())


# ---- how images are taken


def plain_windows(images: Tensor, side: int, stride: int) -> Tensor:
    """For each pixel the mean of the windows that cover it."""
    height, width = images.shape[-2:]
    sums, counts = torch.zeros(1, 4, height, width), torch.zeros(height, width)
    rows, columns = (max(0, math.ceil((length - side) / stride)) + 1 for length in (height, width))
    for row, column in itertools.product(range(rows), range(columns)):
        bottom, right = min(row * stride + side, height), min(column * stride + side, width)
        top, left = max(bottom - side, 0), max(right - side, 0)
        found = Colors()(images[:, :, top:bottom, left:right]).decode[0]
        for y, x in itertools.product(range(bottom - top), range(right - left)):
            sums[0, :, top + y, left + x] += found[:, y, x]
            counts[top + y, left + x] += 1
    return sums / counts


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(64, 160), (96, 32), (32, 32)])
def test_windows_slide_as_in_a_plain_loop(height: int, width: int) -> None:
    images, size = torch.randn(1, 3, height, width), (height + 5, width - 3)
    options = SegmentationOptions(crop=64, stride=40)
    found = probabilities(Colors(), images, size, options)
    expected = F.interpolate(plain_windows(images, 64, 40), size=size, mode="bilinear", align_corners=False)
    assert torch.allclose(found, expected.softmax(1), atol=1e-6)
    whole = probabilities(Colors(), images, size, dataclasses.replace(options, sliding=False))
    assert torch.allclose(found, whole, atol=1e-6) == (width <= 64)  # the ramp begins anew in each window


@torch.inference_mode()
def test_scales_and_mirror_images_are_averaged_as_probabilities() -> None:
    images = torch.randn(1, 3, 64, 96)
    options = SegmentationOptions(sliding=False, scales=(0.6, 1.0, 1.5), flips=True)
    found = probabilities(Colors(), images, (50, 70), options)
    expected = torch.zeros(1, 4, 50, 70)
    for size in ((64, 64), (64, 96), (96, 160)):  # 0.6: 38.4 x 57.6; 1.5: 96 x 144
        scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        for mirrored in (False, True):
            logits = Colors()(scaled.flip(3) if mirrored else scaled).decode
            logits = F.interpolate(logits, size=(50, 70), mode="bilinear", align_corners=False)
            expected += (logits.flip(3) if mirrored else logits).softmax(1) / 6
    assert torch.allclose(found, expected, atol=1e-6)


@torch.inference_mode()
def test_scales_of_an_evaluation_are_made_from_the_image_of_the_file(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path / "data", sizes=((40, 48), (90, 30), (50, 50)))
    made = config(f"ade20k/{root}", sliding=False, scales=[0.5, 1.75], flips=True)
    data = open_data(made, Shard(CPU), type(task()).make_pipeline)
    ours: Any = create_task(made, data.info)
    model = Colors(ramp=0)
    table, images = ours.confusion(model, data.val)
    assert int(images) == 3
    assert (table.sum(0) > 0).sum() == 3
    expected = torch.zeros_like(table)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.info.mean, data.info.std))
    for file in sorted((root / "images/validation").iterdir()):
        with Image.open(file) as picture, Image.open(root / "annotations/validation" / f"{file.stem}.png") as truth:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float()
            labels = torch.from_numpy(np.array(truth, np.uint8)) - 1  # 0 becomes 255
        total = torch.zeros(1, 4, *labels.shape)
        for scale in (0.5, 1.75):
            short, long = sorted(pixels.shape[1:])
            factor = min(64 * scale / short, 128 * scale / long)
            size = [int(side * factor + 0.5) for side in pixels.shape[1:]]
            image = functional.resize(functional.resize(pixels, size, antialias=False), up(size), antialias=False)
            image = ((image / 255 - mean) / std)[None]
            for mirrored in (False, True):
                logits = model(image.flip(3) if mirrored else image).decode
                logits = F.interpolate(logits, size=labels.shape, mode="bilinear", align_corners=False)
                total += (logits.flip(3) if mirrored else logits).softmax(1)
        expected += confusion(total.argmax(1)[0], labels, 4)
    assert torch.equal(table, expected)
    from_preprocessed = Listed(*(batch._replace(scaled=()) for batch in data.val.epoch()))
    assert not torch.equal(ours.confusion(model, from_preprocessed)[0], table)


def up(size: list[int]) -> list[int]:
    """The next multiples of 32."""
    return [-(-side // 32) * 32 for side in size]


def test_results_do_not_depend_on_batch_mates(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path / "data", sizes=((40, 48), (64, 32), (30, 90), (50, 50)))
    found, tables = [], []
    for batch_size in (2, 3, 4):
        made = config(f"ade20k/{root}", batch_size)
        data = open_data(made, Shard(CPU), type(task()).make_pipeline)
        torch.manual_seed(0)
        ours: Any = create_task(made, data.info)
        model = ours.build_model(init=True)
        for module in model.modules():  # scores of a new network are all but equal
            if isinstance(module, nn.Conv2d) and module.out_channels == 4:
                nn.init.normal_(module.weight)
        table, images = ours.confusion(model, data.val)
        assert int(images) == 4
        assert int(table.sum()) == sum(int((labels != 255).sum()) for b in data.val.epoch() for labels in b.labels)
        tables.append(table)
        found.append(ours.evaluate(model, data.val))
    assert (tables[0].sum(0) > 0).sum() > 1
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])
    assert found[0] == found[1] == found[2]


# ---- losses and options


def test_the_loss_is_the_mean_over_all_pixels_of_both_heads() -> None:
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    labels = torch.from_numpy(RNG.choice([0, 1, 2, 3, 255], (2, 3, 5)).astype(np.uint8))
    total = 0.0
    for b, y, x in itertools.product(range(2), range(3), range(5)):
        if labels[b, y, x] != 255:
            values = logits[b, :, y, x].tolist()
            total -= values[int(labels[b, y, x])] - math.log(sum(map(math.exp, values)))
    assert float(pixel_loss(logits, labels)) == pytest.approx(total / 30, rel=1e-5)

    class Both(nn.Module):
        def forward(self, images: Tensor) -> PixelLogits:
            return PixelLogits(logits, 2 * logits)

    batch = LabelBatch(torch.zeros(2, 3, 3, 5), list(labels), [(3, 5)] * 2)
    losses = task().losses(Both(), batch)
    assert float(losses["decode"]) == pytest.approx(total / 30, rel=1e-5)
    assert float(losses["auxiliary"]) == pytest.approx(0.4 * float(pixel_loss(2 * logits, labels)))


def test_a_batch_without_a_labelled_pixel_has_a_finite_loss() -> None:
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    loss = pixel_loss(logits, torch.full((2, 8, 8), 255, dtype=torch.uint8))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size 1 with accumulate 1 trains on one image at once, of which UperNet's pooling"),
        ({"accumulate": 2}, "batch_size 2 with accumulate 2 trains on one image at once"),
        ({"batch_size": 3, "accumulate": 2}, "batch_size 3 with accumulate 2 trains on one image at once"),
        ({"task_options": {"crop": 100}}, "task_options.crop is 100; allowed: a multiple of 32, at least that"),
        ({"task_options": {"crop": 64, "stride": 65}}, "task_options.stride is 65; allowed: at most the crop, 64"),
        ({"task_options": {"scales": []}}, "task_options.scales is (); allowed: one or more numbers in [0.1, 8]"),
        ({"task_options": {"ratio": [2.0, 1.0]}}, "task_options.ratio is (2.0, 1.0); allowed: two numbers"),
        ({"task_options": {"max_share": 0.0}}, "task_options.max_share is 0.0; allowed: a number in (0, 1]"),
        ({"task_options": {"channels": 0}}, "task_options.channels is 0; allowed: a whole number >= 1"),
        ({"task_options": {"classifier_std": 0.0}}, "task_options.classifier_std is 0.0; allowed: a number in (0, 1]"),
        ({"task_options": {"width": 1}}, "unknown config key 'task_options.width'"),
        (
            {"task_options": {"vit": "mine.py:vit"}},
            "task_options.vit is 'mine.py:vit'; allowed: a network of this package",
        ),
        ({"task_options": {"vit": ""}}, "task_options.vit is ''; allowed: a network of this package, or timm/NAME"),
        ({"task_options": {"vit": "timm/hf-hub:a/b"}}, "task_options.vit is 'timm/hf-hub:a/b', which is looked up"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        task(dataclasses.replace(config(), **changes))


def test_what_belongs_to_classifiers_is_refused() -> None:
    made = dataclasses.replace(config(), network=NetworkConfig(img_size=96))
    with pytest.raises(ValueError, match="network.img_size is 96, which segmentation does not have; leave it out"):
        task(made).build_model(init=True)
    made = dataclasses.replace(config(), augment=AugmentConfig(mixup=0.8))
    with pytest.raises(ValueError, match="augment.mixup is 0.8, which is for image classification"):
        task().make_pipeline(made, info(), "train", CPU)


def test_a_prediction_is_a_map_with_shares_and_a_png() -> None:
    images = torch.zeros(2, 3, 32, 64)
    images[0, 0, :, :16] = images[0, 2, :, 16:] = 9
    images[1, 1] = 9
    first, second = task(config(sliding=False)).predict(Colors(), images)
    assert first.lines() == [" 75.00 %  c", " 25.00 %  a"]
    assert second.lines() == ["100.00 %  b"]
    ending, content = first.file("scene.png")
    assert ending == ".labels.png"
    image = Image.open(io.BytesIO(content))
    assert (image.mode, image.size) == ("P", (64, 32))
    assert np.array_equal(np.asarray(image), first.labels)
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) == 2
    large = first.resized(64, 128)
    assert np.array_equal(large.labels[::2, ::2], first.labels)
    assert large.draw(Image.new("RGB", (128, 64))).width == 128


# ---- runs


SCENES = 10


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """`train` on few scenes: 3 epochs of 4 steps, where a pass over the data has 5."""
    shrink_canvas(monkeypatch, tmp_path / "cache", SCENES)
    options = {
        "recipe": "canvas_segmentation",
        "task_options": json.dumps(recipe("canvas_segmentation").task_options | {"short_side": 64, "crop": 64}),
        "network.drop_path": 0.2,
        "epochs": 3,
        "steps_per_epoch": 4,
        "batch_size": 2,
        "optim.warmup_steps": 2,
        "save_steps": 1,
        "ema_decay": 0.5,
        "threads": 1,
        "device": "cpu",
    }
    return ["train", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def left_by(run: Path) -> dict[str, Any]:
    """What must be the same, to the last bit, in another run that did the same."""
    found: dict[str, Any] = {f.name: f.read_bytes() for f in (run / "checkpoints/last").glob("*.safetensors")}
    times = ("seconds", "images_per_second")
    return found | {"metrics": [{k: v for k, v in line.items() if k not in times} for line in load(run).metrics()]}


def killed_at(step: int, arguments: list[str], run: Path) -> None:
    """Runs a command in another process, and kills that once a step is saved."""
    child = start_on_small_canvas(arguments, run.parent / "cache", SCENES)
    deadline = time.monotonic() + 60
    while not any(int(name.name[5:]) >= step for name in (run / "checkpoints").glob("step-*")):
        assert child.is_alive(), "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_a_run_on_a_canvas_is_killed_and_resumed_to_the_same_bits(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*command, "--out", str(whole)]) == 0
    assert "mIoU" in capsys.readouterr().out
    for step in (2, 6):
        start = ["train", "--resume", str(killed)] if killed.exists() else [*command, "--out", str(killed)]
        killed_at(step, start, killed)
    assert main(["train", "--resume", str(killed)]) == 0
    assert left_by(killed) == left_by(whole)

    run = load(whole)
    summary, lines = run.summary(), run.metrics()
    assert summary is not None
    assert summary["best_metric"] == "miou"
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert summary["best_miou"] == max(line["miou"] for line in lines)
    assert run.info.class_names[-1] == "background"
    assert len(run.info.class_names) == 11

    capsys.readouterr()
    scene = next((tmp_path / "cache/canvas/canvas-v1/images/validation").glob("*.png"))
    for arguments, expected in (
        (["evaluate", str(whole)], f"{whole}: mIoU {100 * lines[-1]['miou']:.2f} %"),
        (["predict", str(whole), str(scene), "--out", str(tmp_path / "found")], " %  "),
        (["runs", str(tmp_path)], "mIoU"),
    ):
        assert main(arguments) == 0
        assert expected in capsys.readouterr().out
    assert main(["plot", str(whole), "--out", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 1000
    run, model, _ = weights_run(whole / "checkpoints/last/model.safetensors", load(whole).config)
    found = run.task().evaluate(model, run.validation(torch.device("cpu")))
    assert found.metrics["miou"] == pytest.approx(load(whole).metrics()[-1]["miou"], abs=1e-6)
    with Image.open(scene) as given, Image.open(tmp_path / "found" / f"{scene.name}.labels.png") as labels:
        assert labels.size == given.size
    assert (tmp_path / "found" / f"{scene.name}.drawn.png").is_file()
    assert main(["evaluate", str(whole), "--out", str(tmp_path / "mistakes")]) == 0
    assert json.loads((tmp_path / "mistakes/results.json").read_text())["metrics"]["miou"] == lines[-1]["miou"]
    assert len((tmp_path / "mistakes/predictions.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "mistakes/mistakes.html").read_text().count("<img ") == 5


def test_a_run_is_evaluated_at_other_sizes(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*command, "--out", str(run)]) == 0
    capsys.readouterr()
    given = ["evaluate", str(run), "--task_options"]
    said = []
    for options in ("{}", '{"scales": [0.5, 1, 1.5], "flips": true}', '{"sliding": true, "stride": 32}'):
        assert main([*given, options]) == 0
        out = capsys.readouterr().out
        assert f"on 5 images with {options}\n" in out
        assert ("selected on this set" in out) == (options == "{}")
        said.append(out.partition(" on 5 images")[0])
    assert said[0] != said[1] != said[2]
    assert f"mIoU {100 * load(run).metrics()[-1]['miou']:.2f} %" in said[0]
    file = str(run / "checkpoints/last/model.safetensors")
    more = ["--recipe", "canvas_segmentation", "--method", "mpvg", "--data", "canvas"]
    assert main(["evaluate", file, *more, "--task_options", '{"short_side": 64, "scales": [1, 2]}']) == 0
    assert '"scales": [1, 2]}' in capsys.readouterr().out
    for options, message in (
        ('{"channels": 9}', "'task_options.channels' cannot be changed after training; allowed of segmentation: short"),
        ('{"channel": 9}', "'task_options.channel' is no option of segmentation; allowed of segmentation: short_side"),
        ('{"stride": 9}', "'task_options.stride' changes nothing: windows do not slide; give sliding too"),
        (
            '{"short_side": 999}',
            "'task_options.short_side' changes nothing: long_side is 128; give a larger long_side too",
        ),
        ('{"scales": [9]}', "task_options.scales is (9,); allowed: one or more numbers in [0.1, 8]"),
        ("[1]", "argument --task_options: '[1]' is not allowed; give a JSON object; see `mpvg evaluate --help`"),
        ('{"scales": [1,', "is not valid JSON"),
    ):
        assert main([*given, options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("vit", "width", "heads"), [("timm/vit_small_patch16_224", 384, 6), ("timm/vit_base_patch16_224", 768, 12)]
)
def test_another_transformer_stands_inside(vit: str, width: int, heads: int) -> None:
    with torch.device("meta"):
        network: Any = task(config(vit=vit)).build_model(init=False)
    assert network.backbone.embed_dim == width
    assert network.backbone.interactions[0].injector.attn.heads == heads


def test_a_run_starts_from_the_folder_of_a_classifier_and_trains_heads_alone(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles, run = tmp_path / "tiles", tmp_path / "run"
    base = ["train", "--recipe", "canvas-tiles", "--epochs", "2", "--batch_size", "16", "--device", "cpu"]
    assert main([*base, "--threads", "1", "--method", "default", "--out", str(tiles)]) == 0
    options = json.loads(command[command.index("--task_options") + 1]) | {"freeze_backbone": True}
    command = [*command, "--task_options", json.dumps(options), "--epochs", "1"]
    capsys.readouterr()
    assert main([*command, "--network.init", str(tiles), "--out", str(run)]) == 0
    best = (tiles / "checkpoints/best").resolve()
    given = Path(str(load(run).config.network.init))
    assert given.resolve() == best / "model.safetensors"
    assert "weights from " in capsys.readouterr().out
    network: Any = load(run).model()
    trained = load(tiles).model("best").state_dict()
    inside = network.backbone.vit.state_dict()
    assert torch.equal(inside["blocks.2.attn.qkv.weight"], trained["blocks.2.attn.qkv.weight"])
    assert torch.equal(inside["pos_embed"], trained["pos_embed"][:, 1:])
    assert network.backbone.norm1.running_mean.abs().sum() == 0


@pytest.mark.parametrize("method", ["default", "mpvg"])
def test_the_paper_s_recipe_trains(method: str, tmp_path: Path) -> None:
    """On two pictures, with a narrow network."""
    made = recipe("ade20k_vit_adapter_tiny", f"ade20k/{write_ade20k(tmp_path / 'data')}")
    assert made.task_options == {}
    assert SegmentationOptions().crop == 512
    made = dataclasses.replace(
        made,
        **{"model": "vit_adapter_canvas", "method": method, "out": str(tmp_path / "run"), "task_options": SMALL},
        **{"epochs": 1, "steps_per_epoch": 3, "batch_size": 2, "device": "cpu", "precision": "fp32", "threads": 1},
        network=dataclasses.replace(made.network, sync_bn=False),
        optim=dataclasses.replace(made.optim, warmup_steps=1),
        loader=LoaderConfig(workers=0),
    )
    summary = train(made, quiet=True)
    assert load(tmp_path / "run").metrics()[0]["step"] == 3
    assert 0 <= summary["miou"] <= 1


def test_a_canvas_needs_a_task_with_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "canvas", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "data 'canvas' has scenes, and the task is 'classification'; allowed: detection, segmentation" in said


def test_data_with_other_classes_are_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The labels of another order mean other classes."""
    root = write_ade20k(tmp_path / "data", classes=4)
    (root / "classes.txt").write_text("a\nb\nc\nd\n")
    run = tmp_path / "run"
    made = dataclasses.replace(config(f"ade20k/{root}", sliding=False), out=str(run), device="cpu", threads=1)
    train(made, quiet=True)
    assert main(["evaluate", str(run)]) == 0
    for names in ("b\na\nc\nd\n", "a\nb\nc\nd\ne\n"):
        (root / "classes.txt").write_text(names)
        capsys.readouterr()
        assert main(["evaluate", str(run)]) == 2
        assert "classes" in capsys.readouterr().err
    (root / "classes.txt").write_text("a\na\nc\nd\n")
    assert main(["evaluate", str(run)]) == 2
    assert "classes.txt has the class 'a' twice; give each a name of its own" in capsys.readouterr().err
    (root / "classes.txt").unlink()
    assert main(["evaluate", str(run)]) == 0


def test_broken_data_are_left_out_of_an_evaluation_if_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_ade20k(tmp_path / "data", sizes=((40, 48), (64, 32), (50, 50)))
    run = tmp_path / "run"
    made = dataclasses.replace(config(f"ade20k/{root}", sliding=False), out=str(run), device="cpu", threads=1)
    train(made, quiet=True)
    other = shutil.copytree(root, tmp_path / "other")
    next((other / "images/validation").iterdir()).write_bytes(b"no image")
    capsys.readouterr()
    command = ["evaluate", str(run), "--data", f"ade20k/{other}"]
    assert main(command) == 2
    assert "--loader.skip_corrupt true" in capsys.readouterr().err
    assert main([*command, "--loader.skip_corrupt", "true", "--orientation", "stored"]) == 0
    out = capsys.readouterr().out
    assert "on 2 images, orientation stored, 1 unreadable ones skipped" in out
    assert "selected on this set" not in out
