"""Predictors without a model, which every model has to beat and no paper reports."""

from __future__ import annotations

import torch
from torch import Tensor

from mimnet_fast.cdr.biases import SplitBiases, residuals
from mimnet_fast.cdr.protocol import Split


def constant(split: Split) -> Tensor:
    """The middle of the rating scale seen in training: 3 for ratings from 1 to 5."""
    seen = split.final.train_target.values
    return ((seen.min() + seen.max()) / 2).expand(len(split.final.evaluation))


def global_mean(split: Split) -> Tensor:
    """The mean of all target ratings seen in training."""
    return split.final.train_target.values.mean().expand(len(split.final.evaluation))


def item_mean(split: Split) -> Tensor:
    """The mean of the item's training ratings; the global mean for an item without any."""
    train, evaluation = split.final.train_target, split.final.evaluation
    means = _group_means(train.items, train.values, _num_items(split))
    return means.where(means.isfinite(), train.values.mean())[evaluation.items]


def item_median(split: Split) -> Tensor:
    """The median of the item's training ratings; of all of them for an item without any."""
    train, evaluation = split.final.train_target, split.final.evaluation
    medians = _group_medians(train.items, train.values, _num_items(split))
    everything = _group_medians(torch.zeros_like(train.items), train.values, 1)
    return medians.where(medians.isfinite(), everything)[evaluation.items]


def user_mean(split: Split) -> Tensor:
    """The mean of the user's ratings in the source domain, where every test user has some."""
    train = split.train_source
    means = _group_means(train.users, train.values, int(train.users.max()) + 1)
    return means[split.final.evaluation.users]


def biases_and_median(split: Split, biases: SplitBiases) -> Tensor:
    """What biases expect, plus the median of what they leave of the ratings transfer learns from.

    Biases minimise squared errors. Ratings pile up at the top of the scale, where their median is
    above their mean, and the best constant for absolute errors is the median.
    """
    left = residuals(split, biases).final.train_meta.values
    return biases.final.expected(split.final.evaluation) + left.median()


def biases_rounded(split: Split, biases: SplitBiases) -> Tensor:
    """The rating that is nearest to `biases_and_median`: many ratings are then met exactly."""
    return nearest_rating(biases_and_median(split, biases), split.final.train_target.values)


def nearest_rating(predicted: Tensor, ratings: Tensor) -> Tensor:
    """What occurs among ``ratings`` and is nearest to each prediction.

    >>> nearest_rating(torch.tensor([0.2, 3.4, 4.6]), torch.tensor([1.0, 3.0, 4.0, 4.0]))
    tensor([1., 3., 4.])
    """
    scale = ratings.unique()
    return scale[torch.bucketize(predicted, (scale[1:] + scale[:-1]) / 2)]


def _num_items(split: Split) -> int:
    final = split.final
    return int(torch.cat([final.train_target.items, final.evaluation.items]).max()) + 1


def _group_means(groups: Tensor, values: Tensor, size: int) -> Tensor:
    """Mean of the values of each group ``[size]``, NaN for a group without any."""
    sums = torch.bincount(groups, values.double(), minlength=size)
    return (sums / torch.bincount(groups, minlength=size)).float()


def _group_medians(groups: Tensor, values: Tensor, size: int) -> Tensor:
    """Median of the values of each group ``[size]``, midway if two stand there; NaN without any.

    >>> _group_medians(torch.tensor([0, 2, 0, 2, 2]), torch.tensor([4.0, 1.0, 5.0, 1.0, 3.0]), 3)
    tensor([4.5000,    nan, 1.0000])
    """
    order = values.argsort()
    order = order[groups[order].argsort(stable=True)]
    counts = torch.bincount(groups, minlength=size)
    middle = counts.cumsum(0) - counts + (torch.stack([counts - 1, counts]) // 2)
    medians = values[order][middle.clamp(0, len(values) - 1)].mean(0)
    return medians.where(counts > 0, torch.nan)
