from pathlib import Path

import pytest

from mpvg import runs
from mpvg.runs import Run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One epoch on digits."""
    from mpvg.cli.main import main

    path = tmp_path_factory.mktemp("export") / "run"
    arguments = "train --data digits --model vit_mini_patch2_8 --epochs 1 --batch_size 256 --threads 1 --device cpu"
    assert main([*arguments.split(), "--out", str(path)]) == 0
    return runs.load(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "export"
