"""The paper: how a position embedding (PE) reaches the layers of a vision transformer.

    Eq. (5)   LaPE    x_0 = patches                                       input_pe=False
    Eq. (6)   LaPE    layer l attends to  LN_l(x_l) + LN'_l(pos)          first_layer=0
    Eq. (7)   LaPE    pos of layer l + 1  is  LN'_l(pos of layer l)       hierarchical=True
    Eq. (8)   PVG     x_0 = patches + pos_0                               input_pe=True
    Eq. (9)   PVG     layer l attends to  LN_l(x_l) + LN'_l(pos_{l-1})    first_layer=1
    Eq. (10)  PVG     pos_l = LN'_l(pos_{l-1}),  l = 1..L                 hierarchical=True
    Eq. (11)  MPVG    y = LN(x_{L+1}) + LN'_last(pos_0)                   last_index=0

LN'_l is a separate LayerNorm, next to the layer's own LN_l. L is the index of the last layer (11 of 12). pos_0 is
always the raw PE, and pos_k is what layer k receives. No pos_l depends on an image, so the chain is computed once,
before layer 0, and a network only receives finished values. A method is therefore data: no code outside this file
asks for its name.

This file imports torch and the standard library only.
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
    """What a method delivers, and where; `to_dict` and `as_spec` convert it to JSON-safe values and back.

    Raises:
        ValueError: a field has a value that is not allowed, or `last_index` names a pos_k that is never computed.
    """

    pool: Pool = "avg"
    """Read-out: the class token, or the mean over the tokens after the Last LN."""
    input_pe: bool = True
    """Whether the PE is added to the tokens before layer 0."""
    first_layer: Literal[0, 1] | None = None
    """First layer that receives a PE at its attention input; None: no layer does."""
    hierarchical: bool = True
    """LN'_l takes pos_{l-1} (True), or pos_0 at every layer (False)."""
    last_index: int | None = None
    """k of the pos_k that is delivered to the Last LN, through LN'_last; None: nothing is."""

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
        """The fields that differ from their defaults, as JSON-safe values: a field that is added later changes none."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: getattr(self, name) for name, default in fields.items() if getattr(self, name) != default}


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
"""The paper's methods by name: Tables 1 to 6, and Figs. 1 and 5."""

Method = str | DeliverySpec | Mapping[str, Any]
"""How a method may be given: its name, a spec, or the fields of a spec."""


def as_spec(method: Method) -> DeliverySpec:
    """Returns the spec for a name, a spec or the fields of a spec.

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


def describe_spec(spec: DeliverySpec) -> str:
    """A spec in words: its method's name, or the nearest method's and what differs, such as "mpvg, last_index=3"."""

    def differences(method: str) -> dict[str, Any]:
        own, other = dataclasses.asdict(spec), dataclasses.asdict(METHODS[method])
        return {name: value for name, value in own.items() if value != other[name]}

    def distance(method: str) -> tuple[int, int]:
        differing = differences(method)  # of equally near ones, that which delivers to the same places
        return len(differing), sum((getattr(METHODS[method], k) is None) != (v is None) for k, v in differing.items())

    nearest = min(METHODS, key=distance)
    return ", ".join([nearest, *(f"{name}={value}" for name, value in differences(nearest).items())])


@dataclass(frozen=True, kw_only=True)
class NetworkTraits:
    """What a network can do, as far as methods depend on it."""

    name: str
    """The network's name, for error messages."""
    depth: int
    """Number of layers, over all stages."""
    readouts: tuple[Pool, ...] = ("token", "avg")
    """The read-outs that the network supports."""
    first_layer: Literal[0, 1] = 1
    """The first layer that receives a PE under PVG: 1, or 0 where the authors always include layer 0 (Swin)."""
    uniform_width: bool = True
    """Whether every pos_k has as many channels as the Last LN, so that any of them can be delivered to it."""


def resolve(method: Method, traits: NetworkTraits) -> DeliverySpec:
    """Returns the spec as a network with these traits runs it.

    Raises:
        ValueError: the network cannot run the method; the message gives the reason.
    """
    spec = as_spec(method)
    if spec.first_layer is not None:
        # Swin has no variant without layer 0; in other networks, methods that start at layer 0 (LaPE) still do.
        spec = replace(spec, first_layer=min(spec.first_layer, traits.first_layer))
    if spec.pool not in traits.readouts:
        # The two published baselines use the network's own read-out; any other method needs the read-out it names.
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
    """Finished values for one forward pass, each `(1, rows, dim)` with one row per token."""

    per_layer: tuple[Tensor | None, ...]
    """What is added to the attention input LN_l(x_l) of layer l; None: nothing."""
    last: Tensor | None
    """What is added to the output of the Last LN, on every token, before the mean; None: nothing."""
    carry: Tensor
    """The last value of the chain, `(1, pos rows, dim)`: the input of the next stage in a network with stages."""


class PositionDelivery(nn.Module):
    """Computes what each layer and the Last LN receive from the raw PE.

    Args:
        spec: a resolved method.
        depth: number of layers of the network, or of the stage that this module belongs to.
        dim: channels of the PE.
        eps: epsilon of every LN'; the network's own.
        prefix_rows: number of leading tokens without a row in the PE, for example registers; they receive zeros.

    The parameters are `layer_norms.<layer>.{weight,bias}` and `last_norm.{weight,bias}`, initialized to 1 and 0. A
    layer that receives nothing has no entry.
    """

    reference_pos: Tensor | None
    """A copy of the raw PE, for the owner to pass to `forward`: what it gives through untrained LN' is subtracted, so
    that a converted network starts with unchanged outputs. None: nothing is subtracted."""
    last_mean_folded = False
    """Whether the Last LN's beta already contains the mean of `last`, so that the mean over tokens can omit `last`."""

    def __init__(self, spec: DeliverySpec, depth: int, dim: int, *, eps: float = 1e-6, prefix_rows: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.depth = depth
        self.prefix_rows = prefix_rows
        layers = range(0) if spec.first_layer is None else range(spec.first_layer, depth)
        self.layer_norms = nn.ModuleDict({str(layer): nn.LayerNorm(dim, eps=eps) for layer in layers})
        self.last_norm = None if spec.last_index is None else nn.LayerNorm(dim, eps=eps)
        self.register_buffer("reference_pos", None)

    def forward(
        self, pos: Tensor, initial: Tensor | None = None, *, reference_pos: Tensor | None = None
    ) -> DeliveredPE:
        """Computes the whole chain.

        Args:
            pos: the raw PE, or the `carry` of the previous stage, `(1, rows, dim)`.
            initial: pos_0, if it is not `pos`: the raw PE after the previous stages' merging.
            reference_pos: a raw PE, `(1, rows, dim)`; the values that it gives with every LN' at 1 and 0 are
                subtracted from the delivered ones.
        """
        delivered = self._chain(pos, pos if initial is None else initial, nn.LayerNorm.__call__)
        if reference_pos is None:
            return delivered
        with torch.no_grad():
            reference = self._chain(reference_pos, reference_pos, _untrained_norm)
        per_layer = tuple(map(_subtract, delivered.per_layer, reference.per_layer))
        return DeliveredPE(per_layer, _subtract(delivered.last, reference.last), delivered.carry)

    def _chain(self, pos: Tensor, pos_0: Tensor, apply: Callable[[Any, Tensor], Tensor]) -> DeliveredPE:
        chain: dict[int, Tensor] = {0: pos_0}
        received: dict[int, Tensor] = {}
        carry = pos
        for key, norm in self.layer_norms.items():
            carry = apply(norm, carry if self.spec.hierarchical else pos_0)  # Eqs. (7), (10); flat: Table 6, row 2
            received[int(key)] = self._pad_prefix(carry)  # added to LN_l(x_l) by the layer: Eqs. (6), (9)
            if int(key) > 0:
                chain[int(key)] = carry
        last = None
        if self.last_norm is not None and self.spec.last_index is not None:
            last = self._pad_prefix(apply(self.last_norm, chain[self.spec.last_index]))  # Eq. (11); k > 0: Table 5
        return DeliveredPE(tuple(received.get(layer) for layer in range(self.depth)), last, carry)

    def prune(self, depth: int, *, keep_last: bool) -> None:
        """Keeps only what the first `depth` layers receive and, if `keep_last`, what the Last LN receives."""
        if not keep_last:
            self.last_norm = None
        k = -1 if self.last_norm is None or self.spec.last_index is None else self.spec.last_index
        for layer in map(int, list(self.layer_norms)):
            # pos_k needs every LN' up to LN'_k if hierarchical, and LN'_k alone otherwise.
            if layer >= depth and (layer > k if self.spec.hierarchical else layer != k):
                del self.layer_norms[str(layer)]
        self.depth = depth

    def _pad_prefix(self, value: Tensor) -> Tensor:
        return F.pad(value, (0, 0, self.prefix_rows, 0)) if self.prefix_rows else value

    def extra_repr(self) -> str:
        """Shows the spec in `print(model)`."""
        return f"{self.spec}"


def _untrained_norm(norm: nn.LayerNorm, value: Tensor) -> Tensor:
    return F.layer_norm(value, norm.normalized_shape, eps=norm.eps)


def _subtract(value: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if value is None or other is None else value - other


def describe(spec: DeliverySpec, depth: int) -> list[tuple[str, str]]:
    """Describes what each place of a network with `depth` layers receives.

    Returns:
        Pairs (place, what it receives) for "input", "layer 0", ..., "Last LN"; "-" means nothing.
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
