"""One rating of an item by a user, and enough ratings of each: what `prepare` takes away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.readers import RatingTable

Duplicates = Literal["last", "first", "mean", "error"]


@dataclass(frozen=True)
class Cleaned:
    """The ratings that stay, and how many each step removed."""

    ratings: pl.DataFrame
    """Like `RatingTable.ratings`."""
    removed: dict[str, int]
    """Reason to count, in the order of the steps; malformed rows come first."""


def clean(
    table: RatingTable,
    *,
    duplicates: Duplicates = "last",
    min_user_ratings: int = 1,
    min_item_ratings: int = 1,
) -> Cleaned:
    """Settle duplicates, then drop users and items with too few ratings until there are none.

    Args:
        table: What `read_ratings` found.
        duplicates: What counts of several ratings of one item by one user. ``"last"`` and
            ``"first"`` go by timestamp, by the order of the file where there is none or it is the
            same; ``"mean"`` takes the mean at the place and time of the last one; ``"error"``
            refuses them.
        min_user_ratings: Every user that stays has at least this many ratings.
        min_item_ratings: Every item that stays has at least this many. With k in both this is the
            k-core: the largest part in which both hold.

    Raises:
        UserError: a duplicate with ``"error"``, a minimum below 1, or nothing is left.
    """
    for name, value in (
        ("min_user_ratings", min_user_ratings),
        ("min_item_ratings", min_item_ratings),
    ):
        if value < 1:
            raise UserError(f"{name}: got {value}, need a number above 0")
    single = _without_duplicates(table, duplicates)
    stay, few = _frequent(single, min_user_ratings, min_item_ratings)
    if not len(stay):
        raise UserError(
            f"{table.path}: no rating is left of users with {min_user_ratings} and items with "
            f"{min_item_ratings} ratings or more: lower the minimum"
        )
    return Cleaned(
        single[stay] if any(few) else single,
        {
            "malformed": table.skipped.height,
            "duplicate": table.ratings.height - single.height,
            "user below minimum": few[0],
            "item below minimum": few[1],
        },
    )


def _without_duplicates(table: RatingTable, policy: Duplicates) -> pl.DataFrame:
    ratings, pair = table.ratings, ["user_id", "item_id"]
    user, item = (pl.col(name).to_physical().cast(pl.UInt64) for name in pair)
    repeated = ratings.select((user * 2**32 + item).is_duplicated()).to_series()
    if not repeated.any():
        return ratings
    rivals = ratings.filter(repeated)
    if policy == "error":
        again = rivals.filter(~pl.struct(pair).is_first_distinct()).row(0, named=True)
        same = [pl.col(name) == again[name] for name in pair]
        first, unit = rivals.filter(same)["line"][0], table.unit
        raise UserError(
            f"{table.path}, {unit} {again['line']}: user {again['user_id']} rates item "
            f"{again['item_id']} again after {unit} {first}: correct the file, or choose with "
            "--duplicates last, first or mean"
        )
    rivals = rivals.sort([name for name in ("timestamp", "line") if name in rivals.columns])
    if policy == "mean":
        rivals = rivals.with_columns(pl.col("rating").mean().over(pair))
    kept = rivals.unique(pair, keep="first" if policy == "first" else "last")
    return pl.concat([ratings.filter(~repeated), kept]).sort("line")


def _frequent(ratings: pl.DataFrame, *minimum: int) -> tuple[np.ndarray, list[int]]:
    """Which ratings stay, and how many were removed because of their user and of their item."""
    columns = [ratings[name].to_physical().to_numpy() for name in ("user_id", "item_id")]
    stay = np.arange(ratings.height)
    removed = [0, 0]
    while True:
        before = len(stay)
        for k, (codes, least) in enumerate(zip(columns, minimum, strict=True)):
            rare = np.bincount(codes[stay])[codes[stay]] < least
            removed[k] += int(rare.sum())
            stay = stay[~rare]
        if len(stay) == before:
            return stay, removed
