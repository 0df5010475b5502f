"""What a network costs, and Fig. 4, against plain computations."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpvg.analysis import networks
from mpvg.analysis.findings import summarize
from mpvg.analysis.networks import SUPPORTED, Count, Support, inspect, parameter_table, support_table
from mpvg.analysis.probe import collect
from mpvg.data import DataInfo
from mpvg.delivery import METHODS, describe
from mpvg.models import create_model, model_names

EPS = 1e-6


def by_hand(model: Any, images: Tensor) -> list[float]:
    """Fig. 4 for a ViT: its layers one by one, the chain of LN' by the words of `describe`."""
    spec, depth = model.delivery.spec, len(model.blocks)
    pos = model.pos_embed
    x = model.patch_embed(images).flatten(1, -2)
    if model.cls_token is not None:
        x = torch.cat([model.cls_token.expand(len(images), -1, -1), x], dim=1)
    if spec.input_pe:
        x = x + pos
    values: list[float] = []

    def correlate(tokens: Tensor, pe: Tensor) -> None:
        first = 0 if model.cls_token is None else 1
        a, b = tokens.mean(dim=0)[first:].flatten().numpy(), pe[0, first:].flatten().numpy()
        values.append(float(np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1]))

    chain = {0: pos}
    previous = pos
    for layer, block in enumerate(model.blocks):
        received = None
        if spec.first_layer is not None and layer >= spec.first_layer:
            norm = model.delivery.layer_norms[str(layer)]
            received = F.layer_norm(previous if spec.hierarchical else pos, pos.shape[-1:], norm.weight, norm.bias, EPS)
            previous = received
            if layer > 0:  # pos_0 is always the raw PE
                chain[layer] = received
        normed = block.norm1(x)
        correlate(normed, pos if received is None else received)
        x = x + block.attn(normed if received is None else normed + received)
        x = x + block.mlp(block.norm2(x))
    last = pos
    if spec.last_index is not None:
        norm = model.delivery.last_norm
        last = F.layer_norm(chain[spec.last_index], pos.shape[-1:], norm.weight, norm.bias, EPS)
    correlate(model.norm(x), last)
    assert len(values) == depth + 1
    return values


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_correlation_is_that_of_the_mean_token_with_what_its_layer_receives(method: str) -> None:
    model = create_model("vit_narrow_patch4_28", method, num_classes=3, img_size=8, in_chans=1).double()
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    info = DataInfo(
        name="noise",
        class_names=("a", "b", "c"),
        in_chans=1,
        img_size=8,
        mean=(0.5,),
        std=(0.5,),
        train_size=1,
        val_size=5,
    )
    collected = collect(model.train(), [(images, torch.zeros(5, dtype=torch.int64))], info)
    actual = [place.r.value for place in summarize(model, collected).places]
    assert actual == pytest.approx(by_hand(model.eval(), images), abs=1e-9)
    assert len(set(actual)) == 13
    assert all(-1 <= value <= 1 for value in actual)


def few_layers(name: str) -> dict[str, Any]:
    """Arguments that leave a network its width and its image but few layers."""
    return {"depths": (1, 1) if "mini" in name else (1, 1, 1, 1)} if name.startswith("swin") else {"depth": 2}


SMALLEST = [
    "ceit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_mini_patch2_28",
    "t2t_vit_7",
    "vit_lite_6_patch4_32",
]
"""One network of each family, for the methods that deliver nothing."""


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "mpvg") for name in model_names()] + [(name, method) for name in SMALLEST for method in ("default", "gap")],
)
def test_an_inspection_counts_what_the_network_has(name: str, method: str) -> None:
    found = inspect(name, method, num_classes=7, **few_layers(name))
    with torch.device("meta"):
        model: Any = create_model(name, method, num_classes=7, **few_layers(name))
    learned = sum(parameter.numel() for parameter in model.parameters())
    # The sinusoid and the random features of T2T-ViT are counted, as in the paper, though nothing can train them.
    frozen = model.pos_embed.numel() + 2 * 32 * 64 if name.startswith("t2t") else 0
    assert found.parameters == learned + frozen
    delivery = [p.numel() for part, p in model.named_parameters() if part.startswith("delivery.")]
    assert found.delivery_parameters == sum(delivery)
    assert (found.delivery_parameters == 0) == (method != "mpvg")
    assert found.depth == len(model.blocks) == len(describe(found.spec, found.depth)) - 2
    assert found.spec == model.spec
    assert found.pool == model.global_pool


@pytest.mark.parametrize(
    ("method", "parameters"), [("default", 5_717_416), ("gap", 5_717_032), ("mpvg", 5_721_640), ("pvg", 5_721_256)]
)
def test_deit_tiny_has_the_published_size(method: str, parameters: int) -> None:
    """DeiT-Ti is 5,717,416 at facebookresearch/deit; without class token, 2 x 192 fewer; an LN' has 384."""
    assert inspect("deit_tiny_patch16_224", method).parameters == parameters


# #Params of Tables 1 and 2: classes, then the paper's figure in millions and what its networks really have, by method.
COUNTS = {
    "deit_tiny_patch16_224": (1000, "5.717 5717416 5.721 5722024 5.721 5721256 5.721 5721640"),
    "deit_small_patch16_224": (1000, "22.050 22050664 22.059 22059880 22.058 22058344 22.059 22059112"),
    "deit_base_patch16_224": (1000, "86.567 86567656 86.586 86586088 86.583 86583016 86.584 86584552"),
    "swin_tiny_patch4_window7_224": (1000, "28.589 28589410 28.599 28598242 28.598 28598242 28.599 28599778"),
    "ceit_tiny_patch16_224": (1000, "6.356 6356904 6.361 6361512 6.361 6360744 6.361 6361128"),
    "t2t_vit_7": (1000, "4.310 4310222 4.313 4313806 4.312 4312782 4.313 4313294"),
    "vit_lite_7_patch4_32": (100, "3.740 3740004 3.744 3743588 3.742 3742564 3.743 3743076"),
    "t2t_vit_7 on CIFAR-100": (100, "4.078 4078922 4.082 4082506 4.081 4081482 4.081 4081994"),
}


@pytest.fixture(scope="module")
def rows() -> list[Count]:
    return parameter_table()


def test_all_32_networks_of_the_tables_have_their_size_to_the_parameter(rows: list[Count]) -> None:
    expected = []
    for name, (classes, row) in COUNTS.items():
        figures = row.split()
        for method, paper, count in zip(("default", "lape", "pvg", "mpvg"), figures[::2], figures[1::2], strict=True):
            expected.append((name.split()[0], classes, method, paper, int(count)))
    found = [(c.network, c.num_classes, c.method, c.paper, c.parameters) for c in rows]
    assert found == expected
    assert len(found) == 32


def test_the_four_rows_that_cannot_match_say_why_and_no_other(rows: list[Count]) -> None:
    differ = [(row.network, row.method) for row in rows if row.shown != row.paper]
    assert differ == [(row.network, row.method) for row in rows if row.reason]
    assert len(differ) == 4
    assert [row.shown for row in rows if row.reason] == ["5.722", "28.598", "6.360", "3.743"]


def test_a_method_is_supported_the_same_as_an_earlier_one_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two columns; tests/models/test_contract.py holds every cell of the whole table to what it says."""
    monkeypatch.setattr(networks, "SUPPORTED", {column: SUPPORTED[column] for column in ("ViT, DeiT", "Swin")})
    table = support_table()
    assert list(table) == list(METHODS)
    assert {tuple(row) for row in table.values()} == {("ViT, DeiT", "Swin")}
    assert all(cell == Support() for cell in (row["ViT, DeiT"] for row in table.values()))
    swin = {method: row["Swin"] for method, row in table.items()}
    assert {m: cell.same_as for m, cell in swin.items() if cell.same_as} == {
        **{"gap": "default", "lape_gap": "lape"},
        "mpvg_layer0": "mpvg",
    }
    assert {m for m, cell in swin.items() if cell.refused} == {"pvg_token", "mpvg_last5", "mpvg_last8", "mpvg_last11"}


def test_flops_are_two_for_each_multiply_add() -> None:
    found = inspect("vit_mini_patch2_8", "gap", num_classes=10, in_chans=1)
    model: Any = create_model("vit_mini_patch2_8", "gap", num_classes=10, in_chans=1)
    tokens, width, heads, patch = 16, model.embed_dim, model.blocks[0].attn.num_heads, 2 * 2 * 1
    layer = tokens * width * 3 * width + 2 * heads * tokens * tokens * (width // heads)
    layer += tokens * width * width + 2 * tokens * width * 4 * width
    assert found.flops == 2 * (tokens * patch * width + len(model.blocks) * layer + width * 10)
    assert found.image == (1, 8, 8)


def test_arguments_and_refusals_are_those_of_create_model() -> None:
    assert inspect("deit_tiny_patch16_224", "mpvg", img_size=32, in_chans=1).image == (1, 32, 32)
    with pytest.raises(ValueError, match="unknown model 'deit'"):
        inspect("deit", "mpvg")
    with pytest.raises(ValueError, match="last_index 8"):
        inspect("vit_mini_patch2_8", "mpvg_last8")
