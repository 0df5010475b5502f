"""Whatever is in a file: an answer, or a refusal in one line. `benchmarks/fuzz.py` tries many more examples."""

import pytest
from hypothesis import HealthCheck, given, settings

from fuzz_strategies import TARGETS

EXAMPLES = 200
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name: str) -> None:
    target = TARGETS[name]
    tried = []

    @settings(max_examples=EXAMPLES, suppress_health_check=SLOW)
    @given(target.examples)
    def attempt(example: object) -> None:
        tried.append(1)
        target.check(example)

    attempt()
    assert len(tried) >= EXAMPLES
