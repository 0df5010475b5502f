"""`mpvg train`."""

import argparse
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpvg.config import FORMAT, RunConfig
from mpvg.recipes import recipe

DESCRIPTION = "Trains a network. Values come from the recipe, then from --config, then from the flags."


def train(arguments: list[str]) -> int:
    """Trains a new run, or continues one."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--data", "--recipe", "--config", "--resume"):
        early.add_argument(name)
    for name in ("--auto_resume", "--print_config"):
        early.add_argument(name, action="store_true")
    known, _ = early.parse_known_args(arguments)
    arguments = [argument for argument in arguments if argument != "--print_config"]  # jsonargparse has its own
    if known.resume is not None and "--help" not in arguments:
        return _resume(known.resume, arguments)
    config = _parse_flags(_base(known.data, known.recipe, known.config), arguments)
    if known.print_config:
        return _print_config(config)
    if not config.out:
        method = config.method if isinstance(config.method, str) else "custom"
        name = f"{Path(config.data).name}-{config.model}-{method}-seed{config.seed}"
        config = replace(config, out=str(Path("runs") / name))
    if known.auto_resume and (Path(config.out) / "config.yaml").is_file():
        return _resume(config.out, arguments)
    from mpvg import training

    _print_summary(config, training.train(config), config.out)
    return 0


def _resume(path: str, arguments: list[str]) -> int:
    from mpvg import runs, training

    run = runs.load(path)
    given = _parse_flags(run.config, arguments)
    if given != run.config:
        was, now = run.config.to_dict(), given.to_dict()
        changed = ", ".join(f"{key} is {was[key]!r} there, {now[key]!r} given" for key in was if was[key] != now[key])
        raise ValueError(
            f"--resume continues {path} as it is: {changed}; leave these out, or train a new run with --out"
        )
    _print_summary(run.config, training.resume(path), path)
    return 0


def _base(data: str | None, name: str | None, file: str | None) -> RunConfig:
    """The values below the flags: those of the recipe, and of the config file on top."""
    if file is None:
        return recipe(name, data)
    values = _read_config_file(file)
    for key in ("recipe", "data"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"--config {file}: {key} is {values[key]!r}; allowed: a name, as text")
    base = recipe(name or values.get("recipe"), data or values.get("data"))
    try:
        return RunConfig.from_dict(_merged(base.to_dict(), values))
    except ValueError as error:
        raise ValueError(f"--config {file}: {error}; see `mpvg train --print_config`") from error


def _read_config_file(file: str) -> dict[str, Any]:
    """The keys of a YAML file, which may be the config.yaml of a run."""
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {file} is not readable YAML ({reason}); see `mpvg train --print_config`") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {file} holds no keys; see `mpvg train --print_config`")
    format = values.pop("format", FORMAT)
    if format not in range(1, FORMAT + 1):
        raise ValueError(
            f"--config {file} has format {format}, and this version of mpvg reads 1 to {FORMAT}; update mpvg"
        )
    return values


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the values on top; the parts of a config are merged key by key."""
    merged = dict(base)
    for name, value in values.items():
        inner = base.get(name)
        is_part = isinstance(inner, dict) and isinstance(value, dict) and name not in ("method", "task_options")
        merged[name] = {**inner, **value} if is_part and inner is not None else value
    return merged


def _parse_flags(base: RunConfig, arguments: list[str]) -> RunConfig:
    """Puts the flags on top of a base."""
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="mpvg train",
        exit_on_error=False,
        allow_abbrev=False,
        usage="mpvg train [--data DATA] [--method METHOD] [--out RUN] [options] | mpvg train --resume RUN",
        description=DESCRIPTION,
    )
    parser.add_argument("--config", help="YAML file with any of the options below; the flags win over it.")
    parser.add_argument("--print_config", action="store_true", help="Print the resulting config as YAML and exit.")
    parser.add_argument("--resume", help="Run folder to continue, to the same bits as if it had not been interrupted.")
    parser.add_argument(
        "--auto_resume",
        action="store_true",
        help="Continue the run in --out if there is one: for commands that are restarted.",
    )
    parser.add_class_arguments(RunConfig, as_group=True)
    parser.set_defaults(base.to_dict())
    for action in parser._actions:
        action.required = False  # the recipe has given every value; the help should not say otherwise
    try:
        values = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise ValueError(_explain(str(error), base)) from error
    for name in ("config", "print_config", "resume", "auto_resume"):
        del values[name]
    return RunConfig.from_dict(values)


def _print_config(config: RunConfig) -> int:
    import yaml

    print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
    return 0


def _explain(message: str, base: RunConfig) -> str:
    """A refusal as one line, with the nearest option where one does not exist."""
    message = " ".join(message.split())
    message = re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("typing.", "")
    message = re.sub(r"Group '(\w+)' does not accept option '([\w.]+)'", r"Option '\1.\2' is not accepted", message)
    keys = [f"{a}.{b}" for a, part in base.to_dict().items() if isinstance(part, dict) for b in part]
    keys += list(base.to_dict())
    unknown = "unrecognized" in message or "accept" in message
    for word in message.replace("'", " ").replace("--", " ").split() if unknown else ():
        if word not in keys and (near := difflib.get_close_matches(word, keys, n=1, cutoff=0.75)):
            return f"{message}; did you mean {near[0]}?"
    return f"{message}; see `mpvg train --help`"


def _print_summary(config: RunConfig, summary: Mapping[str, Any], path: str) -> None:
    if os.environ.get("RANK", "0") != "0":  # torchrun's: only one of several processes prints
        return
    from mpvg.tasks import describe_metrics, task_class

    metrics = ", ".join(describe_metrics(task_class(config.task), summary))
    print(
        f"done: {metrics}, {summary['images_per_second']:.0f} images/s; weights in "
        f"{path}/checkpoints/last/model.safetensors"
    )
