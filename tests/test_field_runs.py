"""Run folders that were copied, moved, damaged, attacked or written twice: rows F3 to F15, M2 of what users met."""

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mpvg import figures, files, runs
from mpvg.cli.main import main
from mpvg.config import RunConfig
from mpvg.recipes import recipe
from mpvg.runs import checkpoints, lock
from mpvg.runs.checkpoints import Checkpoint, CorruptCheckpointError, read_checkpoint, save_checkpoint
from mpvg.runs.listing import find_runs
from mpvg.runs.pointers import read_pointer
from mpvg.training import loop, resume, train

OTHER = {"pid": 4321, "host": "node7", "boot": "another"}


def config_for(out: Path, **changes: Any) -> RunConfig:
    """Two epochs of two steps, with a checkpoint after each step."""
    base = replace(recipe(None, "digits"), epochs=2, batch_size=512, device="cpu", threads=1, out=str(out))
    optim = replace(base.optim, warmup_epochs=0)
    return replace(base, optim=optim, save_steps=1, ema_decay=0.5, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs") / "run"
    train(config_for(path), quiet=True)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The run, to be damaged; without its summary, so that it is continued."""
    path = tmp_path / "run"
    shutil.copytree(trained, path, symlinks=True)
    (path / "summary.json").unlink()
    return path


@pytest.fixture(scope="module")
def trainer(trained: Path) -> loop.Trainer:
    """Of the run, to look at checkpoints without training."""
    torch.set_num_threads(1)
    return loop.Trainer.create(replace(runs.load(trained).config, out=str(trained)), quiet=True)


@pytest.fixture
def newest(trainer: loop.Trainer, run: Path) -> Callable[[], tuple[str, list[str]]]:
    """What a resume of the run would take, and what it would say of newer ones."""

    def find() -> tuple[str, list[str]]:
        found = checkpoints.latest_valid_checkpoint(run, partial(trainer.state.check, run=runs.load(run), batches=2))
        return found.name, [str(problem) for problem in found.problems]

    return find


def assert_passed_over(found: tuple[str, list[str]], run: Path) -> None:
    name, (problem,) = found
    assert name == "step-00000003"
    assert problem.startswith(f"{run}/checkpoints/last")
    assert " is damaged (" in problem
    assert "\n" not in problem
    assert len(problem) < 600


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file of the user's that no run may touch."""
    file = tmp_path / "thesis.tex"
    file.write_text("years of work")
    return file


def sign(folder: Path) -> None:
    """Makes the hashes of a checkpoint those of its files."""
    named = [file for file in folder.iterdir() if file.name != "checksums.json"]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in named}
    (folder / "checksums.json").write_text(json.dumps(hashes))


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(file.read_text())
    replaced = change(values)
    file.write_text(json.dumps(values if replaced is None else replaced))


def scores(summary: dict[str, Any]) -> tuple[float, ...]:
    return tuple(summary[name] for name in ("accuracy", "nll", "best_accuracy", "best_epoch"))


def steps(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").glob("step-*"))


# ---- F3: what a run writes is made new, never through a link

TEMPORARY = [
    *(f".{name}.writing" for name in ("metrics.jsonl", "summary.json", "config.yaml", "data.json", "environment.json")),
    *(f"checkpoints/{name}" for name in (".writing", ".last.writing", ".best.writing")),
    *(".lock", ".summary.json.00000000.writing", ".metrics.jsonl.00000000.writing"),
    *("checkpoints/.last.00000000.writing", "checkpoints/.best.00000000.writing"),
]
PLANTED = [*((name, "link") for name in TEMPORARY), (TEMPORARY[-3], "hard link"), (".lock", "hard link")]


@pytest.mark.parametrize(("name", "kind"), PLANTED)
def test_a_link_at_a_temporary_name_is_not_written_through(
    run: Path, trained: Path, outside: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "00000000")  # somebody has guessed it
    planted = run / name
    planted.symlink_to(outside) if kind == "link" else os.link(outside, planted)
    shutil.rmtree(run / "checkpoints/step-00000004")  # a step is left to be done
    resume(run, quiet=True)
    assert outside.read_text() == "years of work"
    assert scores(json.loads((run / "summary.json").read_text())) == scores(
        json.loads((trained / "summary.json").read_text())
    )
    assert not os.path.lexists(planted)


def test_a_link_to_a_folder_in_place_of_a_checkpoint_leaves_the_folder(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    (run / "checkpoints/.writing").symlink_to(home)
    (run / "checkpoints/step-00000004").rename(home / "step")
    (run / "checkpoints/step-00000004").symlink_to(home)  # the newest, too
    resume(run, quiet=True)
    assert sorted(file.name for file in home.iterdir()) == ["step", "thesis.tex"]
    assert not (run / "checkpoints/step-00000004").is_symlink()


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_metrics_that_are_a_link_become_a_file_of_the_run(run: Path, tmp_path: Path, kind: str) -> None:
    other = tmp_path / "metrics of another run"
    (run / "metrics.jsonl").rename(other)
    before = other.read_text()
    (run / "metrics.jsonl").symlink_to(other) if kind == "link" else os.link(other, run / "metrics.jsonl")
    shutil.rmtree(run / "checkpoints/step-00000004")
    resume(run, quiet=True)
    assert other.read_text() == before
    assert not (run / "metrics.jsonl").is_symlink()
    assert len(runs.load(run).metrics()) == 2


@pytest.mark.parametrize("name", ["checkpoints", "track"])
def test_a_folder_of_a_run_that_is_a_link_is_not_written_into(run: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoints", elsewhere, symlinks=True)
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{name} is a symbolic link, and a run is written into its own folder only"):
        resume(run, quiet=True)
    assert len(list(elsewhere.iterdir())) == len(os.listdir(elsewhere)) == 4


def test_a_new_file_is_not_made_where_something_is(tmp_path: Path, outside: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(outside)
    for name in (link, outside):
        with pytest.raises(FileExistsError):
            files.write_new(name, b"x")
    with pytest.raises(OSError, match="cannot write"):
        files.append_line(link, "x")
    assert outside.read_text() == "years of work"


def test_leftovers_of_processes_that_died_are_removed(run: Path) -> None:
    for name in (".metrics.jsonl.abcdef01.writing", "checkpoints/.last.12345678.writing", ".config.yaml.writing"):
        (run / name).write_text("x")
    (run / "checkpoints/.writing").mkdir()
    (run / "checkpoints/.writing/model.safetensors").write_text("half")
    resume(run, quiet=True)
    assert not [file for file in run.rglob(".*") if file.name != ".lock"]


# ---- F4, M2: pointers


def drop(run: Path, *names: str) -> None:
    for name in names:
        (run / "checkpoints" / name).unlink()


def as_text(run: Path, *names: str) -> None:
    for name in names:
        target = os.readlink(run / "checkpoints" / name)
        drop(run, name)
        (run / "checkpoints" / name).write_text(target)


def as_folder(run: Path, *names: str) -> None:
    for name in names:
        target = (run / "checkpoints" / name).resolve()
        drop(run, name)
        shutil.copytree(target, run / "checkpoints" / name)


@pytest.mark.parametrize("lost", [("last",), ("best",), ("last", "best")])
def test_a_run_that_was_copied_without_links_goes_on(
    run: Path, trained: Path, lost: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = (run / "metrics.jsonl").read_bytes()
    drop(run, *lost)
    assert scores(resume(run, quiet=True)) == scores(json.loads((trained / "summary.json").read_text()))
    assert (run / "metrics.jsonl").read_bytes() == metrics
    for name in ("last", "best"):
        assert read_pointer(run / "checkpoints", name) == read_pointer(trained / "checkpoints", name)
    what = f"{run}/checkpoints/last is damaged (it is missing)"
    warning = f"mpvg: warning: {what}; continuing from step-00000004, the newest there is\n"
    assert capsys.readouterr().err == (warning if "last" in lost else "")


def test_of_checkpoints_without_pointer_the_newest_valid_one_is_taken(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drop(run, "last")
    os.truncate(run / "checkpoints/step-00000004/ema.safetensors", 99)
    assert scores(resume(run, quiet=True)) == scores(json.loads((trained / "summary.json").read_text()))
    assert "continuing from step-00000003" in capsys.readouterr().err


def test_a_best_one_that_is_gone_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the next epoch makes a new one."""
    best = runs.load(run).best_step()
    assert best == "step-00000004"
    drop(run, "last", "best")
    shutil.rmtree(run / "checkpoints/step-00000004")
    shutil.rmtree(run / "checkpoints/step-00000002", ignore_errors=True)
    resume(run, quiet=True)
    said = capsys.readouterr().err
    assert f"{run}/checkpoints/best is missing, and step-00000002 is not there; the next epoch will be the best" in said
    assert read_pointer(run / "checkpoints", "best") == "step-00000004"


@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_a_lost_pointer_is_named_where_weights_are_read(
    run: Path, which: str, verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("L", (8, 8), 99).save(tmp_path / "a.png")
    arguments = [verb, str(run), *([str(tmp_path / "a.png")] if verb == "predict" else []), "--checkpoint", which]
    assert main(arguments) == 0
    whole = capsys.readouterr()
    drop(run, which)
    assert main(arguments) == 0
    found = capsys.readouterr()
    assert found.out == whole.out
    assert found.err.startswith(f"mpvg: warning: {run}/checkpoints/{which} is missing; taking step-00000004, the ")
    assert found.err.count("\n") == 1


def test_a_best_one_that_nothing_names_is_refused(run: Path) -> None:
    drop(run, "best")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"best is missing, and .*metrics\.jsonl names none of step-00000004"):
        runs.load(run).model("best")


@pytest.mark.parametrize("form", [as_text, as_folder])
@pytest.mark.parametrize("names", [("last",), ("best",), ("last", "best")])
def test_other_forms_of_pointers_are_read_and_continued(
    run: Path, trained: Path, form: Callable[..., None], names: tuple[str, ...]
) -> None:
    """A text file, as without links or in git; a folder, as of a copy that follows links."""
    form(run, *names)
    for which in ("last", "best"):
        runs.load(run).model(which)
    os.truncate(run / "checkpoints/step-00000004/model.safetensors", 99)
    if form is as_folder and "last" in names:
        os.truncate(run / "checkpoints/last/model.safetensors", 99)
    assert scores(resume(run, quiet=True)) == scores(json.loads((trained / "summary.json").read_text()))
    assert (run / "checkpoints/last").resolve().name == "step-00000004"
    runs.load(run).model("best")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_run_trains_and_resumes_on_a_file_system_without_links(
    trained: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "symlink", refuse)
    for step, best in ((1, True), (2, False), (3, False)):
        save_checkpoint(tmp_path, step, Checkpoint({"model": {"w": torch.ones(1)}}, {"step": step}), best=best)
    root = tmp_path / "checkpoints"
    assert (root / "last").read_text() == "step-00000003"
    assert (root / "best").read_text() == "step-00000001"
    assert steps(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    assert read_checkpoint(tmp_path).state == {"step": 3}
    assert checkpoints.checkpoint_folder(tmp_path, "best") == root / "step-00000001"
    path = tmp_path / "run"
    if number == errno.EPERM:
        assert scores(train(config_for(path), quiet=True)) == scores(json.loads((trained / "summary.json").read_text()))
        assert not (path / "checkpoints/last").is_symlink()
        (path / "summary.json").unlink()
        shutil.rmtree(path / "checkpoints/step-00000004")
        assert scores(resume(path, quiet=True)) == scores(json.loads((trained / "summary.json").read_text()))


@pytest.mark.parametrize("target", ["../../other", "/", "", "step-1", "step-00000004/..", "x" * 5000, "STEP-00000004"])
def test_a_pointer_elsewhere_is_none(run: Path, target: str) -> None:
    for write in (Path.write_text, Path.symlink_to):
        drop(run, "last")
        if write is Path.symlink_to and not 0 < len(target) < 255:
            (run / "checkpoints/last").symlink_to("nowhere")
        else:
            write(run / "checkpoints/last", target)
        assert read_pointer(run / "checkpoints", "last") is None
        with pytest.raises(CorruptCheckpointError, match="last is damaged"):
            read_checkpoint(run)
        assert checkpoints.latest_valid_checkpoint(run).name == "step-00000004"


def test_epochs_without_a_checkpoint_are_not_thrown_away(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 2 epochs, but .* has no checkpoint of them; restore it"):
        resume(run, quiet=True)
    assert (run / "metrics.jsonl").read_bytes() == before


# ---- F7: hashes


def hashes_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "checksums.json").read_text())


def without_ema(folder: Path) -> None:
    (folder / "ema.safetensors").unlink()
    sign(folder)


def in_hashes(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    return lambda folder: edit(folder / "checksums.json", change)


def without(name: str) -> Callable[[Any], Any]:
    return lambda values: {key: value for key, value in values.items() if key != name}


def link_to(target: str) -> Callable[[Path], Any]:
    return lambda file: file.symlink_to(target)


UNSIGNED: dict[str, Callable[[Path], Any]] = {
    "missing": lambda folder: (folder / "checksums.json").unlink(),
    "empty": lambda folder: (folder / "checksums.json").write_text(""),
    "{}": lambda folder: (folder / "checksums.json").write_text("{}"),
    "a name less": in_hashes(without("optimizer.safetensors")),
    "no state": in_hashes(without("state.json")),
    "a name more": in_hashes(lambda values: values | {"more.safetensors": "0" * 64}),
    "a device": in_hashes(lambda values: values | {"/dev/zero": "0" * 64}),
    "outside": in_hashes(lambda values: values | {"../../config.yaml": "0" * 64}),
    "a number": in_hashes(lambda values: values | {"state.json": 1}),
    "nested": lambda folder: (folder / "checksums.json").write_text("[" * 100_000),
    "a file more": lambda folder: (folder / "ema2.safetensors").write_bytes(b""),
    "a folder more": lambda folder: (folder / "more").mkdir(),
    "a file that is a device": lambda folder: swap(folder / "state.json", link_to("/dev/zero")),
    "a file that is a pipe": lambda folder: swap(folder / "ema.safetensors", os.mkfifo),
    "hashes that are a device": lambda folder: swap(folder / "checksums.json", link_to("/dev/zero")),
    "hashes that are a pipe": lambda folder: swap(folder / "checksums.json", os.mkfifo),
    "hashes that link to themselves": lambda folder: swap(folder / "checksums.json", link_to("checksums.json")),
    "no ema": without_ema,
}


def swap(file: Path, make: Callable[[Path], Any]) -> None:
    file.unlink()
    make(file)


@pytest.mark.parametrize("damage", UNSIGNED)
def test_a_checkpoint_whose_hashes_are_not_those_of_its_files_is_passed_over(
    run: Path, newest: Callable[[], tuple[str, list[str]]], damage: str
) -> None:
    assert newest() == ("last", [])
    UNSIGNED[damage](run / "checkpoints/step-00000004")
    assert_passed_over(newest(), run)
    if damage == "no ema":
        with pytest.raises(FileNotFoundError, match=r"no ema\.safetensors in"):
            runs.load(run).model(ema=True)
    elif not damage.startswith("a file that") and damage != "a name more":  # the weights are whole
        with pytest.raises(CorruptCheckpointError, match=r"is damaged \(.*; restore it from a copy of the run"):
            runs.load(run).model()


def test_a_run_goes_on_before_a_checkpoint_without_averaged_weights(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_ema(run / "checkpoints/step-00000004")
    assert scores(resume(run, quiet=True)) == scores(json.loads((trained / "summary.json").read_text()))
    problem = f"{run}/checkpoints/last is damaged (it has no ema.safetensors)"
    warning = f"mpvg: warning: {problem}; continuing from step-00000003, the one before\n"
    assert capsys.readouterr().err == warning


def test_hidden_files_of_file_managers_are_no_damage(run: Path) -> None:
    (run / "checkpoints/step-00000004/.DS_Store").write_text("x")
    (run / "checkpoints/.DS_Store").write_text("x")
    read_checkpoint(run)


HOLLOW: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.empty(3, device="meta"),
    "expanded": lambda: torch.zeros(1).expand(10**10),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", HOLLOW)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_without_values_of_their_own_are_damage(run: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "read_tensors", lambda file, content: {"w": HOLLOW[kind]()})
    with pytest.raises(CorruptCheckpointError, match="w is no dense tensor with values of its own"):
        read_checkpoint(run)


# ---- F8: metrics


@pytest.mark.parametrize("kept", [0, 1, None])
def test_metrics_that_lack_an_epoch_are_refused_by_name(run: Path, kept: int | None) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.unlink()
    if kept is not None:
        file.write_text("".join(lines[:kept]))
    count = kept or 0
    before = steps(run)
    with pytest.raises(
        ValueError, match=rf"metrics\.jsonl has {count} epochs up to step 4, and .* saved after 2; restore"
    ):
        resume(run, quiet=True)
    assert not (run / "summary.json").exists()
    assert file.exists() == (kept is not None)
    assert steps(run) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[::-1], "line 1: epoch is 2; expected: 1"),
        (lambda lines: [lines[0], lines[0]], "line 2: epoch is 1; expected: 2"),
        (lambda lines: [lines[0] | {"epoch": 1.0}], "line 1: epoch is 1.0"),
        (lambda lines: [lines[0] | {"epoch": True}], "line 1: epoch is True"),
        (lambda lines: [lines[0], lines[1] | {"step": 2}], "line 2: step is 2; expected: a whole number > 2"),
        (lambda lines: [lines[0] | {"step": None}], "line 1: step is None"),
        (lambda lines: [lines[0] | {"accuracy": "0.5"}], "line 1: accuracy is '0.5'; allowed: a number"),
        (lambda lines: [lines[0] | {"nll": [1]}], r"line 1: nll is \[1\]"),
        (lambda lines: [lines[0] | {"ema_nll": None}], "line 1: ema_nll is None"),
        (lambda lines: [lines[0] | {"lr": False}], "line 1: lr is False"),
        (lambda lines: [lines[0] | {"lr": float("nan")}], "line 1: lr is nan; allowed: a number"),
        (lambda lines: [lines[0] | {"seconds": float("inf")}], "line 1: seconds is inf; allowed: a number"),
        (lambda lines: [lines[0] | {"nll": 10**400}], "line 1: .*not finite or has more than 64 bits"),
        (lambda lines: [{k: v for k, v in lines[0].items() if k != "seconds"}], "line 1: seconds is None"),
        (lambda lines: [lines[0] | {"a\nb": None}], r"line 1: a\\nb is None; allowed: a number\); restore"),
        (lambda lines: [lines[0] | {"a" * 9999: None}], r"line 1: a{197}\.\.\. is None; allowed: a number\); restore"),
        (lambda lines: [[1]], r"line 1: \[1\] is no epoch"),
        (lambda lines: [None], "line 1: None is no epoch"),
        (lambda lines: [lines[0] | {"a": "b\0"}], "line 1: .*NUL"),
    ],
)
def test_a_line_of_another_kind_is_damage(run: Path, change: Callable[[Any], Any], message: str) -> None:
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    with pytest.raises(ValueError, match=rf"metrics\.jsonl is damaged \({message}"):
        runs.load(run).metrics()
    (found,) = find_runs(run)
    assert found.state.startswith("damaged: ")


def test_a_metric_of_averaged_weights_may_be_nan(run: Path, newest: Callable[[], tuple[str, list[str]]]) -> None:
    """As it is where they have not been found yet; anything is better."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["ema_nll"] = lines[1]["accuracy"] = float("nan")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    edit(
        run / "checkpoints/step-00000004/state.json",
        lambda values: values["position"].__setitem__("best", float("nan")),
    )
    sign(run / "checkpoints/step-00000004")
    assert runs.load(run).best_step() == "step-00000002"
    assert newest() == ("last", [])


# ---- F10, F11: values in files


def in_config(**changes: Any) -> Callable[[Path], Any]:
    def change(run: Path) -> None:
        values = yaml.safe_load((run / "config.yaml").read_text())
        for name, value in changes.items():
            part, _, inner = name.rpartition("__")
            (values[part] if part else values)[inner] = value
        (run / "config.yaml").write_text(yaml.safe_dump(values))

    return change


def in_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    return lambda run: edit(run / name, change)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

FOREIGN: dict[str, Callable[[Path], Any]] = {
    "config: null": lambda run: (run / "config.yaml").write_text("null"),
    "config: bomb": lambda run: (run / "config.yaml").write_text(BOMB),
    "config: one alias": lambda run: (run / "config.yaml").write_text("a: &a 1\nb: *a\n"),
    "config: [[[": lambda run: (run / "config.yaml").write_text("[" * 50_000),
    "config: {a: {a: ": lambda run: (run / "config.yaml").write_text("{a: " * 10_000),
    "config: deep but whole": lambda run: (run / "config.yaml").write_text("a: " + "[" * 99 + "]" * 99),
    "config: large": lambda run: (run / "config.yaml").write_text("# \n" * 400_000),
    "config: NUL": lambda run: (run / "config.yaml").write_bytes(b"data: \0"),
    "config: NUL in a text": lambda run: (run / "config.yaml").write_text('data: "\\0"'),
    "config: latin-1": lambda run: (run / "config.yaml").write_bytes("data: café".encode("latin-1")),
    "config: a date that is none": lambda run: (run / "config.yaml").write_text("data: 2001-99-99"),
    "config: a tag": lambda run: (run / "config.yaml").write_text("data: !!python/object/apply:os.getcwd []"),
    "config: a boolean that is none": lambda run: (run / "config.yaml").write_text("data: !!bool x"),
    "config: a time that is none": lambda run: (run / "config.yaml").write_text("data: !!timestamp x"),
    "config: a pipe": lambda run: swap(run / "config.yaml", os.mkfifo),
    "config: a device": lambda run: swap(run / "config.yaml", lambda file: file.symlink_to("/dev/zero")),
    "config: a folder": lambda run: swap(run / "config.yaml", lambda file: file.mkdir()),
    "config: epochs null": in_config(epochs=None),
    "config: epochs large": in_config(epochs=10**30),
    "config: lr text": in_config(lr="fast"),
    "config: lr infinite": in_config(lr=float("inf")),
    "config: lr large": in_config(lr=10**400),
    "config: threads": in_config(threads=100_000),
    "config: a list as a text": in_config(model=["vit_mini_patch2_8"]),
    "config: a key that is a number": in_config(task_options={1: 2}),
    "config: bytes": in_config(task_options={"a": b"x"}),
    "config: a set": in_config(task_options={"a": {1}}),
    "config: a part null": in_config(network=None),
    "config: a text in a part": in_config(optim__betas=["a", "b"]),
    "config: three betas": in_config(optim__betas=[0.9, 0.9, 0.9]),
    "config: clip": in_config(optim__clip_grad=float("nan")),
    "data: null": lambda run: (run / "data.json").write_text("null"),
    "data: deep": lambda run: (run / "data.json").write_text("[" * 100_000 + "]" * 100_000),
    "data: large": lambda run: (run / "data.json").write_bytes(b" " * (2**24 + 1)),
    "data: NUL": lambda run: (run / "data.json").write_bytes(b"\0" * 100),
    "data: UTF-16": lambda run: (run / "data.json").write_text((run / "data.json").read_text(), "utf-16"),
    "data: a pipe": lambda run: swap(run / "data.json", os.mkfifo),
    "data: img_size null": in_json("data.json", lambda values: values | {"img_size": None}),
    "data: img_size large": in_json("data.json", lambda values: values | {"img_size": 10**9}),
    "data: img_size larger": in_json("data.json", lambda values: values | {"img_size": 10**30}),
    "data: img_size 0": in_json("data.json", lambda values: values | {"img_size": 0}),
    "data: classes": in_json("data.json", lambda values: values | {"class_names": [1, 2]}),
    "data: classes text": in_json("data.json", lambda values: values | {"class_names": "cat"}),
    "data: a class with NUL": in_json("data.json", lambda values: values | {"class_names": ["a\0", "b"]}),
    "data: std 0": in_json("data.json", lambda values: values | {"std": [0.0]}),
    "data: mean nan": in_json("data.json", lambda values: values | {"mean": [float("nan")]}),
    "data: channels": in_json("data.json", lambda values: values | {"in_chans": 10**9}),
    "data: size": in_json("data.json", lambda values: values | {"val_size": -1}),
    "data: crop": in_json("data.json", lambda values: values | {"crop_pct": 0}),
    "summary: null": lambda run: (run / "summary.json").write_text("null"),
    "summary: {}": lambda run: (run / "summary.json").write_text("{}"),
    "summary: text": lambda run: (run / "summary.json").write_text("{"),
    "summary: deep": lambda run: (run / "summary.json").write_text('{"a":' * 100_000),
    "summary: a pipe": lambda run: os.mkfifo(run / "summary.json"),
    "summary: a folder": lambda run: (run / "summary.json").mkdir(),
    "metrics: a pipe": lambda run: swap(run / "metrics.jsonl", os.mkfifo),
    "metrics: deep": lambda run: (run / "metrics.jsonl").write_text("[" * 100_000 + "\n"),
    "metrics: latin-1": lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_values_are_refused_in_one_line_and_the_other_runs_are_listed(
    run: Path, trained: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "whole", symlinks=True)
    FOREIGN[name](run)
    started = time.monotonic()
    assert main(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mpvg: error: ")
    assert said.count("\n") == 1
    assert len(said) < 1000
    assert f"{run}/{name.split(':')[0]}." in said
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert [" complete " in line for line in lines] == [False, False, True]
    assert " damaged: " in lines[1]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "name", ["config_hash", "images_per_second", "accuracy", "nll", "ema_nll", "best_accuracy", "parameters"]
)
@pytest.mark.parametrize("value", [None, [], "x" * 10_000, {}])
def test_a_summary_of_other_types_is_damage(run: Path, trained: Path, name: str, value: Any) -> None:
    shutil.copy(trained / "summary.json", run)
    assert runs.load(run).summary() is not None
    if name == "config_hash" and isinstance(value, str):
        value = 0.5
    edit(run / "summary.json", lambda values: values | {name: value})
    with pytest.raises(ValueError, match=rf"summary\.json is damaged \({name} is ") as caught:
        runs.load(run).summary()
    assert len(str(caught.value)) < 600


POSITIONS: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in ("epoch", "batch", "step", "images", "skipped")
        for value in (None, "1", -1, 1.5, 10**30)
    ),
    *((name, value) for name in ("loss_sum", "seconds") for value in (None, "1", float("nan"), True)),
    *(("best", value) for value in ("high", [1], True)),
    *(("epoch", 1), ("batch", 1), ("step", 3), ("epoch", 3)),
    *((name, "missing") for name in ("epoch", "batch", "step", "best")),
]


@pytest.mark.parametrize(("name", "value"), POSITIONS)
def test_a_position_that_no_run_of_this_config_has_is_damage(
    run: Path, newest: Callable[[], tuple[str, list[str]]], name: str, value: Any
) -> None:
    def change(values: Any) -> None:
        values["position"][name] = value
        if value == "missing":
            del values["position"][name]

    edit(run / "checkpoints/step-00000004/state.json", change)
    sign(run / "checkpoints/step-00000004")
    assert_passed_over(newest(), run)


def option(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda values: values["optimizer"]["param_groups"][0].__setitem__(name, value)


STATES: dict[str, Callable[[Any], Any]] = {
    "list": lambda values: [values],
    "no digest": lambda values: values.pop("digest")[:0] or values,
    "digest null": lambda values: values | {"digest": None},
    "position list": lambda values: values | {"position": []},
    "position null": lambda values: values | {"position": None},
    "position more": lambda values: values["position"].__setitem__("more", 1),
    "optimizer null": lambda values: values | {"optimizer": None},
    "optimizer empty": lambda values: values | {"optimizer": {}},
    "state list": lambda values: values["optimizer"].__setitem__("state", []),
    "state key": lambda values: values["optimizer"]["state"].__setitem__("x", 1),
    "state text": lambda values: values["optimizer"]["state"].__setitem__("0.step", "1"),
    "state nan": lambda values: values["optimizer"]["state"].__setitem__("0.step", float("nan")),
    "state of another parameter": lambda values: values["optimizer"]["state"].__setitem__("99999.step", 1),
    "groups null": lambda values: values["optimizer"].__setitem__("param_groups", None),
    "a group less": lambda values: values["optimizer"]["param_groups"].pop() and None,
    "a group null": lambda values: values["optimizer"]["param_groups"].__setitem__(0, None),
    "no lr": lambda values: values["optimizer"]["param_groups"][0].pop("lr") and None,
    "lr text": option("lr", "0.1"),
    "lr null": option("lr", None),
    "lr infinite": option("lr", float("inf")),
    "betas text": option("betas", "ab"),
    "betas of text": option("betas", ["a", "b"]),
    "betas of three": option("betas", [0.9, 0.9, 0.9]),
    "eps list": option("eps", [1]),
    "an option more": option("more", "text"),
    "deep": option("foreach", json.loads("[" * 200 + "]" * 200)),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_other_types_is_damage(run: Path, newest: Callable[[], tuple[str, list[str]]], name: str) -> None:
    edit(run / "checkpoints/step-00000004/state.json", STATES[name])
    sign(run / "checkpoints/step-00000004")
    assert_passed_over(newest(), run)


def test_a_checkpoint_in_the_folder_of_another_step_is_damage(
    run: Path, newest: Callable[[], tuple[str, list[str]]]
) -> None:
    shutil.rmtree(run / "checkpoints/step-00000004")
    shutil.copytree(run / "checkpoints/step-00000003", run / "checkpoints/step-00000004")
    assert_passed_over(newest(), run)
    assert newest()[1] == [f"{run}/checkpoints/last is damaged (it is of step 3, in the folder step-00000004)"]


def test_a_config_that_was_changed_is_no_damage_of_the_checkpoint(run: Path) -> None:
    in_config(epochs=1)(run)
    before = steps(run)
    with pytest.raises(ValueError, match=r"config\.yaml was changed since the run was saved"):
        resume(run, quiet=True)
    assert steps(run) == before


def test_a_sane_number_of_threads_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--data", "digits", "--threads", "100000", "--out", str(tmp_path / "run")]) == 2
    assert "threads is 100000; allowed: a whole number >= 1, <= 4096" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- F13: the lock


def write_lock(run: Path, **changes: Any) -> None:
    (run / ".lock").write_text(json.dumps(OTHER | changes))


def test_a_run_is_written_by_one_process_at_a_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = f"pid {os.getpid()} on {socket.gethostname()}"
    with lock.run_lock(run):
        assert main(["train", "--resume", str(run)]) == 2
        assert f"{run} is being written by {here}; wait until it ends, or stop it" in capsys.readouterr().err
        assert main(["train", "--resume", str(run), "--break_lock"]) == 2  # that it lives is known
        assert here in capsys.readouterr().err
        assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
        (found,) = find_runs(run)
        assert found.state == f"training ({here})"
    assert not (run / ".lock").exists()
    (found,) = find_runs(run)
    assert found.state == "unfinished"
    resume(run, quiet=True)
    assert not (run / ".lock").exists()


def test_a_new_run_is_locked_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    save = checkpoints.save_checkpoint

    def spy(path: Path, *arguments: Any, **options: Any) -> None:
        seen.append(lock.current_holder(path))
        save(path, *arguments, **options)

    monkeypatch.setattr("mpvg.training.state.save_checkpoint", spy)
    train(config_for(tmp_path / "run"), quiet=True)
    assert {holder.pid if holder else None for holder in seen} == {os.getpid()}
    assert lock.current_holder(tmp_path / "run") is None


def test_two_that_begin_the_same_run_do_not_both_write_it(tmp_path: Path) -> None:
    with lock.run_lock(tmp_path / "run"), pytest.raises(lock.RunLockedError, match=f"pid {os.getpid()} on"):
        train(config_for(tmp_path / "run"), quiet=True)
    assert not list((tmp_path / "run").iterdir())


def test_a_lock_of_another_host_is_refused_until_it_is_broken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lock(run)
    assert main(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{run} is locked by pid 4321 on node7, and whether it still runs cannot be tested from" in said
    assert said.endswith(f"continue with `mpvg train --resume {run} --break_lock`\n")
    assert json.loads((run / ".lock").read_text()) == OTHER
    (found,) = find_runs(run)
    assert found.state == "training (pid 4321 on node7)"
    assert main(["train", "--resume", str(run), "--break_lock"]) == 0
    assert not (run / ".lock").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "\0\0\0",
        "[" * 4000,
        "x" * 10_000,
        '{"pid": "1", "host": "a"}',
        '{"pid": -1, "host": "a"}',
        '{"pid": 1, "host": 1}',
        json.dumps(OTHER | {"host": socket.gethostname(), "pid": 2**22 + 1}),  # a process that died here
        json.dumps(OTHER | {"host": socket.gethostname(), "pid": 1}),  # its number is another's now
        json.dumps(OTHER | {"boot": lock.own_holder().boot}),  # of a container on this machine
    ],
)
def test_a_stale_lock_is_taken_over(run: Path, text: str) -> None:
    (run / ".lock").write_text(text)
    assert lock.current_holder(run) is None
    with lock.run_lock(run):
        assert lock.current_holder(run) == lock.own_holder()
    assert not (run / ".lock").exists()


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_what_is_no_lock_is_replaced(run: Path, outside: Path, kind: str) -> None:
    make = {
        "link": lambda file: file.symlink_to(outside),
        "hard link": lambda file: os.link(outside, file),
        "pipe": os.mkfifo,
        "folder": lambda file: file.mkdir(),
    }
    make[kind](run / ".lock")
    assert lock.current_holder(run) is None
    with lock.run_lock(run):
        assert lock.current_holder(run) == lock.own_holder()
    assert outside.read_text() == "years of work"


def test_where_there_are_no_locks_the_text_counts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    own = lock.own_holder()._asdict()
    (run / ".lock").write_text(json.dumps(own | {"pid": os.getppid()}))
    assert lock.current_holder(run) is not None
    with pytest.raises(lock.RunLockedError, match=f"pid {os.getppid()} on"), lock.run_lock(run):
        pass
    for stale in (own | {"pid": 2**22 + 1}, own):
        (run / ".lock").write_text(json.dumps(stale))
        with lock.run_lock(run):
            pass


def test_a_lock_ends_with_its_process_however_it_ends(run: Path) -> None:
    """Also where a forked child of it, such as a worker of the data loader, lives on."""
    code = (
        "import os, sys, time, types, pathlib\n"
        f"package = types.ModuleType('mpvg.runs')\npackage.__path__ = [{os.path.dirname(lock.__file__)!r}]\n"
        "sys.modules['mpvg.runs'] = package  # without torch, which takes seconds\n"
        "from mpvg.runs.lock import run_lock\n"
        f"with run_lock(pathlib.Path({str(run)!r})):\n"
        "    child = os.fork()\n    if child: print(child, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(lock.RunLockedError, match=f"pid {process.pid} on"), lock.run_lock(run):
                pass
            process.kill()
            process.wait()
            assert lock.current_holder(run) is None
            with lock.run_lock(run):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_that_somebody_broke_is_not_taken_from_them(run: Path) -> None:
    with lock.run_lock(run):
        (run / ".lock").unlink()
        write_lock(run)
    assert json.loads((run / ".lock").read_text()) == OTHER


# ---- F15: whole or not at all


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "curves.svg"
    figure = figures.lines({"a": [[1.0, 2.0]]}, "t", "x", "y")
    figures.save(figure, file)
    old = file.read_bytes()
    full(monkeypatch)
    with pytest.raises(OSError, match=r"cannot write .*curves\.svg \(No space left on device\); make room"):
        figures.save(figures.lines({"a": [[1.0, 5.0]]}, "t", "x", "y"), file)
    assert file.read_bytes() == old
    assert os.listdir(tmp_path) == ["curves.svg"]


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    files.atomic_text(file, "猫")
    assert file.read_bytes() == "猫".encode()
    full(monkeypatch)
    with pytest.raises(OSError, match=r"cannot write .*report\.html \(No space left on device\); make room"):
        files.atomic_text(file, "new")
    assert file.read_text("utf-8") == "猫"
    assert os.listdir(tmp_path) == ["report.html"]
