"""Seeds of all random numbers: functions of (seed, epoch, sample or step), so that no generator's state is saved."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seeds the generators of torch, NumPy and Python from a few whole numbers."""
    words = np.random.SeedSequence(key).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))  # timm's Mixup draws from the legacy generator
    random.seed(int(words[2]))


def derive_seed(*parts: int | str) -> int:
    """Hashes the parts to a seed in [0, 2^32), so that neighboring parts give unrelated random numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU generators of torch, NumPy and Python, and restores their states at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
