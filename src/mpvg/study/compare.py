"""Run folders of any origin as a study: grouped by the one thing in which they differ, seeds as repetitions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpvg.config import UNCOUNTED, flatten
from mpvg.delivery import as_spec, describe_spec
from mpvg.files import read_regular
from mpvg.runs import Run, load
from mpvg.runs.reading import RESTORE
from mpvg.study.ledger import Row, check_finite, config_differences
from mpvg.study.plan import Arm, Contrast, Setting, Study
from mpvg.study.results import StudyResults, collect
from mpvg.tasks import task_class
from mpvg.validation import parse_json, shorten, unknown_name

MARGIN, POINTS = 0.01, 0.005
"""The margin of a metric unless one is given, and that of a metric in percent."""
SCALE = "compare"
_NOT_COMPARED = ("seed", "recipe", *UNCOUNTED)
_CONDITIONS = {"data": "train_hash", "torch": "torch", "hardware": "hardware"}
"""What must be equal, as --allow names it -> the field of a row."""


@dataclass(frozen=True)
class _Given:
    """A run folder and what it says."""

    run: Run
    row: Row
    fields: dict[str, Any]


def compare(
    paths: Sequence[Path],
    *,
    reference: str | None = None,
    margins: Mapping[str, float] | None = None,
    allow: Sequence[str] = (),
) -> StudyResults:
    """Groups complete runs by what differs in their configs, and tests every group against one of them.

    Args:
        paths: run folders.
        reference: the group that the others are compared with; None: that of the first run.
        margins: metric -> the smallest difference that matters; None: 0.005 for metrics in percent, 0.01 for others.
        allow: config fields that may differ beside the one that is compared, and data, torch or hardware.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: a run is not complete, or the runs differ in none or more than one thing, or in data, torch or
            hardware, or a group has a seed twice.
    """
    given = [_read(path) for path in paths]
    differing = _differing(given, allow)
    if not differing:
        raise ValueError("the runs differ in nothing but seeds; give runs that differ in one thing, such as the method")
    if len(differing) > 1:
        what = ", ".join(f"{name} ({shorten(', '.join(values))})" for name, values in differing.items())
        raise ValueError(
            f"the runs differ in {what}; compare runs that differ in one thing, or let the others differ with --allow"
        )
    (field,) = differing
    _check_conditions(given, allow)
    groups: dict[str, list[_Given]] = {}
    for one in given:
        groups.setdefault(_value(one, field), []).append(one)
    for label, members in groups.items():
        seeds = [one.row.seed for one in members]
        if len(set(seeds)) < len(seeds):
            twice = next(seed for seed in seeds if seeds.count(seed) > 1)
            raise ValueError(f"{field} {label} has the seed {twice} twice; give each run once, and other seeds")
    first = reference or next(iter(groups))
    if first not in groups:
        raise ValueError(f"--reference: {unknown_name(f'value of {field}', first, groups)}")
    return _results(field, groups, first, margins)


def _read(path: Path) -> _Given:
    run = load(path)
    summary = run.summary()
    if summary is None:
        raise ValueError(f"{path} is not complete; continue it with `mpvg train --resume {path}`, or leave it out")
    try:
        made = parse_json(read_regular(path / "environment.json", 2**20))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'environment.json'} is missing or damaged ({error}); {RESTORE}") from error
    made = made if isinstance(made, dict) else {}
    versions = made["versions"] if isinstance(made.get("versions"), dict) else {}
    config, task = run.config, task_class(run.config.task)
    row = Row(
        study=SCALE,
        scale=SCALE,
        setting="runs",
        arm="",
        seed=config.seed,
        status="done",
        digest=config.digest(),
        train_hash=run.info.train_hash,
        val_hash=run.info.val_hash,
        metrics={name: summary[name] for name in task.summarized},
        best={task.best: summary[f"best_{task.best}"]},
        epochs=config.epochs,
        parameters=summary["parameters"],
        seconds=summary["seconds"],
        version=str(versions.get("mpvg", "unknown")),
        torch=str(versions.get("torch", "unknown")),
        hardware=shorten(str(made.get("hardware", "unknown"))),
        threads=config.threads,
        commit=shorten(str(made.get("commit", "unknown"))),
        date=shorten(str(made.get("date", "unknown"))),
        run=str(path),
        config=config_differences(config),
    )
    fields = {
        name: value for name, value in flatten(config.to_dict()).items() if name.split(".")[0] not in _NOT_COMPARED
    }
    check_finite(path, row.metrics, "leave the run out")
    return _Given(run, row, fields | {"method": describe_spec(as_spec(config.method))})


def _differing(given: Sequence[_Given], allow: Sequence[str]) -> dict[str, list[str]]:
    """Config field -> its values, of the fields in which runs differ."""
    names = given[0].fields
    for name in allow:
        if name not in names and name not in _CONDITIONS:
            raise ValueError(f"--allow: {unknown_name('name', name, sorted({*_CONDITIONS, *names}))}")
    values = {name: list(dict.fromkeys(_value(one, name) for one in given)) for name in names if name not in allow}
    return {name: found for name, found in values.items() if len(found) > 1}


def _value(one: _Given, field: str) -> str:
    value = one.fields[field]
    return value if isinstance(value, str) else repr(value)


def _check_conditions(given: Sequence[_Given], allow: Sequence[str]) -> None:
    for name, field in _CONDITIONS.items():
        values = {str(getattr(one.row, field)) for one in given}
        if len(values) > 1 and name not in allow:
            raise ValueError(
                f"the runs differ in {name} ({', '.join(sorted(values))}), and differences may come from that; compare "
                f"runs made alike, or give --allow {name}"
            )


def _results(
    field: str, groups: Mapping[str, list[_Given]], first: str, margins: Mapping[str, float] | None
) -> StudyResults:
    names = {label: f"group{number}" for number, label in enumerate(groups)}
    task = task_class(next(iter(groups.values()))[0].run.config.task)
    shown_first = sorted(task.summarized, key=lambda name: task.metrics[name].percent)
    default = {name: POINTS if task.metrics[name].percent else MARGIN for name in shown_first}
    for name in margins or {}:
        if name not in default:
            raise ValueError(f"--margin: {unknown_name('metric', name, default)}")
    others = [label for label in groups if label != first]
    study = Study(
        name=SCALE,
        question=f"What does {field} change?",
        reference=names[first],
        margins={**default, **(margins or {})},
        arms=tuple(Arm(name=names[label], label=label, set={field: label}) for label in groups),
        contrasts=tuple(Contrast(name=names[label], weights={names[label]: 1, names[first]: -1}) for label in others),
        scales={SCALE: (Setting(name="runs", label="runs", recipe="digits", seeds=1),)},
    )
    rows = [Row(**{**vars(one.row), "arm": names[label]}) for label, members in groups.items() for one in members]
    return collect(study, SCALE, rows)
