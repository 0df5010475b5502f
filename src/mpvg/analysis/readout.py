"""`mpvg readout`: which read-out of a frozen network a linear classifier does best with, on given data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch

from mpvg.analysis.findings import Estimate
from mpvg.analysis.linear_probe import Score, attend_all, fit_query, probe_fold, split_folds
from mpvg.analysis.numbers import estimate_text
from mpvg.analysis.readouts import ATTENTION, READOUTS, Features, check_memory, choose, extract
from mpvg.analysis.trained import Trained
from mpvg.models.tokens import TokenReader
from mpvg.runs.environment import environment
from mpvg.statistics import FoldDifference, Interval, fold_difference, verdict

FOLDS = 10
MARGIN = 0.01
"""Difference in accuracy that matters."""
ALPHA = 0.05


@dataclass(frozen=True)
class Scored:
    """The probe of a read-out, over folds."""

    name: str
    accuracy: Estimate
    """In [0, 1]."""
    nll: Estimate
    """In nats."""
    folds: list[Score]


@dataclass(frozen=True)
class Compared:
    """The accuracy of a read-out minus that of another one, on the same folds."""

    first: str
    second: str
    found: FoldDifference
    p_holm: float
    """Corrected for all pairs."""
    word: str
    """higher, lower, equivalent or undecided, of the first."""


@dataclass(frozen=True)
class Answer:
    """What `mpvg readout` found."""

    images: int
    scored: list[Scored]
    """The best accuracy first."""
    compared: list[Compared]
    left_out: dict[str, str]
    """Read-out -> why it was not measured."""
    sentence: str
    """What to use."""

    def to_dict(self, trained: Trained) -> dict[str, Any]:
        """Values for JSON."""
        about = {"network": trained.name, "weights": trained.weights, "data": trained.info.name}
        return {**about, "split": trained.split, **asdict(self), "margin": MARGIN, "environment": environment()}


def answer(
    trained: Trained, wanted: Sequence[str] | None, *, samples: int | None = None, folds: int = FOLDS, seed: int = 0
) -> Answer:
    """Reads a network out in one pass over images and fits a linear probe of each read-out, fold by fold.

    Args:
        trained: the network and its images.
        wanted: read-outs; None: all that the network can have and whose memory is allowed.
        samples: images, spread evenly; None: all.
        folds: parts of the cross-validation, at least 2.
        seed: of the folds and of the attention probe.

    Raises:
        ValueError: a read-out is not possible, or the images are too few or of one class.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}; allowed: a whole number >= 2")
    images = min(samples or trained.size, trained.size)
    if images < folds:
        raise ValueError(f"{images} images are fewer than the {folds} folds; give more images or fewer --folds")
    reader = TokenReader(trained.model)
    names, left_out = choose(reader, wanted)
    if wanted is None and ATTENTION in names:
        try:
            check_memory(_one(trained, reader), images)
        except ValueError as error:
            names.remove(ATTENTION)
            left_out[ATTENTION] = str(error)
    features = extract(trained.model, trained.batches(images).epoch(), names, images=images)
    of_image = split_folds(features.targets, folds, seed)
    scored = sorted(
        (_score(features, name, of_image, folds, trained.info.num_classes, seed) for name in names),
        key=lambda one: -one.accuracy.value,
    )
    compared = compare(scored, len(features.targets))
    return Answer(len(features.targets), scored, compared, left_out, conclude(scored, compared))


@torch.inference_mode()
def _one(trained: Trained, reader: TokenReader) -> torch.Tensor:
    """The tokens of one image."""
    shape = trained.info.in_chans, trained.info.img_size, trained.info.img_size
    return reader(torch.zeros(1, *shape, device=trained.device)).after


def _score(features: Features, name: str, of_image: torch.Tensor, folds: int, classes: int, seed: int) -> Scored:
    found = []
    for fold in range(folds):
        test = of_image == fold
        if name == ATTENTION:
            assert features.tokens is not None
            train = (~test).nonzero().flatten()
            query = fit_query(features.tokens, features.targets, classes, train, seed)
            vectors = attend_all(features.tokens, query)
        else:
            vectors = features.vectors[name]
        found.append(probe_fold(vectors, features.targets, classes, test))
    accuracy, nll = (
        fold_difference(values, MARGIN) for values in ([s.accuracy for s in found], [s.nll for s in found])
    )
    share = Interval(max(0.0, accuracy.interval.low), min(1.0, accuracy.interval.high))
    return Scored(name, Estimate(accuracy.difference, share), Estimate(nll.difference, nll.interval), found)


def compare(scored: Sequence[Scored], images: int) -> list[Compared]:
    """Every pair of read-outs, on the same folds; Holm's correction is over all pairs."""
    from statsmodels.stats.multitest import multipletests

    pairs = list(combinations(scored, 2))
    if not pairs:
        return []
    differences = [
        fold_difference([a.accuracy - b.accuracy for a, b in zip(x.folds, y.folds, strict=True)], MARGIN)
        for x, y in pairs
    ]
    corrected = multipletests([one.p for one in differences], method="holm")[1]
    return [
        Compared(x.name, y.name, one, float(p), _word(one, float(p), images, len(pairs)))
        for (x, y), one, p in zip(pairs, differences, corrected, strict=True)
    ]


def _word(found: FoldDifference, p: float, images: int, pairs: int) -> str:
    # Where no image of n differs, up to a share of 3 / n may differ.
    needed = max(images_needed(found.error, images, pairs), round(3 / MARGIN) + 1)
    return verdict(
        found.difference,
        differs=p < ALPHA,
        equivalent=f"equivalent within {100 * MARGIN:g} point"
        if found.p_equivalent < ALPHA and 3 / images < MARGIN
        else None,
        undecided=f"undecided: needs {needed:,} images" if needed > images else f"undecided with {images:,} images",
    )


def images_needed(error: float, images: int, pairs: int) -> int:
    """Images with a power of 80 % to find a difference of the margin, and to exclude it, in two digits.

    The standard error is taken to fall with the root of the number of images.

    Args:
        error: standard error of the difference.
        images: with which it was measured.
        pairs: number of comparisons for which the level is corrected.
    """
    from scipy.stats import norm

    to_differ = norm.isf(ALPHA / pairs / 2) + norm.ppf(0.8)
    to_exclude = norm.isf(ALPHA) + norm.ppf(0.9)
    needed = images * (max(to_differ, to_exclude) * error / MARGIN) ** 2
    if needed < 10:
        return math.ceil(needed)
    unit = 10 ** (math.floor(math.log10(needed)) - 1)
    return math.ceil(needed / unit) * unit


def conclude(scored: Sequence[Scored], compared: Sequence[Compared]) -> str:
    """What to use, in one sentence; `scored` has the best first."""
    best = scored[0]
    said = f"Use {best.name} ({READOUTS[best.name]}): accuracy {percent(best.accuracy)} %"
    words: dict[str, list[str]] = {}
    for one in compared:
        if one.first == best.name:
            kind = one.word.partition(":")[0]
            words.setdefault(kind, []).append(
                one.second + (f" ({one.word.partition(': ')[2]})" if ": " in one.word else "")
            )
    parts = [
        f"{kind} {'than' if kind in ('higher', 'lower') else 'against'} {', '.join(w)}" for kind, w in words.items()
    ]
    return f"{said}; {'; '.join(parts)}." if parts else f"{said}; nothing was compared with it."


def percent(estimate: Estimate, *, signed: bool = False) -> str:
    """A share, or a difference of shares, in percent or points with its interval."""
    return estimate_text(estimate, scale=100, signed=signed)


def rows(found: Answer) -> list[list[str]]:
    """The table that `mpvg readout` prints, with its titles."""
    against: Mapping[str, Compared] = {c.second: c for c in found.compared if c.first == found.scored[0].name}
    table = [["read-out", "accuracy, %", "nll", "best minus it, points", "the best is"]]
    for one in found.scored:
        pair = against.get(one.name)
        difference = "-" if pair is None else percent(Estimate(pair.found.difference, pair.found.interval), signed=True)
        nll = estimate_text(one.nll, signed=False)
        table.append([one.name, percent(one.accuracy), nll, difference, "-" if pair is None else pair.word])
    return table
