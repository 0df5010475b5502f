"""`mpvg inspect` and `mpvg methods`: networks and methods without training."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpvg.cli.arguments import Parser, parse_method, positive, say
from mpvg.cli.own import use_typed
from mpvg.config.names import FORM

if TYPE_CHECKING:
    from torch import nn

    from mpvg.analysis.networks import Count, Support

READOUTS = {"token": "class token", "avg": "mean over tokens", "map": "attention pooling"}


def inspect(arguments: list[str]) -> int:
    """Prints what a network is under a method."""
    parser = Parser(prog="mpvg inspect", description="Prints what a network is under a method.")
    parser.add_argument(
        "model",
        nargs="?",
        help="a network's name, such as deit_tiny_patch16_224, timm/<name>, or FILE.py:FACTORY of your own",
    )
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
    use_typed(given.model)
    size = {"num_classes": given.num_classes, "img_size": given.img_size, "in_chans": given.in_chans}
    found = networks.inspect(given.model, parse_method(given.method), **size)
    channels, height, width = found.image
    say(f"{given.model} with {given.method}, {channels} x {height} x {width}, {given.num_classes} classes")
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
        say("", f"drawn in {given.figure}")
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


def methods(arguments: list[str]) -> int:
    """Prints the methods."""
    parser = Parser(prog="mpvg methods", description="Prints the methods as a table.")
    parser.add_argument("--networks", action="store_true", help="which network runs which method, as Markdown")
    if parser.parse_args(arguments).networks:
        from mpvg.analysis.networks import support_table

        print(support_markdown(support_table()))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mpvg.delivery import METHODS, DeliverySpec

    specs = {name: dataclasses.asdict(spec) for name, spec in METHODS.items()}
    # The fields of the experiments' arms are the same in all methods.
    differing = [
        field.name for field in dataclasses.fields(DeliverySpec) if len({s[field.name] for s in specs.values()}) > 1
    ]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("method", *differing):
        table.add_column(column)
    for name, spec in specs.items():
        table.add_row(name, *(str(spec[field]) for field in differing))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return 0


def support_markdown(table: "Mapping[str, Mapping[str, Support]]") -> str:
    """A row per method and a column per network; below it the reasons for what is refused."""
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


def check_network(arguments: list[str]) -> int:
    """Checks a network of the user's own; 1: a check failed."""
    parser = Parser(prog="mpvg check-network", description="Checks what a network of your own must do, and says why.")
    parser.add_argument("model", help=f"what builds it: {FORM}")
    parser.add_argument("--img_size", type=positive, help="side of the image in pixels (default: the factory's)")
    parser.add_argument("--in_chans", type=positive, help="channels of the image (default: the factory's)")
    given = parser.parse_args(arguments)
    import torch

    from mpvg.analysis import contract
    from mpvg.models.own import call_factory, import_network

    import_network(given.model)
    sizes = {name: value for name in ("img_size", "in_chans") if (value := getattr(given, name)) is not None}

    def build(**options: Any) -> "nn.Module":
        return call_factory(given.model, {"num_classes": 5} | sizes | options)

    torch.manual_seed(0)
    failed = 0
    for check in contract.check_network(build):
        word = {True: "ok", False: "FAILED", None: "-"}[check.passed]
        say(f"{check.name:13s} {word:7s} {check.text}")
        failed += check.passed is False
    say("", f"{failed} of the checks failed: see docs/own.md" if failed else "all checks passed")
    return 1 if failed else 0
