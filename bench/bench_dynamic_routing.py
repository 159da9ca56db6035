"""Times of `dynamic_routing`, with `pytest --benchmark-only` on this file."""

from collections.abc import Callable


def test_dynamic_routing(timed: Callable[[str], None]) -> None:
    timed("dynamic_routing")
