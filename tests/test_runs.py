"""What a run leaves on disk, and what comes back from there."""

import errno
import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mpvg import runs
from mpvg.cli.main import main
from mpvg.config import LoaderConfig, NetworkConfig, RunConfig
from mpvg.delivery import DeliverySpec
from mpvg.files import cannot_write, check_place, read_regular, write_json
from mpvg.recipes import recipe
from mpvg.runs import checkpoints, environment
from mpvg.runs.checkpoints import (
    Checkpoint,
    CorruptCheckpointError,
    checkpoint_folder,
    latest_valid_checkpoint,
    read_checkpoint,
    remove_unused,
    rollback_to,
    save_checkpoint,
    verify,
)
from mpvg.runs.metrics import append_metrics, read_metrics, write_metrics
from mpvg.runs.reading import read_config
from mpvg.training import loop, resume, train

OWN = DeliverySpec(pool="token", first_layer=0, hierarchical=False, last_index=3)
"""A researcher's own method, which has no name."""


def config_for(out: Path, **changes: Any) -> RunConfig:
    base = replace(recipe(None, "digits"), epochs=1, batch_size=256, device="cpu", threads=1, out=str(out))
    return replace(base, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an own method, for one epoch."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "run"
    train(config_for(path, method=OWN.to_dict(), ema_decay=0.5), quiet=True)
    return path


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The run's files, to be damaged; it can be resumed, as its summary is missing."""
    path = tmp_path / "copy"
    shutil.copytree(trained, path, symlinks=True)
    (path / "summary.json").unlink()
    return path


def sign(folder: Path) -> None:
    """Makes the hashes of a checkpoint those of its files."""
    files = [file for file in folder.iterdir() if file.name != "checksums.json"]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / "checksums.json").write_text(json.dumps(hashes))


# ---- what is written


def test_a_run_folder_holds_what_is_promised(trained: Path) -> None:
    names = {str(file.relative_to(trained)) for file in trained.rglob("*") if not file.is_dir() or file.is_symlink()}
    step = "checkpoints/step-00000005"
    assert names == {
        "config.yaml",
        "environment.json",
        "data.json",
        "listing-train.txt.gz",
        "listing-val.txt.gz",
        "metrics.jsonl",
        "summary.json",
        "checkpoints/last",
        "checkpoints/best",
        *(f"{step}/{name}" for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")),
        f"{step}/checksums.json",
    }


def test_the_config_is_the_resolved_one(trained: Path) -> None:
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert written == {"format": 2, **config_for(trained, method=OWN.to_dict(), ema_decay=0.5).to_dict()}
    assert runs.load(trained).config == config_for(trained, method=OWN.to_dict(), ema_decay=0.5)


def test_the_threads_that_were_used_are_written(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    trainer = loop.Trainer.create(config_for(tmp_path / "run", threads=None), quiet=True)
    run = runs.create_run(trainer.config, trainer.data.info)
    assert runs.load(run.path).config.threads == 2
    assert json.loads((run.path / "environment.json").read_text())["threads"] == 2


def test_the_environment_names_what_the_numbers_depend_on(trained: Path) -> None:
    values = json.loads((trained / "environment.json").read_text())
    assert values.keys() == {"date", "command", "python", "versions", "commit", "hardware", "threads"}
    assert values["threads"] == 1
    assert values["versions"]["torch"] == metadata.version("torch")
    assert values["versions"].keys() >= {"mpvg", "torch", "timm", "numpy"}
    assert f"{os.cpu_count()} cores" in values["hardware"]


def test_the_data_are_described(trained: Path) -> None:
    info = runs.load(trained).info
    assert info.class_names == tuple("0123456789")
    assert (info.name, info.in_chans, info.img_size, info.train_size, info.val_size) == ("digits", 1, 8, 1437, 360)


def test_the_summary_is_one_line_with_what_a_study_collects(trained: Path) -> None:
    text = (trained / "summary.json").read_text()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    summary = json.loads(text)
    run = runs.load(trained)
    assert summary == run.summary()
    assert summary["config_hash"] == run.config.digest()
    assert summary["method"] == OWN.to_dict()
    assert summary["seed"] == 0
    assert summary["hardware"] == environment.hardware()
    assert summary["commit"] == environment.commit()
    (line,) = run.metrics()
    for name in ("accuracy", "nll", "ema_accuracy", "ema_nll"):
        assert summary[name] == line[name]
    assert summary["best_accuracy"] == line["accuracy"]
    assert summary["parameters"] == sum(parameter.numel() for parameter in run.model().parameters())


def test_the_commit_is_that_of_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = environment.commit()
    assert found is None or len(found.removesuffix("-dirty")) == 12
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.commit() is None


# ---- what comes back


def test_an_own_method_survives_the_folder_with_its_weights(trained: Path) -> None:
    run = runs.load(trained)
    model: Any = run.model()
    assert model.delivery.spec == OWN
    assert not model.training
    images, _ = next(iter(run.validation(torch.device("cpu")).epoch()))
    other: Any = run.task().build_model(init=False)
    other.load_state_dict(read_checkpoint(trained).tensors["model"])
    assert torch.equal(model(images), other.eval()(images))


@pytest.mark.parametrize("ema", [False, True])
def test_a_loaded_model_scores_what_the_metrics_say(trained: Path, ema: bool) -> None:
    run = runs.load(str(trained))
    (line,) = run.metrics()
    prefix = "ema_" if ema else ""
    for which in ("last", "best"):
        found = run.task().evaluate(run.model(which, ema=ema), run.validation(torch.device("cpu")))
        assert found.metrics == {name: line[f"{prefix}{name}"] for name in ("accuracy", "top5", "nll")}
    assert line["nll"] != line["ema_nll"]


def test_the_preprocessing_is_that_of_validation(trained: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    run = runs.load(trained)
    digits = load_digits()
    _, images, _, targets = train_test_split(
        digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    batch, classes = next(iter(run.validation(torch.device("cpu")).epoch()))
    assert classes.tolist() == targets[: len(classes)].tolist()
    for image, expected in zip(images[:20], batch, strict=False):
        picture = Image.fromarray((image * 255 / 16).round().astype("uint8"))
        assert torch.equal(run.preprocess()(picture), expected)


def test_a_config_of_a_run_trains_the_same_again(trained: Path, tmp_path: Path) -> None:
    config = replace(read_config(trained / "config.yaml"), out=str(tmp_path / "again"))
    train(config, quiet=True)
    weights = "checkpoints/last/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (trained / weights).read_bytes()


def test_there_are_no_averages_where_none_were_made(tmp_path: Path) -> None:
    train(config_for(tmp_path / "run", batch_size=1400), quiet=True)
    with pytest.raises(FileNotFoundError, match=r"no ema\.safetensors in .*; averaged weights need --ema_decay"):
        runs.load(tmp_path / "run").model(ema=True)


# ---- what is refused


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds no run: config\.yaml is missing; give a folder that `mpvg train`"
    ):
        runs.load(tmp_path)
    (copy / "data.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no run: data\.json is missing"):
        runs.load(copy)


def test_a_taken_folder_is_refused_before_anything_is_read(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=f"already holds a run; continue it with `mpvg train --resume {trained}`"):
        train(config_for(trained, data="no such data"))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="exists and is not empty, but holds no run; give another --out"):
        train(config_for(tmp_path, data="no such data"))
    with pytest.raises(FileExistsError, match=r"thesis\.tex exists and is not empty, but holds no run"):
        train(config_for(tmp_path / "thesis.tex"))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_and_one_whose_making_was_cut_off_are_free(tmp_path: Path) -> None:
    runs.ensure_new_run_dir(tmp_path)
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / ".environment.json.writing").write_text("{")
    (tmp_path / ".config.yaml.01234567.writing").write_text("epochs")
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "a", "boot": ""}')
    runs.ensure_new_run_dir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileExistsError):
        runs.ensure_new_run_dir(tmp_path)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("3", "has format 3, and this version of mpvg reads 1 to 2; update mpvg"),
        *(
            (text, f"format is {value}; allowed: 1 to 2; restore it from a copy of the run")
            for text, value in (("true", "True"), ("'2'", "'2'"), ("0", "0"), ("-1", "-1"), ("2.0", "2.0"))
        ),
    ],
)
def test_a_folder_of_another_format_is_refused_in_one_line(
    copy: Path, capsys: pytest.CaptureFixture[str], format: str, message: str
) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("format: 2\n", f"format: {format}\n"))
    for command in (["evaluate", str(copy)], ["train", "--resume", str(copy)]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"mpvg: error: {copy}/config.yaml")
        assert said.endswith(f"{message}\n")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "a: [1", r"config\.yaml is not readable YAML"),
        ("config.yaml", "just words", r"config\.yaml holds no keys"),
        ("config.yaml", "data: digits", r"config\.yaml: config key model is missing"),
        ("data.json", "{", r"data\.json is damaged .*; restore it from a copy"),
        ("data.json", '{"name": "digits"}', r"data\.json is damaged"),
        ("data.json", "[]", r"data\.json is damaged"),
        ("checkpoints/last/state.json", "{", r"state\.json is damaged"),
        (
            "checkpoints/last/state.json",
            "{}",
            r"checkpoints/last is damaged \(digest is None; allowed: a text\); restore",
        ),
        ("checkpoints/last/state.json", "[]", r"state\.json is damaged \(it holds no keys\)"),
        ("checkpoints/last/state.json", '{"digest": 1}', r"checkpoints/last is damaged \(digest is 1; allowed: a text"),
        ("checkpoints/last/model.safetensors", "", r"model\.safetensors is damaged or not a \.safetensors file"),
        ("checkpoints/last/optimizer.safetensors", "x" * 99, r"optimizer\.safetensors is damaged"),
        ("checkpoints/last/model.safetensors", None, r"checkpoints/last is damaged \(it has no model\.safetensors\)"),
        ("checkpoints/last/optimizer.safetensors", None, r"last is damaged \(it has no optimizer\.safetensors\)"),
        ("checkpoints/last/ema.safetensors", None, r"checkpoints/last is damaged \(it has no ema\.safetensors\)"),
    ],
)
def test_a_damaged_file_is_named(copy: Path, file: str, content: str | None, message: str) -> None:
    """Also where somebody has made the hashes fit."""
    if content is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(content)
    sign(copy / "checkpoints/last")
    with pytest.raises(ValueError, match=message):
        resume(copy, quiet=True)


@pytest.mark.parametrize("file", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_checkpoint_that_was_cut_off_is_refused(copy: Path, file: str, share: float) -> None:
    path = copy / f"checkpoints/last/{file}.safetensors"
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=f"{file}.safetensors is damaged"):
        resume(copy, quiet=True)


@pytest.mark.parametrize("name", ["model", "ema", "optimizer", "state"])
@pytest.mark.parametrize("damage", ["a bit", "half", "missing"])
def test_a_checkpoint_that_is_not_what_was_written_is_refused(copy: Path, name: str, damage: str) -> None:
    """A flipped bit in a weight leaves a file that can be read, and a network that computes."""
    path = copy / f"checkpoints/last/{name}.{'json' if name == 'state' else 'safetensors'}"
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "a bit":
        content[-9] ^= 1
    if damage != "missing":
        path.write_bytes(content if damage == "a bit" else content[: len(content) // 2])
    reason = "No such file or directory" if damage == "missing" else r"its SHA-256 is not the one in checksums\.json"
    refused = rf"/last/{path.name} is damaged \({reason}\); restore it from a copy of the run, or train a new run with"
    with pytest.raises(ValueError, match=refused):
        resume(copy, quiet=True)
    if name in ("model", "ema"):
        with pytest.raises(ValueError, match=rf"/last/{path.name} is damaged \({reason}\); restore it from a copy"):
            runs.load(copy).model(ema=name == "ema")
    else:  # the weights are whole
        runs.load(copy).model()


@pytest.mark.parametrize("content", ["{", "[]", "[1]", "null", '{"model.safetensors": 1}'])
def test_damaged_hashes_are_damage_too(copy: Path, content: str) -> None:
    (copy / "checkpoints/last/checksums.json").write_text(content)
    with pytest.raises(CorruptCheckpointError, match=r"is damaged \("):
        resume(copy, quiet=True)


def test_a_file_that_may_not_be_read_is_no_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, limit: int) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("mpvg.runs.checkpoints.read_regular", refuse)
    with pytest.raises(PermissionError):
        latest_valid_checkpoint(copy)


def test_a_resume_reads_and_hashes_each_file_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {file.read_bytes(): file for file in (copy / "checkpoints/last").iterdir()}
    read: list[str] = []
    hashed: list[str] = []
    sha256 = hashlib.sha256

    def spy_on_reading(path: Path, limit: int) -> bytes:
        read.append(path.name)
        return read_regular(path, limit)

    def spy_on_hashing(content: bytes, **options: Any) -> Any:
        if content in files:
            hashed.append(files[content].name)
        return sha256(content, **options)

    monkeypatch.setattr(checkpoints, "read_regular", spy_on_reading)
    monkeypatch.setattr(hashlib, "sha256", spy_on_hashing)
    monkeypatch.setattr("mpvg.models.checkpoints.load_file", None)  # safetensors would read on its own
    resume(copy, quiet=True)
    assert sorted(read) == sorted(file.name for file in files.values())
    assert sorted(hashed) == sorted(set(read) - {"checksums.json"})


def test_a_state_of_format_1_without_a_best_value_has_none(copy: Path) -> None:
    file = copy / "checkpoints/last/state.json"
    for written, expected in ((-1.0, None), (0.0, 0.0), (None, None)):
        state = json.loads(file.read_text())
        state["position"]["best"] = written
        file.write_text(json.dumps(state))
        sign(file.parent)
        trainer = loop.Trainer.create(replace(runs.load(copy).config, out=str(copy)), quiet=True)
        trainer.state.restore(trainer.run, trainer.accelerator, len(trainer.data.train))
        assert trainer.progress.best == expected


def test_weights_of_another_network_are_refused(copy: Path, tmp_path: Path) -> None:
    train(config_for(tmp_path / "other", method="gap", batch_size=1400), quiet=True)
    shutil.copy(tmp_path / "other/checkpoints/last/model.safetensors", copy / "checkpoints/last/model.safetensors")
    sign(copy / "checkpoints/last")
    with pytest.raises(ValueError, match=r"checkpoints/last is damaged .*Missing key"):
        resume(copy, quiet=True)
    with pytest.raises(ValueError, match=r"is of another model or method: .* is missing"):
        runs.load(copy).model()


@pytest.mark.parametrize("complete", [False, True])
def test_a_config_that_was_changed_since_is_refused(copy: Path, trained: Path, complete: bool) -> None:
    if complete:
        shutil.copy(trained / "summary.json", copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("epochs: 1\n", "epochs: 2\n", 1))
    with pytest.raises(
        ValueError, match=r"config\.yaml was changed since the run was saved .*; undo the change to resume"
    ):
        resume(copy, quiet=True)
    (copy / "config.yaml").write_text(text.replace("threads: 1\n", "threads: 2\n"))
    resume(copy, quiet=True)  # with what hardware is no matter of what is trained


def test_other_data_under_the_same_name_are_refused(copy: Path) -> None:
    values = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(values | {"class_names": ["cat", "dog"]}))
    with pytest.raises(ValueError, match=r"digits has 10 classes \(0, 1, 2, 3, 4, \.\.\.\), but .* on 2 \(cat, dog\)"):
        resume(copy, quiet=True)
    with pytest.raises(ValueError, match="digits has 10 classes"):
        runs.load(copy).validation(torch.device("cpu"))


def test_data_that_are_prepared_in_another_way_are_refused(trained: Path) -> None:
    run = runs.load(trained)
    larger = replace(run, config=replace(run.config, network=NetworkConfig(img_size=16)))
    with pytest.raises(
        ValueError, match=r"images of digits are prepared as 1 x 16 x 16, .* trained on 1 x 8 x 8, mean"
    ):
        larger.validation(torch.device("cpu"))


# ---- files and metrics


def test_a_file_that_cannot_be_written_keeps_what_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", "old")

    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"cannot write .*a\.json \(No space left on device\); make room, then give the"):
        write_json(tmp_path / "a.json", "new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.json": '"old"\n'}


def test_metrics_are_whole_lines(tmp_path: Path) -> None:
    lines = [{"epoch": epoch, "step": 10 * epoch} for epoch in (1, 2, 3)]
    for line in lines:
        append_metrics(tmp_path, line)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "st')  # a process that was killed
    assert read_metrics(tmp_path) == lines
    write_metrics(tmp_path, lines[:2])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1, "step": 10}\n{"epoch": 2, "step": 20}\n'


def test_a_line_of_metrics_that_was_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "step": 1}\n\0\0\n{"epoch": 3, "step": 3}\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl is damaged \(line 2: .*\); restore it from a copy of the run"
    ):
        read_metrics(tmp_path)


def test_numbers_in_the_metrics_are_exact(tmp_path: Path) -> None:
    value = math.pi / 3 * 1e-7
    append_metrics(tmp_path, {"epoch": 1, "step": 1, "nll": value})
    assert read_metrics(tmp_path)[0]["nll"] == value


# ---- checkpoints


def save(path: Path, step: int, *, best: bool) -> None:
    tensors = {"model": {"w": torch.full((3,), float(step))}}
    save_checkpoint(path, step, Checkpoint(tensors, {"step": step}), best=best)


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    kept = []
    for step, best in ((1, False), (2, True), (3, False), (4, False), (5, True), (6, False)):
        save(tmp_path, step, best=best)
        kept.append(sorted(int(file.name[5:]) for file in (tmp_path / "checkpoints").glob("step-*")))
        tensors, state = read_checkpoint(tmp_path)
        assert (tensors["model"]["w"].tolist(), state) == ([step] * 3, {"step": step})
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6]]
    assert json.loads((checkpoint_folder(tmp_path, "best") / "state.json").read_text()) == {"step": 5}
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == [
        "best",
        "last",
        "step-00000005",
        "step-00000006",
    ]


def test_the_newest_whole_checkpoint_is_found_behind_damaged_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, best=step == 1)
    root = tmp_path / "checkpoints"

    def found(path: Path) -> tuple[str, int, list[str]]:
        latest = latest_valid_checkpoint(path)
        return latest.name, latest.checkpoint.state["step"], [str(problem) for problem in latest.problems]

    assert found(tmp_path) == ("last", 4, [])
    shutil.rmtree(root / "step-00000004")
    (root / "step-00000003/state.json").write_text("{}")
    name, step, problems = found(tmp_path)
    assert (name, step) == ("step-00000001", 1)  # the best
    assert problems == [
        f"{root}/last is damaged (it is missing)",
        f"{root}/step-00000003/state.json is damaged (its SHA-256 is not the one in checksums.json)",
    ]
    (root / "step-00000001/model.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"last is damaged .*, and so are 2 older; restore it from a copy"):
        latest_valid_checkpoint(tmp_path)


def test_going_back_gives_up_a_later_best(tmp_path: Path) -> None:
    for step, best in ((1, True), (2, False), (3, True)):
        save(tmp_path, step, best=best)
    rollback_to(tmp_path, "step-00000002")
    remove_unused(tmp_path)
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == ["last", "step-00000002"]
    assert read_checkpoint(tmp_path).state == {"step": 2}
    save(tmp_path, 3, best=True)
    verify(tmp_path / "checkpoints/best", ["model.safetensors"])


def test_damaged_weights_are_refused_with_the_ways_on(tmp_path: Path) -> None:
    """None of them is gone unasked."""
    for step in (1, 2, 3):
        save(tmp_path, step, best=step == 1)
    for which in ("last", "best"):
        (tmp_path / f"checkpoints/{which}/model.safetensors").write_bytes(b"")
    said = {}
    for which in ("last", "best"):
        with pytest.raises(CorruptCheckpointError) as caught:
            verify(tmp_path / "checkpoints" / which, ["model.safetensors"])
        said[which] = str(caught.value).partition("; ")[2]
    copied = "restore it from a copy of the run, or give --checkpoint"
    again = f"`mpvg train --resume {tmp_path}` continues from there"
    assert said == {"last": f"{copied} best, or go back to step-00000002: {again}", "best": f"{copied} last"}
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match=f"step-00000002: remove {tmp_path}/summary.json, and `mpvg train"):
        verify(tmp_path / "checkpoints/last", ["model.safetensors"])


def test_there_is_no_checkpoint_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no 'best' checkpoint; it stopped before the first was saved"):
        checkpoint_folder(tmp_path, "best")


def test_a_folder_can_be_moved_with_its_links(tmp_path: Path) -> None:
    save(tmp_path / "old", 1, best=True)
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_checkpoint(tmp_path / "new").state == {"step": 1}


def test_the_loader_may_be_another_on_another_machine() -> None:
    config = config_for(Path("x"))
    assert config.digest() == replace(config, loader=LoaderConfig(root="elsewhere", workers=9)).digest()


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EACCES, "make the folder writable"),
        (errno.EROFS, "make the folder writable"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
    ],
)
def test_what_helps_against_an_error_in_writing_is_said(number: int, cure: str, tmp_path: Path) -> None:
    said = str(cannot_write(tmp_path / "a", OSError(number, os.strerror(number))))
    assert f"({os.strerror(number)}); {cure}, then give the same command again" in said


def test_a_place_is_within_a_checkpoint_only_with_both_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "checksums.json").write_text("{}")
    check_place(tmp_path / "run/x")
    (tmp_path / "state.json").write_text("{}")
    for out in (tmp_path, tmp_path / "run/x"):
        with pytest.raises(ValueError, match="is within the checkpoint"):
            check_place(out)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "state.json").unlink()
    check_place(tmp_path / "a")
