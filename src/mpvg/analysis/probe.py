"""One pass over images with a probe in the network: running sums, in float64 and of constant size."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpvg.analysis import statistics
from mpvg.analysis.statistics import GroupedMean
from mpvg.data import DataInfo

GROUPS = 20
"""Groups that images are dealt out to, one after another: what a bootstrap resamples."""
PICKED = 12
"""Images whose token norms are kept, to be looked at."""
LAST = "Last LN"
BLACK_BACKGROUND = ("digits", "fashion-mnist")
"""Sets whose images show one object on black, so that where it is need not be drawn by hand."""


@dataclass
class Place:
    """A layer or the Last LN, and the sums of what it was shown; rows are patches."""

    name: str
    """The layer's number, or "Last LN"."""
    pe: Tensor | None
    """What the tokens are compared with, `(N, C)`: the delivered PE, or else the raw one; None: none fits."""
    delivered: bool
    """Whether the method delivers `pe` there."""
    tokens: Tensor
    """Sum over images of the tokens before the LN, `(N, C)`."""
    normed: Tensor
    """Sums over the images of each group of the tokens behind it, `(G, N, C)`."""
    each: GroupedMean
    """Correlation of every single image's tokens behind the LN with `pe`."""


@dataclass
class LastNorm:
    """What the Last LN does to directions and lengths; sums over the images of each group."""

    mean_token: GroupedMean
    """Cosine similarity of the mean over patches before and behind it, the delivered PE included."""
    mean_token_bare: GroupedMean
    """The same without the delivered PE."""
    class_token: GroupedMean | None
    """Cosine similarity of the class token before and behind it."""
    rows: GroupedMean | None
    """The same for every token, class token first, `(tokens,)`; None where it normalises one vector (CeiT)."""
    auc: GroupedMean | None
    """How well token norms find the object, before and behind it, `(2,)`: statistics.auc; None: no masks."""


@dataclass
class Picked:
    """An image whose token norms are kept."""

    image: Tensor
    """`(C, H, W)`, as the network sees it."""
    before: Tensor
    """L2 norms before the Last LN, `(N,)`."""
    behind: Tensor
    """L2 norms behind it, with the delivered PE, `(N,)`."""


@dataclass
class Collected:
    """What one pass found."""

    counts: Tensor
    """Images of each group, `(G,)`."""
    correct: int
    """Images whose most probable class is right."""
    places: list[Place]
    last: LastNorm
    picked: list[Picked] = field(default_factory=list)

    @property
    def images(self) -> int:
        """All images."""
        return int(self.counts.sum())


@torch.inference_mode()
def collect(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    info: DataInfo,
    *,
    groups: int = GROUPS,
    keep_every: int = 1,
) -> Collected:
    """Shows a network images, once each, and sums up what its probe is shown.

    Args:
        model: a network of this package, whose Last-LN PE is not folded into a bias.
        batches: preprocessed images `(B, C, H, W)` and targets.
        info: of the data.
        groups: of images, for intervals; image i is in group i % groups.
        keep_every: one of so many images is kept to be looked at, PICKED in all.

    Raises:
        ValueError: a PE is folded into the Last LN, no Last LN is on the tokens, there is no image, or a value is NaN
            or infinite.
    """
    network: Any = model.eval()
    if getattr(network.delivery, "averages_to_zero", False):
        raise ValueError("the network is folded: its Last-LN PE is part of a bias; analyse the one it was folded from")
    if getattr(network.norm, "bias", None) is None:
        raise ValueError(
            "the network has no Last LN on its tokens, with a gamma and a beta, that could be looked at; "
            "one of timm's that normalises the mean of its tokens gets it with readout='method'"
        )
    collector = _Collector(network, info, groups, keep_every)
    network.probe = collector
    try:
        for images, targets in batches:
            collector.begin(images)
            logits = network(images)
            if not logits.isfinite().all():
                raise ValueError("the network answers with NaN or infinite values; its weights are of no use")
            collector.correct += int((logits.argmax(dim=1) == targets).sum())
    finally:
        network.probe = None
    return collector.result()


class _Collector:
    """The probe."""

    def __init__(self, network: Any, info: DataInfo, groups: int, keep_every: int) -> None:
        self.info, self.groups, self.keep_every = info, groups, keep_every
        self.prefix = int(getattr(network, "num_prefix_tokens", 0))
        self.raw = network.position()[0].detach()
        self.has_class_token = network.global_pool == "token"
        self.counts = torch.zeros(groups, dtype=torch.float64)
        self.correct = 0
        self.places: dict[str, Place] = {}
        self.last_norm: LastNorm | None = None
        self.picked: list[Picked] = []
        self.images, self.number, self.group = torch.empty(0), torch.empty(0), torch.empty(0)

    def begin(self, images: Tensor) -> None:
        """A batch comes."""
        self.images, self.number = images, int(self.counts.sum()) + torch.arange(len(images))
        self.group = self.number % self.groups
        self.counts.index_add_(0, self.group, torch.ones(len(images), dtype=torch.float64))

    def layer(self, layer: int, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        self._add(str(layer), tokens, normed, pe)

    def last(self, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        if tokens.ndim == 2:  # one vector of all layers: nothing with rows can be said of it
            self._add_last(tokens[:, None], normed[:, None], None if pe is None else pe[:, None], patches=0)
            return
        self._add(LAST, tokens, normed, pe)
        self._add_last(_rows(tokens), _rows(normed), pe, patches=self.prefix)

    def _add(self, name: str, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        before, behind = (_rows(value)[:, self.prefix :].cpu().double() for value in (tokens, normed))
        place = self.places.get(name)
        if place is None:
            compared = (self.raw if pe is None else pe[0]).detach().cpu().double()
            if len(compared) == before.shape[1] + self.prefix:  # prefix tokens, where they have rows, come first
                compared = compared[self.prefix :]
            fits = compared.shape == before.shape[1:]
            place = self.places[name] = Place(
                name,
                compared if fits else None,
                pe is not None,
                torch.zeros_like(before[0]),
                before.new_zeros(self.groups, *before.shape[1:]),
                GroupedMean(self.groups),
            )
        place.tokens += before.sum(dim=0)
        place.normed.index_add_(0, self.group, behind)
        if place.pe is not None:
            place.each.add(self.group, _correlations(behind.flatten(1), place.pe.flatten()))

    def _add_last(self, tokens: Tensor, normed: Tensor, pe: Tensor | None, *, patches: int) -> None:
        """Tokens `(B, rows, C)` whose patches begin at row `patches`."""
        before, bare = tokens.cpu().double(), normed.cpu().double()
        behind = bare if pe is None else bare + pe.cpu().double()
        one_vector = before.shape[1] == 1
        masks = None if one_vector else _objects(self.images, self.info, before.shape[1] - patches)
        if self.last_norm is None:
            self.last_norm = LastNorm(
                GroupedMean(self.groups),
                GroupedMean(self.groups),
                GroupedMean(self.groups) if self.has_class_token else None,
                None if one_vector else GroupedMean(self.groups, before.shape[1]),
                None if masks is None else GroupedMean(self.groups, 2),
            )
        last = self.last_norm
        mean = before[:, patches:].mean(dim=1)
        last.mean_token.add(self.group, F.cosine_similarity(mean, behind[:, patches:].mean(dim=1), dim=-1, eps=0))
        last.mean_token_bare.add(self.group, F.cosine_similarity(mean, bare[:, patches:].mean(dim=1), dim=-1, eps=0))
        rows = F.cosine_similarity(before, behind, dim=-1, eps=0)
        if last.class_token is not None:
            last.class_token.add(self.group, rows[:, 0])
        if last.rows is not None:
            last.rows.add(self.group, rows)
            norms = torch.stack([before[:, patches:].norm(dim=-1), behind[:, patches:].norm(dim=-1)], dim=1)
            if last.auc is not None and masks is not None:
                found = [[statistics.auc(n, mask) for n in pair] for pair, mask in zip(norms, masks, strict=True)]
                last.auc.add(self.group, torch.tensor(found, dtype=torch.float64))
            for number, image, (first, second) in zip(self.number.tolist(), self.images, norms, strict=True):
                if number % self.keep_every == 0 and len(self.picked) < PICKED:
                    # Copies: a view would keep its whole batch, or change with it.
                    self.picked.append(Picked(image.cpu().clone(), first.clone(), second.clone()))

    def result(self) -> Collected:
        """What was found."""
        if self.last_norm is None:
            raise ValueError("no image could be read; give data with readable images")
        return Collected(self.counts, self.correct, list(self.places.values()), self.last_norm, self.picked)


def _rows(tokens: Tensor) -> Tensor:
    """Tokens of any network as `(B, N, C)`."""
    return tokens.flatten(1, -2)


def _correlations(values: Tensor, target: Tensor) -> Tensor:
    """Pearson's r of each row of `(B, K)` with `(K,)`."""
    target = statistics.centred(target)
    spread = values.square().sum(dim=1) - values.shape[1] * values.mean(dim=1).square()
    return values @ target / (spread.clamp(min=0).sqrt() * target.norm())


def _objects(images: Tensor, info: DataInfo, patches: int) -> Tensor | None:
    """Which patches are at least half on the object, `(B, patches)`; None where that is not known."""
    if info.name not in BLACK_BACKGROUND:
        return None
    side = round(patches**0.5)
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (info.mean, info.std))
    bright = ((images * std + mean).amax(dim=1) > 0.5 / 255).float()
    return F.adaptive_avg_pool2d(bright, side).flatten(1).cpu() >= 0.5
