"""Times of `catalogue_top_k`, with `pytest --benchmark-only` on this file."""

from collections.abc import Callable


def test_catalogue_top_k(timed: Callable[[str], None]) -> None:
    timed("catalogue_top_k")
