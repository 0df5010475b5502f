"""The predictor and `mpvg predict`: the same answer for every form of an image, and what goes wrong said in a line."""

import csv
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mpvg
from hostile import exif, smooth, with_exif
from mpvg.cli.main import main
from mpvg.data.images import Orientation, read_image
from mpvg.inference import Predictor, predictor
from mpvg.inference.backends import RunBackend
from mpvg.inference.export import export_run
from mpvg.inference.sources import check_names, find_images
from mpvg.models.network import OutputError
from mpvg.runs import load
from mpvg.tasks import Prediction
from mpvg.tasks.classification import TopClasses

FORMAT_1 = Path(__file__).parents[1] / "fixtures" / "run-format-1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of digits, of which images are turned as their EXIF data say."""
    path = tmp_path_factory.mktemp("predictor") / "run"
    shutil.copytree(FORMAT_1 / "run", path, symlinks=True)
    config = path / "config.yaml"
    config.write_text(f"orientation: exif\n{config.read_text()}")
    return path


@pytest.fixture(scope="module")
def asked(run: Path) -> Predictor:
    return mpvg.Predictor(run)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures in a folder and in folders below it, and what is no picture."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("2.png", "10.png", "a/1.png", "a/b/1.png", "a/b/3.bmp", *(f"c/{n}.png" for n in range(7))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(rng, 9, 12)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


def classes(found: list[Prediction]) -> list[Any]:
    return [one.classes for one in found if isinstance(one, TopClasses)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if code == 2:
        assert said.count("mpvg: error: ") == 1
    return said


# ---- forms of an image


def test_every_form_of_an_image_gets_the_same_answer(asked: Predictor, tmp_path: Path) -> None:
    pixels = smooth(np.random.default_rng(0), 24, 32)
    gray = pixels[..., 0]
    for name, array in (("color", pixels), ("gray", gray)):
        path = tmp_path / f"{name}.png"
        Image.fromarray(array).save(path)
        forms = [path, str(path), Image.open(path), Image.fromarray(array), array]
        (expected,) = classes(asked.predict(path))
        assert len(expected) == 5
        for form in forms:
            assert classes(asked.predict(form)) == [expected]
        found = classes(asked.predict(forms))  # in one batch, in which the last bits may be others
        assert len(found) == len(forms)
        for one in found:
            assert [label for label, _ in one] == [label for label, _ in expected]
            assert [p for _, p in one] == pytest.approx([p for _, p in expected], abs=1e-6)
    batch = np.stack([pixels, pixels[::-1]])
    assert classes(asked.predict(batch)) == classes(asked.predict([batch[0], batch[1]]))
    assert asked.predict([]) == []


def test_it_answers_as_the_run_does_itself(asked: Predictor, run: Path, tmp_path: Path) -> None:
    Image.fromarray(smooth(np.random.default_rng(1), 24, 32)).save(tmp_path / "a.png")
    loaded = load(run)
    task, picture = loaded.task(), read_image(tmp_path / "a.png")
    expected = task.predict(loaded.model("best"), task.preprocess()(picture)[None])
    assert classes(asked.predict(tmp_path / "a.png")) == classes(expected)
    assert classes(Predictor(loaded).predict(tmp_path / "a.png")) == classes(expected)
    (two,) = classes(Predictor(run, top=2).predict(tmp_path / "a.png"))
    assert list(two) == list(classes(expected)[0][:2])


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_the_runs(asked: Predictor, run: Path, tmp_path: Path, turn: int) -> None:
    path = tmp_path / "phone.png"
    path.write_bytes(with_exif(smooth(np.random.default_rng(0), 8, 8), "png", exif(turn)))
    upright = classes(asked.predict(read_image(path, "exif")))
    stored = classes(asked.predict(read_image(path, "stored")))
    assert classes(asked.predict(path)) == classes(asked.predict(Image.open(path))) == upright
    assert (upright == stored) == (turn == 1)


def test_images_of_different_sizes_go_in_groups() -> None:
    class Sizes:
        orientation: Orientation = "exif"
        batch_size = 3

        def preprocess(self, image: Image.Image) -> Tensor:
            return torch.zeros(1, image.height, image.width)

        def predict(self, images: Tensor, top: int | None) -> list[Prediction]:
            shapes.append(tuple(images.shape))
            return [TopClasses(((f"{images.shape[-1]}", 1.0),)) for _ in images]

    shapes: list[tuple[int, ...]] = []
    arrays = [np.zeros((4, width), np.uint8) for width in (5, 5, 6, 5, 7)]
    sizes: Any = Sizes()
    found = classes(Predictor(sizes).predict(arrays))
    assert [one[0][0] for one in found] == ["5", "5", "6", "5", "7"]
    assert shapes == [(2, 1, 4, 5), (1, 1, 4, 6), (1, 1, 4, 5), (1, 1, 4, 7)]


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((8, 8, 3)), "of type float64, which has no known range"),
        (np.zeros((8, 8), np.float32), "of type float32, which has no known range"),
        (np.zeros((8, 8), np.int64), "of type int64; allowed: uint8 arrays"),
        (np.zeros((8, 8), bool), "of type bool; allowed: uint8 arrays"),
        (np.zeros((3, 8, 8), np.uint8), r"channels come last: array.transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 4), np.uint8), r"array\[..., :3\] leaves transparency out"),
        (np.zeros((8, 8, 1), np.uint8), r"array\[..., 0\] is gray"),
        (np.zeros((5, 8, 8), np.uint8), r"the shape \(5, 8, 8\).*or a list of gray ones"),
        (np.zeros((0, 8, 3), np.uint8), "give at least one pixel"),
        (np.zeros(8, np.uint8), r"the shape \(8,\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"holds a Tensor; .*\.permute\(1, 2, 0\)\.numpy\(\)"),
        ([torch.zeros(3, 8, 8)], "holds a Tensor"),
        (3, "holds a int; allowed: paths of image files"),
        ([None], "holds a NoneType"),
        ("missing.png", r"image missing\.png cannot be read \(FileNotFoundError"),
        (Image.new("F", (8, 8)), "the image cannot be read .*floating-point values"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_known_meaning_is_refused(asked: Predictor, images: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        asked.predict(images)


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    weights = run / "checkpoints/step-00000009/model.safetensors"
    with pytest.raises(ValueError, match=r"is weights alone: it does not say which network.*give the run folder"):
        Predictor(weights)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="is no run folder"):
        Predictor(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Predictor(tmp_path)
    for name in ("batch_size", "top"):
        with pytest.raises(ValueError, match=f"{name} is 0; allowed: a whole number >= 1"):
            Predictor(run, **{name: 0})


@pytest.mark.parametrize("kind", ["torch-export", "onnx", "hub-folder"])
def test_an_export_gives_the_predictions_of_its_run(kind: str, run: Path, tmp_path: Path) -> None:
    """From its folder or its file, prepared by the values beside it; a photograph has another size and other colors."""
    out = tmp_path / "export"
    export_run(load(run), out, kind, which="best")
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, shape, dtype=np.uint8) for shape in ((8, 8), (40, 30, 3), (9, 17, 3))]
    expected = Predictor(run).predict(images)
    for source in (out, out / json.loads((out / "preprocess.json").read_text())["file"]):
        for one, other in zip(Predictor(source).predict(images), expected, strict=True):
            assert [name for name, _ in one.classes] == [name for name, _ in other.classes]  # type: ignore[attr-defined]
            pairs = zip(one.classes, other.classes, strict=True)  # type: ignore[attr-defined]
            assert all(abs(a[1] - b[1]) < 1e-5 for a, b in pairs)


def test_an_export_with_other_classes_than_its_network_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    export_run(load(run), out, "onnx", which="best")
    values = json.loads((out / "preprocess.json").read_text())
    (out / "preprocess.json").write_text(json.dumps(values | {"class_names": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"allowed: logits \(1, 2\)"):
        Predictor(out).predict(np.zeros((8, 8), np.uint8))


@pytest.mark.parametrize("top", [None, 2])
def test_a_network_that_gives_no_logits_of_the_runs_classes_is_refused(run: Path, top: int | None) -> None:
    backend = RunBackend(load(run))
    backend._model = torch.nn.Flatten()
    with pytest.raises(OutputError, match=r"1 images give \(1, 64\); allowed: logits \(1, 10\)"):
        backend.predict(torch.zeros(1, 1, 8, 8), top)


def test_a_stream_of_one_image_is_one_prediction(run: Path, photos: Path) -> None:
    (found,) = Predictor(run).stream(str(photos / "2.png"))
    assert found.error is None


# ---- threads


def test_readers_leave_the_warning_filters_as_they_were(photos: Path) -> None:
    """Python has one set of filters for all threads, and decoding changes them."""
    path = photos / "2.png"
    before = list(warnings.filters)
    gate = threading.Barrier(8)

    def read(_: int) -> None:
        gate.wait()
        for _ in range(40):
            read_image(path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert list(warnings.filters) == before


def test_only_so_many_images_are_read_ahead(asked: Predictor) -> None:
    taken = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield np.zeros((8, 8), np.uint8)

    stream: Any = asked.stream(images())
    next(stream)
    assert taken <= 2 * asked.batch_size + predictor._MAX_READERS
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mpvg-reader")]


# ---- files, folders, globs


def test_folders_and_globs_are_searched(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_images([str(photos)])
    below = ["2.png", "10.png", "a/1.png", "a/b/1.png", "a/b/3.bmp", *(f"c/{n}.png" for n in range(7))]
    assert [image.name for image in found] == below
    assert [image.path for image in found] == [str(photos / name) for name in below]
    monkeypatch.chdir(photos)
    for pattern, expected in (
        ("*.png", ["10.png", "2.png"]),
        ("**/1.png", ["a/1.png", "a/b/1.png", "c/1.png"]),
        ("a/*", ["b/1.png", "b/3.bmp", "1.png"]),
        ("c/[01].png", ["0.png", "1.png"]),
    ):
        assert sorted(image.name for image in find_images([pattern])) == sorted(expected)
    (photos / "[x].png").write_bytes((photos / "2.png").read_bytes())
    assert [image.path for image in find_images(["[x].png"])] == ["[x].png"]
    with pytest.raises(ValueError, match=r"would both be called 1\.png"):
        check_names(find_images(["a/1.png", "c/1.png"]))
    check_names(found)


def test_what_has_no_image_is_refused(
    run: Path, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty/inner").mkdir(parents=True)
    assert f"folder {tmp_path / 'empty'} has no images; allowed endings: .jpg" in refused(
        capsys, "predict", run, tmp_path / "empty"
    )
    assert f"no image matches '{photos}/*.gif'" in refused(capsys, "predict", run, photos / "*.gif")
    said = refused(capsys, "predict", run, photos / "2.png", photos / "10.png", "--out", tmp_path / "out")
    assert "this run says nothing about places in an image; leave it out" in said
    assert not (tmp_path / "out").exists()
    for broken in ("x.png", "y.png"):
        (tmp_path / broken).write_text("no image")
    said = refused(capsys, "predict", run, tmp_path / "x.png", tmp_path / "y.png")
    assert said.splitlines()[-1].startswith("mpvg: error: none of the 2 images can be read")
    said = refused(capsys, "predict", run, tmp_path / "x.png", "--json", tmp_path / "one.json")
    assert f"image {tmp_path / 'x.png'} cannot be read" in said
    (record,) = json.loads((tmp_path / "one.json").read_text())
    assert record["image"] == str(tmp_path / "x.png")
    assert "cannot be read" in record["error"]


def test_outputs_that_exist_are_refused(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, taken = photos / "2.png", photos / "notes.txt"
    for kind in ("json", "jsonl", "csv"):
        assert f"--{kind} {taken} exists; give another name" in refused(
            capsys, "predict", run, image, f"--{kind}", taken
        )
        said = refused(capsys, "predict", run, image, f"--{kind}", photos / "none/x")
        assert f"there is no folder {photos / 'none'}" in said
    assert taken.read_text() == "no picture"
    assert "is not an empty folder; give another name" in refused(capsys, "predict", run, image, "--out", photos)
    assert f"there is no folder {photos / 'none'}" in refused(capsys, "predict", run, image, "--out", photos / "none/x")
    assert not (photos / "none").exists()
    assert "- is given for two formats" in refused(capsys, "predict", run, image, "--json", "-", "--csv", "-")


# ---- the command


def test_a_broken_image_among_good_ones_is_named(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a/0.png").write_text("no image")
    files = {kind: tmp_path / f"found.{kind}" for kind in ("json", "jsonl", "csv")}
    flags = [text for kind, file in files.items() for text in (f"--{kind}", str(file))]
    said = refused(capsys, "predict", run, photos, *flags, "--top", "3", "--batch_size", "4", code=1)
    assert f"mpvg: warning: image {photos / 'a/0.png'} cannot be read (UnidentifiedImageError" in said
    assert said.splitlines()[-1] == "mpvg: warning: 1 of 13 images cannot be read; they are named above"
    lines = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    assert json.loads(files["json"].read_text()) == lines
    names = [image.path for image in find_images([str(photos)])]
    assert [line["image"] for line in lines] == names
    (broken,) = [line for line in lines if "error" in line]
    assert broken["image"] == str(photos / "a/0.png")
    assert all(len(line["found"]) == 3 for line in lines if line is not broken)
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"], row["class"]) for row in rows] == [
        (line["image"], str(rank), one["class"])
        for line in lines
        if line is not broken
        for rank, one in enumerate(line["found"], 1)
    ]


def test_programs_get_standard_output_alone(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, count in (("jsonl", 12), ("csv", 1 + 12 * 5)):
        capsys.readouterr()
        assert main(["predict", str(run), str(photos), f"--{kind}", "-"]) == 0
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == count
        assert "weights: best" in printed.err
    assert main(["predict", str(run), str(photos), "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 12
    assert main(["predict", str(run), str(photos)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 12 * 6


def test_an_interruption_keeps_what_is_done(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered, answer = 0, RunBackend.predict

    def predict(self: RunBackend, images: Tensor, top: int | None) -> list[Prediction]:
        nonlocal answered
        answered += 1
        if answered == 3:
            raise KeyboardInterrupt
        return answer(self, images, top)

    monkeypatch.setattr(RunBackend, "predict", predict)
    files = {kind: tmp_path / f"found.{kind}" for kind in ("json", "jsonl", "csv")}
    flags = [text for kind, file in files.items() for text in (f"--{kind}", str(file))]
    said = refused(capsys, "predict", run, photos, *flags, "--batch_size", "4", code=130)
    assert said.endswith("interrupted after 8 of 12 images; these are complete\n")
    assert len(json.loads(files["json"].read_text())) == 8
    assert len(files["jsonl"].read_text().splitlines()) == 8
    assert len(files["csv"].read_text().splitlines()) == 1 + 8 * 5
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
