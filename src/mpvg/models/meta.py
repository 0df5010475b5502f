"""Networks without values: only their shapes, and whether they can be built at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLS = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}
"""What initializations do to a tensor."""


class _WithoutFilling(TorchFunctionMode):
    """Leaves out what would fill tensors that have no values: torch takes its time for it, too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        filled = getattr(func, "__name__", "") in _FILLS and args and isinstance(args[0], Tensor) and args[0].is_meta
        if filled:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Networks that are built in this context have shapes, but neither memory nor values (torch's device "meta")."""
    with torch.device("meta"), _WithoutFilling():
        yield
