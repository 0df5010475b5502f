"""`mpvg analyze`: what position embeddings (PE) do inside runs, as numbers, figures and one page."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpvg import runs
from mpvg.analysis import drawing, page
from mpvg.analysis.findings import AnalyzedRun, Findings, RunsByConfig, Scores, summarize
from mpvg.analysis.probe import MAX_SAMPLES, ProbeResult, collect
from mpvg.analysis.sensitivity import CachedBatches, measure_sensitivity
from mpvg.analysis.sentences import make_sentences, references_of
from mpvg.analysis.trained import BATCH, check_classification
from mpvg.config import RunConfig
from mpvg.files import atomic_text, csv_text, write_json
from mpvg.models.own import network_error
from mpvg.runs import Run
from mpvg.runs.checkpoints import SELECTED, Which
from mpvg.runs.environment import environment
from mpvg.runs.memory import evaluation_cure, memory_errors
from mpvg.tasks.task import EMA

IMAGES = 1000


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to analyze runs."""

    data: str | None = None
    """Data set or folder, of which the validation images are used; None: that of the run."""
    images: int = IMAGES
    """Number of images, spread evenly over the set."""
    which: Which = "last"
    """Which checkpoint."""
    ema: bool = False
    """Whether to use the averaged weights."""
    sensitivity_images: int = 0
    """Number of images for `mpvg.analysis.sensitivity`, which runs the network about a hundred times; 0: skip it."""

    @property
    def weights(self) -> str:
        """Which weights, in words."""
        return f"{'averaged, ' if self.ema else ''}{self.which} of each run{SELECTED[self.which]}"


@dataclass(frozen=True)
class Report:
    """What `analyze` wrote."""

    page: Path
    """report.html; results.json, layers.csv and figures/ are in the same folder."""
    sentences: dict[str, list[str]]
    """Name of a config -> the findings in words, of its runs, which differ in the seed only."""
    problems: dict[str, str]
    """Run -> why it was skipped."""


def analyze(paths: Sequence[str | Path], out: Path, options: Options) -> Report:
    """Analyzes runs and writes report.html, results.json, layers.csv and figures/ into a folder.

    Runs that differ in the seed only are treated as repetitions. A run that cannot be analyzed is skipped; the report
    gives the reason.

    Raises:
        ValueError: none of the runs can be analyzed, or a number of images is out of range.
    """
    if options.images < 1 or options.sensitivity_images < 0:
        raise ValueError(
            f"images must be at least 1 and beyond at least 0; "
            f"got images={options.images} and beyond={options.sensitivity_images}"
        )
    analyzed, problems = [], {}
    for path in paths:
        try:
            with memory_errors(evaluation_cure("fewer --images")):
                analyzed.append(analyze_run(runs.load(path), options))
        except (ValueError, OSError) as error:
            problems[str(path)] = network_error(error) or str(error)
    if not analyzed:
        raise ValueError("; ".join(f"{path}: {reason}" for path, reason in problems.items()))
    return write(out, analyzed, problems, title="What position embeddings do", weights=options.weights)


@torch.inference_mode()
def analyze_run(run: Run, options: Options) -> AnalyzedRun:
    """Analyzes a run and, as a control, the network that its training started from.

    Raises:
        FileNotFoundError: the checkpoint or the data are missing.
        ValueError: weights or data are damaged, or do not fit the network, or the run is of another task.
    """
    check_classification(run)
    device = run.device
    model, untrained_model = (
        network.to(device) for network in (run.model(options.which, ema=options.ema), run.initial_model())
    )
    open_images = partial(run.validation, device, data=options.data, batch_size=BATCH)
    if options.data is not None:
        config, info = replace(run.config, data=options.data), replace(run.info, name=options.data)
        run = replace(run, config=config, info=info)
    batches = open_images(images=options.images)
    keep_every = max(1, min(options.images, run.info.val_size) // MAX_SAMPLES)

    def probe(network: nn.Module) -> tuple[Findings, ProbeResult]:
        result = collect(network, batches.epoch(), run.info, keep_every=keep_every)
        return summarize(network, result), result

    (trained, result), (untrained, _) = probe(model), probe(untrained_model)
    sensitivity = None
    if options.sensitivity_images:
        few = list(open_images(images=options.sensitivity_images).epoch())
        sensitivity = measure_sensitivity(model, CachedBatches(few))
    return AnalyzedRun(
        run=run,
        name=run.path.name,
        trained=trained,
        untrained=untrained,
        result=result,
        recorded=None if options.data is not None else _recorded(run, options),
        sensitivity=sensitivity,
    )


def _recorded(run: Run, options: Options) -> Scores | None:
    """What the run recorded of the checkpoint; None: it was saved within an epoch, or copied without its name."""
    line, prefix = run.recorded(options.which) or {}, EMA if options.ema else ""
    accuracy, nll = line.get(f"{prefix}accuracy"), line.get(f"{prefix}nll")
    if isinstance(accuracy, float) and isinstance(nll, float):
        return Scores(accuracy, nll, run.info.val_size)
    return None


def write(
    out: Path,
    analyzed: Sequence[AnalyzedRun],
    problems: dict[str, str],
    *,
    title: str,
    weights: str = Options().weights,
    front: str = "",
) -> Report:
    """Writes report.html, results.json, layers.csv and figures/.

    Args:
        out: folder for all files.
        analyzed: the runs.
        problems: run -> why it could not be analyzed.
        title: title of the page.
        weights: which weights were analyzed, in words.
        front: HTML between the table of the runs and the findings.
    """
    groups = _group_by_config(analyzed)
    sentences = {name: make_sentences(members, references_of(members, groups)) for name, members in groups.items()}
    (out / "figures").mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", _results(groups, sentences, problems) | {"weights": weights})
    rows = [row for name, members in groups.items() for one in members for row in _rows(name, one)]
    atomic_text(out / "layers.csv", csv_text(_COLUMNS, rows))
    pictures = drawing.draw(groups, out / "figures")
    path = out / "report.html"
    atomic_text(path, page.render(groups, sentences, problems, pictures, title=title, weights=weights, front=front))
    return Report(path, sentences, problems)


def _results(groups: RunsByConfig, sentences: dict[str, list[str]], problems: dict[str, str]) -> dict[str, Any]:
    return {
        "sentences": sentences,
        "runs": [
            {
                "run": str(one.run.path),
                "group": name,
                "config": one.run.config.to_dict(),
                "trained": one.trained.to_dict(),
                "untrained": one.untrained.to_dict(),
                "beyond": None if one.sensitivity is None else asdict(one.sensitivity),
            }
            for name, members in groups.items()
            for one in members
        ],
        "problems": problems,
        "environment": environment(),
    }


_ESTIMATES = (
    *("r", "r_each", "cosine", "r_constant", "r_positional", "covariance_constant", "covariance_positional"),
    "variance_constant",
)
_NUMBERS = ("spearman", "r_before", "pe_rank", "pe_variance_constant")
_COLUMNS = (
    *("run", "group", "seed", "network", "place", "delivered"),
    *(f"{name}{end}" for name in _ESTIMATES for end in ("", "_low", "_high")),
    *_NUMBERS,
)


def _rows(group: str, one: AnalyzedRun) -> Iterator[dict[str, Any]]:
    """The rows of layers.csv: one per layer, of the trained and of the untrained network."""
    for network, findings in (("trained", one.trained), ("untrained", one.untrained)):
        for layer in findings.places:
            row: dict[str, Any] = {"run": str(one.run.path), "group": group, "seed": one.run.config.seed}
            row |= {"network": network, "place": layer.name, "delivered": layer.delivered}
            for name in _ESTIMATES:
                estimate = getattr(layer, name)
                low, high = estimate.interval or (None, None)
                row |= {name: estimate.value, f"{name}_low": low, f"{name}_high": high}
            yield row | {name: getattr(layer, name) for name in _NUMBERS}


def _group_by_config(analyzed: Sequence[AnalyzedRun]) -> dict[str, list[AnalyzedRun]]:
    """Groups runs that differ in the seed only; the name of a group is the shortest that distinguishes it."""
    by_digest: dict[str, list[AnalyzedRun]] = {}
    for one in analyzed:
        by_digest.setdefault(replace(one.run.config, seed=0).digest(), []).append(one)
    names = {digest: _method(members[0].run.config) for digest, members in by_digest.items()}
    for part in ("model", "data", "epochs", "recipe"):
        values = {digest: str(getattr(members[0].run.config, part)) for digest, members in by_digest.items()}
        if len(set(names.values())) < len(names) and len(set(values.values())) > 1:
            names = {d: f"{name}, {values[d]}" + (" epochs" if part == "epochs" else "") for d, name in names.items()}
    if len(set(names.values())) < len(names):
        names = {digest: f"{name} ({digest[:6]})" for digest, name in names.items()}
    return {names[digest]: members for digest, members in by_digest.items()}


def _method(config: RunConfig) -> str:
    method = config.method if isinstance(config.method, str) else json.dumps(config.method)
    return method if config.network.pos_std is None else f"{method}, PE std {config.network.pos_std:g}"
