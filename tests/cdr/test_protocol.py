"""The protocol against a slow one, written literally on raw ids."""

import csv
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from mimnet_fast.cdr.dataset import Dataset, Ratings, prepare
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.protocol import keep_overlap, split

Row = tuple[str, str, float]


def write_random_ratings(folder: Path, *, numeric: bool, seed: int) -> None:
    draw = random.Random(seed)
    for name, first in (("source", 0), ("target", 5)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "item_id", "rating", "timestamp"])
            for user in draw.sample(range(first, first + 40), 40):
                for item in draw.sample(range(60), draw.randint(1, 45)):
                    user_id = str(user) if numeric else f"user {user}"
                    rating, time = draw.choice([1, 2, 3, 3.5, 4, 5]), draw.randint(0, 9)
                    writer.writerow([user_id, f"{name[0]}{item}", rating, time])


def literal_split(folder: Path, beta: float, seed: int, order: str) -> dict[str, object]:
    rows = {}
    for name in ("source", "target"):
        with (folder / f"{name}.csv").open(newline="") as file:
            rows[name] = list(csv.DictReader(file))
    users = {name: {row["user_id"] for row in rows[name]} for name in rows}
    overlap = list(users["source"] & users["target"])
    overlap.sort(key=int if all(user.isdigit() for user in overlap) else None)

    permuted = np.random.default_rng(seed).permutation(overlap).tolist()
    test = permuted[: round(beta * len(overlap))]
    training = [user for user in overlap if user not in test]
    permuted = np.random.default_rng(seed).permutation(training).tolist()
    validation = permuted[: round(0.1 * len(training))]

    def triples(keep):
        return [
            (row["user_id"], row["item_id"], float(row["rating"]))
            for row in rows["target"]
            if keep(row["user_id"])
        ]

    histories = {}
    for user in overlap:
        liked = [r for r in rows["source"] if r["user_id"] == user and float(r["rating"]) > 3]
        if order == "time":
            liked.sort(key=lambda row: float(row["timestamp"]))
        histories[user] = [row["item_id"] for row in liked][-20:]
    return {
        "histories": histories,
        "test": triples(lambda user: user in test),
        "validation": triples(lambda user: user in validation),
        "final target": triples(lambda user: user not in test),
        "final meta": triples(lambda user: user in training),
        "selection target": triples(lambda user: user not in test and user not in validation),
        "selection meta": triples(lambda user: user in training and user not in validation),
    }


@pytest.mark.parametrize("order", ["file", "time"])
@pytest.mark.parametrize("numeric", [True, False], ids=["numbers", "texts"])
@pytest.mark.parametrize(("beta", "seed"), [(0.2, 2020), (0.5, 10), (0.8, 1)])
def test_split_is_the_literal_one(
    tmp_path: Path, beta: float, seed: int, numeric: bool, order: str
) -> None:
    write_random_ratings(tmp_path, numeric=numeric, seed=seed)
    prepare(tmp_path / "source.csv", tmp_path / "target.csv", tmp_path / "d")
    dataset = Dataset.load(tmp_path / "d")
    found = split(dataset, beta, seed, history_order=order)  # type: ignore[arg-type]
    expected = literal_split(tmp_path, beta, seed, order)

    def ids(name: str) -> list[str]:
        return pl.read_parquet(tmp_path / "d" / f"{name}.parquet").to_series().to_list()

    users, items, source_items = ids("target_users"), ids("target_items"), ids("source_items")

    def triples(ratings: Ratings) -> list[Row]:
        columns = ratings.users.tolist(), ratings.items.tolist(), ratings.values.tolist()
        return [(users[u], items[i], value) for u, i, value in zip(*columns, strict=True)]

    assert triples(found.final.evaluation) == expected["test"]
    assert triples(found.final.train_target) == expected["final target"]
    assert triples(found.final.train_meta) == expected["final meta"]
    assert triples(found.selection.evaluation) == expected["validation"]
    assert triples(found.selection.train_target) == expected["selection target"]
    assert triples(found.selection.train_meta) == expected["selection meta"]
    assert len(found.train_source) == len(dataset.source)

    assert found.histories.shape == (dataset.num_overlap, 20)
    histories = {}
    for user, (row, length) in enumerate(zip(found.histories, found.lengths, strict=True)):
        assert (row[length:] == dataset.num_source_items).all()
        histories[users[user]] = [source_items[item] for item in row[:length].tolist()]
    assert histories == expected["histories"]


def test_split_depends_on_the_seed_only(dataset: Dataset) -> None:
    first, again, other = (split(dataset, 0.3, seed).final.evaluation for seed in (1, 1, 2))
    assert first.users.equal(again.users)
    assert set(first.users.tolist()) != set(other.users.tolist())


def test_a_smaller_overlap_is_part_of_a_larger_one(dataset: Dataset) -> None:
    whole = split(dataset, 0.25, 4)
    assert keep_overlap(whole, 1, 4) is whole
    users = set(whole.final.train_meta.users.tolist())
    validation = set(whole.selection.evaluation.users.tolist())
    kept = users
    for share in (0.8, 0.3, 0.2):
        found = keep_overlap(whole, share, 4)
        smaller = set(found.final.train_meta.users.tolist())
        assert smaller < kept
        assert len(smaller) == round(share * len(users))
        assert set(found.selection.train_meta.users.tolist()) == smaller - validation
        for phase in ("selection", "final"):
            thin, full = getattr(found, phase), getattr(whole, phase)
            assert thin.train_target is full.train_target
            assert thin.evaluation is full.evaluation
            meta = full.train_meta
            own = torch.isin(meta.users, torch.tensor(sorted(smaller)))
            assert thin.train_meta.values.equal(meta.values[own])
        kept = smaller
    assert kept - validation
    other = keep_overlap(whole, 0.2, 5).final.train_meta.users
    assert set(other.tolist()) != kept
    with pytest.raises(UserError, match=r"overlap 0\.001 of 72 training users .* leaves nobody"):
        keep_overlap(whole, 0.001, 4)


def test_a_shorter_history_is_the_end_of_a_longer_one(dataset: Dataset) -> None:
    long, short = split(dataset, 0.25, 4), split(dataset, 0.25, 4, history_length=3)
    assert short.histories.shape == (dataset.num_overlap, 3)
    assert long.lengths.max() > 3
    for row, end, length in zip(short.histories, long.histories, long.lengths, strict=True):
        expected = end[:length][-3:]
        assert row[: len(expected)].equal(expected)
    assert short.lengths.equal(long.lengths.clamp_max(3))


def test_user_who_liked_nothing_has_an_empty_history(tmp_path: Path) -> None:
    rows = "".join(f"{user},x,{3 if user == 4 else 4}\n" for user in range(10))
    for name in ("s.csv", "t.csv"):
        (tmp_path / name).write_text("user_id,item_id,rating\n" + rows)
    prepare(tmp_path / "s.csv", tmp_path / "t.csv", tmp_path / "d")
    found = split(Dataset.load(tmp_path / "d"), 0.2, 1)
    assert found.lengths.tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert (found.histories[4] == 1).all()


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, float("nan")])
def test_beta_out_of_range(dataset: Dataset, beta: float) -> None:
    with pytest.raises(UserError, match="beta: got"):
        split(dataset, beta, 1)


def test_too_few_users_and_missing_timestamps(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"leaves 0 test, 10 validation and 86 training users"):
        split(dataset, 0.001, 1)
    with pytest.raises(UserError, match=r"source\.csv has no timestamp column"):
        split(dataset, 0.2, 1, history_order="time")
