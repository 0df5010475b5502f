"""What a study trains, as data: arms x settings x seeds, read from a YAML file.

An arm is what is compared, for example a method. A setting is where: a network with a recipe and data. Both are changes
of config fields, so that an arm, a data set or a network is added by adding data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

from mpvg.config import RunConfig, flatten, nested
from mpvg.delivery import as_spec
from mpvg.files import read_regular
from mpvg.recipes import recipe, scale_schedule
from mpvg.study.paper import printed_table
from mpvg.validation import build, check, parse_yaml, shown, unknown_name

MAX_BYTES = 2**16
"""Size of a study file; PyYAML takes a second for so much."""
MAX_CONTRASTS = 6
"""Contrasts of an experiment: with five seeds, no more can pass Holm's correction."""
SCALES = ("tiny", "small", "paper")
_SET_BY_THE_STUDY = ("seed", "out", "recipe")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is compared."""

    name: str = ""
    """By which contrasts and folders name it."""
    label: str = ""
    """What tables call it; the name if it is empty."""
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted config field -> value."""
    first_seed: int = 0
    """Seed of the first repetition; an arm that is run again as a control has other seeds than the first time."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where arms are compared: a network with a recipe and data."""

    name: str = ""
    label: str = ""
    """What tables call it; the name if it is empty."""
    recipe: str
    """Name of a recipe."""
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted config field -> value, for every arm; `epochs` also scales the schedule."""
    seeds: int
    """Repetitions of each arm."""
    pretrain: dict[str, Any] | None = None
    """A recipe, and changes of its fields under `set`: each run starts from the best weights of such a run with the
    same seed, which gets the arm's fields too; None: runs start anew."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A question to the arms' means: a weighted sum that is zero if there is no effect."""

    name: str = ""
    weights: dict[str, float]
    """Arm -> weight; the weights add up to 0."""
    claim: str = ""
    """What the contrast is for, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms, settings and the questions that were registered before the first run."""

    name: str
    question: str
    reference: str
    """The arm that the others are compared with in tables."""
    margins: dict[str, float]
    """Metric -> the smallest difference that matters; the first metric is the end point."""
    arms: tuple[Arm, ...]
    contrasts: tuple[Contrast, ...]
    scales: dict[str, tuple[Setting, ...]]
    table: str | None = None
    """The table or figure of the paper whose values are shown beside."""

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def settings(self, scale: str) -> tuple[Setting, ...]:
        """The settings of a scale.

        Raises:
            ValueError: the study has no such scale.
        """
        if scale not in self.scales:
            raise ValueError(f"study {self.name}: {unknown_name('scale', scale, self.scales)}")
        return self.scales[scale]


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    setting: str
    arm: str
    config: RunConfig
    pretrain: RunConfig | None = None
    """The run that comes first; `config.network.init` is its folder, below the study's."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What the ledger knows it by."""
        return self.setting, self.arm, self.config.seed

    @property
    def folder(self) -> str:
        """The run folder, below the study's."""
        return f"runs/{self.setting}/{self.arm}/seed{self.config.seed}"


def ready_studies() -> list[str]:
    """Names of the studies that come with the package."""
    folder = resources.files("mpvg.study") / "ready"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_study(name: str) -> Study:
    """Reads a ready study by its name, or a study file.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no such study, or the file is not valid.
    """
    if name in ready_studies():
        text = (resources.files("mpvg.study") / "ready" / f"{name}.yaml").read_bytes()
    elif name.endswith((".yaml", ".yml")) or Path(name).exists():
        text = read_regular(name, MAX_BYTES)
    else:
        raise ValueError(unknown_name("study", name, ready_studies()) + "; or give a YAML file")
    return parse_study(text, name)


def parse_study(content: bytes, name: str) -> Study:
    """The study in a YAML file.

    Args:
        content: of the file.
        name: of the file, for errors.

    Raises:
        ValueError: naming what is not valid.
    """
    try:
        return study_from(parse_yaml(content))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def to_dict(study: Study) -> dict[str, Any]:
    """The study as the values of its YAML file."""

    def plain(part: Arm | Setting | Contrast) -> dict[str, Any]:
        defaults = {"label": part.name, "first_seed": 0, "claim": ""}
        return {k: v for k, v in vars(part).items() if k != "name" and v != defaults.get(k, {})}

    values: dict[str, Any] = {"study": study.name, "question": study.question, "reference": study.reference}
    if study.table is not None:
        values["table"] = study.table
    values["margins"] = study.margins
    values["arms"] = {arm.name: plain(arm) for arm in study.arms}
    values["contrasts"] = {contrast.name: plain(contrast) for contrast in study.contrasts}
    values["scales"] = {scale: {s.name: plain(s) for s in settings} for scale, settings in study.scales.items()}
    return values


def study_from(values: Any) -> Study:
    """The study of values as `to_dict` gives them.

    Raises:
        ValueError: naming what is not valid.
    """
    known = ("study", "question", "reference", "table", "margins", "arms", "contrasts", "scales")
    if not isinstance(values, dict):
        raise ValueError(f"it must hold the keys {', '.join(known)}, got {shown(values)}")
    for key in values:
        if key not in known:
            raise ValueError(unknown_name("key", key, known, near=1))
    if not isinstance(values.get("scales"), dict):
        raise ValueError(f"scales is {shown(values.get('scales'))}; allowed: scale -> settings")
    scales = {scale: _parts(Setting, given, f"scales.{scale}") for scale, given in values["scales"].items()}
    parts = {
        "name": values.get("study"),
        "arms": _parts(Arm, values.get("arms"), "arms"),
        "contrasts": _parts(Contrast, values.get("contrasts", {}), "contrasts"),
    }
    plain = {key: value for key, value in values.items() if key not in ("study", "scales", *parts)}
    study: Study = build(Study, {**plain, **parts, "scales": {}}, "")
    study = replace(study, scales=scales)
    if study.table is not None:
        printed_table(study.table)
    _check(study)
    return study


def _parts(kind: Any, values: Any, name: str) -> tuple[Any, ...]:
    """Named parts of a study, in the order of the file."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {shown(values)}; allowed: name -> fields")
    built = []
    for key, given in values.items():
        _check_name(name, key)
        part = build(kind, given, f"{name}.{key}.")
        built.append(replace(part, name=key, **({"label": part.label or key} if hasattr(part, "label") else {})))
    return tuple(built)


def _check_name(place: str, name: str) -> None:
    if not 0 < len(name) <= 64 or not all(c.isalnum() or c in "_-." for c in name) or name.startswith("."):
        raise ValueError(f"{place} has {shown(name)}; allowed as a name: letters, digits, _, - and ., at most 64")


def _check(study: Study) -> None:
    _check_name("study", study.name)
    arms = [arm.name for arm in study.arms]
    named = {"reference": [study.reference]}
    named |= {f"contrasts.{contrast.name}": list(contrast.weights) for contrast in study.contrasts}
    for place, names in named.items():
        for name in names:
            if name not in arms:
                raise ValueError(f"{place}: {unknown_name('arm', name, arms)}")
    for contrast in study.contrasts:
        weights = contrast.weights.values()
        fits = len(weights) >= 2 and abs(math.fsum(weights)) < 1e-9 and all(weights)
        check(f"contrasts.{contrast.name}.weights", contrast.weights, fits, "weights other than 0 that add up to 0")
    if len(study.contrasts) > MAX_CONTRASTS:
        raise ValueError(f"contrasts are {len(study.contrasts)}; allowed: at most {MAX_CONTRASTS}, chosen before a run")
    check("margins", study.margins, bool(study.margins) and min(study.margins.values()) > 0, "metric -> number > 0")
    known = bool(study.scales) and set(study.scales) <= set(SCALES) and all(study.scales.values())
    check("scales", list(study.scales), known, f"{', '.join(SCALES)}, each with a setting")
    for arm in study.arms:
        check(f"arms.{arm.name}.first_seed", arm.first_seed, 0 <= arm.first_seed < 2**30, "a whole number in [0, 2^30)")
    for scale, settings in study.scales.items():
        for setting in settings:
            _check_setting(setting, study.arms, f"scales.{scale}.{setting.name}")


def _check_setting(setting: Setting, arms: Sequence[Arm], name: str) -> None:
    check(f"{name}.seeds", setting.seeds, 1 <= setting.seeds <= 10_000, "a whole number in [1, 10000]")
    before = _pretraining(setting)
    for arm in arms:
        make_config(setting, arm)
        if before is not None:
            make_config(before, arm)


def make_config(setting: Setting, arm: Arm, *, data: str | None = None, model: str | None = None) -> RunConfig:
    """The config of an arm in a setting, for any seed and folder.

    Raises:
        ValueError: a field is unknown, or its value is not allowed.
    """
    try:
        config = _with_fields(_with_fields(recipe(setting.recipe, data), setting.set), arm.set)
        config = config if model is None else replace(config, model=model)
        as_spec(config.method)
        return config
    except ValueError as error:
        raise ValueError(f"arm {arm.name} in setting {setting.name}: {error}") from error


def _with_fields(config: RunConfig, fields: Mapping[str, Any]) -> RunConfig:
    flat = flatten(config.to_dict())
    for name in fields:
        if name not in flat or name in _SET_BY_THE_STUDY:
            allowed = [known for known in flat if known not in _SET_BY_THE_STUDY]
            raise ValueError(unknown_name("config field", name, allowed, near=1))
    epochs = fields.get("epochs", config.epochs)
    if type(epochs) is int:
        flat = flatten(scale_schedule(config, epochs).to_dict())
    return RunConfig.from_dict(nested(flat | dict(fields)))


def make_cells(
    study: Study,
    scale: str,
    out: Path,
    *,
    seeds: int | None = None,
    data: str | None = None,
    model: str | None = None,
) -> list[Cell]:
    """The runs of a study, in the order in which they are best done: every arm has a seed before one has the next.

    At every scale but `paper`, runs are on the CPU with one thread, so that their bits do not depend on the cores.

    Args:
        study: the study.
        scale: one of its scales.
        out: the study's folder.
        seeds: repetitions of each arm; None: those of the setting.
        data: replaces the data of every setting.
        model: replaces the network of every setting.

    Raises:
        ValueError: there is no such scale, or an arm and its repetition have seeds in common.
    """
    place: dict[str, Any] = {} if scale == "paper" else {"threads": 1, "device": "cpu"}
    cells = []
    for setting in study.settings(scale):
        _check_repetitions(study.arms, seeds or setting.seeds)
        before = _pretraining(setting)
        configs = [(arm, replace(make_config(setting, arm, data=data, model=model), **place)) for arm in study.arms]
        for number in range(seeds or setting.seeds):
            for arm, config in configs:
                seed = arm.first_seed + number
                cell = Cell(setting.name, arm.name, replace(config, seed=seed))
                config = replace(cell.config, out=str(out / cell.folder))
                if before is not None:
                    start = f"pretrained/{setting.name}/{arm.name}/seed{seed}"
                    first = replace(make_config(before, arm, model=model), **place, seed=seed, out=str(out / start))
                    config = replace(config, network=replace(config.network, init=start))
                    cell = replace(cell, pretrain=first)
                cells.append(replace(cell, config=config))
    return cells


def _check_repetitions(arms: Sequence[Arm], seeds: int) -> None:
    """Refuses an arm that is another one with some of its seeds: it would be compared with its own runs."""
    for arm, other in combinations(arms, 2):
        distance = abs(arm.first_seed - other.first_seed)
        if arm.set == other.set and distance < seeds:
            raise ValueError(
                f"the arms {arm.name} and {other.name} are the same, and with {seeds} seeds from {arm.first_seed} and "
                f"from {other.first_seed} they share runs; allowed: first_seed at least {seeds} apart"
            )


def _pretraining(setting: Setting) -> Setting | None:
    """The setting of the runs that come before."""
    if setting.pretrain is None:
        return None
    place, fixed = f"scales.{setting.name}.pretrain", {"name": f"{setting.name}.pretrain", "seeds": setting.seeds}
    for name in setting.pretrain:
        if name not in ("recipe", "set"):
            raise ValueError(f"{place}: {unknown_name('key', name, ('recipe', 'set'), near=1)}")
    return build(Setting, {**fixed, **setting.pretrain}, f"{place}.")
