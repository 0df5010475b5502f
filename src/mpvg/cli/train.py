"""`mpvg train`."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpvg.cli.arguments import say
from mpvg.cli.flags import FREE, Flags, make_parser, parse_flags
from mpvg.cli.own import use_models, use_typed
from mpvg.config import FORMAT, RunConfig, flatten, nested
from mpvg.config.names import is_reference, model_flag, network_label, same_network
from mpvg.files import read_given
from mpvg.recipes import RECIPES, recipe, scale_schedule
from mpvg.validation import parse_config

MAX_CONFIG_BYTES = 2**20
"""Size of a file that --config names; what a run has is 2 kB."""


def train(arguments: list[str]) -> int:
    """Trains a new run, or continues one."""
    flags = parse_flags(arguments)
    options = flags.options
    file = {} if options.config is None else _read_config_file(options.config)
    if options.help:
        parser = make_parser(_compose(file, flags)[0])
        parser.print_help()
        parser.exit()
    if options.resume is not None and (options.dry_run or options.measure):
        raise ValueError("--dry_run and --measure are for a new run, not for --resume; leave one of them out")
    if options.resume is not None:
        return _resume(options.resume, file, flags)
    config, notes = _compose(file, flags)
    _check_typed(config.model, flags)
    if options.print_config:
        return _print_config(config)
    if not config.out:
        method = config.method if isinstance(config.method, str) else "custom"
        name = f"{Path(config.data).name}-{network_label(config.model)}-{method}-seed{config.seed}"
        config = replace(config, out=str(Path("runs") / name))
    if (
        options.auto_resume
        and not (options.dry_run or options.measure)
        and (Path(config.out) / "config.yaml").is_file()
    ):
        return _resume(config.out, file, flags)
    use_typed(config.model)
    if options.dry_run or options.measure:
        return _print_plan(config, notes, measure=options.measure)
    from mpvg import training

    if _is_first() and notes:
        say(*notes)
    _print_summary(config, training.train(config, break_lock=options.break_lock), config.out)
    return 0


def _resume(path: str, file: Mapping[str, Any], flags: Flags) -> int:
    from mpvg import runs, training

    run = runs.load(path)
    typed = flags.values.get("model")
    if typed is not None and same_network(typed, run.config.model):
        use_models([typed], {path: run.config.model})
        flags.values["model"] = run.config.model  # which may be another path to the same file
    was = run.config.to_dict()
    now = _with_flags(_with_file(run.config, file, flags).to_dict(), flags).to_dict()
    if now != was:
        changed = ", ".join(f"{key} is {was[key]!r} there, {now[key]!r} given" for key in was if was[key] != now[key])
        raise ValueError(
            f"--resume continues {path} as it is: {changed}; leave these out, or train a new run with --out"
        )
    _print_summary(run.config, training.resume(path, break_lock=flags.options.break_lock), path)
    return 0


def _compose(file: Mapping[str, Any], flags: Flags) -> tuple[RunConfig, list[str]]:
    """The values of the recipe, of the file on top and of the flags on top; and what follows the epochs, in words."""
    name = flags.values.get("recipe") or file.get("recipe")
    base = recipe(name, flags.values.get("data") or file.get("data"))
    epochs = file.get("epochs")
    config = _with_file(scale_schedule(base, epochs) if type(epochs) is int else base, file, flags)
    fitted = scale_schedule(base, flags.values.get("epochs", config.epochs))
    given = flatten(file) | flags.values
    notes = [
        f"optim.{name} is {getattr(fitted.optim, name):g}, in proportion to the epochs: the recipe {base.recipe} has "
        f"{getattr(base.optim, name):g} of {base.epochs}"
        for name in ("warmup_epochs", "cooldown_epochs")
        if getattr(fitted.optim, name) != getattr(base.optim, name) and f"optim.{name}" not in given
    ]
    return _with_flags(_merged(fitted.to_dict(), file), flags), notes


def _check_typed(model: str, flags: Flags) -> None:
    """Refuses a network that is code and whose name stands in a file only.

    Raises:
        ValueError: with the flag to type.
    """
    if is_reference(model) and flags.values.get("model") != model:
        raise ValueError(
            f"--config {flags.options.config} names the network {model}, which is code, and only a name that you type "
            f"yourself is imported; to do so, add --model {shlex.quote(model)}"
        )


def _with_file(base: RunConfig, file: Mapping[str, Any], flags: Flags) -> RunConfig:
    try:
        return RunConfig.from_dict(_merged(base.to_dict(), file))
    except ValueError as error:
        raise ValueError(f"--config {flags.options.config}: {error}; see `mpvg train --print_config`") from error


def _with_flags(values: Mapping[str, Any], flags: Flags) -> RunConfig:
    return RunConfig.from_dict(_merged(values, nested(flags.values)))


def _read_config_file(file: str) -> dict[str, Any]:
    """The keys of a YAML file, which may be the config.yaml of a run, or a pipe: it is read once."""
    hint = "see `mpvg train --print_config`"
    try:
        content = read_given(file, MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {file} is not readable YAML ({error}); {hint}") from error
    values = parse_config(content, f"--config {file}", FORMAT, hint, default=FORMAT)
    for key in ("recipe", "data"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"--config {file}: {key} is {values[key]!r}; allowed: a name, as text")
    return values


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the values on top; the parts of a config are merged key by key."""
    merged = dict(base)
    for name, value in values.items():
        inner = base.get(name)
        is_part = isinstance(inner, dict) and isinstance(value, dict) and name not in FREE
        merged[name] = {**inner, **value} if is_part and inner is not None else value
    return merged


def _print_config(config: RunConfig) -> int:
    import yaml

    print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
    return 0


def _print_plan(config: RunConfig, notes: list[str], *, measure: bool) -> int:
    from mpvg import training

    lines = training.plan(config, measure=measure)
    if _is_first():
        say(*notes, *lines)
    return 0


def _is_first() -> bool:
    """Whether this is the process that prints, of torchrun's several."""
    return os.environ.get("RANK", "0") == "0"


def _print_summary(config: RunConfig, summary: Mapping[str, Any], path: str) -> None:
    if not _is_first():
        return
    from mpvg.tasks import Ranking, describe_metrics, task_class

    metrics = ", ".join(describe_metrics(task_class(config.task), summary))
    done = f"done: {metrics}, {summary['images_per_second']:.0f} images/s"
    say(f"{done}; weights in {path}/checkpoints/last/model.safetensors")
    recipes = [make() for name, make in RECIPES.items() if name == config.recipe]
    if recipes and config.epochs < recipes[0].epochs:
        say(
            f"This is a short run: {config.epochs} of the {recipes[0].epochs} epochs of the recipe {config.recipe}. "
            "Expect clearly less than from a complete one; methods cannot be compared on it."
        )
    run = shlex.quote(path)
    own = model_flag(config.model)
    ranks = issubclass(task_class(config.task), Ranking)
    steps = {f"evaluate {run}{own}": "scores it again, beside its best epoch"}
    steps |= {f"predict {run} IMAGE{own}" + ("" if ranks else " --out DIR"): "says what is in images"}
    steps |= {f"analyze {run}{own}": "shows what the PE does in it: report.html"} if ranks else {}
    steps |= {f"plot {run}": "draws its curve; give several runs to compare them"}
    width = max(map(len, steps))
    say("next:", *(f"  mpvg {command.ljust(width)}   {text}" for command, text in steps.items()))
