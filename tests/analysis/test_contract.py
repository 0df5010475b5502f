"""The checks of `mpvg check-network`: what is right passes, and each mistake is found and named."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import EncoderBlock

from mpvg import DeliveryMixin, PositionDelivery
from mpvg.analysis.contract import Check, _has_stages, check_network
from mpvg.delivery import Method, NetworkTraits, resolve
from mpvg.models.fold import fold


def example(text: str) -> Callable[..., nn.Module]:
    """The factory of the example, from its text, for a smaller network."""
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(text, "example", "exec"), namespace)
    return partial(namespace["small_vit"], dim=12, depth=2)


def failed(build: Callable[..., nn.Module]) -> dict[str, str]:
    return {check.name: check.text for check in check_network(build) if check.passed is False}


# torchvision's vit_b_16, reduced, which has nothing of this package.


class TorchvisionLayer(EncoderBlock):
    def forward(self, x: Tensor, pe: Tensor | None = None) -> Tensor:
        y = self.ln_1(x) if pe is None else self.ln_1(x) + pe
        x = x + self.dropout(self.self_attention(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(DeliveryMixin, VisionTransformer):
    pos_embed = property(lambda self: self.encoder.pos_embedding)
    blocks = property(lambda self: self.encoder.layers)
    attention_norms = property(lambda self: [block.ln_1 for block in self.blocks])
    norm = property(lambda self: self.encoder.ln)
    head = property(lambda self: self.heads)
    img_size = property(lambda self: self.image_size)
    in_chans = 3

    def __init__(self, method: Method, **sizes: Any) -> None:
        spec = resolve(method, NetworkTraits(name="torchvision's ViT", depth=sizes["num_layers"]))
        super().__init__(**sizes)
        for block in self.blocks:
            block.__class__ = TorchvisionLayer
        self.num_prefix_tokens = int(spec.pool == "token")
        if not self.num_prefix_tokens:
            del self.class_token
            self.encoder.pos_embedding = nn.Parameter(self.pos_embed.detach()[:, 1:])
        rows, dim = self.pos_embed.shape[1:]
        self.delivery = PositionDelivery(spec, len(self.blocks), dim, class_rows=self.num_prefix_tokens, rows=rows)

    def forward_features(self, images: Tensor) -> Tensor:
        x = self._process_input(images)
        if self.num_prefix_tokens:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = self.encoder.dropout(x + self.pos_embed if self.spec.input_pe else x)
        delivered = self.deliver(self.pos_embed)
        for block, pe in zip(self.blocks, delivered.per_layer, strict=True):
            x = block(x, pe)
        return self.norm(x) if delivered.last is None else self.norm(x) + delivered.last

    def set_input_size(self, img_size: Any = None) -> None:
        raise ValueError("torchvision's ViT checks the size of an image")


REDUCED: dict[str, int] = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32}


def torchvision_vit(method: Method = "mpvg", num_classes: int = 5) -> nn.Module:
    return TorchvisionViT(method, mlp_dim=64, num_classes=num_classes, **REDUCED)


def test_a_network_of_torchvision_passes() -> None:
    checks = list(check_network(torchvision_vit))
    assert [check.name for check in checks if check.passed is not True] == ["image sizes"]
    assert checks[7] == Check(
        "image sizes", None, "for images of 32 x 32 only: torchvision's ViT checks the size of an image"
    )


def test_with_the_method_default_it_is_torchvisions() -> None:
    """The same weights give the same logits."""
    theirs = VisionTransformer(mlp_dim=64, num_classes=5, **REDUCED).eval()
    ours = torchvision_vit("default").eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "layers"), [("example", "blocks."), ("torchvision", "encoder.layers.encoder_layer_")])
def test_layer_decay_puts_what_a_layer_receives_at_the_rate_of_the_layer(name: str, layers: str) -> None:
    model = torchvision_vit() if name == "torchvision" else example(TEXT)()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        layer = re.match(rf"(?:{re.escape(layers)}|delivery\.layer_norms\.)(\d)", key)
        depth = 2 - int(layer[1]) if layer else 0 if key.startswith("head") else 3
        depth = 1 if key.startswith(("norm.", "encoder.ln.", "delivery.last_norm.")) else depth  # timm's convention
        assert scale[id(parameter)] == 0.5**depth, key


# Mistakes in the example: what stands there, what stands instead, the check that fails and why.

TEXT = (Path(__file__).parents[2] / "examples/own_network.py").read_text()
ADDED = "self.norm1(x) if pe is None else self.norm1(x) + pe"
FUNCTIONAL = ADDED.replace("self.norm1(x)", "nn.functional.layer_norm(x, (12,), self.norm1.weight, self.norm1.bias)")
LAST = "self.norm(x) if delivered.last is None else self.norm(x) + delivered.last"
POOL = "\n    def pool(self, tokens):\n        return tokens.amax(1)\n\n    def forward_features("
SPARE = "super().__init__()\n        self.spare = nn.Linear(2, 2)\n        self.img_size"
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "a layer ignores it": (ADDED, "self.norm1(x)", "delivery", "for layer 0 changes nothing: use the values of self.d"),
    "added to the tokens": (
        *(ADDED, "self.norm1(x if pe is None else x + pe)", "delivery"),
        "what is delivered to layer 0 is not added to the output of its LN",
    ),
    "no LN module is called": (ADDED, FUNCTIONAL, "probe", "the probe saw the Last LN, and not layers 0 to 1, then"),
    "no norm1": ("norm1", "norm_1", "members", "block 0 has no norm1; define attention_norms, the LN of each layer"),
    "past deliver": (
        *("self.deliver(self.pos_embed)", "self.delivery(self.pos_embed)", "delivery"),
        "what deliver returns for layer 0 changes nothing",
    ),
    "the Last LN's is lost": (LAST, "self.norm(x)", "delivery", "deliver returns for the Last LN changes nothing"),
    "no mean": ("\n    def forward_features(", POOL, "shapes", "pool is not a mean, and global_pool is 'avg'"),
    "one method": ("resolve(method,", "resolve('mpvg',", "methods", "with method default it runs {'first_layer': 1, "),
    "a PE at the input": ("if self.spec.input_pe:", "if True:", "methods", "lape: the PE is added before layer 0, and"),
    "no PE at the input": ("if self.spec.input_pe:", "if False:", "methods", "gap: the PE is not added before layer 0"),
    "another depth": ("range(depth)", "range(depth - 1)", "members", "delivery is for 2 layers, and SmallViT has 1 b"),
    "other rows": ("// patch_size) ** 2", "// patch_size) ** 3", "members", "pos_embed has 64 rows, and there are 16"),
    "a member is missing": (", self.in_chans = ", ", in_chans = ", "members", "SmallViT has no in_chans"),
    "a parameter is unused": ("super().__init__()\n        self.img_size", SPARE, "gradients", "reaches spare.weight"),
    "a shared parameter": (
        *("self.norm, self.head =", "self.again = self.blocks[0].norm1; self.norm, self.head =", "weights"),
        "blocks.0.norm1.weight and again.weight are one tensor, which safetensors cannot save twice",
    ),
    "one size": (
        *("x = self.embed(images)", "x = self.embed(images).reshape(len(images), 12, 4, 4)", "image sizes"),
        "if the network is for one size, let set_input_size raise a ValueError",
    ),
    "other classes": ("nn.Linear(dim, num_classes)", "nn.Linear(dim, 7)", "shapes", "logits are (2, 7), not (2, 5)"),
    "it raises": ("x = self.embed(images)", "x = self.embed(images @ 1)", "shapes", "TypeError: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_and_named(name: str) -> None:
    old, new, check, reason = MISTAKES[name]
    assert old in TEXT
    found = next(one for one in check_network(example(TEXT.replace(old, new))) if one.name == check)
    assert found.passed is False
    assert reason in found.text


def test_the_example_itself_has_none() -> None:
    assert not failed(example(TEXT))


# A method that is not in the paper.


DOCS = (Path(__file__).parents[2] / "docs/own.md").read_text()
(GATED,) = (code for code in re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL) if "GatedDelivery" in code)


def documented() -> dict[str, Any]:
    """What the page of the documentation defines."""
    found: dict[str, Any] = {"__name__": "documented"}
    exec(compile(GATED, "docs/own.md", "exec"), found)
    return found


def gated_small_vit(method: Method = "mpvg", num_classes: int = 5) -> nn.Module:
    model: Any = example(TEXT)(method, num_classes)
    model.delivery = documented()["GatedDelivery"](model.spec, 2, 12, class_rows=model.num_prefix_tokens)
    return model


def gated_vit(method: Method = "mpvg", num_classes: int = 5) -> nn.Module:
    model: nn.Module = documented()["gated_vit"](method, num_classes=num_classes, depth=2, embed_dim=12)
    return model


@pytest.mark.parametrize("factory", [gated_small_vit, gated_vit])
def test_a_delivery_of_ones_own_passes_and_its_gates_scale_what_layers_receive(
    factory: Callable[..., nn.Module],
) -> None:
    assert not failed(factory)
    model: Any = factory().eval()
    pos = model.raw_pos_embed()
    before = model.deliver(pos)
    model.delivery.gates["1"].data.fill_(0.25)
    after = model.deliver(pos)
    torch.testing.assert_close(after.per_layer[1], 0.25 * before.per_layer[1])
    assert torch.equal(after.last, before.last)
    images = torch.randn(2, model.in_chans, 8, 8)
    torch.testing.assert_close(fold(model)(images), model(images), atol=1e-6, rtol=0)


def test_stages_are_told_from_the_widths_of_their_layer_norms() -> None:
    for widths, stages in (((8, 8, 8), False), ((8, 8, 16), True), ((8, 16, 16), True)):
        norms = [nn.LayerNorm(width) for width in widths]
        assert _has_stages(SimpleNamespace(attention_norms=norms[:-1], norm=norms[-1])) == stages
    norms = [nn.LayerNorm(8), nn.LayerNorm(16, bias=False)]  # of which another check tells
    assert not _has_stages(SimpleNamespace(attention_norms=norms[:1], norm=norms[1]))


def test_the_network_with_stages_in_the_docs_passes() -> None:
    page = (Path(__file__).parents[2] / "docs/own.md").read_text()
    code = page[page.index("### Stages") :]
    names: dict[str, Any] = {}
    exec(compile(code.partition("```python\n")[2].partition("```")[0], "docs/own.md", "exec"), names)
    found = {check.name: check for check in check_network(partial(names["two_stages"], num_classes=5))}
    assert [name for name, check in found.items() if check.passed is False] == []
    assert [name for name, check in found.items() if check.passed is None] == ["delivery", "image sizes"]
    assert "with default, lape_gap, pvg, mpvg" in found["fold"].text
    assert "tokens and pooling are not checked" in found["shapes"].text
