"""Vectors that can be read out of a frozen network, from one pass over images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpvg.data import ImageBatch
from mpvg.models.tokens import TokenReader, Tokens
from mpvg.validation import unknown_name

ATTENTION = "attention"
MAX_TOKEN_BYTES = 2 * 2**30
"""Memory for the tokens that the attention probe is trained on, in float16."""

READOUTS = {
    "token": "class token",
    "mean": "mean of patches, Last LN before it",
    "mean_then_norm": "mean of patches, Last LN after it",
    "mean_registers": "mean of patches and registers",
    "both": "class token and mean, concatenated",
    "max": "max over patches",
    ATTENTION: "attention: mean weighted by one trained query",
}
"""The read-outs -> what each is."""


@dataclass(frozen=True)
class Features:
    """What one pass over images left."""

    vectors: dict[str, Tensor]
    """Read-out -> `(images, D)`, float32."""
    tokens: Tensor | None
    """After the Last LN, `(images, N, D)`, float16, for the attention probe; None: not wanted."""
    targets: Tensor
    """Classes, `(images,)`."""


def impossible(reader: TokenReader) -> dict[str, str]:
    """The read-outs that a network cannot have, with the reason."""
    reasons: dict[str, str] = {}
    if not reader.class_token:
        reasons |= dict.fromkeys(("token", "both"), "the network has no class token")
    if reader.last_norm is None:
        reasons["mean_then_norm"] = "the network has no Last LN"
    if not reader.registers:
        reasons["mean_registers"] = "the network has no registers"
    return reasons


def choose(reader: TokenReader, wanted: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The read-outs to compute, and those left out with the reason.

    Args:
        reader: of the network.
        wanted: their names; None: all that the network can have.

    Raises:
        ValueError: one of them is unknown, or the network cannot have it.
    """
    reasons = impossible(reader)
    if wanted is None:
        return [name for name in READOUTS if name not in reasons], reasons
    can = ", ".join(name for name in READOUTS if name not in reasons)
    for name in wanted:
        if name not in READOUTS:
            raise ValueError(unknown_name("read-out", name, READOUTS))
        if name in reasons:
            raise ValueError(f"read-out {name!r} is not possible: {reasons[name]}; this network can have: {can}")
    return list(dict.fromkeys(wanted)), {}


def read_out(reader: TokenReader, tokens: Tokens, name: str) -> Tensor:
    """One vector for each image, `(B, D)`, or `(B, 2 D)` for "both"; not for "attention", which is trained."""
    patches = tokens.after[:, reader.prefix :]
    vectors: dict[str, Callable[[], Tensor]] = {
        "token": lambda: tokens.after[:, 0],
        "mean": lambda: patches.mean(dim=1),
        "mean_then_norm": lambda: reader.last_norm(tokens.before[:, reader.prefix :].mean(dim=1)),  # type: ignore[misc]
        "mean_registers": lambda: tokens.after[:, reader.prefix - reader.registers :].mean(dim=1),
        "both": lambda: torch.cat([tokens.after[:, 0], patches.mean(dim=1)], dim=1),
        "max": lambda: patches.amax(dim=1),
    }
    return vectors[name]()


@torch.inference_mode()
def extract(model: nn.Module, batches: Iterable[ImageBatch], names: Sequence[str], *, images: int) -> Features:
    """Runs a network once over images and keeps its read-outs, on the CPU.

    Args:
        model: in evaluation mode, on the device of the batches.
        batches: prepared images and their classes.
        names: of the read-outs; with "attention" all tokens are kept.
        images: at most so many; it bounds the memory.

    Raises:
        ValueError: no image can be read, a value is not finite, or the tokens for "attention" take more than 2 GiB.
    """
    reader = TokenReader(model.eval())
    kept: dict[str, list[Tensor]] = {name: [] for name in names if name != ATTENTION}
    all_tokens: list[Tensor] = []
    targets = []
    for batch, classes in batches:
        tokens = reader(batch)
        if ATTENTION in names:
            if not all_tokens:
                check_memory(tokens.after, images)
            all_tokens.append(tokens.after.half().cpu())
        for name, parts in kept.items():
            parts.append(read_out(reader, tokens, name).float().cpu())
        targets.append(classes.cpu())
    if not targets:
        raise ValueError("no image could be read; give data with readable images")
    vectors = {name: torch.cat(parts) for name, parts in kept.items()}
    found = torch.cat(all_tokens) if all_tokens else None
    for name, value in {**vectors, **({} if found is None else {ATTENTION: found})}.items():
        if not value.isfinite().all():
            raise ValueError(f"the read-out {name!r} has values that are NaN or infinite; use another checkpoint")
    return Features(vectors, found, torch.cat(targets))


def check_memory(tokens: Tensor, images: int) -> None:
    """Refuses to keep the tokens of so many images.

    Args:
        tokens: of a batch, `(B, N, D)`.
        images: number of images.

    Raises:
        ValueError: they take more than `MAX_TOKEN_BYTES` as float16.
    """
    each = 2 * tokens[0].numel()
    if each * images > MAX_TOKEN_BYTES:
        raise ValueError(
            f"the attention probe keeps the tokens of {images:,} images, {each * images / 2**30:.1f} GiB as float16; "
            f"allowed: 2 GiB; give --samples {MAX_TOKEN_BYTES // each}, or --readouts without {ATTENTION}"
        )
