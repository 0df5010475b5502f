"""Memory that runs out, on the host or the device, as one line with the cure."""

import errno
import re
from collections.abc import Iterator
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
def memory_errors(config: RunConfig) -> Iterator[None]:
    """Turns errors of allocators, and the death of a loader worker, into OutOfMemory; others are left as they are."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OutOfMemory(f"{reason}; {_cure(reason, config)}") from error


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


def _cure(reason: str, config: RunConfig) -> str:
    workers = config.loader.workers
    fewer = f"fewer --loader.workers than {workers}" if workers else "--loader.workers 0"
    if _SHARED.search(reason):
        return f"give --loader.workers 0 instead of {workers}, or more room in /dev/shm (docker run --shm-size=8g)"
    if _LIMIT.search(reason):
        return f"give {fewer}, or raise the limit (ulimit -a shows it)"
    smaller = (
        f"a larger --accumulate than {config.accumulate} (the step stays the same), a smaller --batch_size than "
        f"{config.batch_size}"
    )
    if _WORKER.search(reason):
        return f"the system kills workers where memory runs out: give {fewer}, {smaller}, or more memory"
    return f"memory is used up: give {smaller}, or {fewer}"
