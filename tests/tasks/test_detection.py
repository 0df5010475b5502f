"""The task of detection: from files of COCO to its metrics, predictions and results."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mpvg.cli.main import main
from mpvg.config import LoaderConfig, NetworkConfig, RunConfig
from mpvg.data import Data, Shard, open_data
from mpvg.data.annotations import ImageAnnotations
from mpvg.data.canvas_files import write_scenes
from mpvg.data.canvas_scenes import LEVELS
from mpvg.data.named_sets import canvas_sources
from mpvg.data.rle import decode_mask, encode_mask
from mpvg.data.scenes import SceneBatch, SceneTarget, collate_scenes
from mpvg.data.types import Sample
from mpvg.models import create_model
from mpvg.models.dense.mask_rcnn import MaskRCNN
from mpvg.models.dense.regions import mask_targets
from mpvg.recipes import recipe
from mpvg.runs import load
from mpvg.tasks import create_task
from mpvg.tasks.coco_metrics import AveragePrecision, average_precision, dataset, truth_record
from mpvg.tasks.detection import DetectionOptions, DetectionTask
from mpvg.tasks.detections import Detections
from mpvg.training.loop import Trainer
from mpvg.training.starting import with_init_file
from short_runs import Death, weight_files

CPU = torch.device("cpu")
SMALL = {
    "short_sides": [64],
    "long_side": 96,
    "first_sides": [],
    "max_side": 96,
    "test_side": 64,
    "anchor_sizes": [4, 8, 16, 32, 64],
    "channels": 16,
    "hidden": 32,
    "regions": 16,
    "proposals": 50,
}
IDS = tuple(range(1, 11))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scenes for training, four for validation, of 128 x 128 pixels."""
    folder = tmp_path_factory.mktemp("scenes")
    names, sources = canvas_sources("", None, ("train", "val"))
    write_scenes(folder, LEVELS["easy"], sources, names, {"train": 8, "val": 4})
    return folder


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        data=f"coco/{scenes}",
        task="detection",
        task_options=SMALL,
        model="vit_adapter_canvas",
        epochs=2,
        batch_size=4,
        lr=1e-3,
        recipe="none",
        device="cpu",
        threads=1,
        save_steps=1,
        out=str(tmp_path / "run"),
        network=NetworkConfig(drop_path=0.1),
        loader=LoaderConfig(workers=0),
    )


@pytest.fixture
def data(config: RunConfig) -> Data:
    return open_data(config, Shard(CPU), DetectionTask.make_pipeline)


@pytest.fixture
def task(config: RunConfig, data: Data) -> DetectionTask:
    return DetectionTask(config, data.info, DetectionOptions(**SMALL))


@pytest.fixture
def network(task: DetectionTask) -> MaskRCNN:
    """Untrained, so it finds something everywhere."""
    model = task.build_model(init=True)
    assert isinstance(model, MaskRCNN)
    return model


def truths(data: Data) -> list[ImageAnnotations]:
    return [target.truth for batch in data.val.epoch() for target in batch.targets]


def as_found(truth: ImageAnnotations, boxes: Tensor | None = None, scores: Tensor | None = None) -> Detections:
    """What a perfect network says about an image: true boxes and, within them, true masks."""
    boxes = torch.from_numpy(truth.boxes).float() if boxes is None else boxes
    masks = torch.from_numpy(truth.masks())
    return Detections(
        height=truth.height,
        width=truth.width,
        boxes=boxes,
        scores=torch.linspace(0.99, 0.2, len(boxes)) if scores is None else scores,
        labels=torch.from_numpy(truth.labels),
        probabilities=mask_targets(masks, boxes, torch.arange(len(boxes))),
        class_names=tuple("0123456789"),
        category_ids=IDS,
    )


def test_true_boxes_and_masks_have_an_average_precision_of_one(data: Data) -> None:
    all_truths = truths(data)
    results = [one for truth in all_truths for one in as_found(truth).to_coco(truth.image_id)]
    found = average_precision([truth_record(truth, IDS) for truth in all_truths], results, IDS).metrics
    assert list(found) == list(DetectionTask.metrics)
    assert min(found.values()) >= 0.99


def test_the_metrics_are_those_of_pycocotools_with_crowds(data: Data) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    all_truths, results = [], []
    for number, truth in enumerate(truths(data)):
        crowd = np.arange(len(truth.labels)) == number  # one object of each image
        truth = replace(truth, crowd=crowd, image_id=100 - number)
        all_truths.append(truth)
        boxes = torch.from_numpy(truth.boxes).float()
        moved = as_found(truth, boxes + torch.randn(boxes.shape) * 3, torch.rand(len(boxes)))
        results += moved.to_coco(truth.image_id) + as_found(truth).to_coco(truth.image_id)[:2]
    records = [truth_record(truth, IDS) for truth in all_truths]
    found = average_precision(records, results, IDS).metrics
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = dataset(records, IDS)
        reference.createIndex()
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(reference, reference.loadRes([dict(one) for one in results]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            expected = evaluation.stats[:3].tolist()
            assert [found[f"{name}_{part}"] for part in ("ap", "ap50", "ap75")] == pytest.approx(expected, abs=1e-12)
            assert 0.1 < expected[0] < 0.95
    assert "id" not in results[0]


def test_nothing_found_is_zero_and_nothing_annotated_is_refused(data: Data) -> None:
    records = [truth_record(truth, IDS) for truth in truths(data)]
    assert set(average_precision(records, [], IDS).metrics.values()) == {0.0}
    empty = [record | {"annotations": []} for record in records]
    with pytest.raises(ValueError, match="no object is annotated in the validation images; give a validation set with"):
        average_precision(empty, [], IDS)


def test_results_are_in_pixels_of_the_own_image_and_are_json(task: DetectionTask, network: MaskRCNN) -> None:
    picture = Image.new("RGB", (300, 200), "gray")  # becomes 96 x 64
    image = task.preprocess()(picture)
    assert image.shape == (3, 64, 96)
    (found,) = task.predict(network, image[None])
    assert isinstance(found, Detections)
    own = found.resized(200, 300)
    scale = torch.tensor([300 / 96, 200 / 64] * 2)
    torch.testing.assert_close(own.boxes, found.boxes * scale)
    results = json.loads(json.dumps(own.to_coco(7)))
    assert len(results) == len(found.boxes) > 0
    for one, box, mask in zip(results, own.boxes.tolist(), own.masks(), strict=True):
        assert one["bbox"] == pytest.approx([box[0], box[1], box[2] - box[0], box[3] - box[1]])
        assert one["image_id"] == 7
        assert one["segmentation"]["size"] == [200, 300]
        decoded = decode_mask(one["segmentation"]["counts"].encode(), 200, 300)
        assert np.array_equal(decoded.astype(bool), mask.numpy())


def sample(side: tuple[int, int], number: int) -> Sample:
    truth = ImageAnnotations(
        image_id=number,
        height=side[0],
        width=side[1],
        boxes=np.array([[4.0, 5, 30, 40]]),
        labels=np.array([number]),
        areas=np.array([910.0]),
        crowd=np.array([False]),
        outlines=(encode_mask(np.ones(side)),),
    )
    target = SceneTarget(torch.tensor([[4.0, 5, 30, 40]]), torch.tensor([number]), None, truth)
    return Sample(torch.randn(3, *side, generator=torch.Generator().manual_seed(number)), target)


class Listed:
    """Batches in a list."""

    skipped = 0

    def __init__(self, *batches: SceneBatch) -> None:
        self.batches = batches

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[SceneBatch]:
        yield from self.batches[start:]


def test_results_do_not_depend_on_batch_mates(
    task: DetectionTask, network: MaskRCNN, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def note(*given: Any) -> AveragePrecision:
        seen.append(given)
        return AveragePrecision({}, {}, [])

    monkeypatch.setattr("mpvg.tasks.detection.average_precision", note)
    samples = [sample((50, 60), 1), sample((64, 96), 2), sample((90, 33), 3)]
    together = Listed(collate_scenes(samples))
    alone = Listed(*(collate_scenes([one]) for one in samples))
    assert task.evaluate(network, together).images == task.evaluate(network, alone).images == 3
    assert seen[0] == seen[1]
    assert len(seen[0][1]) > 10


def test_processes_count_each_image_once(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one after the other; four images, of which each reads two."""
    data = open_data(config, Shard(CPU), DetectionTask.make_pipeline)
    task = DetectionTask(config, data.info, DetectionOptions(**SMALL))
    model = task.build_model(init=True)
    alone = task.evaluate(model, data.val)
    gathered: dict[int, list[Any]] = {0: [], 1: []}
    for rank in (1, 0):
        own = open_data(config, Shard(CPU, rank, 2), DetectionTask.make_pipeline).val
        calls = iter(range(2))

        def gather(mine: list[Any], rank: int = rank, calls: Iterator[int] = calls) -> list[Any]:
            gathered[rank].append(mine)
            number = next(calls)
            return mine + (gathered[1][number] if rank == 0 else [])

        monkeypatch.setattr("mpvg.tasks.detection.gather_object", gather)
        monkeypatch.setattr("mpvg.tasks.detection.broadcast_object_list", lambda metrics: metrics)
        accelerator: Any = SimpleNamespace(num_processes=2, is_main_process=rank == 0, unwrap_model=lambda model: model)
        found = task.evaluate(model, own, accelerator)
    assert [len(gathered[rank][0]) for rank in (0, 1)] == [2, 2]
    assert found == alone


def command(config: RunConfig, out: Path) -> list[str]:
    given = {
        "recipe": "canvas_detection",
        "data": config.data,
        "task_options": json.dumps(SMALL),
        "epochs": 2,
        "network.drop_path": 0.1,
        "save_steps": 1,
        "threads": 1,
        "device": "cpu",
    }
    return ["train", "--out", str(out), *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def die_at(step: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command that ends without any warning before a step, counted from 1."""
    original, steps = DetectionTask.prepare, iter(range(1, 1000))

    def prepare(self: DetectionTask, batch: SceneBatch) -> SceneBatch:
        if next(steps) == step:
            raise Death
        return original(self, batch)

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(DetectionTask, "prepare", prepare)
        main(arguments)


def tells_of_mistakes(run: Path, out: Path, box_ap: float) -> None:
    assert main(["evaluate", str(run), "--out", str(out)]) == 0
    told = json.loads((out / "results.json").read_text())
    assert told["metrics"]["box_ap"] == box_ap
    known = [row[1] for row in told["tables"]["classes"]["rows"] if row[1] is not None]
    assert sum(known) / len(known) == pytest.approx(box_ap)
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 4
    assert (out / "precision-recall.png").is_file()


def test_it_trains_dies_resumes_evaluates_predicts_and_is_listed(
    config: RunConfig, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*command(config, whole), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "memory: about" in printed
    assert not whole.exists()
    assert main(command(config, whole)) == 0
    assert "done: box AP " in capsys.readouterr().out
    die_at(2, command(config, killed), monkeypatch)
    die_at(3, ["train", "--resume", str(killed)], monkeypatch)  # in the second epoch
    assert main(["train", "--resume", str(killed)]) == 0
    assert weight_files(killed) == weight_files(whole)
    untimed = [
        [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in load(run).metrics()]
        for run in (whole, killed)
    ]
    assert untimed[0] == untimed[1]
    summary = load(whole).summary()
    assert summary is not None
    assert summary["best_metric"] == "box_ap"
    assert {"box_ap", "mask_ap", "best_box_ap"} <= summary.keys()

    capsys.readouterr()
    assert main(["evaluate", str(whole)]) == 0
    last = load(whole).metrics()[-1]
    assert f"box AP {100 * last['box_ap']:.2f} %" in capsys.readouterr().out
    tells_of_mistakes(whole, tmp_path / "mistakes", last["box_ap"])
    capsys.readouterr()
    used(whole, scenes, tmp_path, capsys)
    started = with_init_file(replace(config, network=NetworkConfig(init=str(whole)))).network.init
    assert started is not None
    assert (whole / "checkpoints/best").resolve() / "model.safetensors" == Path(started).resolve()
    assert "best" not in started


def used(whole: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run is listed, drawn, and predicts."""
    assert main(["runs", str(tmp_path)]) == 0
    assert "box AP" in capsys.readouterr().out
    assert main(["plot", str(whole), "--out", str(tmp_path / "curves.png")]) == 0
    picture = scenes / "images/validation/000001.png"
    assert main(["predict", str(whole), str(picture), "--out", str(tmp_path / "found")]) == 0
    assert " with a score below 30 %" in capsys.readouterr().out
    with Image.open(tmp_path / "found/000001.png.drawn.png") as drawn:
        assert drawn.size == (128, 128)
    results = json.loads((tmp_path / "found/000001.png.json").read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == results[0].keys()
    capsys.readouterr()
    for command in ("analyze RUN", "explore RUN", "resolutions RUN --sizes 64", "readout digits RUN"):
        assert main([str(whole) if word == "RUN" else word for word in command.split()]) == 2
        said = capsys.readouterr().err
        assert said.endswith(f"{whole} is a run of detection; give a run of classification\n"), said
        assert said.count("\n") == 1


def test_objects_are_named_and_drawn(data: Data) -> None:
    truth = truths(data)[0]
    found = as_found(truth, scores=torch.linspace(0.95, 0.1, len(truth.labels)))
    certain = int((found.scores >= 0.3).sum())
    lines = found.lines()
    left, top, right, bottom = map(round, truth.boxes[0].tolist())
    assert lines[0] == f" 95.00 %  {truth.labels[0]}, {left}, {top} to {right}, {bottom}"
    assert lines[-1] == f"{len(truth.labels) - certain} with a score below 30 %"
    assert len(lines) == certain + 1
    black = Image.new("L", (truth.width, truth.height))
    drawn = np.asarray(found.draw(black))
    assert drawn.shape == (truth.height, truth.width, 3)
    inside = found.masks()[0].numpy()
    assert (drawn[inside] > 0).any(axis=-1).mean() > 0.95
    twice = replace(found, **{name: getattr(found, name)[[0, 0]] for name in ("boxes", "scores", "labels")})
    twice = replace(twice, probabilities=found.probabilities[[0, 0]])
    assert (np.asarray(twice.draw(black))[inside] > 0).any(axis=-1).mean() > 0.95
    uncertain = replace(found, scores=found.scores * 0)
    assert not np.asarray(uncertain.draw(black)).any()
    assert uncertain.lines() == [f"{len(truth.labels)} with a score below 30 %"]


def test_the_transformer_starts_from_a_classifier_of_any_method(config: RunConfig, data: Data, tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = create_model("vit_canvas_patch16_64", "gap", num_classes=10)
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    config = replace(config, network=NetworkConfig(init=str(tmp_path / "classifier.safetensors")))
    model = DetectionTask(config, data.info, DetectionOptions(**SMALL)).build_model(init=True)
    own: Any = classifier
    assert torch.equal(model.body.vit.blocks[2].mlp.fc1.weight, own.blocks[2].mlp.fc1.weight)
    assert model.load_report is not None
    assert len(model.load_report.taken) > 40


def test_an_estimate_is_what_a_step_keeps(config: RunConfig) -> None:
    from mpvg.training.estimate import example_batch, kept_for_backward, step_bytes

    trainer = Trainer.create(config, quiet=True)
    before = {name: value.clone() for name, value in trainer.state.network.state_dict().items()}
    batch = example_batch(trainer)
    assert batch.size == 4
    whole, half = (kept_for_backward(trainer, batch.split(size)[0]) for size in (4, 2))
    assert 1.5 < whole / half < 2.5
    fixed, per_image = step_bytes(trainer, 4)
    assert 4 * per_image == pytest.approx(whole, rel=0.2)
    assert fixed > sum(value.nbytes for value in before.values())
    after = trainer.state.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_sizes": [8, 16]}, r"task_options.anchor_sizes is \(8, 16\); allowed: five numbers > 0"),
        ({"channels": 0}, "task_options.channels is 0; allowed: a whole number >= 1"),
        ({"short_sides": []}, r"task_options.short_sides is \(\); allowed: at least one side"),
        ({"chanels": 3}, "unknown config key 'task_options.chanels'; did you mean task_options.channels"),
    ],
)
def test_options_out_of_range_are_refused(config: RunConfig, data: Data, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_task(replace(config, task_options=options), data.info)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"img_size": 64}, "network.img_size is 64, which is for image classification; leave it out; image sizes are"),
        ({"readout": "method"}, "network.readout is 'method', which is for image classification; leave it out"),
        ({"pooling": "max"}, "network.pooling is 'max', which is for image classification; leave it out"),
        ({"registers": 4}, "network.registers is 4, which is for image classification; leave it out"),
        (
            {"init": "pretrained"},
            "network.init is 'pretrained', which is for image classification; give a file, or the",
        ),
    ],
)
def test_what_is_for_classification_is_refused(
    config: RunConfig, data: Data, network: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create_task(replace(config, network=NetworkConfig(**network)), data.info)


def test_data_without_classes_and_a_missing_package_are_refused(
    config: RunConfig, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="has no classes, so there is nothing to detect; give data in COCO's layout"):
        create_task(config, replace(data.info, class_names=(), category_ids=()))
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"the metrics of detection need faster-coco-eval .*mpvg\[det\]"):
        DetectionTask.make_pipeline(config, data.info, "train", CPU)


def test_the_recipe_of_the_paper_is_built_at_its_size() -> None:
    config = recipe("coco_mask_rcnn_vit_adapter_tiny")
    assert (config.batch_size, config.lr, config.optim.milestones) == (8, 1e-4, (27.0, 33.0))
    options = DetectionOptions(**config.task_options)
    assert options.anchor_sizes == (32, 64, 128, 256, 512)
    assert options.short_sides[0] == 480
