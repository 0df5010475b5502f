"""The mutations of tests/mutations.json still apply to the code; `make mutants` runs them."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def mutations() -> list[Any]:
    spec = importlib.util.spec_from_file_location("mutations", Path(__file__).with_name("mutations.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["mutations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found: list[Any] = module.load()
    return found


MUTATIONS = mutations()


def test_there_are_forty_of_different_names() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 40


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_applies_and_its_tests_exist(mutation: Any) -> None:
    assert (ROOT / "src/mpvg" / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert mutation.tests
    assert all((ROOT / test).is_file() for test in mutation.tests)
