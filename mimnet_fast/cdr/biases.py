"""Ratings without a model: the mean, what the item adds, what the user adds, each shrunk to 0.

::

    item bias  b_i = sum over its ratings of (r - mean) / (count + SHRINKAGE)
    user bias  b_u = sum over its ratings of (r - mean - b_i) / (count + SHRINKAGE)

The baseline estimates of Koren (KDD 2008), in closed form. An item or user without a rating has
bias 0. The bias of a cold-start user comes from the source domain, times one slope for all users:
the least-squares fit of the training users' target ratings on their source biases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.protocol import Phase, Split

SHRINKAGE = 2.0


@dataclass(frozen=True)
class Biases:
    """Mean and biases of one domain."""

    mean: Tensor
    users: Tensor
    items: Tensor
    item_counts: Tensor

    def expected(self, ratings: Ratings) -> Tensor:
        """Mean, item bias and user bias, for users whose ratings were seen."""
        return self.without_user(ratings) + self.users[ratings.users]

    def without_user(self, ratings: Ratings) -> Tensor:
        """Mean and item bias."""
        return self.mean + self.items[ratings.items]

    def without_itself(self, ratings: Ratings) -> Tensor:
        """Mean and item bias as they were without the rating, for ratings that were seen."""
        weight = self.item_counts[ratings.items] + SHRINKAGE
        own = ratings.values - self.mean
        return self.mean + (weight * self.items[ratings.items] - own) / (weight - 1)


def fit_biases(train: Ratings, num_users: int, num_items: int) -> Biases:
    """Mean and biases of the ratings of a domain with so many users and items.

    >>> train = Ratings(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([1.0, 4.0]))
    >>> fit_biases(train, 3, 3).items
    tensor([-0.5000,  0.5000,  0.0000])
    """
    mean = train.values.mean()
    items = _shrunk(train.items, train.values - mean, num_items)
    users = _shrunk(train.users, train.values - mean - items[train.items], num_users)
    return Biases(mean, users, items, torch.bincount(train.items, minlength=num_items))


def cold_slope(source: Biases, target: Biases, train_meta: Ratings) -> Tensor:
    """How much of a user's source bias shows in the target domain."""
    user = source.users[train_meta.users]
    left = train_meta.values - target.without_itself(train_meta)
    return (user @ left) / (user @ user).clamp_min(torch.finfo(user.dtype).tiny)


@dataclass(frozen=True)
class PhaseBiases:
    """Biases of both domains in a phase, and the slope between them."""

    source: Biases
    target: Biases
    slope: Tensor

    def expected(self, ratings: Ratings) -> Tensor:
        """Mean, item bias and cold-start user's term of target ratings that were not fitted."""
        return self.target.without_user(ratings) + self.user_terms(ratings)

    def user_terms(self, ratings: Ratings) -> Tensor:
        """What cold-start users add to their ratings."""
        return self.slope * self.source.users[ratings.users]


@dataclass(frozen=True)
class SplitBiases:
    """Those of both phases; the source domain's are the same."""

    selection: PhaseBiases
    final: PhaseBiases


def fit_split(dataset: Dataset, split: Split) -> SplitBiases:
    """All biases of a split, each fitted once."""
    source = fit_biases(split.train_source, dataset.num_source_users, dataset.num_source_items)

    def fit(phase: Phase) -> PhaseBiases:
        sizes = dataset.num_target_users, dataset.num_target_items
        target = fit_biases(phase.train_target, *sizes)
        return PhaseBiases(source, target, cold_slope(source, target, phase.train_meta))

    return SplitBiases(fit(split.selection), fit(split.final))


def residuals(split: Split, biases: SplitBiases) -> Split:
    """The split with every rating less what the biases expect, so that models learn the rest.

    The base models lose their own domain's biases. Ratings of ``train_meta`` and ``evaluation``
    lose the mean, the item bias and the cold-start user's term, also where a training user's
    target bias is known: transfer models learn what they are measured on. An error of a residual
    is the error of the rating.
    """
    source = biases.final.source
    return replace(
        split,
        train_source=_less(split.train_source, source.expected(split.train_source)),
        selection=_phase(split.selection, biases.selection),
        final=_phase(split.final, biases.final),
    )


def _phase(phase: Phase, biases: PhaseBiases) -> Phase:
    meta, target = phase.train_meta, biases.target
    return Phase(
        _less(phase.train_target, target.expected(phase.train_target)),
        _less(meta, target.without_itself(meta) + biases.user_terms(meta)),
        _less(phase.evaluation, biases.expected(phase.evaluation)),
    )


def _less(ratings: Ratings, expected: Tensor) -> Ratings:
    return replace(ratings, values=ratings.values - expected)


def _shrunk(groups: Tensor, values: Tensor, size: int) -> Tensor:
    sums = torch.bincount(groups, values.double(), minlength=size)
    return (sums / (torch.bincount(groups, minlength=size) + SHRINKAGE)).float()
