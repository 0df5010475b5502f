"""The fields of a DeliverySpec that the experiments need beyond the paper's methods, each against its definition."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpvg.delivery import (
    METHODS,
    DeliverySpec,
    NetworkTraits,
    PositionDelivery,
    as_spec,
    describe,
    describe_spec,
    resolve,
)

DEPTH, DIM, ROWS = 4, 5, 7
PVG, MPVG = METHODS["pvg"], METHODS["mpvg"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def deliver(spec: DeliverySpec, **kwargs: Any) -> PositionDelivery:
    """In float64, with no LN' where it starts."""
    delivery = PositionDelivery(spec, DEPTH, DIM, rows=ROWS, **kwargs).double()
    with torch.no_grad():
        for parameter in delivery.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return delivery


def twin(delivery: PositionDelivery, **fields: Any) -> PositionDelivery:
    """The same weights under another spec."""
    kept = {"prefix_rows": delivery.prefix_rows, "class_rows": delivery.class_rows}
    other = PositionDelivery(replace(delivery.spec, **fields), DEPTH, DIM, rows=ROWS, **kept).double()
    other.load_state_dict(delivery.state_dict(), strict=False)
    return other


def a_pos(rows: int = ROWS) -> Tensor:
    return torch.randn(1, rows, DIM, dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# ---- what a spec says


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_layer": 1, "part": "some"}, r"part is 'some'; allowed: 'all', 'mean', 'rest', 'permuted'"),
        ({"last_index": 0, "last_part": None}, r"last_part is None; allowed: 'all', 'mean'"),
        ({"last_index": 0, "last_table": "zero"}, r"last_table is 'zero'; allowed: 'pos', 'random'"),
        ({"last_index": 0, "last_detach": 1}, r"last_detach is 1; allowed: True, False"),
        ({"start_beta": "yes"}, r"start_beta is 'yes'; allowed: True, False"),
        ({"part": "mean"}, r"part is 'mean', but first_layer is None, so nothing is delivered"),
        ({"gain": 0.5}, r"gain is 0\.5, but first_layer is None, so nothing is delivered"),
        ({"first_layer": 1, "last_part": "mean"}, r"last_part is 'mean', but last_index is None, so nothing"),
        ({"first_layer": 1, "last_table": "random"}, r"last_table is 'random', but last_index is None"),
        ({"first_layer": 1, "last_detach": True}, r"last_detach is True, but last_index is None"),
        ({"first_layer": 1, "last_gain": 0.0}, r"last_gain is 0\.0, but last_index is None"),
        (
            {"first_layer": 1, "last_index": 2, "last_table": "random"},
            r"last_table is 'random', which replaces pos_2; use last_index 0",
        ),
        *(
            ({"first_layer": 1, "gain": value}, r"gain is .*; allowed: a finite number, in float32")
            for value in (float("nan"), float("inf"), True, "1", None, 10**400, 1e39)
        ),
        ({"last_index": 0, "last_gain": float("-inf")}, r"last_gain is -inf; allowed: a finite number"),
    ],
)
def test_a_bad_value_is_refused(fields: dict[str, Any], message: str) -> None:
    """From Python and from a config alike, in one short line."""
    with pytest.raises(ValueError, match=message) as raised:
        DeliverySpec(**fields)
    assert len(str(raised.value)) < 150
    with pytest.raises(ValueError, match=message):
        as_spec(fields)


ALL_FIELDS: dict[str, Any] = {
    **{"first_layer": 1, "last_index": 0, "part": "rest", "last_part": "mean", "last_table": "random"},
    **{"last_detach": True, "gain": 0.02, "last_gain": 0.25, "start_beta": True},
}


@pytest.mark.parametrize("left_out", [None, "part", "last_part", "last_table", "last_detach", "gain", "last_gain"])
def test_a_spec_survives_json(left_out: str | None) -> None:
    fields = {name: value for name, value in ALL_FIELDS.items() if name != left_out}
    spec = as_spec(json.loads(json.dumps(fields)))
    assert spec.to_dict() == fields
    assert as_spec(spec.to_dict()) == spec


def test_the_same_method_without_the_last_norm_keeps_what_layers_receive() -> None:
    spec = as_spec(ALL_FIELDS).without_last()
    assert spec == DeliverySpec(first_layer=1, part="rest", gain=0.02, start_beta=True)


def test_a_spec_is_described_by_the_nearest_method() -> None:
    assert describe_spec(replace(PVG, part="mean")) == "pvg, part=mean"
    assert describe_spec(replace(MPVG, last_table="random", last_gain=0.0)) == "mpvg, last_table=random, last_gain=0.0"


def test_describe_says_what_differs() -> None:
    spec = as_spec(ALL_FIELDS)
    assert describe(spec, 2) == [
        ("input", "pos_0"),
        ("layer 0", "-"),
        ("layer 1", "pos_1 = LN'_1(pos_0), without its mean over tokens, gain from 0.02"),
        (
            "Last LN",
            "LN'_last(a random table), its mean over tokens, gain from 0.25, without gradient to the PE; "
            "its bias starts at the read-out of LN'_last(pos_0)",
        ),
    ]
    assert dict(describe(replace(PVG, part="permuted"), 2))["layer 1"] == "pos_1 = LN'_1(pos_0), its rows permuted"


@pytest.mark.parametrize("fields", [{"last_table": "random"}, {"start_beta": True}, {"part": "mean", "gain": 2.0}])
def test_networks_with_stages_run_them(fields: dict[str, Any]) -> None:
    swin = NetworkTraits(name="Swin", depth=4, readouts=("avg",), first_layer=0, uniform_width=False)
    assert resolve(replace(MPVG, **fields), swin) == replace(MPVG, first_layer=0, **fields)


# ---- parts


def part_by_hand(value: Tensor, part: str, class_rows: int, prefix_rows: int) -> Tensor:
    rows = [value[0, row] for row in range(value.shape[1])]
    mean = sum(rows[class_rows:], torch.zeros(DIM, dtype=torch.float64)) / (len(rows) - class_rows)
    parts: dict[str, list[Tensor]] = {"all": rows, "mean": [mean] * len(rows), "rest": [row - mean for row in rows]}
    return torch.stack([torch.zeros(DIM, dtype=torch.float64)] * prefix_rows + parts[part])[None]


@pytest.mark.parametrize(("class_rows", "prefix_rows"), [(0, 0), (1, 0), (2, 0), (0, 3)])
@pytest.mark.parametrize("last_part", ["all", "mean", "rest"])
@pytest.mark.parametrize("part", ["all", "mean", "rest"])
@pytest.mark.parametrize("method", ["mpvg", "mpvg_flat", "mpvg_layer0"])
def test_a_part_is_taken_of_what_is_delivered_and_not_of_the_chain(
    method: str, part: str, last_part: str, class_rows: int, prefix_rows: int
) -> None:
    """The mean is over the rows of patches, and every row of the PE receives it; a token without a row gets zeros."""
    rows = {"class_rows": class_rows, "prefix_rows": prefix_rows}
    whole, pos = deliver(METHODS[method], **rows), a_pos()
    bare = PositionDelivery(METHODS[method], DEPTH, DIM).double()
    bare.load_state_dict(whole.state_dict())
    expected, actual = bare(pos), twin(whole, part=part, last_part=last_part)(pos)
    assert torch.equal(actual.carry, expected.carry)
    for one, value in zip(actual.per_layer, expected.per_layer, strict=True):
        assert (one is None) == (value is None)
        if value is not None:
            assert_close(one, part_by_hand(value, part, **rows))
    assert_close(actual.last, part_by_hand(expected.last, last_part, **rows))


@pytest.mark.parametrize("class_rows", [0, 1])
def test_permuted_rows_are_the_same_rows_in_one_order(class_rows: int) -> None:
    """In every layer, network and process; the rows of class tokens stay, and those of the patches do not."""
    whole, pos = deliver(MPVG, class_rows=class_rows), a_pos()
    permuted = twin(whole, part="permuted", last_part="permuted")
    orders = set()
    values = [value for value in (*whole(pos).per_layer, whole(pos).last) if value is not None]
    moved = [value for value in (*permuted(pos).per_layer, permuted(pos).last) if value is not None]
    assert len(values) == len(moved) == DEPTH
    for value, other in zip(values, moved, strict=True):
        distances = (other[0, :, None] - value[0, None]).abs().sum(dim=-1)
        assert distances.min(dim=1).values.max() == 0
        orders.add(tuple(distances.argmin(dim=1).tolist()))
    order = orders.pop()
    assert not orders
    assert sorted(order) == list(range(ROWS))
    assert order[:class_rows] == tuple(range(class_rows))
    assert order == {0: (3, 5, 2, 4, 1, 6, 0), 1: (0, 4, 6, 3, 5, 2, 1)}[class_rows]


def test_the_order_of_permuted_rows_serves_training_after_an_evaluation() -> None:
    """And after a network without storage; as torch refuses for tensors of either."""
    rows = 11  # of which no other test asks the order
    delivery, pos = deliver(replace(PVG, part="permuted")), a_pos(rows)
    with torch.device("meta"):
        PositionDelivery(replace(PVG, part="permuted"), DEPTH, DIM)(torch.empty(1, rows, DIM))
    with torch.inference_mode():
        delivery(pos)
    pos.requires_grad_()
    sum(value.square().sum() for value in delivery(pos).per_layer if value is not None).backward()
    assert pos.grad.abs().max() > 0


# ---- the route of the Last LN


@pytest.mark.parametrize("k", [0, 2])
def test_a_detached_route_gives_the_same_and_teaches_its_own_norm_only(k: int) -> None:
    open_route, pos = deliver(replace(MPVG, last_index=k)), a_pos().requires_grad_()
    detached = twin(open_route, last_detach=True)
    assert torch.equal(detached(pos).last, open_route(pos).last)
    weights = torch.randn_like(pos)
    for delivery in (open_route, detached):
        (delivery(pos).last * weights).sum().backward()
    assert torch.equal(detached.last_norm.weight.grad, open_route.last_norm.weight.grad)
    assert pos.grad is not None
    pos = pos.detach().requires_grad_()
    (detached(pos).last * weights).sum().backward()
    assert pos.grad is None
    assert all(parameter.grad is None for parameter in detached.layer_norms.parameters())
    (detached(pos).per_layer[-1] * weights).sum().backward()
    assert pos.grad is not None
    assert pos.grad.abs().max() > 1e-3


def test_a_random_table_takes_the_place_of_the_pe_at_the_last_norm() -> None:
    """Whatever the PE is; it is part of the network's state, and no parameter."""
    delivery = deliver(replace(MPVG, last_table="random"))
    expected = delivery.last_norm(delivery.table)
    one, other = delivery(a_pos()), delivery(a_pos())
    assert torch.equal(one.last, expected)
    assert torch.equal(other.last, expected)
    assert not torch.equal(one.per_layer[1], other.per_layer[1])
    assert delivery.table.shape == (1, ROWS, DIM)
    assert "table" in delivery.state_dict()
    assert "table" not in dict(delivery.named_parameters())
    table = a_pos()
    assert torch.equal(delivery(a_pos(), table=table).last, delivery.last_norm(table))


def test_a_random_table_is_drawn_as_a_pe_is() -> None:
    """From torch's seeded generator, at DeiT's std; without one nothing is drawn, so other networks stay the same."""
    random = replace(MPVG, last_table="random")
    tables = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tables.append(PositionDelivery(random, DEPTH, 64, rows=196).table)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert tables[0].std().item() == pytest.approx(0.02, rel=0.02)
    before = torch.get_rng_state()
    for spec in (*METHODS.values(), replace(MPVG, part="permuted", last_part="mean", start_beta=True)):
        PositionDelivery(spec, DEPTH, DIM, rows=ROWS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_table_needs_the_number_of_rows() -> None:
    with pytest.raises(ValueError, match=r"rows is 0, but last_table='random' has as many rows as the PE; give rows"):
        PositionDelivery(replace(MPVG, last_table="random"), DEPTH, DIM)


# ---- starts


@pytest.mark.parametrize(("gain", "last_gain"), [(0.02, 1.0), (1.0, 0.0), (-2, 0.5)])
def test_gains_are_where_the_weights_of_the_norms_start(gain: float, last_gain: float) -> None:
    """And where they start again; the biases start at 0."""
    delivery = PositionDelivery(replace(MPVG, gain=gain, last_gain=last_gain), DEPTH, DIM)
    for _ in range(2):
        for name, parameter in delivery.named_parameters():
            start = 0.0 if name.endswith("bias") else last_gain if name.startswith("last") else gain
            assert torch.equal(parameter, torch.full((DIM,), start)), name
        with torch.no_grad():
            for parameter in delivery.parameters():
                parameter += 1
        delivery.reset_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"part": "rest", "last_part": "permuted"}, {"last_table": "random"}])
def test_an_untrained_delivery_of_the_reference_is_exactly_nothing(fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Also where gains start elsewhere, so that a converted network starts with its own outputs."""
    spec = replace(MPVG, gain=0.3, last_gain=0.7, **fields)
    delivery, pos = PositionDelivery(spec, DEPTH, DIM, rows=ROWS).to(dtype), a_pos().to(dtype)
    delivered = delivery(pos, reference_pos=pos)
    for value in (*delivered.per_layer[1:], delivered.last):
        assert torch.equal(value, torch.zeros_like(pos))


@pytest.mark.parametrize("last_part", ["all", "mean", "rest"])
def test_a_start_is_what_an_untrained_norm_gives(last_part: str) -> None:
    spec = replace(MPVG, last_part=last_part, last_gain=0.25)
    trained, pos = deliver(spec, class_rows=1, prefix_rows=2), a_pos()
    normed = 0.25 * F.layer_norm(pos, (DIM,), eps=1e-6)
    assert_close(trained.start(pos), part_by_hand(normed, last_part, 1, 2))
    fresh = PositionDelivery(spec, DEPTH, DIM, class_rows=1, prefix_rows=2).double()
    assert_close(trained.start(pos), fresh(pos).last)


def test_a_start_needs_no_delivery_to_the_last_norm() -> None:
    delivery, pos = deliver(replace(PVG, start_beta=True)), a_pos()
    assert delivery.last_norm is None
    assert_close(delivery.start(pos), F.layer_norm(pos, (DIM,), eps=1e-6))
