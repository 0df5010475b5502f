"""`mpvg readout`: which read-out of a frozen network a linear classifier does best with, on given data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch

from mpvg.analysis.findings import Estimate
from mpvg.analysis.linear_probe import Score, attend_all, fit_query, probe_fold, split_folds
from mpvg.analysis.numbers import estimate_text
from mpvg.analysis.paired import MARGIN, PairedDifference, judge, paired_difference, with_width
from mpvg.analysis.readouts import ATTENTION, READOUTS, Features, check_memory, choose, extract
from mpvg.analysis.trained import Trained
from mpvg.models.tokens import TokenReader
from mpvg.runs.environment import environment
from mpvg.statistics import Interval

FOLDS = 10


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
    found: PairedDifference
    p_holm: float
    """Corrected for all pairs."""
    word: str
    """higher, lower, equivalent or undecided, of the first."""


@dataclass(frozen=True)
class ReadoutComparison:
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


def compare_readouts(
    trained: Trained, wanted: Sequence[str] | None, *, samples: int | None = None, folds: int = FOLDS, seed: int = 0
) -> ReadoutComparison:
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
        key=lambda one: (-one.accuracy.value, one.nll.value),
    )
    compared = compare(scored, len(features.targets))
    return ReadoutComparison(len(features.targets), scored, compared, left_out, conclude(scored, compared))


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
        paired_difference(values, folds=True) for values in ([s.accuracy for s in found], [s.nll for s in found])
    )
    if accuracy.difference in (0, 1):
        accuracy = with_width(accuracy, len(features.targets))
    share = Interval(max(0.0, accuracy.interval.low), min(1.0, accuracy.interval.high))
    loss = Interval(max(0.0, nll.interval.low), nll.interval.high)
    return Scored(name, Estimate(accuracy.difference, share), Estimate(nll.difference, loss), found)


def compare(scored: Sequence[Scored], images: int) -> list[Compared]:
    """Every pair of read-outs, on the same folds; Holm's correction is over all pairs."""
    pairs = list(combinations(scored, 2))
    found = []
    for x, y in pairs:
        differences = [a.accuracy - b.accuracy for a, b in zip(x.folds, y.folds, strict=True)]
        pair = paired_difference(differences, folds=True)
        alike = x.accuracy.value == y.accuracy.value and x.accuracy.value in (0, 1)  # on every image
        found.append(with_width(pair, images) if alike else pair)
    judged = zip(pairs, found, judge(found, images), strict=True)
    return [Compared(x.name, y.name, one, p, word) for (x, y), one, (p, word) in judged]


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


def rows(found: ReadoutComparison) -> list[list[str]]:
    """The table that `mpvg readout` prints, with its titles."""
    against: Mapping[str, Compared] = {c.second: c for c in found.compared if c.first == found.scored[0].name}
    table = [["read-out", "accuracy, %", "nll", "best minus it, points", "the best is"]]
    for one in found.scored:
        pair = against.get(one.name)
        difference = "-" if pair is None else percent(pair.found.estimate, signed=True)
        nll = estimate_text(one.nll, signed=False)
        table.append([one.name, percent(one.accuracy), nll, difference, "-" if pair is None else pair.word])
    return table
