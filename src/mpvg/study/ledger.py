"""The ledger of a study: append-only, one JSON line for each finished run.

A process that dies while it appends leaves a torn last line, which is not a row: its run is done again, or only
recorded again where its folder is complete. Appends are locked, so that workers on one or many machines share a ledger.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpvg.config import RunConfig, digest_defaults, flatten, nested
from mpvg.files import cannot_write, read_regular
from mpvg.validation import build, check_choices, parse_json, shorten

LEDGER = "ledger.jsonl"
FORMAT = 1
MAX_BYTES = 2**28
"""Size of a ledger; a row has one or two kB."""
Key = tuple[str, str, int]
"""Setting, arm and seed: what a run is in its study."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished run."""

    format: int = FORMAT
    study: str
    scale: str
    setting: str
    arm: str
    seed: int
    status: Literal["done", "diverged"]
    reason: str = ""
    """Why a run diverged."""
    digest: str
    """Of the config, which names what was trained."""
    train_hash: str | None = None
    """Of the training samples."""
    val_hash: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last epoch, by name; empty if the run diverged."""
    best: dict[str, float] = field(default_factory=dict)
    """The best epoch's number and its value of the metric that chooses checkpoints: printed, never tested."""
    epochs: int
    parameters: int | None = None
    seconds: float | None = None
    """Training time without evaluation."""
    weights: str | None = None
    """SHA-256 of the last checkpoint's model.safetensors."""
    version: str
    torch: str
    hardware: str
    threads: int | None
    commit: str | None
    date: str
    run: str
    """The run folder, below the study's."""
    config: dict[str, Any]
    """The fields of the config that differ from their defaults, by dotted name."""

    def __post_init__(self) -> None:
        check_choices(self, "")
        if self.format != FORMAT:
            raise ValueError(f"it has format {self.format}, and this version of mpvg reads {FORMAT}")

    @property
    def key(self) -> Key:
        """What the run is in its study."""
        return self.setting, self.arm, self.seed

    def run_config(self) -> RunConfig:
        """The config of the run, without a folder.

        Raises:
            ValueError: the row's digest is not that of its config.
        """
        config = RunConfig.from_dict(_plain_defaults() | nested(self.config))
        if config.digest() != self.digest:
            raise ValueError(f"its config has the digest {config.digest()}, and the row says {self.digest}")
        return config


def config_differences(config: RunConfig) -> dict[str, Any]:
    """What a row keeps of a config."""
    defaults = digest_defaults()
    flat = flatten(config.to_dict())
    kept = {name: value for name, value in flat.items() if name != "out" and not name.startswith("loader.")}
    return {name: value for name, value in kept.items() if name not in defaults or value != defaults[name]}


def _plain_defaults() -> dict[str, Any]:
    """The defaults against which rows keep differences, as nested values."""
    return {name: value for name, value in digest_defaults().items() if "." not in name}


def check_finite(run: Path, metrics: Mapping[str, float], cure: str) -> None:
    """Refuses a run with a metric that no test can take; `cure`: the next step, in words."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"{run}: {name} is {value}, which cannot be tested; {cure}")


def read_ledger(path: Path) -> list[Row]:
    """The rows of a ledger; a torn last line is left out, and a missing file has none.

    Raises:
        OSError: it cannot be read.
        ValueError: another line is damaged, or two rows are of the same run.
    """
    try:
        content = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        return []
    *lines, _ = content.split(b"\n")  # what follows the last newline is empty, or torn
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row: Row = build(Row, parse_json(line), "")
        except ValueError as error:
            reason = shorten(str(error))
            raise ValueError(f"{path}, line {number} is damaged ({reason}); restore it, or remove the line") from error
        rows.append(row)
    keys: dict[Key, int] = {}
    for number, row in enumerate(rows, 1):
        if row.key in keys:
            setting, arm, seed = row.key
            raise ValueError(
                f"{path} has the run of arm {arm}, seed {seed}, in setting {setting} twice (lines {keys[row.key]} and "
                f"{number}); remove one of the lines"
            )
        keys[row.key] = number
    return rows


def append_row(path: Path, row: Row) -> bool:
    """Adds a row, unless the ledger has one of the same run; a torn last line is removed first.

    Returns:
        Whether it was added.

    Raises:
        OSError: it cannot be written.
        ValueError: the ledger is damaged.
    """
    line = json.dumps(dataclasses.asdict(row), allow_nan=False).encode() + b"\n"
    with _locked(path) as number:
        if any(other.key == row.key for other in read_ledger(path)):
            return False
        try:
            content = os.pread(number, MAX_BYTES, 0)
            os.ftruncate(number, content.rfind(b"\n") + 1)
            os.lseek(number, 0, os.SEEK_END)
            if os.write(number, line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(number)
        except OSError as error:
            raise cannot_write(path, error) from error
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The ledger, opened for this process alone."""
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        number = os.open(path, flags, 0o666)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield number
    finally:
        os.close(number)
