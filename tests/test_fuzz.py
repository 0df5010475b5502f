"""Whatever is in a file: an answer, or a refusal in one line. `benchmarks/fuzz.py` tries many more examples."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings

import fuzz_values
from fuzz_strategies import TARGETS

EXAMPLES = 200
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name: str) -> None:
    target = TARGETS[name]
    tried = []

    @settings(max_examples=EXAMPLES, suppress_health_check=SLOW, phases=[Phase.generate, Phase.shrink])
    @given(target.examples)
    def attempt(example: object) -> None:
        tried.append(1)
        target.check(example)

    attempt()
    assert len(tried) >= EXAMPLES


def endless() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("attempt", "refused"), [(endless, AssertionError), (lambda: bytes(5 * fuzz_values.MAX_MEMORY), MemoryError)]
)
def test_no_example_runs_for_ever_or_takes_all_memory(
    attempt: Callable[[], object], refused: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits themselves."""
    monkeypatch.setattr(fuzz_values, "MAX_WAIT", 1)
    with pytest.raises(refused), fuzz_values.bounded():
        attempt()
