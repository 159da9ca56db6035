"""Times of `target_attention`, with `pytest --benchmark-only` on this file."""

from collections.abc import Callable


def test_target_attention(timed: Callable[[str], None]) -> None:
    timed("target_attention")
