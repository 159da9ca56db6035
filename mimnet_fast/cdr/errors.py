"""The one exception of the recommender that is the user's to correct."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """Wrong data, options or files; the message says what was got, what is needed, what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def require_same(what: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with results of other settings.

    Raises:
        UserError: ``stored`` and ``now`` differ.

    >>> require_same("a was made", {"hidden": 50}, {"hidden": 9})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mimnet_fast.cdr.errors.UserError: a was made with hidden = 50 (now 9): name another --out or ...
    """
    changed = [key for key in {**stored, **now} if stored.get(key) != now.get(key)]
    if changed:
        was = ", ".join(f"{key} = {stored.get(key)} (now {now.get(key)})" for key in changed)
        raise UserError(f"{what} with {was}: name another --out or use the same settings")
