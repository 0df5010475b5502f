"""The command `mpvg`: parses, calls, prints. Nothing heavy loads before a verb needs it."""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpvg.config import RunConfig, unknown
from mpvg.recipes import recipe

if TYPE_CHECKING:
    from mpvg.analysis.networks import Count, Support

USAGE = """\
usage: mpvg VERB [options]     mpvg VERB --help says more

  train      train a classifier, or continue an interrupted run
  evaluate   score a run's checkpoint on its validation set
  predict    name what is on images
  inspect    parameters, FLOPs and which layer receives which position embedding
  methods    the methods, as a table
  runs       list run folders, with their state
  plot       draw the curves of several runs
  analyze    what position embeddings do inside runs: numbers, figures and report.html
  demo       train and compare a few methods; ends with a table and report.html

A first run:  mpvg train --data digits --method mpvg --epochs 2 --seed 0 --out RUN
"""

READOUTS = {"token": "class token", "avg": "mean over tokens", "map": "attention pooling"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; a user's error is one message and exit code 2, MPVG_TRACEBACK=1 shows where it came from."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if verb not in VERBS:
        return _fail(unknown("verb", verb, VERBS, near=1))
    try:
        return VERBS[verb](arguments[1:])
    except KeyboardInterrupt as stop:  # training's own, `Interrupted`, says which step is saved
        print(f"\n{str(stop) or 'interrupted; continue with `mpvg train --resume RUN`'}", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except (ValueError, OSError) as error:
        if os.environ.get("MPVG_TRACEBACK"):
            raise
        text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
        return _fail(text)
    except ModuleNotFoundError as error:
        if os.environ.get("MPVG_TRACEBACK"):
            raise
        return _fail(f"{error}; what is optional comes with: pip install 'mpvg[all]'")


def _fail(message: str) -> int:
    print(f"mpvg: error: {message}", file=sys.stderr)
    return 2


def _train(arguments: list[str]) -> int:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--data", "--recipe", "--config", "--resume"):
        early.add_argument(name)
    early.add_argument("--auto_resume", action="store_true")
    known, _ = early.parse_known_args(arguments)
    if known.resume is not None and "--help" not in arguments:
        return _resume(known.resume, arguments)
    config = _parse_config(_base(known.data, known.recipe, known.config), arguments)
    if not config.out:
        method = config.method if isinstance(config.method, str) else "custom"
        name = f"{Path(config.data).name}-{config.model}-{method}-seed{config.seed}"
        config = replace(config, out=str(Path("runs") / name))
    if known.auto_resume and (Path(config.out) / "config.yaml").is_file():
        return _resume(config.out, arguments)
    from mpvg.training import train

    _print_summary(train(config), config.out)
    return 0


def _resume(path: str, arguments: list[str]) -> int:
    from mpvg import runs
    from mpvg.training import resume

    run = runs.load(path)
    given = _parse_config(run.config, arguments)
    if given != run.config:
        was, now = run.config.to_dict(), given.to_dict()
        changed = ", ".join(f"{key} is {was[key]!r} there, {now[key]!r} given" for key in was if was[key] != now[key])
        raise ValueError(
            f"--resume continues {path} as it is: {changed}; leave these out, or train a new run with --out"
        )
    _print_summary(resume(path), path)
    return 0


def _base(data: str | None, name: str | None, file: str | None) -> RunConfig:
    """The recipe that the flags, or else the config file, ask for."""
    values: Any = {}
    if file is not None:
        import yaml

        try:
            values = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--config {file} is no readable YAML ({' '.join(str(error).split())}); see `mpvg train --print_config`"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"--config {file} holds no keys; see `mpvg train --print_config`")
    for key in ("recipe", "data"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"--config {file}: {key} is {values[key]!r}; allowed: a name, as text")
    return recipe(name or values.get("recipe"), data or values.get("data"))


def _parse_config(base: RunConfig, arguments: list[str]) -> RunConfig:
    """Puts --config and the flags on top of a base."""
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="mpvg train",
        exit_on_error=False,
        allow_abbrev=False,
        usage="mpvg train [--data DATA] [--method METHOD] [--out RUN] [options] | mpvg train --resume RUN",
        description="Trains a classifier. Values come from the recipe, then from --config, then from the flags.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("--resume", help="Run folder to continue, to the same bits as if it had not been interrupted.")
    parser.add_argument(
        "--auto_resume",
        action="store_true",
        help="Continue the run in --out if there is one: for commands that restart.",
    )
    parser.add_class_arguments(RunConfig, as_group=True)
    parser.set_defaults(base.to_dict())
    for action in parser._actions:
        action.required = False  # the recipe has given every value; the help should not say otherwise
    try:
        values = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise ValueError(_explain(str(error), base)) from error
    del values["config"], values["resume"], values["auto_resume"]
    values.pop("print_config", None)
    return RunConfig.from_dict(values)


def _explain(message: str, base: RunConfig) -> str:
    """One line of a refusal, with the nearest option where one does not exist."""
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


def _print_summary(summary: dict[str, Any], path: str) -> None:
    if os.environ.get("RANK", "0") != "0":  # torchrun's: one of several processes speaks
        return
    ema = f", ema {100 * summary['ema_accuracy']:.2f} %" if "ema_accuracy" in summary else ""
    print(
        f"done: accuracy {100 * summary['accuracy']:.2f} % (best {100 * summary['best_accuracy']:.2f} %{ema}), "
        f"nll {summary['nll']:.4f}, {summary['images_per_second']:.0f} images/s; weights in "
        f"{path}/checkpoints/last/model.safetensors"
    )


def _run_parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mpvg {verb}", description=description)
    parser.add_argument("run", help="folder that `mpvg train` made")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which weights (default: last)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the trained ones")
    return parser


def _evaluate(arguments: list[str]) -> int:
    parser = _run_parser("evaluate", "Scores a run's checkpoint on every validation image once.")
    parser.add_argument("--data", help="another folder or set with the same classes")
    given = parser.parse_args(arguments)
    import torch

    from mpvg import runs
    from mpvg.tasks import evaluate

    run = runs.load(given.run)
    if given.data is not None:
        run = replace(run, config=replace(run.config, data=given.data))
    device = torch.device("cuda" if torch.cuda.is_available() and run.config.device != "cpu" else "cpu")
    data = run.data(device)
    scores = evaluate(run.model(given.checkpoint, ema=given.ema).to(device), data.val)
    left_out = f", {data.val.skipped} unreadable left out" if data.val.skipped else ""
    print(
        f"{given.run}: accuracy {100 * scores.accuracy:.2f} %, top-5 {100 * scores.top5:.2f} %, nll {scores.nll:.4f} "
        f"on {scores.count} images{left_out}"
    )
    return 0


def _predict(arguments: list[str]) -> int:
    parser = _run_parser("predict", "Prints the five most probable classes of each image.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    given = parser.parse_args(arguments)
    from mpvg import runs
    from mpvg.data import read_image
    from mpvg.tasks import predict

    run = runs.load(given.run)
    model, preprocess = run.model(given.checkpoint, ema=given.ema), run.preprocess()
    for path in given.images:
        try:
            image = preprocess(read_image(path))
        except Exception as error:  # decoders of untrusted files raise whatever they stumble over
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"image {path} cannot be read ({reason}); give an image file, PNG or JPEG say") from error
        print(path)
        for name, probability in predict(model, image[None], run.info.class_names)[0]:
            print(f"  {100 * probability:6.2f} %  {name}")
    return 0


def _inspect(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mpvg inspect", description="Says what a network is under a method.")
    parser.add_argument("model", nargs="?", help="a network's name, such as deit_tiny_patch16_224, or timm/<name>")
    parser.add_argument("--method", default="mpvg", help="a method's name, or a spec as JSON (default: mpvg)")
    parser.add_argument("--num_classes", type=int, default=1000, help="classes of the head (default: 1000)")
    parser.add_argument("--img_size", type=int, help="side of the image in pixels (default: the network's)")
    parser.add_argument("--in_chans", type=int, help="channels of the image (default: 3)")
    parser.add_argument("--figure", metavar="FILE", help="also draw what receives what, as .svg, .png or .pdf")
    parser.add_argument("--table", action="store_true", help="all networks of the paper, beside its #Params")
    given = parser.parse_args(arguments)
    if given.table == (given.model is not None):
        parser.error("give the name of a network, or --table and no name")
    from mpvg.analysis import networks
    from mpvg.delivery import describe

    if given.table:
        return _print_counts(networks.parameter_table())
    size = {"num_classes": given.num_classes, "img_size": given.img_size, "in_chans": given.in_chans}
    found = networks.inspect(given.model, _method(given.method), **size)
    channels, height, width = found.image
    print(f"{given.model} with {given.method}, {channels} x {height} x {width}, {given.num_classes} classes")
    print(f"  parameters  {found.parameters:,} ({found.delivery_parameters:,} of them LN')")
    print(f"  GFLOPs      {found.flops / 1e9:.4f} ({found.flops / 2e9:.4f} GMACs) an image")
    print(f"  read-out    {READOUTS.get(found.pool, found.pool)}\n\n  what receives which position embedding")
    rows = describe(found.spec, found.depth)
    for place, received in rows:
        print(f"  {place:9s}   {received}")
    if given.figure:
        from mpvg import figures

        figures.delivery_diagram(
            rows, READOUTS.get(found.pool, found.pool), f"{given.model}, {given.method}", Path(given.figure)
        )
        print(f"\ndrawn in {given.figure}")
    return 0


def _print_counts(rows: "Sequence[Count]") -> int:
    print(f"{'network':29s} {'classes':>7s}  {'method':8s} {'parameters':>11s} {'in M':>7s}  paper, in M")
    notes: list[str] = []
    for row in rows:
        mark = ""
        if row.shown != row.paper:
            notes.append(f"[{len(notes) + 1}] {row.reason}")
            mark = f"  differs [{len(notes)}]"
        name = f"{row.network:29s} {row.num_classes:7d}  {row.method:8s}"
        print(f"{name} {row.parameters:11,d} {row.shown:>7s}  {row.paper:>6s}{mark}")
    print(f"\n{len(rows) - len(notes)} of {len(rows)} as the paper prints them, which cuts off after three decimals.")
    print("\n".join(notes))
    return 0


def _methods(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mpvg methods", description="Prints the methods as a table.")
    parser.add_argument("--networks", action="store_true", help="which network runs which method, as Markdown")
    if parser.parse_args(arguments).networks:
        from mpvg.analysis.networks import support_table

        print(support_markdown(support_table()))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mpvg.delivery import METHODS

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("method", *next(iter(METHODS.values())).to_dict()):
        table.add_column(column)
    for name, spec in METHODS.items():
        table.add_row(name, *(str(value) for value in spec.to_dict().values()))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return 0


def support_markdown(table: "Mapping[str, Mapping[str, Support]]") -> str:
    """The table of the README: methods down, networks across, and the reasons of the refusals below."""
    columns = list(next(iter(table.values())))
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    notes: list[str] = []
    for method, row in table.items():
        cells = []
        for support in row.values():
            if support.refused and support.refused not in notes:
                notes.append(support.refused)
            same = f"= `{support.same_as}`" if support.same_as else "yes"
            cells.append(f"no [{notes.index(support.refused) + 1}]" if support.refused else same)
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def _demo(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mpvg demo", description="Trains and compares a few methods on real images.")
    parser.add_argument("--data", default="digits", choices=("digits", "fashion-mnist"))
    parser.add_argument("--out", default="demo", help="folder of the runs and of report.html (default: demo)")
    given = parser.parse_args(arguments)
    from mpvg import study

    study.demo(given.data, Path(given.out))
    return 0


def _runs(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mpvg runs", description="Lists the run folders below a folder.")
    parser.add_argument("folder", nargs="?", default="runs", help="where to look (default: runs)")
    given = parser.parse_args(arguments)
    from mpvg import study

    rows: list[tuple[str, ...]] = [("run", "state", "epochs", "best, %", "data", "model", "method", "seed")]
    rows += [state.row() for state in study.find_runs(Path(given.folder))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


def _plot(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mpvg plot", description="Draws one number of every epoch for several runs.")
    parser.add_argument("runs", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--key", default="accuracy", help="a number of metrics.jsonl (default: accuracy)")
    parser.add_argument("--out", default="curves.png", help="file, .png, .svg or .pdf (default: curves.png)")
    given = parser.parse_args(arguments)
    from mpvg import study

    study.plot_runs([Path(run) for run in given.runs], given.key, Path(given.out))
    print(f"drawn in {given.out}")
    return 0


def _analyze(arguments: list[str]) -> int:
    text = "What position embeddings do inside runs, beside the networks that their training began with."
    parser = argparse.ArgumentParser(prog="mpvg analyze", description=text)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; those that differ in the seed only go together"
    )
    parser.add_argument("--data", help="another folder or set with the same classes (default: the run's own)")
    parser.add_argument("--images", type=int, default=1000, help="validation images, spread evenly (default: 1000)")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which weights (default: last)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the trained ones")
    parser.add_argument(
        "--beyond",
        type=int,
        default=0,
        metavar="IMAGES",
        help="also change PE, position and size of so many images: some hundred passes (default: 0)",
    )
    parser.add_argument("--out", default="report", help="folder of report.html and all else (default: report)")
    given = parser.parse_args(arguments)
    from mpvg.analysis.report import Options, analyze

    options = Options(data=given.data, images=given.images, which=given.checkpoint, ema=given.ema, beyond=given.beyond)
    made = analyze(given.runs, Path(given.out), options)
    for name, sentences in made.said.items():
        print(f"{name}:", *sentences, sep="\n  ")
    for run, reason in made.problems.items():
        print(f"mpvg: warning: {run} is left out: {reason}", file=sys.stderr)
    print(f"\nreport: {made.page}")
    return 0


def _method(text: str) -> Any:
    """A method's name, or a spec's fields as JSON."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--method {text!r} is no JSON ({error}); give a name or a spec's fields") from error


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "inspect": _inspect,
    "methods": _methods,
    "runs": _runs,
    "plot": _plot,
    "analyze": _analyze,
    "demo": _demo,
}
