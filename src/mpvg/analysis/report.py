"""`mpvg analyze`: what position embeddings (PE) do inside runs, as numbers, figures and one page."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpvg import runs
from mpvg.analysis import beyond, drawing, page, sentences
from mpvg.analysis.findings import Analysed, Findings, Groups, summarise
from mpvg.analysis.probe import PICKED, Collected, collect
from mpvg.config import RunConfig
from mpvg.data import Batches, open_data
from mpvg.runs import Run
from mpvg.saving import Which

IMAGES = 1000
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Options:
    """How runs are analysed."""

    data: str | None = None
    """Another data set or folder than the run's; None: its own. Validation images are taken."""
    images: int = IMAGES
    """How many of them, spread evenly over the set."""
    which: Which = "last"
    """The checkpoint."""
    ema: bool = False
    """Whether the averaged weights are meant."""
    beyond: int = 0
    """Images for the measurements of `beyond`, which run the network some hundred times; 0: leave them out."""


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    """report.html; results.json, layers.csv and figures/ are beside it."""
    said: dict[str, list[str]]
    """The findings in words, of runs that differ in the seed only."""
    problems: dict[str, str]
    """Run -> why it is left out."""


def analyze(paths: Sequence[str | Path], out: Path, options: Options) -> Report:
    """Analyses runs and writes report.html, results.json, layers.csv and figures/ into a folder.

    Runs that differ in nothing but the seed are repetitions of one another. A run that cannot be analysed is named in
    the report, with the reason, and the rest is made.

    Raises:
        ValueError: no run can be analysed.
    """
    if options.images < 1 or options.beyond < 0:
        raise ValueError(f"images is {options.images} and beyond {options.beyond}; allowed: from 1, and from 0")
    analysed, problems = [], {}
    for path in paths:
        try:
            analysed.append(analyse_run(runs.load(path), options))
        except (ValueError, OSError) as error:
            problems[str(path)] = str(error)
    if not analysed:
        raise ValueError("; ".join(f"{path}: {reason}" for path, reason in problems.items()))
    return write(out, analysed, problems, title="What position embeddings do")


@torch.inference_mode()
def analyse_run(run: Run, options: Options) -> Analysed:
    """Analyses a run, and the network that its training began with.

    Raises:
        FileNotFoundError: there is no checkpoint, or no data.
        ValueError: weights or data are damaged or do not fit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and run.config.device != "cpu" else "cpu")
    model, start = (network.to(device) for network in (run.model(options.which, ema=options.ema), run.untrained()))
    if options.data is not None:
        config, info = replace(run.config, data=options.data), replace(run.info, name=options.data)
        run = replace(run, config=config, info=info)
    shown = Share(run, options.images, device)

    def find(network: nn.Module) -> tuple[Findings, Collected]:
        few = max(1, min(options.images, run.info.val_size) // PICKED)
        collected = collect(network, shown, run.info, keep_every=few)
        return summarise(network, collected), collected

    (trained, collected), (untrained, _) = find(model), find(start)
    further = None
    if options.beyond:
        further = beyond.look_beyond(model, beyond.Held(list(Share(run, options.beyond, device))))
    return Analysed(
        run=run,
        name=run.path.name,
        trained=trained,
        untrained=untrained,
        collected=collected,
        beyond=further,
    )


class Share:
    """So many validation images, spread evenly over the set, which is in the order of its classes; all if it has fewer.

    They are those that one of several processes would evaluate, so that no more images than these are read. The set is
    opened once, for any number of passes.
    """

    def __init__(self, run: Run, images: int, device: torch.device) -> None:
        info = run.data(device).info
        parts = max(1, info.val_size // images)
        batch = max(1, min(BATCH, info.train_size // parts))
        plain = replace(run.config.augment, mixup=0.0, cutmix=0.0)  # they ask for an even batch size
        config = replace(run.config, batch_size=batch * parts, augment=plain)
        self.images = images
        self.batches: Batches = open_data(config, device=device, rank=0, world_size=parts).val

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.images
        for some, targets in self.batches.epoch():
            yield some[:left], targets[:left]
            left -= len(some)
            if left <= 0:
                return


def write(out: Path, analysed: Sequence[Analysed], problems: dict[str, str], *, title: str, front: str = "") -> Report:
    """Writes what was found.

    Args:
        out: folder for all files.
        analysed: the runs.
        problems: run -> why it could not be analysed.
        title: of the page.
        front: HTML above everything else on it.

    """
    groups = _groups(analysed)
    said = {name: sentences.say(members) for name, members in groups.items()}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    runs.write_json(out / "results.json", _results(groups, said, problems))
    with (out / "layers.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, _COLUMNS)
        table.writeheader()
        table.writerows(row for name, members in groups.items() for one in members for row in _rows(name, one))
    pictures = drawing.draw(groups, out / "figures")
    path = out / "report.html"
    path.write_text(page.render(groups, said, problems, pictures, title=title, front=front))
    return Report(path, said, problems)


def _results(groups: Groups, said: dict[str, list[str]], problems: dict[str, str]) -> dict[str, Any]:
    return {
        "sentences": said,
        "runs": [
            {
                "run": str(one.run.path),
                "group": name,
                "config": one.run.config.to_dict(),
                "trained": one.trained.to_dict(),
                "untrained": one.untrained.to_dict(),
                "beyond": None if one.beyond is None else asdict(one.beyond),
            }
            for name, members in groups.items()
            for one in members
        ],
        "problems": problems,
        "environment": runs.environment(),
    }


_COLUMNS = (
    *("run", "group", "seed", "network", "place", "delivered", "r", "r_low", "r_high", "r_each", "r_each_low"),
    *("r_each_high", "spearman", "cosine", "cosine_low", "cosine_high", "r_before", "pe_rank"),
)


def _rows(group: str, one: Analysed) -> Iterator[dict[str, Any]]:
    """A row a place, of the trained and of the untrained network."""
    for network, findings in (("trained", one.trained), ("untrained", one.untrained)):
        for place in findings.places:
            row: dict[str, Any] = {"run": str(one.run.path), "group": group, "seed": one.run.config.seed}
            row |= {"network": network, "place": place.name, "delivered": place.delivered}
            for name in ("r", "r_each", "cosine"):
                value = getattr(place, name)
                low, high = value.interval or (None, None)
                row |= {name: value.value, f"{name}_low": low, f"{name}_high": high}
            yield row | {"spearman": place.spearman, "r_before": place.r_before, "pe_rank": place.pe_rank}


def _groups(analysed: Sequence[Analysed]) -> dict[str, list[Analysed]]:
    """Runs that differ in the seed only, by the shortest name that tells them from the others."""
    together: dict[str, list[Analysed]] = {}
    for one in analysed:
        together.setdefault(replace(one.run.config, seed=0).digest(), []).append(one)
    names = {digest: _method(members[0].run.config) for digest, members in together.items()}
    for part in ("model", "data", "epochs", "recipe"):
        values = {digest: str(getattr(members[0].run.config, part)) for digest, members in together.items()}
        if len(set(names.values())) < len(names) and len(set(values.values())) > 1:
            names = {d: f"{name}, {values[d]}" + (" epochs" if part == "epochs" else "") for d, name in names.items()}
    if len(set(names.values())) < len(names):
        names = {digest: f"{name} ({digest[:6]})" for digest, name in names.items()}
    return {names[digest]: members for digest, members in together.items()}


def _method(config: RunConfig) -> str:
    method = config.method if isinstance(config.method, str) else json.dumps(config.method)
    return method if config.network.pos_std is None else f"{method}, PE std {config.network.pos_std:g}"
