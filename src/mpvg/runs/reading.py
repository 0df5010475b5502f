"""What is read from a run folder, which may come from anywhere: sizes, types and ranges are checked before use.

`metrics` and `checkpoints` read the rest, by the same parsers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpvg.config import FORMAT, RunConfig
from mpvg.data import DataInfo
from mpvg.files import read_regular
from mpvg.validation import build, check, parse_config, parse_json, printable, shorten, shown

MAX_CONFIG_BYTES = 2**16
"""Size of config.yaml, which has 2 kB; PyYAML takes a second for so much."""
MAX_JSON_BYTES = 2**24
"""Size of data.json, which has the names of the classes, and of summary.json."""
MAX_IMG_SIZE = 2**14
RESTORE = "restore it from a copy of the run"


def read_config(path: Path) -> RunConfig:
    """Reads a config that `create_run` wrote, in this format or an older one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not valid YAML, is of a newer format, or has a key or value that a run cannot have.
    """
    content = read_regular(path, MAX_CONFIG_BYTES)
    values = parse_config(content, str(path), FORMAT, RESTORE, default=1)
    try:
        return RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_info(path: Path) -> DataInfo:
    """Reads the description of a run's data.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    content = read_regular(path, MAX_JSON_BYTES)
    try:
        info: DataInfo = build(DataInfo, parse_json(content), "")
        _check_info(info)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {RESTORE}") from error
    return info


def _check_info(info: DataInfo) -> None:
    check("img_size", info.img_size, 1 <= info.img_size <= MAX_IMG_SIZE, f"a whole number in [1, {MAX_IMG_SIZE}]")
    for name in ("train_size", "val_size"):
        check(name, getattr(info, name), getattr(info, name) >= 0, "a whole number >= 0")
    check("std", info.std, all(value > 0 for value in info.std), "numbers > 0")
    check("crop_pct", info.crop_pct, 0 < info.crop_pct <= 1, "a number in (0, 1]")


def read_summary(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Reads the record of a complete run.

    Args:
        path: summary.json.
        names: of the numbers that it holds beside those of every run.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    content = read_regular(path, MAX_JSON_BYTES)
    try:
        values = parse_json(content, finite=False)
        if not isinstance(values, dict):
            raise ValueError("it holds no keys")
        if not isinstance(values.get("config_hash"), str):
            raise ValueError(f"config_hash is {shown(values.get('config_hash'))}; allowed: a text")
        check_numbers(values, (*names, "images_per_second", "seconds", "parameters", "skipped"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {RESTORE}") from error
    return values


def check_numbers(values: Mapping[str, Any], names: Iterable[str], finite: Sequence[str] = ()) -> None:
    """Raises ValueError unless all of these are numbers; a metric, such as that of averaged weights, may be NaN."""
    for name in names:
        if type(values.get(name)) not in (int, float) or (name in finite and not math.isfinite(values[name])):
            raise ValueError(f"{shorten(printable(name))} is {shown(values.get(name))}; allowed: a number")
