from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimnet_fast.cdr.cleaning import Cleaned, clean
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.readers import RatingTable, read_ratings


def table(folder: Path, rows: str, columns: str = "user_id,item_id,rating") -> RatingTable:
    (folder / "r.csv").write_text(f"{columns}\n{rows}")
    return read_ratings(folder / "r.csv", on_error="skip")


def kept(cleaned: Cleaned) -> list[tuple[Any, ...]]:
    return cleaned.ratings.drop("line").rows()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("last", [("1", "b", 2.0), ("2", "a", 3.0), ("1", "a", 5.0)]),
        ("first", [("1", "a", 1.0), ("1", "b", 2.0), ("2", "a", 3.0)]),
        ("mean", [("1", "b", 2.0), ("2", "a", 3.0), ("1", "a", 3.0)]),
    ],
)
def test_duplicates_in_the_order_of_the_file(
    tmp_path: Path, policy: Any, expected: list[tuple[str, str, float]]
) -> None:
    cleaned = clean(table(tmp_path, "1,a,1\n1,b,2\n1,a,3\n2,a,3\n1,a,5\n"), duplicates=policy)
    assert kept(cleaned) == expected
    assert cleaned.removed["duplicate"] == 2


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("last", [("1", "a", 4.0, 9.0), ("1", "b", 2.0, 6.0)]),
        ("first", [("1", "b", 2.0, 6.0), ("1", "a", 1.0, 5.0)]),
        ("mean", [("1", "a", 3.0, 9.0), ("1", "b", 2.0, 6.0)]),
    ],
)
def test_time_decides_which_duplicate_is_last(
    tmp_path: Path, policy: Any, expected: list[tuple[str, str, float, float]]
) -> None:
    # Of two ratings at time 9 the later row is the last one; of two at 5 the earlier one is first.
    rows = "1,a,3,9\n1,a,4,9\n1,b,2,6\n1,a,1,5\n1,a,4,5\n"
    found = table(tmp_path, rows, "user_id,item_id,rating,timestamp")
    assert kept(clean(found, duplicates=policy)) == expected


def test_duplicates_can_be_an_error(tmp_path: Path) -> None:
    rows = "1,a,1\n2,a,2\n1,b,3\nx\n1,b,3\n1,a,3\n"
    message = r"r\.csv, line 6: user 1 rates item b again after line 4: .* --duplicates last"
    with pytest.raises(UserError, match=message):
        clean(table(tmp_path, rows), duplicates="error")
    single = clean(table(tmp_path, "1,a,1\n1,b,1\n"), duplicates="error")
    assert len(kept(single)) == 2


def test_minima_are_applied_until_both_hold(tmp_path: Path) -> None:
    # Item c has one rating; without it user 3 has one, and then item b.
    square = "1,x,1\n1,y,2\n2,x,3\n2,y,4\n"
    found = table(tmp_path, square + "3,c,5\n3,b,5\n1,b,1\n")
    cleaned = clean(found, min_user_ratings=2, min_item_ratings=2)
    assert kept(cleaned) == [("1", "x", 1), ("1", "y", 2), ("2", "x", 3), ("2", "y", 4)]
    assert cleaned.removed == {
        "malformed": 0,
        "duplicate": 0,
        "user below minimum": 1,
        "item below minimum": 2,
    }


def test_each_minimum_alone(tmp_path: Path) -> None:
    found = table(tmp_path, "1,x,1\n1,y,2\n2,x,3\n")
    assert kept(clean(found, min_user_ratings=2)) == [("1", "x", 1), ("1", "y", 2)]
    assert kept(clean(found, min_item_ratings=2)) == [("1", "x", 1), ("2", "x", 3)]


def test_core_is_the_largest_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = {(int(a), int(b)) for a, b in rng.geometric(0.1, (800, 2))}
    rows = "".join(f"u{user},i{item},3\n" for user, item in pairs)
    core = clean(table(tmp_path, rows), min_user_ratings=4, min_item_ratings=3)

    left = pairs
    while True:  # straight from the definition
        users, items = ([pair[k] for pair in left] for k in (0, 1))
        smaller = {p for p in left if users.count(p[0]) >= 4 and items.count(p[1]) >= 3}
        if smaller == left:
            break
        left = smaller
    assert 0 < len(left) < len(pairs)
    assert {row[:2] for row in kept(core)} == {(f"u{user}", f"i{item}") for user, item in left}
    assert sum(core.removed.values()) == len(pairs) - len(left)


def test_every_row_of_the_file_is_accounted_for(tmp_path: Path) -> None:
    found = table(tmp_path, "1,a,1\n1,a,2\n1\n1,b,2\n2,a,3\n2,b,nan\n")
    cleaned = clean(found, min_item_ratings=2)
    assert cleaned.removed == {
        "malformed": 2,
        "duplicate": 1,
        "user below minimum": 0,
        "item below minimum": 1,
    }
    assert cleaned.ratings.height + sum(cleaned.removed.values()) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_user_ratings": 0}, "min_user_ratings: got 0, need a number above 0"),
        ({"min_item_ratings": -1}, "min_item_ratings: got -1"),
        ({"min_user_ratings": 3}, "no rating is left of users with 3 and items with 1"),
    ],
)
def test_unusable_minima(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        clean(table(tmp_path, "1,a,1\n1,b,1\n"), **options)
