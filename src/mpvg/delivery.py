"""The paper: how a position embedding (PE) reaches the layers of a vision transformer.

    Eq. (5)   LaPE    x_0 = patches                                       input_pe=False
    Eq. (6)   LaPE    layer l attends to  LN_l(x_l) + LN'_l(pos)          first_layer=0
    Eq. (7)   LaPE    pos of layer l + 1  is  LN'_l(pos of layer l)       hierarchical=True
    Eq. (8)   PVG     x_0 = patches + pos_0                               input_pe=True
    Eq. (9)   PVG     layer l attends to  LN_l(x_l) + LN'_l(pos_{l-1})    first_layer=1
    Eq. (10)  PVG     pos_l = LN'_l(pos_{l-1}),  l = 1..L                 hierarchical=True
    Eq. (11)  MPVG    y = LN(x_{L+1}) + LN'_last(pos_0)                   last_index=0

LN'_l is a LayerNorm of its own beside the layer's LN_l. L is the index of the last layer (11 of 12). pos_0 is always
the raw PE, and pos_k what layer k receives. No pos_l depends on an image, so the chain is computed once, before layer
0, and a network is handed finished values: a method is data, and nothing outside this file asks for its name.

This file needs torch and nothing else.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pool = Literal["token", "avg"]


@dataclass(frozen=True, kw_only=True)
class DeliverySpec:
    """What a method says; JSON-safe through `to_dict` and `as_spec`.

    Raises:
        ValueError: a field has a value it cannot have, or `last_index` names a pos_k that is never made.
    """

    pool: Pool = "avg"
    """Read-out: the class token, or the mean over the tokens after the Last LN."""
    input_pe: bool = True
    """Whether the PE is added to the tokens before layer 0."""
    first_layer: Literal[0, 1] | None = None
    """First layer that receives a PE of its own; None: no layer does."""
    hierarchical: bool = True
    """LN'_l takes pos_{l-1} (True), or pos_0 at every layer (False)."""
    last_index: int | None = None
    """k of the pos_k that goes through LN'_last to the Last LN; None: none does."""

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool is {self.pool!r}; allowed: {', '.join(map(repr, get_args(Pool)))}")
        for name in ("input_pe", "hierarchical"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: True, False")
        if self.first_layer not in (None, 0, 1) or isinstance(self.first_layer, bool | float):
            raise ValueError(f"first_layer is {self.first_layer!r}; allowed: None, 0, 1")
        k = self.last_index
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 0):
            raise ValueError(f"last_index is {k!r}; allowed: None, 0 (the raw PE), or the index of a layer")
        if k and self.first_layer is None:
            raise ValueError(f"last_index is {k}, but without first_layer only pos_0 exists; set first_layer, or use 0")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-safe values."""
        return dataclasses.asdict(self)


_MPVG = DeliverySpec(first_layer=1, last_index=0)

METHODS: dict[str, DeliverySpec] = {
    "default": DeliverySpec(pool="token"),
    "gap": DeliverySpec(),
    "lape": DeliverySpec(pool="token", input_pe=False, first_layer=0),
    "lape_gap": DeliverySpec(input_pe=False, first_layer=0),
    "pvg": replace(_MPVG, last_index=None),
    "pvg_token": replace(_MPVG, last_index=None, pool="token"),
    "mpvg": _MPVG,
    "gap_last0": replace(_MPVG, first_layer=None),  # Fig. 5(b)
    "mpvg_last5": replace(_MPVG, last_index=5),  # Table 5
    "mpvg_last8": replace(_MPVG, last_index=8),  # Table 5
    "mpvg_last11": replace(_MPVG, last_index=11),  # Table 5
    "mpvg_layer0": replace(_MPVG, first_layer=0),  # Table 6, row 1
    "mpvg_flat": replace(_MPVG, hierarchical=False),  # Table 6, row 2
    "mpvg_no_input_pe": replace(_MPVG, input_pe=False),  # Table 6, row 3
}
"""The methods of the paper by name: Tables 1 to 6, and Figs. 1 and 5."""

Method = str | DeliverySpec | Mapping[str, Any]
"""Wherever a method is asked for: its name, a spec, or a spec's fields."""


def as_spec(method: Method) -> DeliverySpec:
    """Returns the spec that a name, a spec or a spec's fields stand for.

    Raises:
        ValueError: the name is not in METHODS, or a field does not exist.
    """
    if isinstance(method, DeliverySpec):
        return method
    if isinstance(method, str):
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ValueError(f"unknown method {method!r}{hint} Known: {', '.join(METHODS)}; or give a DeliverySpec")
        return METHODS[method]
    if not isinstance(method, Mapping):
        raise ValueError(f"method is {method!r}; allowed: a name, a DeliverySpec, or its fields as a mapping")
    fields = [field.name for field in dataclasses.fields(DeliverySpec)]
    unknown = [key for key in method if key not in fields]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r} of a DeliverySpec; allowed: {', '.join(fields)}")
    return DeliverySpec(**method)


@dataclass(frozen=True, kw_only=True)
class NetworkTraits:
    """What a network can do, as far as a method may ask for it."""

    name: str
    """For messages."""
    depth: int
    """Number of layers, over all stages."""
    readouts: tuple[Pool, ...] = ("token", "avg")
    """The read-outs that the network has."""
    first_layer: Literal[0, 1] = 1
    """The first layer that PVG serves in it: 1, or 0 where the authors always serve layer 0 (Swin)."""
    uniform_width: bool = True
    """Whether every pos_k is as wide as the Last LN, so that any of them can be delivered to it."""


def resolve(method: Method, traits: NetworkTraits) -> DeliverySpec:
    """Returns the spec as a network with these traits runs it.

    Raises:
        ValueError: the network cannot do what the method says; the message gives the reason.
    """
    spec = as_spec(method)
    if spec.first_layer is not None:
        # A network that always serves layer 0 has no variant without it; one that starts at 1 still obeys LaPE's 0.
        spec = replace(spec, first_layer=min(spec.first_layer, traits.first_layer))
    if spec.pool not in traits.readouts:
        # The published baselines mean "the network's own read-out"; everything else asks for this read-out as such.
        if spec not in (METHODS["default"], METHODS["lape"]):
            raise ValueError(
                f"{traits.name} cannot read out by {spec.pool!r}: it has {', '.join(traits.readouts)}; "
                f"use a method with pool={traits.readouts[0]!r}"
            )
        spec = replace(spec, pool=traits.readouts[0])
    k = spec.last_index
    if k is not None and k >= traits.depth:
        raise ValueError(
            f"last_index {k} asks for pos_{k}, but {traits.name} has {traits.depth} layers, so the last is "
            f"pos_{traits.depth - 1}; use a smaller last_index or a deeper network"
        )
    if k and not traits.uniform_width:
        raise ValueError(f"last_index is {k}, but in {traits.name} pos_{k} is not as wide as the Last LN; use 0")
    return spec


class DeliveredPE(NamedTuple):
    """Finished values for one forward pass; `(1, rows, dim)` each, where rows are the network's tokens."""

    per_layer: tuple[Tensor | None, ...]
    """What layer l adds to its attention input LN_l(x_l); None: nothing."""
    last: Tensor | None
    """What is added to the output of the Last LN, on every token, before the mean; None: nothing."""
    carry: Tensor
    """The chain's last value, `(1, pos rows, dim)`: where a staged network's next stage goes on."""


class PositionDelivery(nn.Module):
    """Turns a raw PE into what each layer and the Last LN receive.

    Args:
        spec: a resolved method.
        depth: number of layers served from here (of a stage, in a staged network).
        dim: channels of the PE.
        eps: epsilon of every LN', the network's own.
        prefix_rows: leading tokens without a row in the PE (registers, say): they receive zeros.

    Parameters are `layer_norms.<layer>.{weight,bias}` and `last_norm.{weight,bias}`, at 1 and 0; a layer that receives
    nothing has no entry.
    """

    start: Tensor | None
    """The raw PE from which a network goes on unchanged, for its owner to pass to `forward`; None: none."""
    averages_to_zero = False
    """Whether the mean of `last` is already in the Last LN's beta, so that a mean over tokens may leave `last` out."""

    def __init__(self, spec: DeliverySpec, depth: int, dim: int, *, eps: float = 1e-6, prefix_rows: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.depth = depth
        self.prefix_rows = prefix_rows
        served = range(0) if spec.first_layer is None else range(spec.first_layer, depth)
        self.layer_norms = nn.ModuleDict({str(layer): nn.LayerNorm(dim, eps=eps) for layer in served})
        self.last_norm = None if spec.last_index is None else nn.LayerNorm(dim, eps=eps)
        self.register_buffer("start", None)

    def forward(self, pos: Tensor, initial: Tensor | None = None, *, start: Tensor | None = None) -> DeliveredPE:
        """Computes the chain once.

        Args:
            pos: the raw PE, or the chain's value that an earlier stage carried here, `(1, rows, dim)`.
            initial: pos_0, where it is not `pos`: the raw PE as earlier stages brought it here.
            start: a raw PE, `(1, rows, dim)`; what it gave while every LN' was at 1 and 0 is taken off each value.
        """
        delivered = self._chain(pos, pos if initial is None else initial, nn.LayerNorm.__call__)
        if start is None:
            return delivered
        with torch.no_grad():
            before = self._chain(start, start, _untrained)
        per_layer = tuple(map(_less, delivered.per_layer, before.per_layer))
        return DeliveredPE(per_layer, _less(delivered.last, before.last), delivered.carry)

    def _chain(self, pos: Tensor, pos_0: Tensor, apply: Callable[[Any, Tensor], Tensor]) -> DeliveredPE:
        chain: dict[int, Tensor] = {0: pos_0}
        received: dict[int, Tensor] = {}
        carry = pos
        for key, norm in self.layer_norms.items():
            carry = apply(norm, carry if self.spec.hierarchical else pos_0)  # Eqs. (7), (10); flat: Table 6, row 2
            received[int(key)] = self._over_tokens(carry)  # added to LN_l(x_l) by the layer: Eqs. (6), (9)
            if int(key) > 0:
                chain[int(key)] = carry
        last = None
        if self.last_norm is not None and self.spec.last_index is not None:
            last = self._over_tokens(apply(self.last_norm, chain[self.spec.last_index]))  # Eq. (11); k > 0: Table 5
        return DeliveredPE(tuple(received.get(layer) for layer in range(self.depth)), last, carry)

    def prune(self, depth: int, *, keep_last: bool) -> None:
        """Keeps what the first `depth` layers receive, and what the Last LN receives if `keep_last`."""
        if not keep_last:
            self.last_norm = None
        k = -1 if self.last_norm is None or self.spec.last_index is None else self.spec.last_index
        for layer in map(int, list(self.layer_norms)):
            # pos_k rests on the chain up to k, or, flat, on LN'_k alone.
            if layer >= depth and (layer > k if self.spec.hierarchical else layer != k):
                del self.layer_norms[str(layer)]
        self.depth = depth

    def _over_tokens(self, value: Tensor) -> Tensor:
        return F.pad(value, (0, 0, self.prefix_rows, 0)) if self.prefix_rows else value

    def extra_repr(self) -> str:
        """The spec, for `print(model)`."""
        return f"{self.spec}"


def _untrained(norm: nn.LayerNorm, value: Tensor) -> Tensor:
    return F.layer_norm(value, norm.normalized_shape, eps=norm.eps)


def _less(now: Tensor | None, before: Tensor | None) -> Tensor | None:
    return None if now is None or before is None else now - before


def describe(spec: DeliverySpec, depth: int) -> list[tuple[str, str]]:
    """Says in words what each place of a network with `depth` layers receives.

    Returns:
        Pairs (place, what it receives): "input", "layer 0", ..., "Last LN"; "-" where it is nothing.
    """

    def received(layer: int) -> str:
        if spec.first_layer is None or layer < spec.first_layer:
            return "-"
        if layer == 0:
            return "LN'_0(pos_0)"
        before = f"pos_{layer - 1}"
        if layer == 1 and spec.first_layer == 0:
            before = "LN'_0(pos_0)"
        return f"pos_{layer} = LN'_{layer}({before if spec.hierarchical else 'pos_0'})"

    rows = [("input", "pos_0" if spec.input_pe else "-")]
    rows += [(f"layer {layer}", received(layer)) for layer in range(depth)]
    rows += [("Last LN", "-" if spec.last_index is None else f"LN'_last(pos_{spec.last_index})")]
    return rows
