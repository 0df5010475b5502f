"""The delivery against the paper: every method's meaning, and every value against a plain loop."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mpvg.delivery import (
    METHODS,
    DeliveredPE,
    DeliverySpec,
    NetworkTraits,
    PositionDelivery,
    as_spec,
    describe,
    resolve,
)

# pool, PE added to x_0, first layer with an LN' of its own, LN'_l of pos_{l-1} (else of pos_0), k of LN'_last(pos_k)
PAPER: dict[str, tuple[str, bool, int | None, bool, int | None]] = {
    "default": ("token", True, None, True, None),  # Table 1, Default: Eqs. (1)-(4) with the class token
    "gap": ("avg", True, None, True, None),  # Fig. 5(a): Default without class token, mean of the Last LN
    "lape": ("token", False, 0, True, None),  # Eqs. (5)-(7)
    "lape_gap": ("avg", False, 0, True, None),  # Fig. 1, layer-wise with GAP
    "pvg": ("avg", True, 1, True, None),  # Eqs. (8)-(10)
    "pvg_token": ("token", True, 1, True, None),  # Fig. 6(a)
    "mpvg": ("avg", True, 1, True, 0),  # Eqs. (8)-(11)
    "gap_last0": ("avg", True, None, True, 0),  # Fig. 5(b)
    "mpvg_last5": ("avg", True, 1, True, 5),  # Table 5
    "mpvg_last8": ("avg", True, 1, True, 8),  # Table 5
    "mpvg_last11": ("avg", True, 1, True, 11),  # Table 5
    "mpvg_layer0": ("avg", True, 0, True, 0),  # Table 6, row 1
    "mpvg_flat": ("avg", True, 1, False, 0),  # Table 6, row 2
    "mpvg_no_input_pe": ("avg", False, 1, True, 0),  # Table 6, row 3
}
DEPTH, DIM, EPS = 12, 5, 1e-6
VIT = NetworkTraits(name="ViT", depth=12)
SWIN = NetworkTraits(name="Swin", depth=12, readouts=("avg",), first_layer=0, uniform_width=False)


def layer_norm(row: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm of one row from its definition; the variance is the mean square, not the unbiased estimate."""
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return (row - mean) / (variance + EPS) ** 0.5 * weight + bias


def norm_rows(pos: Tensor, norm: nn.LayerNorm) -> Tensor:
    return torch.stack([layer_norm(row, norm.weight, norm.bias) for row in pos[0]])[None]


def chain_by_hand(
    first_layer: int | None, hierarchical: bool, last_index: int | None, delivery: PositionDelivery, pos: Tensor
) -> tuple[list[Tensor | None], Tensor | None]:
    """Eqs. (6), (7), (9)-(11) as loops: what each layer and the Last LN receive."""
    per_layer: list[Tensor | None] = []
    before = pos
    for layer in range(delivery.depth):
        if first_layer is None or layer < first_layer:
            per_layer.append(None)
            continue
        before = norm_rows(before if hierarchical else pos, delivery.layer_norms[str(layer)])
        per_layer.append(before)
    if last_index is None:
        return per_layer, None
    source = pos if last_index == 0 else per_layer[last_index]
    return per_layer, norm_rows(source, delivery.last_norm)


def perturb(module: nn.Module) -> None:
    """Moves every parameter by noise of std 0.3, so that no LN' is a plain normalization."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)


def delivery_and_pos(spec: DeliverySpec, depth: int = DEPTH, **kwargs: Any) -> tuple[PositionDelivery, Tensor]:
    delivery = PositionDelivery(spec, depth, DIM, **kwargs).double()
    perturb(delivery)
    return delivery, torch.randn(1, 7, DIM, dtype=torch.float64)


def assert_close(actual: Tensor | None, expected: Tensor | None) -> None:
    """Both nothing, or equal to 1e-12."""
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# ---- what a method says


def test_methods_are_those_of_the_paper() -> None:
    """There is no method more and none less than in the table, and each says what the table says."""
    said = {name: (s.pool, s.input_pe, s.first_layer, s.hierarchical, s.last_index) for name, s in METHODS.items()}
    assert said == PAPER


@pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS.keys())
def test_a_spec_survives_json(spec: DeliverySpec) -> None:
    """It is the fields that differ from their defaults, and comes back from JSON as itself."""
    fields = json.loads(json.dumps(spec.to_dict()))
    plain = DeliverySpec()
    names = ["pool", "input_pe", "first_layer", "hierarchical", "last_index"]
    assert list(fields) == [name for name in names if getattr(spec, name) != getattr(plain, name)]
    assert as_spec(fields) == spec
    assert hash(as_spec(fields)) == hash(spec)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        METHODS["mpvg"].last_index = 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pool": "max"}, r"pool is 'max'; allowed: 'token', 'avg'"),
        ({"pool": None}, r"pool is None; allowed: 'token', 'avg'"),
        ({"input_pe": 1}, r"input_pe is 1; allowed: True, False"),
        ({"hierarchical": "yes"}, r"hierarchical is 'yes'; allowed: True, False"),
        ({"first_layer": 2}, r"first_layer is 2; allowed: None, 0, 1"),
        ({"first_layer": -1}, r"first_layer is -1; allowed"),
        ({"first_layer": True}, r"first_layer is True; allowed"),
        ({"first_layer": 1.0}, r"first_layer is 1\.0; allowed"),
        ({"first_layer": "0"}, r"first_layer is '0'; allowed"),
        ({"first_layer": 1, "last_index": -1}, r"last_index is -1; allowed: None, 0"),
        ({"first_layer": 1, "last_index": 2.0}, r"last_index is 2\.0; allowed"),
        ({"last_index": False}, r"last_index is False; allowed"),
        (
            {"last_index": 5},
            r"last_index is 5, but without first_layer only pos_0 exists; set first_layer, or use 0",
        ),
    ],
)
def test_a_bad_value_is_refused(fields: dict[str, Any], message: str) -> None:
    """The message names the field, the value and what is allowed, from Python and from a config alike."""
    with pytest.raises(ValueError, match=message):
        DeliverySpec(**fields)
    with pytest.raises(ValueError, match=message):
        as_spec(fields)


def test_as_spec_takes_a_name_a_spec_or_fields() -> None:
    own = DeliverySpec(first_layer=0, last_index=3)
    assert as_spec("lape") == METHODS["lape"]
    assert as_spec(own) is own
    assert as_spec({"first_layer": 0, "last_index": 3}) == own
    assert as_spec({}) == METHODS["gap"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mvpg", r"unknown method 'mvpg'; did you mean mpvg.*\? Known: default, gap, .*DeliverySpec"),
        ("MPVG-flat", r"unknown method 'MPVG-flat'.* Known: default"),
        ("mpvg_layer_0", r"unknown method 'mpvg_layer_0'; did you mean mpvg_layer0"),
        ("zzz", r"unknown method 'zzz'\. Known: default, gap"),
        (None, r"method is None; allowed: a name, a DeliverySpec"),
        (3, r"method is 3; allowed: a name, a DeliverySpec"),
        ({"frist_layer": 0}, r"unknown field 'frist_layer' .*allowed: pool, input_pe, first_layer"),
    ],
)
def test_as_spec_says_what_it_does_not_know(method: Any, message: str) -> None:
    """An unknown name is answered with the nearest and with all, an unknown field with the fields there are."""
    with pytest.raises(ValueError, match=message):
        as_spec(method)


# ---- what a network can do


@pytest.mark.parametrize("name", METHODS)
def test_a_vit_of_12_layers_runs_every_method_as_it_is(name: str) -> None:
    assert resolve(name, VIT) == METHODS[name]


@pytest.mark.parametrize("name", METHODS)
def test_swin_runs_a_method_as_its_authors_define_it(name: str) -> None:
    """Swin reads out by average and always serves layer 0; it refuses what it has no class token or width for."""
    _, input_pe, first_layer, hierarchical, last_index = PAPER[name]
    if name == "pvg_token":
        with pytest.raises(ValueError, match=r"Swin cannot read out by 'token': it has avg; use .* pool='avg'"):
            resolve(name, SWIN)
    elif last_index:
        with pytest.raises(
            ValueError, match=rf"last_index is {last_index}, but in Swin pos_{last_index} is not as wide"
        ):
            resolve(name, SWIN)
    else:
        expected = DeliverySpec(
            pool="avg",
            input_pe=input_pe,
            first_layer=None if first_layer is None else 0,
            hierarchical=hierarchical,
            last_index=last_index,
        )
        assert resolve(name, SWIN) == expected


def test_swin_has_no_variant_without_layer_0() -> None:
    """There `mpvg_layer0` is `mpvg`, `default` is `gap` and `lape` is `lape_gap`; in a ViT each is its own."""
    for one, other in [("mpvg_layer0", "mpvg"), ("default", "gap"), ("lape", "lape_gap")]:
        assert resolve(one, SWIN) == resolve(other, SWIN)
        assert resolve(one, VIT) != resolve(other, VIT)


def test_a_researchers_own_token_method_is_refused_where_there_is_no_class_token() -> None:
    """Only the two published baselines mean "the network's own read-out"."""
    with pytest.raises(ValueError, match="cannot read out by 'token'"):
        resolve(DeliverySpec(pool="token", input_pe=False), SWIN)


@pytest.mark.parametrize(("method", "k", "depth"), [("mpvg_last5", 5, 5), ("mpvg_last11", 11, 11)])
def test_a_network_that_is_too_shallow_is_refused(method: str, k: int, depth: int) -> None:
    """pos_k exists from depth k + 1 on, and the message says which is the last."""
    message = rf"last_index {k} asks for pos_{k}, but ViT has {depth} layers, so the last is pos_{depth - 1}; use"
    with pytest.raises(ValueError, match=message):
        resolve(method, replace(VIT, depth=depth))
    assert resolve(method, replace(VIT, depth=depth + 1)) == METHODS[method]


# ---- what is delivered


@pytest.mark.parametrize("name", METHODS)
def test_each_method_delivers_what_the_equations_say(name: str) -> None:
    delivery, pos = delivery_and_pos(METHODS[name])
    _, _, first_layer, hierarchical, last_index = PAPER[name]
    per_layer, last = chain_by_hand(first_layer, hierarchical, last_index, delivery, pos)

    delivered = delivery(pos)

    assert len(delivered.per_layer) == DEPTH
    for actual, expected in zip(delivered.per_layer, per_layer, strict=True):
        assert_close(actual, expected)
    assert_close(delivered.last, last)
    assert_close(delivered.carry, pos if first_layer is None else per_layer[-1])


def all_specs(depth: int) -> Iterator[DeliverySpec]:
    for first_layer, hierarchical in itertools.product((None, 0, 1), (True, False)):
        for last_index in (None, 0, *(range(1, depth) if first_layer is not None else ())):
            yield DeliverySpec(first_layer=first_layer, hierarchical=hierarchical, last_index=last_index)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_spec_there_can_be_delivers_what_the_equations_say(depth: int) -> None:
    """A researcher's own combination follows the same equations as the named ones; also in a network of one layer."""
    for spec in all_specs(depth):
        delivery, pos = delivery_and_pos(spec, depth)
        per_layer, last = chain_by_hand(spec.first_layer, spec.hierarchical, spec.last_index, delivery, pos)
        delivered = delivery(pos)
        for actual, expected in zip((*delivered.per_layer, delivered.last), (*per_layer, last), strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_have_the_names_that_checkpoints_rely_on(name: str) -> None:
    """One LN' for each served layer and one for the Last LN, at 1 and 0, and nothing for a layer that is not served."""
    _, _, first_layer, _, last_index = PAPER[name]
    layers = [] if first_layer is None else range(first_layer, DEPTH)
    norms = [f"layer_norms.{layer}" for layer in layers] + ([] if last_index is None else ["last_norm"])
    delivery = PositionDelivery(METHODS[name], DEPTH, DIM)
    assert list(delivery.state_dict()) == [f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]
    for key, value in delivery.named_parameters():
        assert torch.equal(value, torch.ones(DIM) if key.endswith("weight") else torch.zeros(DIM))


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_eps_is_the_one_given(eps: float) -> None:
    """Every LN' divides by sqrt(var + eps); visible where the PE is small."""
    delivery = PositionDelivery(METHODS["gap_last0"], 2, 2, eps=eps).double()
    pos = torch.tensor([[[0.01, -0.01]]], dtype=torch.float64)
    assert_close(delivery(pos).last, pos / (1e-4 + eps) ** 0.5)


@pytest.mark.parametrize("name", [name for name, said in PAPER.items() if said[2] is not None or said[4] is not None])
def test_the_gradient_reaches_pos_and_every_norm(name: str) -> None:
    """Nothing on the way is detached, and no LN' is built without being used."""
    delivery, pos = delivery_and_pos(METHODS[name])
    pos.requires_grad_()
    delivered = delivery(pos)
    values = [value for value in (*delivered.per_layer, delivered.last) if value is not None]
    sum((value * torch.randn_like(value)).sum() for value in values).backward()
    for key, tensor in [("pos", pos), *delivery.named_parameters()]:
        assert tensor.grad is not None, key
        assert tensor.grad.abs().max() > 1e-3, key


def test_a_chain_and_no_chain_differ_in_what_the_gradient_of_an_early_norm_sees() -> None:
    """Hierarchical: layer 3 depends on LN'_1. Flat: it does not."""
    for hierarchical in (True, False):
        delivery, pos = delivery_and_pos(DeliverySpec(first_layer=1, hierarchical=hierarchical), 4)
        (delivery(pos).per_layer[3] * torch.randn_like(pos)).sum().backward()
        assert (delivery.layer_norms["1"].weight.grad is not None) == hierarchical


@pytest.mark.parametrize("name", METHODS)
def test_what_a_reference_pe_gives_through_untrained_norms_is_subtracted(name: str) -> None:
    """From every value but the carry; the reference is not the PE, and no gradient reaches it."""
    delivery, pos = delivery_and_pos(METHODS[name], prefix_rows=2)
    reference_pos = torch.randn_like(pos, requires_grad=True)
    untrained = PositionDelivery(METHODS[name], DEPTH, DIM, prefix_rows=2).double()
    trained, reference = delivery(pos), untrained(reference_pos)

    delivered = delivery(pos, reference_pos=reference_pos)

    before, now = ((*values.per_layer, values.last) for values in (trained, reference))
    for actual, value, other in zip((*delivered.per_layer, delivered.last), before, now, strict=True):
        assert_close(actual, None if value is None else value - other)
    assert torch.equal(delivered.carry, trained.carry)
    if values := [value for value in (*delivered.per_layer, delivered.last) if value is not None]:
        sum(value.sum() for value in values).backward()
        assert reference_pos.grad is None


def test_initial_is_pos_0_and_pos_is_where_the_chain_goes_on() -> None:
    """Hierarchical layers go on from `pos`; flat ones and the Last LN take `initial`."""
    initial = torch.randn(1, 7, DIM, dtype=torch.float64)
    chained, pos = delivery_and_pos(replace(METHODS["mpvg"], first_layer=0), 2)
    delivered = chained(pos, initial)
    first = norm_rows(pos, chained.layer_norms["0"])
    assert_close(delivered.per_layer[0], first)
    assert_close(delivered.per_layer[1], norm_rows(first, chained.layer_norms["1"]))
    assert_close(delivered.carry, delivered.per_layer[1])
    assert_close(delivered.last, norm_rows(initial, chained.last_norm))

    flat, pos = delivery_and_pos(replace(METHODS["mpvg_flat"], first_layer=0), 2)
    delivered = flat(pos, initial)
    for layer in (0, 1):
        assert_close(delivered.per_layer[layer], norm_rows(initial, flat.layer_norms[str(layer)]))
    assert_close(delivered.last, norm_rows(initial, flat.last_norm))


def test_carry_is_what_came_in_where_no_layer_is_served() -> None:
    """A stage without LN' hands the chain on untouched."""
    delivery, pos = delivery_and_pos(METHODS["gap"])
    assert delivery(pos).carry is pos
    assert delivery(pos, torch.zeros_like(pos)).carry is pos


@pytest.mark.parametrize("keep_last", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prune_keeps_the_values_that_are_left_and_no_norm_beyond_them(depth: int, keep_last: bool) -> None:
    """What remains is delivered as before, and every LN' that remains is used."""
    for spec in all_specs(4):
        delivery, pos = delivery_and_pos(spec, 4)
        before = delivery(pos)
        delivery.prune(depth, keep_last=keep_last)
        after = delivery(pos)

        assert delivery.depth == len(after.per_layer) == depth
        kept = (*before.per_layer[:depth], before.last if keep_last else None)
        for old, new in zip(kept, (*after.per_layer, after.last), strict=True):
            assert_close(new, old)
        values = [value for value in (*after.per_layer, after.last) if value is not None]
        if parameters := dict(delivery.named_parameters()):
            sum((value * torch.randn_like(value)).sum() for value in values).backward()
        unused = [key for key, parameter in parameters.items() if parameter.grad is None]
        assert not unused, f"{spec} pruned to {depth} layers keeps {unused}"


def said_value(text: str, places: dict[str, str], delivery: PositionDelivery, pos: Tensor) -> Tensor:
    """The value that a text of `describe` stands for, such as LN'_2(pos_1)."""
    if text == "pos_0":
        return pos
    if match := re.fullmatch(r"pos_(\d+)", text):
        name, meaning = places[f"layer {match[1]}"].split(" = ")
        assert name == text
        return said_value(meaning, places, delivery, pos)
    match = re.fullmatch(r"LN'_(\w+)\((.+)\)", text)
    assert match, text
    norm = delivery.last_norm if match[1] == "last" else delivery.layer_norms[match[1]]
    return norm_rows(said_value(match[2], places, delivery, pos), norm)


@pytest.mark.parametrize("name", METHODS)
def test_describe_says_what_is_delivered(name: str) -> None:
    """Each text, read as a formula and computed, gives the value that is delivered; "-" is nothing."""
    spec = METHODS[name]
    delivery, pos = delivery_and_pos(spec)
    rows = describe(spec, DEPTH)
    places = dict(rows)
    assert [place for place, _ in rows] == ["input", *[f"layer {layer}" for layer in range(DEPTH)], "Last LN"]
    assert places["input"] == ("pos_0" if PAPER[name][1] else "-")

    delivered = delivery(pos)
    values = {f"layer {layer}": value for layer, value in enumerate(delivered.per_layer)} | {"Last LN": delivered.last}
    for place, value in values.items():
        text = places[place].split(" = ")[-1]
        assert_close(value, None if text == "-" else said_value(text, places, delivery, pos))


def test_describe_reads_like_the_paper() -> None:
    assert describe(METHODS["mpvg"], 3) == [
        ("input", "pos_0"),
        ("layer 0", "-"),
        ("layer 1", "pos_1 = LN'_1(pos_0)"),
        ("layer 2", "pos_2 = LN'_2(pos_1)"),
        ("Last LN", "LN'_last(pos_0)"),
    ]


# ---- tokens beside the patches


@pytest.mark.parametrize("name", METHODS)
def test_a_prefix_token_with_a_row_of_its_own_receives_that_row(name: str) -> None:
    """Rows do not mix: each delivered row is what a PE of that single row would give."""
    delivery, pos = delivery_and_pos(METHODS[name])  # rows 0 to 2: a class token and two registers, say
    together = delivery(pos)
    for row in range(pos.shape[1]):
        alone = delivery(pos[:, row : row + 1])
        for all_rows, one_row in zip((*together.per_layer, together.last), (*alone.per_layer, alone.last), strict=True):
            assert_close(None if all_rows is None else all_rows[:, row : row + 1], one_row)


@pytest.mark.parametrize("prefix_rows", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_token_without_a_row_receives_exactly_zero(name: str, prefix_rows: int) -> None:
    """Not the bias of LN', which is what a row of zeros would become; the other rows and the carry are unchanged."""
    delivery, pos = delivery_and_pos(METHODS[name], prefix_rows=prefix_rows)
    plain = PositionDelivery(METHODS[name], DEPTH, DIM).double()
    plain.load_state_dict(delivery.state_dict())

    padded, expected = delivery(pos), plain(pos)

    for value, rows in zip((*padded.per_layer, padded.last), (*expected.per_layer, expected.last), strict=True):
        assert (value is None) == (rows is None)
        if value is not None:
            assert value.shape == (1, prefix_rows + 7, DIM)
            assert torch.equal(value[:, :prefix_rows], torch.zeros(1, prefix_rows, DIM, dtype=torch.float64))
            assert torch.equal(value[:, prefix_rows:], rows)
    assert torch.equal(padded.carry, expected.carry)
    assert all(norm.bias.abs().min() > 0 for norm in delivery.modules() if isinstance(norm, nn.LayerNorm))


# ---- a network of two stages


class Merging(nn.Module):
    """Tokens `(B, side * side, C)` to `(B, side * side / 4, 2 C)`: LN and Linear over 2 x 2 neighbors."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), self.side, self.side, -1)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, dim=-1).flatten(1, 2)))


class ToyLayer(nn.Module):
    """x + Linear(LN(x) + pe)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim, eps=EPS), nn.Linear(dim, dim)

    def forward(self, x: Tensor, pe: Tensor | None) -> Tensor:
        y = self.norm(x)
        return x + self.linear(y if pe is None else y + pe)


class ToyStages(nn.Module):
    """Two stages of two layers; one merging takes the tokens, the carry and pos_0 from the first to the second."""

    def __init__(self, method: str, dim: int = 3, side: int = 4) -> None:
        super().__init__()
        spec = resolve(method, replace(SWIN, depth=4))
        later = spec if spec.first_layer is None else replace(spec, first_layer=0)
        self.pos = nn.Parameter(torch.randn(1, side * side, dim))
        self.merging = Merging(dim, side)
        self.stages = nn.ModuleList(nn.ModuleList(ToyLayer(width) for _ in range(2)) for width in (dim, 2 * dim))
        self.delivery = nn.ModuleList(
            [
                PositionDelivery(replace(spec, last_index=None), 2, dim, eps=EPS),
                PositionDelivery(later, 2, 2 * dim, eps=EPS),
            ]
        )
        self.norm = nn.LayerNorm(2 * dim, eps=EPS)
        self.spec = spec

    def forward(self, x: Tensor) -> tuple[Tensor, list[DeliveredPE]]:
        x = x + self.pos if self.spec.input_pe else x
        delivered = [self.delivery[0](self.pos)]
        for layer, pe in zip(self.stages[0], delivered[0].per_layer, strict=True):
            x = layer(x, pe)
        x, carry, initial = self.merging(x), self.merging(delivered[0].carry), self.merging(self.pos)
        delivered.append(self.delivery[1](carry, initial))
        for layer, pe in zip(self.stages[1], delivered[1].per_layer, strict=True):
            x = layer(x, pe)
        x = self.norm(x)
        return (x if delivered[1].last is None else x + delivered[1].last), delivered


def merge_by_hand(x: Tensor, merging: Merging) -> Tensor:
    """Neighbors in the order (row, column) = (0,0), (1,0), (0,1), (1,1), token by token."""
    tokens = []
    for row, column in itertools.product(range(0, merging.side, 2), repeat=2):
        places = [(row, column), (row + 1, column), (row, column + 1), (row + 1, column + 1)]
        four = torch.cat([x[0, r * merging.side + c] for r, c in places])
        tokens.append(merging.reduction.weight @ layer_norm(four, merging.norm.weight, merging.norm.bias))
    return torch.stack(tokens)[None]


def stages_by_hand(toy: ToyStages, method: str, x: Tensor) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """The output for one image, what each of the four layers receives, and what the Last LN receives."""
    _, input_pe, first_layer, hierarchical, last_index = PAPER[method]
    pos_0: Tensor = toy.pos
    before = pos_0
    received: list[Tensor | None] = []
    x = x + pos_0 if input_pe else x
    for stage in (0, 1):
        if stage == 1:
            x, before, pos_0 = (merge_by_hand(value, toy.merging) for value in (x, before, pos_0))
        for index, layer in enumerate(cast(Any, toy.stages[stage])):
            attended = norm_rows(x, layer.norm)
            if first_layer is not None:
                before = norm_rows(before if hierarchical else pos_0, toy.delivery[stage].layer_norms[str(index)])
                attended = attended + before
            received.append(None if first_layer is None else before)
            x = x + attended @ layer.linear.weight.T + layer.linear.bias
    last = None if last_index is None else norm_rows(pos_0, toy.delivery[1].last_norm)
    x = norm_rows(x, toy.norm)
    return (x if last is None else x + last), received, last


STAGED = ["mpvg", "mpvg_flat", "mpvg_no_input_pe", "pvg", "lape_gap", "gap_last0", "gap"]


def toy_stages(method: str) -> ToyStages:
    toy = ToyStages(method).double()
    perturb(toy)
    return toy


@pytest.mark.parametrize("method", STAGED)
def test_two_stages_equal_a_plain_loop(method: str) -> None:
    """Both the carry and pos_0 cross the stages through the tokens' own merging, and need nothing else."""
    toy = toy_stages(method)
    x = torch.randn(1, 16, 3, dtype=torch.float64)
    expected, received, last = stages_by_hand(toy, method, x)

    out, delivered = toy(x)

    assert_close(out, expected)
    for actual, by_hand in zip((*delivered[0].per_layer, *delivered[1].per_layer), received, strict=True):
        assert_close(actual, by_hand)
    assert delivered[0].last is None
    assert_close(delivered[1].last, last)


@pytest.mark.parametrize("method", STAGED)
def test_two_stages_add_the_norms_and_no_other_parameter(method: str) -> None:
    """The PE needs no merging of its own, and the Last LN' is as wide as the last stage."""
    _, _, first_layer, _, last_index = PAPER[method]
    count = {name: sum(p.numel() for p in ToyStages(name).parameters()) for name in ("gap", method)}
    layers = 0 if first_layer is None else 2 * (2 * 3) + 2 * (2 * 6)
    assert count[method] - count["gap"] == layers + (0 if last_index is None else 2 * 6)


def test_the_second_stage_goes_on_from_the_carry_and_the_last_norm_from_pos_0() -> None:
    """Merged carry and merged pos_0 differ, and each place receives the right one."""
    toy = toy_stages("mpvg")
    _, (first, second) = toy(torch.randn(1, 16, 3, dtype=torch.float64))
    carry, initial = merge_by_hand(first.carry, toy.merging), merge_by_hand(toy.pos, toy.merging)
    assert (carry - initial).abs().max() > 0.1
    assert_close(second.per_layer[0], norm_rows(carry, toy.delivery[1].layer_norms["0"]))
    assert_close(second.last, norm_rows(initial, toy.delivery[1].last_norm))
    assert toy.delivery[1].last_norm.weight.shape == (6,)


def test_flat_delivery_of_the_second_stage_comes_from_pos_0() -> None:
    toy = toy_stages("mpvg_flat")
    _, (_, second) = toy(torch.randn(1, 16, 3, dtype=torch.float64))
    initial = merge_by_hand(toy.pos, toy.merging)
    for layer in (0, 1):
        assert_close(second.per_layer[layer], norm_rows(initial, toy.delivery[1].layer_norms[str(layer)]))


@pytest.mark.parametrize("method", STAGED)
def test_the_gradient_reaches_every_parameter_of_both_stages(method: str) -> None:
    toy = toy_stages(method)
    if PAPER[method][:3] == ("avg", True, None) and PAPER[method][4] is None:
        assert not list(toy.delivery.parameters())
    out, _ = toy(torch.randn(2, 16, 3, dtype=torch.float64))
    (out * torch.randn_like(out)).sum().backward()
    for key, parameter in toy.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
