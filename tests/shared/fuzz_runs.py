"""What is tried on the files of a run folder."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from fuzz_values import TEXTS, Target, bounded, damaged, json_files, json_lines, refuses_or_returns, to_json, yaml_files
from mpvg.config import RunConfig
from mpvg.data import DataInfo
from mpvg.files import write_json
from mpvg.runs import load
from mpvg.runs.checkpoints import Checkpoint, latest_valid_checkpoint, read_checkpoint, save_checkpoint, verify
from mpvg.runs.listing import find_runs
from mpvg.runs.lock import current_holder, run_lock
from mpvg.training.optimizer import pack
from mpvg.training.state import TrainProgress, TrainState

CONFIG = RunConfig(
    data="digits", model="vit_mini_patch2_8", epochs=2, batch_size=4, lr=0.1, recipe="none", ema_decay=0.5
)
SMALL = {"data": "digits", "model": "vit_mini_patch2_8", "epochs": 2, "batch_size": 4, "lr": 0.1, "recipe": "none"}
SMALL |= {"ema_decay": 0.5}
INFO = DataInfo(
    name="digits", class_names=("a", "b"), in_chans=1, img_size=8, mean=(0.5,), std=(0.5,), train_size=4, val_size=4
)
SCORES = {"accuracy": 0.5, "top5": 1.0, "nll": 0.7, "ema_accuracy": 0.5, "ema_top5": 1.0, "ema_nll": 0.7}
LINES = [
    {"epoch": epoch, "step": epoch, "train_loss": 0.7, "lr": 0.1, **SCORES, "images_per_second": 9.0, "skipped": 0}
    | {"seconds": 1.5}
    for epoch in (1, 2)
]
SUMMARY = SCORES | {
    "config_hash": CONFIG.digest(),
    "best_accuracy": 0.5,
    "best_epoch": 1,
    "parameters": 9,
    "skipped": 0,
}
SUMMARY |= {"images_per_second": 9.0, "seconds": 1.5}
STEP = "checkpoints/step-00000002"


def small_state() -> TrainState:
    """Of a network of two numbers, which has done a step."""
    network = torch.nn.Linear(1, 1)
    groups: list[dict[str, Any]] = [{"params": [network.weight]}, {"params": [network.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    network(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    return TrainState(
        network, optimizer, None, TrainProgress(epoch=2, step=2, loss_sum=0.0, seconds=1.5, images=8, best=0.5)
    )


@cache
def whole_run() -> Path:
    """A complete run, with a checkpoint of a network of two numbers."""
    path = Path(tempfile.mkdtemp(prefix="mpvg-fuzz-"))
    (path / "config.yaml").write_text(yaml.safe_dump({"format": 2, **SMALL}))
    write_json(path / "data.json", asdict(INFO))
    (path / "metrics.jsonl").write_bytes(b"".join(to_json(line) + b"\n" for line in LINES))
    write_json(path / "summary.json", SUMMARY)
    state = small_state()
    moments, values = pack(state.optimizer)
    saved = {"position": asdict(state.progress), "optimizer": values, "digest": CONFIG.digest()}
    tensors = {"model": state.network.state_dict(), "ema": state.network.state_dict(), "optimizer": moments}
    for step in (1, 2):
        save_checkpoint(path, step, Checkpoint(tensors, saved), best=step == 1)
    return path


@contextmanager
def changed_run(changes: dict[str, bytes]) -> Iterator[Path]:
    """The complete run, with other files in it."""
    with tempfile.TemporaryDirectory(prefix="mpvg-fuzz-") as folder:
        path = Path(folder) / "run"
        shutil.copytree(whole_run(), path, symlinks=True)
        for name, content in changes.items():
            (path / name).unlink(missing_ok=True)
            (path / name).write_bytes(content)
        yield path


def read_run(name: str, content: bytes) -> None:
    """Reads all of the run, with another file in it."""
    with changed_run({name: content}) as path, bounded():
        run = refuses_or_returns(partial(load, path))
        if run is not None:
            for read in (run.metrics, run.summary, run.best_step, run.config.digest):
                refuses_or_returns(read)
        for state in find_runs(path):
            assert all(text.isprintable() for text in state.row()), state.row()


def read_state(name: str, content: bytes) -> None:
    """Reads the checkpoints of the run, with another file in the newest, and finds the one to go on from."""
    with changed_run({name: content}) as path, bounded():
        refuses_or_returns(partial(read_checkpoint, path))
        for which in ("last", "best"):
            refuses_or_returns(partial(verify, path / "checkpoints" / which, ["model.safetensors"]))
        _resign(path / STEP, name)
        state, run = small_state(), load(path)
        found = refuses_or_returns(partial(latest_valid_checkpoint, path, partial(state.check, run=run, batches=1)))
        if found is not None and run.is_of(found.checkpoint.state["digest"]):
            refuses_or_returns(partial(state._load_state, found.checkpoint))


def _resign(folder: Path, name: str) -> None:
    """Somebody who changes a file may change the hashes, too."""
    file = folder / "checksums.json"
    if not name.endswith(file.name):
        hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f != file}
        file.write_text(json.dumps(hashes))


def read_lock(name: str, content: bytes) -> None:
    """Looks at the lock, and takes it."""

    def take() -> None:
        with run_lock(path):
            assert current_holder(path) is not None

    with changed_run({name: content}) as path, bounded():
        refuses_or_returns(partial(current_holder, path))
        refuses_or_returns(take)


def run_folder() -> dict[str, Target]:
    """The files of a run folder."""
    whole = whole_run()
    saved = json.loads((whole / STEP / "state.json").read_text())
    hashes = json.loads((whole / STEP / "checksums.json").read_text())
    weights = (whole / STEP / "optimizer.safetensors").read_bytes()
    files = {
        "config.yaml": (yaml_files({"format": 2, **CONFIG.to_dict()}), read_run),
        "data.json": (json_files(asdict(INFO) | {"class_names": ["a", "b"], "mean": [0.5], "std": [0.5]}), read_run),
        "metrics.jsonl": (json_lines(LINES), read_run),
        "summary.json": (json_files(SUMMARY), read_run),
        f"{STEP}/state.json": (json_files(saved), read_state),
        f"{STEP}/checksums.json": (json_files(hashes), read_state),
        f"{STEP}/optimizer.safetensors": (damaged(weights), read_state),
        "checkpoints/last": (
            st.one_of(TEXTS.map(_encoded), damaged(b"step-00000002"), st.binary(max_size=99)),
            read_state,
        ),
        ".lock": (json_files({"pid": 1, "host": "a", "boot": "b"}), read_lock),
    }
    return {name: Target(examples, partial(check, name)) for name, (examples, check) in files.items()}


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
