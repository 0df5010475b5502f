import random
from collections.abc import Callable, Iterator

import hypothesis
import numpy as np
import pytest
import torch

# The first call of a torch function is slow, so no deadline; the same examples in every run, so that a failure stays.
hypothesis.settings.register_profile("mpvg", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("mpvg")


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Every test starts from the same seeds, and on one thread, because sums over threads differ in their last bits."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused in one line, and returns that line."""
    from mpvg.cli.main import main

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("mpvg: error: ")
        assert said.count("\n") == 1, said
        return said.removeprefix("mpvg: error: ").rstrip("\n")

    return run


LONG = ("test_kill", "test_restart", "test_graphs", "test_contract", "test_runner", "test_demo", "test_claims")
"""Files that take long although they have few tests: they come first, so that none is left alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)  # a stable sort
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
