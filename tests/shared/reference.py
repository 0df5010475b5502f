"""What the tests of the networks measure by: the equations as plain loops over one image, and counts of what ran.

Tokens are `(N, D)`, maps `(C, H, W)`, weights a state_dict. Nothing here runs code of the package.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpvg.delivery import DeliverySpec


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ---- layers


@torch.no_grad()
def scattered(network: Any) -> Any:
    """A network made float64, evaluating, with no parameter where it starts."""
    model = network.double().eval()
    for part, parameter in model.named_parameters():
        if not part.startswith("patch_embed.attention"):  # the exponentials of T2T's performers would saturate
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ref_norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def ref_linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """A convolution's kernels, too, where each row of x is a window of its input."""
    return x @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]


def ref_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def ref_mlp(x: Tensor, weights: dict[str, Tensor], first: str, second: str) -> Tensor:
    return ref_linear(ref_gelu(ref_linear(x, weights, first)), weights, second)


def ref_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """What each query gets; `bias` is added to the scores, `(queries, keys)`, or one such for each head."""
    width, found = q.shape[1] // heads, []
    biases = (q.new_zeros(1, 1) if bias is None else bias).expand(heads, -1, -1)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width) + biases[head]
        exponentials = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        found.append(exponentials / exponentials.sum(dim=1, keepdim=True) @ v[:, part])
    return torch.cat(found, dim=1)


# ---- images


def windows(maps: Tensor, size: int, stride: int, padding: int = 0, fill: float = 0.0) -> tuple[list[Tensor], int, int]:
    """Every window of the maps, row by row, and how many rows and columns of them there are."""
    padded = torch.full((len(maps), maps.shape[1] + 2 * padding, maps.shape[2] + 2 * padding), fill, dtype=maps.dtype)
    padded[:, padding : padding + maps.shape[1], padding : padding + maps.shape[2]] = maps
    tops = range(0, padded.shape[1] - size + 1, stride)
    lefts = range(0, padded.shape[2] - size + 1, stride)
    found = [padded[:, top : top + size, left : left + size] for top in tops for left in lefts]
    return found, len(tops), len(lefts)


def ref_patches(image: Tensor, weights: dict[str, Tensor], name: str, patch: int) -> Tensor:
    found, _, _ = windows(image, patch, patch)
    return ref_linear(torch.stack([window.flatten() for window in found]), weights, name)


# ---- position embeddings


def ref_delivered(
    spec: DeliverySpec, weights: dict[str, Tensor], pos: Tensor, depth: int, eps: float
) -> tuple[list[Tensor], Tensor]:
    """What each layer and the Last LN receive of a raw PE `(rows, D)`; zeros where that is nothing."""
    served: dict[int, Tensor] = {}
    value = pos
    if spec.first_layer is not None:
        for layer in range(spec.first_layer, depth):
            value = ref_norm(value if spec.hierarchical else pos, weights, f"delivery.layer_norms.{layer}", eps)
            served[layer] = value
    per_layer = [served.get(layer, torch.zeros_like(pos)) for layer in range(depth)]
    if spec.last_index is None:
        return per_layer, torch.zeros_like(pos)
    source = served[spec.last_index] if spec.last_index else pos
    return per_layer, ref_norm(source, weights, "delivery.last_norm", eps)


def ref_resampled(pos: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """A raw PE `(rows, D)` on another grid; prefix rows stay. In float32 on the way, as timm does it."""
    rows = pos[prefix:].reshape(1, *old, pos.shape[1]).permute(0, 3, 1, 2).float()
    rows = F.interpolate(rows, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([pos[:prefix], rows[0].flatten(1).T.double()])


# ---- what runs


class Recording(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func)
        return func(*args, **(kwargs or {}))


def executed(run: Callable[..., object], *inputs: Tensor) -> list[Any]:
    """Every operation of an evaluation, an `OpOverload` each."""
    with torch.no_grad(), Recording() as recording:
        run(*inputs)
    return recording.operations


def operations(run: Callable[..., object], *inputs: Tensor) -> Counter[str]:
    return Counter(str(operation.overloadpacket) for operation in executed(run, *inputs))


def additions(run: Callable[..., object], *inputs: Tensor) -> int:
    return operations(run, *inputs)["aten.add"]
