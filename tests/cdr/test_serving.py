"""A trained MIMNet recommends what its own predictions rank first."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from mimnet_fast.cdr import checkpoints, results
from mimnet_fast.cdr.biases import fit_biases
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import BaseModels
from mimnet_fast.cdr.models import MODELS, MIMNet
from mimnet_fast.cdr.packing import pack
from mimnet_fast.cdr.protocol import LIKED_ABOVE
from mimnet_fast.cdr.serving import Recommender

from .test_cli import QUICK, invoke


def names(prepared: Path, table: str) -> list[str]:
    found: list[str] = pl.read_parquet(prepared / f"{table}.parquet").to_series().to_list()
    return found


def ratings(
    trained: tuple[Path, BaseModels], users: Tensor, source: Tensor | None = None
) -> Tensor:
    """What the trained module rates all items ``[users, items]``, biases included."""
    folder, stage1 = trained
    build = MODELS["mimnet"].build
    assert build is not None
    model = build(stage1.config)
    model.load_state_dict(checkpoints.load(folder / "mimnet.safetensors")[0])
    inputs = stage1.frozen("final", MIMNet)
    if source is not None:
        inputs = replace(inputs, source_users=source)
    count = len(inputs.target_items)
    with torch.no_grad():
        found = model(
            inputs, users.repeat_interleave(count), torch.arange(count).repeat(len(users))
        ).unflatten(0, (-1, count))
    if stage1.config.base == "mf":
        return found
    data, sizes = stage1.raw, stage1.dataset
    target = fit_biases(data.final.train_target, sizes.num_target_users, sizes.num_target_items)
    return found + target.mean + target.items + user_bias(stage1)[users][:, None]


def user_bias(stage1: BaseModels) -> Tensor:
    """What users of both domains add, from the difference of raw and residual ratings."""
    data, sizes = stage1.raw, stage1.dataset
    target = fit_biases(data.final.train_target, sizes.num_target_users, sizes.num_target_items)
    found = torch.zeros(sizes.num_overlap)
    if stage1.config.base == "biased-mf":
        test = data.final.evaluation
        expected = test.values - stage1.split.final.evaluation.values
        found[test.users] = expected - target.mean - target.items[test.items]
        meta = data.final.train_meta
        expected = meta.values - stage1.split.final.train_meta.values
        found[meta.users] = expected - target.without_itself(meta)
    return found


def assert_best(found: list[Any], scores: Tensor, items: list[str], k: int) -> None:
    values, indices = scores.topk(k)
    assert [each.item for each in found] == [items[i] for i in indices]
    np.testing.assert_allclose([each.score for each in found], values, rtol=1e-4, atol=1e-5)


def test_scores_are_the_models_ratings(
    trained: tuple[Path, BaseModels], recommender: Recommender, prepared: Path
) -> None:
    users = trained[1].raw.final.evaluation.users.unique()
    people, items = names(prepared, "source_users"), names(prepared, "target_items")
    scores = ratings(trained, users)
    assert (scores.std(0) > 1e-4).any()
    found = recommender.recommend([people[u] for u in users], top_k=7, exclude_seen=False)
    for of_user, expected in zip(found, scores, strict=True):
        assert_best(of_user, expected, items, 7)


def test_seen_items_stay_out(
    trained: tuple[Path, BaseModels], recommender: Recommender, prepared: Path
) -> None:
    dataset = trained[1].dataset
    people, items = names(prepared, "source_users"), names(prepared, "target_items")
    chosen = [3, dataset.num_source_users - 1, 0]  # the second one is not in the target domain
    found = recommender.recommend([people[u] for u in chosen], top_k=100)
    for user, of_user in zip(chosen, found, strict=True):
        seen = set()
        if user < dataset.num_overlap:
            seen = {items[i] for i in dataset.target.items[dataset.target.users == user]}
            assert seen
        assert {each.item for each in of_user} == set(items) - seen
        assert len(of_user) == len(items) - len(seen)


def test_a_new_user_is_folded_in(
    trained: tuple[Path, BaseModels], recommender: Recommender, prepared: Path
) -> None:
    stage1 = trained[1]
    data, tables = stage1.raw, stage1.frozen("final", MIMNet)
    source, count = stage1.dataset.source, stage1.dataset.num_source_users
    likes = source.where(source.values > LIKED_ABOVE)
    means = torch.stack(
        [tables.source_items[likes.items[likes.users == u][-20:]].mean(0) for u in range(count)]
    )
    known = ~means.isnan().any(1)
    design = torch.cat([means, torch.ones(count, 1)], 1).double()
    fit = torch.linalg.lstsq(
        design[known],
        tables.source_users[known].double(),
        driver="gelsd",  # as columns may depend on each other
    ).solution
    vectors = (design @ fit).float()

    user = torch.tensor([5])
    scores = ratings(trained, user, vectors)[0] - user_bias(stage1)[5]
    ids, items = names(prepared, "source_items"), names(prepared, "target_items")
    liked = [ids[i] for i in data.histories[5, : data.lengths[5]]]
    assert len(liked) > 2
    found = recommender.recommend(histories=[liked, ["s1"] * 20, ["s2", *["s1"] * 20]], top_k=6)
    assert_best(found[0], scores, items, 6)
    assert found[1] == found[2]


def test_errors(recommender: Recommender, trained: tuple[Path, BaseModels], tmp_path: Path) -> None:
    for arguments, message in [
        ({"users": ["nobody", "u20"]}, "source user: got 'nobody', which"),
        ({"histories": [["s1"], ["s1", "t1"]]}, "source item: got 't1', which"),
        ({"histories": [[]]}, r"histories\[0\]: got no item"),
        ({"histories": ["s1"]}, r"histories\[0\]: got the string 's1'"),
        ({"users": "u20"}, "users: got the string 'u20'"),
        ({"users": ["u20"], "top_k": 0}, "top_k: got 0"),
        ({}, "got both or none"),
        ({"users": ["u20"], "histories": [["s1"]]}, "got both or none"),
    ]:
        with pytest.raises(UserError, match=message):
            recommender.recommend(**arguments)
    with pytest.raises(UserError, match="does not exist: mimnet-fast train"):
        Recommender.load(tmp_path)
    with pytest.raises(UserError, match="got format None version None"):
        Recommender.load(trained[0] / "mimnet.safetensors")


def test_no_user_is_no_error(recommender: Recommender) -> None:
    assert recommender.recommend([]) == []
    assert recommender.recommend(histories=[]) == []


def test_a_run_of_another_model_is_not_packed(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run of mimnet"):
        pack(prepared, tmp_path)


def test_command(prepared: Path, tmp_path: Path) -> None:
    trained = invoke("train", prepared, "--out", tmp_path, *QUICK)
    assert f"for mimnet-fast recommend: {tmp_path / 'recommender.safetensors'}" in trained.stdout
    result = invoke("recommend", tmp_path, "--user", "u20", "u30", "--top-k", 3, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [each["user"] for each in found] == ["u20", "u30"]
    assert [len(each["items"]) for each in found] == [3, 3]
    expected = Recommender.load(tmp_path).recommend(["u20"], top_k=3)[0]
    assert [(each["item"], each["score"]) for each in found[0]["items"]] == expected
    table = invoke("recommend", tmp_path, "--history", "s1", "s2")
    assert "For a new user" in table.stdout
    refused = invoke("recommend", tmp_path, "--user", "nobody")
    assert refused.exit_code == 2
    assert "error: source user: got 'nobody'" in refused.stderr
    assert results.read(tmp_path)["models"]["mimnet"]
