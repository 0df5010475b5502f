"""Read-outs beside the method's own, against plain writings from the tokens after the Last LN."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from mpvg import create_model, fold
from mpvg.models.readout import set_pooling

NAME = "vit_mini_patch2_8"


def network(method: str = "mpvg", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return create_model(NAME, method, num_classes=5, in_chans=1, **kwargs).eval()


def images() -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def norm(tokens: Tensor, layer: Any) -> Tensor:
    centered = tokens - tokens.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def test_the_maximum_is_over_patches() -> None:
    model = network(pooling="max")
    expected = model.head(model.forward_features(images()).amax(dim=1))
    torch.testing.assert_close(model(images()), expected)


def test_attention_pools_with_one_query() -> None:
    """One latent attends to all patches; an MLP with a residual comes after it (timm, as in SigLIP)."""
    model = network(pooling="attention")
    tokens, pool = model.forward_features(images()), model.attn_pool
    heads, width = pool.num_heads, model.embed_dim // pool.num_heads
    query = F.linear(pool.latent, pool.q.weight, pool.q.bias)[0]
    key, value = F.linear(tokens, pool.kv.weight, pool.kv.bias).chunk(2, dim=-1)
    out = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = (key[..., part] @ query[:, part].T / width**0.5).softmax(dim=1)
        out.append((weights * value[..., part]).sum(dim=1))
    pooled = F.linear(torch.cat(out, dim=-1), pool.proj.weight, pool.proj.bias)
    expected = model.head(pooled + pool.mlp(pool.norm(pooled)))
    torch.testing.assert_close(model(images()), expected, atol=1e-6, rtol=1e-5)


def test_a_norm_after_the_mean_comes_beside_the_last_ln() -> None:
    model = network(pooling="mean_norm")
    with torch.no_grad():
        model.fc_norm.weight.uniform_(0.5, 2)
        model.fc_norm.bias.normal_()
    expected = model.head(norm(model.forward_features(images()).mean(dim=1), model.fc_norm))
    torch.testing.assert_close(model(images()), expected, atol=1e-6, rtol=1e-5)


def test_the_class_token_and_the_mean_are_read_together() -> None:
    model = network("default", pooling="token_and_mean")
    tokens = model.forward_features(images())
    expected = model.head((tokens[:, 0] + tokens[:, 1:].mean(dim=1)) / 2)
    torch.testing.assert_close(model(images()), expected)


def test_registers_are_attended_to_and_not_read() -> None:
    model = network(reg_tokens=4)
    tokens = model.forward_features(images())
    assert tokens.shape[1] == 16 + 4
    torch.testing.assert_close(model(images()), model.head(tokens[:, 4:].mean(dim=1)))
    before = model(images())
    with torch.no_grad():
        model.reg_token.normal_()
    assert not torch.allclose(before, model(images()))


@pytest.mark.parametrize(("pooling", "equal"), [("max", True), ("attention", False), ("mean_norm", False)])
def test_the_gradient_of_beta_is_the_heads_only_where_a_constant_passes_through(pooling: str, equal: bool) -> None:
    """A constant added to every token passes through mean and maximum, and not through attention or an LN."""
    model = network(pooling=pooling).train()
    for module in (model.norm, model.delivery.last_norm):
        torch.nn.init.normal_(module.weight)
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    torch.testing.assert_close(model.norm.bias.grad, model.delivery.last_norm.bias.grad)
    head = model.head.weight.T @ model.head.bias.grad
    assert torch.allclose(model.norm.bias.grad, head, atol=1e-5) == equal


@pytest.mark.parametrize("pooling", ["max", "attention", "mean_norm"])
def test_folding_keeps_the_outputs(pooling: str) -> None:
    model = network(pooling=pooling)
    torch.testing.assert_close(fold(model)(images()), model(images()), atol=1e-6, rtol=1e-5)
    built = timm.create_model(
        f"mpvg_{NAME}", pooling=pooling, folded=True, num_classes=5, in_chans=1, method="mpvg"
    ).eval()
    built.load_state_dict(fold(model).state_dict())
    torch.testing.assert_close(built(images()), model(images()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "method", "pooling", "words"),
    [
        (NAME, "mpvg", "median", "allowed: method, max, attention, mean_norm, token_and_mean"),
        (NAME, "mpvg", "token_and_mean", "allowed with it: method, max, attention, mean_norm"),
        (NAME, "default", "max", "allowed with it: method, token_and_mean"),
        ("swin_tiny_patch4_window7_224", "mpvg", "max", "has a read-out of its own"),
        ("ceit_tiny_patch16_224", "mpvg", "attention", "has a read-out of its own"),
    ],
)
def test_a_read_out_that_cannot_be_is_refused(name: str, method: str, pooling: str, words: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        create_model(name, method, pooling=pooling)


def test_a_network_without_registers_says_so() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="has no registers"):
        create_model("swin_tiny_patch4_window7_224", reg_tokens=4)


def test_the_methods_own_read_out_changes_nothing() -> None:
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    set_pooling(model, "method")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
