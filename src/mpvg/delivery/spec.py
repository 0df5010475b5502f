"""What a method delivers, and where: the paper's methods as data."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Pool = Literal["token", "avg"]
Part = Literal["all", "mean", "rest", "permuted"]
"""What of a PE is delivered: all of it; the mean over its patch rows, to every token; what the mean leaves; or all of
it with its patch rows in another order, which is the same in every layer and run."""


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
    part: Part = "all"
    """Which part of pos_l layer l receives; the chain continues with all of it."""
    last_part: Part = "all"
    """Which part of LN'_last(pos_k) the Last LN receives."""
    last_table: Literal["pos", "random"] = "pos"
    """What LN'_last takes: pos_k, or a random table of the PE's shape that is never trained."""
    last_detach: bool = False
    """Whether the gradient of what the Last LN receives stops before pos_k."""
    gain: float = 1.0
    """Initial weight of every LN'_l."""
    last_gain: float = 1.0
    """Initial weight of LN'_last."""
    start_beta: bool = False
    """Whether the Last LN's bias starts at what LN'_last(pos_0) adds to the read-out before training; where nothing is
    delivered to the Last LN, it is that of an LN' which is never trained."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed or type(getattr(self, name)) is not type(allowed[0]):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}")
        for name in ("gain", "last_gain"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _MAX_GAIN:
                raise ValueError(f"{name} is {value!r:.40}; allowed: a finite number, in float32")
        if self.first_layer not in (None, 0, 1) or isinstance(self.first_layer, bool | float):
            raise ValueError(f"first_layer is {self.first_layer!r}; allowed: None, 0, 1")
        self._check_last()
        for route, names in _ROUTES.items():
            for name in names:
                if getattr(self, route) is None and getattr(self, name) != _DEFAULTS[name]:
                    raise ValueError(f"{name} is {getattr(self, name)!r}, but {route} is None, so nothing is delivered")

    def _check_last(self) -> None:
        k = self.last_index
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 0):
            raise ValueError(f"last_index is {k!r}; allowed: None, 0 (the raw PE), or the index of a layer")
        if k and self.first_layer is None:
            raise ValueError(f"last_index is {k}, but without first_layer only pos_0 exists; set first_layer, or use 0")
        if k and self.last_table != "pos":
            raise ValueError(f"last_table is {self.last_table!r}, which replaces pos_{k}; use last_index 0")

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON-safe values: a field that is added later changes none."""
        return {name: getattr(self, name) for name, default in _DEFAULTS.items() if getattr(self, name) != default}

    def without_last(self) -> "DeliverySpec":
        """The same method without a delivery to the Last LN."""
        return replace(self, last_index=None, **{name: _DEFAULTS[name] for name in _ROUTES["last_index"]})


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(DeliverySpec)}
_ROUTES = {"first_layer": ("part", "gain"), "last_index": ("last_part", "last_table", "last_detach", "last_gain")}
"""The field that says whether something is delivered to the layers, or to the Last LN -> those that say how."""
_CHOICES: dict[str, tuple[Any, ...]] = {"pool": get_args(Pool), "part": get_args(Part), "last_part": get_args(Part)}
_CHOICES |= {"last_table": ("pos", "random")}
_CHOICES |= dict.fromkeys(("input_pe", "hierarchical", "last_detach", "start_beta"), (True, False))

_MAX_GAIN = 3e38
"""About the largest number in float32."""

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
    unknown = [key for key in method if key not in _DEFAULTS]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r} of a DeliverySpec; allowed: {', '.join(_DEFAULTS)}")
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


def describe(spec: DeliverySpec, depth: int) -> list[tuple[str, str]]:
    """Describes what each place of a network with `depth` layers receives.

    Returns:
        Pairs (place, what it receives) for "input", "layer 0", ..., "Last LN"; "-" means nothing.
    """

    def received(layer: int) -> str:
        if spec.first_layer is None or layer < spec.first_layer:
            return "-"
        before = f"pos_{layer - 1}"
        if layer == 1 and spec.first_layer == 0:
            before = "LN'_0(pos_0)"
        value = f"LN'_{layer}({before if spec.hierarchical and layer else 'pos_0'})"
        return (f"pos_{layer} = {value}" if layer else value) + _remarks(spec.part, spec.gain)

    last = "-"
    if spec.last_index is not None:
        table = f"pos_{spec.last_index}" if spec.last_table == "pos" else "a random table"
        last = f"LN'_last({table})" + _remarks(spec.last_part, spec.last_gain, detach=spec.last_detach)
    if spec.start_beta:
        last += "; its bias starts at the read-out of LN'_last(pos_0)"
    rows = [("input", "pos_0" if spec.input_pe else "-")]
    rows += [(f"layer {layer}", received(layer)) for layer in range(depth)]
    rows += [("Last LN", last)]
    return rows


def _remarks(part: Part, gain: float, *, detach: bool = False) -> str:
    """How a delivered value differs from the LN' that gives it, as text."""
    parts = {"all": "", "mean": "its mean over tokens", "rest": "without its mean over tokens"}
    parts |= {"permuted": "its rows permuted"}
    remarks = [parts[part], f"gain from {gain:g}" if gain != 1 else "", "without gradient to the PE" if detach else ""]
    return "".join(f", {remark}" for remark in remarks if remark)
