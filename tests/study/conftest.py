"""A study that takes a second."""

from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  takes seconds, which forked workers need not spend again

from mpvg.study.plan import Study, parse_study
from study_text import TEXT


@pytest.fixture
def study() -> Study:
    return parse_study(TEXT.encode(), "mini.yaml")


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    file = tmp_path / "mini.yaml"
    file.write_text(TEXT)
    return file
