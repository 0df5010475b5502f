"""`mpvg analyze timm/<name>`: what can be measured in any vision transformer, also one that delivers no PE."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpvg import statistics
from mpvg.analysis.question import text_list, text_table, write_question
from mpvg.analysis.sensitivity import KINDS, CachedBatches, Change, replacements
from mpvg.analysis.trained import Trained
from mpvg.files import write_json
from mpvg.models.tokens import TokenReader, layers_of
from mpvg.runs.environment import environment
from mpvg.tasks.classification import evaluate


@dataclass(frozen=True)
class Place:
    """The tokens that enter a layer or the Last LN; means over images."""

    name: str
    norm_patches: float
    """L2 norm of the patches' tokens."""
    norm_prefix: float | None
    """The same of class token and registers; None: there are none."""
    largest: float
    """The largest absolute value of a patch's token, over the median one: far above 100 is a massive channel."""
    channel: int
    """The channel that has it, in most images."""
    rank: float
    """Effective rank of the mean over images of the patches' tokens."""


@dataclass(frozen=True)
class Replaced:
    """What changes if the added PE is replaced at the patches."""

    kind: str
    cosine: float
    """Cosine similarity of the mean over patches after the Last LN with that of the unchanged network."""
    change: Change | None
    """Of the scores; None: the network does not name the classes of the data."""


@dataclass(frozen=True)
class Plain:
    """What was measured. The field names are keys of results.json."""

    network: str
    weights: str
    data: str
    images: int
    places: list[Place]
    gamma_variance: float | None
    """Of the Last LN's weight, over channels."""
    beta_variance: float | None
    """Of its bias."""
    mean_token: float
    """Cosine similarity of the mean over patches before and after the Last LN, mean over images."""
    pe_rank: float | None
    """Effective rank of the added PE's rows of patches."""
    replaced: list[Replaced]
    missing: list[str]
    """Parts of the report that the network does not have, with the reason."""


@torch.inference_mode()
def measure(trained: Trained, images: int) -> Plain:
    """Measures a network on some images, spread evenly.

    Raises:
        ValueError: it has no tokens, or no image can be read.
    """
    batches = CachedBatches(list(trained.batches(images).epoch()))
    if not batches.batches:
        raise ValueError("no image could be read; give data with readable images")
    reader = TokenReader(trained.model)
    missing = [
        "layers: nothing is delivered to them, so that there is no r with a delivered PE",
        "untrained network: it cannot be known from which weights training started",
    ]
    if not trained.has_head:
        missing.append("scores: the weights have no head for the classes of the data")
    places, similar = _places(trained.model, reader, batches)
    gamma, beta = (getattr(reader.last_norm, name, None) for name in ("weight", "bias"))
    if gamma is None or beta is None:
        missing.append("Last LN: it has no weight and bias")
    pos = _added(trained.model)
    patches = None if pos is None else pos[:, _leading(trained.model, reader) :]
    if patches is None:
        missing.append("importance and rank of the PE: none is added to the tokens; it is inside the attention")
    elif _inside(trained.model):
        missing.append("importance of the rotary or relative PE: it is inside the attention, and is not replaced")
    return Plain(
        network=trained.name,
        weights=trained.weights,
        data=trained.info.name,
        images=sum(len(targets) for _, targets in batches.batches),
        places=places,
        gamma_variance=None if gamma is None else statistics.variance(gamma),
        beta_variance=None if beta is None else statistics.variance(beta),
        mean_token=similar,
        pe_rank=None if patches is None else statistics.effective_rank(patches[0].cpu()),
        replaced=[] if pos is None else replace_added(trained.model, batches, scores=trained.has_head),
        missing=missing,
    )


def _added(model: nn.Module) -> Tensor | None:
    """The PE that is added to the tokens, `(1, rows, D)`; None: there is none."""
    pos = getattr(model, "pos_embed", None)
    return pos if isinstance(pos, nn.Parameter) and pos.ndim == 3 else None


def _inside(model: nn.Module) -> bool:
    """Whether a PE is inside the attention, rotary or relative."""
    relative = any("relative_position" in name or "rel_pos" in name for name, _ in model.named_parameters())
    return relative or getattr(model, "rope", None) is not None


def _leading(model: nn.Module, reader: TokenReader) -> int:
    """Rows of the PE before those of the patches."""
    return 0 if getattr(model, "no_embed_class", False) else reader.prefix


def replace_added(model: nn.Module, batches: CachedBatches, *, scores: bool) -> list[Replaced]:
    """Replaces the PE that a network adds to its tokens, in each way of `sensitivity.replacements`.

    Args:
        model: with a `pos_embed`, which is as before afterwards.
        batches: the images.
        scores: whether accuracy and NLL mean something.
    """
    reader, pos = TokenReader(model), model.get_parameter("pos_embed")
    kept = pos.detach().clone()
    before, base = list(_means(reader, batches)), evaluate(model, batches).metrics if scores else {}
    found = []
    try:
        for kind, value in replacements(kept, _leading(model, reader)).items():
            pos.copy_(value)
            pairs = zip(before, _means(reader, batches), strict=True)
            cosine = torch.cat([F.cosine_similarity(a, b, dim=1) for a, b in pairs]).mean()
            metrics = evaluate(model, batches).metrics if scores else {}
            change = Change(*(metrics[name] - base[name] for name in ("accuracy", "nll"))) if scores else None
            found.append(Replaced(kind, float(cosine), change))
    finally:
        pos.copy_(kept)
    return found


def _means(reader: TokenReader, batches: CachedBatches) -> Iterator[Tensor]:
    for images, _ in batches.epoch():
        yield reader(images).after[:, reader.prefix :].mean(dim=1).double()


class _Sums:
    """Running sums of the tokens that enter one place."""

    def __init__(self, name: str, prefix: int) -> None:
        self.name, self.prefix, self.images = name, prefix, 0
        self.patches = self.others = self.largest = 0.0
        self.mean: Tensor | float = 0.0
        self.channels: list[int] = []

    def add(self, tokens: Tensor) -> None:
        """Adds tokens `(B, ..., D)` of a batch."""
        tokens = tokens.flatten(1, -2).double()
        patches, prefix = tokens[:, self.prefix :], tokens[:, : self.prefix]
        self.images += len(tokens)
        self.patches += float(patches.norm(dim=-1).mean(dim=1).sum())
        self.others += float(prefix.norm(dim=-1).mean(dim=1).sum()) if self.prefix else 0.0
        size = patches.abs()
        median = size.flatten(1).median(dim=1).values.clamp(min=1e-12)
        self.largest += float((size.flatten(1).amax(dim=1) / median).sum())
        self.channels += size.amax(dim=1).argmax(dim=1).tolist()
        self.mean = self.mean + patches.sum(dim=0).cpu()

    def place(self) -> Place:
        """The means over images."""
        assert isinstance(self.mean, Tensor)
        count = self.images
        return Place(
            name=self.name,
            norm_patches=self.patches / count,
            norm_prefix=self.others / count if self.prefix else None,
            largest=self.largest / count,
            channel=max(sorted(set(self.channels)), key=self.channels.count),
            rank=statistics.effective_rank(self.mean / count),
        )


def _places(model: nn.Module, reader: TokenReader, batches: CachedBatches) -> tuple[list[Place], float]:
    """The tokens that enter each layer and the Last LN, and what the latter does to the mean over patches."""
    layers = layers_of(model)
    sums = [_Sums(str(number), reader.prefix) for number in range(len(layers))] + [_Sums("Last LN", reader.prefix)]
    similar = []
    with ExitStack() as hooks:
        for layer, one in zip(layers, sums, strict=False):
            hook = layer.register_forward_pre_hook(lambda _, inputs, one=one: one.add(inputs[0]))
            hooks.callback(hook.remove)
        for images, _ in batches.epoch():
            tokens = reader(images)
            if not tokens.after.isfinite().all():
                raise ValueError("the tokens of the network contain NaN or infinite values; use another checkpoint")
            sums[-1].add(tokens.before)
            before, after = (part[:, reader.prefix :].double().mean(dim=1) for part in tokens)
            similar.append(F.cosine_similarity(before, after, dim=1))
    return [one.place() for one in sums], float(torch.cat(similar).mean())


HEAD = ("tokens entering", "norm, patches", "norm, prefix", "largest / median", "its channel", "effective rank")
REPLACED_HEAD = ("PE replaced by", "cosine of features", "change of accuracy, points", "change of nll")


def place_rows(found: Plain) -> list[list[str]]:
    """The table of the layers."""
    rows = []
    for place in found.places:
        prefix = "-" if place.norm_prefix is None else f"{place.norm_prefix:.2f}"
        others = f"{place.largest:.1f}", str(place.channel), f"{place.rank:.1f}"
        rows.append([place.name, f"{place.norm_patches:.2f}", prefix, *others])
    return rows


def replaced_rows(found: Plain) -> list[list[str]]:
    """The table of the importance of the added PE."""
    return [
        [KINDS[r.kind], f"{r.cosine:.4f}"]
        + (["-", "-"] if r.change is None else [f"{100 * r.change.accuracy:+.2f}", f"{r.change.nll:+.4f}"])
        for r in found.replaced
    ]


def lines(found: Plain) -> list[str]:
    """What is no table, and what is missing."""
    said = [f"Last LN: cosine similarity of the mean over patches before and after it: {found.mean_token:.4f}"]
    if found.gamma_variance is not None and found.beta_variance is not None:
        said.append(f"Last LN: variance of gamma {found.gamma_variance:.4g}, of beta {found.beta_variance:.4g}")
    if found.pe_rank is not None:
        said.append(f"added PE: effective rank {found.pe_rank:.1f}")
    return [*said, *(f"not there: {reason}" for reason in found.missing)]


def write(found: Plain, out: Path) -> Path:
    """Writes report.html and results.json into a folder; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", asdict(found) | {"environment": environment()})
    body = text_table("Tokens", HEAD, place_rows(found))
    if found.replaced:
        body += text_table("The added PE, replaced", REPLACED_HEAD, replaced_rows(found))
    page = out / "report.html"
    write_question(
        page,
        title=f"{found.network}: its tokens and its position embedding",
        about=f"{found.images:,} images of {found.data}; weights: {found.weights}.",
        body=body + text_list(lines(found)),
    )
    return page
