"""Times of `multi_granularity_attention`, with `pytest --benchmark-only` on this file."""

from collections.abc import Callable


def test_multi_granularity_attention(timed: Callable[[str], None]) -> None:
    timed("multi_granularity_attention")
