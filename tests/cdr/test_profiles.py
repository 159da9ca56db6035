from dataclasses import replace

import pytest
import torch

from mimnet_fast.cdr.biases import SHRINKAGE, Biases, fit_biases
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.profiles import BOUND, WIDTH, profiles
from mimnet_fast.cdr.protocol import split


def standardized(column: torch.Tensor, first: int) -> torch.Tensor:
    values = column.double()
    spread = values[:first].std(correction=0).clamp_min(1e-6)
    return ((values - values[:first].mean()) / spread).clamp(-BOUND, BOUND).float()


def biases_of(dataset: Dataset) -> Biases:
    return fit_biases(dataset.source, dataset.num_source_users, dataset.num_source_items)


def test_columns_of_users_are_what_they_are_called(dataset: Dataset) -> None:
    source, users = dataset.source, dataset.num_source_users
    found = profiles(dataset, split(dataset, 0.25, 7).final, biases_of(dataset)).source_users
    assert found.shape == (users, WIDTH)
    log_counts = [(source.items == item).sum() for item in range(dataset.num_source_items)]
    known = torch.tensor(log_counts).double().log1p()
    top, low = (source.values == 5).double(), (source.values < 3).double()
    rows = []
    for user in range(users):
        own = source.users == user
        n = own.sum()
        rows.append(
            [
                (top[own].sum() + SHRINKAGE * top.mean()) / (n + SHRINKAGE),
                (low[own].sum() + SHRINKAGE * low.mean()) / (n + SHRINKAGE),
                (n + 1).log(),
                known[source.items[own]].mean(),
            ]
        )
    expected = [
        torch.ones(users),
        standardized(biases_of(dataset).users, dataset.num_overlap),
        *(standardized(column, dataset.num_overlap) for column in torch.tensor(rows).unbind(1)),
    ]
    torch.testing.assert_close(found, torch.stack(expected, 1), atol=1e-4, rtol=1e-4)


def test_items_of_the_target_domain_are_known_by_training_ratings_only(dataset: Dataset) -> None:
    data = split(dataset, 0.25, 7)
    found = profiles(dataset, data.final, biases_of(dataset))
    counts = torch.bincount(data.final.train_target.items, minlength=dataset.num_target_items)
    expected = standardized((counts + 1).double().log(), len(counts))
    torch.testing.assert_close(found.target_items[:, 1], expected, atol=1e-5, rtol=1e-5)
    assert found.target_items[:, 0].eq(1).all()
    assert found.target_items[:, 2:].eq(0).all()
    assert found.source_items[:, 3:].eq(0).all()

    hidden = replace(dataset, target=dataset.target.where(dataset.target.users == 0))
    again = profiles(hidden, data.final, biases_of(hidden))
    assert all(one.equal(other) for one, other in zip(found, again, strict=True))


def test_an_only_value_has_no_deviation(dataset: Dataset) -> None:
    same = replace(dataset.source, values=torch.full_like(dataset.source.values, 4.0))
    changed = replace(dataset, source=same)
    found = profiles(changed, split(dataset, 0.25, 7).final, biases_of(changed))
    assert found.source_users[:, 1:4].abs().max() == pytest.approx(0, abs=1e-3)
