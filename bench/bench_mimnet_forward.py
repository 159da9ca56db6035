"""Times of `mimnet_forward`, with `pytest --benchmark-only` on this file."""

from collections.abc import Callable


def test_mimnet_forward(timed: Callable[[str], None]) -> None:
    timed("mimnet_forward")
