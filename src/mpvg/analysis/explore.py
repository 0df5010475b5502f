"""One image in a run's network, while what the layers receive of the position embedding (PE) is changed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpvg.analysis.findings import Estimate, parts
from mpvg.analysis.probe import LAST, comparable_pe, patch_tokens
from mpvg.analysis.sensitivity import change_delivery, pe_at, place_names, replace_pe, shifted
from mpvg.analysis.trained import check_classification
from mpvg.data import Batches, read_image
from mpvg.data.types import NamedSamples
from mpvg.delivery import DeliveredPE
from mpvg.models.network import DeliveredNetwork, delivered_network, last_is_folded
from mpvg.runs import Run
from mpvg.runs.checkpoints import Which
from mpvg.statistics import MeanCorrelation
from mpvg.validation import check, shown

INPUT = "input"
"""The place before layer 0, where the PE is added to the tokens."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is changed in one image and in one network; by default nothing. A place is a layer's number or "Last LN"."""

    right: int = 0
    """Pixels of the network's input by which the image moves; its border is repeated."""
    down: int = 0
    """The same, downwards."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Place, or "input" -> factor of what it receives, after the exchange; 0 switches it off."""
    exchanged: tuple[str, str] | None = None
    """Two places of which each receives the other's PE; None: each receives its own."""


@dataclass(frozen=True, kw_only=True)
class PlaceState:
    """The tokens at one layer or at the Last LN, for one image."""

    name: str
    """The layer's number, or "Last LN"."""
    delivered: bool
    """Whether it receives a PE now; otherwise its tokens are compared with the raw PE."""
    norms: Tensor
    """L2 norms of the patches' tokens that enter, `(N,)`, float64."""
    r: float
    """Pearson's r of the tokens after the LN with the PE; NaN: undefined, or the raw PE has another shape."""
    r_constant: float
    """The same of the constant parts; see `mpvg.analysis.findings.LayerFindings`."""
    r_positional: float
    """The same of the positional parts."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a network says about one image, and what happens inside."""

    image: Tensor
    """The image as the network received it, `(C, H, W)`."""
    logits: Tensor
    """`(classes,)`."""
    places: list[PlaceState]
    """All layers, then the Last LN if it normalizes tokens."""
    norms_after: Tensor | None
    """L2 norms of the patches' tokens after the Last LN with its PE, `(N,)`; None: it normalizes one vector."""

    @property
    def probabilities(self) -> Tensor:
        """Of all classes, `(classes,)`."""
        return self.logits.float().softmax(dim=0)


@dataclass(frozen=True)
class Selected:
    """An image that was selected."""

    input: Tensor
    """As the network receives it, `(C, H, W)`."""
    name: str
    """That of its file, or its number."""
    target: str | None = None
    """The name of its class; None: not known."""


class ExploredRun:
    """A run's network, and its validation set if it is there.

    Args:
        run: of a task that ranks classes.
        which: which checkpoint.
        ema: whether the averaged weights are used.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: the run does not name the classes of an image, or its network receives no PE from a method.
    """

    def __init__(self, run: Run, which: Which = "last", *, ema: bool = False) -> None:
        check_classification(run)
        self.run, self._preprocess = run, run.preprocess()
        self.device = run.device
        self.model = run.model(which, ema=ema).to(self.device)
        self.shapes = receiving(self.model)
        self.missing = ""
        """Why there is no validation set; empty: there is one."""
        self._validation: Batches[Any] | None = None
        self._open_validation()
        info = run.info
        self.predict(
            torch.zeros(info.in_chans, info.img_size, info.img_size)
        )  # a network that fails says so before a page

    def _open_validation(self) -> None:
        """Opens the validation set without worker processes: single images are read from it."""
        loader = replace(self.run.config.loader, workers=0)
        run = replace(self.run, config=replace(self.run.config, loader=loader))
        try:
            self._validation = run.validation(torch.device("cpu"), batch_size=1)
        except (ValueError, OSError, ImportError) as error:  # an uploaded image needs no data
            self.missing = str(error)

    @property
    def images(self) -> int:
        """Number of images in the validation set; 0: it is missing."""
        return 0 if self._validation is None else len(self._validation)

    def validation_image(self, number: int) -> Selected:
        """An image of the validation set, by its number from 0.

        Raises:
            ValueError: there is no such image, or it cannot be read.
        """
        batches = self._validation
        if batches is None:
            raise ValueError(f"the validation set is missing ({self.missing}); upload an image")
        check("the number of the image", number, 0 <= number < self.images, f"0 to {self.images - 1}")
        found = next(batches.epoch(start=number), None)
        if found is None or number in batches.unreadable:
            raise ValueError(f"validation image {number} cannot be read; choose another")
        images, targets = found
        name = batches.name(number) if isinstance(batches, NamedSamples) else f"number {number}"
        return Selected(images[0], name, self.run.info.class_names[int(targets[0])])

    def read(self, file: str | Path) -> Selected:
        """An image file, prepared as the validation images are.

        Raises:
            ValueError: it is no image, is damaged or is too large, which its header says before it is decoded.
        """
        try:
            return Selected(self._preprocess(read_image(file, self.run.config.orientation)), Path(file).name)
        except MemoryError:
            raise
        except Exception as error:  # decoders of untrusted files raise all kinds of errors
            reason = f"{type(error).__name__}: {error}".replace(str(file), "the file")
            raise ValueError(f"the image cannot be read ({reason}); give an image file, such as a PNG") from error

    def predict(self, image: Tensor, changes: Changes | None = None) -> Output:
        """Sends one prepared image through the network; arguments and errors as `predict`."""
        return predict(self.model, image.to(self.device), changes)


def receiving(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The places that receive a PE, in order, each with the PE's shape; "input" first if it is added there.

    Raises:
        ValueError: the network is not one of this package, or is folded.
    """
    network = delivered_network(model)
    if last_is_folded(network):
        raise ValueError("the network is folded: its Last-LN PE is part of a bias; explore it before folding")
    with torch.no_grad():
        raw = network.raw_pos_embed()
        delivered = network.deliver(raw)
    found = {INPUT: tuple(raw.shape)} if network.spec.input_pe else {}
    for number, name in enumerate(place_names(delivered)):
        if (pe := pe_at(delivered, number)) is not None:
            found[name] = tuple(pe.shape)
    return found


@torch.inference_mode()
def predict(model: nn.Module, image: Tensor, changes: Changes | None = None) -> Output:
    """Sends one image through a network and records what its probe receives.

    Args:
        model: a network of this package, not folded.
        image: prepared, `(C, H, W)`, on the network's device.
        changes: None: nothing is changed.

    Raises:
        ValueError: a place receives no PE, a factor is not finite, two PEs of different shapes are exchanged, or the
            logits contain NaN or infinite values.
    """
    changes = changes or Changes()
    _check_changes(changes, receiving(model))
    network = delivered_network(model.eval())
    moved = shifted(image[None], changes.right, changes.down)
    recorder = _Recorder(network)
    network.probe = recorder
    factor = changes.factors.get(INPUT, 1.0)
    try:
        with change_delivery(model, lambda delivered: apply(delivered, changes), input_factor=factor):
            logits = model(moved)[0]
    finally:
        network.probe = None
    if not logits.isfinite().all():
        raise ValueError("the outputs of the network contain NaN or infinite values; use smaller factors")
    return Output(image=moved[0].cpu(), logits=logits.cpu(), places=recorder.places, norms_after=recorder.norms_after)


def apply(delivered: DeliveredPE, changes: Changes) -> DeliveredPE:
    """What layers and Last LN receive after the changes; the chain stays as it is."""
    numbers = {name: number for number, name in enumerate(place_names(delivered))}
    if changes.exchanged is not None:
        first, second = (numbers[name] for name in changes.exchanged)
        ones = pe_at(delivered, first)
        delivered = replace_pe(delivered, first, pe_at(delivered, second))
        delivered = replace_pe(delivered, second, ones)
    for name, factor in changes.factors.items():
        if name != INPUT and factor != 1:
            pe = pe_at(delivered, numbers[name])
            delivered = replace_pe(delivered, numbers[name], None if factor == 0 or pe is None else factor * pe)
    return delivered


def _check_changes(changes: Changes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, factor in changes.factors.items():
        _check_place(name, shapes)
        check(f"the factor of {name}", factor, math.isfinite(factor), "a finite number")
    if changes.exchanged is not None:
        for name in changes.exchanged:
            _check_place(name, {place: shape for place, shape in shapes.items() if place != INPUT})
        (first, one), (second, other) = ((name, shapes[name]) for name in changes.exchanged)
        if one != other:
            raise ValueError(
                f"the PEs of {first} and {second} have the shapes {one} and {other}; exchange two of one shape"
            )


def _check_place(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if name not in shapes:
        allowed = ", ".join(shapes) or "none, because the method delivers no PE"
        raise ValueError(f"{shown(name)} receives no PE; allowed: {allowed}")


class _Recorder:
    """The probe that is set in the network; see `mpvg.models.probing.Probe`."""

    def __init__(self, network: DeliveredNetwork) -> None:
        self.prefix = network.num_prefix_tokens
        self.raw = network.raw_pos_embed()[0].detach()
        self.normalizes = getattr(network.norm, "weight", None) is not None
        self.places: list[PlaceState] = []
        self.norms_after: Tensor | None = None

    def layer(self, layer: int, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        self._add(str(layer), tokens, normed, pe)

    def last(self, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> None:
        if tokens.ndim == 2 or not self.normalizes:  # CeiT's one vector; a converted network's LN after the mean
            return
        after = self._add(LAST, tokens, normed, pe)
        received = None if pe is None else comparable_pe(pe[0], after, self.prefix)
        self.norms_after = (after if received is None else after + received).norm(dim=-1)

    def _add(self, name: str, tokens: Tensor, normed: Tensor, pe: Tensor | None) -> Tensor:
        """Records a place; returns the patches' tokens after the LN, `(N, C)`, without the PE."""
        before, after = (patch_tokens(value, self.prefix) for value in (tokens, normed))
        compared = comparable_pe(self.raw if pe is None else pe[0], after[0], self.prefix)
        r = (math.nan,) * 3 if compared is None else _correlations(after, compared)
        norms = before[0].norm(dim=-1)
        self.places.append(
            PlaceState(name=name, delivered=pe is not None, norms=norms, r=r[0], r_constant=r[1], r_positional=r[2])
        )
        return after[0]


def _correlations(tokens: Tensor, pe: Tensor) -> tuple[float, float, float]:
    """r, r_constant and r_positional of the tokens of one image `(1, N, C)` with a PE `(N, C)`."""
    one = torch.ones(1, dtype=torch.float64)
    whole = MeanCorrelation(tokens, one, pe)
    r = Estimate(float(whole.pearson()))
    constant, positional = parts(tokens, one, pe, whole, r)
    return r.value, constant.r.value, positional.r.value
