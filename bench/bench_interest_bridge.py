"""Times of `interest_bridge`, with `pytest --benchmark-only` on this file."""

from collections.abc import Callable


def test_interest_bridge(timed: Callable[[str], None]) -> None:
    timed("interest_bridge")
