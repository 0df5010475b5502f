"""`mpvg evaluate --out`: every number against a plain writing, and a page that asks for nothing."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mpvg.cli.main import main
from mpvg.data import DataInfo, ImageBatch
from mpvg.data.annotations import ImageAnnotations
from mpvg.inference.mistakes import PAGE, reviewing, sample_names, write_mistakes
from mpvg.tasks.classification import ClassificationTask, evaluate
from mpvg.tasks.classification_review import BINS, ClassificationRecord, calibration_chart, calibration_error
from mpvg.tasks.detection_review import count_errors
from mpvg.tasks.detections import Detections
from mpvg.tasks.review import EXAMPLES, Review
from mpvg.tasks.segmentation import confusion, scores
from mpvg.tasks.segmentation_review import SegmentationRecord

FORMAT_1 = Path(__file__).parents[1] / "fixtures" / "run-format-1"
RNG = np.random.default_rng(0)


def info(names: str = "abc") -> DataInfo:
    return DataInfo(
        name="x",
        class_names=tuple(names),
        in_chans=1,
        img_size=4,
        mean=(0.5,),
        std=(0.5,),
        train_size=0,
        val_size=40,
    )


class Known(nn.Module):
    """Gives the logits that are written in the first pixels of an image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :3]


class Batches:
    """Random images in batches of 8, with names, of which number 5 cannot be read."""

    def __init__(self) -> None:
        self.unreadable, self.skipped = {5}, 1
        self.images = torch.from_numpy(RNG.normal(size=(40, 1, 4, 4))).float()
        self.targets = torch.from_numpy(RNG.integers(0, 2, 40))  # class c has no image

    def name(self, number: int) -> str:
        return f"<img {number}>"

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[ImageBatch]:
        yield from (ImageBatch(*pair) for pair in zip(self.images.split(8), self.targets.split(8), strict=True))


def reviewed(batches: Any) -> Review:
    record = ClassificationRecord(info())
    return record.review(evaluate(Known(), batches, watch=record.watch))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mistakes of a small run, made by the command."""
    root = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(FORMAT_1 / "run", root / "run", symlinks=True)
    assert main(["evaluate", str(root / "run"), "--out", str(root / "out")]) == 0
    return root / "out"


# ---- numbers


def test_scores_of_classes_are_those_of_plain_loops() -> None:
    batches = Batches()
    review = reviewed(batches)
    targets = batches.targets.tolist()
    taken = batches.images.flatten(1)[:, :3].argmax(dim=1).tolist()
    by_class, pairs, matrix = review.tables
    for label, row in enumerate(by_class.rows):
        right = sum(t == p == label for t, p in zip(targets, taken, strict=True))
        found, true = taken.count(label), targets.count(label)
        assert row[0] == "abc"[label]
        assert row[1] == (pytest.approx(right / found) if found else None)
        assert row[2] == (pytest.approx(right / true) if true else None)
        assert row[3] == pytest.approx(2 * right / (found + true))
        assert row[4] == true
    counts = [[sum(t == i and p == j for t, p in zip(targets, taken, strict=True)) for j in range(3)] for i in range(3)]
    assert [list(row[1:]) for row in matrix.rows] == counts
    wrong = sorted((-counts[i][j], i, j) for i in range(3) for j in range(3) if i != j and counts[i][j])
    assert [row[:3] for row in pairs.rows] == [("abc"[i], "abc"[j], -count) for count, i, j in wrong]
    assert review.evaluation.metrics["accuracy"] == sum(t == p for t, p in zip(targets, taken, strict=True)) / 40


def test_the_most_confident_mistakes_are_shown() -> None:
    batches = Batches()
    review = reviewed(batches)
    certainty = batches.images.flatten(1)[:, :3].softmax(dim=1)
    values, taken = certainty.max(dim=1)
    wrong = [n for n in range(40) if taken[n] != batches.targets[n]]
    expected = sorted(wrong, key=lambda n: -float(values[n]))[:EXAMPLES]
    assert [one.index for one in review.examples] == expected
    first = review.examples[0]
    assert first.lines[1] == f"prediction {'abc'[taken[expected[0]]]}, {100 * float(values[expected[0]]):.1f} %"
    pixels = ((batches.images[expected[0], 0] / 2 + 0.5).clamp(0, 1) * 255).numpy()
    assert np.abs(np.asarray(first.picture)[..., 0] - pixels).max() <= 1
    for number, line in enumerate(review.predictions):
        assert line["prediction"] == "abc"[taken[number]]
        assert line["probability"] == pytest.approx(float(values[number]))
        assert line["target_probability"] == pytest.approx(float(certainty[number, batches.targets[number]]))


@pytest.mark.parametrize("kind", ["random", "edges", "one"])
def test_the_calibration_error_is_that_of_a_plain_loop(kind: str) -> None:
    certainty = {"random": RNG.random(500), "edges": np.arange(16) / 15, "one": np.array([0.7])}[kind]
    right = RNG.random(len(certainty)) < 0.5
    expected = 0.0
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        inside = [n for n in range(len(certainty)) if low < certainty[n] <= high or (number == 0 and certainty[n] == 0)]
        if inside:
            gap = abs(np.mean([right[n] for n in inside]) - np.mean([certainty[n] for n in inside]))
            expected += len(inside) / len(certainty) * gap
    chart = calibration_chart(certainty, right)
    assert sum(chart.counts) == len(certainty)
    if kind != "edges":  # an edge in floating point is a matter of its last bit
        assert calibration_error(chart) == pytest.approx(expected)


def test_segmentation_is_scored_class_by_class() -> None:
    labels = torch.from_numpy(RNG.integers(0, 2, (2, 8, 8)))
    labels[0, :2] = 255
    found = torch.from_numpy(RNG.integers(0, 2, (2, 8, 8)))
    color = DataInfo(
        name="x", class_names=("a", "b", "c"), in_chans=3, img_size=8, mean=(0.5,) * 3, std=(0.5,) * 3,
        train_size=0, val_size=2,
    )  # fmt: skip
    record = SegmentationRecord(color)
    for one, other in zip(found, labels, strict=True):
        record.watch(torch.zeros(1, 3, 8, 8), one, other, confusion(one, other, 3))
    review = record.review(scores)
    for label, row in enumerate(review.tables[0].rows):
        known = labels != 255
        both = int(((found == label) & (labels == label)).sum())
        true, taken = int((labels == label).sum()), int(((found == label) & known).sum())
        assert row[1] == (pytest.approx(both / (true + taken - both)) if true + taken else None)
        assert row[2] == (pytest.approx(both / true) if true else None)
        assert row[3] == true
    ious = [one["miou"] for one in review.predictions]
    assert [one.index for one in review.examples] == sorted(range(2), key=lambda n: ious[n])
    assert review.examples[0].picture.width == 2 * 8 + 4


def test_objects_are_found_missed_or_false() -> None:
    truth = ImageAnnotations(
        image_id=1, height=100, width=100,
        boxes=np.array([[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60], [0, 0, 90, 90]], float),
        labels=np.array([0, 1, 1, 0]), areas=np.ones(4), crowd=np.array([False, False, False, True]), outlines=(),
    )  # fmt: skip
    found = Detections(
        height=100, width=100,
        # found, found, of another class, twice the same, too far away, not certain enough
        boxes=torch.tensor([[0, 0, 10, 9], [21, 20, 40, 40], [50, 50, 60, 60], [20, 20, 40, 40], [55, 55, 70, 70],
                            [50, 50, 60, 60]]).float(),
        scores=torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.2]), labels=torch.tensor([0, 1, 0, 1, 1, 1]),
        probabilities=torch.zeros(6, 28, 28), class_names=("a", "b"), category_ids=(1, 2),
    )  # fmt: skip
    assert count_errors(found, truth) == (2, 1, 3)


# ---- files


def test_names_are_those_of_the_images_that_were_read() -> None:
    batches: Any = Batches()
    assert sample_names(batches, 39) == [f"<img {n}>" for n in range(40) if n != 5]
    assert sample_names(SimpleNamespace(skipped=0), 3) == [None] * 3


def test_the_files_are_there_and_agree(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in written.iterdir()} == {
        *("mistakes.html", "results.json", "predictions.jsonl", "classes.csv", "confused.csv", "confusion.csv"),
        *("confusion.png", "reliability.png"),
    }
    lines = [json.loads(line) for line in (written / "predictions.jsonl").read_text().splitlines()]
    results = json.loads((written / "results.json").read_text())
    assert len(lines) == results["images"] == 360
    assert lines[7]["sample"] == "number 7"
    right = sum(line["target"] == line["prediction"] for line in lines)
    assert results["metrics"]["accuracy"] == pytest.approx(right / 360)
    with (written / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert sum(int(cell) for row in rows[1:] for cell in row[1:]) == 360
    with (written / "classes.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list("0123456789")
    for name in ("confusion", "reliability"):
        with Image.open(written / f"{name}.png") as picture:
            assert picture.width > 500
    capsys.readouterr()
    assert main(["evaluate", str(written.parent / "run")]) == 0
    assert f"accuracy {100 * results['metrics']['accuracy']:.2f} %" in capsys.readouterr().out


class Tags(HTMLParser):
    """All attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_for_nothing_and_is_labelled(written: Path) -> None:
    text = (written / PAGE).read_text()
    page = Tags()
    page.feed(text)
    for tag, attributes in page.found:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes[name])
        assert tag != "script"
        assert tag != "img" or attributes["alt"]
    assert "http" not in text
    assert not re.search(r"url\(|@import|<!--", text)
    tables = [tag for tag, _ in page.found if tag == "table"]
    assert len(tables) == len([tag for tag, _ in page.found if tag == "caption"]) == 4
    assert text.count('class="scroll" role="region" tabindex="0" aria-label=') == len(tables)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert len([tag for tag, _ in page.found if tag == "img"]) == EXAMPLES + 2
    scores = json.loads((written / "results.json").read_text())
    for title, value in (("accuracy", f"{100 * scores['metrics']['accuracy']:.2f} %"), ("ECE", f"{scores['ece']:.4f}")):
        assert re.search(rf">{title}</th>\s*<td[^>]*>{re.escape(value)}<", text)


def test_names_from_data_are_text(tmp_path: Path) -> None:
    batches: Any = Batches()
    batches.unreadable, batches.skipped = set(), 0

    class Task:
        metrics = ClassificationTask.metrics

        def review(self, model: nn.Module, batches: Any) -> Review:
            return reviewed(batches)

    write_mistakes(tmp_path / "out", Task(), Known(), batches, title="<script>", weights="<b>")
    text = (tmp_path / "out" / PAGE).read_text()
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;img " in text


# ---- refusals


def test_an_output_that_exists_is_refused_before_any_work(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written.parent / "run"
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (written, tmp_path / "file", tmp_path / "link"):
        capsys.readouterr()
        assert main(["evaluate", str(run), "--out", str(out)]) == 2
        assert f"--out {out} exists and is not an empty folder; give another name" in capsys.readouterr().err
    assert main(["evaluate", "none", "--out", str(tmp_path / "a/b")]) == 2
    assert f"there is no folder {tmp_path / 'a'}; make it first" in capsys.readouterr().err


def test_nothing_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: Any = Batches()
    batches.unreadable, batches.skipped = set(), 0

    class Task:
        metrics = ClassificationTask.metrics

        def review(self, model: nn.Module, batches: Any) -> Review:
            return reviewed(batches)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mpvg.inference.mistakes.atomic_text", stop)
    with pytest.raises(KeyboardInterrupt):
        write_mistakes(tmp_path / "out", Task(), Known(), batches, title="a", weights="b")
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_does_not_tell_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'center' has no `review`; leave it out"):
        reviewing(SimpleNamespace(), "center")
