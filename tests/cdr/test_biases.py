from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.progress import Progress

from mimnet_fast.cdr import biases
from mimnet_fast.cdr.biases import cold_slope, fit_biases, fit_split, residuals
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.evaluation import errors
from mimnet_fast.cdr.experiment import run
from mimnet_fast.cdr.models import TRIVIAL
from mimnet_fast.cdr.protocol import split


def test_bias_without_a_rating_is_that_of_a_fit_without_it(dataset: Dataset) -> None:
    train = dataset.target
    fitted = fit_biases(train, dataset.num_target_users, dataset.num_target_items)
    found = fitted.without_itself(train)
    for row in (0, 7, len(train) - 1):
        others = (train.items == train.items[row]) & (torch.arange(len(train)) != row)
        left = (train.values[others] - fitted.mean).sum() / (others.sum() + 2)
        torch.testing.assert_close(found[row], fitted.mean + left)


def test_item_without_a_rating_has_no_bias() -> None:
    train = Ratings(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([1.0, 4.0]))
    fitted = fit_biases(train, 3, 3)
    assert fitted.items[2] == 0
    assert fitted.users[2] == 0


def test_slope_is_that_of_the_planted_user_biases() -> None:
    draw = torch.Generator().manual_seed(4)
    user = torch.randn(500, generator=draw)
    users, items = torch.arange(500).repeat(40), torch.arange(40).repeat_interleave(500)
    source = fit_biases(Ratings(users, items, 3 + user[users]), 500, 40)
    train = Ratings(users, items, 4 + 0.6 * source.users[users])
    target = fit_biases(train, 500, 40)
    assert cold_slope(source, target, train) == pytest.approx(0.6, abs=0.01)


def test_residuals_never_see_the_ratings_of_cold_users(dataset: Dataset) -> None:
    data = split(dataset, 0.25, 7)
    other = data.final.evaluation.values.flip(0)
    changed = replace(
        data, final=replace(data.final, evaluation=replace(data.final.evaluation, values=other))
    )
    first, second = (residuals(each, fit_split(dataset, each)) for each in (data, changed))
    assert first.final.train_meta.values.equal(second.final.train_meta.values)
    torch.testing.assert_close(
        data.final.evaluation.values - first.final.evaluation.values,
        other - second.final.evaluation.values,
    )


def test_errors_of_residuals_are_those_of_ratings(dataset: Dataset) -> None:
    data = split(dataset, 0.25, 7)
    fitted = fit_split(dataset, data)
    left = residuals(data, fitted).final.evaluation.values
    expected = errors(TRIVIAL["item_user_bias"][1](data, fitted), data.final.evaluation.values)
    assert errors(torch.zeros_like(left), left) == pytest.approx(expected, abs=1e-6)


def test_median_of_the_rest_is_the_best_constant_by_mae(dataset: Dataset) -> None:
    data = split(dataset, 0.25, 7)
    fitted = fit_split(dataset, data)
    test, meta = data.final.evaluation, data.final.train_meta
    added = TRIVIAL["item_user_bias_median"][1](data, fitted) - fitted.final.expected(test)
    constant = added.mean().item()
    torch.testing.assert_close(added, torch.full_like(added, constant))
    terms = fitted.final.slope * fitted.final.source.users[meta.users]
    expected = fitted.final.target.without_itself(meta) + terms
    mae = [errors(expected + constant + step, meta.values).mae for step in (-0.02, 0.0, 0.02)]
    assert mae[1] < min(mae[0], mae[2])


def test_mimnet_on_biases_beats_the_published_base(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mae, fit = {}, Mock(wraps=fit_biases)
    monkeypatch.setattr(biases, "fit_biases", fit)
    for base in ("mf", "biased-mf"):
        config = Config(beta=0.25, base=base, base_epochs=2, epochs=2, prototypes=5)
        found = run(dataset, config, ["mimnet"], tmp_path / base, Progress(disable=True))
        mae[base] = found["models"]["mimnet"]["honest"]["mae"]
    assert mae["biased-mf"] < mae["mf"]
    assert fit.call_count == 2 * 3, "of the source domain, and of the target domain in each phase"


def test_unknown_base_is_refused() -> None:
    with pytest.raises(UserError, match="base: got 'svd', need one of mf, biased-mf"):
        Config(base="svd")  # type: ignore[arg-type]
