"""Times of `squash`, with `pytest --benchmark-only` on this file."""

from collections.abc import Callable


def test_squash(timed: Callable[[str], None]) -> None:
    timed("squash")
