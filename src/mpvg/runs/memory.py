"""Memory that runs out, on the host or the device, as one line with the cure."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mpvg.config import RunConfig

_SHARED = re.compile(r"shared memory|/torch_\d+_|Bus error")
_WORKER = re.compile(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)")
_LIMIT = re.compile(r"can't start new thread|[Tt]oo many open files|items of ancdata|temporarily unavailable")
_ALLOCATOR = re.compile(
    r"can't allocate memory|[Cc]annot allocate memory|not enough memory|bad_alloc|STATUS_ALLOC_FAILED|"
    r"\b(CUDA|HIP|XPU|MPS)\b.*out of memory"
)
_MAX_REASON = 200


class OutOfMemory(ValueError):
    """Memory, or another of the system's resources, is used up; or a loader worker was killed, mostly for memory."""


@contextmanager
def memory_errors(cure: Callable[[str], str]) -> Iterator[None]:
    """Turns errors of allocators, and the death of a loader worker, into OutOfMemory; others are left as they are.

    Args:
        cure: from what is used up, as torch or the system says it, to what the user can do; see `training_cure`.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OutOfMemory(f"{reason}; {cure(reason)}") from error


def _reason(error: BaseException) -> str | None:
    """The line of an error that says what is used up; None where it is another error."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        found = text.strip().splitlines()[-1:] or ["not enough memory"]
    elif isinstance(error, OSError):
        found = [text] if error.errno in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE) else []
    else:
        patterns = (_SHARED, _WORKER, _LIMIT, _ALLOCATOR)
        found = [line for line in text.splitlines() if any(pattern.search(line) for pattern in patterns)]
    if not found:
        return None
    reason = " ".join(found[-1].split()).rstrip(" .;")
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]}..."


def training_cure(config: RunConfig) -> Callable[[str], str]:
    """What can be done where memory runs out in a training run, with the flags of `mpvg train`."""
    workers = config.loader.workers
    fewer = f"fewer --loader.workers than {workers}" if workers else "--loader.workers 0"
    smaller = (
        f"a larger --accumulate than {config.accumulate} (the step stays the same), a smaller --batch_size than "
        f"{config.batch_size}"
    )

    def cure(reason: str) -> str:
        if _SHARED.search(reason):
            return f"give --loader.workers 0 instead of {workers}, or more room in /dev/shm (docker run --shm-size=8g)"
        if _LIMIT.search(reason):
            return f"give {fewer}, or raise the limit (ulimit -a shows it)"
        if _WORKER.search(reason):
            return f"the system kills workers where memory runs out: give {fewer}, {smaller}, or more memory"
        return f"memory is used up: give {smaller}, or {fewer}"

    return cure


def evaluation_cure(smaller: str) -> Callable[[str], str]:
    """What can be done where memory runs out while a trained network is used.

    Args:
        smaller: what the verb's user can give instead, such as "a smaller --batch_size than 32".
    """

    def cure(reason: str) -> str:
        if _SHARED.search(reason):
            return "give more room in /dev/shm (docker run --shm-size=8g)"
        if _LIMIT.search(reason):
            return "raise the limit (ulimit -a shows it)"
        return f"memory is used up: give {smaller}, or a device with more memory"

    return cure
