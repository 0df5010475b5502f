"""One pass over images with a probe in the network, which keeps running sums of constant size, in float64."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpvg import statistics
from mpvg.data import DataInfo, denormalize
from mpvg.models.network import DeliveredNetwork, delivered_network, last_is_folded
from mpvg.statistics import GroupedMean

BOOTSTRAP_GROUPS = 20
"""Number of groups that the images are divided into, in turn; the bootstrap resamples the groups."""
MAX_SAMPLES = 12
"""Maximum number of images that are kept with their token norms."""
LAST = "Last LN"
BLACK_BACKGROUND = ("digits", "fashion-mnist")
"""Data sets whose images show one object on black, so that a mask of the object follows from the pixels."""


@dataclass
class LayerStats:
    """Sums over images of the tokens before and after one LN: that of a layer, or the Last LN. Each row is a patch."""

    name: str
    """The layer's number, or "Last LN"."""
    pe: Tensor | None
    """The PE that the tokens are compared with, `(N, C)`: delivered, or else raw; None: it has another shape."""
    delivered: bool
    """Whether the method delivers `pe` to this layer."""
    before: Tensor
    """Sum over all images of the tokens before the LN, `(N, C)`."""
    after: Tensor
    """Sum over the images of each group of the tokens after the LN, `(G, N, C)`."""
    image_r: GroupedMean
    """Correlation of the tokens after the LN with `pe`, computed for every image on its own."""


@dataclass
class LastNormStats:
    """How the Last LN changes the direction and the length of tokens; sums over the images of each group."""

    mean_token: GroupedMean
    """Cosine similarity of the mean over patches before and after the Last LN, including the delivered PE."""
    mean_token_bare: GroupedMean
    """The same without the delivered PE."""
    class_token: GroupedMean | None
    """Cosine similarity of the class token before and after; None: there is no class token."""
    rows: GroupedMean | None
    """The same for every token, class token first, `(tokens,)`; None if one vector per image is normalized (CeiT)."""
    auc: GroupedMean | None
    """How well token norms find the object, before and after, `(2,)`: `statistics.auc`; None: there are no masks."""


@dataclass
class SampleImage:
    """An image that is kept with its token norms."""

    image: Tensor
    """`(C, H, W)`, as the network receives it, with the normalization of the data."""
    before: Tensor
    """L2 norms before the Last LN, `(N,)`."""
    after: Tensor
    """L2 norms after the Last LN, including the delivered PE, `(N,)`."""


@dataclass
class ProbeResult:
    """What was collected in one pass."""

    counts: Tensor
    """Number of images in each group, `(G,)`."""
    correct: int
    """Number of images whose most probable class is the target."""
    nll: float
    """Negative log-likelihood of the targets, in nats, summed over images."""
    layers: list[LayerStats]
    """All layers in order, then the Last LN if it normalizes tokens."""
    last: LastNormStats
    samples: list[SampleImage] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.counts.sum())


@torch.inference_mode()
def collect(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    info: DataInfo,
    *,
    groups: int = BOOTSTRAP_GROUPS,
    keep_every: int = 1,
) -> ProbeResult:
    """Runs a network on images, once each, and collects the sums of what its probe receives.

    Args:
        model: a network of this package, not folded.
        batches: preprocessed images `(B, C, H, W)` and targets.
        info: description of the data.
        groups: number of groups for the bootstrap; image i is in group i % groups.
        keep_every: every keep_every-th image is kept as a sample, up to MAX_SAMPLES.

    Raises:
        ValueError: the network is folded, it has no Last LN on its tokens, there is no image, or an output is NaN or
            infinite.
    """
    network = delivered_network(model.eval())
    if last_is_folded(network):
        raise ValueError("the network is folded: its Last-LN PE is part of a bias; analyze the network before folding")
    if getattr(network.norm, "bias", None) is None:
        raise ValueError(
            "the network has no Last LN with weight and bias on its tokens; "
            "convert a timm network that normalizes the mean of its tokens with readout='method'"
        )
    collector = _Collector(network, info, groups, keep_every)
    network.probe = collector
    try:
        for images, targets in batches:
            collector.start_batch(images)
            logits = model(images)
            if not logits.isfinite().all():
                raise ValueError("the outputs of the network contain NaN or infinite values; use another checkpoint")
            collector.correct += int((logits.argmax(dim=1) == targets).sum())
            collector.nll += float(F.cross_entropy(logits.double(), targets, reduction="sum"))
            collector.check_seen(len(network.blocks))
    finally:
        network.probe = None
    return collector.result()


class _Collector:
    """The probe that is set in the network; see `mpvg.models.probing.Probe`."""

    def __init__(self, network: DeliveredNetwork, info: DataInfo, groups: int, keep_every: int) -> None:
        self.info, self.groups, self.keep_every = info, groups, keep_every
        self.prefix = network.num_prefix_tokens
        self.raw = network.raw_pos_embed()[0].detach()
        self.has_class_token = network.global_pool == "token"
        self.counts = torch.zeros(groups, dtype=torch.float64)
        self.correct = 0
        self.nll = 0.0
        self.layers: dict[str, LayerStats] = {}
        self.last_norm: LastNormStats | None = None
        self.samples: list[SampleImage] = []
        self.images, self.indices, self.group = torch.empty(0), torch.empty(0), torch.empty(0)

    def start_batch(self, images: Tensor) -> None:
        """Must be called before the network sees the next batch."""
        self.images, self.indices = images, int(self.counts.sum()) + torch.arange(len(images))
        self.group = self.indices % self.groups
        self.counts.index_add_(0, self.group, torch.ones(len(images), dtype=torch.float64))

    def check_seen(self, layers: int) -> None:
        """Refuses a network whose probe was not called in a forward pass."""
        unseen = [name for name in map(str, range(layers)) if name not in self.layers]
        if unseen or self.last_norm is None:
            places = [f"layer {unseen[0]}" if unseen else "", "" if self.last_norm is not None else "the Last LN"]
            raise ValueError(
                f"the probe was never called at {' and '.join(filter(None, places))}: its LN is not a module that the "
                "forward pass calls; `mpvg check-network` says more, and docs/own.md where a probe looks"
            )

    def layer(self, layer: int, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        self._add(str(layer), tokens, normed, pe)

    def last(self, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        if tokens.ndim == 2:  # a single vector per image: there are no patches to compare
            self._add_last(tokens[:, None], normed[:, None], None if pe is None else pe[:, None], patches=0)
            return
        self._add(LAST, tokens, normed, pe)
        self._add_last(_rows(tokens), _rows(normed), pe, patches=self.prefix)

    def _add(self, name: str, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        before, after = (patch_tokens(value, self.prefix) for value in (tokens, normed))
        stats = self.layers.get(name)
        if stats is None:
            stats = self.layers[name] = LayerStats(
                name,
                comparable_pe(self.raw if pe is None else pe[0], before[0], self.prefix),
                pe is not None,
                torch.zeros_like(before[0]),
                before.new_zeros(self.groups, *before.shape[1:]),
                GroupedMean(self.groups),
            )
        stats.before += before.sum(dim=0)
        stats.after.index_add_(0, self.group, after)
        if stats.pe is not None:
            stats.image_r.add(self.group, _correlations(after.flatten(1), stats.pe.flatten()))

    def _add_last(self, tokens: Tensor, normed: Tensor, pe: Tensor | None, *, patches: int) -> None:
        """Adds tokens `(B, rows, C)`, whose patches start at row `patches`."""
        before, bare = tokens.cpu().double(), normed.cpu().double()
        after = bare if pe is None else bare + pe.cpu().double()
        one_vector = before.shape[1] == 1
        masks = None if one_vector else _object_masks(self.images, self.info, before.shape[1] - patches)
        if self.last_norm is None:
            self.last_norm = LastNormStats(
                GroupedMean(self.groups),
                GroupedMean(self.groups),
                GroupedMean(self.groups) if self.has_class_token else None,
                None if one_vector else GroupedMean(self.groups, before.shape[1]),
                None if masks is None else GroupedMean(self.groups, 2),
            )
        last = self.last_norm
        mean = before[:, patches:].mean(dim=1)
        last.mean_token.add(self.group, F.cosine_similarity(mean, after[:, patches:].mean(dim=1), dim=-1, eps=0))
        last.mean_token_bare.add(self.group, F.cosine_similarity(mean, bare[:, patches:].mean(dim=1), dim=-1, eps=0))
        rows = F.cosine_similarity(before, after, dim=-1, eps=0)
        if last.class_token is not None:
            last.class_token.add(self.group, rows[:, 0])
        if last.rows is not None:
            last.rows.add(self.group, rows)
            norms = torch.stack([before[:, patches:].norm(dim=-1), after[:, patches:].norm(dim=-1)], dim=1)
            if last.auc is not None and masks is not None:
                aucs = [[statistics.auc(n, mask) for n in pair] for pair, mask in zip(norms, masks, strict=True)]
                last.auc.add(self.group, torch.tensor(aucs, dtype=torch.float64))
            for index, image, (first, second) in zip(self.indices.tolist(), self.images, norms, strict=True):
                if index % self.keep_every == 0 and len(self.samples) < MAX_SAMPLES:
                    # Copies: a view would keep its whole batch in memory, and change if the batch is overwritten.
                    self.samples.append(SampleImage(image.cpu().clone(), first.clone(), second.clone()))

    def result(self) -> ProbeResult:
        """The sums over all batches."""
        if self.last_norm is None:
            raise ValueError("no image could be read; give data with readable images")
        return ProbeResult(
            self.counts, self.correct, self.nll, list(self.layers.values()), self.last_norm, self.samples
        )


def patch_tokens(tokens: Tensor, prefix: int) -> Tensor:
    """The tokens of patches `(B, N, C)`, float64 on the CPU, of tokens `(B, ..., C)` with `prefix` others first."""
    return _rows(tokens)[:, prefix:].cpu().double()


def comparable_pe(pe: Tensor, tokens: Tensor, prefix: int) -> Tensor | None:
    """A PE `(rows, C)` as tokens of patches `(N, C)` are compared with it: float64, without the rows of the prefix.

    Returns:
        `(N, C)`; None: it has another shape, as the raw PE has in the later stages of a staged network.
    """
    pe = pe.detach().cpu().double()
    if len(pe) == len(tokens) + prefix:  # the rows of the prefix tokens come first
        pe = pe[prefix:]
    return pe if pe.shape == tokens.shape else None


def _rows(tokens: Tensor) -> Tensor:
    """Tokens `(B, ..., C)` of any network as `(B, N, C)`."""
    return tokens.flatten(1, -2)


def _correlations(values: Tensor, target: Tensor) -> Tensor:
    """Pearson's r of each row of `values` `(B, K)` with `target` `(K,)`."""
    target = statistics.centered(target)
    spread = values.square().sum(dim=1) - values.shape[1] * values.mean(dim=1).square()
    return values @ target / (spread.clamp(min=0).sqrt() * target.norm())


def _object_masks(images: Tensor, info: DataInfo, patches: int) -> Tensor | None:
    """Whether at least half of a patch lies on the object, `(B, patches)`; None if it is not known for this data."""
    if info.name not in BLACK_BACKGROUND:
        return None
    side = round(patches**0.5)
    bright = (denormalize(images, info).amax(dim=1) > 0.5 / 255).float()
    return F.adaptive_avg_pool2d(bright, side).flatten(1).cpu() >= 0.5
