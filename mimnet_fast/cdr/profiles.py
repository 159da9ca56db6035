"""How a user rates and how well known an item is, as further coordinates of their vectors.

Factors learned from few ratings say little. Counts and means of the same ratings say more:
where on the scale a user rates, and whether a user takes what everybody takes. As coordinates they
enter a meta network with the capsules of the history, and a bridge at both ends.

====================  ============================================================================
source users          1, bias, share of ratings at the top of the scale, share below its middle,
                      logarithm of the number of ratings, mean logarithm of the items' numbers
source items          1, bias, logarithm of the number of ratings
target items          1, logarithm of the number of training ratings
====================  ============================================================================

Each but the 1 has mean 0 and standard deviation 1 over the users of both domains or over all items,
is cut at `BOUND` deviations, and zeros fill the vector up to `WIDTH`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mimnet_fast.cdr.biases import SHRINKAGE, Biases
from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.protocol import Phase

WIDTH = 6
BOUND = 4.0


class Profiles(NamedTuple):
    """Coordinates `WIDTH` wide, for the tables of the base models."""

    source_users: Tensor
    source_items: Tensor
    target_items: Tensor


def profiles(dataset: Dataset, phase: Phase, biases: Biases) -> Profiles:
    """Profiles of all source users and of the items of both domains.

    Args:
        dataset: Its source ratings are known to all phases.
        phase: Its training ratings say how well known a target item is.
        biases: Of the source domain.
    """
    source, items = dataset.source, dataset.num_source_items
    known = _log_counts(source.items, items)
    lowest, highest = source.values.min(), source.values.max()
    users = [
        biases.users,
        _share(source, source.values == highest, dataset.num_source_users),
        _share(source, source.values < (lowest + highest) / 2, dataset.num_source_users),
        _log_counts(source.users, dataset.num_source_users),
        _means(source.users, known[source.items], dataset.num_source_users),
    ]
    return Profiles(
        _coordinates(users, dataset.num_overlap),
        _coordinates([biases.items, known], items),
        _coordinates(
            [_log_counts(phase.train_target.items, dataset.num_target_items)],
            dataset.num_target_items,
        ),
    )


def _coordinates(columns: list[Tensor], first: int) -> Tensor:
    """``[n, WIDTH]``, standardised by the first rows."""
    table = torch.stack(columns, 1)
    deviation, mean = torch.std_mean(table[:first], 0, correction=0)
    table = ((table - mean) / deviation.clamp_min(1e-6)).clamp(-BOUND, BOUND)
    ones = torch.ones(len(table), 1)
    return torch.cat([ones, table, ones.new_zeros(len(table), WIDTH - 1 - len(columns))], 1)


def _log_counts(groups: Tensor, size: int) -> Tensor:
    return torch.bincount(groups, minlength=size).float().log1p()


def _means(groups: Tensor, values: Tensor, size: int) -> Tensor:
    counts = torch.bincount(groups, minlength=size).clamp_min(1)
    return (torch.bincount(groups, values.double(), minlength=size) / counts).float()


def _share(ratings: Ratings, chosen: Tensor, size: int) -> Tensor:
    """Share of each user's ratings that are chosen, drawn to that of all ratings."""
    everyone = chosen.double().mean()
    left = torch.bincount(ratings.users, chosen.double() - everyone, minlength=size)
    counts = torch.bincount(ratings.users, minlength=size)
    return (everyone + left / (counts + SHRINKAGE)).float()
