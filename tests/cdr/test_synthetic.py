from pathlib import Path

import polars as pl

from mimnet_fast.cdr.dataset import Dataset, prepare
from mimnet_fast.cdr.evaluation import errors
from mimnet_fast.cdr.synthetic import Synthetic


def test_oracle_is_the_noise_floor(tmp_path: Path) -> None:
    planted = Synthetic(users=400).generate(tmp_path, seed=1)
    prepare(tmp_path / "source.csv", tmp_path / "target.csv", tmp_path / "d")
    ratings = Dataset.load(tmp_path / "d").target
    median, mean = planted.oracle(ratings, tmp_path / "d")
    mae, rmse = errors(median, ratings.values).mae, errors(mean, ratings.values).rmse
    for shift in (-0.1, 0.1):  # the best predictions are better than their neighbours
        assert errors(mean + shift, ratings.values).rmse > rmse
    for shift in (-1, 1):
        assert errors(median + shift, ratings.values).mae > mae
    assert mae < 0.5
    assert errors(ratings.values.mean().expand(len(ratings)), ratings.values).mae > 1.2


def test_data_is_a_function_of_the_seed(tmp_path: Path) -> None:
    written = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        Synthetic(users=50).generate(tmp_path / folder, seed)
        written.append((tmp_path / folder / "target.csv").read_bytes())
    assert written[0] == written[1] != written[2]


def test_users_rate_every_item_once_in_their_domains(tmp_path: Path) -> None:
    Synthetic(users=50, ratings_per_user=9).generate(tmp_path, 1)
    source, target = (pl.read_csv(tmp_path / f"{name}.csv") for name in ("source", "target"))
    for table in (source, target):
        assert table.group_by("user_id").len()["len"].unique().to_list() == [9]
        assert not table.select("user_id", "item_id").is_duplicated().any()
        assert table["rating"].is_between(1, 5).all()
    shared = set(source["user_id"]) & set(target["user_id"])
    assert (len(shared), len(set(source["user_id"]))) == (40, 45)
