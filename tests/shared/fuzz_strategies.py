"""What is tried on everything that reads files of others: valid files with edits, other values, and bytes.

A `Target` is a strategy for examples and what is done with one. `TARGETS` has those of run folders; another kind of
file gets a function like `run_folder` and its entries there. tests/test_fuzz.py tries a few examples of each target,
and benchmarks/fuzz.py as many as are asked for.
"""

import copy
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from mpvg.config import RunConfig
from mpvg.data import DataInfo
from mpvg.files import write_json
from mpvg.runs import load
from mpvg.runs.checkpoints import Checkpoint, latest_valid_checkpoint, read_checkpoint, save_checkpoint, verify
from mpvg.runs.listing import find_runs
from mpvg.runs.lock import current_holder, run_lock
from mpvg.training.optimizer import pack
from mpvg.training.state import TrainProgress, TrainState

MAX_SECONDS = 10.0
"""CPU time of one example."""
MAX_MESSAGE = 2000


@dataclass(frozen=True)
class Target:
    """What is fuzzed."""

    examples: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    """Raises AssertionError, or whatever should not have been raised, where an example is not handled."""


# ---- values and bytes

NUMBERS = st.one_of(
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "\0", "\ud800", "\x1b[2J", "a\nb", "../..", "/dev/zero", "x" * 3000, "nan", "2001-99-99"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def edited(draw: st.DrawFn, valid: Any) -> Any:
    """A copy of a value in which one to three places were replaced, removed or added."""
    whole = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = whole
        key: Any = 0
        while isinstance(parent[key], (dict, list)) and parent[key] and draw(st.integers(0, 3)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "remove" and parent is not whole:
            del parent[key]
        elif what == "add" and isinstance(parent[key], dict):
            parent[key][draw(TEXTS)] = draw(VALUES)
        elif what == "add" and isinstance(parent[key], list):
            parent[key].append(draw(VALUES))
        else:
            parent[key] = draw(VALUES)
    return whole[0]


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes of which some were replaced, cut out, repeated or put in."""
    content = valid
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 40)))
        new = draw(st.one_of(st.just(b""), st.just(content[start:end] * 2), st.binary(max_size=6), st.just(b"\0" * 9)))
        content = content[:start] + new + content[end:]
    return content


def nested(deepest: int, *more: tuple[bytes, bytes]) -> st.SearchStrategy[bytes]:
    """An opening bracket, thousands of times, and perhaps the closing ones; `more`: other pairs of brackets."""
    return st.builds(
        lambda part, depth, closed: part[0] * depth + b"1" + part[1] * depth * closed,
        st.sampled_from([(b"[", b"]"), (b'{"a":', b"}"), *more]),
        st.sampled_from([deepest, 3, 60, 70, 300, deepest]),
        st.booleans(),
    )


def json_files(valid: Any) -> st.SearchStrategy[bytes]:
    """JSON files like a valid one, and others."""
    content = to_json(valid)
    values = st.one_of(edited(valid), edited(valid), VALUES).map(to_json)
    return st.one_of(values, values, damaged(content), nested(100_000), st.binary(max_size=50))


def json_lines(valid: list[Any]) -> st.SearchStrategy[bytes]:
    """Files of JSON lines like a valid one, and others."""

    def write(lines: Any) -> bytes:
        return b"".join(to_json(line) + b"\n" for line in (lines if isinstance(lines, list) else [lines]))

    return st.one_of(edited(valid).map(write), edited(valid).map(write), damaged(write(valid)), nested(100_000))


def yaml_files(valid: Any) -> st.SearchStrategy[bytes]:
    """YAML files like a valid one, and others: aliases, tags, dates, several documents."""
    content = yaml.safe_dump(valid).encode()
    values = st.one_of(edited(valid), edited(valid), VALUES).map(to_json)  # JSON is YAML
    tags = [
        "!!python/name:os.system",
        "!!timestamp",
        "!!bool",
        "!!int",
        "!!float",
        "!!binary",
        "!!omap",
        "&a",
        "*a",
        "<<:",
    ]
    pieces = st.sampled_from(
        [*tags, "---", "...", ": ", "- ", "? ", "\n", "{", "}", "[", "]", "|", ">", "'", '"', "#", "\t"]
    )
    words = st.lists(st.one_of(pieces, SCALARS.map(str)), max_size=12).map(lambda parts: " ".join(parts))
    tagged = st.tuples(st.sampled_from(tags), SCALARS.map(str)).map(lambda pair: f"lr: {pair[0]} {pair[1]}")
    texts = st.one_of(words, tagged).map(lambda text: text.encode("utf-8", "replace"))
    return st.one_of(
        values,
        damaged(content),
        texts,
        nested(2000, (b"{a: ", b"}"), (b"- ", b""), (b"? ", b""), (b"!!set {", b"}")),
        st.binary(max_size=50),
    )


def to_json(value: Any) -> bytes:
    """JSON, in which NaN and single surrogates are possible."""
    return json.dumps(value).encode()


# ---- what must hold


def refuses_or_returns(function: Callable[[], Any]) -> Any:
    """What a function returns; an error must be one of those that become one line, and have one line."""
    try:
        return function()
    except (ValueError, OSError) as error:
        message = str(error)
    assert message.strip()
    assert "\n" not in message, message
    assert len(message) < MAX_MESSAGE, message
    return None


@contextmanager
def bounded_time() -> Iterator[None]:
    """An example that takes longer may be one that takes for ever where it is a little larger."""
    started = time.process_time()
    yield
    assert time.process_time() - started < MAX_SECONDS


# ---- run folders

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
    with changed_run({name: content}) as path, bounded_time():
        run = refuses_or_returns(partial(load, path))
        if run is not None:
            for read in (run.metrics, run.summary, run.best_step, run.config.digest):
                refuses_or_returns(read)
        for state in find_runs(path):
            assert all(text.isprintable() for text in state.row()), state.row()


def read_state(name: str, content: bytes) -> None:
    """Reads the checkpoints of the run, with another file in the newest, and finds the one to go on from."""
    with changed_run({name: content}) as path, bounded_time():
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

    with changed_run({name: content}) as path, bounded_time():
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


TARGETS: dict[str, Target] = run_folder()
